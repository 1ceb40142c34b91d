"""Section 6: the protocol. Every model measured by the same rules, side by side in one table.

Trains what is not trained yet, then measures everything on the same test images, which no model
and no choice has seen. Generators see raw images in [0, 1]; the classifier, our judge, normalises
them inside itself. recon, KL and total are in nats per image, at full KL weight, from one posterior
sample. Generated images are judged by the FID proxy, a distance between two sets of images:

    FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2 )

(Heusel et al. 2017, arXiv:1706.08500, eq. 6. m and S are the mean and the covariance of the judge's
256 features over a set; equal sets have 0. The original takes the features of Inception, so ours is
a *proxy*: compare it within this table only.)

    python evaluate.py                    # the whole study; a second call only measures again
    python evaluate.py --split val        # the same on the validation images, for making choices
"""
import json
import math
import time
from collections import namedtuple
from statistics import mean, stdev

import torch

import beta_vae
import classifier
import conv_vae
import cvae
import data
import vae

Model = namedtuple("Model", "name script beta")         # beta: None, except in section 4
STUDY = [Model("MLP VAE", vae, None), Model("Conv VAE", conv_vae, None),
         *[Model(f"β-VAE β={beta:g}", beta_vae, beta) for beta in beta_vae.BETAS],
         Model("CVAE", cvae, None)]
# Real images, their labels, the judge, and what it sees in them: features (N, 256), classes (N,).
Real = namedtuple("Real", "images labels judge features judged")

# ---------------------------------------------------------------- using any of the models

def told(model, labels):
    """What a model is told beside its image or its z: (labels,) if it is a CVAE, else nothing."""
    return (labels,) if isinstance(model, cvae.CVAE) else ()


@torch.no_grad()
def encode(model, images, labels):
    """z ~ q(z | x), one for each of images (N, 1, 28, 28), labels (N,): (N, latent_dim)."""
    device = next(model.parameters()).device
    mu, logvar = model.encode(images.to(device), *told(model, labels.to(device)))
    return model.reparameterize(mu, logvar).cpu()


@torch.no_grad()
def decode(model, z, labels):
    """The images in [0, 1] that z (N, latent_dim), labels (N,) are decoded to: (N, 1, 28, 28)."""
    device = next(model.parameters()).device
    logits = model.decode(z.to(device), *told(model, labels.to(device)))
    return logits.sigmoid().cpu()


# ---------------------------------------------------------------- the metrics

def frechet_distance(features_a, features_b):
    """The FID of features (N, D) and (M, D), by the equation at the top. UserError unless N and M
    are larger than D and all features are finite."""
    for features in (features_a, features_b):
        if len(features) <= features.shape[1] or not features.isfinite().all():
            raise data.UserError(f"features of shape {tuple(features.shape)}: they must be finite,"
                                 f" and of at least {features.shape[1] + 1} images")
    a, b = features_a.double(), features_b.double()
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = a.T.cov(), b.T.cov()                                     # (D, D), over N - 1
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T               # S_a^1/2
    # the trace of a root is the sum of the roots of the eigenvalues: that root is never formed
    roots = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt()
    return (shift @ shift + cov_a.trace() + cov_b.trace() - 2 * roots.sum()).item()


def controllability(judged, asked):
    """The share of images that the judge puts into the class that was asked for, in all and in the
    class where it is smallest. Both (N,). For real images and their labels this is the accuracy."""
    hits = (judged == asked).double()
    worst = min(hits[asked == c].mean().item() for c in asked.unique())
    return hits.mean().item(), worst


def diversity(features, labels, real_features, real_labels):
    """The mean distance between the features of two images of a class, over that of real images,
    averaged over the classes: 1 is as varied as real images, 0 is one image a class. features
    (N, D), labels (N,): only of images that the judge puts into their class, on both sides."""
    ratios = []
    for c in real_labels.unique():
        drawn, real = features[labels == c], real_features[real_labels == c]
        spread = torch.pdist(drawn).mean().item() if len(drawn) > 1 else 0.0
        ratios.append(spread / torch.pdist(real).mean().item())
    return mean(ratios)


@torch.no_grad()
def importance_weighted_bound(model, images, labels, draws=100, counts=(1, 10, 100)):
    """Upper bounds on -log p(x) in nats, {"iw_K": ...} for each K in counts, from the importance
    weights w of K draws of z (Burda et al. 2016, arXiv:1509.00519, eq. 8):

        -log p(x)  <=  -E[ log( 1/K sum_k w_k ) ],    w = p(x | z) p(z) / q(z | x),  z ~ q(z | x)

    K = 1 is the negative ELBO; a larger K gives a tighter bound. All K, divisors of `draws`, share
    their draws. images (N, 1, 28, 28), labels (N,)."""
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    log_w = []
    for _ in range(draws):
        mu, logvar = model.encode(images, *told(model, labels))
        z = model.reparameterize(mu, logvar)
        recon, _ = vae.elbo_terms(model.decode(z, *told(model, labels)), images, mu, logvar)
        # log p(z) - log q(z | x); both have the same log 2 pi, which cancels
        log_ratio = 0.5 * ((z - mu).pow(2) / logvar.exp() + logvar - z.pow(2)).sum(1)
        log_w.append(log_ratio - recon)
    log_w = torch.stack(log_w, dim=1).cpu().double()                        # (N, draws)
    bounds = {}
    for k in counts:
        groups = log_w.view(len(images), draws // k, k)                     # of K draws each
        log_mean = groups.logsumexp(dim=2) - math.log(k)
        bounds[f"iw_{k}"] = -log_mean.mean().item()
    return bounds


def memorised(drawn, train_images, unseen_images):
    """The share of drawn images whose nearest real image, by the distance of their pixels, is a
    training image and not one that the model never saw. All (N, 1, 28, 28)."""
    real_images = torch.cat([train_images, unseen_images]).flatten(1)
    nearest = torch.cdist(drawn.flatten(1), real_images).argmin(dim=1)      # (N,)
    return (nearest < len(train_images)).double().mean().item()


# ---------------------------------------------------------------- a mixture of Gaussians

def log_joint(z, weights, means, factors):
    """log( weight_k N(z | mean_k, L_k L_k^T) ) of z (N, D) for each component k: (K, N)."""
    columns = z.T.contiguous()                          # (D, N)
    rows = []
    for weight, mean, factor in zip(weights, means, factors):
        white = torch.linalg.inv(factor) @ (columns - mean[:, None])        # (D, N)
        log_norm = factor.diagonal().log().sum() + len(mean) / 2 * math.log(2 * math.pi)
        rows.append(weight.log() - log_norm - 0.5 * white.pow(2).sum(0))
    return torch.stack(rows)


def fit_gmm(z, components, iterations=100, ridge=1e-3):
    """A mixture of Gaussians with full covariances for z (N, D), by EM (Bishop 2006, section
    9.2.2): weights (K,), means (K, D), Cholesky factors of the covariances (K, D, D). With ridge =
    0 no iteration lowers the likelihood; it ends near a local maximum, depending on the start."""
    small = ridge * torch.eye(z.shape[1], dtype=z.dtype)
    whole = z.T.cov().view(small.shape) + small         # the covariance of all codes
    weights = torch.full((components,), 1 / components, dtype=z.dtype)
    means, covariances = z[torch.randperm(len(z))[:components]], whole.repeat(components, 1, 1)
    for _ in range(iterations):
        # E step: the responsibility of each component for each code
        joint = log_joint(z, weights, means, torch.linalg.cholesky(covariances))
        responsibility = joint.softmax(dim=0)                               # (K, N)
        # M step: the weights, and the weighted means and covariances
        counts = responsibility.sum(1).clamp(min=1e-6)                      # (K,)
        weights = counts / counts.sum()
        means = responsibility @ z / counts[:, None]
        for k in range(components):
            centred = z - means[k]                                          # (N, D)
            covariances[k] = (responsibility[k] * centred.T) @ centred / counts[k] + small
    return weights, means, torch.linalg.cholesky(covariances)


def sample_gmm(weights, means, factors, count):
    """Draws (count, D) from a mixture."""
    k = torch.multinomial(weights, count, replacement=True)
    eps = torch.randn(count, means.shape[1], 1, dtype=means.dtype)
    return means[k] + (factors[k] @ eps).squeeze(2)


def sample_ex_post_prior(model, labels, dataset):
    """z from the ex-post prior (Ghosh et al. 2020, arXiv:1903.12436): a mixture that is fitted,
    after the training, to one code of each training image, because the codes do not quite lie where
    N(0, I) is. 50 Gaussians or, if the model is told the label, one a class. (N, latent_dim)."""
    codes = encode(model, dataset.train_images, dataset.train_labels)
    if not told(model, labels):
        return sample_gmm(*fit_gmm(codes, components=50), len(labels))
    z = torch.empty(len(labels), model.latent_dim)
    for c in labels.unique():
        gaussian = fit_gmm(codes[dataset.train_labels == c], components=1, iterations=1)
        z[labels == c] = sample_gmm(*gaussian, int((labels == c).sum()))
    return z


# ---------------------------------------------------------------- one row of the table

def judge_images(images, labels, real, source):
    """The figures of decoded images, whose z came from `source`: fid and, where labels (N,) tell
    which class each of them shall show, control, its worst class, and diversity."""
    features, judged = classifier.look(real.judge, images)
    figures = {f"fid_{source}": frechet_distance(features, real.features)}
    if labels is not None:
        figures[f"control_{source}"], figures[f"worst_{source}"] = controllability(judged, labels)
        right, real_right = judged == labels, real.judged == real.labels
        figures[f"diversity_{source}"] = diversity(
            features[right], labels[right], real.features[real_right], real.labels[real_right])
    return figures


def measure(entry, model, meta, dataset, split, real):
    """All figures of a model. Each kind has its own seed, so that none of them changes another."""
    row = dict.fromkeys(MAIN + IMAGES + BOUNDS + SWEEP)
    row |= {"model": entry.name, "beta": entry.beta, "latent_dim": model.latent_dim,
            "params": sum(p.numel() for p in model.parameters()),
            "seconds": meta["metrics"]["seconds"], "trained_on": meta["device"]}
    torch.manual_seed(meta["seed"])                     # the same noise as in the script's own test
    row |= entry.script.test(model, real.images, *told(model, real.labels))
    row["excess"] = row["recon"] - dataset.floor[split]

    asked = torch.arange(len(real.images)) % 10         # a tenth of the images for each class
    can_ask = asked if told(model, asked) else None
    torch.manual_seed(1)                                # z ~ N(0, I)
    drawn = decode(model, torch.randn(len(asked), model.latent_dim), asked)
    row |= judge_images(drawn, can_ask, real, "prior")
    if entry.beta is not None:
        return row
    row["memorised"] = memorised(drawn[:1000], dataset.train_images, real.images)
    torch.manual_seed(2)                                # z from where the codes really lie
    drawn = decode(model, sample_ex_post_prior(model, asked, dataset), asked)
    row |= judge_images(drawn, can_ask, real, "ex_post")
    torch.manual_seed(3)                                # z of the images: the decoder's loss alone
    z = encode(model, real.images, real.labels)
    row |= judge_images(decode(model, z, real.labels), real.labels, real, "recon")
    if told(model, asked):                              # encoded as a class, decoded as another
        other = (real.labels + 1 + asked % 9) % 10
        row |= judge_images(decode(model, z, other), other, real, "swap")
    torch.manual_seed(4)
    return row | importance_weighted_bound(model, real.images[::10], real.labels[::10])


def average(rows):
    """The rows of one model under several seeds as one: floats as {"mean", "std" (n - 1), "n"}."""
    averaged = dict(rows[0])                            # names, sizes, and what does not apply
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if len(rows) > 1 and isinstance(first, float) and key != "beta":
            averaged[key] = {"mean": mean(values), "std": stdev(values), "n": len(values)}
    return averaged


# ---------------------------------------------------------------- the tables and a picture

# The columns of the four tables, by the names that they have in the results.
MAIN = ["model", "latent_dim", "recon", "excess", "kl", "total", "fid_prior", "control_prior"]
IMAGES = ["model", "fid_ex_post", "fid_recon", "control_ex_post", "control_recon", "control_swap",
          "worst_prior", "diversity_prior", "memorised"]
BOUNDS = ["model", "iw_1", "iw_10", "iw_100", "params", "seconds"]
SWEEP = ["model", "recon", "kl", "total", "fid_prior", "active", "gap", "null", "beaten"]
SHARES = ("control", "worst", "memorised", "beaten")    # columns that start so are in percent


def cell(key, value):
    """The text of one figure in a table."""
    if value is None:
        return "–"                                      # does not apply
    if isinstance(value, dict):
        return f"{cell(key, value['mean'])}±{cell(key, value['std'])}"
    if isinstance(value, float):
        return f"{value:.1%}" if key.startswith(SHARES) else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def noise(rows, key):
    """What two models may differ by without meaning: 2 sqrt(2) s, with s the std over seeds, pooled
    over the rows. None for a single seed, which tells nothing about it."""
    stds = [row[key]["std"] for row in rows if isinstance(row[key], dict)]
    return 2 * math.sqrt(2 * mean(std**2 for std in stds)) if stds else None


def table(rows, columns):
    """The lines of a Markdown table; the last one tells which differences are within noise."""
    lines = [columns] + [[cell(key, row[key]) for key in columns] for row in rows]
    lines.append(["noise"] + [cell(key, noise(rows, key)) for key in columns[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return [f"| {' | '.join(line)} |" for line in padded]


def report(results):
    """The tables with what is needed to read them, as lines of Markdown."""
    main_rows = [row for row in results["rows"] if row["beta"] is None]
    sweep = [row for row in results["rows"] if row["beta"] is not None]
    facts = ("data", "split", "n", "seeds", "device", "torch", "date")
    return [", ".join(f"{name} {results[name]}" for name in facts), "",
            *table(main_rows, MAIN), "", *table(main_rows, IMAGES), "",
            *table(main_rows, BOUNDS), "",
            *[f"- {name}: {cell(name, value)}" for name, value in results["yardsticks"].items()],
            "", *table(sweep, SWEEP)]


def draw_models(models, real, path):
    """Test images, their reconstructions and samples. models: {name: (model, row of the table)}."""
    torch.manual_seed(0)
    first, classes = data.one_of_each_class(real.labels)
    images, labels = real.images[first], real.labels[first]
    pictures, titles = [images], ["test images"]
    for name, (model, row) in models.items():
        pictures.append(decode(model, encode(model, images, labels), labels))
        titles.append(f"{name}, recon {row['recon']:.1f} nats")
    for name, (model, row) in models.items():
        pictures.append(decode(model, torch.randn(len(images), model.latent_dim), labels))
        titles.append(f"{name}, FID {row['fid_prior']:.2f}")
    data.image_grid(torch.cat(pictures).view(len(pictures), len(first), 28, 28), path,
                    "Above: reconstructions. Below: samples from N(0, I)", titles, classes)


# ---------------------------------------------------------------- the study

def find_or_train(entry, seed, args, dataset):
    """The path of a model's checkpoint. If it is not there, its script trains it now; if it is, it
    must have been trained by the settings of this study (UserError)."""
    name = entry.script.__name__
    flags = ["--data", dataset.source, "--seed", f"{seed}", "--device", args.device,
             f"--out={args.out}"]
    if entry.beta is not None:
        name += f"-beta{entry.beta:g}"
        flags += ["--betas", f"{entry.beta}", "--train-only"]
    if args.epochs:
        flags += ["--epochs", f"{args.epochs}"]
    parser = entry.script.arguments()
    wanted = parser.parse_args(flags)
    name = data.run_name(f"{name}-{dataset.source}-seed{seed}", parser, wanted)
    path = args.out / f"{name}.pt"
    if not path.exists():
        entry.script.main(flags, dataset)
    meta = data.read_checkpoint(path, entry.script.__name__)
    if meta["config"] != data.settings(wanted) or meta["source"] != dataset.source:
        raise data.UserError(f"{path}: trained with {meta['config']} on {meta['source']}, and not"
                             f" with {data.settings(wanted)}; move it, or choose another --out")
    return path


@data.command
def main(argv=None):
    """Train what is missing, measure, save, print, draw; returns [path of the results]."""
    parser = data.Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each trains all models")
    parser.add_argument("--epochs", type=int, help="of all trainings, for a trial")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    data.check_flags(args)
    device = data.pick_device(args.device)
    dataset = data.load(args.data)
    judge, judge_meta = classifier.load_pretrained(device)

    torch.manual_seed(0)
    images = {"test": dataset.test_images, "val": dataset.val_images}[args.split]
    labels = {"test": dataset.test_labels, "val": dataset.val_labels}[args.split]
    real = Real(images, labels, judge, *classifier.look(judge, images))
    noisy, _ = classifier.look(judge, torch.rand(images.shape))
    yardsticks = {
        "entropy floor": dataset.floor[args.split],
        "nats to add to the CVAE's total and iw": math.log(10),
        "fid of halves of the images": frechet_distance(real.features[::2], real.features[1::2]),
        "fid of noise": frechet_distance(noisy, real.features),
        "control of real images": controllability(real.judged, labels)[0],
        "memorised by chance": 1 / (1 + len(images) / len(dataset.train_images))}
    rows, models, sweep = [], {}, {}                    # models and sweep: of the first seed
    for entry in STUDY:
        rows_of_seeds = []
        for seed in args.seeds:
            print(f"\n=== {entry.name}, seed {seed}", flush=True)
            path = find_or_train(entry, seed, args, dataset)
            model, meta = entry.script.load_model(path, device)
            row = measure(entry, model, meta, dataset, args.split, real)
            if entry.beta is None:
                models.setdefault(entry.name, (model, row))
            else:
                analysis = beta_vae.analyse(model.cpu(), images)
                row |= {key: getattr(analysis, key) for key in ("active", "gap", "null", "beaten")}
                sweep.setdefault(entry.beta, (model, analysis, row))
            rows_of_seeds.append(row)
        rows.append(average(rows_of_seeds))

    results = {"data": dataset.source, "split": args.split, "n": len(images), "seeds": args.seeds,
               "epochs": args.epochs, "device": str(device), "torch": str(torch.__version__),
               "date": time.strftime("%Y-%m-%d"), "floor": dataset.floor[args.split],
               "judge_sha256": judge_meta["sha256"], "yardsticks": yardsticks, "rows": rows}
    seeds = "-".join(f"{seed}" for seed in args.seeds)
    name = data.run_name(f"results-{dataset.source}-seeds{seeds}", parser, args)
    path = args.out / f"{name}.json"
    data.write_file(path, json.dumps(results, indent=1, allow_nan=False).encode())
    print("", *report(results), f"-> {path}", sep="\n")
    draw_models(models, real, args.out / f"{name}-models.png")
    beta_vae.draw_comparison(sweep, images[:1], args.out / f"{name}-beta")
    return [path]


if __name__ == "__main__":
    main()
