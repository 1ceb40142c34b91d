"""Section 3: a convolutional VAE, with KL warm-up and a larger latent space.

The network of section 2 (vae.py, which explains recon, KL and their names) is not told which pixels
are neighbours. Here an image is cut into a grid of 7 x 7 patches, each of 4 x 4 pixels. A
convolution looks at each patch together with its eight neighbours, and describes it by 48 numbers.
These 7 x 7 x 48 = 2352 numbers go into the encoder of section 2 in place of the 784 pixels. Its
decoder gives as many numbers, and another convolution turns them into pixels. z has 32 dimensions
instead of 20, and the training is longer, with a lower learning rate. And the KL is warmed up
(Bowman et al. 2016, arXiv:1511.06349, section 3.1): its weight beta grows from 0 to 1,

    loss  =  recon  +  beta * KL,        beta  =  min(1, progress / warmup)

where progress is the share of all steps that is done, and warmup = 0.2. At first every q(z | x) is
nearly the prior N(0, 1). A latent that leaves it costs KL before the decoder has learned to use it;
so it may return, the decoder learns to ignore it, and it may be lost for good. With warm-up, z can
learn to carry something before it has to pay for it. Evaluation always uses beta = 1.

    python conv_vae.py                  # five to eight minutes on two CPU cores

You should see (full data, seed 0) a test total of about 234.7 nats, 1.3 below that of section 2. On
validation images, roughly half of the gain came with the convolutions and twice the weights, most
of the rest with 32 latents, longer training and a lower learning rate together; of warm-up, no gain
is shown (results/README.md). All 32 latents are active in the first epochs, about 10 in the end.
Try: --warmup 0 --out try. How do the KL and the active latents change from epoch to epoch?
"""
import math
import time

import torch

import data

# ---------------------------------------------------------------- the model

class ConvVAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size.
    PixelUnshuffle puts the 16 pixels of a patch into 16 channels, PixelShuffle back again."""

    def __init__(self, latent_dim=32, hidden=512, channels=48):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.PixelUnshuffle(4),                                     # (B, 16, 7, 7)
            torch.nn.Conv2d(16, channels, 3, padding=1), torch.nn.GELU(),   # (B, 48, 7, 7)
            torch.nn.Flatten(),                                             # (B, 2352)
            torch.nn.Linear(channels * 7 * 7, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),    # (B, 512), mean 0, std 1; then scaled
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.dense1 = torch.nn.Linear(latent_dim, hidden)
        self.dense2 = torch.nn.Linear(hidden, hidden)
        self.dense3 = torch.nn.Linear(hidden, hidden)
        self.to_pixels = torch.nn.Sequential(
            torch.nn.Linear(hidden, channels * 7 * 7), torch.nn.GELU(),
            torch.nn.Unflatten(1, (channels, 7, 7)),                        # (B, 48, 7, 7)
            torch.nn.Conv2d(channels, 16, 3, padding=1),                    # (B, 16, 7, 7)
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit per pixel
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


def train(model, train_images, val_images, epochs, batch_size, lr, warmup):
    """Minimise recon + beta KL on train_images (N, 1, 28, 28) in [0, 1].
    Returns the history, a dict for each epoch; FloatingPointError if the loss is not finite.
    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0. Adam's beta2 is 0.99, not its default 0.999: that learns faster here.
    fused only makes each step faster."""
    check_images(train_images)
    check_images(val_images)
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a share of all steps, from 0 to 1, but is {warmup}")
    device = next(model.parameters()).device
    train_images = train_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = epochs * math.ceil(len(train_images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   cycle_momentum=False)    # Adam has its own
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
            beta = min(1.0, progress / warmup) if warmup > 0 else 1.0
            loss = (recon + beta * kl).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} in epoch {epoch}: choose a lower lr")
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
        print(f"epoch {epoch}/{epochs}, beta {beta:.2f}: training"
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


# ---------------------------------------------------------------- the pictures

@torch.no_grad()
def draw_pictures(model, dataset, history, stem):
    """One test image of each class and its reconstruction, samples from the prior, the curves."""
    device = next(model.parameters()).device
    indices, names = data.one_of_each_class(dataset.test_labels)
    x = dataset.test_images[indices].to(device)         # (10, 1, 28, 28)
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

FLAGS = data.flags(__file__, __doc__, epochs=36, batch_size=256, lr=2e-3, latent_dim=32,
                   warmup=0.2)


def load_model(path, device="cpu"):
    """(trained model in eval mode, all that its checkpoint holds). Code in the file is not run."""
    meta = torch.load(path, map_location="cpu", weights_only=True)
    model = ConvVAE(meta["config"]["latent_dim"])
    model.load_state_dict(meta["state_dict"])
    return model.eval().to(device), meta


def main(argv=None, dataset=None):
    """Train, test, save, draw. argv: a list of flags, or None for those of the command line;
    dataset: what data.load() gave, or None to load it. Returns the path of the checkpoint."""
    args = FLAGS.parse_args(argv)
    device = data.pick_device(args.device)
    dataset = dataset or data.load(args.data)
    path = data.run_path(args, dataset.source)

    torch.manual_seed(args.seed)
    model = ConvVAE(args.latent_dim).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"training {path} on {device}, {parameters:,} parameters", flush=True)
    start = time.perf_counter()
    history = train(model, dataset.train_images, dataset.val_images,
                    args.epochs, args.batch_size, args.lr, args.warmup)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images)
    metrics["seconds"] = time.perf_counter() - start
    data.save_checkpoint(path, args, dataset, metrics, model.state_dict())
    data.print_test(metrics, dataset)
    stem = path.with_suffix("")
    draw_pictures(model, dataset, history, stem)
    print(f"-> {path} and the pictures {stem}-*.png")
    return path


if __name__ == "__main__":
    data.run(main)
