"""Section 1: Fashion-MNIST, looked at before anything is trained on it.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747): 60,000 + 10,000 images of clothes,
28 x 28 grey pixels, ten balanced classes. We keep the pixels in [0, 1] and never standardise them,
because the loss of every model here is a binary cross-entropy, which needs targets in [0, 1]:

    BCE(x, p) = - sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]          nats per image

For grey pixels even the perfect prediction p = x costs more than 0: the pixel entropy BCE(x, x).
That is the *entropy floor*, about 190 nats; the other scripts print how far above it they are.
(A grey pixel read as a probability gives a pseudo-likelihood, not a density: Loaiza-Ganem &
Cunningham 2019, arXiv:1907.06845.)

    python data.py            # seconds; writes three figures to runs/

Expect: 55,000 / 5,000 / 10,000 images, all classes equally often, half of all pixels exactly 0.
Try: the floor of `images.round()`. Left out: a DataLoader; the data set is one 220 MB tensor. The
second half of this file is the plumbing that all scripts share and that is not the lesson.
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import math
import os
import sys
import urllib.request
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# SHA-256 of the decompressed bytes: the same after re-compression, and proof where a shape is none
# (a mirror once served digit-MNIST under these names).
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
SAMPLE = "fashion-mnist-sample.npz"

# Images float32 (N, 1, 28, 28) in [0, 1]; labels int64 (N,); source "full" or "sample"; floor: the
# mean pixel entropy of each split in nats per image.
FashionMNIST = namedtuple("FashionMNIST", "train_images train_labels val_images val_labels "
                          "test_images test_labels source floor")


class UserError(ValueError):
    """A mistake that one line explains; on the command line it needs no traceback."""


def pixel_entropy(images):
    """BCE(x, x), the least that any prediction can reach: (B, ...) -> (B,) nats per image."""
    x = images.flatten(1)
    return -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1)


def read_idx(raw, name="IDX data"):
    """Bytes -> uint8 array. IDX: 0, 0, type (8 = uint8), number of axes, then big-endian sizes."""
    if raw[:4] not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
        raise UserError(f"{name}: not an IDX file of uint8 labels (1 axis) or images (3 axes)")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, start, 4)]
    if len(raw) != start + math.prod(shape):
        raise UserError(f"{name}: the header promises {shape}, but the file has {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def unpack(raw, name, where):
    """Bytes of a .gz file -> array; UserError unless the decompressed bytes have our checksum."""
    try:
        raw = gzip.decompress(raw)
    except Exception as error:  # OSError, EOFError or zlib.error: damaged all the same
        raise UserError(f"{where}: damaged gzip file ({error}); delete it and try again")
    if hashlib.sha256(raw).hexdigest() != FILES[name]:
        raise UserError(f"{where}: wrong checksum (truncated, or other data under this name); "
                        "delete it and try again")
    return read_idx(raw, where)


def download(name, folder):
    """Fetch one file from the first mirror that gives the right bytes; OSError if none does."""
    for url in (f"{mirror}{name}.gz" for mirror in MIRRORS):
        try:
            raw = b""
            with urllib.request.urlopen(url, timeout=10) as reply:
                while chunk := reply.read(1 << 18):
                    raw += chunk
                    if sys.stderr.isatty():
                        print(f"\r{url}: {len(raw) / 1e6:.1f} MB", end="", file=sys.stderr)
            unpack(raw, name, url)
        except Exception as error:  # whatever a network can do means the same: the next mirror
            print("\n" * bool(raw) + f"no luck with {url}: {error}", file=sys.stderr)
            continue
        print("\n" * sys.stderr.isatty() + f"got {url}", file=sys.stderr)
        return write_atomically(folder / f"{name}.gz", lambda file: file.write(raw))
    raise OSError(f"no mirror could give {name}.gz")


def split_indices(labels):
    """Stratified split with a fixed seed: (train, val) indices, 500 of each class in val."""
    rng = np.random.RandomState(0)  # its stream is frozen: the same split in every numpy version
    val = [rng.permutation(np.flatnonzero(labels == c))[:500] for c in range(len(CLASSES))]
    return np.setdiff1d(np.arange(len(labels)), val), np.sort(np.concatenate(val))


def read_folder(folder):
    """The four files of a folder, checked and split: six uint8 arrays."""
    paths = {name: folder / f"{name}.gz" for name in FILES}
    try:
        x, y, x_test, y_test = (unpack(p.read_bytes(), name, p) for name, p in paths.items())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")
    train, val = split_indices(y)
    return x[train], y[train], x[val], y[val], x_test, y_test


def read_sample():
    """The embedded sample (MIT, Zalando SE): the first 500 / 100 / 200 images of each class."""
    here = Path(__file__).resolve().parent
    path = here / SAMPLE if (here / SAMPLE).exists() else here / "assets" / SAMPLE
    try:
        with np.load(path) as file:
            return [file[field] for field in FashionMNIST._fields[:6]]
    except Exception as error:  # absent, or damaged in whatever way numpy and zip can tell
        raise UserError(f"no usable embedded sample ({error}): put {SAMPLE} beside data.py")


def load(source="auto"):
    """The data set. source: "full" (never falls back), "sample", or "auto": full if it can be had.

    Looks in $FASHION_MNIST_DIR, ./fashion-mnist, Debian's folder; else downloads to the second.
    A file that is there but wrong is a UserError; only absence leads "auto" to the sample.
    """
    if source not in ("auto", "full", "sample"):
        raise UserError(f"data source {source!r}: choose auto, full or sample")
    complete = (f for f in FOLDERS if all((f / f"{name}.gz").exists() for name in FILES))
    folder = Path(os.environ.get("FASHION_MNIST_DIR") or next(complete, FOLDERS[0]))
    missing = [name for name in FILES if not (folder / f"{name}.gz").exists()]
    if source != "sample" and folder == FOLDERS[0]:
        try:
            for name in missing:
                download(name, folder)
        except OSError as error:
            if source == "full":
                raise UserError(f"{error}: connect to the network, or set FASHION_MNIST_DIR to a "
                                "folder that holds the four .gz files")
            source = "sample"
            print("!" * 80, "!! NO DATA SET, NO NETWORK: using the embedded SAMPLE (8,000 images)",
                  "!" * 80, sep="\n", file=sys.stderr)
    source = "full" if source == "auto" else source
    arrays = read_sample() if source == "sample" else read_folder(folder)
    # / 255 and nothing else: the loss needs pixels in [0, 1]
    tensors = [torch.from_numpy(a[:, None] / np.float32(255)) if a.ndim == 3
               else torch.from_numpy(a.astype(np.int64)) for a in arrays]
    floors = [pixel_entropy(images).mean().item() for images in tensors[::2]]
    return FashionMNIST(*tensors, source, dict(zip(("train", "val", "test"), floors)))


# ---------------------------------------------------------------- plumbing, the same everywhere

def fail(message, code=2):
    """End the program with one line."""
    print(f"error: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(code)


def command(main):
    """Decorate main(argv): a user's mistake ends in one line with exit code 2, Ctrl-C with 130."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # some consoles have no β
        try:
            return main(argv)
        except UserError as error:
            fail(error)
        except KeyboardInterrupt:
            fail("interrupted; what was finished before is kept, nothing is half-written", 130)
    return wrapped


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, the flags --data and --out, and numbers within bounds."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--data", choices=("auto", "full", "sample"), default="auto",
                          help="all images, the embedded sample, or all if they can be had (auto)")
        self.add_argument("--out", type=Path, default=Path("runs"), help="folder for output (runs)")

    def number(self, flag, kind, low, high, default, text, **more):
        """A flag for an int or a float from low to high."""
        def convert(word):
            if not low <= kind(word) <= high:
                raise argparse.ArgumentTypeError(f"{word} is not from {low} to {high}")
            return kind(word)
        convert.__name__ = kind.__name__  # argparse says "invalid int value"
        self.add_argument(flag, type=convert, default=default, help=text, **more)

    def error(self, message):
        fail(f"{message} (see --help)")


def pick_device(name="auto"):
    """A torch.device; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name not in ("auto", "cpu", *here):
        raise UserError(f"no device {name} here: choose from {', '.join(['auto', 'cpu', *here])}")
    return torch.device([*here, "cpu"][0] if name == "auto" else name)


def mixed_precision(device):
    """A context: bfloat16 where the hardware has it; elsewhere it is emulated and slow, so not."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def write_atomically(path, write):
    """write(file) to a temporary name, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); go elsewhere, with --out")
    return path


def run_path(parser, args, script, source, *names):
    """(path, config): runs/<script>-<source>-seed<k>.pt for the named flags, plus a hash of those
    that are not the default, so that a trial run never replaces the real one."""
    config = {name: getattr(args, name) for name in names}
    trial = {name: value for name, value in config.items() if value != parser.get_default(name)}
    mark = "-" + hashlib.sha256(repr(trial).encode()).hexdigest()[:8] if trial else ""
    path = Path(args.out) / f"{script}-{source}-seed{args.seed}{mark}.pt"
    probe = write_atomically(path.with_suffix(".probe"), lambda file: None)  # if it fails, then now
    probe.unlink(missing_ok=True)
    return path, config


def save_checkpoint(path, **contents):
    """Tensors, numbers and strings only, so that read_checkpoint can refuse everything else."""
    contents["torch"] = str(torch.__version__)
    return write_atomically(path, lambda file: torch.save(contents, file))


def read_checkpoint(path, **expected):
    """The dict of a checkpoint; UserError if it is damaged or not what is expected."""
    if not path.exists():
        raise UserError(f"{path}: is not there; train it, or get it back from where it came")
    try:
        meta = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: meta[name] for name in expected}
    except Exception as error:  # pickle, zip and key errors alike: no checkpoint of ours
        raise UserError(f"{path}: no usable checkpoint ({type(error).__name__}): replace it")
    if found != expected:
        raise UserError(f"{path}: holds {found}, not {expected}; move it or choose another --out")
    return meta


def load_weights(model, meta, path):
    """The model with the weights of a checkpoint, in eval mode; UserError where they do not fit."""
    try:
        model.load_state_dict({name: w.float() if w.is_floating_point() else w
                               for name, w in meta["state_dict"].items()})
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: does not fit {type(model).__name__} ({error}); delete it")
    return model.eval()


def announce(args, device, data, model=None):
    """The first lines of every script: what runs, where, on what."""
    print(", ".join(f"{name} {value}" for name, value in vars(args).items()))
    sizes = " / ".join(f"{len(images):,}" for images in data[:6:2])
    print(f"device {device}; data {data.source}: {sizes} images (train / val / test)")
    floors = ", ".join(f"{split} {floor:.2f}" for split, floor in data.floor.items())
    print(f"entropy floor {floors} nats per image", flush=True)
    if model:
        print(f"parameters {sum(p.numel() for p in model.parameters()):,}")


def describe(split, recon, kl, floor):
    """One line of figures, the same in every script; (+) is recon above the entropy floor."""
    return (f"{split}: recon {recon:.2f} (+{recon - floor[split]:.2f}) KL {kl:.2f}"
            f" total {recon + kl:.2f}")


def save_figure(figure, path):
    """Write a matplotlib figure as PNG and say so."""
    print(f"wrote {write_atomically(path, lambda file: figure.savefig(file, format='png'))}")


def image_grid(images, path, title="", rows=(), columns=()):
    """Write images (R, C, 28, 28) in [0, 1] as one picture with labelled rows and columns."""
    height, width = images.shape[:2]
    canvas = torch.nn.functional.pad(images.detach().cpu(), (1, 1, 1, 1), value=1.0)  # white seams
    canvas = canvas.transpose(1, 2).reshape(height * 30, width * 30)
    figure = Figure((0.6 * width + 1.2 * bool(rows), 0.6 * height + 0.6), 85, layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_yticks([30 * i + 15 for i in range(len(rows))], rows)
    axes.set_xticks([30 * i + 15 for i in range(len(columns))], columns, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, path)


# ---------------------------------------------------------------- run directly: exploration

def explore(data, out):
    """Three figures, and the facts that decide how the models are built."""
    by_class = [data.train_images[data.train_labels == c][:10, 0] for c in range(10)]
    image_grid(torch.stack(by_class), out / "data-samples.png", "Ten images of each class", CLASSES)
    figure = Figure((8, 3.5), 110, layout="constrained")
    bars = figure.add_subplot(title="All classes equally often: no class weights needed",
                              ylabel="share of the split")
    for i, split in enumerate(("train", "val", "test")):
        x, y = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        counts = y.bincount(minlength=10)
        print(f"{split:5} {len(x):6,} images, {counts.min():,} to {counts.max():,} a class; pixels"
              f" {x.min():.0f} to {x.max():.0f}, mean {x.mean():.4f}, std {x.std():.4f},"
              f" {(x == 0).float().mean():.1%} exactly 0")
        bars.bar(torch.arange(10) + 0.27 * (i - 1), counts / len(y), 0.25, label=split)
    mean = data.train_images.mean(0).clamp(1e-6, 1 - 1e-6).expand_as(data.test_images)
    bce = torch.nn.functional.binary_cross_entropy(mean, data.test_images, reduction="none")
    print(f"the mean training image as the guess for all of test: {bce.sum() / len(bce):.2f} nats")
    bars.set_xticks(range(10), CLASSES, rotation=30, ha="right")
    bars.legend(loc="lower right")
    save_figure(figure, out / "data-classes.png")
    pixels = data.train_images.flatten().numpy()
    figure = Figure((8, 3.5), 110, layout="constrained")
    axes = figure.add_subplot(title=f"{(pixels == 0).mean():.0%} of all pixels are black, the rest"
                              " takes every grey", xlabel="pixel value", ylabel="share of pixels")
    axes.hist(pixels, bins=64, weights=np.full(len(pixels), 1 / len(pixels)), log=True)
    save_figure(figure, out / "data-pixels.png")


@command
def main(argv=None):
    args = Parser(__doc__).parse_args(argv)
    data = load(args.data)
    announce(args, "cpu", data)
    explore(data, args.out)


if __name__ == "__main__":
    main()
