"""Section 1: Fashion-MNIST, looked at before anything is trained on it.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747) is 70,000 images of clothes, 28 x 28
grey pixels each, in ten classes. We keep the pixels in [0, 1] and never standardise them, because
the loss of every VAE here is a binary cross-entropy, which needs targets in [0, 1]:

    BCE(x, p) = - sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]          nats per image

(The sum goes over the 784 pixels i, and a nat is the unit of the natural logarithm.) For grey
pixels even the perfect prediction p = x costs more than 0. This least cost is the pixel entropy,
BCE(x, x); its mean over the images is the entropy floor. The excess is recon minus this floor.

    python data.py            # takes seconds and writes two figures to runs/

You should see 55,000 / 5,000 / 10,000 images for training, validation and test, all ten classes
equally often, and half of all pixels exactly 0.
Try in Python: import data; images = data.load().test_images; data.pixel_entropy(images.round())
"""
import argparse
import gzip
import hashlib
import io
import os
import sys
import tempfile
import urllib.request
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# SHA-256 of the decompressed bytes: a mirror once served digit-MNIST under these names.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")      # apt install dataset-fashion-mnist
ASSETS = Path(__file__).resolve().parent / "assets"
# images: float32 (N, 1, 28, 28) in [0, 1]; labels: int64 (N,); source: "full" or "sample"
FashionMNIST = namedtuple("FashionMNIST", "train_images train_labels val_images val_labels "
                          "test_images test_labels source")


class UserError(ValueError):
    """A mistake that one line explains. On the command line, nothing but this line is printed."""


def pixel_entropy(images):
    """BCE(x, x), the least that any prediction can cost: (B, ...) -> (B,) nats per image."""
    x = images.flatten(1).float()
    return (torch.special.entr(x) + torch.special.entr(1 - x)).sum(1)   # entr: -x log x, 0 for 0


def split_indices(labels):
    """A fixed random split: (train, val) indices, with 500 images of each class in val."""
    rng = np.random.RandomState(0)      # which gives the same numbers in every version of numpy
    val = [rng.permutation(np.flatnonzero(labels == c))[:500] for c in range(len(CLASSES))]
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


def load(source="auto"):
    """The data set as a FashionMNIST. source: "full", "sample", or "auto": the full data set, or
    the sample if that cannot be had. A file that is there but wrong is always an error."""
    used = {"auto": "full", "full": "full", "sample": "sample"}[source]     # what is tried first
    try:
        arrays = read(used)
    except ConnectionError as error:
        if source == "full":
            raise UserError(f"{error}: get a network, or set FASHION_MNIST_DIR to a folder with it")
        print("\n!!! NO DATA SET, NO NETWORK: using the embedded SAMPLE (8,000 images) !!!\n")
        arrays, used = read("sample"), "sample"
    tensors = {"source": used}
    for split, (images, labels) in arrays.items():
        # / 255 and nothing else: the loss needs pixels in [0, 1]
        images = torch.from_numpy(images[:, None] / np.float32(255))        # (N, 1, 28, 28)
        tensors[f"{split}_images"] = images
        tensors[f"{split}_labels"] = torch.from_numpy(labels.astype(np.int64))      # (N,)
        floor = pixel_entropy(images).mean()
        print(f"data {used} {split}: {len(images):,} images, entropy floor {floor:.2f} nats")
    return FashionMNIST(**tensors)


def read(source):
    """{"train": (images, labels), "val": ..., "test": ...}, all uint8. What the full data set lacks
    is downloaded; ConnectionError if that cannot be."""
    if source == "sample":
        with np.load(ASSETS / "fashion-mnist-sample.npz") as file:
            return {split: (file[f"{split}_images"], file[f"{split}_labels"])
                    for split in ("train", "val", "test")}
    folders = [Path(os.environ.get("FASHION_MNIST_DIR", "fashion-mnist")), DEBIAN]
    arrays = []
    for name in FILES:
        places = [folder / f"{name}{end}" for folder in folders for end in (".gz", "")]
        found = [path for path in places if path.exists()]
        path = found[0] if found else download(name, folders[0])
        arrays.append(unpack(path.read_bytes(), name, path))
    images, labels, test_images, test_labels = arrays
    train, val = split_indices(labels)
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val]),
            "test": (test_images, test_labels)}


def download(name, folder):
    """Fetch one file from the first mirror that gives the right bytes; returns its path."""
    for mirror in MIRRORS:
        print(f"downloading {mirror}{name}.gz", file=sys.stderr)
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=10) as reply:
                raw = reply.read()
            unpack(raw, name, "the reply")              # an error unless it is what we want
        except Exception as error:  # whatever a network can do means the same: the next mirror
            print(f"no luck: {error}", file=sys.stderr)
        else:
            return write_file(folder / f"{name}.gz", raw)
    raise ConnectionError(f"no mirror could give {name}.gz")


def unpack(raw, name, where):
    """The bytes of a file, zipped or not, as an array; UserError unless they are those of name."""
    try:
        if raw.startswith(b"\x1f\x8b"):                 # so starts every gzip file
            raw = gzip.decompress(raw)
        if hashlib.sha256(raw).hexdigest() != FILES[name]:
            raise ValueError("wrong checksum")
    except Exception as error:  # OSError, EOFError or zlib.error: damaged all the same
        raise UserError(f"{where}: damaged, or other data ({error}); get it anew")
    if "images" in name:            # the IDX format: 16 bytes before images, 8 before labels
        return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.frombuffer(raw, np.uint8, offset=8)


# ================================================================ helpers that are not the lesson

def run(main):
    """Call main() for the command line, where a user's mistake or Ctrl-C ends in one line."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: what was saved is kept, the rest is lost")
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def at_least(low):
    """A type for argparse: finite numbers of the same kind as low, from low on."""
    def number(text):
        value = type(low)(text)
        if not low <= value < float("inf"):             # of nan, both comparisons are False
            raise argparse.ArgumentTypeError(f"{text}: choose a number from {low} on")
        return value
    return number


def flags(file, lesson, **defaults):
    """The flags of a script: --data and --out; and for a script that trains --device, --seed, and
    one for each setting in defaults, a whole number from 1 on or a float from 0 on."""
    parser = argparse.ArgumentParser(description=lesson, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("auto", "full", "sample"), default="auto",
                        help="full, the embedded sample, or auto: full if it can be had")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for output (runs)")
    if defaults:
        parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: cuda or cpu")
        parser.add_argument("--seed", type=at_least(0), default=0, help="of all random numbers (0)")
    for name, default in defaults.items():
        number = at_least(1) if isinstance(default, int) else at_least(0.0)
        parser.add_argument("--" + name.replace("_", "-"), type=number, default=default)
    # saved with each model, so that evaluate.py can tell if the file has changed since
    parser.set_defaults(script=Path(file).stem, code=Path(file).read_text(encoding="utf-8"),
                        defaults=defaults)
    return parser


def pick_device(name):
    """A torch.device on which a first tensor could be made; auto: CUDA if that works, else CPU."""
    try:
        return torch.zeros(1, device="cuda" if name == "auto" else name).device
    except (AssertionError, RuntimeError) as error:     # both mean that there is no such device
        if name != "auto":
            raise UserError(f"no device {name} here ({error}); choose cpu") from error
        return torch.device("cpu")


def run_path(args, source, end=""):
    """Where a script saves its model (end: which of several). Every setting that is not the default
    stands in the name, so that no trial replaces the real model."""
    try:                                                # now, and not after hours of training
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"--out: {error}") from error
    name = f"{args.script}{end}-{source}-seed{args.seed}"
    for setting, default in args.defaults.items():
        value = getattr(args, setting)
        if value != default:
            name += f"-{setting}{value}".replace("_", "-")
    return args.out / f"{name}.pt"


def print_test(metrics, dataset):
    """What test() found in the test images, with the excess over the entropy floor."""
    excess = metrics["recon"] - pixel_entropy(dataset.test_images).mean().item()
    print(f"test ({dataset.source}): recon {metrics['recon']:.2f} (excess {excess:.2f}),"
          f" KL {metrics['kl']:.2f}, total {metrics['total']:.2f} nats per image,"
          f" {metrics['active']} latents active; {metrics['seconds']:.0f} seconds")


def checksum(dataset):
    """The SHA-256 of all training images and labels: if one of them changes, it does, too."""
    digest = hashlib.sha256(dataset.train_images.cpu().contiguous().numpy())
    digest.update(dataset.train_labels.cpu().contiguous().numpy())
    return digest.hexdigest()


def save_checkpoint(path, args, dataset, metrics, state_dict, **more):
    """Save a model and how it was made: tensors, numbers and texts, as nothing else is loaded."""
    config = {name: getattr(args, name) for name in args.defaults}
    buffer = io.BytesIO()
    torch.save({"script": args.script, "code": args.code, "config": config, "seed": args.seed,
                "source": dataset.source, "training images": checksum(dataset),
                "metrics": metrics, "state_dict": state_dict, **more}, buffer)
    write_file(path, buffer.getvalue())


def write_file(path, content):
    """Write bytes under a temporary name, then rename: path is the old file or the new one, whole.
    If renaming fails, the new file is kept, and Python's error tells its name. Returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


def one_of_each_class(labels):
    """(indices, names): the first image of each class that occurs in labels (N,)."""
    classes = labels.unique().tolist()
    names = [CLASSES[c] if 0 <= c < 10 else str(c) for c in classes]
    return [int((labels == c).nonzero()[0]) for c in classes], names


def draw_grid(axes, images, title="", rows=(), columns=()):
    """Draw images (R, C, 28, 28) or (R, C, 1, 28, 28) in [0, 1], with names of rows and columns."""
    if not 0 <= images.min() <= images.max() <= 1:      # imshow would clip them without a word
        raise ValueError("pixels must lie in [0, 1] to be drawn: take the sigmoid of logits first")
    n_rows, n_columns = images.shape[:2]
    images = images.detach().cpu().reshape(n_rows, n_columns, 28, 28)
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)       # (R, C, 30, 30)
    lines = framed.transpose(1, 2)                      # (R, 30, C, 30): row, line, column, pixel
    canvas = lines.reshape(30 * n_rows, 30 * n_columns).numpy()
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, origin="upper", interpolation="nearest")
    axes.set_title(title)
    axes.set_yticks([30 * i + 15 for i in range(len(rows))], rows)
    axes.set_xticks([30 * i + 15 for i in range(len(columns))], columns, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def image_grid(images, path, title="", rows=(), columns=()):
    """Write images as draw_grid draws them into a file."""
    size = (0.6 * images.shape[1] + 1, 0.6 * images.shape[0] + 1)
    figure = Figure(size, dpi=90, layout="constrained")
    draw_grid(figure.add_subplot(), images, title, rows, columns)
    figure.savefig(path, bbox_inches="tight")


def plot_curves(history, path):
    """Recon and KL of training and validation against the epochs, from what train() returns."""
    figure = Figure((8, 3.2), dpi=120, layout="constrained")
    epochs = range(1, len(history) + 1)
    for i, name in enumerate(("recon", "kl"), 1):
        axes = figure.add_subplot(1, 2, i, xlabel="epoch", ylabel="nats per image", title=name)
        axes.plot(epochs, [h[name] for h in history], "o-", ms=3, label="training")
        axes.plot(epochs, [h[f"val_{name}"] for h in history], "s--", ms=3, label="validation")
        axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main(argv=None):
    """Load the data set, print what is in it, draw two figures. argv: flags, as a list of words."""
    args = flags(__file__, __doc__).parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    dataset = load(args.data)
    for split in ("train", "val", "test"):
        x, y = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        print(f"{split}: {y.bincount().min():,} to {y.bincount().max():,} images a class; pixels:"
              f" mean {x.mean():.4f}, std {x.std():.4f}, {(x == 0).float().mean():.1%} exactly 0;"
              f" one picture for all costs {pixel_entropy(x.mean(0, keepdim=True)).item():.2f}")
    x, y = dataset.train_images, dataset.train_labels
    ten_of_each = torch.stack([x[y == c][:10] for c in range(10)])          # (10, 10, 1, 28, 28)
    stem = f"{args.out}/data-{dataset.source}"
    image_grid(ten_of_each, f"{stem}-samples.png", "Ten of each class", CLASSES)
    figure = Figure((10, 3.4), dpi=120, layout="constrained")
    left = figure.add_subplot(1, 2, 1, title="Training images of each class")
    left.bar(range(10), y.bincount(minlength=10).numpy())
    left.set_xticks(range(10), CLASSES, rotation=30, ha="right")
    right = figure.add_subplot(1, 2, 2, xlabel="pixel value", title="Pixels of each grey value")
    right.hist(x.flatten().numpy(), bins=64, log=True)
    figure.savefig(f"{stem}-distributions.png", bbox_inches="tight")
    print(f"-> {stem}-samples.png and {stem}-distributions.png")


if __name__ == "__main__":
    run(main)
