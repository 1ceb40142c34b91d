"""Section 6: every model is measured by the same rules, side by side.

Trains what is missing, and measures all models on the same test images, which no training and no
choice of settings has seen. A classifier (classifier.py) judges the images:

    fid        how far drawn images are from real ones, as sets; see frechet_distance
    control    the share of images in which the classifier recognises the class asked for
    diversity  how varied the images of a class are; 1 is as varied as real ones

Where does a bad image come from? We decode z of three sources, and measure the fid of each:

    fid_decoded   z of the test images: what is bad was lost in z, or by the decoder
    fid_prior     z from N(0, I): what is added is due to holes, where no real image has its z
    fid_ex_post   z from a mixture of Gaussians, fitted to real z: its draws avoid many holes

    python evaluate.py      # 20 to 30 minutes on two CPU cores; a second call only measures again

You should see (full data, seed 0) that the Conv VAE has a smaller total than the MLP VAE, that for
both fid_prior > fid_ex_post > fid_decoded, and a control_prior of the CVAE of 87 %.
Try: --data sample --epochs 3 --out try. What limits the Conv VAE, reconstructions or the prior?
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

NAMES = {vae: "MLP VAE", conv_vae: "Conv VAE", beta_vae: "β-VAE", cvae: "CVAE"}
# real images, their labels, the classifier, its features of them (N, 256), its classes (N,)
Real = namedtuple("Real", "images labels resnet features recognised")


def is_conditional(model):
    """Is this a model that is told the label? For all others, labels are ignored below."""
    return isinstance(model, cvae.CVAE)


@torch.no_grad()
def encode(model, images, labels):
    """(mu, logvar), each (N, latent_dim), of images (N, 1, 28, 28), labels (N,)."""
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    return model.encode(images, labels) if is_conditional(model) else model.encode(images)


def draw_z(model, images, labels):
    """A draw of z from q(z | x) for each image, (N, latent_dim)."""
    mu, logvar = encode(model, images, labels)
    return model.reparameterize(mu, logvar)


@torch.no_grad()
def decode(model, z, labels):
    """The logits (N, 1, 28, 28) of z (N, latent_dim), labels (N,)."""
    device = next(model.parameters()).device
    z, labels = z.to(device), labels.to(device)
    return model.decode(z, labels) if is_conditional(model) else model.decode(z)


# ---------------------------------------------------------------- the metrics

def frechet_distance(features_a, features_b):
    """The FID of two sets of images from the classifier's features of them, (N, D) and (M, D): the
    squared Fréchet distance of the Gaussians fitted to them, 0 if these are equal (Heusel et al.
    2017, arXiv:1706.08500, eq. 6; they take other features, so their numbers do not compare).

        FID  =  |m_a - m_b|^2  +  tr( S_a + S_b - 2 (S_a S_b)^1/2 )

    m: mean, S: covariance, tr: sum of the diagonal. Of one feature with standard deviation s, this
    is (m_a - m_b)^2 + (s_a - s_b)^2. UserError unless N, M > D: fewer cannot determine S."""
    for features in (features_a, features_b):
        if len(features) <= features.shape[1] or not features.isfinite().all():
            raise data.UserError(f"features {tuple(features.shape)}: give more images, all finite")
    a, b = features_a.double(), features_b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)                                   # (D,)
    cov_a = (a - mean_a).T @ (a - mean_a) / (len(a) - 1)                    # (D, D)
    cov_b = (b - mean_b).T @ (b - mean_b) / (len(b) - 1)
    # The root of C is the matrix R with R R = C. The eigenvalues of R are the roots of those of C,
    # and a trace is the sum of eigenvalues. cov_a cov_b has those of cov_a^1/2 cov_b cov_a^1/2, a
    # symmetric matrix like a covariance: they are real and never negative, but for rounding.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)     # (D,)
    of_covariances = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, ((mean_a - mean_b).pow(2).sum() + of_covariances).item())


def controllability(recognised, asked):
    """The share of images whose recognised class is the class asked for. Both are (N,)."""
    return (recognised == asked).double().mean().item()


def diversity(features, labels, real_features, real_labels):
    """The mean distance between the features (N, D) of two drawn images of a class, over that of
    two real ones; averaged over the classes. 1: as varied as real images, 0: one image a class."""
    ratios = []
    for c in real_labels.unique():
        drawn, real = features[labels == c], real_features[real_labels == c]
        distance = torch.pdist(drawn).mean().item() if len(drawn) > 1 else 0.0
        ratios.append(distance / torch.pdist(real).mean().item())
    return mean(ratios)


def importance_weighted_bound(model, images, labels, draws):
    """An upper bound on -log p(x) (of a CVAE: -log p(x | y)), in nats, averaged over images, from
    the importance weights w of K draws of z (Burda et al. 2016, arXiv:1509.00519, eq. 8):

        -log p(x)  <=  -E[ log( 1/K sum_k w_k ) ],    w = p(x | z) p(z) / q(z | x),  z ~ q(z | x)

    E[w] is the integral p(x), and the rest is Jensen's inequality. K = 1 gives the negative ELBO. A
    mean of more weights varies less, so Jensen's inequality loses less: the bound is tighter."""
    mu, logvar = encode(model, images, labels)
    log_w = []
    for _ in range(draws):
        z = model.reparameterize(mu, logvar)                                # (N, latent_dim)
        recon, _ = vae.elbo_terms(decode(model, z, labels), images.to(z.device), mu, logvar)
        # the logs of two normal densities, both without their - D/2 log 2 pi, which cancels
        log_prior = -0.5 * z.pow(2).sum(1)                                  # (N,)
        log_q = -0.5 * ((z - mu).pow(2) / logvar.exp() + logvar).sum(1)     # (N,)
        log_w.append(-recon + log_prior - log_q)
    log_mean_w = torch.stack(log_w).cpu().double().logsumexp(dim=0) - math.log(draws)
    return -log_mean_w.mean().item()


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
        constant = len(centre) / 2 * math.log(2 * math.pi)
        rows.append(weight.log() - 0.5 * u.pow(2).sum(0) - log_det - constant)
    return torch.stack(rows)


def fit_gmm(z, components, iterations=100, ridge=1e-3):
    """A mixture of K Gaussians for z (N, D): weights (K,), means (K, D), factors (K, D, D).
    EM (Bishop 2006, section 9.2.2) guesses in turn which component made each point, and fits each
    component to its points. The ridge keeps covariances invertible."""
    added = ridge * torch.eye(z.shape[1], dtype=z.dtype)                    # (D, D)
    # each component starts at one of the points, and as wide as all z
    weights = torch.full((components,), 1 / components, dtype=z.dtype)
    means = z[torch.randperm(len(z))[:components]]
    covariances = (z.var(0).diag() + added).repeat(components, 1, 1)
    for _ in range(iterations):
        # E step: how likely is it that component k made point n? Its responsibility
        logs = log_joint(z, weights, means, torch.linalg.cholesky(covariances))
        responsibility = logs.softmax(dim=0)            # (K, N), by Bayes: exp(logs) over its sum
        # M step: fit each component anew to the points, weighted by its responsibility
        counts = responsibility.sum(1).clamp(min=1e-6)  # (K,), never 0: we divide by it
        weights = counts / counts.sum()
        means = responsibility @ z / counts[:, None]
        for k in range(components):
            centred = z - means[k]                                          # (N, D)
            weighted = responsibility[k][:, None] * centred                 # (N, D)
            covariances[k] = weighted.T @ centred / counts[k] + added       # (D, D)
    return weights, means, torch.linalg.cholesky(covariances)


def sample_gmm(mixture, count):
    """Draws (count, D) from a mixture that fit_gmm fitted: choose a component, draw from it."""
    weights, means, factors = mixture
    k = torch.multinomial(weights, count, replacement=True)                 # (count,)
    eps = torch.randn(count, means.shape[1], 1, dtype=means.dtype)          # (count, D, 1)
    return means[k] + (factors[k] @ eps).squeeze(2)                         # cov of L eps: L L^T


def sample_ex_post_prior(model, labels, dataset):
    """z (N, latent_dim) from the ex-post prior (Ghosh et al. 2020, arXiv:1903.12436), which is made
    after training: 50 Gaussians, fitted to one z of each training image. For a CVAE, it is one
    Gaussian for each class, since its z are decoded for a class."""
    real_z = draw_z(model, dataset.train_images, dataset.train_labels).cpu()
    if not is_conditional(model):
        return sample_gmm(fit_gmm(real_z, components=50), len(labels))
    z = torch.empty(len(labels), model.latent_dim)
    for c in labels.unique():
        # with a single Gaussian, all points belong to it, and the first iteration finds it
        gaussian = fit_gmm(real_z[dataset.train_labels == c], components=1, iterations=1)
        z[labels == c] = sample_gmm(gaussian, int((labels == c).sum()))
    return z


def look_at(source, model, z, labels, real):
    """What the classifier sees in images decoded from z: (features (N, 256), classes (N,))."""
    print(f"measuring images from {source}", flush=True)
    return classifier.look(real.resnet, decode(model, z, labels).sigmoid())


def measure(script, model, meta, dataset, real):
    """Measure a model that script (a module) made; meta is the rest of its checkpoint. Returns a
    dict. Each measurement has its own seed, so that none of them changes another."""
    beta = meta.get("beta")                             # None, except in section 4
    row = {"model": NAMES[script] if beta is None else f"{NAMES[script]} β={beta:g}", "beta": beta,
           "latent_dim": model.latent_dim, "params": sum(p.numel() for p in model.parameters()),
           "seconds": meta["metrics"]["seconds"]}
    torch.manual_seed(meta["seed"])                     # the seed of the script's own test
    if is_conditional(model):
        row |= script.test(model, real.images, real.labels)
    else:
        row |= script.test(model, real.images)
    row["excess"] = row["recon"] - data.pixel_entropy(real.images).mean().item()
    torch.manual_seed(1)
    z = torch.randn(len(real.labels), model.latent_dim)
    features, seen = look_at("the prior", model, z, real.labels, real)
    row["fid_prior"] = frechet_distance(features, real.features)
    if is_conditional(model):
        row["control_prior"] = controllability(seen, real.labels)
        # of recognised images only, since wrong classes would count as variety
        right, real_right = seen == real.labels, real.recognised == real.labels
        row["diversity_prior"] = diversity(features[right], real.labels[right],
                                           real.features[real_right], real.labels[real_right])
    if script is beta_vae:                              # the question of section 4 is another one
        found = beta_vae.analyse(model.cpu(), real.images)
        return row | {"gap": found["gap"], "difference": found["difference"]}
    torch.manual_seed(2)
    z = sample_ex_post_prior(model, real.labels, dataset)
    features, _ = look_at("the ex-post prior", model, z, real.labels, real)
    row["fid_ex_post"] = frechet_distance(features, real.features)
    torch.manual_seed(3)
    z = draw_z(model, real.images, real.labels)
    features, seen = look_at("the z of real images", model, z, real.labels, real)
    row["fid_decoded"] = frechet_distance(features, real.features)
    row["control_decoded"] = controllability(seen, real.labels)
    if is_conditional(model):
        torch.manual_seed(4)
        other = (real.labels + torch.randint(1, 10, (len(z),))) % 10        # never the same class
        _, seen = look_at("the z of real images, in other classes", model, z, other, real)
        row["control_swap"] = controllability(seen, other)
    torch.manual_seed(5)
    print("measuring the importance-weighted bound", flush=True)
    row["iw_10"] = importance_weighted_bound(model, real.images, real.labels, draws=10)
    return row


# ---------------------------------------------------------------- the tables

SIZE = ["model", "latent_dim", "params", "seconds"]
MAIN = ["model", "active", "recon", "excess", "kl", "total", "iw_10"]
IMAGES = ["model", "fid_prior", "fid_ex_post", "fid_decoded"]
CONTROL = ["model", "control_prior", "control_swap", "control_decoded", "diversity_prior"]
SHARES = ["control_prior", "control_swap", "control_decoded", "control of real images"]
SWEEP = ["model", "active", "recon", "kl", "total", "fid_prior", "gap", "difference"]


def average(rows):
    """One row from those of a model under several seeds: their mean, std (over n - 1) and n."""
    averaged = dict(rows[0])
    for key in rows[0]:
        values = [row[key] for row in rows]
        if len(rows) > 1 and key not in ("model", "beta", "latent_dim", "params"):
            averaged[key] = {"mean": mean(values), "std": stdev(values), "n": len(values)}
    return averaged


def cell(key, value):
    """The text of one number in a table: SHARES in percent, others with two decimals."""
    if value is None:
        return "–"                                      # does not apply
    if isinstance(value, dict):
        # float, as a mean of type int would be printed without decimals
        return f"{cell(key, float(value['mean']))}±{cell(key, float(value['std']))}"
    if isinstance(value, float):
        return f"{value:.1%}" if key in SHARES else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def noise(rows, key):
    """By how much single trainings of two equally good models may differ by chance: two standard
    deviations of their difference, whose variance is s^2 + s^2 (s^2 is that of the seeds, averaged
    over the rows). Means of n trainings differ less, by a factor of the root of n."""
    variances = [row[key]["std"] ** 2 for row in rows if isinstance(row.get(key), dict)]
    return 2 * math.sqrt(2 * mean(variances)) if variances else None    # unknown from one seed


def table(rows, columns):
    """The lines of a Markdown table; the last one tells how large the noise is."""
    lines = [columns] + [[cell(key, row.get(key)) for key in columns] for row in rows]
    lines.append(["noise"] + [cell(key, noise(rows, key)) for key in columns[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return [f"| {' | '.join(line)} |" for line in padded]


def report(results):
    """The tables, yardsticks and warnings (see main) as lines of Markdown."""
    lines = [f"data {results['data']}, split {results['split']}, seeds {results['seeds']}"]
    main_rows = [row for row in results["rows"] if row["beta"] is None]
    sweep = [row for row in results["rows"] if row["beta"] is not None]
    for rows, columns in ((main_rows, MAIN), (main_rows, IMAGES), (main_rows, CONTROL),
                          (sweep, SWEEP), (main_rows, SIZE)):
        lines += ["", *table(rows, columns)]
    yardsticks = [f"- {name}: {cell(name, x)}" for name, x in results["yardsticks"].items()]
    return [*lines, "", *yardsticks, *results["stale"]]


def draw_models(models, real, path):
    """Test images, their reconstructions and samples. models: {name: (model, row of the table)}."""
    torch.manual_seed(0)
    first, classes = data.one_of_each_class(real.labels)
    images, labels = real.images[first], real.labels[first]
    pictures, titles = [images], ["test images"]
    for name, (model, row) in models.items():
        z = draw_z(model, images, labels)
        pictures.append(decode(model, z, labels).sigmoid().cpu())
        titles.append(f"{name}, recon {row['recon']:.1f} nats")
        pictures.append(decode(model, torch.randn(z.shape), labels).sigmoid().cpu())
        titles.append(f"samples, FID {row['fid_prior']:.2f}")
    data.image_grid(torch.stack(pictures), path,        # (R, 10, 1, 28, 28)
                    "Of each model: reconstructions, and samples from N(0, I)", titles, classes)


def find_or_train(script, args, seed, dataset):
    """(paths of a script's checkpoints, its text). If one is missing, the script is run now."""
    epochs = args.epochs or script.flags().get_default("epochs")
    argv = ["--data", dataset.source, "--seed", seed, "--epochs", epochs, "--device", args.device,
            "--out", args.out]
    wanted = data.read_flags(script.flags(), argv)      # from these follow the names of the files
    ends = [f"-beta{beta}" for beta in beta_vae.BETAS] if script is beta_vae else [""]
    paths = [data.run_path(wanted, dataset.source, end) for end in ends]
    if not all(path.exists() for path in paths):
        script.main(argv, dataset=dataset)
    return paths, wanted.code


@data.command
def main(argv=None):
    """Train what is missing, measure, save, print, draw. argv: a list of flags, or None for those
    of the command line. Returns the path of the results."""
    parser = data.Parser("evaluate", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--epochs", type=int, help="of all trainings, for a trial")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: for choices")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = data.read_flags(parser, argv)
    dataset = data.load(args.data)
    resnet, _ = classifier.load_pretrained(args.device)
    images = getattr(dataset, f"{args.split}_images")
    labels = getattr(dataset, f"{args.split}_labels")
    print("measuring the real images", flush=True)
    features, recognised = classifier.look(resnet, images)
    real = Real(images, labels, resnet, features, recognised)
    torch.manual_seed(0)
    uniform, _ = classifier.look(resnet, torch.rand_like(images))
    yardsticks = {                                      # what would be good, and what hopeless
        "entropy floor": data.pixel_entropy(images).mean().item(),
        "fid of halves of the images": frechet_distance(real.features[::2], real.features[1::2]),
        "fid of uniform noise": frechet_distance(real.features, uniform),
        "control of real images": controllability(real.recognised, labels)}
    seeds = sorted(set(args.seeds))
    rows, models = {}, {}                               # rows: {model: [a row for each seed]}
    differences, stale = [], []
    for script in NAMES:
        for seed in seeds:
            paths, code = find_or_train(script, args, seed, dataset)
            for path in paths:
                print(f"\n{path}", flush=True)
                model, meta = script.load_model(path, args.device)
                if meta.get("code") != code:
                    stale.append(f"- {path} was trained by another version of {script.__name__}.py:"
                                 " if more than a comment changed, delete it and run again")
                    print(stale[-1], flush=True)
                row = measure(script, model, meta, dataset, real)
                rows.setdefault(row["model"], []).append(row)
                if script is beta_vae:
                    differences.append(row["difference"])
                else:
                    models.setdefault(row["model"], (model, row))           # of the first seed
    # over all betas and seeds: are latents better than their random mixtures?
    yardsticks["difference of all β-VAEs: gap minus rotated gap"] = {
        "mean": mean(differences), "std": stdev(differences), "n": len(differences)}
    results = {"data": dataset.source, "split": args.split, "seeds": seeds, "epochs": args.epochs,
               "device": str(args.device), "torch": str(torch.__version__),
               "date": time.strftime("%Y-%m-%d"), "floor": yardsticks["entropy floor"],
               "yardsticks": yardsticks, "rows": [average(rows[name]) for name in rows],
               "stale": stale}
    print("", *report(results), sep="\n")
    numbers = "-".join(str(seed) for seed in seeds)
    path = args.out / f"results-{dataset.source}-seeds{numbers}{args.changes}.json"
    data.write_file(path, json.dumps(results, indent=1).encode())
    draw_models(models, real, path.with_suffix(".png"))
    print(f"-> {path} and the picture {path.stem}.png")
    return path


if __name__ == "__main__":
    main()
