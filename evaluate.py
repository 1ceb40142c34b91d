"""Section 6: the protocol. Every model measured by the same rules, side by side in one table.

Trains what is not trained yet (by calling the main() of each section), then measures everything on
the same test images, which no model and no choice has seen before. Generators see raw [0, 1]
images; the classifier normalises inside itself, so generated images are normalised once, on their
way into it. recon, KL and total are sums in nats per image at full KL weight, from one posterior
sample. The FID proxy compares equally many generated and real images in every row:

    FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2 )      0 = same Gaussian

(Heusel et al. 2017, arXiv:1706.08500, eq. 6; m, S: mean and covariance of the classifier's 256
features. These are not Inception's features: a *proxy*, comparable within this table alone.)

    python evaluate.py                    # the whole study; a second call only measures again
    python evaluate.py --split val        # the same metrics on validation: for choosing
    python evaluate.py --data sample      # a few minutes, on 8,000 embedded images

Expect: 20 to 25 min on 2 CPU cores (full data), and the table that stands in the README.
"""
import json
import math
import time
from pathlib import Path

import torch

import beta_vae
import classifier
import conv_vae
import cvae
import vae
from classifier import look
from data import (CLASSES, Parser, UserError, announce, command, image_grid, load, pick_device,
                  write_atomically)

# name in the table, module, what it is, minutes to train on 2 CPU cores with the full data
STUDY = (
    ("MLP VAE", vae, "section 2: baseline MLP VAE", 2.5),
    ("Conv VAE", conv_vae, "section 3: convolutional VAE with KL warm-up", 6),
    ("β-VAE", beta_vae, "section 4: β sweep", 6),
    ("CVAE", cvae, "section 5: conditional VAE", 6.5),
)


# ---------------------------------------------------------------- the metrics


def frechet_distance(features_a, features_b):
    """Frechet distance of the Gaussians fitted to two sets of features (N, D), D < N; a float."""
    for features in (features_a, features_b):
        if len(features) <= features.shape[1]:
            raise UserError(f"features have shape {tuple(features.shape)}: their covariance needs "
                            f"more images than features, at least {features.shape[1] + 1}")
    a, b = features_a.double(), features_b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = a.T.cov(), b.T.cov()                                     # (D, D), over N - 1
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T               # S_a^1/2
    # the trace of a root is the sum of the roots of the eigenvalues: that root is never formed
    roots = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt()
    distance = (mean_a - mean_b).pow(2).sum() + cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    return distance.item()


def controllability(judged, asked):
    """(share of images judged as the class that was asked for, the same for each class)."""
    if len(asked) == 0 or not 0 <= asked.min() <= asked.max() <= 9:
        raise UserError("asked classes must be from 0 to 9, and at least one")
    hits = (judged == asked).double()
    return hits.mean().item(), [hits[asked == c].mean().item() for c in range(len(CLASSES))]


def diversity(features, judged, asked, real_features, labels):
    """Mean pairwise distance within a class, of the images judged as asked for, over that of real
    images: 1 is as varied as life, 0 is one image a class (which could win control)."""
    ratios = []
    for c in range(len(CLASSES)):
        drawn = features[(asked == c) & (judged == c)]
        if len(drawn) > 1:
            ratio = torch.pdist(drawn).mean() / torch.pdist(real_features[labels == c]).mean()
            ratios.append(ratio.item())
    return sum(ratios) / len(ratios) if ratios else None


def log_joint(columns, weights, means, factors):
    """log( weight_k N(z | mean_k, L_k L_k^T) ) of z as columns (D, N) -> (K, N)."""
    rows = []
    for weight, mean, factor in zip(weights, means, factors):
        white = torch.linalg.inv(factor) @ (columns - mean[:, None])        # (D, N)
        log_det = factor.diagonal().log().sum() + len(mean) / 2 * math.log(2 * math.pi)
        rows.append(weight.log() - log_det - 0.5 * white.pow(2).sum(0))
    return torch.stack(rows)


def fit_gmm(z, components, iterations=30, floor=1e-3):
    """EM for a mixture of full-covariance Gaussians (Bishop 2006, section 9.2.2) on z (N, D).

    Returns weights (K,), means (K, D), Cholesky factors (K, D, D), and the mean log-likelihood
    before each step, which never falls (save where a dying component is seeded anew)."""
    n, d = z.shape
    means, nearest = z[torch.randint(n, (1,))], z.new_full((n,), math.inf)
    while len(means) < components:                      # k-means++: far points are likely seeds
        nearest = torch.minimum(nearest, (z - means[-1]).pow(2).sum(1))
        means = torch.cat([means, z[torch.multinomial(nearest, 1)]])
    columns, small = z.T.contiguous(), floor * torch.eye(d).to(z)
    whole = torch.atleast_2d(columns.cov()) + small
    weights, covariances = z.new_full((components,), 1 / components), whole.repeat(components, 1, 1)
    history = []
    for _ in range(iterations):
        joint = log_joint(columns, weights, means, torch.linalg.cholesky(covariances))
        total = joint.logsumexp(0)                      # log p(z), (N,)
        history.append(total.mean().item())
        share = (joint - total).exp()                   # E: who made which z, (K, N)
        counts = share.sum(1)
        means = share @ z / counts[:, None]             # M: weighted means and covariances
        for k in range(components):
            centred = columns - means[k][:, None]       # (D, N)
            covariances[k] = (share[k] * centred) @ centred.T / counts[k] + small
            if counts[k] < d:                           # dying: begin again at the worst point
                means[k], covariances[k], counts[k] = z[total.argmin()], whole, n / components
        weights = counts / counts.sum()
    return weights, means, torch.linalg.cholesky(covariances), history


def sample_gmm(weights, means, factors, count):
    """Draws (count, D) from a mixture."""
    k = torch.multinomial(weights, count, replacement=True)
    eps = torch.randn(count, means.shape[1], 1, dtype=means.dtype)
    return means[k] + (factors[k] @ eps)[:, :, 0]


@torch.no_grad()
def importance_weighted_bound(model, elbo_terms, images, labels=(), draws=100, counts=(1, 10, 100)):
    """{K: upper bound on -log p(x) in nats} (Burda et al. 2016, arXiv:1509.00519, eq. 8).

    log w = log p(x | z) + log p(z) - log q(z | x), and the bound is -mean log( 1/K sum_k w_k ).
    K = 1 is the negative ELBO. All K share their draws, so that the bounds are ordered exactly.
    """
    log_w = []
    for _ in range(draws):
        mu, logvar = model.encode(images, *labels)
        z = model.reparameterize(mu, logvar)
        recon, _ = elbo_terms(model.decode(z, *labels), images, mu, logvar)
        # log p(z) - log q(z | x); both have the same log 2 pi, which cancels
        log_ratio = 0.5 * ((z - mu).pow(2) / logvar.exp() + logvar - z.pow(2)).sum(1)
        log_w.append(log_ratio - recon)
    log_w = torch.stack(log_w, dim=1).double().cpu()    # (N, draws)
    return {k: -(log_w.unflatten(1, (-1, k)).logsumexp(2) - math.log(k)).mean().item()
            for k in counts}


# ---------------------------------------------------------------- one row of the table


@torch.no_grad()
def in_batches(function, device, *tensors):
    """function of tensors with equal first axis, a thousand at a time on the device."""
    batches = zip(*(tensor.split(1000) for tensor in tensors))
    return torch.cat([function(*(t.to(device) for t in batch)).cpu() for batch in batches])


def measure(name, module, path, split, data, judge, real, device):
    """(all figures of one trained model, the model); real: judge's features of the split's images.

    Three sources of z tell the prior's faults from the decoder's: N(0, I), the ex-post prior (Ghosh
    et al. 2020, arXiv:1903.12436), and the codes of the images themselves (reconstructions)."""
    model, meta = module.load_model(path, device)
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    n, beta, conditional = len(images), meta["config"].get("beta"), name == "CVAE"

    def draw(z, *y):
        return in_batches(lambda *batch: model.decode(*batch).sigmoid(), device, z, *y)

    torch.manual_seed(meta["seed"])                     # the same noise as in the script's own test
    given = (labels,) if conditional else ()
    row = {"model": name if beta is None else f"{name} β={beta:g}", "latent_dim": model.latent_dim,
           "params": sum(p.numel() for p in model.parameters()),
           **module.test(model, images.to(device), *(y.to(device) for y in given))}
    row["excess"] = row["recon"] - data.floor[split]
    row |= {"seconds": meta["metrics"]["seconds"], "trained_on": meta["device"]}
    row |= dict.fromkeys(("fid_gmm", "fid_recon", "control", "control_gmm", "control_recon",
                          "swap_asked", "swap_kept", "diversity"))
    asked = (torch.arange(n) % 10,) if conditional else ()
    features, judged = look(judge, draw(torch.randn(n, model.latent_dim), *asked))
    row["fid_prior"] = frechet_distance(features, real)
    if beta is not None:                                # the sweep is compared by its samples only
        return row, model
    if conditional:
        row["total_plus_log10"] = row["total"] + math.log(10)
        row["control"], row["control_by_class"] = controllability(judged, *asked)
        row["diversity"] = diversity(features, judged, *asked, real, labels)
        classifier.confusion_figure(
            *asked, judged, path.with_name(f"{path.stem}-{split}-control.png"),
            f"Asked for a class, and judged as that class: {row['control']:.1%}")

    def code(*batch):
        return model.reparameterize(*model.encode(*batch))

    known = (data.train_labels,) if conditional else ()
    z = in_batches(code, device, data.train_images, *known)
    if conditional:                                     # one Gaussian a class, else a mixture of 50
        fits = [fit_gmm(z[known[0] == c], 1, iterations=1)[:3] for c in range(10)]
        z = torch.cat([sample_gmm(*fit, n // 10) for fit in fits])
        asked = (torch.arange(10).repeat_interleave(n // 10),)
    else:
        z = sample_gmm(*fit_gmm(z, 50)[:3], n)
    features, judged = look(judge, draw(z, *asked))
    row["fid_gmm"] = frechet_distance(features, real)
    row["control_gmm"] = controllability(judged, *asked)[0] if conditional else None

    z = in_batches(code, device, images, *given)
    features, judged = look(judge, draw(z, *given))
    row["fid_recon"] = frechet_distance(features, real)
    row["control_recon"], _ = controllability(judged, labels)
    if conditional:                                     # encode as y, decode as another class
        other = (labels + torch.randint(1, 10, (n,))) % 10
        _, judged = look(judge, draw(z, other))
        row["swap_asked"] = (judged == other).double().mean().item()
        row["swap_kept"] = (judged == labels).double().mean().item()
    bounds = importance_weighted_bound(model, module.elbo_terms, images[:n // 20].to(device),
                                       [y[:n // 20].to(device) for y in given])
    row |= {f"iw_{k}": bound for k, bound in bounds.items()}
    return row, model


def yardsticks(data, split, judge):
    """The judge's features of the real images, and what the metrics say of perfect and hopeless."""
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    real, judged = look(judge, images)
    other = data.val_images if split == "test" else data.train_images
    others, _ = look(judge, other[:len(images)])
    noise, _ = look(judge, torch.rand(images.shape))
    return real, {"classifier_accuracy": (judged == labels).double().mean().item(),
                  "fid_sampling_floor": frechet_distance(others, real[:len(others)]),
                  "fid_sampling_floor_n": len(others),
                  "fid_noise": frechet_distance(noise, real), "fid_n": len(images)}


def average(rows):
    """The rows of one model under several seeds -> one row of {"mean", "std" (n - 1), "n"}."""
    def combine(values):
        if isinstance(values[0], list):
            return [combine(group) for group in zip(*values)]
        if values[0] is None or isinstance(values[0], str) or len(values) == 1:
            return values[0]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return {"mean": mean, "std": std, "n": len(values)}
    fixed = {key: rows[0][key] for key in ("model", "latent_dim", "params")}
    return {key: combine([row[key] for row in rows]) for key in rows[0]} | fixed


# ---------------------------------------------------------------- the tables and the pictures


# title, key in the row, format, is the spread over seeds shown?
MAIN = (("model", "model", "{}", 0), ("z", "latent_dim", "{}", 0), ("params", "params", "{:,}", 0),
        ("recon", "recon", "{:.2f}", 1), ("excess", "excess", "{:.2f}", 0),
        ("KL", "kl", "{:.2f}", 1), ("total", "total", "{:.2f}", 1),
        ("FID prior", "fid_prior", "{:.2f}", 1), ("FID recon", "fid_recon", "{:.2f}", 1),
        ("control", "control", "{:.1%}", 1), ("seconds", "seconds", "{:.0f}", 0))
MORE = (("model", "model", "{}", 0), ("FID ex-post", "fid_gmm", "{:.2f}", 1),
        ("-ELBO", "iw_1", "{:.2f}", 0), ("IW 10", "iw_10", "{:.2f}", 0),
        ("IW 100", "iw_100", "{:.2f}", 0), ("ctl ex-post", "control_gmm", "{:.1%}", 1),
        ("ctl recon", "control_recon", "{:.1%}", 1), ("swap to", "swap_asked", "{:.1%}", 0),
        ("still", "swap_kept", "{:.1%}", 0), ("diversity", "diversity", "{:.2f}", 1))


def cell(value, form, spread=True):
    """One figure of the table: a dash where the metric does not apply, mean±std for several."""
    if isinstance(value, dict):
        std = "±" + form.format(value["std"]).rstrip("%") if spread else ""
        return form.format(value["mean"]) + std
    return "–" if value is None else form.format(value)


def table(rows, columns, markdown=False):
    """Aligned lines of text; or of Markdown."""
    lines = [[title for title, *_ in columns]]
    lines += [[cell(row[key], form, spread) for _, key, form, spread in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    texts = [[text.rjust(w) for text, w in zip(line, widths)] for line in lines]
    texts = [[line[0].strip().ljust(widths[0]), *line[1:]] for line in texts]
    return [f"| {' | '.join(text)} |" if markdown else "  ".join(text) for text in texts]


def report(results, markdown=False):
    """The caption, both tables and how to read them, as lines."""
    rows, sticks = results["rows"], results["yardsticks"]
    seen = "sample" == results["data"] and "val" == results["split"]
    total, beside = rows[-1]["total"], rows[-1]["total_plus_log10"]
    return [
        f"Fashion-MNIST ({results['data']}), {results['split']} split, {sticks['fid_n']:,} images;"
        f" nats; seeds {results['seeds']}; {results['device']}, torch {results['torch']}",
        "", *table(rows, MAIN, markdown), "",
        f"- Entropy floor {results['floor']:.2f}: no decoder can have a smaller recon.",
        f"- CVAE: {cell(total, '{:.2f}')} + log 10 = {cell(beside, '{:.2f}')} compares with a VAE's"
        " total: -log p(x) <= -log p(x | y) + log 10.",
        f"- FID proxy: {sticks['fid_sampling_floor']:.3f} between real images and other real ones"
        f" (n = {sticks['fid_sampling_floor_n']:,}), {sticks['fid_noise']:.1f} for uniform noise.",
        f"- control: 10 % is chance; real images: {sticks['classifier_accuracy']:.1%}"
        f"{' (it was trained on most of them)' if seen else ''}.",
        "", *table([row for row in rows if row["fid_gmm"] is not None], MORE, markdown), "",
        "- ex-post: z from a Gaussian mixture fitted to codes of training images, not N(0, I).",
        f"- -ELBO, IW 10, IW 100: bounds on -log p of the same {sticks['fid_n'] // 20} images.",
        "- ctl recon: reconstructions judged as their class. swap: encoded as y, decoded as y'.",
        "- diversity within a class: 1 is as varied as real images, 0 one image a class.",
    ]


@torch.no_grad()
def gallery(models, images, labels, path, device):
    """Prior samples and reconstructions of the three main models beside real images."""
    torch.manual_seed(0)
    first = [int((labels == c).nonzero()[0]) for c in range(len(CLASSES))]
    x, y = images[first].to(device), torch.arange(10, device=device)
    samples, again = [x], [x]
    for name, model in models.items():
        given = (y,) if name == "CVAE" else ()
        z = torch.randn(10, model.latent_dim, device=device)
        samples.append(model.decode(z, *given).sigmoid())
        again.append(model(x, *given)[0].sigmoid())
    for kind, images in (("samples", samples), ("reconstructions", again)):
        image_grid(torch.stack(images)[:, :, 0], path.with_name(f"{path.stem}-{kind}.png"),
                   f"{kind} (only the CVAE is told the class)", ("real", *models), CLASSES)


# ---------------------------------------------------------------- the study


def train_missing(args, data):
    """Every section's main() for every seed, reusing checkpoints; {name: [paths of a seed]}."""
    paths = {name: [] for name, *_ in STUDY}
    share = len(data.train_images) / 55_000 * (args.epochs or 10) / 10
    for name, module, what, minutes in STUDY:
        for seed in args.seeds:
            print(f"\n=== {what}, seed {seed}: up to {max(minutes * share, 0.1):.1f} min on 2 CPU"
                  " cores where it is not trained yet", flush=True)
            flags = ["--data", data.source, "--seed", str(seed), "--device", args.device,
                     "--out", str(args.out), "--reuse"]
            flags += ["--epochs", str(args.epochs)] if args.epochs else []
            paths[name].append(module.main(flags))
    return paths


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.number("--seeds", int, 0, 2**32 - 1, [0],
                  "one training of every model for each; the table has mean±std (0)", nargs="+")
    parser.number("--epochs", int, 1, 10_000, None,
                  "passes over the training split, for all models (each its default)")
    parser.add_argument("--split", choices=("test", "val"), default="test",
                        help="measure on test, or on val while still choosing (test)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {args.seeds} names one twice: its spread would be too small")

    device = pick_device(args.device)
    data = load(args.data)
    announce(args, device, data)
    judge, judge_meta = classifier.load_pretrained(device)
    paths = train_missing(args, data)

    print("\n=== section 6: metrics, up to 8 min on 2 CPU cores", flush=True)
    start = time.time()
    torch.manual_seed(0)
    real, sticks = yardsticks(data, args.split, judge)
    rows, models = [], {}
    for name, module, *_ in STUDY:
        for runs in zip(*paths[name]):                  # the same model (or beta) under every seed
            measured = [measure(name, module, path, args.split, data, judge, real, device)
                        for path in runs]
            rows.append(average([row for row, _ in measured]))
            if name != "β-VAE":
                models[name] = measured[0][1]
            print(f"  {rows[-1]['model']}: {time.time() - start:.0f} s", flush=True)

    results = {"data": data.source, "split": args.split, "device": str(device),
               "torch": str(torch.__version__), "seeds": args.seeds, "epochs": args.epochs,
               "floor": data.floor[args.split], "judge_sha256": judge_meta["sha256"],
               "metrics_seconds": time.time() - start, "yardsticks": sticks, "rows": rows}
    trial = f"-epochs{args.epochs}" if args.epochs else ""
    seeds = "-".join(map(str, args.seeds))
    stem = args.out / f"results-{data.source}-{args.split}-seeds{seeds}{trial}"
    gallery(models, data.test_images, data.test_labels, stem, device)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    markdown = "\n".join(report(results, markdown=True)) + "\n"
    for name in (stem.name, "results"):                 # results.json is always the latest
        write_atomically(args.out / f"{name}.json", lambda file: file.write(text.encode()))
        write_atomically(args.out / f"{name}.md", lambda file: file.write(markdown.encode()))
    print("", *report(results), f"-> {args.out / 'results.json'} = {stem}.json, .md", sep="\n")
    return [args.out / "results.json"]


if __name__ == "__main__":
    main()
