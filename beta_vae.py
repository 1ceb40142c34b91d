"""Section 4: the beta-VAE, or what the weight of the KL decides.

One number is put before the KL (Higgins et al. 2017, ICLR, eq. 4):

    loss  =  recon  +  beta * KL

beta < 1 makes every nat that z carries cheap: sharper reconstructions, more KL. beta > 1 makes it
expensive: only what pays is kept, latent dimensions are switched off, images blur. Every beta is
one point on the rate-distortion curve of the same network (Alemi et al. 2018, arXiv:1711.00464):
rate = KL, distortion = recon. All runs are *reported* at beta = 1, recon + KL: beta-weighted totals
are different objectives and compare with nothing.

    python beta_vae.py                 # trains beta = 0.25, 1, 4, 8, one after the other

Expect (full data, seed 0): about 3 min on 2 CPU cores; test totals 241.86, 240.05, 249.16, 258.61,
KL 22.2, 12.2, 6.1, 4.3, and 9, 6, 4, 4 of the 10 dimensions active: the others do nothing.
Try: --betas 0 (an autoencoder: look at its samples), --betas 100. Left out: disentanglement scores.
"""
import time

import torch
from matplotlib.figure import Figure

from data import (CLASSES, Parser, UserError, command, describe, image_grid, load, pick_device,
                  read_checkpoint, run_path, save_checkpoint, write_atomically)

# ---------------------------------------------------------------- the model


class BetaVAE(torch.nn.Module):
    """784 - 512 - 512 - z and back: images in [0, 1] -> logits, both (B, 1, 28, 28)."""

    def __init__(self, latent_dim=10, hidden=512):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(784, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 2 * latent_dim),    # mu and log sigma^2
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
            torch.nn.Linear(hidden, 784),               # one logit a pixel
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
        return self.decoder(z).view(-1, 1, 28, 28)

    def forward(self, x):
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


# ---------------------------------------------------------------- the loss


def elbo_terms(logits, x, mu, logvar):
    """The two parts of the negative ELBO, each (B,), in nats per image.

    Kingma & Welling, eq. 10, with the signs turned (they maximise). Sums, never means, over pixels
    and latents: only so do the two terms have the same unit.
    """
    # recon = -log p(x | z) = -sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ],  p = sigmoid(logits)
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                                         # (B,)
    # kl = 1/2 sum_d [ mu_d^2 + sigma_d^2 - log sigma_d^2 - 1 ]
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing


def train(model, data, epochs, batch_size, lr, device, beta):
    """Adam and OneCycle: the learning rate rises to `lr` for 30 % of the steps, then falls to 0
    (and Adam's beta1 goes from 0.95 to 0.85 and back). Returns one dict an epoch."""
    x_train = data.train_images.to(device)
    x_val = data.val_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)  # Adam's
    steps = -(-len(x_train) // batch_size)              # rounded up: the last batch is smaller
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history, start = [], time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        sums = torch.zeros(2)                           # recon and KL of the whole epoch
        for step, batch in enumerate(torch.randperm(len(x_train)).split(batch_size), 1):
            x = x_train[batch.to(device)]               # (B, 1, 28, 28)
            logits, mu, logvar = model(x)
            recon, kl = elbo_terms(logits, x, mu, logvar)
            loss = (recon + beta * kl).mean()           # the one change in the loop
            if not torch.isfinite(loss):
                raise UserError(f"loss is {loss.item()} in epoch {epoch}, step {step}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([recon.sum(), kl.sum()]).detach().cpu()
        recon, kl = (sums / len(x_train)).tolist()
        val = test(model, x_val)
        seconds = time.time() - start
        history.append({"recon": recon, "kl": kl, "val_recon": val["recon"], "val_kl": val["kl"]})
        print(f"epoch {epoch:3}/{epochs}  "
              f"{describe('train', recon, kl, data.floor)}  "
              f"{describe('val', val['recon'], val['kl'], data.floor)}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return history


@torch.no_grad()
def test(model, images, batch_size=1000):
    """Mean recon, kl and total over the images, one posterior sample each, full KL weight."""
    model.eval()
    sums = torch.zeros(2)
    for x in images.split(batch_size):
        logits, mu, logvar = model(x)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        sums += torch.stack([recon.sum(), kl.sum()]).cpu()
    recon, kl = (sums / len(images)).tolist()
    return {"recon": recon, "kl": kl, "total": recon + kl}


# ---------------------------------------------------------------- what the latent space learned

@torch.no_grad()
def posterior(model, images, batch_size=1000):
    """mu and logvar, each (N, latent_dim), of all images, on the CPU."""
    parts = [model.encode(x.to(next(model.parameters()).device)) for x in images.split(batch_size)]
    return [torch.cat(part).cpu() for part in zip(*parts)]


def dimension_kl(mu, logvar):
    """Mean KL of each latent dimension in nats, (latent_dim,); their sum is the KL."""
    return 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).mean(0)


def active_units(mu):
    """How many dimensions depend on x: Var_x(mu_d) > 0.01 (Burda et al. 2016, arXiv:1509.00519)."""
    return int((mu.var(0) > 0.01).sum())


def linear_probe(mu, labels, test_mu, test_labels, ridge=1e-3):
    """Accuracy of a linear classifier on mu, in closed form: W = (A^T A + ridge N I)^-1 A^T Y."""
    a = torch.nn.functional.pad(mu, (0, 1), value=1.0).double()             # [mu, 1]
    y = torch.nn.functional.one_hot(labels, len(CLASSES)).double()          # (N, 10)
    gram = a.T @ a + ridge * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(gram, a.T @ y)
    judged = (torch.nn.functional.pad(test_mu, (0, 1), value=1.0).double() @ w).argmax(1)
    return (judged == test_labels).double().mean().item()


# ---------------------------------------------------------------- the pictures


@torch.no_grad()
def plot_traversals(model, image, kl, beta, path, device):
    """One latent dimension a row (by falling KL), moved from -3 to 3 in the code of one image."""
    mu, _ = model.encode(image.to(device))              # (1, latent_dim)
    order = kl.argsort(descending=True).tolist()
    values = torch.linspace(-3, 3, 11, device=device)
    z = mu.repeat(len(order), 11, 1)                    # (latent_dim, 11, latent_dim)
    for row, dimension in enumerate(order):
        z[row, :, dimension] = values
    images = model.decode(z.flatten(0, 1)).sigmoid().view(len(order), 11, 28, 28)
    image_grid(images, path, f"beta = {beta:g}: one dimension a row, {kl.sum():.1f} nats in all",
               [f"z{d}: {kl[d]:.2f}" for d in order], [f"{0.6 * i - 3:+.1f}" for i in range(11)])


@torch.no_grad()
def pictures(models, data, path, device):
    """Reconstructions and prior samples, one row a beta: the same images and the same z for all."""
    first = [int((data.test_labels == c).nonzero()[0]) for c in range(len(CLASSES))]
    x = data.test_images[first].to(device)              # one image of each class
    z = torch.randn(10, next(iter(models.values())).latent_dim, device=device)
    rows = [f"beta {beta:g}" for beta in models]
    recon = torch.stack([x] + [model(x)[0].sigmoid() for model in models.values()])[:, :, 0]
    image_grid(recon, path.with_name(f"{path.stem}-reconstructions.png"),
               "Reconstructions: what is lost first?", ("original", *rows), CLASSES)
    samples = torch.stack([model.decode(z).sigmoid() for model in models.values()])[:, :, 0]
    image_grid(samples, path.with_name(f"{path.stem}-samples.png"), "Draws from N(0, I)", rows)


def plot_tradeoff(rows, path):
    """The rate-distortion curve: KL against excess recon, and the line of equal total."""
    figure = Figure((6, 4.2), 110, layout="constrained")
    axes = figure.add_subplot(title="What does a nat of KL buy?", xmargin=0.25,
                              xlabel="KL (rate), nats", ylabel="excess recon (distortion), nats")
    axes.plot([row["kl"] for row in rows], [row["excess"] for row in rows], "o-")
    best = min(rows, key=lambda row: row["total"])
    axes.axline((best["kl"], best["excess"]), slope=-1, ls="--", c="gray", label="equal total")
    for row in rows:
        axes.annotate(f"   beta {row['beta']:g}", (row["kl"], row["excess"]))
    axes.legend()
    write_atomically(path, figure.savefig)


def plot_curves(history, path):
    """Recon and KL against epochs, train and validation."""
    figure = Figure(figsize=(9, 3.5), dpi=110, layout="constrained")
    epochs = range(1, len(history) + 1)
    titles = {"recon": "recon: what z does not tell", "kl": "KL: what z tells"}
    for i, (name, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(1, 2, i, title=title, xlabel="epoch", ylabel="nats per image")
        axes.plot(epochs, [h[name] for h in history], "o-", ms=3, label=f"train {name}")
        axes.plot(epochs, [h[f"val_{name}"] for h in history], "s--", ms=3, label=f"val {name}")
        axes.legend()
    write_atomically(path, figure.savefig)


# ---------------------------------------------------------------- the section


def load_model(path, device="cpu"):
    """(trained model in eval mode, meta) from a checkpoint; UserError where it does not fit."""
    meta = read_checkpoint(path, lambda config: BetaVAE(config["latent_dim"]), script="beta_vae")
    return meta["model"].to(device), meta


def train_one(beta, args, data, device, path, config):
    """Train, test and save the model of one beta."""
    torch.manual_seed(args.seed)                        # the same start for every beta
    model = BetaVAE(args.latent_dim).to(device)
    start = time.time()
    history = train(model, data, args.epochs, args.batch_size, args.lr, device, beta)
    torch.manual_seed(args.seed)                        # evaluate.py repeats exactly this test
    metrics = test(model, data.test_images.to(device)) | {"seconds": time.time() - start}
    mu, _ = posterior(model, data.test_images)
    metrics["active_units"] = active_units(mu)
    metrics["probe"] = linear_probe(posterior(model, data.train_images)[0], data.train_labels,
                                    mu, data.test_labels)
    save_checkpoint(path, script="beta_vae", config=config, source=data.source, seed=args.seed,
                    device=str(device), metrics=metrics, state_dict=model.state_dict())
    plot_curves(history, path.with_name(f"{path.stem}-curves.png"))


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.number("--epochs", int, 1, 10_000, 8, "passes over the training split for each beta (8)")
    parser.number("--batch-size", int, 1, 100_000, 128, "images a step (128)")
    parser.number("--lr", float, 1e-8, 10, 2e-3, "peak learning rate (2e-3)")
    parser.number("--latent-dim", int, 1, 784, 10, "numbers in z (10)")
    parser.number("--betas", float, 0, 1e6, [0.25, 1, 4, 8], "of the KL (0.25 1 4 8)", nargs="+")
    parser.number("--seed", int, 0, 2**32 - 1, 0, "of weights, batches and noise (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    parser.add_argument("--reuse", action="store_true", help="do not train again what is there")
    args = parser.parse_args(argv)

    if sorted(set(args.betas)) != args.betas:
        raise UserError(f"--betas {args.betas}: name each once, in rising order")
    device = pick_device(args.device)
    data = load(args.data)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in BetaVAE(args.latent_dim).parameters())
    print(f"device {device}, {parameters:,} parameters for each beta", flush=True)
    flags = "epochs", "batch_size", "lr", "latent_dim"
    base, config = run_path(parser, args, "beta_vae", data.source, *flags)
    sweep, _ = run_path(parser, args, "beta_vae", data.source, *flags, "betas")
    models, rows, paths = {}, [], []
    for beta in args.betas:
        print(f"beta = {beta:g}")
        path = base.with_name(base.name.replace("beta_vae", f"beta_vae-beta{beta:g}"))
        if not (args.reuse and path.exists()):
            train_one(beta, args, data, device, path, config | {"beta": beta})
        read_checkpoint(path, config=config | {"beta": beta}, source=data.source, seed=args.seed)
        models[beta], meta = load_model(path, device)
        excess = meta["metrics"]["recon"] - data.floor["test"]
        rows.append(meta["metrics"] | {"beta": beta, "excess": excess})
        paths.append(path)
        kl = dimension_kl(*posterior(models[beta], data.test_images))
        plot_traversals(models[beta], data.test_images[:1], kl, beta,
                        path.with_name(f"{path.stem}-traversals.png"), device)
    torch.manual_seed(args.seed)                        # the same pictures, trained now or before
    pictures(models, data, sweep, device)
    plot_tradeoff(rows, sweep.with_name(f"{sweep.stem}-tradeoff.png"))
    print(f"test ({data.source}), at beta = 1, nats per image; probe: linear classifier on mu")
    print("  beta   recon  excess     KL   total  active  probe")
    for r in rows:
        print(f"{r['beta']:6g}  {r['recon']:.2f}  {r['excess']:6.2f}  {r['kl']:5.2f}  "
              f"{r['total']:.2f}  {r['active_units']:6}  {r['probe']:.1%}")
    print("->", *paths, f"and beside them -traversals.png, -curves.png; {sweep.stem}-tradeoff.png,"
          " -reconstructions.png, -samples.png", sep="\n")
    return paths


if __name__ == "__main__":
    main()
