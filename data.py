"""Section 1: Fashion-MNIST, looked at before anything is trained on it.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747) is 70,000 images of clothes, 28 x 28
grey pixels, ten classes. Pixels stay in [0, 1], never standardised: the loss of every VAE here is
a binary cross-entropy, which needs targets in [0, 1]:

    BCE(x, p) = - sum_i [ x_i log p_i + (1 - x_i) log(1 - p_i) ]          nats per image

For grey pixels even the perfect prediction p = x costs more than 0: the pixel entropy BCE(x, x).
That is the *entropy floor*; the other scripts print how far above it they are.

    python data.py            # seconds; writes two figures to runs/

Expect: 55,000 / 5,000 / 10,000 images, all classes equally often, half of all pixels exactly 0.
Try: the floor of `images.round()`. Left out: a DataLoader, since all images fit into memory.
"""
import argparse
import gzip
import hashlib
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
SPLITS = ("train", "val", "test")
# images float32 (N, 1, 28, 28) in [0, 1]; labels int64 (N,); floor: mean pixel entropy by split
FashionMNIST = namedtuple("FashionMNIST", "train_images train_labels val_images val_labels "
                          "test_images test_labels source floor")


class UserError(ValueError):
    """A mistake that one line explains; on the command line it needs no traceback."""


def pixel_entropy(images):
    """BCE(x, x), the least that any prediction can reach: (B, ...) -> (B,) nats per image."""
    x = images.flatten(1)
    return -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1)


def unpack(raw, name, where):
    """Bytes of a .gz file -> array; UserError unless the decompressed bytes have our checksum."""
    try:
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
    for url in (f"{mirror}{name}.gz" for mirror in MIRRORS):
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                print(f"{url}: {reply.length or '?'} bytes to come", file=sys.stderr)
                raw = reply.read()
            unpack(raw, name, "the reply")
        except Exception as error:  # whatever a network can do means the same: the next mirror
            print(f"no luck with {url}: {error}", file=sys.stderr)
        else:
            return write_atomically(folder / f"{name}.gz", lambda file: file.write(raw))
    raise OSError(f"no mirror could give {name}.gz")


def split_indices(labels):
    """Stratified split with a fixed seed: (train, val) indices, 500 of each class in val."""
    rng = np.random.RandomState(0)  # its stream is frozen: the same split in every numpy version
    val = [rng.permutation(np.flatnonzero(labels == c))[:500] for c in range(len(CLASSES))]
    return np.setdiff1d(np.arange(len(labels)), val), np.sort(np.concatenate(val))


def read_full():
    """Six uint8 arrays from $FASHION_MNIST_DIR, a complete folder of FOLDERS, or a download."""
    complete = (f for f in FOLDERS if all((f / f"{name}.gz").exists() for name in FILES))
    folder = Path(os.environ.get("FASHION_MNIST_DIR") or next(complete, FOLDERS[0]))
    paths = {name: folder / f"{name}.gz" for name in FILES}
    for name, path in paths.items():
        if folder == FOLDERS[0] and not path.exists():
            download(name, folder)
    try:
        x, y, x_test, y_test = (unpack(p.read_bytes(), name, p) for name, p in paths.items())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; put a readable file there")
    train, val = split_indices(y)
    return x[train], y[train], x[val], y[val], x_test, y_test


def read_sample():
    """The embedded sample (MIT, Zalando SE): the first 500 / 100 / 200 images of each class."""
    try:
        with np.load(SAMPLE) as file:
            return [file[field] for field in FashionMNIST._fields[:6]]
    except Exception as error:  # absent, or damaged in whatever way numpy and zip can tell
        raise UserError(f"{SAMPLE}: unusable ({error}); restore it from where this file came")


def load(source="auto"):
    """The data set. source: "full", "sample", or "auto": the sample only if nothing else is had.
    A file that is there but wrong is a UserError."""
    try:
        used, arrays = ("sample", read_sample()) if source == "sample" else ("full", read_full())
    except OSError as error:
        if source == "full":
            raise UserError(f"{error}: connect to the network, or set FASHION_MNIST_DIR")
        used, arrays = "sample", read_sample()
        print("!" * 80, "!! NO DATA SET, NO NETWORK: using the embedded SAMPLE (8,000 images)",
              "!" * 80, sep="\n", file=sys.stderr)
    # / 255 and nothing else: the loss needs pixels in [0, 1]
    tensors = [torch.from_numpy(a[:, None] / np.float32(255)) if a.ndim == 3
               else torch.from_numpy(a.astype(np.int64)) for a in arrays]
    floor = {}
    for split, images in zip(SPLITS, tensors[::2]):
        floor[split] = pixel_entropy(images).mean().item()
        print(f"data {used} {split}: {len(images):,} images, entropy floor {floor[split]:.2f} nats")
    return FashionMNIST(*tensors, used, floor)


# ---------------------------------------------------------------- plumbing: not the lesson

def fail(message, code=2):
    """End the program with one line."""
    print(f"error: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(code)


def command(main):
    """Decorate main(argv): a user's mistake ends in one line with exit code 2, Ctrl-C with 130."""
    def wrapped(argv=None):
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
        def convert(word):
            if not low <= kind(word) <= high:
                raise ValueError
            return kind(word)
        convert.__name__ = f"{kind.__name__} ({low} to {high})"  # argparse: "invalid ... value"
        self.add_argument(flag, type=convert, default=default, help=text, **more)

    def training(self, epochs, lr, latent_dim):
        """The flags of every training, with the defaults of this one."""
        self.number("--epochs", int, 1, 10_000, epochs, f"passes over the training data ({epochs})")
        self.number("--batch-size", int, 1, 100_000, 128, "images a step (128)")
        self.number("--lr", float, 1e-8, 10, lr, f"peak learning rate ({lr})")
        self.number("--latent-dim", int, 1, 784, latent_dim, f"numbers in z ({latent_dim})")
        self.number("--seed", int, 0, 2**32 - 1, 0, "of weights, batches and noise (0)")
        self.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
        self.add_argument("--reuse", action="store_true", help="do not train again what is there")

    def error(self, message):
        fail(f"{message} (see --help)")


def pick_device(name="auto"):
    """A torch.device; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = [device for device in found if found[device]] + ["cpu"]
    if name not in ("auto", *usable):
        raise UserError(f"no device {name} here: choose auto or {' or '.join(usable)}")
    return torch.device(usable[0] if name == "auto" else name)


def write_atomically(path, write):
    """write(file) to a temporary name, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path.parent}: not writable ({error.strerror}); choose another folder")
    return path


def run_path(parser, args, script, source, *names):
    """(path, config): runs/<script>-<source>-seed<k>.pt; with a hash of those flags in the config
    that are not the default, so that a trial run never replaces the real one."""
    config = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", *names)}
    trial = {name: value for name, value in config.items() if value != parser.get_default(name)}
    mark = "-" + hashlib.sha256(repr(trial).encode()).hexdigest()[:8] if trial else ""
    path = args.out / f"{script}-{source}-seed{args.seed}{mark}.pt"
    # a folder that cannot be written shall fail now, not after the training
    write_atomically(path.with_suffix(".probe"), lambda file: None).unlink(missing_ok=True)
    return path, config


def save_checkpoint(path, **contents):
    """Tensors, numbers and strings only, so that read_checkpoint can refuse everything else."""
    contents["torch"] = str(torch.__version__)
    return write_atomically(path, lambda file: torch.save(contents, file))


def read_checkpoint(path, build=None, **expected):
    """The dict of a checkpoint; build(config) makes the model for its weights, which then stands
    under "model", in eval mode. UserError if it is damaged, does not fit or is not as expected."""
    try:
        meta = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: meta[name] for name in expected}
        if build and found == expected:
            meta["model"] = build(meta["config"]).eval()
            meta["model"].load_state_dict(meta["state_dict"])
    except Exception as error:  # absent, or in whatever way no checkpoint of ours
        raise UserError(f"{path}: unusable ({error!r:.200}); restore or retrain it")
    if found != expected:
        raise UserError(f"{path}: holds {found}, not {expected}; move it or choose another --out")
    return meta


def describe(split, recon, kl, floor):
    """One line of figures, the same in every script; (+) is recon above the entropy floor."""
    return (f"{split}: recon {recon:.2f} ({recon - floor[split]:+.2f}) KL {kl:.2f}"
            f" total {recon + kl:.2f}")


def image_grid(images, path, title="", rows=(), columns=()):
    """Write images (R, C, 28, 28) in [0, 1] as one picture with labelled rows and columns."""
    height, width = images.shape[:2]
    canvas = torch.nn.functional.pad(images.detach().cpu(), (1, 1, 1, 1), value=1.0)  # white seams
    canvas = canvas.transpose(1, 2).reshape(height * 30, width * 30)
    inch = 9 / max(width, 15)                               # one image: all letters equally large
    figure = Figure((inch * width + 1, inch * height + 1), 51 / inch, layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([30 * i + 15 for i in range(len(rows))], rows)
    axes.set_xticks([30 * i + 15 for i in range(len(columns))], columns, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    write_atomically(Path(path), lambda file: figure.savefig(file, bbox_inches="tight"))


# ---------------------------------------------------------------- run directly: exploration

@command
def main(argv=None):
    args = Parser(__doc__).parse_args(argv)
    data = load(args.data)
    by_class = [data.train_images[data.train_labels == c][:10, 0] for c in range(10)]
    image_grid(torch.stack(by_class), args.out / "data-samples.png", "Ten of each class", CLASSES)
    pixels = data.train_images.flatten().numpy()
    figure = Figure((10, 3.4), 120, layout="constrained")
    left = figure.add_subplot(1, 2, 1, ylabel="share of the split", title="Classes: equally often")
    right = figure.add_subplot(1, 2, 2, xlabel="pixel value", ylabel="share of pixels",
                               title=f"Pixels: {(pixels == 0).mean():.0%} are exactly black")
    right.hist(pixels, bins=64, weights=np.full(len(pixels), 1 / len(pixels)), log=True)
    for i, split in enumerate(SPLITS):
        x, y = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        counts = y.bincount(minlength=10)
        print(f"{split}: {counts.min():,} to {counts.max():,} images a class; pixels: mean"
              f" {x.mean():.4f}, std {x.std():.4f}, {(x == 0).float().mean():.1%} exactly 0")
        left.bar(torch.arange(10) + 0.27 * (i - 1), counts / len(y), 0.25, label=split)
    left.set_xticks(range(10), CLASSES, rotation=30, ha="right")
    left.legend(loc="lower right")
    write_atomically(args.out / "data-distributions.png", figure.savefig)
    print(f"-> {args.out / 'data-samples.png'}, data-distributions.png")


if __name__ == "__main__":
    main()
