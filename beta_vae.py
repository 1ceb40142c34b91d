"""Section 4: the beta-VAE: what the weight of the KL decides.

    loss  =  recon  +  beta * KL                  (Higgins et al. 2017, ICLR, eq. 4)

A small beta makes z cheap: z then tells much about the image, and the image is drawn precisely. A
large beta makes z expensive: z tells little, and the image is blurred. Each model is trained with
its own beta, but for all of them we report recon + KL, since totals that are weighted differently
cannot be compared. The network is that of section 2, but with only 10 latents and 8 epochs, so its
totals are higher. Up to test(), `diff vae.py beta_vae.py` shows little else but beta.

What does each latent, each dimension of z, learn? Traversals show it (decode z while one latent
moves), and so does the correlation of each latent with five attributes of the image, such as its
width. It is often said that a large beta leads to disentanglement: each attribute gets a latent of
its own. We measure that by the gap: the correlation of an attribute with its best latent minus that
with the second best. We compare it with the gap of random mixtures of the active latents, such as
z0 + z1 and z0 - z1 in place of z0 and z1: we rotate all mu at random. Mixtures hold the same
information. If their gap is as large, the latents that the training found are nothing special.

    python beta_vae.py                  # four minutes on two CPU cores

You should see (full data, seed 0), from beta = 0.25 to 16, recon rise from 219.16 to 272.13 nats on
the test images and KL fall from 23.43 to 2.82. Over five seeds (results/README.md), the gap grows
from 0.20 to 0.26. But that of random mixtures grows more, since of fewer active latents the second
best is worse. So a large beta does not disentangle here.
Try: --betas 0 1 --epochs 3 --out try. With 0, nothing pulls z to the prior. What does that gain?
"""
import math
import time

import torch

import data

BETAS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
ATTRIBUTES = ["ink", "width", "height", "symmetry", "top"]

# ---------------------------------------------------------------- the model

class Residual(torch.nn.Module):
    """x + F(x): F, the given layers, learns only a change. The activation stands in F, and not
    after the sum, so that x itself is passed on as it is (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, *layers):
        super().__init__()
        self.F = torch.nn.Sequential(*layers)

    def forward(self, x):
        return x + self.F(x)


class BetaVAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size.
    LayerNorm and Residual are no part of the idea of a VAE. But without LayerNorm, a few images may
    cost thousands of nats, and Residual lowers the loss by more than a nat (results/README.md)."""

    def __init__(self, latent_dim=10, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),                                             # (B, 784)
            torch.nn.Linear(784, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),                    # (B, 512)
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, hidden),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)), torch.nn.GELU(),
            torch.nn.Linear(hidden, 784),
            torch.nn.Unflatten(1, (1, 28, 28)),         # (B, 1, 28, 28): one logit per pixel
        )

    def encode(self, x):
        """q(z | x): x (B, 1, 28, 28) -> mu, logvar, each (B, latent_dim).
        logvar is log sigma^2: a network may put out any number, but sigma^2 must be positive."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu, logvar):
        """A draw of z ~ N(mu, sigma^2) through which gradients flow. A draw has no derivative; so
        the randomness is put into eps ~ N(0, I), and z = mu + sigma * eps is plain arithmetic."""
        eps = torch.randn_like(mu)                      # (B, latent_dim)
        return mu + torch.exp(0.5 * logvar) * eps       # sigma = exp(log sigma^2 / 2)

    def decode(self, z):
        """p(x | z): z (B, latent_dim) -> logits (B, 1, 28, 28)."""
        return self.decoder(z)

    def forward(self, x):
        """x (B, 1, 28, 28) -> logits (B, 1, 28, 28), mu, logvar, each (B, latent_dim).
        One draw of z estimates the mean E_q. It is noisy, but a batch averages many of them."""
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


# ---------------------------------------------------------------- the loss

def elbo_terms(logits, x, mu, logvar):
    """The two parts of the negative ELBO (Kingma & Welling, eq. 10) in nats: sums, never means,
    over pixels and latents. logits, x (B, 1, 28, 28), mu, logvar (B, latent_dim) -> (B,) each."""
    # Given z, each pixel is white (1) or black (0), independently of the others; pixel i is white
    # with probability p_i = sigmoid(logit_i). So p(x | z) is a product of p_i and 1 - p_i, and
    #     recon = -log p(x | z) = -sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]
    # Our pixels are grey, x_i between 0 and 1, and we keep the formula. p(x | z) is then no true
    # probability (over all grey images it does not add up to 1), but it is positive, and the proof
    # of the bound needs nothing else.
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                                         # (B,)
    # For one latent, log q(z | x) = -1/2 [ (z - mu)^2 / sigma^2 + log sigma^2 + log 2 pi ], and
    # log p(z) = -1/2 [ z^2 + log 2 pi ]. Under q, the mean of (z - mu)^2 is sigma^2, that of z^2 is
    # mu^2 + sigma^2. So the mean of log q - log p needs no draws; summed over the latents:
    #     kl = 1/2 sum_d [ mu_d^2 + sigma_d^2 - log sigma_d^2 - 1 ]
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing

def check_images(images):
    """ValueError unless images are (N, 1, 28, 28), float32, in [0, 1], as the loss needs them."""
    if images.shape[1:] != (1, 28, 28) or images.dtype != torch.float32 or len(images) == 0:
        raise ValueError(f"these images are {tuple(images.shape)} of {images.dtype}, but should be"
                         " (N, 1, 28, 28) of torch.float32, with N > 0")
    if not (images.min() >= 0 and images.max() <= 1):   # of NaN, both comparisons are False
        raise ValueError("pixels must lie in [0, 1], since the loss is a binary cross-entropy")


def is_active(mu):
    """Which latents tell anything: mu (N, D) -> (D,) bool. A latent whose mu is the same for all
    images says nothing about them. It is called active if its mu varies from image to image, with a
    variance above 0.01 (Burda et al. 2016, arXiv:1509.00519)."""
    return mu.var(dim=0) > 0.01


def train(model, train_images, val_images, epochs, batch_size, lr, beta):
    """Minimise recon + beta KL on train_images (N, 1, 28, 28) in [0, 1].
    Returns the history, a dict for each epoch; FloatingPointError if the loss is not finite.

    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0. Adam's beta2 is 0.99, not its default 0.999: that learns faster here."""
    check_images(train_images)
    check_images(val_images)
    device = next(model.parameters()).device
    train_images = train_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99),
                                 fused=True)            # all weights in one pass: faster
    steps = epochs * math.ceil(len(train_images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   cycle_momentum=False)    # do not move beta1
    history, start = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        recon_sum, kl_sum = 0.0, 0.0                    # over all images of the epoch
        for indices in torch.randperm(len(train_images)).split(batch_size):
            x = train_images[indices.to(device)]        # (B, 1, 28, 28)
            logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits, x, mu, logvar)
            loss = (recon + beta * kl).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}: choose a"
                                         " lower learning rate")
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
        print(f"epoch {epoch}/{epochs}: training"
              f" recon {mean_recon:.2f} KL {mean_kl:.2f} total {mean_recon + mean_kl:.2f},"
              f" validation recon {val['recon']:.2f} KL {val['kl']:.2f} total {val['total']:.2f},"
              f" {val['active']} latents active,"
              f" {time.perf_counter() - start:.0f} s", flush=True)
    return history


@torch.no_grad()
def test(model, images, batch_size=1000):
    """Mean recon, kl and total of images (N, 1, 28, 28), and how many latents are active.
    As in training, z is one draw from q(z | x), not mu. In all sections, whatever weight the KL
    has in training, the total is recon + KL."""
    check_images(images)
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum, all_mu = 0.0, 0.0, []
    for x in images.split(batch_size):
        x = x.to(device)                                # (B, 1, 28, 28)
        logits, mu, logvar = model(x)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        recon_sum += recon.sum().item()
        kl_sum += kl.sum().item()
        all_mu.append(mu)
    mean_recon, mean_kl = recon_sum / len(images), kl_sum / len(images)
    return {"recon": mean_recon, "kl": mean_kl, "total": mean_recon + mean_kl,
            "active": is_active(torch.cat(all_mu)).sum().item()}


# ---------------------------------------------------------------- what the latents learned

def attributes(images):
    """The five ATTRIBUTES of images (N, 1, 28, 28), as (N, 5): ink, the sum of all pixels; width
    and height, in how many columns and rows there is a pixel above 1/4; symmetry, which is 1 if the
    left half mirrors the right half; and top, the share of the ink in the upper half."""
    x = images[:, 0]                                    # (N, 28, 28): image, row, column
    ink = x.sum((1, 2)).clamp(min=1e-6)                 # never 0, because we divide by it
    bright = x > 0.25
    width = bright.any(dim=1).sum(1)                    # along a column, is any pixel bright?
    height = bright.any(dim=2).sum(1)                   # and along a row?
    # the sum of |image - mirror image| is 0 if both are equal, and 2 ink if they share no pixel
    symmetry = 1 - (x - x.flip(2)).abs().sum((1, 2)) / (2 * ink)
    top = x[:, :14].sum((1, 2)) / ink
    return torch.stack([ink, width, height, symmetry, top], dim=1)


def correlation(mu, values):
    """How strongly each latent goes with each attribute: |r|, the absolute value of Pearson's
    correlation, from 0 to 1. mu (N, D), values (N, K) -> (D, K)."""
    D = mu.shape[1]
    r = torch.corrcoef(torch.cat([mu, values], dim=1).double().T)           # (D + K, D + K)
    return r[:D, D:].abs().nan_to_num()                 # not a number: one of the two is constant


def gap(correlations):
    """Does one latent alone stand for an attribute? The largest correlation minus the second one,
    averaged over the attributes: (D, K) -> a number from 0 to 1. It follows the mutual information
    gap (Chen et al. 2018, arXiv:1802.04942, eq. 6), but |r| notices only linear dependence."""
    # two latents more, which go with nothing, so that there always is a best and a second best
    padded = torch.cat([correlations, torch.zeros(2, correlations.shape[1])])
    ordered = padded.sort(dim=0, descending=True).values
    return (ordered[0] - ordered[1]).mean().item()


def rotated_gaps(mu, values, rotations=20):
    """The gaps of random mixtures of the latents, as a list: of mu (N, D) after random rotations,
    with values (N, K). Each latent is first scaled to a standard deviation of 1. Otherwise, all
    mixtures would be nearly copies of the latent that varies most."""
    scaled = mu / mu.std(dim=0).clamp(min=1e-6)         # never 0
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(rotations):
        gaussian = torch.randn(mu.shape[1], mu.shape[1], generator=generator)
        # QR makes its columns perpendicular and of length 1: a random rotation, perhaps mirrored
        rotation = torch.linalg.qr(gaussian).Q          # (D, D)
        gaps.append(gap(correlation(scaled @ rotation, values)))
    return gaps


@torch.no_grad()
def analyse(model, images):
    """What the latents learned, from images (N, 1, 28, 28), all on the CPU. A dict: kl_of_latents
    (D,), in nats; latents, the numbers of the active ones, the largest KL first; correlations
    (active, 5), of these with the ATTRIBUTES; gap, rotated_gap (a mean) and their difference."""
    mu, logvar = model.encode(images)                                       # (N, D)
    # as in elbo_terms, but averaged over the images and not summed over the latents
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).mean(0)              # (D,)
    active = is_active(mu)                                                  # (D,)
    latents = [d for d in kl.argsort(descending=True).tolist() if active[d]]
    values = attributes(images)                                             # (N, 5)
    correlations = correlation(mu[:, latents], values)
    gaps = rotated_gaps(mu[:, latents], values) if latents else [0.0]
    own_gap, rotated_gap = gap(correlations), sum(gaps) / len(gaps)
    return {"kl_of_latents": kl, "latents": latents, "correlations": correlations,
            "gap": own_gap, "rotated_gap": rotated_gap, "difference": own_gap - rotated_gap}


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def draw_tradeoff(sweep, path):
    """Left: KL (rate) against recon (distortion; Alemi et al. 2018, arXiv:1711.00464). Right: ten
    draws of z, decoded by all models. sweep: {beta: its model, and what was measured}."""
    figure = data.Figure((11, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot(1, 2, 1, title="A small beta: z tells more", xmargin=0.25,
                              xlabel="KL (rate), in nats", ylabel="recon (distortion), in nats")
    axes.plot([found["kl"] for found in sweep.values()],
              [found["recon"] for found in sweep.values()], "o-")
    for beta, found in sweep.items():
        axes.text(found["kl"], found["recon"], f"   beta {beta:g}", va="bottom")
    axes.set_xlim(left=0)
    torch.manual_seed(0)
    models = [found["model"] for found in sweep.values()]
    z = torch.randn(10, models[0].latent_dim)           # the same for all models
    images = torch.stack([model.decode(z).sigmoid() for model in models])   # 10 for each beta
    data.draw_grid(figure.add_subplot(1, 2, 2), images, "Decoded draws from the prior N(0, I)",
                   [f"beta {beta:g}" for beta in sweep])
    data.save_figure(figure, path)


@torch.no_grad()
def draw_traversals(sweep, image, path):
    """Decode the mu of one image (1, 1, 28, 28), then let one latent, a row, move from -3 to 3."""
    figure = data.Figure((3 * len(sweep), 4.7), dpi=120, layout="constrained")
    figure.suptitle("Each row: the image decoded, then one latent from -3 to 3. Left: its mean KL")
    for i, (beta, found) in enumerate(sweep.items(), 1):
        mu, _ = found["model"].encode(image)            # (1, D)
        kl = found["kl_of_latents"]                     # (D,)
        rows, titles = [], []
        for d in kl.argsort(descending=True).tolist():  # what tells most comes first
            z = mu.repeat(6, 1)                         # (6, D): the first stays as it is
            z[1:, d] = torch.linspace(-3, 3, 5)
            rows.append(found["model"].decode(z).sigmoid())                 # (6, 1, 28, 28)
            titles.append(f"z{d}: {kl[d]:.2f}")
        data.draw_grid(figure.add_subplot(1, len(sweep), i), torch.stack(rows), f"beta {beta:g}",
                       titles, ["mu", "-3", "-1.5", "0", "1.5", "3"])
    data.save_figure(figure, path)


def draw_attributes(sweep, path):
    """The correlation of each active latent with each attribute; a matrix for each beta."""
    most = max(len(found["latents"]) for found in sweep.values())
    figure = data.Figure((2.6 * len(sweep), 1.4 + 0.3 * most), dpi=120, layout="constrained")
    figure.suptitle("How strongly each active latent goes with each attribute: |correlation|")
    for i, (beta, found) in enumerate(sweep.items(), 1):
        axes = figure.add_subplot(1, len(sweep), i)
        axes.set_title(f"beta {beta:g}: gap {found['gap']:.2f}, rotated {found['rotated_gap']:.2f}",
                       fontsize=9)
        if not found["latents"]:                        # no active latent: nothing to show
            axes.set_axis_off()
            continue
        axes.imshow(found["correlations"].numpy(), cmap="Blues", vmin=0, vmax=1, alpha=0.5,
                    aspect="auto")
        axes.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES, rotation=45, ha="right")
        axes.set_yticks(range(len(found["latents"])), [f"z{d}" for d in found["latents"]])
        for row, strengths in enumerate(found["correlations"].tolist()):
            for column, strength in enumerate(strengths):
                axes.text(column, row, f"{strength:.2f}", ha="center", va="center", fontsize=8)
    data.save_figure(figure, path)


# ---------------------------------------------------------------- the section

def flags():
    """The flags of this script, with their defaults. data.Parser adds --data and --out."""
    parser = data.Parser("beta_vae", __doc__)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS, help="weights of the KL")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in one step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=10, help="dimensions of z")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def load_model(path, device="cpu"):
    """(trained model in eval mode, what else its checkpoint holds); UserError if it is unusable."""
    return data.load_model(path, "beta_vae", lambda config: BetaVAE(config["latent_dim"]), device)


@data.command                                           # prints mistakes of users as one line
def main(argv=None, dataset=None):
    """Train, test, save each beta; draw. argv: a list of flags, or None for those of the command
    line; dataset: what data.load() gave, or None to load it. Returns the paths of checkpoints."""
    args = data.read_flags(flags(), argv)               # checked; and args.device is a device
    dataset = dataset or data.load(args.data)

    paths, sweep = [], {}
    for beta in args.betas:
        print(f"beta {beta:g}")
        torch.manual_seed(args.seed)                    # the same start for every beta
        model = BetaVAE(args.latent_dim).to(args.device)
        data.print_start(args, model)
        start = time.perf_counter()
        train(model, dataset.train_images, dataset.val_images,
              args.epochs, args.batch_size, args.lr, beta)
        torch.manual_seed(args.seed)                    # so that evaluate.py can repeat this test
        metrics = test(model, dataset.test_images)
        metrics["seconds"] = time.perf_counter() - start
        data.print_test(metrics, dataset, args.latent_dim)

        path = data.run_path(args, dataset.source, f"-beta{beta}")
        data.save_checkpoint(path, args, dataset.source, metrics, model.state_dict(), beta=beta)
        print(f"-> {path}")
        paths.append(path)
        model = model.cpu()
        sweep[beta] = {"model": model, **metrics, **analyse(model, dataset.test_images)}

    print("beta       recon      KL   total  active     gap  rotated gap")
    for beta, found in sweep.items():
        print(f"{beta:<8g}{found['recon']:8.2f}{found['kl']:8.2f}{found['total']:8.2f}"
              f"{found['active']:8}{found['gap']:8.3f}{found['rotated_gap']:13.3f}")
    stem = data.run_path(args, dataset.source).with_suffix("")
    if args.betas != BETAS:
        stem = f"{stem}-betas" + "-".join(f"{beta:g}" for beta in args.betas)
    draw_tradeoff(sweep, f"{stem}-tradeoff.png")
    if len(sweep) > 4:                                  # of many, every second one fits on a page
        sweep = {beta: sweep[beta] for beta in args.betas[::2]}
    draw_traversals(sweep, dataset.test_images[:1], f"{stem}-traversals.png")
    draw_attributes(sweep, f"{stem}-attributes.png")
    print(f"-> the pictures {stem}-*.png")
    return paths


if __name__ == "__main__":
    main()
