"""Sections 5 and 6: FashionResNet18, the judge of generated images.

A generator is judged by what somebody else sees in its images. This ResNet-18 (He et al. 2016,
arXiv:1512.03385, Table 1; with a 3 x 3 stem for small images, and half the width) looks twice: its
class says whether a requested class was drawn, its 256 penultimate features carry the FID proxy.

    raw image in [0, 1]  ->  (x - mean) / std  ->  stem, 4 x 2 blocks  ->  features  ->  logits

The normalisation sits *inside* the network, its mean and std are buffers computed from the training
split and saved with the weights. So every image, real or generated, goes in raw, and nobody can
normalise twice or forget to.

    python classifier.py            # interrupted, it goes on after the last finished epoch

Expect (full data, seed 0, 18 epochs): 95.12 % on validation, 94.74 % on the 10,000 test images as
stored (float16, 5.66 MB). It took 54 min on 2 CPU cores, with other work beside it.
Try (with --out try): leave out the augmentation, and compare training and validation accuracy.
Left out on purpose: test-time augmentation, ensembles, pretraining on anything else.
"""
import contextlib
import hashlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from data import (CLASSES, Parser, UserError, command, load, pick_device, read_checkpoint, run_path,
                  save_checkpoint, write_atomically)

PRETRAINED = Path(__file__).resolve().parent / "assets" / "fashion-resnet18.pt"


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them: relu(shortcut(x) + F(x))."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                          nn.BatchNorm2d(outputs))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class FashionResNet18(nn.Module):
    """18 weight layers: stem, 16 convolutions in eight blocks, head (shortcuts are not counted)."""

    def __init__(self, mean=0.0, std=1.0, width=32):
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, len(CLASSES))

    def features(self, images):
        """Raw images (B, 1, 28, 28) in [0, 1] -> penultimate features (B, 256)."""
        h = self.stem((images - self.mean) / self.std)      # (B, 32, 28, 28)
        h = self.blocks(h)                                  # (B, 256, 4, 4)
        return h.mean((2, 3))                               # (B, 256)

    def forward(self, images):
        """Raw images (B, 1, 28, 28) in [0, 1] -> class logits (B, 10)."""
        return self.head(self.features(images))


def augment(x, generator):
    """Mirror half of the images, shift each by up to 2 pixels, grey out a box in half of them."""
    count, device = len(x), x.device

    def draw(high):  # one random integer below `high` for each image, (B, 1, 1, 1)
        return torch.randint(high, (count, 1, 1, 1), generator=generator).to(device)

    x = torch.where(draw(2) == 0, x, x.flip(-1))
    row = torch.arange(28, device=device).view(1, 1, 28, 1)
    column = torch.arange(28, device=device).view(1, 1, 1, 28)
    index = ((row + draw(5)) * 32 + column + draw(5)).flatten(1)          # (B, 784)
    x = F.pad(x, (2, 2, 2, 2)).flatten(1).gather(1, index).view(count, 1, 28, 28)
    height, width = 4 + draw(9), 4 + draw(9)                              # 4 to 12 pixels
    down, right = row - draw(28) + height // 2, column - draw(28) + width // 2
    box = (0 <= down) & (down < height) & (0 <= right) & (right < width) & (draw(2) == 0)
    return torch.where(box, draw(256) / 255, x)


@torch.no_grad()
def look(judge, images, batch_size=100):
    """What the judge sees: raw images (N, 1, 28, 28) -> (features (N, 256), classes (N,)).

    UserError for another shape, NaN, or values outside [0, 1] (normalised images, or logits).
    Batches are small because larger ones were slower on the CPU.
    """
    if images.dim() != 4 or images.shape[1:] != (1, 28, 28):
        raise UserError(f"images have shape {tuple(images.shape)}: reshape to (N, 1, 28, 28)")
    low, high = images.min().item(), images.max().item()
    if not 0 <= low <= high <= 1:
        raise UserError(f"images range from {low} to {high}: the classifier takes raw images in "
                        "[0, 1]; take the sigmoid of logits, and do not normalise")
    judge.eval()
    device = judge.mean.device
    features = torch.cat([judge.features(x.to(device)) for x in images.split(batch_size)])
    return features.cpu(), judge.head(features).argmax(1).cpu()


def controllability(judged, asked):
    """(share of images judged as the class that was asked for, list of that share by class); for
    real images and their labels this is the accuracy. Both (N,); UserError for other classes."""
    if len(asked) == 0 or not 0 <= asked.min() <= asked.max() <= 9:
        raise UserError(f"asked for classes {asked.unique().tolist()}: give labels from 0 to 9")
    hits = (judged == asked).double()
    return hits.mean().item(), [hits[asked == c].mean().item() for c in range(len(CLASSES))]


def diversity(features, labels, real_features, real_labels):
    """Mean pairwise distance of features within a class, over that of real images, averaged over
    the classes: 1 is as varied as real images, 0 one image a class. features (N, D), labels (N,):
    give only images that the judge puts into their class, on both sides."""
    ratios = []
    for c in range(len(CLASSES)):
        drawn, real = features[labels == c], real_features[real_labels == c]
        spread = torch.pdist(drawn).mean() if len(drawn) > 1 else torch.tensor(0.0)
        ratios.append((spread / torch.pdist(real).mean()).item())
    return sum(ratios) / len(ratios)


def nearness(features, train_features, val_features):
    """Memorisation, to be held beside the same figures of test images. Median distance to the
    nearest of equally many training and validation images; how often the nearest of *all* training
    and validation images is a training image (by chance: as often as they are training images)."""
    distance = {"train": [], "some": [], "val": []}     # some: as many training images as val has
    for part in features.split(1000):
        to_train, to_val = torch.cdist(part, train_features), torch.cdist(part, val_features)
        distance["train"].append(to_train.min(1).values)
        distance["some"].append(to_train[:, :len(val_features)].min(1).values)
        distance["val"].append(to_val.min(1).values)
    train, some, val = (torch.cat(parts) for parts in distance.values())
    return {"nearest_train": some.median().item(), "nearest_val": val.median().item(),
            "nearer_train": (train < val).double().mean().item()}


def half_precision(state):
    """Matrices and kernels as float16, half the size. Vectors and buffers stay float32."""
    return {name: value.half() if value.dim() > 1 else value for name, value in state.items()}


def load_model(path, device="cpu"):
    """(FashionResNet18 in eval mode, meta) from a checkpoint; UserError where it does not fit."""
    meta = read_checkpoint(path, lambda config: FashionResNet18(), script="classifier")
    return meta["model"].to(device), meta


def load_pretrained(device="cpu"):
    """(the frozen judge, meta with the "sha256" of its file)."""
    model, meta = load_model(PRETRAINED, device)  # missing or damaged? git checkout assets
    meta["sha256"] = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()
    return model, meta


def mixed_precision(device):
    """A context: bfloat16 where the hardware has it; elsewhere it is emulated and slow, so not."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def train(model, data, args, device, resume_path, config):
    """SGD with Nesterov momentum, OneCycle, label smoothing. Returns the state: "weights" of the
    epoch with the "best" validation accuracy, "seconds" of training. Resumes from resume_path."""
    x_train, y_train = data.train_images.to(device), data.train_labels.to(device)
    model.to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)  # OneCycle moves the momentum: .95, .85, .95
    steps = -(-len(x_train) // args.batch_size)
    # at least 5 steps: of 4, OneCycle would rise for 0 steps, and divide by that
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=max(5, args.epochs * steps), pct_start=0.25)
    state = {"epoch": 0, "best": -1.0, "weights": None, "seconds": 0.0}
    if resume_path.exists():
        saved = read_checkpoint(resume_path, config=config, source=data.source, seed=args.seed)
        state = saved["state"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["generator"])
        print(f"going on after epoch {state['epoch']} of {resume_path}")

    while state["epoch"] < args.epochs:
        model.train()
        start, hits, losses = time.time(), 0, 0.0
        order = torch.randperm(len(x_train), generator=generator).to(device)
        for step, batch in enumerate(order.split(args.batch_size), 1):
            if sys.stdout.isatty():                     # an epoch may take minutes
                print(f"epoch {state['epoch'] + 1}: step {step}/{steps}", end="\r", flush=True)
            x, y = augment(x_train[batch], generator), y_train[batch]
            x = x.contiguous(memory_format=torch.channels_last)
            with mixed_precision(device):
                logits = model(x).float()
            loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            hits += (logits.argmax(1) == y).sum().item()
            losses += loss.item() * len(y)
        if not math.isfinite(losses):
            raise UserError(f"the loss became {losses} in epoch {state['epoch'] + 1}: lower --lr")
        validation, _ = controllability(look(model, data.val_images)[1], data.val_labels)
        state["epoch"] += 1
        state["seconds"] += time.time() - start
        if validation >= state["best"]:
            state["best"] = validation
            state["weights"] = {k: v.clone() for k, v in model.state_dict().items()}
        left = (args.epochs - state["epoch"]) * state["seconds"] / state["epoch"]
        print(f"epoch {state['epoch']:2}/{args.epochs}  train: loss {losses / len(x_train):.4f}, "
              f"accuracy {hits / len(x_train):.2%} (augmented)  val: accuracy {validation:.2%}  "
              f"{state['seconds']:.0f} s, {left:.0f} s left", flush=True)
        save_checkpoint(resume_path, config=config, source=data.source, seed=args.seed,
                        state=state, model=model.state_dict(), optimizer=optimizer.state_dict(),
                        schedule=schedule.state_dict(), generator=generator.get_state())
    return state


def confusion_figure(asked, judged, path, title):
    """Rows: true (or requested) class; columns: what the classifier says; percent of the row."""
    counts = torch.bincount(asked * 10 + judged, minlength=100).view(10, 10)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(6, 5.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="judged as", ylabel="true or requested class")
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASSES)
    for row in range(10):
        for column in range(10):
            if counts[row, column]:
                axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center",
                          fontsize=8, color="white" if share[row, column] > 0.5 else "black")
    write_atomically(path, figure.savefig)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.number("--epochs", int, 1, 10_000, 18, "passes over the training split (18)")
    parser.number("--batch-size", int, 2, 10_000, 128, "images a step (128)")
    parser.number("--lr", float, 1e-8, 100, 0.1, "peak learning rate of OneCycle (0.1)")
    parser.number("--seed", int, 0, 2**32 - 1, 0, "of weights, batches and augmentation (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    data = load(args.data)
    torch.manual_seed(args.seed)
    model = FashionResNet18(data.train_images.mean(), data.train_images.std())
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    print(f"device {device}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    path, config = run_path(parser, args, "classifier", data.source)
    resume_path = path.with_name(f"{path.stem}-resume.pt")
    state = train(model, data, args, device, resume_path, config)
    metrics = {"val_accuracy": state["best"], "seconds": state["seconds"]}
    save_checkpoint(path, script="classifier", config=config, source=data.source, seed=args.seed,
                    metrics=metrics, state_dict=half_precision(state["weights"]))

    model, _ = load_model(path, device)  # what is measured is what is stored: the float16 file
    _, judged = look(model, data.test_images)
    test_accuracy, _ = controllability(judged, data.test_labels)
    confusion_figure(data.test_labels, judged, path.with_suffix(".png"),
                     f"Test accuracy {test_accuracy:.2%}: what is taken for what?")
    resume_path.unlink(missing_ok=True)
    print(f"test accuracy {test_accuracy:.2%} ({data.source}, reloaded from {path},"
          f" {path.stat().st_size / 1e6:.2f} MB)")
    return [path]


if __name__ == "__main__":
    main()
