"""Section 6: every model is measured by the same rules, side by side.

Trains what is missing, and measures all models on the same test images, which no training has
seen. A classifier (classifier.py) judges the images:

    fid           how far drawn images are from real ones, as sets; see frechet_distance
    rarest_class  the share of the class that it recognises least often; almost 10 % is right
    control       the share of images in which it recognises the class asked for
    diversity     how far apart the images of a class are; 1: as far as real ones

Where does a bad image come from? We decode z of three sources, and measure the fid of each:

    fid_decoded   z of the real images themselves: what is lost by encoding and decoding
    fid_prior     z from N(0, I), which may fall into holes, or into some classes too rarely
    fid_ex_post   z from a mixture of Gaussians, fitted to the z of images: less of both

    python evaluate.py      # 20 to 30 minutes on two CPU cores; a second call only measures again

You should see (full data, seed 0) that fid_prior > fid_ex_post > fid_decoded for both VAEs.
Try: what is the fid of 300 real images and 300 others, and of 1,000 and 1,000? (See README.md.)
"""
import json
import math
from collections import namedtuple
from statistics import mean, stdev

import torch

import beta_vae
import classifier
import conv_vae
import cvae
import data
import vae

NAMES = {vae: "MLP VAE", conv_vae: "Conv VAE", beta_vae: "beta-VAE", cvae: "CVAE"}
# real images, their labels, the classifier, its features of them (N, 256), its classes (N,)
Real = namedtuple("Real", "images labels resnet features recognised")


def is_conditional(model):
    """Is this a model that is told the label? For all others, labels are ignored below."""
    return isinstance(model, cvae.CVAE)


@torch.no_grad()
def encode(model, images, labels):
    """(mu, logvar), each (N, latent_dim), of images (N, 1, 28, 28), labels (N,)."""
    return model.encode(images, labels) if is_conditional(model) else model.encode(images)


def draw_z(model, images, labels):
    """A draw of z from q(z | x) for each image, (N, latent_dim); in batches, which is faster."""
    batches = zip(images.split(1000), labels.split(1000), strict=True)
    return torch.cat([model.reparameterize(*encode(model, x, y)) for x, y in batches])


@torch.no_grad()
def decode(model, z, labels):
    """The logits (N, 1, 28, 28) of z (N, latent_dim), labels (N,)."""
    return model.decode(z, labels) if is_conditional(model) else model.decode(z)


# ---------------------------------------------------------------- the metrics

def frechet_distance(features_a, features_b):
    """The FID of two sets of images from the classifier's features of them, (N, D) and (M, D): the
    squared Fréchet distance of the Gaussians fitted to them, 0 if these are equal (Heusel et al.
    2017, arXiv:1706.08500, eq. 6; with other features, so the numbers do not compare).

        FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a S_b)^1/2 )

    m: mean, S: covariance, tr: sum of the diagonal. Of one feature with standard deviation s, this
    is (m_a - m_b)^2 + (s_a - s_b)^2. The trace of a root is the sum of the roots of all eigenvalues
    of the matrix (those of S_a S_b are real and never negative, but for rounding). The FID grows if
    N or M shrinks: compare equal numbers only."""
    if min(len(features_a), len(features_b)) <= features_a.shape[1]:
        raise ValueError(f"give more images than there are features, {features_a.shape[1]}")
    a, b = features_a.double(), features_b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)                                   # (D,)
    cov_a = (a - mean_a).T @ (a - mean_a) / (len(a) - 1)                    # (D, D)
    cov_b = (b - mean_b).T @ (b - mean_b) / (len(b) - 1)
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)     # (D,)
    spread = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return ((mean_a - mean_b).pow(2).sum() + spread).clamp(min=0).item()


def controllability(recognised, asked):
    """The share of images whose recognised class is the class asked for. Both are (N,)."""
    if recognised.shape != asked.shape:                 # == would compare each with all others
        raise ValueError(f"{tuple(recognised.shape)} classes, but {tuple(asked.shape)} asked for")
    return (recognised == asked).double().mean().item()


def diversity(features, labels, real_features, real_labels):
    """The mean distance between the features (N, D) of two drawn images of a class, over that of
    two real ones; mean of all classes. 1: as far apart, 0: all alike, or fewer than two drawn."""
    ratios = []
    for c in real_labels.unique():
        drawn, real = features[labels == c], real_features[real_labels == c]
        distance = torch.pdist(drawn).mean().item() if len(drawn) > 1 else 0.0
        ratios.append(distance / torch.pdist(real).mean().item())
    return mean(ratios)


def importance_weighted_bound(model, images, labels, draws, elbo_terms=vae.elbo_terms):
    """An upper bound on -log p(x) (of a CVAE: -log p(x | y)), in nats, averaged over images, from
    the importance weights w of some draws of z (Burda et al. 2016, arXiv:1509.00519, eq. 8):

        -log p(x)  <=  -E[ log( mean of w ) ],    w = p(x | z) p(z) / q(z | x),    z ~ q(z | x)

    One draw estimates -ELBO; with more of them, the bound comes nearer to -log p(x)."""
    vae.check_images(images)
    mu, logvar = encode(model, images, labels)
    log_w = []
    for _ in range(draws):
        z = model.reparameterize(mu, logvar)                                # (N, latent_dim)
        recon, _ = elbo_terms(decode(model, z, labels), images, mu, logvar)
        # the logs of two normal densities, both without their - D/2 log 2 pi, which cancels
        log_prior = -0.5 * z.pow(2).sum(1)                                  # (N,)
        log_q = -0.5 * ((z - mu).pow(2) / logvar.exp() + logvar).sum(1)     # (N,)
        log_w.append(-recon + log_prior - log_q)
    return math.log(draws) - torch.stack(log_w).double().logsumexp(dim=0).mean().item()


def log_joint(z, weights, means, factors):
    """log p(k, z) = log( weight_k N(z | m_k, S_k) ) of z (N, D) for each component k: (K, N).

        log N(z | m, S)  =  -1/2 (z - m)^T S^-1 (z - m)  -  1/2 log det S  -  D/2 log 2 pi

    The factors (K, D, D) are triangular matrices L with L L^T = S. With u = L^-1 (z - m), the first
    term is -1/2 |u|^2, and the second is -log det L."""
    columns = z.T.contiguous()                          # (D, N), stored row by row: faster below
    rows = []
    for weight, centre, factor in zip(weights, means, factors):
        u = torch.linalg.inv(factor) @ (columns - centre[:, None])          # (D, N)
        log_det = factor.diagonal().log().sum()         # det of a triangle: product of its diagonal
        rows.append(weight.log() - 0.5 * u.pow(2).sum(0) - log_det)
    return torch.stack(rows) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def fit_gmm(z, K, iterations=100, ridge=1e-3):
    """A mixture of K Gaussians for z (N, D): weights (K,), means (K, D), factors (K, D, D).
    EM (Bishop 2006, section 9.2.2) guesses in turn which component made each point, and fits each
    component to its points. The ridge keeps covariances invertible."""
    added = ridge * torch.eye(z.shape[1], dtype=z.dtype)                    # (D, D)
    weights = torch.full((K,), 1 / K, dtype=z.dtype)
    means = z[torch.randperm(len(z))[:K]]               # start at K of the points
    covariances = (z.var(0).diag() + added).repeat(K, 1, 1)                 # as wide as all z
    for _ in range(iterations):
        # E step: how likely is it that component k made point n? Its responsibility
        logs = log_joint(z, weights, means, torch.linalg.cholesky(covariances))
        responsibility = logs.softmax(dim=0)            # (K, N), by Bayes: exp(logs) over its sum
        # M step: fit each component anew to the points, weighted by its responsibility
        counts = responsibility.sum(1).clamp(min=1e-6)  # (K,), never 0: we divide by it
        weights = counts / counts.sum()
        means = responsibility @ z / counts[:, None]
        for k in range(K):
            centred = z - means[k]                                          # (N, D)
            weighted = responsibility[k] * centred.T    # (D, N): each point by its responsibility
            covariances[k] = weighted @ centred / counts[k] + added         # (D, D)
    return weights, means, torch.linalg.cholesky(covariances)


def sample_gmm(mixture, count):
    """Draws (count, D) from a mixture that fit_gmm fitted: choose a component, draw from it."""
    weights, means, factors = mixture
    k = torch.multinomial(weights, count, replacement=True)                 # (count,)
    eps = torch.randn(count, means.shape[1], 1, dtype=means.dtype)          # (count, D, 1)
    return means[k] + (factors[k] @ eps).squeeze(2)                         # cov of L eps: L L^T


def sample_ex_post_prior(model, labels, dataset):
    """z (N, latent_dim) from the ex-post prior (Ghosh et al. 2020, arXiv:1903.12436), made after
    training: 50 Gaussians, fitted to one z of each training image; for a CVAE, one each class."""
    real_z = draw_z(model, dataset.train_images, dataset.train_labels)
    if not is_conditional(model):
        return sample_gmm(fit_gmm(real_z, K=50), len(labels))
    z = torch.empty(len(labels), model.latent_dim)
    for c in labels.unique():
        gaussian = fit_gmm(real_z[dataset.train_labels == c], K=1, iterations=1)    # exact at once
        z[labels == c] = sample_gmm(gaussian, int((labels == c).sum()))
    return z


def measure(script, model, meta, dataset, real):
    """A row of results: a model that script (a module) made, measured; meta is the rest of its
    checkpoint. Each measurement has its own seed, so that none of them changes another."""
    beta = meta.get("beta")                             # None, except in section 4
    row = {"model": NAMES[script] if beta is None else f"{NAMES[script]} {beta:g}", "beta": beta,
           "latent_dim": model.latent_dim, "params": sum(p.numel() for p in model.parameters()),
           "seconds": meta["metrics"]["seconds"]}
    torch.manual_seed(meta["seed"])                     # the seed of the script's own test
    row |= script.test(model, real.images, *([real.labels] if is_conditional(model) else []))
    row["excess"] = row["recon"] - data.pixel_entropy(real.images).mean().item()
    torch.manual_seed(1)
    z = torch.randn(len(real.labels), model.latent_dim)
    features, recognised = classifier.look(real.resnet, decode(model, z, real.labels).sigmoid())
    row["fid_prior"] = frechet_distance(features, real.features)
    row["rarest_class"] = recognised.bincount(minlength=10).min().item() / len(recognised)
    if is_conditional(model):
        row["control_prior"] = controllability(recognised, real.labels)
        right, real_right = recognised == real.labels, real.recognised == real.labels
        row["diversity_prior"] = diversity(features[right], real.labels[right],
                                           real.features[real_right], real.labels[real_right])
    if script is beta_vae:                              # the question of section 4 is another one
        return row
    torch.manual_seed(2)
    z = sample_ex_post_prior(model, real.labels, dataset)
    features, _ = classifier.look(real.resnet, decode(model, z, real.labels).sigmoid())
    row["fid_ex_post"] = frechet_distance(features, real.features)
    torch.manual_seed(3)
    z = draw_z(model, real.images, real.labels)
    features, recognised = classifier.look(real.resnet, decode(model, z, real.labels).sigmoid())
    row["fid_decoded"] = frechet_distance(features, real.features)
    row["control_decoded"] = controllability(recognised, real.labels)
    torch.manual_seed(4)
    row["iw_10"] = importance_weighted_bound(model, real.images, real.labels, 10, script.elbo_terms)
    return row


# ---------------------------------------------------------------- the tables

TABLES = [["active", "recon", "excess", "kl", "total", "iw_10"],
          ["fid_prior", "rarest_class", "fid_ex_post", "fid_decoded"],
          ["control_prior", "control_decoded", "diversity_prior"]]
SWEEP = ["active", "recon", "kl", "total", "fid_prior"]         # of section 4


def average(rows):
    """One row from those of a model under several seeds: mean, std (over n - 1) and n of each."""
    averaged = dict(rows[0])
    for key in averaged.keys() - {"model", "beta", "latent_dim", "params"}:
        values = [row[key] for row in rows]
        std = stdev(values) if len(values) > 1 else None
        averaged[key] = {"mean": mean(values), "std": std, "n": len(values)}
    return averaged


def cell(key, found):
    """The text of a measurement: its mean±std, only its mean, or - if it does not apply."""
    if found is None:
        return "-"
    numbers = [found["mean"]] if found["std"] is None else [found["mean"], found["std"]]
    share = key.startswith(("control", "rarest"))
    return "±".join(f"{x:.1%}" if share else f"{x:.2f}" for x in numbers)


def noise(rows, columns):
    """A row that tells by how much two means of n seeds may differ by chance: two standard errors
    of their difference, 2 root(2 s^2 / n). s^2 is the variance over seeds, averaged over rows."""
    row = {"model": "noise"}
    for key in columns:
        found = [other[key] for other in rows if key in other]
        if found and found[0]["n"] > 1:                 # it is unknown from one seed
            s2 = mean(x["std"] ** 2 for x in found)
            row[key] = {"mean": 2 * math.sqrt(2 * s2 / found[0]["n"]), "std": None}
    return row


def table(rows, columns):
    """The lines of a Markdown table; the last one tells how large the noise is."""
    lines = [["model", *columns], ["-" * 13] * (len(columns) + 1)]
    for row in [*rows, noise(rows, columns)]:
        lines.append([row["model"], *(cell(key, row.get(key)) for key in columns)])
    return ["| " + " | ".join(text.ljust(13) for text in line) + " |" for line in lines]


def report(results):
    """The tables, yardsticks and warnings (see main) as lines of Markdown."""
    lines = [f"data {results['data']}, split {results['split']}, seeds {results['seeds']}"]
    for columns in TABLES:
        lines += ["", *table([row for row in results["rows"] if row["beta"] is None], columns)]
    lines += ["", *table([row for row in results["rows"] if row["beta"] is not None], SWEEP), ""]
    for name, x in results["yardsticks"].items():
        lines.append(f"- {name}: {cell(name, {'mean': x, 'std': None})}")
    return lines + results["stale"]


def draw_models(models, real, path):
    """Real images, their reconstructions and samples. models: {name: (model, row of the table)}."""
    indices, classes = data.one_of_each_class(real.labels)
    images, labels = real.images[indices], real.labels[indices]
    pictures, titles = [images], ["real images"]
    for name, (model, row) in models.items():
        for z in (draw_z(model, images, labels), torch.randn(len(labels), model.latent_dim)):
            pictures.append(decode(model, z, labels).sigmoid())
        titles += [f"{name}, recon {row['recon']:.1f} nats", f"samples, FID {row['fid_prior']:.2f}"]
    data.image_grid(torch.stack(pictures), path,        # (R, 10, 1, 28, 28)
                    "Of each model: reconstructions, and samples from N(0, I)", titles, classes)


def find_or_train(script, args, seed, dataset):
    """{beta, or None: path} of a script's checkpoints. What is missing is made, as by a command."""
    words = ["--data", dataset.source, "--out", f"{args.out}", "--device", args.device]
    words += ["--seed", f"{seed}", *(["--epochs", f"{args.epochs}"] if args.epochs else [])]
    wanted = script.FLAGS.parse_args(words)             # from these follow the names of the files
    if script is not beta_vae:
        path = data.run_path(wanted, dataset.source)
        return {None: path if path.exists() else script.main(words, dataset)}
    paths = {beta: data.run_path(wanted, dataset.source, f"-beta{beta}") for beta in wanted.betas}
    missing = [f"{beta}" for beta, path in paths.items() if not path.exists()]
    if missing:
        script.main([*words, "--betas", *missing], dataset)
    return paths


FLAGS = data.flags(__file__, __doc__)
FLAGS.add_argument("--seeds", type=data.at_least(0), nargs="+", default=[0])
FLAGS.add_argument("--epochs", type=data.at_least(1), help="of all trainings, for a trial")
FLAGS.add_argument("--split", choices=("test", "val"), default="test", help="val: for choices")
FLAGS.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: cuda or cpu")


def main(argv=None):
    """Train what is missing, measure, save, draw, print. Returns the path of the results."""
    args = FLAGS.parse_args(argv)
    dataset = data.load(args.data)
    images = getattr(dataset, f"{args.split}_images")
    labels = getattr(dataset, f"{args.split}_labels")
    resnet, _ = classifier.load_pretrained(data.pick_device(args.device))
    real = Real(images, labels, resnet, *classifier.look(resnet, images))
    torch.manual_seed(0)
    noise_features, _ = classifier.look(resnet, torch.rand_like(images))
    yardsticks = {                                      # what would be good, and what hopeless
        "entropy floor": data.pixel_entropy(images).mean().item(),
        "fid of halves of the images": frechet_distance(real.features[::2], real.features[1::2]),
        "fid of uniform noise": frechet_distance(real.features, noise_features),
        "control of real images": controllability(real.recognised, labels)}
    rows, models, stale = {}, {}, []                    # rows: {model: [a row for each seed]}
    checksum, seeds = data.checksum(dataset), sorted(set(args.seeds))
    for script in NAMES:
        for seed in seeds:
            for beta, path in find_or_train(script, args, seed, dataset).items():
                print(f"measuring {path}", flush=True)
                model, meta = script.load_model(path)
                now = {"code": script.FLAGS.get_default("code"), "training images": checksum,
                       "seed": seed, "beta": beta}
                for what in now:
                    if meta.get(what) != now[what]:
                        stale.append(f"- {path} was made with other {what}: delete it, run again")
                        print(stale[-1])
                row = measure(script, model, meta, dataset, real)
                rows.setdefault(row["model"], []).append(row)
                if script is not beta_vae:
                    models.setdefault(row["model"], (model, row))           # of the first seed
    results = {"data": dataset.source, "split": args.split, "seeds": seeds, "epochs": args.epochs,
               "device": str(resnet.mean.device), "torch": torch.__version__,
               "floor": yardsticks["entropy floor"], "yardsticks": yardsticks, "stale": stale,
               "rows": [average(rows[name]) for name in rows]}
    name = f"results-{dataset.source}-{args.split}-seeds{'-'.join(map(str, seeds))}"
    name += f"-epochs{args.epochs}" if args.epochs else ""
    path = data.write_file(args.out / f"{name}.json", json.dumps(results, indent=1).encode())
    draw_models(models, real, path.with_suffix(".png"))
    print("", *report(results), f"-> {path} and the picture {name}.png", sep="\n")
    return path


if __name__ == "__main__":
    data.run(main)
