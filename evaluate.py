"""Section 6: the protocol. Every model measured by the same rules, side by side in one table.

Trains what is not trained yet (by calling the main() of each section), then measures everything on
the same test images, which no model and no choice has seen before. Three rules make it fair:

  - generators see raw [0, 1] images; the classifier normalises inside itself, with its own mean and
    std, so generated images are normalised once, on their way into it, and never elsewhere;
  - recon, KL and total are sums in nats per image at full KL weight, from one posterior sample;
  - the FID proxy compares equally many generated and real images, in every row:

    FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2 )      0 = same Gaussian

(Heusel et al. 2017, arXiv:1706.08500, eq. 6; m, S: mean and covariance of the classifier's 256
features. These are not Inception's features: a *proxy*, comparable within this table alone.)

    python evaluate.py                    # the whole study; a second call only measures again
    python evaluate.py --split val        # the same metrics on validation: for choosing
    python evaluate.py --data sample      # a few minutes, on 8,000 embedded images

@RESULT@
Left out on purpose: the real Inception FID, precision / recall, and likelihoods by sampling.
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
from data import (CLASSES, Parser, UserError, announce, command, image_grid, load,
                  pick_device, write_atomically)

# name in the table, module, what it is, minutes to train on 2 CPU cores with the full data
STUDY = (
    ("MLP VAE", vae, "section 2: baseline MLP VAE", 2.5),
    ("Conv VAE", conv_vae, "section 3: convolutional VAE with KL warm-up", 6),
    ("β-VAE", beta_vae, "section 4: β sweep", 6),
    ("CVAE", cvae, "section 5: conditional VAE", 6.5),
)


# ---------------------------------------------------------------- what the judge sees


@torch.no_grad()
def look(judge, images, batch_size=100):
    """Raw images (N, 1, 28, 28) in [0, 1] -> (features (N, 256), judged classes (N,)).

    ValueError for another shape, NaN, or values outside [0, 1] (normalised images, or logits).
    Small batches stay in the processor's cache: 100 takes 0.6 of the time that 500 does.
    """
    if images.dim() != 4 or images.shape[1:] != (1, 28, 28):
        raise UserError(f"images have shape {tuple(images.shape)}: (N, 1, 28, 28) is needed")
    low, high = images.min().item(), images.max().item()
    if not 0 <= low <= high <= 1:
        raise UserError(f"images range from {low} to {high}: the classifier takes raw images in "
                        "[0, 1]; take the sigmoid of logits, and do not normalise")
    device = judge.mean.device
    features = torch.cat([judge.features(x.to(device)) for x in images.split(batch_size)])
    return features.cpu(), judge.head(features).argmax(1).cpu()


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


# ---------------------------------------------------------------- images from the models


@torch.no_grad()
def draw(model, count, device, labels=None, batch_size=1000):
    """Decoder means (count, 1, 28, 28) of z ~ N(0, I); for a CVAE also of the labels (count,)."""
    images = []
    for start in range(0, count, batch_size):
        z = torch.randn(min(batch_size, count - start), model.latent_dim, device=device)
        y = () if labels is None else (labels[start:start + batch_size].to(device),)
        images.append(model.decode(z, *y).sigmoid().cpu())
    return torch.cat(images)


@torch.no_grad()
def reconstruct(model, images, device, labels=None, batch_size=1000):
    """Decoder means (N, 1, 28, 28) of one posterior sample for each image."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [t[start:start + batch_size].to(device) for t in (images, labels) if t is not None]
        parts.append(model(*batch)[0].sigmoid().cpu())
    return torch.cat(parts)


def controllability(judged, asked):
    """(share of images judged as the class that was asked for, the same for each class)."""
    if len(asked) == 0 or not 0 <= asked.min() <= asked.max() <= 9:
        raise UserError("asked classes must be from 0 to 9, and at least one")
    hits = (judged == asked).double()
    return hits.mean().item(), [hits[asked == c].mean().item() for c in range(len(CLASSES))]


# ---------------------------------------------------------------- one row of the table


def measure(name, module, path, split, images, labels, floor, judge, real, device):
    """(all figures of one trained model, the model); real: the features of these same images."""
    model, meta = module.load_model(path, device)
    given = (labels.to(device),) if name == "CVAE" else ()
    torch.manual_seed(meta["seed"])                     # the same noise as in the script's own test
    beta = meta["config"].get("beta")
    row = {"model": name if beta is None else f"{name} β={beta:g}", "latent_dim": model.latent_dim,
           "params": sum(p.numel() for p in model.parameters()),
           **module.test(model, images.to(device), *given)}
    row["excess"] = row["recon"] - floor
    row |= {"fid_prior": None, "fid_gmm": None, "fid_recon": None, "control": None,
            "control_recon": None, "seconds": meta["metrics"]["seconds"],
            "trained_on": meta["device"]}
    asked = torch.arange(len(images)) % 10 if name == "CVAE" else None
    features, judged = look(judge, draw(model, len(images), device, asked))
    row["fid_prior"] = frechet_distance(features, real)
    if name == "CVAE":
        row["total_plus_log10"] = row["total"] + math.log(10)
        row["control"], row["control_by_class"] = controllability(judged, asked)
        classifier.confusion_figure(
            asked, judged, path.with_name(f"{path.stem}-{split}-control.png"),
            f"Asked for a class, and judged as that class: {row['control']:.1%}")
    if beta is None:                                    # the sweep is compared by its samples only
        again = reconstruct(model, images, device, labels if given else None)
        features, judged = look(judge, again)
        row["fid_recon"] = frechet_distance(features, real)
        row["control_recon"] = (judged == labels).double().mean().item()
    return row, model


def yardsticks(data, split, images, labels, judge):
    """What the metrics would be for perfect and for hopeless models; and the real features."""
    real, judged = look(judge, images)
    other = data.val_images if split == "test" else data.train_images[:len(images)]
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


COLUMNS = (("model", "model", "{}"), ("z", "latent_dim", "{}"), ("params", "params", "{:,}"),
           ("recon", "recon", "{:.2f}"), ("excess", "excess", "{:.2f}"), ("KL", "kl", "{:.2f}"),
           ("total", "total", "{:.2f}"), ("FID prior", "fid_prior", "{:.2f}"),
           ("FID recon", "fid_recon", "{:.2f}"), ("control", "control", "{:.1%}"),
           ("seconds", "seconds", "{:.0f}"))


def cell(value, form, spread=True):
    """One figure of the table: a dash where the metric does not apply, mean±std for several."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        std = "±" + form.format(value["std"]).rstrip("%") if spread else ""
        return form.format(value["mean"]) + std
    return form.format(value)


def table_lines(rows, separator="  "):
    """The final table as lines of text; with separator " | " it is Markdown."""
    lines = [[title for title, _, _ in COLUMNS]]
    for row in rows:  # excess and seconds share the spread of recon, or need none
        lines.append([cell(row[key], form, key not in ("excess", "seconds"))
                      for _, key, form in COLUMNS])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    texts = [separator.join(text.ljust(width) if i == 0 else text.rjust(width)
                            for i, (text, width) in enumerate(zip(line, widths)))
             for line in lines]
    if separator == "  ":
        return texts
    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    texts = [f"| {text} |" for text in texts]
    return [texts[0], f"|{rule}|", *texts[1:]]


def report(results, separator="  "):
    """The caption, the table, the yardsticks and the sentence on the CVAE, as lines."""
    cvae_row, sticks = results["rows"][-1], results["yardsticks"]
    seen = " (It was trained on most of the sample's val images.)" * (results["data"] == "sample")
    total, beside = cvae_row["total"], cvae_row["total_plus_log10"]
    return [
        f"Fashion-MNIST ({results['data']}), {results['split']} split, {sticks['fid_n']:,} images;"
        f" nats per image; seeds {results['seeds']}; {results['device']}, torch"
        f" {results['torch']}",
        "", *table_lines(results["rows"], separator), "",
        f"- Entropy floor {results['floor']:.2f}: no decoder can have a smaller recon;"
        " excess = recon - floor; total = recon + KL.",
        f"- FID proxy: {sticks['fid_sampling_floor']:.3f} between real images and other real ones"
        f" (n = {sticks['fid_sampling_floor_n']:,}), {sticks['fid_noise']:.1f} for uniform noise.",
        f"- The classifier is right on {sticks['classifier_accuracy']:.1%} of the real images"
        f" and on {cell(cvae_row['control_recon'], '{:.1%}')} of the CVAE's reconstructions: the"
        " difference is the price of blur." + seen,
        f"- CVAE: {cell(total, '{:.2f}')} + log 10 = {cell(beside, '{:.2f}')} is the total to hold"
        " beside a VAE's: the CVAE",
        "  was told the label, and -log p(x) <= -log p(x | y) + log 10.",
    ]


@torch.no_grad()
def gallery(models, images, labels, path, device):
    """Prior samples and reconstructions of the three main models beside real images."""
    torch.manual_seed(0)
    first = [int((labels == c).nonzero()[0]) for c in range(len(CLASSES))]
    x, y = images[first], torch.arange(10)
    samples, reconstructions = [x], [x]
    for name, model in models.items():
        given = y if name == "CVAE" else None
        samples.append(draw(model, 10, device, given))
        reconstructions.append(reconstruct(model, x, device, given))
    names = ("real", *models)
    for kind, stack in (("samples", samples), ("reconstructions", reconstructions)):
        image_grid(torch.stack(stack)[:, :, 0], path.with_name(f"{path.stem}-{kind}.png"),
                   f"Real images and {kind} of each model", names, CLASSES)


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
    images, labels = data.test_images, data.test_labels
    if args.split == "val":
        images, labels = data.val_images, data.val_labels
    torch.manual_seed(0)
    real, sticks = yardsticks(data, args.split, images, labels, judge)
    rows, models = [], {}
    for name, module, *_ in STUDY:
        for runs in zip(*paths[name]):                  # the same model (or beta) under every seed
            measured = [measure(name, module, path, args.split, images, labels,
                                data.floor[args.split], judge, real, device) for path in runs]
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
    gallery(models, images, labels, stem, device)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    markdown = "\n".join(report(results, " | ")) + "\n"
    for name in (stem.name, "results"):                 # results.json is always the latest
        for ending, content in ((".json", text + "\n"), (".md", markdown)):
            path = args.out / f"{name}{ending}"
            write_atomically(path, lambda file, content=content: file.write(content.encode()))
            print(f"wrote {path}")
    print("", *report(results), sep="\n")
    return [args.out / "results.json"]


if __name__ == "__main__":
    main()
