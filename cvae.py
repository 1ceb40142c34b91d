"""Section 5: the conditional VAE (CVAE): ask for a class.

Encoder and decoder are both told the label y: the decoder, so that we can ask it for a class; the
encoder, so that it knows what z need not say. To tell the class in z as well would cost KL and gain
nothing. So z should be left with what y does not say, the style: brightness, width, sleeves. The
encoder sees y as ten constant planes beside the patches of the image, one of them 1 and the others
0; the decoder sees it as ten numbers beside z. The loss is that of section 3 (vae.py and
conv_vae.py explain it), and everything is given y (Kingma et al. 2014, arXiv:1406.5298, model M2):

    loss  =  E_q[ -log p(x | z, y) ]  +  beta * KL( q(z | x, y) || N(0, I) )

The total is an upper bound on -log p(x | y), not on -log p(x). To compare it with that of a VAE,
add what the label costs, the mean of -log p(y); of ten equally frequent classes, log 10 = 2.30:

    p(x)  >=  p(x, y)  =  p(x | y) p(y),    so    -log p(x)  <=  -log p(x | y)  -  log p(y)

    python cvae.py                      # five to eight minutes on two CPU cores

You should see (full data, seed 0) a test total of about 232 nats, 234.3 with the label; in a film,
*-walk.gif, one style that walks through all classes. `diff conv_vae.py cvae.py` shows where y is.
Try (with --out try): leave y out of the decoder, `0 * label` in decode(). Who then tells the class?
"""
import math
import time

import torch
from matplotlib.animation import PillowWriter

import data

# ---------------------------------------------------------------- the model

class CVAE(torch.nn.Module):
    """Images in [0, 1] (B, 1, 28, 28), labels (B,) -> logits (B, 1, 28, 28). B: batch size.
    pixel_unshuffle puts the 16 pixels of a patch into 16 channels, PixelShuffle back again."""

    def __init__(self, latent_dim=32, hidden=512, channels=48):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Conv2d(16 + 10, channels, 3, padding=1), torch.nn.GELU(),  # (B, 48, 7, 7)
            torch.nn.Flatten(),                                             # (B, 2352)
            torch.nn.Linear(channels * 7 * 7, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),    # (B, 512), mean 0, std 1; then scaled
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.dense1 = torch.nn.Linear(latent_dim + 10, hidden)
        self.dense2 = torch.nn.Linear(hidden, hidden)
        self.dense3 = torch.nn.Linear(hidden, hidden)
        self.to_pixels = torch.nn.Sequential(
            torch.nn.Linear(hidden, channels * 7 * 7), torch.nn.GELU(),
            torch.nn.Unflatten(1, (channels, 7, 7)),                        # (B, 48, 7, 7)
            torch.nn.Conv2d(channels, 16, 3, padding=1),                    # (B, 16, 7, 7)
            torch.nn.PixelShuffle(4),                   # (B, 1, 28, 28): one logit per pixel
        )

    def encode(self, x, y):
        """q(z | x, y): x (B, 1, 28, 28), y (B,) -> mu, logvar, each (B, latent_dim).
        logvar is log sigma^2: a network may put out any number, but sigma^2 must be positive."""
        patches = torch.nn.functional.pixel_unshuffle(x, 4)                 # (B, 16, 7, 7)
        label = torch.nn.functional.one_hot(y, 10).to(x.dtype)              # (B, 10)
        # each of the ten numbers becomes a plane: (B, 10, 1, 1), repeated over the 7 x 7 patches
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
        gelu = torch.nn.functional.gelu
        h = self.dense1(torch.cat([z, label], dim=1))   # (B, 512)
        h = h + self.dense2(gelu(h))                    # residual: h and a learned change
        h = h + self.dense3(gelu(h))
        return self.to_pixels(gelu(h))

    def forward(self, x, y):
        """x (B, 1, 28, 28), y (B,) -> logits (B, 1, 28, 28), mu, logvar, each (B, latent_dim).
        One draw of z estimates the mean E_q. It is noisy, but a batch averages many of them."""
        mu, logvar = self.encode(x, y)
        z = self.reparameterize(mu, logvar)
        return self.decode(z, y), mu, logvar


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


def check_labels(labels, images):
    """ValueError unless there is one label for each image: zip() in test() would drop the rest."""
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} for {len(images)} images: give one each")


def train(model, train_images, train_labels, val_images, val_labels, epochs, batch_size, lr,
          warmup):
    """Minimise recon + beta KL on train_images (N, 1, 28, 28) in [0, 1], train_labels (N,).
    Returns the history, a dict for each epoch; FloatingPointError if the loss is not finite.
    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0. Adam's beta2 is 0.99, not its default 0.999: that learns faster here.
    fused only makes each step faster."""
    check_images(train_images)
    check_images(val_images)
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a share of all steps, from 0 to 1, but is {warmup}")
    check_labels(train_labels, train_images)
    check_labels(val_labels, val_images)
    device = next(model.parameters()).device
    train_images = train_images.to(device)
    train_labels = train_labels.to(device)
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
            y = train_labels[indices.to(device)]        # (B,)
            logits, mu, logvar = model(x, y)
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
        val = test(model, val_images, val_labels)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch}/{epochs}, beta {beta:.2f}: training"
              f" recon {mean_recon:.2f} KL {mean_kl:.2f} total {mean_recon + mean_kl:.2f},"
              f" validation recon {val['recon']:.2f} KL {val['kl']:.2f} total {val['total']:.2f},"
              f" {val['active']} latents active, {time.perf_counter() - start:.0f} s", flush=True)
    return history


@torch.no_grad()
def test(model, images, labels, batch_size=1000):
    """Mean recon, kl, total of images (N, 1, 28, 28), labels (N,), and how many latents are active:
    those with a mean KL above 0.1 nats. As in training, z is one draw from q(z | x, y), not mu. In
    all sections, whatever weight the KL has in training, the total is recon + KL."""
    check_images(images)
    check_labels(labels, images)
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum, each_kl_sum = 0.0, 0.0, 0.0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x = x.to(device)                                # (B, 1, 28, 28)
        logits, mu, logvar = model(x, y.to(device))
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
    """Reconstructions, samples from the prior, styles of real images in all classes, the curves."""
    device = next(model.parameters()).device
    indices, names = data.one_of_each_class(dataset.test_labels)
    x = dataset.test_images[indices].to(device)         # (10, 1, 28, 28)
    y = dataset.test_labels[indices].to(device)         # (10,)
    logits, mu, _ = model(x, y)
    both = torch.stack([x, logits.sigmoid()])           # (2, 10, 1, 28, 28): p, not a draw of x
    data.image_grid(both, f"{stem}-reconstructions.png",
                    "Test images and their reconstructions", ("original", "decoded z"), names)
    z = torch.randn(8, model.latent_dim, device=device)
    data.image_grid(in_all_classes(model, z), f"{stem}-samples.png",
                    "Each row: one z from N(0, I). Each column: one class", columns=data.CLASSES)
    rows = torch.cat([x[:, None], in_all_classes(model, mu)], dim=1)        # (10, 11, 1, 28, 28)
    data.image_grid(rows, f"{stem}-swaps.png",
                    "A real image, its style in every class", names, ("real", *data.CLASSES))
    data.plot_curves(history, f"{stem}-curves.png")


def in_all_classes(model, z):
    """z (N, latent_dim), decoded as each class: (N, 10, 1, 28, 28), in [0, 1]."""
    classes = torch.arange(10, device=z.device)
    return torch.stack([model.decode(style.expand(10, -1), classes).sigmoid() for style in z])


@torch.no_grad()
def draw_walk(model, path, frames=48):
    """A film of one style that walks through all classes: z(t) = a cos t + b sin t, a, b ~ N(0, I).
    As cos^2 + sin^2 = 1, each z(t) is again a draw from N(0, I); and the walk comes back."""
    a, b = torch.randn(2, 1, model.latent_dim, device=next(model.parameters()).device)
    figure, writer = data.Figure((6.4, 0.88)), PillowWriter(fps=12)
    axes = figure.add_axes((0, 0.2, 1, 0.8))
    with writer.saving(figure, path, dpi=100):
        for t in torch.arange(frames) * (2 * math.pi / frames):
            axes.clear()
            images = in_all_classes(model, a * t.cos() + b * t.sin())       # (1, 10, 1, 28, 28)
            data.draw_grid(axes, images, columns=data.CLASSES)
            writer.grab_frame()


# ---------------------------------------------------------------- the section

FLAGS = data.flags(__file__, __doc__, epochs=36, batch_size=256, lr=2e-3, latent_dim=32,
                   warmup=0.2)


def load_model(path, device="cpu"):
    """(trained model in eval mode, all that its checkpoint holds). Code in the file is not run."""
    meta = torch.load(path, map_location="cpu", weights_only=True)
    model = CVAE(meta["config"]["latent_dim"])
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
    model = CVAE(args.latent_dim).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"training {path} on {device}, {parameters:,} parameters", flush=True)
    start = time.perf_counter()
    history = train(model, dataset.train_images, dataset.train_labels,
                    dataset.val_images, dataset.val_labels,
                    args.epochs, args.batch_size, args.lr, args.warmup)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images, dataset.test_labels)
    metrics["seconds"] = time.perf_counter() - start
    data.save_checkpoint(path, args, dataset, metrics, model.state_dict())
    data.print_test(metrics, dataset)
    shares = dataset.test_labels.bincount() / len(dataset.test_labels)      # p(y) of each class
    label_cost = torch.special.entr(shares).sum().item()                    # - sum of p(y) log p(y)
    print(f"total + {label_cost:.2f} for the label = {metrics['total'] + label_cost:.2f}")
    stem = path.with_suffix("")
    draw_pictures(model, dataset, history, stem)
    draw_walk(model, f"{stem}-walk.gif")
    print(f"-> {path} and the pictures {stem}-*")
    return path


if __name__ == "__main__":
    data.run(main)
