"""Section 4: the beta-VAE: what the weight of the KL decides.

    loss  =  recon  +  beta * KL                  (Higgins et al. 2017, ICLR, eq. 4)

A small beta makes z cheap: z then tells much about the image, and the image is drawn precisely. A
large beta makes z expensive: z tells little, and the image is blurred. Each model is trained with
its own beta, but for all of them we report recon + KL, since totals that are weighted differently
cannot be compared. The network is that of section 2 (vae.py, which explains recon, KL and their
names), but with only 10 latents and 8 epochs, so its totals are higher. Up to test(),
`diff vae.py beta_vae.py` shows little else but beta.

What does each latent, each dimension of z, learn? Traversals show it (decode z while one latent
moves), and so does the correlation of each latent with five attributes of the image, such as its
width. Only active latents are shown: one that costs less than 0.1 nats tells next to nothing.

    python beta_vae.py                  # four minutes on two CPU cores

You should see (full data, seed 0), from beta = 0.25 to 16, recon rise from about 219 to 272 nats on
the test images, and the KL fall from about 23 to 3. Of all 10 latents, about 4 stay active.
Try: --betas 0 1 --epochs 3 --out try. With 0, nothing pulls z to the prior. What does that gain?
"""
import math
import time

import torch

import data

BETAS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
ATTRIBUTES = ["ink", "width", "height", "symmetry", "top"]

# ---------------------------------------------------------------- the model

class BetaVAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size."""

    def __init__(self, latent_dim=10, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),                                             # (B, 784)
            torch.nn.Linear(784, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),    # (B, 512), mean 0, std 1; then scaled
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.dense1 = torch.nn.Linear(latent_dim, hidden)
        self.dense2 = torch.nn.Linear(hidden, hidden)
        self.dense3 = torch.nn.Linear(hidden, hidden)
        self.to_pixels = torch.nn.Sequential(
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
        gelu = torch.nn.functional.gelu
        h = self.dense1(z)                              # (B, 512)
        h = h + self.dense2(gelu(h))                    # residual: h and a learned change
        h = h + self.dense3(gelu(h))
        return self.to_pixels(gelu(h))

    def forward(self, x):
        """x (B, 1, 28, 28) -> logits (B, 1, 28, 28), mu, logvar, each (B, latent_dim).
        One draw of z estimates the mean E_q. It is noisy, but a batch averages many of them."""
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


# ---------------------------------------------------------------- the loss

def kl_of_latents(mu, logvar):
    """KL( N(mu, sigma^2) || N(0, 1) ) of each latent: mu, logvar (B, latent_dim) -> the same shape.
    It needs no draws of z (Kingma & Welling, appendix B):

        KL  =  1/2 [ mu^2 + sigma^2 - log sigma^2 - 1 ]"""
    return 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1)


def elbo_terms(logits, x, mu, logvar):
    """The two parts of the negative ELBO (Kingma & Welling, eq. 10) in nats: sums, never means,
    over pixels and latents. logits, x (B, 1, 28, 28), mu, logvar (B, latent_dim) -> (B,) each.

        recon  =  -log p(x | z)  =  -sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]

    p_i = sigmoid(logit_i) is the probability that pixel i is white. Of grey pixels, this is the
    mean cost of black and white images in which pixel i is white with probability x_i."""
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                     # (B,)
    kl = kl_of_latents(mu, logvar).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing

def check_images(images):
    """ValueError unless the pixels lie in [0, 1], and one is above 0.1: none is if all were divided
    by 255 twice. Other images would be trained on, with numbers that mean nothing."""
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and 0.1 < high <= 1):              # with nan, every comparison is False
        raise ValueError(f"pixels range from {low:.4g} to {high:.4g}: scale them to [0, 1], once")


def train(model, train_images, val_images, epochs, batch_size, lr, beta):
    """Minimise recon + beta KL on train_images (N, 1, 28, 28) in [0, 1].
    Returns the history, a dict for each epoch; FloatingPointError if the loss is not finite.
    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0. Adam's beta2 is 0.99, not its default 0.999: that learns faster here.
    fused only makes each step faster."""
    check_images(train_images)
    check_images(val_images)
    device = next(model.parameters()).device
    train_images = train_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = epochs * math.ceil(len(train_images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   cycle_momentum=False)    # Adam has its own
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
                raise FloatingPointError(f"loss {loss.item()} in epoch {epoch}: choose a lower lr")
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
              f" {val['active']} latents active, {time.perf_counter() - start:.0f} s", flush=True)
    return history


@torch.no_grad()
def test(model, images, batch_size=1000):
    """Mean recon, kl and total of images (N, 1, 28, 28), and how many latents are active: those
    whose mean KL is above 0.1 nats. As in training, z is one draw from q(z | x), not mu. In all
    sections, whatever weight the KL has in training, the total is recon + KL."""
    check_images(images)
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum, each_kl_sum = 0.0, 0.0, 0.0
    for x in images.split(batch_size):
        x = x.to(device)                                # (B, 1, 28, 28)
        logits, mu, logvar = model(x)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        recon_sum += recon.sum().item()
        kl_sum += kl.sum().item()
        each_kl_sum += kl_of_latents(mu, logvar).sum(0)                     # (latent_dim,)
    mean_recon, mean_kl = recon_sum / len(images), kl_sum / len(images)
    active = (each_kl_sum / len(images) > 0.1).sum().item()
    return {"recon": mean_recon, "kl": mean_kl, "total": mean_recon + mean_kl, "active": active}


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


def absolute_correlation(mu, values):
    """How strongly each latent goes with each attribute: |r|, the absolute value of Pearson's
    correlation, from 0 to 1. mu (N, D), values (N, 5) -> (D, 5)."""
    D = mu.shape[1]
    r = torch.corrcoef(torch.cat([mu, values], dim=1).double().T)           # (D + 5, D + 5)
    return r[:D, D:].abs()


@torch.no_grad()
def analyse(model, images):
    """What the latents learned, from images (N, 1, 28, 28), all on the CPU. A dict: kl_of_latents
    (D,), in nats; latents, the numbers of the active ones, the largest KL first; correlations
    (active, 5), of these with the ATTRIBUTES."""
    mu, logvar = model.encode(images)                                       # (N, D)
    kl = kl_of_latents(mu, logvar).mean(0)                                  # (D,)
    latents = [d for d in kl.argsort(descending=True).tolist() if kl[d] > 0.1]
    return {"kl_of_latents": kl, "latents": latents,
            "correlations": absolute_correlation(mu[:, latents], attributes(images))}


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def draw_tradeoff(sweep, path):
    """Left: KL (rate) against recon (distortion; Alemi et al. 2018, arXiv:1711.00464). Right: ten
    draws of z, decoded by all models. sweep: {beta: its model, and what was measured}."""
    figure = data.Figure((11, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="A small beta: z tells more", xlabel="KL (rate), in nats",
             ylabel="recon (distortion), in nats", xmargin=0.25)            # space for the names
    left.plot([found["kl"] for found in sweep.values()],
              [found["recon"] for found in sweep.values()], "o-")
    for beta, found in sweep.items():
        left.text(found["kl"], found["recon"], f"   beta {beta:g}", va="bottom")
    left.set_xlim(left=0)
    models = [found["model"] for found in sweep.values()]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(10, models[0].latent_dim, generator=generator)          # for all models
    images = torch.stack([model.decode(z).sigmoid() for model in models])   # 10 for each beta
    data.draw_grid(right, images, "Decoded draws from the prior N(0, I)",
                   [f"beta {beta:g}" for beta in sweep])
    figure.savefig(path, bbox_inches="tight")


@torch.no_grad()
def draw_traversals(sweep, image, path):
    """Decode the mu of one image (1, 1, 28, 28); then one active latent, a row, is -3 to 3."""
    figure = data.Figure((3 * len(sweep), 4.7), dpi=120, layout="constrained")
    figure.suptitle("Each row: the image decoded, then one latent from -3 to 3. Left: its mean KL")
    for i, (beta, found) in enumerate(sweep.items(), 1):
        mu, _ = found["model"].encode(image)            # (1, D)
        rows, names = [], []
        for d in found["latents"]:
            z = mu.repeat(6, 1)                         # (6, D): the first stays as it is
            z[1:, d] = torch.linspace(-3, 3, 5)
            rows.append(found["model"].decode(z).sigmoid())                 # (6, 1, 28, 28)
            names.append(f"z{d}: {found['kl_of_latents'][d]:.2f}")
        if rows:
            data.draw_grid(figure.add_subplot(1, len(sweep), i), torch.stack(rows),
                           f"beta {beta:g}", names, ["mu", "-3", "-1.5", "0", "1.5", "3"])
    figure.savefig(path, bbox_inches="tight")


def draw_attributes(sweep, path):
    """The correlation of each active latent with each attribute; a matrix for each beta."""
    most = max(len(found["latents"]) for found in sweep.values())
    figure = data.Figure((2.6 * len(sweep), 1.4 + 0.3 * most), dpi=120, layout="constrained")
    figure.suptitle("How strongly each active latent goes with each attribute: |correlation|")
    for i, (beta, found) in enumerate(sweep.items(), 1):
        if not found["latents"]:
            continue
        axes = figure.add_subplot(1, len(sweep), i, title=f"beta {beta:g}")
        axes.imshow(found["correlations"].numpy(), cmap="Blues", vmin=0, vmax=1, alpha=0.5,
                    origin="upper", aspect="auto")
        axes.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES, rotation=45, ha="right")
        axes.set_yticks(range(len(found["latents"])), [f"z{d}" for d in found["latents"]])
        for row, strengths in enumerate(found["correlations"].tolist()):
            for column, strength in enumerate(strengths):
                axes.text(column, row, f"{strength:.2f}", ha="center", va="center", fontsize=8)
    figure.savefig(path, bbox_inches="tight")


# ---------------------------------------------------------------- the section

FLAGS = data.flags(__file__, __doc__, epochs=8, batch_size=256, lr=2.5e-3, latent_dim=10)
FLAGS.add_argument("--betas", type=data.at_least(0.0), nargs="+", default=BETAS)


def load_model(path, device="cpu"):
    """(trained model in eval mode, all that its checkpoint holds). Code in the file is not run."""
    meta = torch.load(path, map_location="cpu", weights_only=True)
    model = BetaVAE(meta["config"]["latent_dim"])
    model.load_state_dict(meta["state_dict"])
    return model.eval().to(device), meta


def main(argv=None, dataset=None):
    """Train, test, save each beta; draw. argv: a list of flags, or None for those of the command
    line; dataset: what data.load() gave, or None to load it. Returns the paths of checkpoints."""
    args = FLAGS.parse_args(argv)
    device = data.pick_device(args.device)
    dataset = dataset or data.load(args.data)

    paths, sweep = [], {}
    for beta in sorted(set(args.betas)):
        path = data.run_path(args, dataset.source, f"-beta{beta}")
        torch.manual_seed(args.seed)                    # the same start for every beta
        model = BetaVAE(args.latent_dim).to(device)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"training {path} on {device}, {parameters:,} parameters", flush=True)
        start = time.perf_counter()
        train(model, dataset.train_images, dataset.val_images,
              args.epochs, args.batch_size, args.lr, beta)
        torch.manual_seed(args.seed)                    # so that evaluate.py can repeat this test
        metrics = test(model, dataset.test_images)
        metrics["seconds"] = time.perf_counter() - start
        data.save_checkpoint(path, args, dataset, metrics, model.state_dict(), beta=beta)
        data.print_test(metrics, dataset)
        paths.append(path)
        model = model.cpu()
        sweep[beta] = {"model": model, **metrics, **analyse(model, dataset.test_images)}

    print("    beta   recon      KL   total  active")
    for beta, row in sweep.items():
        print(f"{beta:8g}{row['recon']:8.2f}{row['kl']:8.2f}{row['total']:8.2f}{row['active']:8}")
    stem = data.run_path(args, dataset.source).with_suffix("")
    if args.betas != BETAS:
        stem = f"{stem}-betas" + "-".join(f"{beta:g}" for beta in sweep)
    draw_tradeoff(sweep, f"{stem}-tradeoff.png")
    if len(sweep) > 4:                                  # of many, every second one fits on a page
        sweep = {beta: sweep[beta] for beta in list(sweep)[::2]}
    draw_traversals(sweep, dataset.test_images[:1], f"{stem}-traversals.png")
    draw_attributes(sweep, f"{stem}-attributes.png")
    print(f"-> the pictures {stem}-*.png")
    return paths


if __name__ == "__main__":
    data.run(main)
