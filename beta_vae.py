"""Section 4: the beta-VAE, or what the weight of the KL decides, measured and not only shown.

    loss  =  recon  +  beta * KL                  (Higgins et al. 2017, ICLR, eq. 4)

Each beta is one point on the rate-distortion curve of one network (Alemi et al. 2018,
arXiv:1711.00464): rate = KL, distortion = recon. All are *reported* at beta = 1: totals that are
weighted differently cannot be compared. Does a large beta put each property of the image into a
single dimension? That is held against a null: the same codes along random axes.

    python beta_vae.py

Expect (full data, seed 0): about 6 min on 2 CPU cores; on the test images, from beta = 0.25 to 16,
recon rises from 219.67 to 273.03 and KL falls from 22.20 to 2.79; gap - null shows no trend.
Try: --betas 0 (almost an autoencoder), --betas 100; --image 1 --reuse for other traversals.
"""
import time

import torch
from matplotlib.figure import Figure

from data import (CLASSES, Parser, UserError, command, describe, image_grid, load, pick_device,
                  read_checkpoint, run_path, save_checkpoint, write_atomically)

ATTRIBUTES = "ink", "width", "height", "centre", "symmetry", "top"

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


def elbo_terms(logits, x, mu, logvar):
    """The two parts of the negative ELBO (Kingma & Welling, eq. 10) in nats: sums, never means,
    over pixels and latents. logits, x (B, 1, 28, 28), mu, logvar (B, latent_dim) -> (B,) each."""
    # recon = -log p(x | z) = -sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ],  p = sigmoid(logits)
    recon = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    recon = recon.flatten(1).sum(1)                                         # (B,)
    # kl = 1/2 sum_d [ mu_d^2 + sigma_d^2 - log sigma_d^2 - 1 ]
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(1)               # (B,)
    return recon, kl


# ---------------------------------------------------------------- training and testing

def train(model, data, epochs, batch_size, lr, device, beta):
    """Adam (its betas are not ours) and OneCycle: up to `lr` for 30 % of the steps, then to 0."""
    x_train, x_val = data.train_images.to(device), data.val_images.to(device)
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
        print(f"epoch {epoch:3}/{epochs}  {describe('train', recon, kl, data.floor)}  "
              f"{describe('val', val['recon'], val['kl'], data.floor)}  "
              f"{seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)


@torch.no_grad()
def test(model, images, batch_size=1000):
    """Mean recon, kl, total of images (N, 1, 28, 28): one posterior sample each, KL unweighted."""
    model.eval()
    sums = torch.zeros(2)
    for x in images.split(batch_size):
        logits, mu, logvar = model(x)
        recon, kl = elbo_terms(logits, x, mu, logvar)
        sums += torch.stack([recon.sum(), kl.sum()]).cpu()
    recon, kl = (sums / len(images)).tolist()
    return {"recon": recon, "kl": kl, "total": recon + kl}


# ---------------------------------------------------------------- what the latent space learned

def attributes(images):
    """Ink: sum of the pixels; width, height: of the box around those above 1/4; centre: mean row;
    symmetry: 1 if left mirrors right; top: upper half's share. (N, 1, 28, 28) -> (N, 6)."""
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
    """Does each attribute sit in one dimension (with others or alone)? Its largest |rho| minus the
    next, mean over attributes, after MIG (Chen et al. 2018, arXiv:1802.04942, eq. 6). (D, K)."""
    largest, second = torch.nn.functional.pad(rho, (0, 0, 0, 2)).topk(2, dim=0).values
    return (largest - second).mean().item()


def rotated_gaps(mu, values, rotations=20):
    """The null: gaps of mu (N, D) along random orthogonal axes, with values (N, K)."""
    rng, d = torch.Generator().manual_seed(0), mu.shape[1]
    turns = [torch.linalg.qr(torch.randn(d, d, generator=rng)).Q for _ in range(rotations)]
    return torch.tensor([gap(rank_correlation(mu @ turn, values)) for turn in turns])


def traversal_effect(model, mu, dimensions, spread):
    """What a dimension *causes*: the change of each attribute as it alone moves from -2 to 2, in
    units of spread (6,): mean over codes mu (N, D), so opposites cancel. -> (dimensions, 6)."""
    effects = torch.zeros(len(dimensions), len(spread))
    for row, dimension in enumerate(dimensions):
        low, high = mu.clone(), mu.clone()
        low[:, dimension], high[:, dimension] = -2, 2
        before, after = (attributes(model.decode(z).sigmoid()) for z in (low, high))
        effects[row] = (after - before).mean(0) / spread
    return effects


def linear_probe(mu, labels, test_mu, test_labels, ridge=1e-3):
    """Accuracy on test_mu of a linear classifier of mu (N, D): W = (A^T A + ridge N I)^-1 A^T Y."""
    a, b = (torch.nn.functional.pad(m, (0, 1), value=1.0).double() for m in (mu, test_mu))
    y = torch.nn.functional.one_hot(labels, len(CLASSES)).double()          # (N, 10)
    w = torch.linalg.solve(a.T @ a + ridge * len(a) * torch.eye(a.shape[1]), a.T @ y)
    return ((b @ w).argmax(1) == test_labels).double().mean().item()


@torch.no_grad()
def analyse(model, data, images, labels):
    """What z carries: numbers for the table; and the model (on the CPU), the KL of each dimension,
    the active ones by falling KL, their |rho| and effect on the attributes, (active, 6) each."""
    mu, logvar = model.encode(images)                   # (N, latent_dim) each
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).mean(0)
    active = [d for d in kl.argsort(descending=True).tolist() if active_units(mu[:, [d]])]
    values = attributes(images)
    rho, null = rank_correlation(mu[:, active], values), rotated_gaps(mu[:, active], values)
    effect = traversal_effect(model, mu[:500], active, values.std(0))
    probe = linear_probe(model.encode(data.train_images)[0], data.train_labels, mu, labels)
    beaten = (null < gap(rho)).double().mean().item()
    return {"active_units": float(len(active)), "probe": probe, "gap": gap(rho),
            "null": null.mean().item(), "beaten": beaten}, (model, kl, active, rho, effect)


# ---------------------------------------------------------------- the pictures

def plot_tradeoff(rows, path):
    """Rate against distortion, a point a row; bars where a row has standard deviations."""
    figure = Figure((6, 4.2), 110, layout="constrained")
    axes = figure.add_subplot(title="What does a nat of KL buy? (dashed: equal total)", xmargin=0.3,
                              xlabel="KL (rate), nats", ylabel="excess recon (distortion), nats")
    keys = "kl", "excess", "active_units", "kl_std", "excess_std"
    kl, excess, active, kl_std, excess_std = ([row.get(key, 0) for row in rows] for key in keys)
    axes.errorbar(kl, excess, excess_std, kl_std)
    axes.scatter(kl, excess, [(3 + count) ** 2 for count in active])        # size: active units
    for row in rows:
        axes.annotate(row["model"], (row["kl"], row["excess"]), (9, 2), textcoords="offset points")
    axes.axline(min(zip(kl, excess), key=sum), slope=-1, ls="--", c="gray")
    write_atomically(path, figure.savefig)


@torch.no_grad()
def pictures(found, image, stem):
    """For each beta: one image's code moved along a dimension a row; |rho| and |effect| of each."""
    moved, names, steps, panels, columns = [], {}, [], [], []
    for beta, (model, kl, active, rho, effect) in found.items():
        z = model.encode(image)[0].repeat(len(kl), 5, 1)                    # (rows, 5, latent_dim)
        for row, dimension in enumerate(kl.argsort(descending=True)):
            z[row, :, dimension] = torch.linspace(-3, 3, 5)
            names[row] = f"{names.get(row, '')}  {kl[dimension]:.2f}"
        images = model.decode(z.flatten(0, 1)).sigmoid().view(len(kl), 5, 28, 28)
        moved += [images, torch.ones_like(images[:, :1])]                   # and a white gap
        steps += ["-3", "", f"beta {beta:g}", "", "3", ""]
        strength = torch.cat([rho, torch.zeros(len(rho), 1), effect.abs() / 2], dim=1)
        panels += [1 - strength, torch.ones(1, 13)]                         # (active, 13)
        columns += [f"z{d}\n{beta:g}" for d in active] + [""]
    image_grid(torch.cat(moved, dim=1), stem.with_name(f"{stem.stem}-traversals.png"),
               "A dimension a row, its KL at each beta: many are dead", names.values(), steps)
    image_grid(torch.cat(panels).T[:, :, None, None].expand(-1, -1, 28, 28),
               stem.with_name(f"{stem.stem}-attributes.png"),
               "Above |rho|, below |effect|, dark: strong", (*ATTRIBUTES, "", *ATTRIBUTES), columns)


def load_model(path, device="cpu"):
    """(trained model in eval mode, meta) from a checkpoint; UserError where it does not fit."""
    meta = read_checkpoint(path, lambda config: BetaVAE(config["latent_dim"]), script="beta_vae")
    return meta["model"].to(device), meta


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.training(epochs=8, lr=2e-3, latent_dim=10)
    parser.number("--betas", float, 0, 1e6, [0.25, 0.5, 1, 2, 4, 8, 16], "KL weights", nargs="+")
    parser.number("--image", int, 0, 1999, 0, "the test image whose code is traversed (0)")
    args = parser.parse_args(argv)
    args.betas.sort()
    if len({f"{beta:g}" for beta in args.betas}) < len(args.betas):         # as in the file names
        raise UserError(f"--betas {args.betas}: name each once (to six digits)")
    device = pick_device(args.device)
    data = load(args.data)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in BetaVAE(args.latent_dim).parameters())
    print(f"device {device}, {parameters:,} parameters for each beta", flush=True)
    found, rows, paths = {}, [], []
    for beta in args.betas:
        print(f"beta = {beta:g}")
        path, config = run_path(parser, args, f"beta_vae-beta{beta:g}", data.source, "latent_dim")
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
        excess = meta["metrics"]["recon"] - data.floor["test"]
        rows.append(meta["metrics"] | numbers | {"model": f"beta {beta:g}", "excess": excess})
        paths.append(path)
    stem, _ = run_path(parser, args, "beta_vae", data.source, "latent_dim", "betas", "image")
    shown = args.betas[::2] if len(args.betas) > 4 else args.betas          # as many as fit
    pictures({beta: found[beta] for beta in shown}, data.test_images[[args.image]], stem)
    plot_tradeoff(rows, stem.with_name(f"{stem.stem}-tradeoff.png"))
    keys = "recon", "excess", "kl", "total", "active_units", "probe", "gap", "null", "beaten"
    print(f"test ({data.source}), at beta = 1, nats per image; probe: linear classifier on mu\n"
          "beta   " + "".join(f"{key[:6]:>9}" for key in keys))
    for row in rows:
        print(f"{row['model'][5:]:7}" + "".join(f"{row[key]:9.2f}" for key in keys))
    print("the largest effect on each attribute: its dimension, the change in standard deviations\n"
          "beta   " + "".join(f"{name:>11}" for name in ATTRIBUTES))
    for beta, (_, _, active, _, effect) in found.items():
        largest = effect.abs().argmax(0).tolist() if active else []
        texts = [f"z{active[d]} {effect[d, k]:+.1f}" for k, d in enumerate(largest)]
        print(f"{beta:<7g}" + "".join(f"{text:>11}" for text in texts))
    print("->", *paths, f"{stem.stem}-tradeoff.png, -traversals.png, -attributes.png", sep="\n")
    return paths


if __name__ == "__main__":
    main()
