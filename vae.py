"""Section 2: the variational autoencoder (VAE), in its plainest form.

A VAE (Kingma & Welling 2014, arXiv:1312.6114) supposes that each image x was made in two steps.
First, a few hidden numbers z were drawn from the prior N(0, I): independent standard normals. Then
x was drawn from p(x | z), which a neural network computes, the decoder. A second network, the
encoder, looks at an image and guesses which z may have made it. Its guess is a distribution, too,
the posterior q(z | x) = N(mu, diag sigma^2); an approximation of the true one.

We want log p(x), the log-probability of our images, to be large; but to compute it, we would have
to try every z. The evidence lower bound (ELBO, their eq. 3) can be computed, and is never larger
than log p(x). So we make the ELBO large instead, or its negative small:

    loss  =  -ELBO  =  E_q[ -log p(x | z) ]  +  KL( q(z | x) || N(0, I) )
                              recon                      KL

recon tells how badly the decoder redraws the image, on average over z drawn from q(z | x). The KL
tells how far q(z | x) is from the prior, and is 0 if they are equal. It keeps the codes z near
N(0, I), so that later we can draw z from N(0, I) and decode it to a new image. Both are in nats (a
nat is 1.44 bits) per image: summed over pixels and over latents, averaged over images.

    python vae.py                       # one minute on two CPU cores
    python vae.py --latent-dim 2        # also draws its latent space, which then fits on paper

You should see (full data, seed 0) a test total of about 236.08 nats: recon 222.37, which is 32.51
above the entropy floor (the recon of a perfect decoder, see data.py), and KL 13.72. Reconstructions
have the right shape, but are blurred.
What its details gain on validation (seed 0; the script as it is: 234.51 nats):
  residual layers in the decoder: 235.80 with plain ones
  OneCycle: 236.95 with a constant learning rate of 1e-3
  Adam's beta2 = 0.99: 235.04 with 0.999
  LayerNorm in the encoder (mean of three seeds): 235.32 without it, 234.52 with it. Without it, a
    few odd images, unlike those it was trained on, get a huge sigma and spoil the mean
Try: in elbo_terms, turn `recon.flatten(1).sum(1)` into `.mean(1)`, a common mistake, and run with
--out try. The KL then weighs 784 times too much. What do the samples look like?
Left out on purpose: dropout, a learned pixel variance, any trainer class.
"""
import math
import time

import torch

import data

# ---------------------------------------------------------------- the model

class Residual(torch.nn.Sequential):
    """x + F(x): F, the given layers, learns only a change (He et al. 2016, arXiv:1603.05027)."""

    def forward(self, x):
        return x + super().forward(x)


class VAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size."""

    def __init__(self, latent_dim=20, hidden=512):
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

def train(model, train_images, val_images, epochs, batch_size, lr):
    """Minimise the negative ELBO on train_images (N, 1, 28, 28) in [0, 1]. Returns the history, a
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
            loss = (recon + kl).mean()
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


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def draw_pictures(model, dataset, history, stem):
    """One test image of each class and its reconstruction, samples from the prior, the curves."""
    device = next(model.parameters()).device
    first, names = data.one_of_each_class(dataset.test_labels)
    x = dataset.test_images[first].to(device)           # (10, 1, 28, 28)
    logits, _, _ = model(x)
    data.image_grid(torch.stack([x[:, 0], logits[:, 0].sigmoid()]),
                    f"{stem}-reconstructions.png", "Test images and their reconstructions",
                    ("original", "decoded z"), names)
    z = torch.randn(80, model.latent_dim, device=device)
    data.image_grid(model.decode(z).sigmoid().view(8, 10, 28, 28), f"{stem}-samples.png",
                    "Decoded draws from the prior N(0, I)")
    data.plot_curves(history, f"{stem}-curves.png")


@torch.no_grad()
def draw_map(model, dataset, path):
    """The map of a latent space with two dimensions (Kingma & Welling, figure 4): where the encoder
    puts the test images, and what the decoder draws at each place."""
    device = next(model.parameters()).device
    figure = data.Figure(figsize=(11, 5.5), dpi=75, layout="constrained")
    left = figure.add_subplot(1, 2, 1, title="Where the encoder puts the test images (mu)",
                              xlabel="z1", ylabel="z2", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    mu, _ = model.encode(dataset.test_images.to(device))                    # (N, 2)
    for c, name in enumerate(data.CLASSES):
        z1, z2 = mu[dataset.test_labels == c].cpu().T
        left.scatter(z1, z2, s=2, color=f"C{c}", label=name)
    left.legend(loc="upper right", fontsize=8, markerscale=4)
    # Quantiles of N(0, 1) cover the prior evenly: each row and column has the same probability.
    quantiles = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.03, 0.97, 16))
    z1 = quantiles.repeat(16)                           # (256,), from left to right in each row
    z2 = quantiles.flip(0).repeat_interleave(16)        # (256,), the largest z2 in the top row
    images = model.decode(torch.stack([z1, z2], dim=1).to(device)).sigmoid()
    ticks = [f"{value:.1f}" for value in quantiles.tolist()]
    right = figure.add_subplot(1, 2, 2, xlabel="z1", ylabel="z2")
    data.draw_grid(right, images.view(16, 16, 28, 28), "What the decoder draws at each place",
                   rows=ticks[::-1], columns=ticks)
    data.save_figure(figure, path)


@torch.no_grad()
def draw_idea(model, dataset, path):
    """The way of one test image through a VAE with two latents: from the image to q(z | x), from
    there to three draws of z, and from each of these to what the decoder makes of it."""
    device = next(model.parameters()).device
    x = dataset.test_images[:1].to(device)              # (1, 1, 28, 28)
    mu, logvar = model.encode(x)                        # (1, 2) each
    sigma = torch.exp(0.5 * logvar)
    z = model.reparameterize(mu.repeat(3, 1), logvar.repeat(3, 1))          # (3, 2): three draws
    decoded = model.decode(z).sigmoid()                 # (3, 1, 28, 28)

    figure = data.Figure(figsize=(11, 3.6), dpi=100, layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(3, 5, 3))
    data.draw_grid(figure.add_subplot(grid[0]), x, "1. an image x")
    m1, m2 = mu[0].tolist()
    s1, s2 = sigma[0].tolist()
    axes = figure.add_subplot(grid[1], title="2. the encoder: where may its z lie?",
                              xlabel="z1", ylabel="z2",
                              xlim=(m1 - 6 * s1, m1 + 6 * s1), ylim=(m2 - 4 * s2, m2 + 4 * s2))
    others, _ = model.encode(dataset.test_images.to(device))                # (N, 2)
    axes.scatter(others[:, 0].cpu(), others[:, 1].cpu(), s=4, color="silver",
                 label="mu of other test images")
    circle = torch.linspace(0, 2 * math.pi, 100)
    axes.plot(m1 + 2 * s1 * circle.cos(), m2 + 2 * s2 * circle.sin(),
              label="q(z | x): mu and 2 sigma around it")
    axes.plot(m1, m2, "o", color="C0")
    axes.plot(z[:, 0].cpu(), z[:, 1].cpu(), "x", color="C1", label="3. three draws of z")
    for number, (z1, z2) in enumerate(z.tolist(), 1):
        axes.annotate(f"{number}", (z1, z2), (4, 4), textcoords="offset points", color="C1")
    axes.legend(loc="upper left", fontsize=7)
    data.draw_grid(figure.add_subplot(grid[2]), decoded, "4. the decoder: how\neach draw may look",
                   ("draw 1", "draw 2", "draw 3"))
    data.save_figure(figure, path)


# ---------------------------------------------------------------- the section

def arguments():
    """The flags of this script, with their defaults."""
    parser = data.Parser(__doc__)
    parser.add_argument("--epochs", type=int, default=24, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in one step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=20, help="dimensions of z")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def load_model(path, device="cpu"):
    """(trained model in eval mode, what else its checkpoint holds); UserError if it is unusable."""
    meta = data.read_checkpoint(path, "vae")
    model = VAE(meta["config"]["latent_dim"])
    return data.load_weights(model, meta, path).to(device), meta


@data.command
def main(argv=None, dataset=None):
    """Train, test, save, draw; returns [path of the checkpoint]. dataset: what data.load() gave."""
    parser = arguments()
    args = parser.parse_args(argv)
    data.check_flags(args)
    device = data.pick_device(args.device)
    dataset = dataset or data.load(args.data)

    torch.manual_seed(args.seed)
    model = VAE(args.latent_dim).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"device {device}, {parameters:,} parameters", flush=True)
    start = time.time()
    history = train(model, dataset.train_images, dataset.val_images,
                    args.epochs, args.batch_size, args.lr)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images)
    metrics["seconds"] = time.time() - start

    name = data.run_name(f"vae-{dataset.source}-seed{args.seed}", parser, args)
    path = args.out / f"{name}.pt"
    data.save_checkpoint(path, script="vae", config=data.settings(args), source=dataset.source,
                         seed=args.seed, device=str(device), metrics=metrics,
                         state_dict=model.state_dict())
    draw_pictures(model, dataset, history, args.out / name)
    if args.latent_dim == 2:
        draw_map(model, dataset, args.out / f"{name}-map.png")
        draw_idea(model, dataset, args.out / f"{name}-idea.png")
    floor = data.pixel_entropy(dataset.test_images).mean().item()
    print(f"test ({dataset.source}): recon {metrics['recon']:.2f},"
          f" {metrics['recon'] - floor:.2f} above the floor, KL"
          f" {metrics['kl']:.2f}, total {metrics['total']:.2f} nats per image,"
          f" {metrics['seconds']:.0f} s")
    print(f"-> {path} and the pictures {name}-*.png")
    return [path]


if __name__ == "__main__":
    main()
