"""Section 4: the beta-VAE: what the weight of the KL decides.

    loss  =  recon  +  beta * KL                  (Higgins et al. 2017, ICLR, eq. 4)

A small beta makes z cheap: z then tells much about the image, and the image is drawn precisely. A
large beta makes z dear: z tells little, and the image is blurred. Each beta is one point of the
rate-distortion curve (Alemi et al. 2018, arXiv:1711.00464): the rate is the KL, the distortion is
recon. Each model is trained with its own beta, but for all of them we report recon + KL, since
totals that are weighted differently cannot be compared.

What does each latent, each dimension of z, learn? Traversals show it (decode z while one latent
moves), and the correlation of each latent with six attributes of the image, such as its width. It
is often said that a large beta gives each attribute a latent of its own. We measure that by a gap:
the best correlation of an attribute minus the second best. Some gap arises by chance; the null
tells how much: it is the gap of the same codes after z was rotated at random.

    python beta_vae.py                  # three minutes on two CPU cores

You should see (full data, seed 0), from beta = 0.25 to 16, recon rise from 219.24 to 272.54 nats on
the test images and KL fall from 23.20 to 2.81. The gap minus its null shows no trend.
Try: --betas 0 1 --epochs 3 (0 is almost an autoencoder). How many latents does it use?
"""
import math
import time
from collections import namedtuple

import torch

import data

BETAS = [0.25, 0.5, 1, 2, 4, 8, 16]
ATTRIBUTES = ["ink", "width", "height", "centre", "symmetry", "top"]

# ---------------------------------------------------------------- the model

class Residual(torch.nn.Sequential):
    """x + F(x): F, the given layers, learns only a change (He et al. 2016, arXiv:1603.05027)."""

    def forward(self, x):
        return x + super().forward(x)


class BetaVAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size."""

    def __init__(self, latent_dim=10, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(784, hidden), torch.nn.LayerNorm(hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, hidden),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)), torch.nn.GELU(),
            torch.nn.Linear(hidden, 784),               # one logit per pixel
        )

    def encode(self, x):
        """q(z | x): x (B, 1, 28, 28) -> mu, logvar, each (B, latent_dim). logvar is log sigma^2,
        because a network may put out any number, but sigma^2 must be positive."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu, logvar):
        """A draw of z ~ N(mu, sigma^2) through which gradients flow. A draw has no derivative; so
        the randomness is put into eps ~ N(0, I), and z = mu + sigma * eps is plain arithmetic."""
        eps = torch.randn_like(mu)                      # (B, latent_dim)
        return mu + torch.exp(0.5 * logvar) * eps       # sigma = exp(log sigma^2 / 2)

    def decode(self, z):
        """p(x | z): z (B, latent_dim) -> logits (B, 1, 28, 28)."""
        return self.decoder(z).view(-1, 1, 28, 28)

    def forward(self, x):
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


# ---------------------------------------------------------------- the loss

def elbo_terms(logits, x, mu, logvar):
    """The two parts of the negative ELBO (Kingma & Welling, eq. 10) in nats: sums, never means,
    over pixels and latents. logits, x (B, 1, 28, 28), mu, logvar (B, latent_dim) -> (B,) each."""
    # recon = -log p(x | z) = -sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ],  p = sigmoid(logits)
    # (exact for pixels 0 and 1; of grey pixels, a share x_i counts as white and the rest as black)
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                                         # (B,)
    # kl = 1/2 sum_d [ mu_d^2 + sigma_d^2 - log sigma_d^2 - 1 ], the closed form for two Gaussians
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing

def train(model, train_images, val_images, epochs, batch_size, lr, beta):
    """Minimise recon + beta KL on train_images (N, 1, 28, 28) in [0, 1]. Returns the history, a
    list with a dict for each epoch. FloatingPointError if the loss is not finite.

    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0; meanwhile Adam's beta1 goes from 0.95 to 0.85 and back."""
    for images in (train_images, val_images):
        if not 0 <= images.min() <= images.max() <= 1:
            raise ValueError("pixels must lie in [0, 1], since the loss is a binary cross-entropy")
    device = next(model.parameters()).device
    train_images, val_images = train_images.to(device), val_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = math.ceil(len(train_images) / batch_size)   # in one epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history, start = [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        recon_sum, kl_sum = 0.0, 0.0                    # over all images of the epoch
        order = torch.randperm(len(train_images))
        for step, indices in enumerate(order.split(batch_size), 1):
            x = train_images[indices.to(device)]        # (B, 1, 28, 28)
            logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits, x, mu, logvar)
            loss = (recon + beta * kl).mean()           # the one change in the loop
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}, step {step}:"
                                         " choose a lower learning rate (--lr)")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            recon_sum += recon.sum().item()
            kl_sum += kl.sum().item()
        mean_recon, mean_kl = recon_sum / len(train_images), kl_sum / len(train_images)
        val = test(model, val_images)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        seconds = time.time() - start
        print(f"epoch {epoch:3}/{epochs}  "
              f"train: recon {mean_recon:.2f} KL {mean_kl:.2f} total {mean_recon + mean_kl:.2f}  "
              f"val: recon {val['recon']:.2f} KL {val['kl']:.2f} total {val['total']:.2f}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return history


@torch.no_grad()
def test(model, images, batch_size=1000):
    """The mean recon, kl and total of images (N, 1, 28, 28). Draws one z for each image from the
    posterior q(z | x), not its mean; the KL has weight 1, however the model was trained."""
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum = 0.0, 0.0
    for x in images.split(batch_size):
        x = x.to(device)                                # (B, 1, 28, 28)
        logits, mu, logvar = model(x)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        recon_sum += recon.sum().item()
        kl_sum += kl.sum().item()
    mean_recon, mean_kl = recon_sum / len(images), kl_sum / len(images)
    return {"recon": mean_recon, "kl": mean_kl, "total": mean_recon + mean_kl}


# ---------------------------------------------------------------- what the latents learned

def extent(occupied):
    """How many lines from the first occupied line to the last: (N, 28) bool -> (N,)."""
    line = torch.arange(28)
    first = torch.where(occupied, line, 28).amin(dim=1)
    last = torch.where(occupied, line, -1).amax(dim=1)
    return (last - first + 1).clamp(min=0).float()      # 0 if no line is occupied


def attributes(images):
    """The six ATTRIBUTES of images (N, 1, 28, 28), as (N, 6): ink is the sum of all pixels; width
    and height are those of the box around all pixels above 1/4; centre is the mean row of the ink;
    symmetry is 1 if left mirrors right; top is the share of the ink in the upper half."""
    x = images[:, 0]                                    # (N, 28, 28): image, row, column
    ink = x.sum((1, 2)).clamp(min=1e-6)                 # never 0, because we divide by it
    bright = x > 0.25
    width = extent(bright.any(dim=1))                   # which columns hold a bright pixel?
    height = extent(bright.any(dim=2))                  # which rows do?
    centre = (x.sum(2) * torch.arange(28)).sum(1) / ink
    symmetry = 1 - (x - x.flip(2)).abs().sum((1, 2)) / (2 * ink)
    top = x[:, :14].sum((1, 2)) / ink
    return torch.stack([ink, width, height, centre, symmetry, top], dim=1)


def is_active(mu):
    """Which latents tell anything: mu (N, D) -> (D,) bool. A latent is active if its mu varies from
    image to image with a variance above 0.01 (Burda et al. 2016, arXiv:1509.00519)."""
    return mu.var(dim=0) > 0.01


def ranks(values):
    """The rank of each number within its column, equal numbers sharing one: (N, K) -> (N, K)."""
    columns = values.T.contiguous()                     # (K, N)
    ordered = columns.sort(dim=1).values
    smaller = torch.searchsorted(ordered, columns)      # how many numbers are smaller
    smaller_or_equal = torch.searchsorted(ordered, columns, right=True)
    return (smaller + smaller_or_equal).T.double() / 2  # the middle of those that are equal


def rank_correlation(a, b):
    """|rho|, the strength of Spearman's rank correlation, between each column of a (N, D) and each
    column of b (N, K): (D, K). It is 1 where one rises with the other or falls with it."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(0), b - b.mean(0)
    a, b = a / a.norm(dim=0), b / b.norm(dim=0)
    return (a.T @ b).abs().nan_to_num()                 # not a number: a column is constant


def gap(rho):
    """Does one latent alone stand for an attribute? The largest |rho| minus the second largest,
    averaged over the attributes: rho (D, K) -> a number from 0 to 1. It follows the mutual
    information gap, MIG (Chen et al. 2018, arXiv:1802.04942, eq. 6), with |rank correlation| in
    place of the mutual information."""
    if len(rho) == 0:
        return 0.0
    ordered = rho.sort(dim=0, descending=True).values   # (D, K), the largest first
    second = ordered[1] if len(ordered) > 1 else 0
    return (ordered[0] - second).mean().item()


def rotated_gaps(mu, values, rotations=20):
    """The null: gaps of the codes mu (N, D) along random axes, where no axis can have a meaning of
    its own; with the attributes values (N, K). (rotations,)."""
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(rotations):
        gaussian = torch.randn(mu.shape[1], mu.shape[1], generator=generator)
        rotation = torch.linalg.qr(gaussian).Q          # a random orthogonal matrix
        gaps.append(gap(rank_correlation(mu @ rotation, values)))
    return torch.tensor(gaps)


# active: how many latents are (a float, to be averaged); gap: see above; null: the mean gap along
# random axes; beaten: the share of those with a smaller gap (0 with less than two active latents);
# kl (D,): nats of each latent; latents: the active ones, the largest KL first; rho (active, 6)
Analysis = namedtuple("Analysis", "active gap null beaten kl latents rho")


@torch.no_grad()
def analyse(model, images):
    """What the latents of a model learned, as an Analysis; all on the CPU. (N, 1, 28, 28)."""
    mu, logvar = model.encode(images)                                       # (N, D)
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).mean(0)              # (D,)
    is_on = is_active(mu)                                                   # (D,)
    latents = [d for d in kl.argsort(descending=True).tolist() if is_on[d]]
    values = attributes(images)
    rho = rank_correlation(mu[:, latents], values)                          # (active, 6)
    null = rotated_gaps(mu[:, latents], values)
    beaten = (null < gap(rho)).double().mean().item()
    return Analysis(float(len(latents)), gap(rho), null.mean().item(), beaten, kl, latents, rho)


# ---------------------------------------------------------------- the pictures

def plot_tradeoff(sweep, path):
    """Rate against distortion, a point for each beta."""
    figure = data.Figure((6, 4.2), 110, layout="constrained")
    axes = figure.add_subplot(title="A small beta lets z tell more, so images are sharper",
                              xlabel="rate: KL, nats", xmargin=0.2,
                              ylabel="distortion: recon above the floor, nats")
    kl = [metrics["kl"] for _, _, metrics in sweep.values()]
    excess = [metrics["excess"] for _, _, metrics in sweep.values()]
    axes.plot(kl, excess, "o-")
    for i, beta in enumerate(sweep):
        axes.annotate(f"beta {beta:g}", (kl[i], excess[i]), (9, 2), textcoords="offset points")
    data.save_figure(figure, path)


@torch.no_grad()
def draw_traversals(sweep, image, path):
    """Decode the code of one image (1, 1, 28, 28) while one latent, a row, moves from -3 to 3; a
    panel for each beta."""
    figure = data.Figure((3.4 * len(sweep), 5.6), 110, layout="constrained")
    figure.suptitle("One latent a row moves from -3 to 3. At the left: its KL, in nats")
    for i, (beta, (model, analysis, _)) in enumerate(sweep.items(), 1):
        mu, _ = model.encode(image)                     # (1, D)
        rows, titles = [], []
        for d in analysis.kl.argsort(descending=True).tolist():     # what tells most comes first
            z = mu.repeat(5, 1)                         # (5, D)
            z[:, d] = torch.linspace(-3, 3, 5)
            rows.append(model.decode(z)[:, 0].sigmoid())                    # (5, 28, 28)
            titles.append(f"z{d}: {analysis.kl[d]:.2f}")
        data.draw_grid(figure.add_subplot(1, len(sweep), i), torch.stack(rows), f"beta {beta:g}",
                       titles, ["-3", "-1.5", "0", "1.5", "3"])
    data.save_figure(figure, path)


def draw_attributes(sweep, path):
    """|rho| of each active latent with each attribute; a matrix for each beta."""
    most = max(len(analysis.latents) for _, analysis, _ in sweep.values())
    figure = data.Figure((3.4 * len(sweep), 1.6 + 0.36 * most), 110, layout="constrained")
    figure.suptitle("How strongly each active latent goes with each attribute: |rank correlation|")
    for i, (beta, (_, analysis, _)) in enumerate(sweep.items(), 1):
        axes = figure.add_subplot(1, len(sweep), i)
        axes.set_title(f"beta {beta:g}: gap {analysis.gap:.2f}, random axes {analysis.null:.2f}",
                       fontsize=9)
        if not analysis.latents:                        # a collapsed model has nothing to show
            axes.set_axis_off()
            continue
        axes.imshow(analysis.rho.numpy(), cmap="Blues", vmin=0, vmax=1, alpha=0.5, aspect="auto")
        axes.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES, rotation=45, ha="right")
        axes.set_yticks(range(len(analysis.latents)), [f"z{d}" for d in analysis.latents])
        for row, strengths in enumerate(analysis.rho.tolist()):
            for column, strength in enumerate(strengths):
                axes.text(column, row, f"{strength:.2f}", ha="center", va="center", fontsize=8)
    data.save_figure(figure, path)


def draw_comparison(sweep, image, stem):
    """The pictures of a sweep {beta: (model, Analysis, metrics)}: its curve, latents of 4 betas."""
    plot_tradeoff(sweep, f"{stem}-tradeoff.png")
    step = math.ceil(len(sweep) / 4)
    some = {beta: sweep[beta] for beta in list(sweep)[::step]}
    draw_traversals(some, image, f"{stem}-traversals.png")
    draw_attributes(some, f"{stem}-attributes.png")
    print(f"-> {stem}-tradeoff.png, -traversals.png, -attributes.png")


# ---------------------------------------------------------------- the section

def arguments():
    """The flags of this script, with their defaults."""
    parser = data.Parser(__doc__)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS, help="weights of the KL")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in one step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=10, help="dimensions of z")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--train-only", action="store_true", help="no analysis and no pictures")
    return parser


def load_model(path, device="cpu"):
    """(trained model in eval mode, what else its checkpoint holds); UserError if it is unusable."""
    meta = data.read_checkpoint(path, "beta_vae")
    model = BetaVAE(meta["config"]["latent_dim"])
    return data.load_weights(model, meta, path).to(device), meta


@data.command
def main(argv=None, dataset=None):
    """Train and test each beta, compare; returns the paths. dataset: what data.load() gave."""
    parser = arguments()
    args = parser.parse_args(argv)
    data.check_flags(args)
    if any(float(f"{beta:g}") != beta for beta in args.betas):
        raise data.UserError("--betas: at most six digits, since they stand in the file names")
    device = data.pick_device(args.device)
    dataset = dataset or data.load(args.data)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    print(f"device {device}", flush=True)

    paths, trained = [], {}
    for beta in args.betas:
        print(f"beta = {beta:g}")
        torch.manual_seed(args.seed)                    # the same start for every beta
        model = BetaVAE(args.latent_dim).to(device)
        start = time.time()
        train(model, dataset.train_images, dataset.val_images,
              args.epochs, args.batch_size, args.lr, beta)
        torch.manual_seed(args.seed)                    # so that evaluate.py can repeat this test
        metrics = test(model, dataset.test_images)
        metrics["seconds"] = time.time() - start
        name = f"beta_vae-beta{beta:g}-{dataset.source}-seed{args.seed}"
        paths.append(args.out / f"{data.run_name(name, parser, args)}.pt")
        data.save_checkpoint(paths[-1], script="beta_vae", config=data.settings(args), beta=beta,
                             source=dataset.source, seed=args.seed, device=str(device),
                             metrics=metrics, state_dict=model.state_dict())
        floor = data.pixel_entropy(dataset.test_images).mean().item()
        metrics["excess"] = metrics["recon"] - floor
        print(f"test ({dataset.source}), beta {beta:g}: recon {metrics['recon']:.2f},"
              f" {metrics['excess']:.2f} above the floor, KL {metrics['kl']:.2f}, total"
              f" {metrics['total']:.2f} nats per image, {metrics['seconds']:.0f} s")
        print(f"-> {paths[-1]}")
        trained[beta] = model.cpu(), metrics
    if args.train_only:
        return paths

    print(f"test ({dataset.source}); beaten: share of the random axes with a smaller gap\n"
          "beta       recon      KL   total  active     gap    null  beaten")
    sweep = {}
    for beta, (model, metrics) in trained.items():
        found = analyse(model, dataset.test_images)
        sweep[beta] = model, found, metrics
        print(f"{beta:<8g}{metrics['recon']:8.2f}{metrics['kl']:8.2f}{metrics['total']:8.2f}"
              f"{found.active:8.0f}{found.gap:8.3f}{found.null:8.3f}{found.beaten:8.0%}")
    name = data.run_name(f"beta_vae-{dataset.source}-seed{args.seed}", parser, args)
    if args.betas != BETAS:
        name += "-betas" + "-".join(f"{beta:g}" for beta in args.betas)
    draw_comparison(sweep, dataset.test_images[:1], args.out / name)
    return paths


if __name__ == "__main__":
    main()
