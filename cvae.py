"""Section 5: the conditional VAE (CVAE): ask for a class, and z is left with the style.

Encoder and decoder are both told the label y: the decoder, so that we can ask it for a class; the
encoder, so that it knows what z need not say. To tell the class in z as well would cost KL and gain
nothing. So z is left with what y does not say, the style: brightness, width, sleeves. The loss is
that of section 3, with w for the KL warm-up (vae.py and conv_vae.py explain all of it), and
everything is given y:

    loss  =  E_q[ -log p(x | z, y) ]  +  w * KL( q(z | x, y) || N(0, I) )

(Kingma et al. 2014, arXiv:1406.5298, model M2. Sohn et al. 2015, NeurIPS, eq. 4, learn a prior of z
for each y; ours is N(0, I) for all y.) The encoder sees y as ten constant planes beside the patches
of the image, one of them 1 and the others 0; the decoder sees it as a one-hot vector beside z. The
same z with another y is the same style in another class.

The total is an upper bound on -log p(x | y), not on -log p(x). To compare it with that of a VAE,
add what the label costs. All classes are equally frequent, so p(y) = 1/10; and as p(x) is the sum
of p(x, y) over all y, it is at least p(x, y) = p(x | y) p(y). Hence

    -log p(x)  <=  -log p(x | y) - log p(y)  =  -log p(x | y) + log 10,     log 10 = 2.30 nats

    python cvae.py                      # five minutes on two CPU cores

You should see (full data, seed 0) a test total of about 231.95 nats: recon 219.57, an excess of
29.71, and KL 12.38. With log 10 it is 234.25. `diff conv_vae.py cvae.py` shows where the label
comes in. (In elbo_terms, which is the same everywhere, read p(x | z, y) for p(x | z).)
Try (with --out try): leave y out of the decoder, by `0 * label` in decode(). Then who has to tell
which class it is?
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
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),                    # (B, 512)
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim + 10, hidden),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)), torch.nn.GELU(),
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
        return self.decoder(torch.cat([z, label], dim=1))

    def forward(self, x, y):
        """x (B, 1, 28, 28), y (B,) -> logits (B, 1, 28, 28), mu, logvar, each (B, latent_dim).
        One draw of z estimates the mean E_q. It is noisy, but a batch averages many of them."""
        mu, logvar = self.encode(x, y)
        z = self.reparameterize(mu, logvar)
        return self.decode(z, y), mu, logvar


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


def check_labels(labels, images):
    """ValueError unless there is one label, a whole number from 0 to 9, for each image."""
    if (labels.shape != (len(images),) or labels.dtype != torch.int64
            or labels.min() < 0 or labels.max() > 9):
        raise ValueError(f"these labels are {tuple(labels.shape)} of {labels.dtype}, but should be"
                         f" ({len(images)},) of torch.int64, from 0 to 9: one for each image")


def is_active(mu):
    """Which latents tell anything: mu (N, D) -> (D,) bool. A latent whose mu is the same for all
    images says nothing about them. It is called active if its mu varies from image to image, with a
    variance above 0.01 (Burda et al. 2016, arXiv:1509.00519)."""
    return mu.var(dim=0) > 0.01


def train(model, train_images, train_labels, val_images, val_labels, epochs, batch_size, lr,
          warmup):
    """Minimise recon + w KL on train_images (N, 1, 28, 28) in [0, 1], train_labels (N,).
    Returns the history, a dict for each epoch; FloatingPointError if the loss is not finite.

    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0. Adam's beta2 is 0.99, not its default 0.999: that learns faster here."""
    check_images(train_images)
    check_images(val_images)
    check_labels(train_labels, train_images)
    check_labels(val_labels, val_images)
    device = next(model.parameters()).device
    train_images = train_images.to(device)
    train_labels = train_labels.to(device)
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
            y = train_labels[indices.to(device)]        # (B,)
            logits, mu, logvar = model(x, y)
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
        val = test(model, val_images, val_labels)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch}/{epochs}, KL weight {w:.2f}: training"
              f" recon {mean_recon:.2f} KL {mean_kl:.2f} total {mean_recon + mean_kl:.2f},"
              f" validation recon {val['recon']:.2f} KL {val['kl']:.2f} total {val['total']:.2f},"
              f" {val['active']} latents active,"
              f" {time.perf_counter() - start:.0f} s", flush=True)
    return history


@torch.no_grad()
def test(model, images, labels, batch_size=1000):
    """Mean recon, kl, total of images (N, 1, 28, 28), labels (N,), and how many latents are active.
    As in training, z is one draw from q(z | x, y), not mu. In all sections, whatever weight the KL
    has in training, the total is recon + KL."""
    check_images(images)
    check_labels(labels, images)
    model.eval()
    device = next(model.parameters()).device
    recon_sum, kl_sum, all_mu = 0.0, 0.0, []
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x, y = x.to(device), y.to(device)               # (B, 1, 28, 28), (B,)
        logits, mu, logvar = model(x, y)
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
    """One test image of each class and its reconstruction, samples from the prior, the styles of
    real images in all classes, the curves."""
    device = next(model.parameters()).device
    first, names = data.one_of_each_class(dataset.test_labels)
    x = dataset.test_images[first].to(device)           # (10, 1, 28, 28)
    y = dataset.test_labels[first].to(device)           # (10,)
    logits, mu, _ = model(x, y)
    both = torch.stack([x, logits.sigmoid()])           # (2, 10, 1, 28, 28): p, not a draw of x
    data.image_grid(both, f"{stem}-reconstructions.png",
                    "Test images and their reconstructions", ("original", "decoded z"), names)
    classes = torch.arange(10, device=device)
    # (80, latent_dim): eight z, each of them ten times, for the ten classes
    z = torch.randn(8, model.latent_dim, device=device).repeat_interleave(10, dim=0)
    samples = model.decode(z, classes.repeat(8)).sigmoid()                  # (80, 1, 28, 28)
    data.image_grid(samples.view(8, 10, 28, 28), f"{stem}-samples.png",
                    "Each row: one z from N(0, I). Each column: one class", columns=data.CLASSES)
    z = mu.repeat_interleave(10, dim=0)                 # (100, latent_dim): each mu ten times
    # (10, 10, 1, 28, 28): a row for each real image, a column for each class
    swaps = model.decode(z, classes.repeat(len(x))).sigmoid().view(-1, 10, 1, 28, 28)
    rows = torch.cat([x[:, None], swaps], dim=1)        # (10, 11, 1, 28, 28): the real image first
    data.image_grid(rows, f"{stem}-swaps.png",
                    "A real image, its style in every class", names, ("real", *data.CLASSES))
    data.plot_curves(history, f"{stem}-curves.png")


# ---------------------------------------------------------------- the section

def flags():
    """The flags of this script, with their defaults. data.Parser adds --data and --out."""
    parser = data.Parser("cvae", __doc__)
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
    return data.load_model(path, "cvae", lambda config: CVAE(config["latent_dim"]), device)


@data.command                                           # prints mistakes of users as one line
def main(argv=None, dataset=None):
    """Train, test, save, draw. argv: a list of flags, or None for those of the command line;
    dataset: what data.load() gave, or None to load it. Returns the path of the checkpoint."""
    args = data.read_flags(flags(), argv)               # checked; and args.device is a device
    dataset = dataset or data.load(args.data)

    torch.manual_seed(args.seed)
    model = CVAE(args.latent_dim).to(args.device)
    data.print_start(args, model)
    start = time.perf_counter()
    history = train(model, dataset.train_images, dataset.train_labels,
                    dataset.val_images, dataset.val_labels,
                    args.epochs, args.batch_size, args.lr, args.warmup)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images, dataset.test_labels)
    metrics["seconds"] = time.perf_counter() - start
    data.print_test(metrics, dataset, args.latent_dim)
    print(f"total + log 10 = {metrics['total'] + math.log(10):.2f}, to compare with a VAE")

    path = data.run_path(args, dataset.source)
    data.save_checkpoint(path, args, dataset.source, metrics, model.state_dict())
    stem = path.with_suffix("")
    draw_pictures(model, dataset, history, stem)
    print(f"-> {path} and the pictures {stem}-*.png")
    return path


if __name__ == "__main__":
    main()
