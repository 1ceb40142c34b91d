"""Section 6: the protocol. Every model measured by the same rules, side by side in one table.

Trains what is not trained yet, then measures everything on the same test images, which no model
and no choice has seen. Generators see raw [0, 1] images; the classifier normalises inside itself.
recon, KL and total are nats per image at full KL weight, from one posterior sample. The FID proxy:

    FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2 )      0 = same Gaussian

(Heusel et al. 2017, arXiv:1706.08500, eq. 6; m, S: mean and covariance of the classifier's 256
features. These are not Inception's features: a *proxy*, comparable within this table alone.)

    python evaluate.py                    # the study; a second call only measures again
    python evaluate.py --split val        # the same metrics on validation: for choosing
    python evaluate.py --deep             # and what takes longer: memorisation, the bias of FID

Expect (full data, --deep): the tables and the minutes that stand in the README.
"""
import json
import math
import sys
import time
from collections import namedtuple

import torch
from matplotlib.figure import Figure

import beta_vae
import classifier
import conv_vae
import cvae
import vae
from classifier import controllability, diversity, look, nearness
from data import Parser, UserError, command, image_grid, load, pick_device, write_atomically
from vae import DRAWS, importance_weighted_bound

STUDY = {"MLP VAE": vae, "Conv VAE": conv_vae, "β-VAE": beta_vae, "CVAE": cvae}
SIZES = (1000, 2000, 5000, 10_000)                      # numbers of images for the FID (--deep)

# ---------------------------------------------------------------- the metrics

def frechet_distance(features_a, features_b):
    """Squared Frechet distance of the Gaussians fitted to features (N, D), (M, D); N and M > D."""
    for features in (features_a, features_b):
        if len(features) <= features.shape[1] or not features.isfinite().all():
            raise UserError(f"features of shape {tuple(features.shape)}: they must be finite, and "
                            f"of more images than features, at least {features.shape[1] + 1}")
    a, b = features_a.double(), features_b.double()
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = a.T.cov(), b.T.cov()                                     # (D, D), over N - 1
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T               # S_a^1/2
    # the trace of a root is the sum of the roots of the eigenvalues: that root is never formed
    roots = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt()
    return (shift @ shift + cov_a.trace() + cov_b.trace() - 2 * roots.sum()).item()


def log_joint(columns, weights, means, factors):
    """log( weight_k N(z | mean_k, L_k L_k^T) ) of z as columns (D, N) -> (K, N)."""
    rows = []
    for weight, mean, factor in zip(weights, means, factors):
        white = torch.linalg.inv(factor) @ (columns - mean[:, None])        # (D, N)
        log_norm = factor.diagonal().log().sum() + len(mean) / 2 * math.log(2 * math.pi)
        rows.append(weight.log() - log_norm - 0.5 * white.pow(2).sum(0))
    return torch.stack(rows)


def fit_gmm(z, components, iterations=100, ridge=1e-3):
    """EM for a mixture of full-covariance Gaussians (Bishop 2006, section 9.2.2) on z (N, D).

    Returns weights (K,), means (K, D), Cholesky factors (K, D, D), and the mean log-likelihood
    before each step: at ridge = 0 EM never lowers it, save where a component is seeded anew."""
    n, d = z.shape
    means, squared = z[torch.randint(n, (1,))], z.new_full((n,), math.inf)
    while len(means) < components:                      # k-means++: far points are likely seeds
        squared = torch.minimum(squared, (z - means[-1]).pow(2).sum(1))
        means = torch.cat([means, z[torch.multinomial(squared, 1)]])
    columns, small = z.T.contiguous(), ridge * torch.eye(d).to(z)
    whole = torch.atleast_2d(columns.cov()) + small
    weights, covariances = z.new_full((components,), 1 / components), whole.repeat(components, 1, 1)
    history = []
    for step in range(iterations):
        joint = log_joint(columns, weights, means, torch.linalg.cholesky(covariances))
        total = joint.logsumexp(0)                      # log p(z), (N,)
        history.append(total.mean().item())
        responsibility = (joint - total).exp()          # E: of each component, (K, N)
        counts = responsibility.sum(1).clamp(min=1e-6)
        means = responsibility @ z / counts[:, None]    # M: weighted means and covariances
        for k in range(components):
            centred = columns - means[k][:, None]       # (D, N)
            covariances[k] = (responsibility[k] * centred) @ centred.T / counts[k] + small
            if counts[k] < d and step < iterations - 5:  # dying: seed anew while it can settle
                worst = total.argmin()
                means[k], covariances[k], counts[k] = z[worst], whole, n / components
                total[worst] = math.inf                 # and the next one elsewhere
        weights = counts / counts.sum()
    return weights, means, torch.linalg.cholesky(covariances), history


def sample_gmm(weights, means, factors, count):
    """Draws (count, D) from a mixture."""
    k = torch.multinomial(weights, count, replacement=True)
    eps = torch.randn(count, means.shape[1], 1, dtype=means.dtype)
    return means[k] + (factors[k] @ eps)[:, :, 0]


# ---------------------------------------------------------------- one row of the table

# the same for all models. real, judged: features and classes that the judge sees in the images;
# reference: its features of all training and validation images with --deep, else None
Protocol = namedtuple("Protocol", "data split images labels judge real judged device reference")


def prepare(data, split, judge, device, deep):
    """(the Protocol on a split, its yardsticks: what the metrics say of perfect and hopeless)."""
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    real, judged = look(judge, images)
    noise, _ = look(judge, torch.rand(images.shape))
    yardsticks = {"classifier_accuracy": controllability(judged, labels)[0],
                  "fid_sampling_floor": frechet_distance(real[::2], real[1::2]),
                  "fid_noise": frechet_distance(noise, real), "fid_n": len(real)}
    reference = None
    if deep:
        reference = look(judge, data.train_images)[0], look(judge, data.val_images)[0]
        yardsticks |= nearness(real, *reference)
    return Protocol(data, split, images, labels, judge, real, judged, device, reference), yardsticks


@torch.no_grad()
def in_batches(function, device, *tensors):
    """function of tensors with equal first axis, a thousand at a time on the device."""
    batches = zip(*(tensor.split(1000) for tensor in tensors))
    return torch.cat([function(*(t.to(device) for t in batch)).cpu() for batch in batches])


def condition(name, labels):
    """What a model is told beside x or z: the labels (CVAE), or nothing."""
    return (labels,) if name == "CVAE" else ()


def sample_posterior(model, device, *inputs):
    """One z ~ q(z | x) for each image; inputs are (x,), for the CVAE (x, y)."""
    return in_batches(lambda *batch: model.reparameterize(*model.encode(*batch)), device, *inputs)


def draw(model, device, *inputs):
    """Decoder means in [0, 1]; inputs are (z,), for the CVAE (z, y)."""
    return in_batches(lambda *batch: model.decode(*batch).sigmoid(), device, *inputs)


def measure(name, module, path, protocol):
    """A row of the table: the parts of the ELBO, and how the judge sees decoded z ~ N(0, I)."""
    data, split, images, labels, judge, real, real_judged, device, reference = protocol
    model, meta = module.load_model(path, device)
    n, beta = len(images), meta["config"].get("beta")
    torch.manual_seed(meta["seed"])                     # the same noise as in the script's own test
    scores = module.test(model, images.to(device), *condition(name, labels.to(device)))
    row = {"model": name if beta is None else f"{name} β={beta:g}", "latent_dim": model.latent_dim,
           "params": sum(p.numel() for p in model.parameters()), **scores,
           "excess": scores["recon"] - data.floor[split],
           "seconds": meta["metrics"]["seconds"], "trained_on": meta["device"]}
    row |= dict.fromkeys(("fid_gmm", "fid_recon", "control", "control_gmm", "control_recon",
                          "swap_asked", "swap_kept", "diversity"))         # None: does not apply
    asked = torch.arange(n) % 10
    drawn = draw(model, device, torch.randn(n, model.latent_dim), *condition(name, asked))
    features, judged = look(judge, drawn)
    row["fid_prior"] = frechet_distance(features, real)
    if name == "CVAE":
        row["total_plus_log10"] = row["total"] + math.log(10)
        row["control"], row["control_by_class"] = controllability(judged, asked)
        row["diversity"] = diversity(features[judged == asked], asked[judged == asked],
                                     real[real_judged == labels], labels[real_judged == labels])
        classifier.confusion_figure(
            asked, judged, path.with_name(f"{path.stem}-{split}-control.png"),
            f"Asked for a class, and judged as that class: {row['control']:.1%}")
    if reference and beta is None:
        row |= {f"fid_{m}": frechet_distance(features[:m], real[:m]) for m in SIZES if m <= n}
        row |= nearness(features, *reference)
        nearest = torch.cdist(features[:10], reference[0]).argmin(1)
        image_grid(torch.stack([drawn[:10, 0], data.train_images[nearest, 0]]),
                   path.with_name(f"{path.stem}-nearest.png"),
                   f"{name}: new, or learned by heart?", ("drawn", "nearest in training"))
    if beta is None:
        measure_further(name, row, model, module, protocol)
    else:                                               # the sweep: what its latents carry
        row |= beta_vae.analyse(model.cpu(), data, images, labels)[0]
    return row


def measure_further(name, row, model, module, protocol):
    """Fill the row of a main model. To tell the prior's faults from the decoder's, z comes from the
    ex-post prior (Ghosh et al. 2020, arXiv:1903.12436) and from the images (reconstructions)."""
    data, _, images, labels, judge, real, _, device, reference = protocol
    n, given = len(images), condition(name, labels)
    codes = sample_posterior(model, device, data.train_images, *condition(name, data.train_labels))
    if name == "CVAE":                                  # one Gaussian a class
        fits = [fit_gmm(codes[data.train_labels == c], 1, iterations=1)[:3] for c in range(10)]
        z = torch.cat([sample_gmm(*fit, n // 10) for fit in fits])
        asked = torch.arange(10).repeat_interleave(n // 10)
        features, judged = look(judge, draw(model, device, z, asked))
        row["fid_gmm"] = frechet_distance(features, real)
        row["control_gmm"], _ = controllability(judged, asked)
    else:
        mixtures = {"fid_gmm": 50} | ({"fid_gmm_1": 1, "fid_gmm_10": 10} if reference else {})
        for key, components in mixtures.items():
            drawn = draw(model, device, sample_gmm(*fit_gmm(codes, components)[:3], n))
            row[key] = frechet_distance(look(judge, drawn)[0], real)

    z = sample_posterior(model, device, images, *given)
    features, judged = look(judge, draw(model, device, z, *given))
    row["fid_recon"] = frechet_distance(features, real)
    row["control_recon"], _ = controllability(judged, labels)
    if name == "CVAE":                                  # encode as y, decode as another class
        other = (labels + torch.randint(1, 10, (n,))) % 10
        _, judged = look(judge, draw(model, device, z, other))
        row["swap_asked"] = (judged == other).double().mean().item()
        row["swap_kept"] = (judged == labels).double().mean().item()
    bounds = importance_weighted_bound(model, module.elbo_terms, images[::10].to(device),
                                       [y[::10].to(device) for y in given])
    row |= {f"iw_{k}": bound for k, bound in bounds.items()}


def average(rows):
    """The rows of one model under several seeds -> one row of {"mean", "std" (n - 1), "n"}."""
    def combine(values):
        if isinstance(values[0], list):
            return [combine(group) for group in zip(*values)]
        if len(values) == 1 or not isinstance(values[0], float):
            return values[0]                            # names, sizes, and what does not apply
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return {"mean": mean, "std": std, "n": len(values)}
    return {key: combine([row[key] for row in rows]) for key in rows[0]}


def flatten(row):
    """An averaged row as plain figures: the mean of x under "x", its std under "x_std"."""
    flat = {key: v["mean"] if isinstance(v, dict) else v for key, v in row.items()}
    return flat | {f"{key}_std": v["std"] for key, v in row.items() if isinstance(v, dict)}


# ---------------------------------------------------------------- the tables and a figure

# title, key in the row, format, is the spread over seeds shown?
MAIN = (("model", "model", "{}", 0), ("z", "latent_dim", "{}", 0), ("params", "params", "{:,}", 0),
        ("recon", "recon", "{:.2f}", 1), ("excess", "excess", "{:.2f}", 0),
        ("KL", "kl", "{:.2f}", 1), ("total", "total", "{:.2f}", 1),
        ("FID prior", "fid_prior", "{:.2f}", 1), ("FID recon", "fid_recon", "{:.2f}", 1),
        ("control", "control", "{:.1%}", 1), ("seconds", "seconds", "{:.0f}", 0))
FURTHER = (("model", "model", "{}", 0), ("FID ex-post", "fid_gmm", "{:.2f}", 1),
           ("-ELBO", "iw_1", "{:.2f}", 0), ("IW 10", "iw_10", "{:.2f}", 0),
           ("IW 100", "iw_100", "{:.2f}", 0), ("ctl ex-post", "control_gmm", "{:.1%}", 1),
           ("ctl recon", "control_recon", "{:.1%}", 1), ("swap to", "swap_asked", "{:.1%}", 0),
           ("still", "swap_kept", "{:.1%}", 0), ("diversity", "diversity", "{:.2f}", 1))
SWEEP = (("model", "model", "{}", 0), ("active", "active_units", "{:.1f}", 1),
         ("probe", "probe", "{:.1%}", 1), ("gap", "gap", "{:.3f}", 1),
         ("null", "null", "{:.3f}", 1), ("beaten", "beaten", "{:.0%}", 1))
DEEP = (("model", "model", "{}", 0), *((f"FID {m:,}", f"fid_{m}", "{:.2f}", 0) for m in SIZES),
        ("GMM 1", "fid_gmm_1", "{:.2f}", 0), ("GMM 10", "fid_gmm_10", "{:.2f}", 0),
        ("d train", "nearest_train", "{:.3f}", 0), ("d val", "nearest_val", "{:.3f}", 0),
        ("nearer", "nearer_train", "{:.1%}", 0))


def cell(value, form, spread):
    """One figure of the table: a dash where the metric does not apply, mean±std for several."""
    if isinstance(value, dict):
        std = "±" + form.format(value["std"]).rstrip("%") if spread else ""
        return form.format(value["mean"]) + std
    return "–" if value is None else form.format(value)


def table(rows, columns, markdown=False):
    """Aligned lines of text; or of Markdown."""
    lines = [[title for title, *_ in columns]]
    for row in rows:
        lines.append([cell(row.get(key), form, spread) for _, key, form, spread in columns])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    texts = [[text.rjust(w) for text, w in zip(line, widths)] for line in lines]
    texts = [[line[0].strip().ljust(widths[0]), *line[1:]] for line in texts]
    return [f"| {' | '.join(text)} |" if markdown else "  ".join(text) for text in texts]


def report(results, markdown=False):
    """The caption, the tables and how to read them, as lines."""
    rows, yardsticks = results["rows"], results["yardsticks"]
    main_rows = [row for row in rows if row["fid_gmm"]]
    half = 784 * math.log(2)                            # -log p(x) if p = 1/2 for every pixel
    lines = [
        f"Fashion-MNIST ({results['data']}), {results['split']} split, {yardsticks['fid_n']:,}"
        f" images (IW: every tenth); nats; seeds {results['seeds']};"
        f" {results['device']}, torch {results['torch']}; {results['date']}",
        "", *table(rows, MAIN, markdown), "",
        f"- Entropy floor {results['floor']:.2f}: no decoder can have a smaller recon.",
        f"  p = 1/2 for every pixel: recon {half:.2f}, excess {half - results['floor']:.2f}.",
        "- CVAE: add log 10 = 2.30 to total, -ELBO and IW, as -log p(x) <= -log p(x | y) + log 10.",
        f"- FID proxy: {yardsticks['fid_sampling_floor']:.3f} between halves of the real images"
        f" (n = {yardsticks['fid_n'] // 2:,}), {yardsticks['fid_noise']:.1f} for noise.",
        f"- control: 10 % is chance; real images: {yardsticks['classifier_accuracy']:.1%}.",
        "", *table(main_rows, FURTHER, markdown),
        "", *table([row for row in rows if "gap" in row], SWEEP, markdown)]
    if "nearer_train" in yardsticks:
        lines += ["", *table([*main_rows, yardsticks | {"model": "test images"}], DEEP, markdown)]
    return [*lines, "", *verdict(rows), "", "What each column means: README."]


def verdict(rows):
    """The models ranked by each figure, with a mark where noise may have decided; as lines."""
    rows = [flatten(row | {"total": row.get("total_plus_log10", row["total"])}) for row in rows]
    lines = ["What this says. a < b: further apart than 2 sqrt(s_a^2 + s_b^2), s the ± of each;"
             " a ≈ b: not so, or one seed only. Neighbours alone are compared."]
    for key, title, sweep in (("total", "total (CVAE: + log 10)", 0), ("fid_prior", "FID prior", 0),
                              ("fid_gmm", "FID ex-post", 0), ("fid_recon", "FID recon", 0),
                              ("total", "total", 1), ("fid_prior", "FID prior", 1)):
        ranked = sorted((r for r in rows if ("gap" in r) == sweep), key=lambda row: row[key])
        text = f"- {title}: {ranked[0]['model']} {ranked[0][key]:.2f}"
        for a, b in zip(ranked, ranked[1:]):
            spread = math.hypot(*(row.get(f"{key}_std", math.inf) for row in (a, b)))
            sign = "<" if b[key] - a[key] > 2 * spread else "≈"
            text += f" {sign} {b['model'].removeprefix('β-VAE ')} {b[key]:.2f}"
        lines.append(text)
    return lines


def plot_deep(rows, path):
    """FID against the number of images, and the bound against the number of draws."""
    figure = Figure((8, 3.6), 120, layout="constrained")
    left = figure.add_subplot(1, 2, 1, title="FID depends on n: compare equal n only",
                              xlabel="images n", ylabel="FID(n) - FID(all)", xscale="log")
    right = figure.add_subplot(1, 2, 2, title="More draws K, a tighter bound", xscale="log",
                               xlabel="draws K", ylabel="bound on -log p(x), nats")
    for row, mark in zip(rows, ("o-", "s-", "^-")):
        sizes = [m for m in SIZES if f"fid_{m}" in row]
        left.plot(sizes, [row[f"fid_{m}"] - row["fid_prior"] for m in sizes], mark)
        offset = math.log(10) if row["model"] == "CVAE" else 0  # so that it too bounds -log p(x)
        right.plot(DRAWS, [row[f"iw_{k}"] + offset for k in DRAWS], mark, label=row["model"])
    right.legend()
    write_atomically(path, figure.savefig)


# ---------------------------------------------------------------- the study

@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.number("--seeds", int, 0, 2**32 - 1, [0], "each trains every model once", nargs="+")
    parser.number("--epochs", int, 1, 10_000, None, "of all trainings (each script's default)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose")
    parser.add_argument("--deep", action="store_true", help="also memorisation, the bias of FID")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {args.seeds}: name each once, or their spread is too small")
    if args.deep and args.split == "val":
        raise UserError("--deep compares with the validation images: leave out --split val")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # not every console has a β
    device = pick_device(args.device)
    data = load(args.data)
    judge, judge_meta = classifier.load_pretrained(device)
    flags = ["--data", data.source, "--device", args.device, "--out", str(args.out), "--reuse"]
    flags += ["--epochs", str(args.epochs)] if args.epochs else []
    paths = {name: [] for name in STUDY}                # for every seed a list of checkpoints
    for name, module in STUDY.items():
        for seed in args.seeds:
            print(f"\n=== {name}, seed {seed}", flush=True)
            paths[name].append(module.main([*flags, "--seed", str(seed)]))

    print("\n=== metrics", flush=True)
    start = time.time()
    torch.manual_seed(0)
    protocol, yardsticks = prepare(data, args.split, judge, device, args.deep)
    rows = []
    for name, module in STUDY.items():
        for runs in zip(*paths[name]):                  # the same model (or beta) under every seed
            rows.append(average([measure(name, module, path, protocol) for path in runs]))
            print(f"  {rows[-1]['model']}: {time.time() - start:.0f} s", flush=True)

    results = {"data": data.source, "split": args.split, "device": str(device),
               "torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d"),
               "seeds": args.seeds, "epochs": args.epochs,
               "floor": data.floor[args.split], "judge_sha256": judge_meta["sha256"],
               "metrics_seconds": time.time() - start, "yardsticks": yardsticks, "rows": rows}
    trial = (f"-epochs{args.epochs}" if args.epochs else "") + ("-deep" if args.deep else "")
    seeds = "-".join(map(str, args.seeds))
    stem = args.out / f"results-{data.source}-{args.split}-seeds{seeds}{trial}"
    flat = [flatten(row) for row in rows]
    beta_vae.plot_tradeoff([r for r in flat if "gap" in r], stem.with_name(f"{stem.name}-beta.png"))
    if args.deep:
        plot_deep([row for row in flat if row["fid_gmm"]], stem.with_name(f"{stem.name}.png"))
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    markdown = "\n".join(report(results, markdown=True)) + "\n"
    for name in (stem.name, "results"):                 # results.json is always the latest
        write_atomically(args.out / f"{name}.json", lambda file: file.write(text.encode()))
        write_atomically(args.out / f"{name}.md", lambda file: file.write(markdown.encode()))
    print("", *report(results), f"-> {stem}.json, .md (= results.*), figures beside", sep="\n")


if __name__ == "__main__":
    main()
