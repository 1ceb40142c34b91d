"""Section 1: Fashion-MNIST, looked at before anything is trained on it.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747) is 70,000 images of clothes, 28 x 28
grey pixels each, in ten classes. We keep the pixels in [0, 1] and never standardise them, because
the loss of every VAE here is a binary cross-entropy, which needs targets in [0, 1]:

    BCE(x, p) = - sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]          nats per image

For grey pixels even the perfect prediction p = x costs more than 0: the pixel entropy, BCE(x, x).
Its mean over the images is the entropy floor; the other scripts print how far above it they are.

    python data.py            # takes seconds and writes two figures to runs/

You should see 55,000 / 5,000 / 10,000 images for training, validation and test, all ten classes
equally often, and half of all pixels exactly 0. Try: what is the floor of `images.round()`?
"""
import argparse
import gzip
import hashlib
import io
import os
import sys
import time
import urllib.request
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
try:
    from matplotlib.figure import Figure
except ValueError:  # $MPLBACKEND names what is not installed here; our pictures need no backend
    del os.environ["MPLBACKEND"]
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        del sys.modules[name]                           # what was imported by half
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
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
FOLDERS = (Path("fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))  # ours, Debian's
SAMPLE = Path(__file__).resolve().parent / "assets" / "fashion-mnist-sample.npz"
# images: float32 (N, 1, 28, 28) in [0, 1]; labels: int64 (N,); source: "full" or "sample"
FashionMNIST = namedtuple("FashionMNIST", "train_images train_labels val_images val_labels "
                          "test_images test_labels source")


class UserError(ValueError):
    """A mistake that one line explains. On the command line it ends the program with code 2."""


def pixel_entropy(images):
    """BCE(x, x), the least that any prediction can reach: (B, ...) -> (B,) nats per image."""
    x = images.flatten(1)
    return -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1)


def unpack(raw, name, where):
    """The bytes of a file, zipped or not, as an array; UserError unless they are those of name."""
    try:
        if raw.startswith(b"\x1f\x8b"):                 # so starts every gzip file
            raw = gzip.decompress(raw)
        if hashlib.sha256(raw).hexdigest() != FILES[name]:
            raise ValueError("wrong checksum")
    except Exception as error:  # OSError, EOFError or zlib.error: damaged all the same
        raise UserError(f"{where}: damaged, or other data ({error}); get it anew")
    # IDX format: 0, 0, type (8 = uint8), number of axes; then the size of each axis; then the data
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def download(name, folder):
    """Fetch one file from the first mirror that gives the right bytes; OSError if none does."""
    for mirror in MIRRORS:
        url = f"{mirror}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                print(f"downloading {url}", file=sys.stderr)
                raw = reply.read()
            unpack(raw, name, "the reply")
        except Exception as error:  # whatever a network can do means the same: the next mirror
            print(f"no luck with {url}: {error}", file=sys.stderr)
        else:
            return write_file(folder / f"{name}.gz", raw)
    raise OSError(f"no mirror could give {name}.gz")


def find_file(folder, name):
    """The path of a file in a folder, zipped or unzipped; None if neither is there."""
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)


def read_full():
    """Six uint8 arrays, from $FASHION_MNIST_DIR if that is set, else from the first of FOLDERS that
    holds all files, else downloaded into ./fashion-mnist; OSError if that cannot be."""
    own = os.environ.get("FASHION_MNIST_DIR")
    folders = [Path(os.path.expanduser(own))] if own else FOLDERS
    complete = [folder for folder in folders if all(find_file(folder, name) for name in FILES)]
    folder, arrays = (complete or folders)[0], []
    missing = [name for name in FILES if find_file(folder, name) is None]
    if own and 0 < len(missing) < len(FILES):
        raise UserError(f"{folder / missing[0]}.gz: missing; put it there, or name an empty folder")
    for name in FILES:
        if name in missing:
            download(name, folder)
        path = find_file(folder, name)
        try:
            arrays.append(unpack(path.read_bytes(), name, path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; put a readable file there")
    x, y, x_test, y_test = arrays
    train, val = split_indices(y)
    return [x[train], y[train], x[val], y[val], x_test, y_test]


def split_indices(labels):
    """Stratified split with a fixed seed: (train, val) indices, 500 images of each class in val."""
    rng = np.random.RandomState(0)  # its stream is frozen: the same split in every numpy version
    val = [rng.permutation(np.flatnonzero(labels == c))[:500] for c in range(len(CLASSES))]
    return np.setdiff1d(np.arange(len(labels)), val), np.sort(np.concatenate(val))


def read_sample():
    """The embedded sample (MIT, Zalando SE): the first 500 / 100 / 200 images of each class."""
    try:
        with np.load(SAMPLE) as file:
            return [file[field] for field in FashionMNIST._fields[:6]]
    except Exception as error:  # absent, or damaged in whatever way numpy and zip can tell
        raise UserError(f"{SAMPLE}: unusable ({error}); restore it from where this file came")


def load(source="auto"):
    """The data set as a FashionMNIST. source: "full", "sample", or "auto": the full data set, and
    the sample only if the full one cannot be had. A file that is there but wrong is a UserError."""
    try:
        used, arrays = ("sample", read_sample()) if source == "sample" else ("full", read_full())
    except OSError as error:
        if source == "full" or os.environ.get("FASHION_MNIST_DIR"):
            raise UserError(f"{error}: get a network, or set FASHION_MNIST_DIR to their folder")
        print("!" * 80, "!! NO DATA SET, NO NETWORK: using the embedded SAMPLE (8,000 images)",
              "!" * 80, sep="\n", file=sys.stderr)
        used, arrays = "sample", read_sample()
    tensors = []
    for split, images, labels in zip(("train", "val", "test"), arrays[::2], arrays[1::2]):
        # / 255 and nothing else: the loss needs pixels in [0, 1]
        images = torch.from_numpy(images[:, None] / np.float32(255))        # (N, 1, 28, 28)
        labels = torch.from_numpy(labels.astype(np.int64))                  # (N,)
        tensors += [images, labels]
        floor = pixel_entropy(images).mean()
        print(f"data {used} {split}: {len(images):,} images, entropy floor {floor:.2f} nats")
    return FashionMNIST(*tensors, used)


# ================================================================ helpers that are not the lesson

def command(main):
    """Decorate main(argv): a user's mistake ends in one line with exit code 2, Ctrl-C with 130."""
    def wrapped(argv=None, **more):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")    # not every console can print every letter
        try:
            if argv is None and sys.argv[0].endswith("kernel_launcher.py"):
                argv = []                               # main() in a notebook: its flags, not ours
            if isinstance(argv, str) or not all(isinstance(word, str) for word in argv or ()):
                raise UserError('main() takes a list of words, such as main(["--epochs", "3"])')
            if torch.get_default_dtype() != torch.float32:
                raise UserError("call torch.set_default_dtype(torch.float32) first: images have it")
            return main(argv, **more)
        except KeyboardInterrupt:
            message, code = "interrupted: this training is lost, finished models are kept", 130
        except BrokenPipeError:                         # as in `python vae.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (UserError, FloatingPointError, OSError) as error:   # OSError: of print()
            message, code = error, 2
        print(f"error: {message}".replace("\n", " "), file=sys.stderr)
        sys.exit(code)
    return wrapped


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the lesson at the top of a script as it is, and the default of every flag."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line. Each script has the flags --data and --out."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Help)
        self.add_argument("--data", choices=("auto", "full", "sample"), default="auto",
                          help="full, the embedded sample, or auto: full if it can be had")
        self.add_argument("--out", type=Path, default="runs", help="folder for output")

    def error(self, message):
        raise UserError(f"{message} (see --help)")


LIMITS = {"epochs": (1, 10_000), "batch_size": (1, 10_000), "latent_dim": (1, 10_000),
          "lr": (1e-8, 10), "seed": (0, 2**32 - 1), "seeds": (0, 2**32 - 1), "betas": (0, 1e6),
          "warmup_epochs": (0, 10_000), "weight_decay": (0, 10)}


def check_flags(args):
    """UserError for a number out of its limits or given twice, or an --out that is not writable."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name, None)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(low <= number <= high for number in numbers):
            raise UserError(f"--{name.replace('_', '-')}: choose a number from {low} to {high}")
        if len(set(numbers)) < len(numbers) or len(numbers) > 16:
            raise UserError(f"--{name}: name each number once, and at most 16")
    try:
        args.out = args.out.expanduser()
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise OSError("not writable")
    except (OSError, ValueError, RuntimeError) as error:    # as of a zero byte, of ~nobody
        raise UserError(f"--out {args.out}: {error}; choose another folder")


def settings(args):
    """The flags that decide what a training computes, except data and seed: {"epochs": 18, ...}."""
    others = "data", "out", "device", "seed", "seeds", "betas", "train_only"
    return {name: value for name, value in vars(args).items() if name not in others}


def run_name(start, parser, args):
    """start, then every setting that is not its default, so that no trial replaces the real run."""
    for name, value in settings(args).items():
        if value != parser.get_default(name):
            start += f"-{name.replace('_', '-')}{value}"
    return start


def pick_device(name="auto"):
    """A torch.device that works; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # whatever torch says, this device cannot be used
        raise UserError(f"no device {name} here ({error!s:.80}); choose --device auto or cpu")
    return torch.device(name)


def pick_bf16(choice, device):
    """Whether to train in bfloat16; "auto": if matrix products are 1.5 times as fast in it."""
    if choice != "auto" or device.type == "mps":
        return choice == "on"
    seconds = []
    for dtype in 2 * (torch.float32, torch.bfloat16):   # the first time warms up
        matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
        start = time.perf_counter()
        (matrix @ matrix @ matrix @ matrix)[0, 0].item()        # item() waits for a GPU
        seconds.append(time.perf_counter() - start)
    return seconds[-2] > 1.5 * seconds[-1]              # of float32, of bfloat16


def write_file(path, content):
    """Write bytes under another name, then rename: path is the old file or the new one, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make space, or set --out or FASHION_MNIST_DIR")
    finally:
        if os.path.isfile(temporary):                   # only after an error, or Ctrl-C
            os.unlink(temporary)


def save_checkpoint(path, **contents):
    """Save tensors, numbers and strings, so that read_checkpoint can refuse everything else."""
    buffer = io.BytesIO()
    torch.save(contents | {"torch": str(torch.__version__)}, buffer)
    write_file(path, buffer.getvalue())


def read_checkpoint(path, script):
    """The dict that `script` saved in a checkpoint; UserError if it is no such file."""
    try:
        meta = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: meta[name] for name in ("script", "config", "source", "seed", "metrics")}
    except Exception as error:  # absent, damaged, or no checkpoint of ours, in whatever way
        raise UserError(f"{path}: not usable ({error!s:.80}); restore it, or rerun {script}.py")
    if found["script"] != script:
        raise UserError(f"{path}: made by {found['script']}.py, not by {script}.py")
    return meta


def load_weights(model, meta, path):
    """model with the weights of a checkpoint, in eval mode; UserError if they do not fit it."""
    try:
        model.load_state_dict(meta["state_dict"])
        usable = all(value.isfinite().all() for value in model.state_dict().values())
    except Exception:  # other names, other shapes, or whatever else may lie there
        usable = False
    if not usable:
        wanted, found = set(model.state_dict()), set(meta.get("state_dict", ()))
        missing, unknown = min(wanted - found, default="none"), min(found - wanted, default="none")
        raise UserError(f"{path}: weights that do not fit, or are not finite (missing {missing},"
                        f" unknown {unknown}): rename them, or train the model again")
    return model.eval()


def save_figure(figure, path):
    """Write a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight")
    write_file(Path(path), buffer.getvalue())


def one_of_each_class(labels):
    """The index of the first image of each class that occurs in labels (N,), and its names."""
    classes = labels.unique().tolist()
    return [int((labels == c).nonzero()[0]) for c in classes], [CLASSES[c] for c in classes]


def draw_grid(axes, images, title="", rows=(), columns=()):
    """Draw images (R, C, 28, 28) in [0, 1] into a matplotlib axes, rows and columns labelled."""
    if not 0 <= images.min() <= images.max() <= 1:
        raise UserError("pixels must lie in [0, 1] to be drawn: take the sigmoid of logits first")
    height, width = images.shape[:2]
    framed = torch.nn.functional.pad(images.detach().cpu(), (1, 1, 1, 1), value=1.0)  # white seams
    canvas = framed.transpose(1, 2).reshape(height * 30, width * 30)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_yticks([30 * i + 15 for i in range(len(rows))], rows)
    axes.set_xticks([30 * i + 15 for i in range(len(columns))], columns, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def image_grid(images, path, title="", rows=(), columns=()):
    """Write images (R, C, 28, 28) in [0, 1] as one picture with labelled rows and columns."""
    height, width = images.shape[:2]
    inch = 9 / max(width, 15)                           # of one image: all letters equally large
    figure = Figure((inch * width + 1, inch * height + 1), 51 / inch, layout="constrained")
    draw_grid(figure.add_subplot(), images, title, rows, columns)
    save_figure(figure, path)


def plot_curves(history, path):
    """Recon and KL of training and validation against the epochs, from what train() returns."""
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    epochs = range(1, len(history) + 1)
    for i, name in enumerate(("recon", "kl"), 1):
        axes = figure.add_subplot(1, 2, i, xlabel="epoch", ylabel="nats per image", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot(epochs, [h[name] for h in history], "o-", ms=3, label="training")
        axes.plot(epochs, [h[f"val_{name}"] for h in history], "s--", ms=3, label="validation")
        axes.legend()
    save_figure(figure, path)


# ================================================================ run directly: exploration

def plot_distributions(images, labels, path):
    """How often each class and each pixel value occur in training images (N, 1, 28, 28)."""
    figure = Figure((10, 3.4), 120, layout="constrained")
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
    args = Parser(__doc__).parse_args(argv)
    check_flags(args)
    dataset = load(args.data)
    for split in ("train", "val", "test"):
        x, y = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        print(f"{split}: {y.bincount().min():,} to {y.bincount().max():,} images a class; pixels:"
              f" mean {x.mean():.4f}, std {x.std():.4f}, {(x == 0).float().mean():.1%} exactly 0")
    x, y = dataset.train_images, dataset.train_labels
    ten_of_each = torch.stack([x[y == c][:10, 0] for c in range(10)])       # (10, 10, 28, 28)
    image_grid(ten_of_each, args.out / "data-samples.png", "Ten of each class", CLASSES)
    plot_distributions(x, y, args.out / "data-distributions.png")
    print(f"-> {args.out / 'data-samples.png'}, data-distributions.png")


if __name__ == "__main__":
    main()
