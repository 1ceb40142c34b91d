"""Section 1: Fashion-MNIST, looked at before anything is trained on it.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747) is 70,000 images of clothes, 28 x 28
grey pixels each, in ten classes. We keep the pixels in [0, 1] and never standardise them, because
the loss of every VAE here is a binary cross-entropy, which needs targets in [0, 1]:

    BCE(x, p) = - sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]          nats per image

(The sum goes over the 784 pixels i, and a nat is the unit of the natural logarithm.) For grey
pixels even the perfect prediction p = x costs more than 0. This least cost is the pixel entropy,
BCE(x, x); its mean over the images is the entropy floor. The other scripts print the excess: their
cross-entropy minus this floor.

    python data.py            # takes seconds and writes two figures to runs/

You should see 55,000 / 5,000 / 10,000 images for training, validation and test, all ten classes
equally often, and half of all pixels exactly 0.
Try in Python: import data; images = data.load().test_images; data.pixel_entropy(images.round())
"""
import argparse
import functools
import gzip
import hashlib
import io
import os
import sys
import urllib.request
from collections import namedtuple
from pathlib import Path

import matplotlib.style
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
HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "assets" / "fashion-mnist-sample.npz"
FOLDERS = (Path("fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))  # ours, Debian's
# images: float32 (N, 1, 28, 28) in [0, 1]; labels: int64 (N,); source: "full" or "sample"
FashionMNIST = namedtuple("FashionMNIST", "train_images train_labels val_images val_labels "
                          "test_images test_labels source")


class UserError(ValueError):
    """A mistake that one line explains. On the command line it ends the program with code 2."""


def pixel_entropy(images):
    """BCE(x, x), the least that any prediction can cost: (B, ...) -> (B,) nats per image."""
    x = images.flatten(1)
    return (torch.special.entr(x) + torch.special.entr(1 - x)).sum(1)   # entr: -x log x, 0 for 0


def split_indices(labels):
    """A fixed random split: (train, val) indices, with 500 images of each class in val."""
    rng = np.random.RandomState(0)      # which gives the same numbers in every version of numpy
    val = [rng.permutation(np.flatnonzero(labels == c))[:500] for c in range(len(CLASSES))]
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


def load(source="auto"):
    """The data set as a FashionMNIST. source: "full", "sample", or "auto": the full data set, or
    the sample if that cannot be had (but never if FASHION_MNIST_DIR is set). A file that is there
    but wrong is an error."""
    if source not in ("auto", "full", "sample"):
        raise UserError(f"there is no data {source!r}: choose auto, full or sample")
    try:
        used = "sample" if source == "sample" else "full"
        arrays = read_sample() if used == "sample" else read_full()
    except ConnectionError as error:                    # an OSError, too: so it comes first
        if source == "full" or os.environ.get("FASHION_MNIST_DIR"):     # full was asked for
            raise UserError(f"{error}: get a network, or set FASHION_MNIST_DIR to a folder with it")
        print("!" * 80, "!! NO DATA SET, NO NETWORK: using the embedded SAMPLE (8,000 images)",
              "!" * 80, sep="\n", file=sys.stderr)
        arrays, used = read_sample(), "sample"
    except OSError as error:                            # a file is not there, or not readable
        raise UserError(f"{error}: put a readable file there")
    tensors = {"source": used}
    for split, (images, labels) in arrays.items():
        # / 255 and nothing else: the loss needs pixels in [0, 1]
        images = torch.from_numpy(images[:, None] / np.float32(255))        # (N, 1, 28, 28)
        tensors[f"{split}_images"] = images
        tensors[f"{split}_labels"] = torch.from_numpy(labels.astype(np.int64))      # (N,)
        floor = pixel_entropy(images).mean()
        print(f"data {used} {split}: {len(images):,} images, entropy floor {floor:.2f} nats")
    return FashionMNIST(**tensors)


def read_sample():
    """The embedded sample (MIT, Zalando SE; of each class 500 training, 100 validation and 200 test
    images): {"train": (images, labels), "val": …, "test": …}, all uint8."""
    with np.load(SAMPLE) as file:
        return {split: (file[f"{split}_images"], file[f"{split}_labels"])
                for split in ("train", "val", "test")}


def read_full():
    """The full data set like read_sample(), from $FASHION_MNIST_DIR if that is set, else FOLDERS.
    What is missing is downloaded; ConnectionError if that cannot be."""
    own = os.environ.get("FASHION_MNIST_DIR")
    folders = [Path(os.path.expanduser(own))] if own else FOLDERS
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
        url = f"{mirror}{name}.gz"
        print(f"downloading {url}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
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
    # the IDX format: a header of 16 bytes before images and of 8 before labels, then the numbers
    if "images" in name:
        return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.frombuffer(raw, np.uint8, offset=8)


# ================================================================ helpers that are not the lesson

LIMITS = {"epochs": (1, 9999), "batch_size": (1, 9999), "latent_dim": (1, 9999), "lr": (1e-8, 10),
          "seed": (0, 2**32 - 1), "seeds": (0, 2**32 - 1), "betas": (0, 1e6), "warmup": (0, 1)}
# what stands in the name of a file if it is not the default (data, seed and beta always do)
SETTINGS = ("epochs", "batch_size", "lr", "latent_dim", "warmup", "split")


def command(main):
    """Decorate main(): a user's mistake ends in one line with exit code 2, Ctrl-C with 130. The
    pictures are in matplotlib's default style, whatever the user's is."""
    @functools.wraps(main)
    def wrapped(*args, **more):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")    # not every console can print every letter
        try:
            with matplotlib.style.context("default"):
                return main(*args, **more)
        except KeyboardInterrupt:
            message, code = "interrupted: what was saved is kept, the rest is lost", 130
        except BrokenPipeError:                         # as in `python vae.py | head`
            os._exit(1)                                 # sys.exit would print more, and fail again
        except (UserError, FloatingPointError, OSError) as error:
            message, code = error, 2
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            message, code = "out of memory: close programs, or lower --batch-size, --latent-dim", 2
        print(f"error: {message}".replace("\n", " "), file=sys.stderr)
        sys.exit(code)
    return wrapped


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the lesson at the top of a script as it is, and the default of every flag."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line. Each script has the flags --data and --out."""

    def __init__(self, script, lesson):
        super().__init__(description=lesson, allow_abbrev=False, formatter_class=Help)
        self.set_defaults(script=script)                # becomes args.script
        self.add_argument("--data", choices=("auto", "full", "sample"), default="auto",
                          help="full, the embedded sample, or auto: full if it can be had")
        self.add_argument("--out", type=Path, default="runs", help="folder for output")

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def read_flags(parser, argv):
    """The flags of main(argv), checked; and args.code, the text of the script; args.settings, a
    dict of the SETTINGS; args.changes, a text of those that are not the default, for file names."""
    if argv is None and sys.argv[0].endswith("kernel_launcher.py"):
        argv = []                                       # in a notebook: sys.argv is of its kernel
    args = parser.parse_args(argv if argv is None else [str(word) for word in argv])
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name, None)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(low <= number <= high for number in numbers):
            raise UserError(f"--{name}: choose a number from {low} to {high}".replace("_", "-"))
    try:        # write an empty file now, so that no training fails at its end
        args.out = args.out.expanduser()
        probe = write_file(args.out / f"probe-{os.getpid()}", b"")
        probe.unlink()
    except (ValueError, RuntimeError) as error:         # (a UserError is a ValueError)
        raise UserError(f"--out: {error}")
    if "device" in args:
        args.device = pick_device(args.device)

    script = HERE / f"{args.script}.py"                 # not there if it was pasted into a notebook
    args.code = script.read_text(encoding="utf-8") if script.exists() else ""
    args.settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    args.changes = "".join(f"-{name}{value}".replace("_", "-")
                         for name, value in args.settings.items()
                         if value != parser.get_default(name))
    return args


def pick_device(name="auto"):
    """A torch.device that works; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # whatever torch says, this device cannot be used
        reason = str(error)[:80]
        raise UserError(f"no device {name} here ({reason}); choose --device auto or cpu")
    return torch.device(name)


def print_start(args, model):
    """The settings of a training and the size of its model."""
    parameters = sum(p.numel() for p in model.parameters())
    print(*(f"{name} {value}," for name, value in args.settings.items()),
          f"seed {args.seed}, device {args.device}, {parameters:,} parameters", flush=True)


def print_test(metrics, dataset, latent_dim):
    """What test() found in the test images, with the excess over the entropy floor."""
    excess = metrics["recon"] - pixel_entropy(dataset.test_images).mean().item()
    print(f"test ({dataset.source}): recon {metrics['recon']:.2f} (excess {excess:.2f}),"
          f" KL {metrics['kl']:.2f}, total {metrics['total']:.2f} nats per image")
    print(f"{metrics['active']} of {latent_dim} latents active; {metrics['seconds']:.0f} seconds")


def run_path(args, source, end=""):
    """Where a script saves its model (end: which of several). Every setting that is not the default
    stands in the name, so that no trial replaces the real model."""
    return args.out / f"{args.script}{end}-{source}-seed{args.seed}{args.changes}.pt"


def save_checkpoint(path, args, source, metrics, state_dict, **more):
    """Save tensors, numbers and texts only: load_model, with weights_only, refuses all else."""
    buffer = io.BytesIO()
    torch.save({"script": args.script, "code": args.code, "config": args.settings,
                "source": source, "seed": args.seed, "metrics": metrics,
                "state_dict": state_dict, **more}, buffer)
    write_file(path, buffer.getvalue())


def write_file(path, content):
    """Write bytes under another name, then rename: path is the old file or the new one, whole.
    Returns path."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
        return path
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make space, or choose another folder")
    finally:
        if os.path.isfile(temporary):                   # only after an error, or Ctrl-C
            os.unlink(temporary)


def load_model(path, script, make, device):
    """(trained model in eval mode, all that `script` saved in its checkpoint); UserError if it is
    unusable. make(config) gives a new model of the same size."""
    try:
        meta = torch.load(path, map_location="cpu", weights_only=True)
        if meta["script"] != script:
            raise ValueError(f"saved by {meta['script']}.py")
        model = make(meta["config"])
        model.load_state_dict(meta["state_dict"])
        if not all(weights.isfinite().all() for weights in model.state_dict().values()):
            raise ValueError("some weights are not finite")
    except Exception as error:  # absent, damaged, or something else, in whatever way
        reason = repr(error)[:300]
        raise UserError(f"{path}: no model of {script}.py to load ({reason}); run {script}.py")
    return model.eval().to(pick_device(device)), meta


def save_figure(figure, path):
    """Write a matplotlib figure, in the format that the name of the file asks for."""
    buffer, path = io.BytesIO(), Path(path).expanduser()
    figure.savefig(buffer, format=path.suffix[1:] or "png", bbox_inches="tight")
    write_file(path, buffer.getvalue())


def one_of_each_class(labels):
    """The index of the first image of each class that occurs in labels (N,), and its names."""
    classes = labels.unique().tolist()
    names = [CLASSES[c] if 0 <= c < 10 else str(c) for c in classes]
    return [int((labels == c).nonzero()[0]) for c in classes], names


def draw_grid(axes, images, title="", rows=(), columns=()):
    """Draw images (R, C, 28, 28) or (R, C, 1, 28, 28) in [0, 1], with names of rows and columns."""
    n_rows, n_columns = images.shape[:2]
    if images.shape[2:] not in ((28, 28), (1, 28, 28)):
        raise UserError(f"images have shape {tuple(images.shape)}: make it (rows, columns, 28, 28)")
    if not 0 <= images.min() <= images.max() <= 1:
        raise UserError("pixels must lie in [0, 1] to be drawn: take the sigmoid of logits first")
    images = images.detach().cpu().float().reshape(n_rows, n_columns, 28, 28)
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)       # (R, C, 30, 30)
    lines = framed.transpose(1, 2)                      # (R, 30, C, 30): row, line, column, pixel
    canvas = lines.reshape(30 * n_rows, 30 * n_columns)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
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
    save_figure(figure, path)


def plot_curves(history, path):
    """Recon and KL of training and validation against the epochs, from what train() returns."""
    figure = Figure((8, 3.2), dpi=120, layout="constrained")
    epochs = range(1, len(history) + 1)
    for i, name in enumerate(("recon", "kl"), 1):
        axes = figure.add_subplot(1, 2, i, xlabel="epoch", ylabel="nats per image", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot(epochs, [h[name] for h in history], "o-", ms=3, label="training")
        axes.plot(epochs, [h[f"val_{name}"] for h in history], "s--", ms=3, label="validation")
        axes.legend()
    save_figure(figure, path)


def plot_distributions(images, labels, path):
    """How often each class and each pixel value occur in training images (N, 1, 28, 28)."""
    figure = Figure((10, 3.4), dpi=120, layout="constrained")
    left = figure.add_subplot(1, 2, 1, ylabel="images", title="Classes: equally often")
    left.bar(range(10), labels.bincount(minlength=10).numpy())
    left.set_xticks(range(10), CLASSES, rotation=30, ha="right")
    pixels = images.flatten().numpy()
    right = figure.add_subplot(1, 2, 2, xlabel="pixel value", ylabel="share of pixels",
                               title=f"Pixels: {(pixels == 0).mean():.0%} are exactly black")
    right.hist(pixels, bins=64, weights=np.full(len(pixels), 1 / len(pixels)), log=True)
    save_figure(figure, path)


@command
def main(argv=None):
    """Load the data set, print what is in it, draw two figures. argv: flags, as a list of words."""
    args = read_flags(Parser("data", __doc__), argv)
    dataset = load(args.data)
    for split in ("train", "val", "test"):
        x, y = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        print(f"{split}: {y.bincount().min():,} to {y.bincount().max():,} images a class; pixels:"
              f" mean {x.mean():.4f}, std {x.std():.4f}, {(x == 0).float().mean():.1%} exactly 0")
    x, y = dataset.train_images, dataset.train_labels
    ten_of_each = torch.stack([x[y == c][:10, 0] for c in range(10)])       # (10, 10, 28, 28)
    image_grid(ten_of_each, args.out / "data-samples.png", "Ten of each class", CLASSES)
    plot_distributions(x, y, args.out / "data-distributions.png")
    print(f"-> {args.out}/data-samples.png and data-distributions.png")


if __name__ == "__main__":
    main()
