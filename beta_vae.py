"""Section 4: the beta-VAE, or what the weight of the KL decides, measured and not only shown.

One number is put before the KL (Higgins et al. 2017, ICLR, eq. 4):

    loss  =  recon  +  beta * KL

Each beta is one point on the rate-distortion curve of one network (Alemi et al. 2018,
arXiv:1711.00464): rate = KL, distortion = recon. All are *reported* at beta = 1: totals that
are weighted differently cannot be compared. Does a large beta order z, so that each property of
the image sits in a single dimension? That is held against a null: the same codes along random axes.

    python beta_vae.py

Expect (full data, seed 0): about 6 min on 2 CPU cores; on the test images, from beta = 0.25 to 16,
recon rises from 219.67 to 273.03 and KL falls from 22.20 to 2.79; gap - null shows no trend.
Try: --betas 0 (an autoencoder), --betas 100; --image 1 --reuse for other traversals.
"""
import time

import torch
from matplotlib.figure import Figure

from data import (CLASSES, Parser, UserError, command, describe, image_grid, load, pick_device,
                  read_checkpoint, run_path, save_checkpoint, write_atomically)

BETAS = [0.25, 0.5, 1, 2, 4, 8, 16]

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
    (and Adam's beta1 goes from 0.95 to 0.85 and back; its betas are not ours)."""
    x_train = data.train_images.to(device)
    x_val = data.val_images.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    steps = -(-len(x_train) // batch_size)              # rounded up: the last batch is smaller
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    start = time.time()
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
        print(f"epoch {epoch:3}/{epochs}  "
              f"{describe('train', recon, kl, data.floor)}  "
              f"{describe('val', val['recon'], val['kl'], data.floor)}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)


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

ATTRIBUTES = "ink", "width", "height", "centre", "symmetry", "top"


def attributes(images):
    """Six properties of images (N, 1, 28, 28) in [0, 1], by hand from their pixels -> (N, 6).

    ink: the sum of the pixels. width, height: of the box around those above 1/4, in pixels. centre:
    its mean row from the top. symmetry: 1 if left mirrors right. top: share of its upper half."""
    x, sides = images[:, 0], []
    for lines in (x.amax(1), x.amax(2)):                # (N, 28), the largest pixel of each line
        inside = (lines > 0.25).int()                   # the box: from the first 1 to the last
        sides.append(inside.amax(1) * (28 - inside.argmax(1) - inside.flip(1).argmax(1)))
    ink = x.sum((1, 2)).clamp(min=1e-6)
    centre = (x.sum(2) * torch.arange(28)).sum(1) / ink
    symmetry = 1 - (x - x.flip(2)).abs().sum((1, 2)) / (2 * ink)
    return torch.stack([ink, *sides, centre, symmetry, x[:, :14].sum((1, 2)) / ink], dim=1)


def active_units(mu):
    """How many columns of mu (N, D) have a variance above 0.01 (Burda et al. 2016, 1509.00519)."""
    return int((mu.var(0) > 0.01).sum())


def rank_correlation(a, b):
    """|Spearman's rho| of the columns of a (N, D) and b (N, K) -> (D, K); ties share a rank."""
    columns = torch.cat([a, b], dim=1).T.contiguous()                       # (D + K, N)
    ordered = columns.sort(1).values
    ranks = torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True)
    return ranks.double().corrcoef().nan_to_num()[:a.shape[1], a.shape[1]:].abs()


def gap(rho):
    """Does each attribute sit in a single dimension? Its largest |rho| minus the next, mean over
    attributes, in the manner of MIG (Chen et al. 2018, arXiv:1802.04942, eq. 6): (D, K) -> 0 to 1.
    One dimension may hold several attributes."""
    largest, second = torch.nn.functional.pad(rho, (0, 0, 0, 2)).topk(2, dim=0).values
    return (largest - second).mean().item()


def rotated_gaps(mu, values, rotations=20):
    """The null: gaps of the codes mu (N, D) along random orthogonal axes, with the attributes
    values (N, K) -> (rotations,)."""
    rng, d = torch.Generator().manual_seed(0), mu.shape[1]
    turns = [torch.linalg.qr(torch.randn(d, d, generator=rng)).Q for _ in range(rotations)]
    return torch.tensor([gap(rank_correlation(mu @ turn, values)) for turn in turns])


def traversal_effect(model, mu, dimensions, spread):
    """What a dimension *causes*: the change of each attribute of the decoded image while it alone
    moves from -2 to 2, in units of spread (6,) -> (dimensions, 6). The mean over codes mu (N, D):
    opposite changes cancel."""
    effects = torch.zeros(len(dimensions), len(spread))
    for row, dimension in enumerate(dimensions):
        low, high = mu.clone(), mu.clone()
        low[:, dimension], high[:, dimension] = -2, 2
        before, after = (attributes(model.decode(z).sigmoid()) for z in (low, high))
        effects[row] = (after - before).mean(0) / spread
    return effects


def linear_probe(mu, labels, test_mu, test_labels, ridge=1e-3):
    """Share of test_mu that a linear classifier, fitted to mu (N, D) and labels (N,), gets right.
    In closed form: W = (A^T A + ridge N I)^-1 A^T Y."""
    a = torch.nn.functional.pad(mu, (0, 1), value=1.0).double()             # [mu, 1]
    y = torch.nn.functional.one_hot(labels, len(CLASSES)).double()          # (N, 10)
    gram = a.T @ a + ridge * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(gram, a.T @ y)
    judged = (torch.nn.functional.pad(test_mu, (0, 1), value=1.0).double() @ w).argmax(1)
    return (judged == test_labels).double().mean().item()


@torch.no_grad()
def analyse(model, data, images, labels):
    """What z carries (model on the CPU): numbers for the table; and for the pictures dimension_kl
    (latent_dim,) and a row for each active dimension, most KL first, of rho and effect (active, 6).
    """
    mu, logvar = model.encode(images)                   # (N, latent_dim) each
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).mean(0)
    active = [d for d in kl.argsort(descending=True).tolist() if active_units(mu[:, [d]])]
    values = attributes(images)
    rho, null = rank_correlation(mu[:, active], values), rotated_gaps(mu[:, active], values)
    probe = linear_probe(model.encode(data.train_images)[0], data.train_labels, mu, labels)
    return {"active_units": float(len(active)), "probe": probe, "gap": gap(rho),
            "null": null.mean().item(), "beaten": (null < gap(rho)).double().mean().item()}, {
            "model": model, "dimension_kl": kl, "active": active, "rho": rho,
            "effect": traversal_effect(model, mu[:500], active, values.std(0))}


# ---------------------------------------------------------------- the pictures

def plot_tradeoff(rows, path):
    """Rate against distortion, a point a row; error bars where its figures have a mean and std."""
    figure = Figure((6, 4.2), 110, layout="constrained")
    axes = figure.add_subplot(title="What does a nat of KL buy?", xlabel="KL (rate), nats",
                              ylabel="excess recon (distortion), nats", xmargin=0.2)
    points = []
    for row in rows:
        x, y, active = (row[key] for key in ("kl", "excess", "active_units"))
        if isinstance(x, dict):
            axes.errorbar(x["mean"], y["mean"], y["std"], x["std"], c="tab:blue")
            x, y, active = x["mean"], y["mean"], active["mean"]
        axes.plot(x, y, "o", c="tab:blue", ms=3 + active)                   # size: active units
        axes.annotate(row["model"], (x, y), (9, 5), textcoords="offset points")
        points.append((x, y))
    axes.plot(*zip(*points), c="tab:blue")
    axes.axline(min(points, key=sum), slope=-1, ls="--", c="gray", label="equal total")
    axes.legend()
    write_atomically(path, figure.savefig)


@torch.no_grad()
def plot_traversals(found, image, rows, path):
    """One image's code, a dimension a row (most KL first) moved from -3 to 3, for each beta."""
    panels, names = [], [""] * rows
    for f in found.values():
        z = f["model"].encode(image)[0].repeat(rows, 7, 1)                  # (rows, 7, latent_dim)
        for row, dimension in enumerate(f["dimension_kl"].argsort(descending=True)[:rows]):
            z[row, :, dimension] = torch.arange(-3, 4)
            names[row] += f"  {f['dimension_kl'][dimension]:.2f}"
        images = f["model"].decode(z.flatten(0, 1)).sigmoid().view(rows, 7, 28, 28)
        panels += [images, torch.ones_like(images[:, :1])]                  # and a white gap
    columns = [c for beta in found for c in ("-3", "", "", f"beta {beta:g}", "", "", "3", "")]
    image_grid(torch.cat(panels, dim=1), path,
               "One dimension a row, most KL first; left: its KL at each beta", names, columns)


def plot_attributes(found, path):
    """Attributes against active dimensions, for each beta: |rank correlation|, below |effect|."""
    figure = Figure((1 + 2 * len(found), 5), 80, layout="constrained")
    titles = {"rho": "|rho|", "effect": "|effect|"}
    for i, (beta, f) in enumerate(found.items(), 1):
        for row, (key, title) in enumerate(titles.items()):
            axes = figure.add_subplot(2, len(found), row * len(found) + i, xlabel="dimension",
                                      title=f"beta {beta:g}: {title}")
            axes.pcolormesh(f[key].T.abs(), cmap="Blues", vmin=0, vmax=1 + row)
            axes.invert_yaxis()
            axes.set_yticks(torch.arange(6) + 0.5, ATTRIBUTES if i == 1 else [""] * 6)
            axes.set_xticks(torch.arange(len(f["active"])) + 0.5, f["active"])
    write_atomically(path, figure.savefig)


# ---------------------------------------------------------------- the section

def load_model(path, device="cpu"):
    """(trained model in eval mode, meta) from a checkpoint; UserError where it does not fit."""
    meta = read_checkpoint(path, lambda config: BetaVAE(config["latent_dim"]), script="beta_vae")
    return meta["model"].to(device), meta


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.number("--epochs", int, 1, 10_000, 8, "passes over the training split for each beta (8)")
    parser.number("--batch-size", int, 1, 100_000, 128, "images a step (128)")
    parser.number("--lr", float, 1e-8, 10, 2e-3, "peak learning rate (2e-3)")
    parser.number("--latent-dim", int, 1, 784, 10, "numbers in z (10)")
    parser.number("--betas", float, 0, 1e6, BETAS, "weights of the KL (0.25 ... 16)", nargs="+")
    parser.number("--image", int, 0, 9_999, 0, "the test image whose code is traversed (0)")
    parser.number("--dimensions", int, 1, 784, None, "rows of the traversals (--latent-dim)")
    parser.number("--seed", int, 0, 2**32 - 1, 0, "of weights, batches and noise (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    parser.add_argument("--reuse", action="store_true", help="do not train again what is there")
    args = parser.parse_args(argv)

    args.betas.sort()
    if len({f"{beta:g}" for beta in args.betas}) < len(args.betas):         # as in the file names
        raise UserError(f"--betas {args.betas}: name each once (to six digits)")
    if args.dimensions is None:
        args.dimensions = args.latent_dim
        parser.set_defaults(dimensions=args.latent_dim)     # still a default, no trial
    if args.dimensions > args.latent_dim:
        raise UserError(f"--dimensions {args.dimensions}: there are {args.latent_dim} latents")
    device = pick_device(args.device)
    data = load(args.data)
    if args.image >= len(data.test_images):
        raise UserError(f"--image {args.image}: test images are 0 to {len(data.test_images) - 1}")
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in BetaVAE(args.latent_dim).parameters())
    print(f"device {device}, {parameters:,} parameters for each beta", flush=True)
    flags = "epochs", "batch_size", "lr", "latent_dim"
    found, rows, paths = {}, [], []
    for beta in args.betas:
        print(f"beta = {beta:g}")
        path, config = run_path(parser, args, f"beta_vae-beta{beta:g}", data.source, *flags)
        config["beta"] = beta
        if not (args.reuse and path.exists()):
            torch.manual_seed(args.seed)                # the same start for every beta
            model, start = BetaVAE(args.latent_dim).to(device), time.time()
            train(model, data, args.epochs, args.batch_size, args.lr, device, beta)
            torch.manual_seed(args.seed)                # evaluate.py repeats exactly this test
            metrics = test(model, data.test_images.to(device)) | {"seconds": time.time() - start}
            save_checkpoint(path, script="beta_vae", config=config, source=data.source,
                            seed=args.seed, device=str(device), metrics=metrics,
                            state_dict=model.state_dict())
        read_checkpoint(path, config=config, source=data.source, seed=args.seed)
        model, meta = load_model(path)
        numbers, found[beta] = analyse(model, data, data.test_images, data.test_labels)
        rows.append(meta["metrics"] | numbers | {"model": f"beta {beta:g}"})
        rows[-1]["excess"] = rows[-1]["recon"] - data.floor["test"]
        paths.append(path)
    stem, _ = run_path(parser, args, "beta_vae", data.source, *flags, "betas", "image",
                       "dimensions")
    shown = args.betas[::2] if len(args.betas) > 4 else args.betas          # as many as fit
    plot_traversals({beta: found[beta] for beta in shown}, data.test_images[[args.image]],
                    args.dimensions, stem.with_name(f"{stem.stem}-traversals.png"))
    plot_attributes(found, stem.with_name(f"{stem.stem}-attributes.png"))
    plot_tradeoff(rows, stem.with_name(f"{stem.stem}-tradeoff.png"))
    print(f"test ({data.source}), at beta = 1, nats per image; probe: linear classifier on mu")
    print("            recon  excess     KL   total  active  probe    gap   null  beaten")
    for r in rows:
        print(f"{r['model']:>9}  {r['recon']:.2f}  {r['excess']:6.2f}  {r['kl']:5.2f}"
              f"  {r['total']:.2f}  {r['active_units']:6.0f}  {r['probe']:.1%}  {r['gap']:.3f}"
              f"  {r['null']:.3f}  {r['beaten']:6.0%}")
    print("the largest effect on each attribute: its dimension, the change in standard deviations")
    print("  beta" + "".join(f"{name:>11}" for name in ATTRIBUTES))
    for beta, f in found.items():
        largest = f["effect"].abs().argmax(0).tolist() if f["active"] else []
        texts = [f"z{f['active'][d]} {f['effect'][d, k]:+.1f}" for k, d in enumerate(largest)]
        print(f"{beta:6g}" + "".join(f"{text:>11}" for text in texts))
    print("->", *paths, f"{stem.stem}-tradeoff.png, -traversals.png, -attributes.png", sep="\n")
    return paths


if __name__ == "__main__":
    main()
