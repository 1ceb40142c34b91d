"""Section 3: a convolutional VAE, with KL warm-up and a larger latent space.

The network of section 2 is not told which pixels are neighbours. Here an image is cut into a grid
of 7 x 7 patches, each of 4 x 4 pixels. A convolution looks at each patch together with its eight
neighbours, and describes it by 48 numbers. These 7 x 7 x 48 = 2352 numbers go into the encoder of
section 2 (vae.py, which explains recon, KL and their names), in place of the 784 pixels. The
decoder of section 2 gives as many numbers, and another convolution makes the pixels of them. z has
32 dimensions instead of 20 (does that help?), and the training is longer, with a lower learning
rate. And the KL is warmed up (Bowman et al. 2016, arXiv:1511.06349, section 3.1; linearly, as in
Sonderby et al. 2016, arXiv:1602.02282): its weight w grows from 0 to 1 in the first fifth of all
steps,

    loss  =  recon  +  w * KL,        w  =  min(1, progress / warmup)

where progress is the share of all steps that is done, and warmup = 0.2. In the first steps the
decoder cannot use z yet. If z costs its full KL then, the easiest way to a lower loss is to make
q(z | x) equal to the prior N(0, 1) in some latents, for every image. The decoder learns to ignore
them; so they stay useless, even those that would later be worth their price. This is called
posterior collapse: latents are lost before they were used. With warm-up, z learns to carry
something before it has to pay for it. Evaluation always uses w = 1.

    python conv_vae.py                  # five minutes on two CPU cores

You should see (full data, seed 0) a test total of about 234.67 nats, 1.27 below that of section 2:
recon 219.80, an excess of 29.94, and KL 14.87. `diff vae.py conv_vae.py` shows all changes. On the
validation images (means of three seeds), these gain 1.38 (rounded): the convolutions 0.62, the
longer training with a lower learning rate 0.54, warm-up 0.23, which may be chance, and the larger z
nothing. In the first epochs, while the KL weighs little, all 32 latents are active; in the end, 10
are. The others were used, and turned out not to be worth their price: that is no collapse. Without
warm-up, 8 or 9 are active in the end: at most one or two collapse.
Try: --warmup 0 --out try. How do the KL and the active latents change from epoch to epoch?
"""
import math
import time

import torch

import data

# ---------------------------------------------------------------- the model

class Residual(torch.nn.Module):
    """x + F(x): F, the given layers, learns only a change. The activation stands in F, and not
    after the sum, so that x itself is passed on as it is (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, *layers):
        super().__init__()
        self.F = torch.nn.Sequential(*layers)

    def forward(self, x):
        return x + self.F(x)


class ConvVAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size.
    pixel_unshuffle puts the 16 pixels of a patch into 16 channels, PixelShuffle back again."""

    def __init__(self, latent_dim=32, hidden=512, channels=48):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Conv2d(16, channels, 3, padding=1), torch.nn.GELU(),   # (B, 48, 7, 7)
            torch.nn.Flatten(),                                             # (B, 2352)
            torch.nn.Linear(channels * 7 * 7, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),                    # (B, 512)
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, hidden),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)), torch.nn.GELU(),
            torch.nn.Linear(hidden, channels * 7 * 7), torch.nn.GELU(),
            torch.nn.Unflatten(1, (channels, 7, 7)),                        # (B, 48, 7, 7)
            torch.nn.Conv2d(channels, 16, 3, padding=1),                    # (B, 16, 7, 7)
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit per pixel
        )

    def encode(self, x):
        """q(z | x): x (B, 1, 28, 28) -> mu, logvar, each (B, latent_dim).
        logvar is log sigma^2: a network may put out any number, but sigma^2 must be positive."""
        patches = torch.nn.functional.pixel_unshuffle(x, 4)                 # (B, 16, 7, 7)
        mu, logvar = self.encoder(patches).chunk(2, dim=1)
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


def train(model, train_images, val_images, epochs, batch_size, lr, warmup):
    """Minimise recon + w KL on train_images (N, 1, 28, 28) in [0, 1].
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
    step = 0
    history, start = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        recon_sum, kl_sum = 0.0, 0.0                    # over all images of the epoch
        for indices in torch.randperm(len(train_images)).split(batch_size):
            x = train_images[indices.to(device)]        # (B, 1, 28, 28)
            logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits, x, mu, logvar)
            progress = step / steps                     # from 0 to almost 1
            w = min(1.0, progress / warmup) if warmup > 0 else 1.0
            loss = (recon + w * kl).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}: choose a"
                                         " lower learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            recon_sum += recon.sum().item()
            kl_sum += kl.sum().item()
        mean_recon, mean_kl = recon_sum / len(train_images), kl_sum / len(train_images)
        val = test(model, val_images)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch}/{epochs}, KL weight {w:.2f}: training"
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


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def draw_pictures(model, dataset, history, stem):
    """One test image of each class and its reconstruction, samples from the prior, the curves."""
    device = next(model.parameters()).device
    first, names = data.one_of_each_class(dataset.test_labels)
    x = dataset.test_images[first].to(device)           # (10, 1, 28, 28)
    logits, _, _ = model(x)
    both = torch.stack([x, logits.sigmoid()])           # (2, 10, 1, 28, 28): p, not a draw of x
    data.image_grid(both, f"{stem}-reconstructions.png",
                    "Test images and their reconstructions", ("original", "decoded z"), names)
    z = torch.randn(80, model.latent_dim, device=device)
    samples = model.decode(z).sigmoid()                 # (80, 1, 28, 28)
    data.image_grid(samples.view(8, 10, 28, 28), f"{stem}-samples.png",
                    "Decoded draws from the prior N(0, I)")
    data.plot_curves(history, f"{stem}-curves.png")


# ---------------------------------------------------------------- the section

def flags():
    """The flags of this script, with their defaults. data.Parser adds --data and --out."""
    parser = data.Parser("conv_vae", __doc__)
    parser.add_argument("--epochs", type=int, default=36, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in one step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=32, help="dimensions of z")
    parser.add_argument("--warmup", type=float, default=0.2,
                        help="share of the training in which the KL weight grows from 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def load_model(path, device="cpu"):
    """(trained model in eval mode, what else its checkpoint holds); UserError if it is unusable."""
    return data.load_model(path, "conv_vae", lambda config: ConvVAE(config["latent_dim"]), device)


@data.command                                           # prints mistakes of users as one line
def main(argv=None, dataset=None):
    """Train, test, save, draw. argv: a list of flags, or None for those of the command line;
    dataset: what data.load() gave, or None to load it. Returns the path of the checkpoint."""
    args = data.read_flags(flags(), argv)               # checked; and args.device is a device
    dataset = dataset or data.load(args.data)

    torch.manual_seed(args.seed)
    model = ConvVAE(args.latent_dim).to(args.device)
    data.print_start(args, model)
    start = time.perf_counter()
    history = train(model, dataset.train_images, dataset.val_images,
                    args.epochs, args.batch_size, args.lr, args.warmup)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images)
    metrics["seconds"] = time.perf_counter() - start
    data.print_test(metrics, dataset, args.latent_dim)

    path = data.run_path(args, dataset.source)
    data.save_checkpoint(path, args, dataset.source, metrics, model.state_dict())
    stem = path.with_suffix("")
    draw_pictures(model, dataset, history, stem)
    print(f"-> {path} and the pictures {stem}-*.png")
    return path


if __name__ == "__main__":
    main()
