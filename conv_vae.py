"""Section 3: a convolutional VAE, with KL warm-up and a larger latent space.

The VAE of section 2 treats an image as 784 unrelated numbers. Here an image is cut into a grid of
7 x 7 patches, each of 4 x 4 pixels, and convolutions look at each patch together with its
neighbours; a residual layer in the decoder does so again. z has 32 dimensions instead of 20.
And the KL is warmed up (Bowman et al. 2016, arXiv:1511.06349, section 3.1; linearly, as in
Sonderby et al. 2016, arXiv:1602.02282): its weight grows from 0 to 1,

    loss  =  recon  +  w(step) * KL,        w(step) = min(1, step / warm-up steps)

At the start the decoder cannot use z yet, and a KL with full weight may push latents to N(0, I)
before it ever can: these would say nothing for good, which is called posterior collapse. With
warm-up, z learns to carry something before it has to pay for it. Evaluation always uses w = 1.

    python conv_vae.py                  # three and a half minutes on two CPU cores

You should see (full data, seed 0) a test total of about 234.55 nats, 1.5 below that of section 2:
recon 219.48, which is 29.62 above the entropy floor, and KL 15.06; 10 of the 32 latents are active.
`diff vae.py conv_vae.py` shows what is new.
What its parts gain on validation (mean of three seeds; the script as it is: 232.93 nats):
  KL warm-up: 233.38 without it; 7 to 9 latents are active then, not 10 or 11
  z of 32: 232.98 with z of 20. It stays, because a larger z is what this section looks at
The same with seed 0 alone (the script as it is: 232.97 nats):
  residual dense layers in the decoder: 234.01 with plain ones
  the residual convolution in the decoder: 233.16 without it
  weight decay: 233.18 without it
  longer training: 232.66 with --epochs 120, and a test total of 234.22
Try: --warmup-epochs 0. How many latents are active at the end?
Left out on purpose: normalisation layers, a deeper residual stack, any other loss.
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


class ConvVAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size.
    PixelUnshuffle puts the 16 pixels of a patch into 16 channels, and PixelShuffle back again."""

    def __init__(self, latent_dim=32, channels=64):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.PixelUnshuffle(4),                 # (B, 16, 7, 7)
            torch.nn.Conv2d(16, channels, 3, padding=1), torch.nn.GELU(),   # (B, 64, 7, 7)
            torch.nn.Flatten(),
            torch.nn.Linear(channels * 7 * 7, 512), torch.nn.GELU(),
            torch.nn.Linear(512, 2 * latent_dim),       # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, 512),
            Residual(torch.nn.GELU(), torch.nn.Linear(512, 512)),
            Residual(torch.nn.GELU(), torch.nn.Linear(512, 512)), torch.nn.GELU(),
            torch.nn.Linear(512, channels * 7 * 7),
            torch.nn.Unflatten(1, (channels, 7, 7)),    # (B, 64, 7, 7)
            Residual(torch.nn.GELU(), torch.nn.Conv2d(channels, channels, 3, padding=1)),
            torch.nn.GELU(),
            torch.nn.Conv2d(channels, 16, 3, padding=1),
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit per pixel
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


def train(model, train_images, val_images, epochs, batch_size, lr, warmup_epochs=8,
          weight_decay=0.3, bf16=False):
    """Minimise recon + w KL on train_images (N, 1, 28, 28) in [0, 1]. Returns the history, a list
    with a dict for each epoch. FloatingPointError if the loss is not finite. If there are fewer
    epochs than warm-up epochs, the warm-up takes all of them. bf16: compute in bfloat16.

    AdamW is Adam, but in every step each weight also loses lr * weight_decay of itself (Loshchilov
    & Hutter 2019, arXiv:1711.05101): only weights that help many images stay large. OneCycle: the
    learning rate rises from lr / 25 to lr in the first 30 % of all steps, then falls almost to 0;
    meanwhile Adam's beta1 goes from 0.95 to 0.85 and back."""
    for images in (train_images, val_images):
        if not 0 <= images.min() <= images.max() <= 1:
            raise ValueError("pixels must lie in [0, 1], since the loss is a binary cross-entropy")
    device = next(model.parameters()).device
    train_images, val_images = train_images.to(device), val_images.to(device)
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
            # the network in bfloat16, which is faster, and the loss in float32, which is exact
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, mu, logvar = model(x)
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
        val = test(model, val_images)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        seconds = time.time() - start
        print(f"epoch {epoch:3}/{epochs}  KL weight {w:.2f}  "
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


# ---------------------------------------------------------------- which latents are used

def is_active(mu):
    """Which latents tell anything: mu (N, D) -> (D,) bool. A latent is active if its mu varies from
    image to image with a variance above 0.01 (Burda et al. 2016, arXiv:1509.00519)."""
    return mu.var(dim=0) > 0.01


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
    meta = data.read_checkpoint(path, "conv_vae")
    model = ConvVAE(meta["config"]["latent_dim"])
    return data.load_weights(model, meta, path).to(device), meta


def print_baseline(path):
    """The test of section 2's VAE, where it was trained with the same data and seed."""
    try:
        mlp = data.read_checkpoint(path, "vae")["metrics"]
        print(f"the MLP VAE in {path}: recon {mlp['recon']:.2f}, KL {mlp['kl']:.2f}, total"
              f" {mlp['total']:.2f}")
    except data.UserError as error:
        print(f"(no MLP VAE to compare with: {error})")


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
    model = ConvVAE(args.latent_dim).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"device {device}, bfloat16 {bf16}, {parameters:,} parameters", flush=True)
    start = time.time()
    history = train(model, dataset.train_images, dataset.val_images,
                    args.epochs, args.batch_size, args.lr, args.warmup_epochs, args.weight_decay,
                    bf16)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images)
    metrics["seconds"] = time.time() - start
    with torch.no_grad():
        mu, _ = model.encode(dataset.test_images.to(device))                # (N, latent_dim)
    active = is_active(mu).sum().item()

    name = data.run_name(f"conv_vae-{dataset.source}-seed{args.seed}", parser, args)
    path = args.out / f"{name}.pt"
    data.save_checkpoint(path, script="conv_vae", config=data.settings(args), source=dataset.source,
                         seed=args.seed, device=str(device), bf16=bf16, metrics=metrics,
                         state_dict=model.state_dict())
    draw_pictures(model, dataset, history, args.out / name)
    floor = data.pixel_entropy(dataset.test_images).mean().item()
    print(f"test ({dataset.source}): recon {metrics['recon']:.2f},"
          f" {metrics['recon'] - floor:.2f} above the floor, KL"
          f" {metrics['kl']:.2f}, total {metrics['total']:.2f} nats per image,"
          f" {metrics['seconds']:.0f} s")
    print(f"active latents: {active} of {args.latent_dim}")
    print_baseline(args.out / f"vae-{dataset.source}-seed{args.seed}.pt")
    print(f"-> {path} and the pictures {name}-*.png")
    return [path]


if __name__ == "__main__":
    main()
