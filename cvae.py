"""Section 5: the conditional VAE: ask for a class, and z is left mostly with the style.

Encoder and decoder are both told the label y (Kingma et al. 2014, arXiv:1406.5298, model M2; Sohn
et al. 2015, NeurIPS, eq. 4: their x is our y, their prior is learned). Section 2's loss, given y:

    loss  =  E_q(z | x, y) [ -log p(x | z, y) ]  +  KL( q(z | x, y) || N(0, I) )

The encoder sees y as ten constant planes beside the patches of the image, the decoder as a one-hot
vector beside z. As y is known, z need not spell it out: same z, other y: same style, other class.
The total bounds -log p(x | y), not -log p(x): beside a VAE, add log 10 = 2.30 nats for the label.

    python cvae.py

Expect (full data, seed 0): about 5 min on 2 CPU cores; on the test images recon 219.50 (29.64 above
the floor), KL 12.85, total 232.35; with log 10: 234.65, still below the VAE of section 3 (235.97).
Try (with --out try): leave y out of the decoder: z must carry the class again.
Left out on purpose: a learned prior p(z | y), a classifier term in the loss, guidance; also scales
and shifts of the channels by the label (FiLM: Perez et al. 2018, arXiv:1709.07871): on validation,
after 9 epochs of seed 0, 231.90 nats and control 83.8 % with them, 231.97 and 83.9 % without.
"""
import contextlib
import math
import time

import torch
from matplotlib.figure import Figure

from data import (CLASSES, Parser, UserError, command, describe, image_grid, load, pick_device,
                  read_checkpoint, run_path, save_checkpoint, write_atomically)

# ---------------------------------------------------------------- the model

class Residual(torch.nn.Module):
    """x + F(x), (B, C, H, W) -> the same: 3 x 3 convolution looks around, 1 x 1 mixes channels."""

    def __init__(self, channels):
        super().__init__()
        self.around = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.around(torch.nn.functional.gelu(x))
        return x + self.mix(torch.nn.functional.gelu(h))


class CVAE(torch.nn.Module):
    """The network of conv_vae.py, told the label, with z as small as in vae.py and one dense layer
    less: images (B, 1, 28, 28), labels (B,) -> logits (B, 1, 28, 28)."""

    def __init__(self, latent_dim=20, channels=64):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Conv2d(16 + 10, channels, 3, padding=1), torch.nn.GELU(),  # (B, 64, 7, 7)
            torch.nn.Flatten(),
            torch.nn.Linear(channels * 7 * 7, 512), torch.nn.GELU(),
            torch.nn.Linear(512, 2 * latent_dim),       # mu and log sigma^2
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim + 10, 512), torch.nn.GELU(),
            torch.nn.Linear(512, channels * 7 * 7),
            torch.nn.Unflatten(1, (channels, 7, 7)),
            Residual(channels), torch.nn.GELU(),        # (B, 64, 7, 7)
            torch.nn.Conv2d(channels, 16, 3, padding=1),
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit a pixel
        )

    def encode(self, x, y):
        """q(z | x, y): x (B, 1, 28, 28), y (B,) -> mu, logvar, each (B, latent_dim)."""
        patches = torch.nn.functional.pixel_unshuffle(x, 4)                 # (B, 16, 7, 7)
        label = torch.nn.functional.one_hot(y, 10).to(x.dtype)              # (B, 10)
        planes = label[:, :, None, None].expand(-1, -1, 7, 7)               # (B, 10, 7, 7)
        mu, logvar = self.encoder(torch.cat([patches, planes], dim=1)).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu, logvar):
        """z = mu + sigma * eps with eps ~ N(0, I): random, yet differentiable in mu and sigma."""
        eps = torch.randn_like(mu)                      # (B, latent_dim)
        return mu + torch.exp(0.5 * logvar) * eps       # sigma = exp(log sigma^2 / 2)

    def decode(self, z, y):
        """p(x | z, y): z (B, latent_dim), y (B,) -> logits (B, 1, 28, 28)."""
        label = torch.nn.functional.one_hot(y, 10).to(z.dtype)              # (B, 10)
        return self.decoder(torch.cat([z, label], dim=1))

    def forward(self, x, y):
        mu, logvar = self.encode(x, y)
        z = self.reparameterize(mu, logvar)
        return self.decode(z, y), mu, logvar


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

def mixed_precision(device):
    """A context: bfloat16 where the hardware has it; elsewhere it is emulated and slow, so not."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def train(model, data, epochs, batch_size, lr, device):
    """Adam and OneCycle: the learning rate rises to `lr` for 30 % of the steps, then falls to 0
    (and Adam's beta1 goes from 0.95 to 0.85 and back). Returns one dict an epoch."""
    x_train, y_train = data.train_images.to(device), data.train_labels.to(device)
    x_val, y_val = data.val_images.to(device), data.val_labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = -(-len(x_train) // batch_size)              # rounded up: the last batch is smaller
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history, start = [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        sums = torch.zeros(2)                           # recon and KL of the whole epoch
        for step, batch in enumerate(torch.randperm(len(x_train)).split(batch_size), 1):
            x, y = x_train[batch.to(device)], y_train[batch.to(device)]     # (B, 1, 28, 28), (B,)
            with mixed_precision(device):
                logits, mu, logvar = model(x, y)
            recon, kl = elbo_terms(logits.float(), x, mu.float(), logvar.float())
            loss = (recon + kl).mean()
            if not torch.isfinite(loss):
                raise UserError(f"loss is {loss.item()} in epoch {epoch}, step {step}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([recon.sum(), kl.sum()]).detach().cpu()
        recon, kl = (sums / len(x_train)).tolist()
        val = test(model, x_val, y_val)
        seconds = time.time() - start
        history.append({"recon": recon, "kl": kl, "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch:3}/{epochs}  {describe('train', recon, kl, data.floor)}  "
              f"{describe('val', val['recon'], val['kl'], data.floor)}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return history


@torch.no_grad()
def test(model, images, labels, batch_size=1000):
    """Mean recon, kl, total of images (N, 1, 28, 28): one posterior sample each, KL unweighted."""
    model.eval()
    sums = torch.zeros(2)
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        logits, mu, logvar = model(x, y)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        sums += torch.stack([recon.sum(), kl.sum()]).cpu()
    recon, kl = (sums / len(images)).tolist()
    return {"recon": recon, "kl": kl, "total": recon + kl}


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def pictures(model, data, history, path, device):
    """Reconstructions, samples, style x class, same style in another class, curves; as PNGs."""
    model.eval()
    first = [int((data.test_labels == c).nonzero()[0]) for c in range(len(CLASSES))]
    x = data.test_images[first].to(device)              # one image of each class
    y = torch.arange(10, device=device)                 # and its label
    logits, mu, _ = model(x, y)
    image_grid(torch.stack([x[:, 0], logits[:, 0].sigmoid()]),
               path.with_name(f"{path.stem}-reconstructions.png"),
               "Test images and their reconstructions", ("original", "decoded z"), CLASSES)
    z = torch.randn(80, model.latent_dim, device=device)
    image_grid(model.decode(z, y.repeat(8)).sigmoid().view(8, 10, 28, 28),
               path.with_name(f"{path.stem}-samples.png"),
               "z ~ N(0, I), and the class that was asked for", columns=CLASSES)
    z = z[:8].repeat_interleave(10, dim=0)              # one z a row, for all ten classes
    image_grid(model.decode(z, y.repeat(8)).sigmoid().view(8, 10, 28, 28),
               path.with_name(f"{path.stem}-styles.png"),
               "One style z a row, one class a column", columns=CLASSES)
    swapped = model.decode(mu.repeat_interleave(10, dim=0), y.repeat(10)).sigmoid()
    image_grid(torch.cat([x, swapped.view(10, 10, 28, 28)], dim=1),
               path.with_name(f"{path.stem}-swaps.png"),
               "Left a real image, then its style in every class", CLASSES, ("real", *CLASSES))
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
    meta = read_checkpoint(path, lambda config: CVAE(config["latent_dim"]), script="cvae")
    return meta["model"].to(device), meta


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.training(epochs=20, lr=2.5e-3, latent_dim=20)
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    data = load(args.data)
    torch.manual_seed(args.seed)
    model = CVAE(args.latent_dim).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    print(f"device {device}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    path, config = run_path(parser, args, "cvae", data.source, "latent_dim")
    if args.reuse and path.exists():
        read_checkpoint(path, config=config, source=data.source, seed=args.seed)
        print(f"{path} is there: nothing to train")
        return [path]
    start = time.time()
    history = train(model, data, args.epochs, args.batch_size, args.lr, device)
    torch.manual_seed(args.seed)                        # evaluate.py repeats exactly this test
    metrics = test(model, data.test_images.to(device), data.test_labels.to(device))
    metrics["seconds"] = time.time() - start
    save_checkpoint(path, script="cvae", config=config, source=data.source, seed=args.seed,
                    device=str(device), metrics=metrics, state_dict=model.state_dict())
    pictures(model, data, history, path, device)
    print(f"{describe('test', metrics['recon'], metrics['kl'], data.floor)} nats per image"
          f" ({data.source}), {metrics['seconds']:.0f} s")
    print(f"beside a VAE: total + log 10 = {metrics['total'] + math.log(10):.2f}, since"
          " -log p(x) <= -log p(x | y) + log 10")
    print(f"-> {path} and beside it -reconstructions.png, -samples.png, -styles.png, -swaps.png,"
          " -curves.png")
    return [path]


if __name__ == "__main__":
    main()
