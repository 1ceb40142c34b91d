"""Section 2: the variational autoencoder (VAE).

A VAE (Kingma & Welling 2014, arXiv:1312.6114) supposes that each image x was made in two steps.
First, a few hidden numbers z, its latents, were drawn from the prior p(z) = N(0, I): independent
standard normals. Then x was drawn from p(x | z), which a neural network computes, the decoder.
A second network, the encoder, looks at an image and guesses which z may have made it. Its guess is
a distribution, too: q(z | x) = N(mu, sigma^2), with one mu and one sigma for each latent.

We want log p(x), the log-probability of our images, to be large. But p(x) is an integral over all
z, and nearly every z adds nearly nothing to it: far too many would have to be tried. So we multiply
and divide by q(z | x), which makes it a mean over those z that the encoder proposes. E_q[ ... ]
means "the mean over z drawn from q(z | x)":

    log p(x)  =  log integral of p(x | z) p(z) dz
              =  log integral of q(z | x) [ p(x | z) p(z) / q(z | x) ] dz
              =  log E_q[ p(x | z) p(z) / q(z | x) ]
              >= E_q[ log p(x | z) ]  -  E_q[ log q(z | x) - log p(z) ]

since the log of a mean is at least the mean of the logs (Jensen's inequality). The mean of the logs
can be estimated by one draw of z; the log of the mean cannot, as the log of a noisy mean is too low
on average. The last line is the evidence lower bound, the ELBO (their eq. 3). Its second mean is
the Kullback-Leibler divergence KL( q(z | x) || p(z) ). It tells how far q(z | x) is from the prior:
it is never negative, and 0 only if both are equal. We train both networks to make the ELBO large,
or its negative small:

    loss  =  -ELBO  =  E_q[ -log p(x | z) ]  +  KL( q(z | x) || N(0, I) )
                              recon                      KL

recon tells how badly the decoder reconstructs the image from a z that the encoder proposes. The KL
keeps q(z | x) near N(0, I), so that later we can draw z from N(0, I) and decode it to a new image.
Both are in nats (units of the natural logarithm) per image: summed over pixels and over latents,
averaged over images.

    python vae.py                       # two minutes on two CPU cores
    python vae.py --latent-dim 2        # also draws its latent space, which then fits on paper

You should see (full data, seed 0) a test total of 235.94 nats, that is recon 221.80 and KL 14.13,
all rounded. As our pixels are grey, recon is not 0 even if all predictions are perfect, but 189.86,
the entropy floor (data.py explains it); recon is 31.95 above it, the excess.
9 of the 20 latents are active: their mu differs from image to image. In the others, q(z | x) is
N(0, 1) for all images, probably since what they could tell would lower recon by less than its KL
(section 3 tries another explanation). Reconstructions have the right shape, but are blurred: many
images fit the same z, and the decoder's best answer is the mean of all of them.
Try: in elbo_terms, turn the `.sum(1)` of recon into `.mean(1)`, a common mistake, and run with
--out try (a folder of its own). The KL then weighs 784 times too much. How do the samples look?
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


class VAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size.
    LayerNorm and Residual are no part of the idea of a VAE. But without LayerNorm, a few images may
    cost thousands of nats, and Residual lowers the loss by more than a nat (results/README.md)."""

    def __init__(self, latent_dim=20, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),                                             # (B, 784)
            torch.nn.Linear(784, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),                    # (B, 512)
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, hidden),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)),
            Residual(torch.nn.GELU(), torch.nn.Linear(hidden, hidden)), torch.nn.GELU(),
            torch.nn.Linear(hidden, 784),
            torch.nn.Unflatten(1, (1, 28, 28)),         # (B, 1, 28, 28): one logit per pixel
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


def train(model, train_images, val_images, epochs, batch_size, lr):
    """Minimise the negative ELBO on train_images (N, 1, 28, 28) in [0, 1].
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
    history, start = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        recon_sum, kl_sum = 0.0, 0.0                    # over all images of the epoch
        for indices in torch.randperm(len(train_images)).split(batch_size):
            x = train_images[indices.to(device)]        # (B, 1, 28, 28)
            logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits, x, mu, logvar)
            loss = (recon + kl).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}: choose a"
                                         " lower learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            recon_sum += recon.sum().item()
            kl_sum += kl.sum().item()
        mean_recon, mean_kl = recon_sum / len(train_images), kl_sum / len(train_images)
        val = test(model, val_images)
        history.append({"recon": mean_recon, "kl": mean_kl,
                        "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch}/{epochs}: training"
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


@torch.no_grad()
def draw_map(model, dataset, path):
    """The map of a latent space with two dimensions (after Kingma & Welling, figure 4). Left: where
    the encoder puts the test images, their mu; the q(z | x) of one of each class, as black ellipses
    of two sigma around mu; and the prior, as a dashed circle of radius two. Right: the images that
    the decoder gives for each place."""
    device = next(model.parameters()).device
    mu, logvar = model.encode(dataset.test_images.to(device))               # (N, 2) each
    mu, sigma = mu.cpu(), torch.exp(0.5 * logvar).cpu()
    figure = data.Figure((11, 5.5), dpi=100, layout="constrained")
    left = figure.add_subplot(1, 2, 1, title="Where the encoder puts the test images",
                              xlabel="z0", ylabel="z1", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    for c, name in enumerate(data.CLASSES):
        z0, z1 = mu[dataset.test_labels == c].T.numpy()
        left.scatter(z0, z1, s=2, color=f"C{c}", label=name)
    figure.legend(loc="outside lower center", ncols=10, markerscale=4)
    angle = torch.linspace(0, 2 * math.pi, 100)
    left.plot(2 * angle.cos(), 2 * angle.sin(), "--", color="black")        # around the prior
    for i in data.one_of_each_class(dataset.test_labels)[0]:
        left.plot(mu[i, 0] + 2 * sigma[i, 0] * angle.cos(),
                  mu[i, 1] + 2 * sigma[i, 1] * angle.sin(), color="black")

    right = figure.add_subplot(1, 2, 2, title="What the decoder draws there",
                               xlabel="z0", ylabel="z1")
    middles = torch.linspace(-3.75, 3.75, 16)           # of 16 cells from -4 to 4
    rows = []
    for z1 in middles.flip(0):                          # the largest z1 is in the top row
        z = torch.stack([middles, z1.expand(16)], dim=1)                    # (16, 2)
        images = model.decode(z.to(device))[:, 0].sigmoid().cpu()           # (16, 28, 28)
        rows.append(torch.cat(list(images), dim=1))     # (28, 448): 16 images side by side
    right.imshow(torch.cat(rows).numpy(), cmap="gray", extent=(-4, 4, -4, 4))       # (448, 448)
    data.save_figure(figure, path)


# ---------------------------------------------------------------- the section

def flags():
    """The flags of this script, with their defaults. data.Parser adds --data and --out."""
    parser = data.Parser("vae", __doc__)
    parser.add_argument("--epochs", type=int, default=24, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in one step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--latent-dim", type=int, default=20, help="dimensions of z")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def load_model(path, device="cpu"):
    """(trained model in eval mode, what else its checkpoint holds); UserError if it is unusable."""
    return data.load_model(path, "vae", lambda config: VAE(config["latent_dim"]), device)


@data.command                                           # prints mistakes of users as one line
def main(argv=None, dataset=None):
    """Train, test, save, draw. argv: a list of flags, or None for those of the command line;
    dataset: what data.load() gave, or None to load it. Returns the path of the checkpoint."""
    args = data.read_flags(flags(), argv)               # checked; and args.device is a device
    dataset = dataset or data.load(args.data)

    torch.manual_seed(args.seed)
    model = VAE(args.latent_dim).to(args.device)
    data.print_start(args, model)
    start = time.perf_counter()
    history = train(model, dataset.train_images, dataset.val_images,
                    args.epochs, args.batch_size, args.lr)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images)
    metrics["seconds"] = time.perf_counter() - start
    data.print_test(metrics, dataset, args.latent_dim)

    path = data.run_path(args, dataset.source)
    data.save_checkpoint(path, args, dataset.source, metrics, model.state_dict())
    stem = path.with_suffix("")
    draw_pictures(model, dataset, history, stem)
    if args.latent_dim == 2:
        draw_map(model, dataset, f"{stem}-map.png")
    print(f"-> {path} and the pictures {stem}-*.png")
    return path


if __name__ == "__main__":
    main()
