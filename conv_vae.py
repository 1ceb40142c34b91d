"""Section 3: a convolutional VAE, with KL warm-up and a larger latent space.

The baseline of section 2 treats an image as 784 unrelated numbers. Here it is cut into 7 x 7
patches of 4 x 4 pixels, and convolutions look at each patch and its neighbours; in the decoder a
residual block (He et al. 2016, arXiv:1603.05027) looks again. z grows from 20 to 32 dimensions.
The KL is also warmed up (Bowman et al. 2016, arXiv:1511.06349, section 3.1; Sonderby et al. 2016,
arXiv:1602.02282): its weight w grows from 0 to 1,

    loss  =  recon  +  w(step) * KL,        w(step) = min(1, step / warm-up steps)

so that z learns to carry something before it has to pay for it. Evaluation always uses w = 1.

    python conv_vae.py

Expect (full data, seed 0): about 5 min on 2 CPU cores; on the test images recon
222.65 (32.79 above the floor), KL 13.32, total 235.97: 2.0 nats below the MLP of section 2.
Implementation details, and what they gain on validation after 9 epochs (single runs, seed 0):
  beta2 = 0.99 in Adam instead of 0.999: 235.27 instead of 235.80 nats
  the decoder's residual block: 235.58 without; its second dense layer: 235.42, FID 1.80, not 1.36
Try: --warmup-epochs 0; --epochs 60 --latent-dim 20 --weight-decay 0.1 (README, section 3).
Left out on purpose: normalisation layers, a deeper residual stack, free bits, any other loss.
"""
import contextlib
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


class ConvVAE(torch.nn.Module):
    """7 x 7 patches of 4 x 4 pixels - 512 - z and back: images -> logits, both (B, 1, 28, 28)."""

    def __init__(self, latent_dim=32, channels=64):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.PixelUnshuffle(4),                 # (B, 16, 7, 7): a patch is 16 channels
            torch.nn.Conv2d(16, channels, 3, padding=1), torch.nn.GELU(),   # (B, 64, 7, 7)
            torch.nn.Flatten(),
            torch.nn.Linear(channels * 7 * 7, 512), torch.nn.GELU(),
            torch.nn.Linear(512, 2 * latent_dim),       # mu and log sigma^2
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, 512), torch.nn.GELU(),
            torch.nn.Linear(512, 512), torch.nn.GELU(),
            torch.nn.Linear(512, channels * 7 * 7),
            torch.nn.Unflatten(1, (channels, 7, 7)),
            Residual(channels), torch.nn.GELU(),        # (B, 64, 7, 7)
            torch.nn.Conv2d(channels, 16, 3, padding=1),
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit a pixel
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
        return self.decoder(z)

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

def kl_weight(step, warmup_steps):
    """w(step): from 0 to 1 over the warm-up steps, then 1. step counts optimizer steps from 0."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def mixed_precision(device):
    """A context: bfloat16 where the hardware has it; elsewhere it is emulated and slow, so not."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def train(model, data, epochs, batch_size, lr, device, warmup_epochs, weight_decay=0.0):
    """AdamW (without weight decay: Adam) and OneCycle: the learning rate rises to `lr` for 30 % of
    the steps, then falls to 0 (and beta1 goes from 0.95 to 0.85 and back). One dict an epoch."""
    x_train, x_val = data.train_images.to(device), data.val_images.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), fused=True,
                                  weight_decay=weight_decay)
    steps = -(-len(x_train) // batch_size)              # rounded up: the last batch is smaller
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    warmup_steps = round(warmup_epochs * steps)
    steps_taken, history, start = 0, [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        sums, weights = torch.zeros(2), []              # recon and KL of the whole epoch
        for step, batch in enumerate(torch.randperm(len(x_train)).split(batch_size), 1):
            x = x_train[batch.to(device)]               # (B, 1, 28, 28)
            with mixed_precision(device):
                logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits.float(), x, mu.float(), logvar.float())
            weight = kl_weight(steps_taken, warmup_steps)
            weights.append(weight)
            loss = (recon + weight * kl).mean()
            if not torch.isfinite(loss):
                raise UserError(f"loss is {loss.item()} in epoch {epoch}, step {step}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps_taken += 1                            # training steps only, never validation
            sums += torch.stack([recon.sum(), kl.sum()]).detach().cpu()
        recon, kl = (sums / len(x_train)).tolist()
        val = test(model, x_val)
        seconds = time.time() - start
        history.append({"recon": recon, "kl": kl, "val_recon": val["recon"], "val_kl": val["kl"],
                        "weights": weights})
        print(f"epoch {epoch:3}/{epochs}  KL weight {weights[0]:.2f} to {weights[-1]:.2f}  "
              f"{describe('train', recon, kl, data.floor)}  "
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

def compare(metrics, shown, path, baseline):
    """Numbers and pictures of section 2, where it was run before, beside these."""
    mlp = read_checkpoint(baseline, script="vae") if baseline.exists() else {}
    if "shown" not in mlp:
        print(f"(to compare with the baseline, run vae.py too: {baseline} is not there, or older)")
        return
    for name in ("recon", "kl", "total"):
        print(f"{name:>5}: MLP {mlp['metrics'][name]:.2f}, conv {metrics[name]:.2f}")
    grid = [shown["original"], mlp["shown"]["reconstruction"], shown["reconstruction"],
            mlp["shown"]["sample"][:10], shown["sample"][:10]]
    image_grid(torch.stack(grid), path.with_name(f"{path.stem}-beside-mlp.png"),
               f"Test total: MLP {mlp['metrics']['total']:.1f}, conv {metrics['total']:.1f} nats",
               ("original", "MLP", "conv", "MLP sample", "conv sample"))


def load_model(path, device="cpu"):
    """(trained model in eval mode, meta) from a checkpoint; UserError where it does not fit."""
    meta = read_checkpoint(path, lambda config: ConvVAE(config["latent_dim"]), script="conv_vae")
    return meta["model"].to(device), meta


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.training(epochs=19, lr=2.5e-3, latent_dim=32)
    parser.number("--warmup-epochs", float, 0, 10_000, None, "epochs over which the KL weight grows"
                  " from 0 to 1 (2.0, or --epochs where that is less)")
    parser.number("--weight-decay", float, 0, 10, 0.0, "of the weights, for long runs (0)")
    args = parser.parse_args(argv)

    if args.warmup_epochs is None:
        args.warmup_epochs = min(2.0, args.epochs)
        parser.set_defaults(warmup_epochs=args.warmup_epochs)   # still a default, no trial
    if args.warmup_epochs > args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}:"
                        " lower it, or the KL never weighs in full")
    device = pick_device(args.device)
    data = load(args.data)
    torch.manual_seed(args.seed)
    model = ConvVAE(args.latent_dim).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    print(f"device {device}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    path, config = run_path(parser, args, "conv_vae", data.source, "latent_dim", "warmup_epochs",
                            "weight_decay")
    if args.reuse and path.exists():
        read_checkpoint(path, config=config, source=data.source, seed=args.seed)
        print(f"{path} is there: nothing to train")
        return [path]
    start = time.time()
    history = train(model, data, args.epochs, args.batch_size, args.lr, device, args.warmup_epochs,
                    args.weight_decay)
    torch.manual_seed(args.seed)                        # evaluate.py repeats exactly this test
    metrics = test(model, data.test_images.to(device)) | {"seconds": time.time() - start}
    shown = show(model, data, device)
    save_checkpoint(path, script="conv_vae", config=config, source=data.source, seed=args.seed,
                    device=str(device), metrics=metrics, state_dict=model.state_dict(),
                    shown=shown)
    pictures(shown, history, path)
    print(f"{describe('test', metrics['recon'], metrics['kl'], data.floor)} nats per image"
          f" ({data.source}), {metrics['seconds']:.0f} s")
    compare(metrics, shown, path, args.out / f"vae-{data.source}-seed{args.seed}.pt")
    print(f"-> {path} and beside it -reconstructions.png, -samples.png, -curves.png")
    return [path]


if __name__ == "__main__":
    main()
