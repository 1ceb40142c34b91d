"""Section 2: the variational autoencoder (VAE).

A VAE (Kingma & Welling 2014, arXiv:1312.6114) supposes that each image x was made in two steps.
First, a few hidden numbers z, its latents, were drawn from the prior p(z) = N(0, I): independent
standard normals. Then x was drawn from p(x | z), which a neural network computes, the decoder. A
second network, the encoder, guesses from an image which z may have made it. Its guess is a
distribution, too: q(z | x) = N(mu, sigma^2), with one mu and one sigma for each latent. Both are
trained to make one loss small. It is never below -log p(x), so its negative is a lower bound on
log p(x), the evidence: the ELBO (Kingma & Welling, eq. 3; the proof is in README.md):

    loss  =  -ELBO  =  E_q[ -log p(x | z) ]  +  KL( q(z | x) || N(0, I) )
                              recon                      KL

recon tells how badly the decoder draws the image again, from a z of the encoder's guess (E_q: the
mean over such z). The KL is the price of z: it keeps all q(z | x) together near the prior, so that
we can later draw z from it and decode it to a new image. Both are in nats, the unit of the natural
logarithm, per image: summed over pixels and over latents, averaged over images.

    python vae.py                       # two minutes on two CPU cores
    python vae.py --latent-dim 2        # also draws its latent space, which then fits on paper

You should see (full data, seed 0) a test total of about 236 nats, and blurred reconstructions, as
one z stands for many images. On these grey test images, recon is at least 189.86 (see data.py).
Try: in elbo_terms, turn the `.sum(1)` of recon into `.mean(1)`, a common mistake; add --out try.
The KL then weighs 784 times too much; recon is 0.49, its excess -189. How do the samples look?
"""
import math
import time

import torch

import data

# ---------------------------------------------------------------- the model

class VAE(torch.nn.Module):
    """Images in [0, 1] -> logits, both (B, 1, 28, 28), through z (B, latent_dim). B: batch size."""

    def __init__(self, latent_dim=20, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),                                             # (B, 784)
            torch.nn.Linear(784, hidden),
            torch.nn.LayerNorm(hidden), torch.nn.GELU(),    # (B, 512), mean 0, std 1; then scaled
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2 of each latent
        )
        self.dense1 = torch.nn.Linear(latent_dim, hidden)
        self.dense2 = torch.nn.Linear(hidden, hidden)
        self.dense3 = torch.nn.Linear(hidden, hidden)
        self.to_pixels = torch.nn.Sequential(
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


def train(model, train_images, val_images, epochs, batch_size, lr):
    """Minimise the negative ELBO on train_images (N, 1, 28, 28) in [0, 1].
    Returns the history, a dict for each epoch; FloatingPointError if the loss is not finite.
    Adam with OneCycle: the learning rate rises from lr / 25 to lr in the first 30 % of all steps,
    then falls almost to 0. Adam's beta2 is 0.99, not its default 0.999: that learns faster here.
    fused only makes each step faster."""
    check_images(train_images)
    check_images(val_images)
    device = next(model.parameters()).device
    train_images = train_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = epochs * math.ceil(len(train_images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   cycle_momentum=False)    # Adam has its own
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
                raise FloatingPointError(f"loss {loss.item()} in epoch {epoch}: choose a lower lr")
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


@torch.no_grad()
def draw_map(model, dataset, path):
    """The map of two latents from -4 to 4 (after Kingma & Welling, figure 4): mu of test images,
    two sigma of one of each class and of the prior (dashed), and what the decoder draws there."""
    device = next(model.parameters()).device
    mu, logvar = model.encode(dataset.test_images.to(device))               # (N, 2) each
    mu, sigma = mu.cpu(), torch.exp(0.5 * logvar).cpu()
    figure = data.Figure((11, 5.5), dpi=85, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="Where the encoder puts the test images", xlabel="z0", ylabel="z1",
             xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    angle = torch.linspace(0, 2 * math.pi, 100)
    left.plot(2 * angle.cos(), 2 * angle.sin(), "--", color="black")
    labels = dataset.test_labels
    for i, name in zip(*data.one_of_each_class(labels)):
        z0, z1 = mu[labels == labels[i]].T.numpy()
        left.scatter(z0, z1, s=2, label=name)
        left.plot(mu[i, 0] + 2 * sigma[i, 0] * angle.cos(),
                  mu[i, 1] + 2 * sigma[i, 1] * angle.sin(), color="black")
    figure.legend(loc="outside lower center", ncols=10, markerscale=4)
    right.set(title="What the decoder draws there", xlabel="z0", ylabel="z1")
    middles = torch.linspace(-3.75, 3.75, 16)           # of 16 cells from -4 to 4
    rows = []
    for z1 in middles.flip(0):                          # the largest z1 is in the top row
        z = torch.stack([middles, z1.expand(16)], dim=1)                    # (16, 2)
        images = model.decode(z.to(device))[:, 0].sigmoid().cpu()           # (16, 28, 28)
        rows.append(torch.cat(list(images), dim=1))     # (28, 448): 16 images side by side
    right.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=0, vmax=1, origin="upper",
                 extent=(-4, 4, -4, 4))
    figure.savefig(path, bbox_inches="tight")


# ---------------------------------------------------------------- the section

FLAGS = data.flags(__file__, __doc__, epochs=24, batch_size=256, lr=2.5e-3, latent_dim=20)


def load_model(path, device="cpu"):
    """(trained model in eval mode, all that its checkpoint holds). Code in the file is not run."""
    meta = torch.load(path, map_location="cpu", weights_only=True)
    model = VAE(meta["config"]["latent_dim"])
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
    model = VAE(args.latent_dim).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"training {path} on {device}, {parameters:,} parameters", flush=True)
    start = time.perf_counter()
    history = train(model, dataset.train_images, dataset.val_images,
                    args.epochs, args.batch_size, args.lr)
    torch.manual_seed(args.seed)                        # so that evaluate.py can repeat this test
    metrics = test(model, dataset.test_images)
    metrics["seconds"] = time.perf_counter() - start
    data.save_checkpoint(path, args, dataset, metrics, model.state_dict())
    data.print_test(metrics, dataset)
    stem = path.with_suffix("")
    draw_pictures(model, dataset, history, stem)
    if args.latent_dim == 2:
        draw_map(model, dataset, f"{stem}-map.png")
    print(f"-> {path} and the pictures {stem}-*.png")
    return path


if __name__ == "__main__":
    data.run(main)
