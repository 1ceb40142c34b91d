"""Section 6: the protocol. Every model measured by the same rules, side by side in four tables.

Trains what is not trained yet, then measures everything on the same test images, which no model and
no choice has seen. recon, KL and total are those of section 2. The images that a model draws are
judged by the classifier, which sees raw images in [0, 1] and normalises them inside itself:

    fid        how far drawn images are from real ones, as sets; see frechet_distance
    control    the share of images that show the class that was asked for; worst: in one class
    diversity  how varied the images of a class are; 1 is as varied as real ones

for three sources of z: the prior N(0, I) (of the beta-VAEs, this one only); the ex-post prior, a
mixture of Gaussians fitted to where the codes of real images lie; and the codes of real images
themselves ("decoded"; "swap" with another label), which tell what the decoder alone loses.

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

Entry = namedtuple("Entry", "name script beta")         # beta: None, except in section 4
STUDY = [Entry("MLP VAE", vae, None), Entry("Conv VAE", conv_vae, None),
         *[Entry(f"β-VAE β={beta:g}", beta_vae, beta) for beta in beta_vae.BETAS],
         Entry("CVAE", cvae, None)]
# Real images, their labels, the judge, and what it sees in them: features (N, 256), classes (N,).
Real = namedtuple("Real", "images labels judge features judged")

def is_conditional(model):
    """Is this a model that is told the label? For all others, labels are ignored below."""
    return isinstance(model, cvae.CVAE)


@torch.no_grad()
def encode(model, images, labels):
    """(mu, logvar), each (N, latent_dim), of images (N, 1, 28, 28), labels (N,)."""
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    return model.encode(images, labels) if is_conditional(model) else model.encode(images)


@torch.no_grad()
def decode(model, z, labels):
    """The logits (N, 1, 28, 28) of z (N, latent_dim), labels (N,)."""
    device = next(model.parameters()).device
    z, labels = z.to(device), labels.to(device)
    return model.decode(z, labels) if is_conditional(model) else model.decode(z)


# ---------------------------------------------------------------- the metrics

def frechet_distance(features_a, features_b):
    """The FID of two sets of images from the judge's features of them, (N, D) and (M, D): the
    distance of the Gaussians fitted to them, 0 if these are equal (Heusel et al. 2017,
    arXiv:1706.08500, eq. 6; with Inception's features, so ours is a proxy for this study only).

        FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2 )

    m: mean, S: covariance, tr: sum of the diagonal. UserError unless N, M > D and all is finite."""
    for features in (features_a, features_b):
        if len(features) <= features.shape[1] or not features.isfinite().all():
            raise data.UserError(f"features of shape {tuple(features.shape)}: they must be finite,"
                                 f" and of at least {features.shape[1] + 1} images")
    a, b = features_a.double(), features_b.double()
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = a.T.cov(), b.T.cov()                                     # (D, D), over N - 1
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T               # S_a^1/2
    # only the trace of the last root is needed: the sum of the roots of the eigenvalues
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


def importance_weighted_bound(model, images, labels, draws=100, counts=(1, 10, 100)):
    """Upper bounds on -log p(x) in nats, as {"iw_K": ...} for each K in counts, from the importance
    weights w of K draws of z (Burda et al. 2016, arXiv:1509.00519, eq. 8):

        -log p(x)  <=  -E[ log( 1/K sum_k w_k ) ],    w = p(x | z) p(z) / q(z | x),  z ~ q(z | x)

    K = 1 is the negative ELBO. The mean of more weights varies less, so its log loses less, and the
    bound is tighter. All draws are cut into groups of K. images (N, 1, 28, 28), labels (N,)."""
    mu, logvar = encode(model, images, labels)
    log_w = []
    for _ in range(draws):
        z = model.reparameterize(mu, logvar)
        recon, _ = vae.elbo_terms(decode(model, z, labels), images.to(z.device), mu, logvar)
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
    nearest = torch.cdist(drawn.cpu().flatten(1), real_images).argmin(dim=1)      # (N,)
    return (nearest < len(train_images)).double().mean().item()


# ---------------------------------------------------------------- the ex-post prior

def log_joint(z, weights, means, factors):
    """log( weight_k N(z | mean_k, L_k L_k^T) ) of z (N, D) for each component k: (K, N)."""
    columns = z.T.contiguous()                          # (D, N)
    rows = []
    for weight, centre, factor in zip(weights, means, factors):
        white = torch.linalg.inv(factor) @ (columns - centre[:, None])      # (D, N)
        log_norm = factor.diagonal().log().sum() + len(centre) / 2 * math.log(2 * math.pi)
        rows.append(weight.log() - log_norm - 0.5 * white.pow(2).sum(0))
    return torch.stack(rows)


def fit_gmm(z, components, iterations=100, ridge=1e-3):
    """A mixture of Gaussians with full covariances for z (N, D), by EM (Bishop 2006, section
    9.2.2): weights (K,), means (K, D), Cholesky factors of the covariances (K, D, D). The ridge on
    their diagonals lets them be inverted; without it, no iteration lowers the likelihood."""
    small = ridge * torch.eye(z.shape[1], dtype=z.dtype)
    whole = z.T.cov().view(small.shape) + small         # the covariance of all codes
    weights = torch.full((components,), 1 / components, dtype=z.dtype)
    means, covariances = z[torch.randperm(len(z))[:components]], whole.repeat(components, 1, 1)
    for _ in range(iterations):
        # E step: how likely is it that component k made code n? Its responsibility
        joint = log_joint(z, weights, means, torch.linalg.cholesky(covariances))
        responsibility = joint.softmax(dim=0)                               # (K, N)
        # M step: fit each component anew to the codes, weighted by its responsibility
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
    """z from the ex-post prior (Ghosh et al. 2020, arXiv:1903.12436), (N, latent_dim). The codes of
    real images do not fill N(0, I) evenly, and a z from an empty place decodes badly. So fit a
    mixture to one code of each training image: 50 Gaussians or, if labels are told, one a class."""
    mu, logvar = encode(model, dataset.train_images, dataset.train_labels)
    codes = model.reparameterize(mu, logvar).cpu()
    if not is_conditional(model):
        return sample_gmm(*fit_gmm(codes, components=50), len(labels))
    z = torch.empty(len(labels), model.latent_dim)
    for c in labels.unique():                           # of one Gaussian, one iteration is exact
        gaussian = fit_gmm(codes[dataset.train_labels == c], components=1, iterations=1)
        z[labels == c] = sample_gmm(*gaussian, int((labels == c).sum()))
    return z


# ---------------------------------------------------------------- the table

# The columns of the four tables, by the names that they have in the results.
MAIN = ["model", "latent_dim", "recon", "excess", "kl", "total", "fid_prior", "control_prior"]
IMAGES = ["model", "fid_ex_post", "fid_decoded", "control_ex_post", "control_decoded",
          "control_swap", "worst_prior", "diversity_prior", "memorised"]
BOUNDS = ["model", "iw_1", "iw_10", "iw_100", "params", "seconds"]
SWEEP = ["model", "recon", "kl", "total", "fid_prior", "active", "gap", "null", "beaten"]
SHARES = ("control", "worst", "memorised", "beaten")    # columns that start so are in percent


def judge_images(logits, labels, real, source):
    """The figures of decoded images, whose z came from `source`: fid and, where labels (N,) tell
    which class each of them shall show, control, its worst class, and diversity."""
    features, judged = classifier.look(real.judge, logits.sigmoid())
    figures = {f"fid_{source}": frechet_distance(features, real.features)}
    if labels is not None:
        figures[f"control_{source}"], figures[f"worst_{source}"] = controllability(judged, labels)
        right, real_right = judged == labels, real.judged == real.labels
        figures[f"diversity_{source}"] = diversity(
            features[right], labels[right], real.features[real_right], real.labels[real_right])
    return figures


def measure(entry, model, meta, dataset, real):
    """All figures of a model. Each kind has its own seed, so that none of them changes another."""
    n = len(real.images)
    asked = torch.arange(n) % 10                        # a tenth of the images for each class
    can_ask = asked if is_conditional(model) else None
    told = [real.labels] if is_conditional(model) else []
    row = dict.fromkeys(MAIN + IMAGES + BOUNDS + SWEEP) | {
        "model": entry.name, "latent_dim": model.latent_dim,
        "params": sum(p.numel() for p in model.parameters()), "seconds": meta["metrics"]["seconds"]}
    torch.manual_seed(meta["seed"])                     # the seed of the script's own test
    row |= entry.script.test(model, real.images, *told)
    row["excess"] = row["recon"] - data.pixel_entropy(real.images).mean().item()

    torch.manual_seed(1)                                # z from N(0, I)
    logits = decode(model, torch.randn(n, model.latent_dim), asked)
    row |= judge_images(logits, can_ask, real, "prior")
    if entry.beta is not None:
        return row
    row["memorised"] = memorised(logits[:1000].sigmoid(), dataset.train_images, real.images)
    torch.manual_seed(2)                                # z from where the codes really lie
    logits = decode(model, sample_ex_post_prior(model, asked, dataset), asked)
    row |= judge_images(logits, can_ask, real, "ex_post")
    torch.manual_seed(3)                                # z of real images: the decoder's faults
    z = model.reparameterize(*encode(model, real.images, real.labels))
    row |= judge_images(decode(model, z, real.labels), real.labels, real, "decoded")
    if is_conditional(model):                           # encoded as a class, decoded as another
        other = (real.labels + 1 + torch.arange(n) % 9) % 10
        row |= judge_images(decode(model, z, other), other, real, "swap")
    torch.manual_seed(4)                                # every tenth image: so iw_1 is not total
    return row | importance_weighted_bound(model, real.images[::10], real.labels[::10])


def average(rows):
    """The rows of one model under several seeds as one: floats as {"mean", "std" (n - 1), "n"}."""
    averaged = dict(rows[0])                            # names, sizes, and what does not apply
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if len(rows) > 1 and isinstance(first, float):
            averaged[key] = {"mean": mean(values), "std": stdev(values), "n": len(values)}
    return averaged


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
    """How far two single trainings of equally good models may differ by chance: two std of their
    difference, and each is sqrt(2) s with the std s over seeds, pooled over the rows; or None."""
    stds = [row[key]["std"] for row in rows if isinstance(row[key], dict)]
    return 2 * math.sqrt(2 * mean(std**2 for std in stds)) if stds else None


def table(rows, columns):
    """The lines of a Markdown table; the last one tells how large the noise is."""
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
        z = model.reparameterize(*encode(model, images, labels))
        pictures.append(decode(model, z, labels).sigmoid().cpu())
        titles.append(f"{name}, recon {row['recon']:.1f} nats")
    for name, (model, row) in models.items():
        z = torch.randn(len(images), model.latent_dim)
        pictures.append(decode(model, z, labels).sigmoid().cpu())
        titles.append(f"{name}, FID {row['fid_prior']:.2f}")
    data.image_grid(torch.cat(pictures).view(len(pictures), len(first), 28, 28), path,
                    "Above: reconstructions. Below: samples from N(0, I)", titles, classes)


# ---------------------------------------------------------------- the study

def find_or_train(entry, seed, args, dataset):
    """The path of a model's checkpoint. If it is not there, its script trains it now; if it is, it
    must have been trained by the settings of this study (UserError)."""
    name = entry.script.__name__
    parser = entry.script.arguments()
    epochs = args.epochs or parser.get_default("epochs")
    flags = ["--data", dataset.source, "--seed", f"{seed}", "--epochs", f"{epochs}",
             "--device", args.device, f"--out={args.out}"]
    if entry.beta is not None:
        name += f"-beta{entry.beta:g}"
        flags += ["--betas", f"{entry.beta}", "--train-only"]
    wanted = parser.parse_args(flags)
    name = data.run_name(f"{name}-{dataset.source}-seed{seed}", parser, wanted)
    path = args.out / f"{name}.pt"
    if not path.exists():
        entry.script.main(flags, dataset=dataset)
    meta = data.read_checkpoint(path, entry.script.__name__)
    found = meta["config"], meta["source"], meta["seed"], meta.get("beta")
    if found != (data.settings(wanted), dataset.source, seed, entry.beta):
        raise data.UserError(f"{path}: of another study, {found}; move it, or choose another --out")
    return path


@data.command
def main(argv=None):
    """Train what is missing, measure, save, print, draw; returns [path of the results]."""
    parser = data.Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="each trains all models; the seven β-VAEs, the first three")
    parser.add_argument("--epochs", type=int, help="of all trainings, for a trial")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    data.check_flags(args)
    device = data.pick_device(args.device)
    dataset = data.load(args.data)
    judge, judge_meta = classifier.load_pretrained(device)

    images = {"test": dataset.test_images, "val": dataset.val_images}[args.split]
    labels = {"test": dataset.test_labels, "val": dataset.val_labels}[args.split]
    real = Real(images, labels, judge, *classifier.look(judge, images))
    floor = data.pixel_entropy(images).mean().item()
    yardsticks = {
        "entropy floor": floor,
        "fid of halves of the images": frechet_distance(real.features[::2], real.features[1::2]),
        "control of real images": controllability(real.judged, labels)[0],
        "memorised by chance": 1 / (1 + len(images) / len(dataset.train_images))}
    rows, models, sweep = [], {}, {}                    # models, sweep: of the first seed
    for entry in STUDY:
        rows_of_seeds = []
        seeds = args.seeds if entry.beta is None else args.seeds[:3]    # there are seven betas
        for seed in seeds:
            print(f"\n=== {entry.name}, seed {seed}", flush=True)
            path = find_or_train(entry, seed, args, dataset)
            model, meta = entry.script.load_model(path, device)
            row = measure(entry, model, meta, dataset, real)
            if entry.beta is None:
                models.setdefault(entry.name, (model, row))
            else:
                analysis = beta_vae.analyse(model.cpu(), images)
                row |= {key: getattr(analysis, key) for key in ("active", "gap", "null", "beaten")}
                sweep.setdefault(entry.beta, (model, analysis, row))
            rows_of_seeds.append(row)
        rows.append(average(rows_of_seeds) | {"beta": entry.beta})
    results = {"data": dataset.source, "split": args.split, "n": len(images), "seeds": args.seeds,
               "epochs": args.epochs, "device": str(device), "torch": str(torch.__version__),
               "date": time.strftime("%Y-%m-%d"), "floor": floor,
               "judge_sha256": judge_meta["sha256"], "yardsticks": yardsticks, "rows": rows}
    numbers = "-".join(str(seed) for seed in args.seeds)
    name = data.run_name(f"results-{dataset.source}-seeds{numbers}", parser, args)
    path = args.out / f"{name}.json"
    data.write_file(path, json.dumps(results, indent=1, allow_nan=False).encode())
    print("", *report(results), f"-> {path}", sep="\n")
    draw_models(models, real, args.out / f"{name}-models.png")
    beta_vae.draw_comparison(sweep, images[:1], args.out / f"{name}-beta")
    return [path]


if __name__ == "__main__":
    main()
