"""Section 5: the conditional VAE (CVAE): ask for a class, and z is left with the style.

Encoder and decoder are both told the label y (Kingma et al. 2014, arXiv:1406.5298, model M2; Sohn
et al. 2015, NeurIPS, eq. 4: their x is our y, and their prior is learned). The loss is that of
section 2, with everything given y:

    loss  =  E_q(z | x, y)[ -log p(x | z, y) ]  +  KL( q(z | x, y) || N(0, I) )

The encoder sees y as ten constant planes beside the patches of the image, one of them 1 and the
others 0; the decoder sees it as a one-hot vector beside z. As y is known, z need not tell the class
again. So the same z with another y is the same style in another class.
The total bounds -log p(x | y), not -log p(x). To compare it with that of a VAE, add log 10 = 2.30
nats, the price of the label: -log p(x) <= -log p(x | y) + log 10.

    python cvae.py                      # five minutes on two CPU cores

You should see (full data, seed 0) a test total of about 232.35 nats: recon 219.50, which is 29.64
above the entropy floor, and KL 12.85. With log 10 it is 234.65, still below that of section 3.
Try (with --out try): leave y out of the decoder. Who has to tell the class then?
Left out on purpose: a learned prior p(z | y), a classifier term in the loss, guidance. Scaling and
shifting the channels by the label (FiLM: Perez et al. 2018, arXiv:1709.07871) did not pay: 231.90
nats with it and 231.97 without, on validation after 9 epochs of seed 0.
"""
import math
import time

import torch

import data

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

def train(model, train_images, train_labels, val_images, val_labels, epochs, batch_size, lr,
          bf16=False):
    """Minimise the negative ELBO on train_images (N, 1, 28, 28) in [0, 1] with train_labels (N,);
    one dict an epoch.

    Adam with OneCycle: the learning rate rises to `lr` for 30 % of the steps, then falls to 0, and
    Adam's beta1 goes from 0.95 to 0.85 and back. bf16 computes the network in bfloat16.
    FloatingPointError if the loss is not finite."""
    if not 0 <= train_images.min() <= train_images.max() <= 1:
        raise ValueError("pixels must lie in [0, 1], since the loss is a binary cross-entropy")
    device = next(model.parameters()).device
    train_images, train_labels = train_images.to(device), train_labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = math.ceil(len(train_images) / batch_size)   # in one epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history, start = [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        recon_sum, kl_sum = 0.0, 0.0                    # over all images of the epoch
        for step, batch in enumerate(torch.randperm(len(train_images)).split(batch_size), 1):
            batch = batch.to(device)
            x, y = train_images[batch], train_labels[batch]                 # (B, 1, 28, 28), (B,)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, mu, logvar = model(x, y)
            recon, kl = elbo_terms(logits.float(), x, mu.float(), logvar.float())
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
        recon, kl = recon_sum / len(train_images), kl_sum / len(train_images)
        val = test(model, val_images, val_labels)
        history.append({"recon": recon, "kl": kl, "val_recon": val["recon"], "val_kl": val["kl"]})
        seconds = time.time() - start
        print(f"epoch {epoch:3}/{epochs}  "
              f"train: recon {recon:.2f} KL {kl:.2f} total {recon + kl:.2f}  "
              f"val: recon {val['recon']:.2f} KL {val['kl']:.2f} total {val['total']:.2f}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return history


@torch.no_grad()
def test(model, images, labels, batch_size=1000):
    """Mean recon, kl and total of images (N, 1, 28, 28): one posterior sample each, full KL."""
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum = 0.0, 0.0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x, y = x.to(device), y.to(device)               # (B, 1, 28, 28), (B,)
        logits, mu, logvar = model(x, y)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        recon_sum += recon.sum().item()
        kl_sum += kl.sum().item()
    recon, kl = recon_sum / len(images), kl_sum / len(images)
    return {"recon": recon, "kl": kl, "total": recon + kl}


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def draw_pictures(model, dataset, history, stem):
    """Reconstructions, samples, the same styles in all classes, real images in all classes, and the
    curves."""
    device = next(model.parameters()).device
    first, names = data.one_of_each_class(dataset.test_labels)
    x = dataset.test_images[first].to(device)           # (10, 1, 28, 28), one image of each class
    y = dataset.test_labels[first].to(device)           # (10,)
    logits, mu, _ = model(x, y)
    data.image_grid(torch.stack([x[:, 0], logits[:, 0].sigmoid()]),
                    f"{stem}-reconstructions.png", "Test images and their reconstructions",
                    ("original", "decoded z"), names)

    classes = torch.arange(10, device=device)
    z = torch.randn(80, model.latent_dim, device=device)
    samples = model.decode(z, classes.repeat(8)).sigmoid()
    data.image_grid(samples.view(8, 10, 28, 28), f"{stem}-samples.png",
                    "z ~ N(0, I), and the class that was asked for", columns=data.CLASSES)
    z = z[:8].repeat_interleave(10, dim=0)              # one z a row, for all ten classes
    styles = model.decode(z, classes.repeat(8)).sigmoid()
    data.image_grid(styles.view(8, 10, 28, 28), f"{stem}-styles.png",
                    "One style z a row, one class a column", columns=data.CLASSES)

    z = mu.repeat_interleave(10, dim=0)                 # the code of a real image a row
    swapped = model.decode(z, classes.repeat(len(x))).sigmoid().view(len(x), 10, 28, 28)
    data.image_grid(torch.cat([x, swapped], dim=1), f"{stem}-swaps.png",
                    "Left a real image, then its style in every class", names,
                    ("real", *data.CLASSES))
    data.plot_curves(history, f"{stem}-curves.png")


# ---------------------------------------------------------------- the section

def arguments():
    """The flags of this script, with their defaults."""
    parser = data.Parser(__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=20, help="dimensions of z")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--bf16", choices=("auto", "on", "off"), default="auto",
                        help="train in bfloat16; auto: where the hardware is fast at it")
    return parser


def load_model(path, device="cpu"):
    """(trained model in eval mode, what else its checkpoint holds); UserError if it is unusable."""
    meta = data.read_checkpoint(path, "cvae")
    model = CVAE(meta["config"]["latent_dim"])
    return data.load_weights(model, meta, path).to(device), meta


@data.command
def main(argv=None, dataset=None):
    """Train, test, save, draw; returns [path of the checkpoint]. dataset: what data.load() gave."""
    parser = arguments()
    args = parser.parse_args(argv)
    data.check_flags(args)
    device = data.pick_device(args.device)
    bf16 = data.pick_bf16(args.bf16, device)
    dataset = dataset or data.load(args.data)

    torch.manual_seed(args.seed)
    model = CVAE(args.latent_dim).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"device {device}, bfloat16 {bf16}, {parameters:,} parameters", flush=True)
    start = time.time()
    history = train(model, dataset.train_images, dataset.train_labels,
                    dataset.val_images, dataset.val_labels,
                    args.epochs, args.batch_size, args.lr, bf16)
    torch.manual_seed(args.seed)                        # evaluate.py repeats exactly this test
    metrics = test(model, dataset.test_images, dataset.test_labels)
    metrics["seconds"] = time.time() - start

    name = data.run_name(f"cvae-{dataset.source}-seed{args.seed}", parser, args)
    path = args.out / f"{name}.pt"
    data.save_checkpoint(path, script="cvae", config=data.settings(args), source=dataset.source,
                         seed=args.seed, device=str(device), bf16=bf16, metrics=metrics,
                         state_dict=model.state_dict())
    draw_pictures(model, dataset, history, args.out / name)
    excess = metrics["recon"] - dataset.floor["test"]
    print(f"test ({dataset.source}): recon {metrics['recon']:.2f}, {excess:.2f} above the floor, KL"
          f" {metrics['kl']:.2f}, total {metrics['total']:.2f} nats per image,"
          f" {metrics['seconds']:.0f} s")
    print(f"total + log 10 = {metrics['total'] + math.log(10):.2f}, to compare with a VAE")
    print(f"-> {path} and the pictures {name}-*.png")
    return [path]


if __name__ == "__main__":
    main()
