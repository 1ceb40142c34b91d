"""Section 2: the variational autoencoder, in its plainest form (an MLP).

A VAE (Kingma & Welling 2014, arXiv:1312.6114) supposes that each image x was made in two steps:
draw z ~ N(0, I), then x ~ p(x | z), a neural network (the decoder). A second network (the encoder)
guesses which z may have made a given x: q(z | x) = N(mu, diag sigma^2). Both are trained together
to minimise an upper bound on -log p(x), the negative evidence lower bound (ELBO, their eq. 3):

    loss  =  E_q[ -log p(x | z) ]  +  KL( q(z | x) || N(0, I) )
              recon: nats to describe   |  kl: nats that z
              the image, given z        |  itself costs

Both terms are in nats per image: summed over pixels and over latents, averaged over images.

    python vae.py

Expect (full data, seed 0): about 2 min on 2 CPU cores; on the test images recon 225.17 (35.31 above
the floor), KL 12.78, total 237.95. Reconstructions: right shape, but blurred.
Implementation details, and what they gain on validation after 11 epochs (single runs, seed 0):
  OneCycle instead of a constant rate of 1e-3: 237.78 instead of 239.51 nats
  beta2 = 0.99 in Adam instead of 0.999: 237.78 instead of 238.34 nats
Try: --latent-dim 2, and scatter mu of the test images coloured by label. Or average the BCE over
the pixels (a common mistake; with --out try): the KL then weighs 784 times too much.
Left out on purpose: dropout, normalisation layers, learned pixel variance, any trainer class.
"""
import math
import time

import torch
from matplotlib.figure import Figure

from data import (CLASSES, Parser, UserError, command, describe, image_grid, load, pick_device,
                  read_checkpoint, run_path, save_checkpoint, write_atomically)

# ---------------------------------------------------------------- the model

class VAE(torch.nn.Module):
    """784 - 512 - 512 - z and back: images in [0, 1] -> logits, both (B, 1, 28, 28)."""

    def __init__(self, latent_dim=20, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(784, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 784),               # one logit a pixel
        )

    def encode(self, x):
        """q(z | x): x (B, 1, 28, 28) -> mu, logvar, each (B, latent_dim); logvar = log sigma^2."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu, logvar):
        """z = mu + sigma * eps with eps ~ N(0, I): random, yet differentiable in mu and sigma."""
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
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                                         # (B,)
    # kl = 1/2 sum_d [ mu_d^2 + sigma_d^2 - log sigma_d^2 - 1 ]
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing

def train(model, data, epochs, batch_size, lr, device):
    """Adam and OneCycle: the learning rate rises to `lr` for 30 % of the steps, then falls to 0
    (and Adam's beta1 goes from 0.95 to 0.85 and back). Returns one dict an epoch."""
    x_train, x_val = data.train_images.to(device), data.val_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = -(-len(x_train) // batch_size)              # rounded up: the last batch is smaller
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history, start = [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        sums = torch.zeros(2)                           # recon and KL of the whole epoch
        for step, batch in enumerate(torch.randperm(len(x_train)).split(batch_size), 1):
            x = x_train[batch.to(device)]               # (B, 1, 28, 28)
            logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits, x, mu, logvar)
            loss = (recon + kl).mean()
            if not torch.isfinite(loss):
                raise UserError(f"loss is {loss.item()} in epoch {epoch}, step {step}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([recon.sum(), kl.sum()]).detach().cpu()
        recon, kl = (sums / len(x_train)).tolist()
        val = test(model, x_val)
        seconds = time.time() - start
        history.append({"recon": recon, "kl": kl, "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch:3}/{epochs}  {describe('train', recon, kl, data.floor)}  "
              f"{describe('val', val['recon'], val['kl'], data.floor)}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return history


@torch.no_grad()
def test(model, images, batch_size=1000):
    """Mean recon, kl, total of images (N, 1, 28, 28): one posterior sample each, KL unweighted."""
    model.eval()
    sums = torch.zeros(2)
    for x in images.split(batch_size):
        logits, mu, logvar = model(x)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        sums += torch.stack([recon.sum(), kl.sum()]).cpu()
    recon, kl = (sums / len(images)).tolist()
    return {"recon": recon, "kl": kl, "total": recon + kl}


# ---------------------------------------------------------------- beyond the ELBO

DRAWS = (1, 2, 5, 10, 20, 50, 100)                      # K


@torch.no_grad()
def importance_weighted_bound(model, elbo_terms, images, labels=(), draws=100, counts=DRAWS):
    """{K: upper bound on -log p(x) in nats} (Burda et al. 2016, arXiv:1509.00519, eq. 8).

    log w = log p(x | z) + log p(z) - log q(z | x), and the bound is -mean log( 1/K sum_k w_k ).
    K = 1 is the negative ELBO. All K (divisors of `draws`) share their draws.
    images (N, 1, 28, 28); labels: (y,) for a CVAE, else (); elbo_terms: of any script.
    """
    log_w = []
    for _ in range(draws):
        mu, logvar = model.encode(images, *labels)
        z = model.reparameterize(mu, logvar)
        recon, _ = elbo_terms(model.decode(z, *labels), images, mu, logvar)
        # log p(z) - log q(z | x); both have the same log 2 pi, which cancels
        log_ratio = 0.5 * ((z - mu).pow(2) / logvar.exp() + logvar - z.pow(2)).sum(1)
        log_w.append(log_ratio - recon)
    log_w = torch.stack(log_w, dim=1).cpu().double()    # (N, draws)
    return {k: -(log_w.unflatten(1, (-1, k)).logsumexp(2) - math.log(k)).mean().item()
            for k in counts}


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def show(model, data, device):
    """One test image of each class and its reconstruction, (10, 28, 28); 80 prior samples."""
    model.eval()
    first = [int((data.test_labels == c).nonzero()[0]) for c in range(len(CLASSES))]
    x = data.test_images[first].to(device)              # (10, 1, 28, 28)
    logits, _, _ = model(x)
    z = torch.randn(80, model.latent_dim, device=device)
    return {"original": x[:, 0].cpu(), "reconstruction": logits[:, 0].sigmoid().cpu(),
            "sample": model.decode(z)[:, 0].sigmoid().cpu()}


def pictures(shown, history, path):
    """Reconstructions, samples from the prior, curves: PNGs beside the checkpoint."""
    image_grid(torch.stack([shown["original"], shown["reconstruction"]]),
               path.with_name(f"{path.stem}-reconstructions.png"),
               "Test images and their reconstructions", ("original", "decoded z"), CLASSES)
    image_grid(shown["sample"].view(8, 10, 28, 28),
               path.with_name(f"{path.stem}-samples.png"), "Decoded draws from the prior N(0, I)")
    plot_curves(history, path.with_name(f"{path.stem}-curves.png"))


def plot_curves(history, path):
    """Recon and KL against epochs, train and validation."""
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    epochs = range(1, len(history) + 1)
    titles = {"recon": "recon, what z does not tell", "kl": "KL, what z tells"}
    for i, (name, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(1, 2, i, xlabel="epoch", ylabel="nats per image",
                                  title=f"{title}: {history[-1][f'val_{name}']:.1f}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot(epochs, [h[name] for h in history], "o-", ms=3, label=f"train {name}")
        axes.plot(epochs, [h[f"val_{name}"] for h in history], "s--", ms=3, label=f"val {name}")
        axes.legend()
    write_atomically(path, figure.savefig)


# ---------------------------------------------------------------- the section

def load_model(path, device="cpu"):
    """(trained model in eval mode, meta) from a checkpoint; UserError where it does not fit."""
    meta = read_checkpoint(path, lambda config: VAE(config["latent_dim"]), script="vae")
    return meta["model"].to(device), meta


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.training(epochs=18, lr=2e-3, latent_dim=20)
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    data = load(args.data)
    torch.manual_seed(args.seed)
    model = VAE(args.latent_dim).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    print(f"device {device}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    path, config = run_path(parser, args, "vae", data.source, "latent_dim")
    if args.reuse and path.exists():
        read_checkpoint(path, config=config, source=data.source, seed=args.seed)
        print(f"{path} is there: nothing to train")
        return [path]
    start = time.time()
    history = train(model, data, args.epochs, args.batch_size, args.lr, device)
    torch.manual_seed(args.seed)                        # evaluate.py repeats exactly this test
    metrics = test(model, data.test_images.to(device)) | {"seconds": time.time() - start}
    shown = show(model, data, device)
    save_checkpoint(path, script="vae", config=config, source=data.source, seed=args.seed,
                    device=str(device), metrics=metrics, state_dict=model.state_dict(),
                    shown=shown)
    pictures(shown, history, path)
    print(f"{describe('test', metrics['recon'], metrics['kl'], data.floor)} nats per image"
          f" ({data.source}), {metrics['seconds']:.0f} s")
    print(f"-> {path} and beside it -reconstructions.png, -samples.png, -curves.png")
    return [path]


if __name__ == "__main__":
    main()
