"""Section 5: the conditional VAE (CVAE): ask for a class, and z is left with the style.

Encoder and decoder are both told the label y (Kingma et al. 2014, arXiv:1406.5298, model M2; Sohn
et al. 2015, NeurIPS, eq. 4, where x is what is given and y what is drawn, and the prior is learned;
ours stays N(0, I)). The loss is that of section 2, with everything given y; while training, its KL
is warmed up as in section 3:

    loss  =  E_q(z | x, y)[ -log p(x | z, y) ]  +  KL( q(z | x, y) || N(0, I) )

The encoder sees y as ten constant planes beside the patches of the image, one of them 1 and the
others 0; the decoder sees it as a one-hot vector beside z. To tell the class in z as well would
cost KL and gain nothing, since the decoder knows y. So z is left with what y does not say, the
style: brightness, width, sleeves. The same z with another y is the same style in another class.

The total bounds -log p(x | y), not -log p(x). As p(x) is at least p(y) p(x | y) with p(y) = 1/10,
-log p(x) <= -log p(x | y) + log 10: add log 10 = 2.30 nats to compare it with the total of a VAE.

    python cvae.py                      # four minutes on two CPU cores

You should see (full data, seed 0) a test total of about 231.61 nats: recon 219.11, which is 29.25
above the entropy floor, and KL 12.50. With log 10 it is 233.91, still below that of section 3, from
which it differs in nothing but the label: KL warm-up, too, is that of section 3.
Try (with --out try): leave y out of the decoder. Who has to tell the class then?
Left out on purpose: a learned prior p(z | y), a classifier term in the loss.
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


class CVAE(torch.nn.Module):
    """Images in [0, 1] (B, 1, 28, 28), labels (B,) -> logits (B, 1, 28, 28). B: batch size. The
    network of conv_vae.py, but told the label, and nothing else."""

    def __init__(self, latent_dim=32, channels=64):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Conv2d(16 + 10, channels, 3, padding=1), torch.nn.GELU(),  # (B, 64, 7, 7)
            torch.nn.Flatten(),
            torch.nn.Linear(channels * 7 * 7, 512), torch.nn.GELU(),
            torch.nn.Linear(512, 2 * latent_dim),       # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim + 10, 512),
            Residual(torch.nn.GELU(), torch.nn.Linear(512, 512)),
            Residual(torch.nn.GELU(), torch.nn.Linear(512, 512)), torch.nn.GELU(),
            torch.nn.Linear(512, channels * 7 * 7),
            torch.nn.Unflatten(1, (channels, 7, 7)),    # (B, 64, 7, 7)
            Residual(torch.nn.GELU(), torch.nn.Conv2d(channels, channels, 3, padding=1)),
            torch.nn.GELU(),
            torch.nn.Conv2d(channels, 16, 3, padding=1),
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit per pixel
        )

    def encode(self, x, y):
        """q(z | x, y): x (B, 1, 28, 28), y (B,) -> mu, logvar, each (B, latent_dim)."""
        patches = torch.nn.functional.pixel_unshuffle(x, 4)                 # (B, 16, 7, 7)
        label = torch.nn.functional.one_hot(y, 10).to(x.dtype)              # (B, 10)
        # each of the ten numbers becomes a plane: (B, 10, 1, 1), repeated over 7 x 7 patches
        planes = label[:, :, None, None].expand(-1, -1, 7, 7)               # (B, 10, 7, 7)
        mu, logvar = self.encoder(torch.cat([patches, planes], dim=1)).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu, logvar):
        """A draw of z ~ N(mu, sigma^2) through which gradients flow. A draw has no derivative; so
        the randomness is put into eps ~ N(0, I), and z = mu + sigma * eps is plain arithmetic."""
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
    # (exact for pixels 0 and 1; of grey pixels, a share x_i counts as white and the rest as black)
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                                         # (B,)
    # kl = 1/2 sum_d [ mu_d^2 + sigma_d^2 - log sigma_d^2 - 1 ], the closed form for two Gaussians
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing

def kl_weight(step, warmup_steps):
    """w(step): from 0 to 1 over the warm-up steps, then 1. step counts optimizer steps from 0."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def train(model, train_images, train_labels, val_images, val_labels, epochs, batch_size, lr,
          warmup_epochs=8, weight_decay=0.3, bf16=False):
    """Minimise recon + w KL on train_images (N, 1, 28, 28) in [0, 1], train_labels (N,). Returns
    the history, a list with a dict for each epoch. FloatingPointError if the loss is not finite. If
    there are fewer epochs than warm-up epochs, the warm-up takes all of them. bf16: compute in
    bfloat16.

    AdamW is Adam, but in every step each weight also loses lr * weight_decay of itself (Loshchilov
    & Hutter 2019, arXiv:1711.05101): only weights that help many images stay large. OneCycle: the
    learning rate rises from lr / 25 to lr in the first 30 % of all steps, then falls almost to 0;
    meanwhile Adam's beta1 goes from 0.95 to 0.85 and back."""
    for images in (train_images, val_images):
        if not 0 <= images.min() <= images.max() <= 1:
            raise ValueError("pixels must lie in [0, 1], since the loss is a binary cross-entropy")
    device = next(model.parameters()).device
    train_images, train_labels = train_images.to(device), train_labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), fused=True,
                                  weight_decay=weight_decay)
    steps = math.ceil(len(train_images) / batch_size)   # in one epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    warmup_steps = round(min(warmup_epochs, epochs) * steps)
    steps_taken = 0                                     # by the optimizer, in all epochs
    history, start = [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        recon_sum, kl_sum = 0.0, 0.0                    # over all images of the epoch
        order = torch.randperm(len(train_images))
        for step, indices in enumerate(order.split(batch_size), 1):
            x = train_images[indices.to(device)]        # (B, 1, 28, 28)
            y = train_labels[indices.to(device)]        # (B,)
            # the network in bfloat16, which is faster, and the loss in float32, which is exact
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, mu, logvar = model(x, y)
            recon, kl = elbo_terms(logits.float(), x, mu.float(), logvar.float())
            w = kl_weight(steps_taken, warmup_steps)
            loss = (recon + w * kl).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}, step {step}:"
                                         " choose a lower learning rate (--lr)")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps_taken += 1
            recon_sum += recon.sum().item()
            kl_sum += kl.sum().item()
        mean_recon, mean_kl = recon_sum / len(train_images), kl_sum / len(train_images)
        val = test(model, val_images, val_labels)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        seconds = time.time() - start
        print(f"epoch {epoch:3}/{epochs}  KL weight {w:.2f}  "
              f"train: recon {mean_recon:.2f} KL {mean_kl:.2f} total {mean_recon + mean_kl:.2f}  "
              f"val: recon {val['recon']:.2f} KL {val['kl']:.2f} total {val['total']:.2f}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return history


@torch.no_grad()
def test(model, images, labels, batch_size=1000):
    """The mean recon, kl and total of images (N, 1, 28, 28), labels (N,). Draws one z for each
    image from the posterior q(z | x, y), not its mean; the KL has weight 1."""
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum = 0.0, 0.0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x, y = x.to(device), y.to(device)               # (B, 1, 28, 28), (B,)
        logits, mu, logvar = model(x, y)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        recon_sum += recon.sum().item()
        kl_sum += kl.sum().item()
    mean_recon, mean_kl = recon_sum / len(images), kl_sum / len(images)
    return {"recon": mean_recon, "kl": mean_kl, "total": mean_recon + mean_kl}


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
    each_row = classes.repeat(8)                        # (80,): 0 1 2 ... 9, eight times
    z = torch.randn(80, model.latent_dim, device=device)
    samples = model.decode(z, each_row).sigmoid()
    data.image_grid(samples.view(8, 10, 28, 28), f"{stem}-samples.png",
                    "z ~ N(0, I), and the class that was asked for", columns=data.CLASSES)
    z_styles = z[:8].repeat_interleave(10, dim=0)       # (80, latent_dim): one z in each row
    styles = model.decode(z_styles, each_row).sigmoid()
    data.image_grid(styles.view(8, 10, 28, 28), f"{stem}-styles.png",
                    "Each row: one style z. Each column: one class", columns=data.CLASSES)

    z_real = mu.repeat_interleave(10, dim=0)            # the code of one real image in each row
    swapped = model.decode(z_real, classes.repeat(len(x))).sigmoid()
    rows = torch.cat([x, swapped.view(len(x), 10, 28, 28)], dim=1)          # (10, 11, 28, 28)
    data.image_grid(rows, f"{stem}-swaps.png", "Left a real image, then its style in every class",
                    names, ("real", *data.CLASSES))
    data.plot_curves(history, f"{stem}-curves.png")


# ---------------------------------------------------------------- the section

def arguments():
    """The flags of this script, with their defaults."""
    parser = data.Parser(__doc__)
    parser.add_argument("--epochs", type=int, default=36, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in one step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=32, help="dimensions of z")
    parser.add_argument("--warmup-epochs", type=float, default=8.0,
                        help="epochs over which the KL weight grows from 0 to 1")
    parser.add_argument("--weight-decay", type=float, default=0.3,
                        help="of AdamW: how fast weights that do not help shrink")
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
                    args.epochs, args.batch_size, args.lr, args.warmup_epochs, args.weight_decay,
                    bf16)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images, dataset.test_labels)
    metrics["seconds"] = time.time() - start

    name = data.run_name(f"cvae-{dataset.source}-seed{args.seed}", parser, args)
    path = args.out / f"{name}.pt"
    data.save_checkpoint(path, script="cvae", config=data.settings(args), source=dataset.source,
                         seed=args.seed, device=str(device), bf16=bf16, metrics=metrics,
                         state_dict=model.state_dict())
    draw_pictures(model, dataset, history, args.out / name)
    floor = data.pixel_entropy(dataset.test_images).mean().item()
    print(f"test ({dataset.source}): recon {metrics['recon']:.2f},"
          f" {metrics['recon'] - floor:.2f} above the floor, KL"
          f" {metrics['kl']:.2f}, total {metrics['total']:.2f} nats per image,"
          f" {metrics['seconds']:.0f} s")
    print(f"total + log 10 = {metrics['total'] + math.log(10):.2f}, to compare with a VAE")
    print(f"-> {path} and the pictures {name}-*.png")
    return [path]


if __name__ == "__main__":
    main()
