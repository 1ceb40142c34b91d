"""Sections 5 and 6: FashionResNet18, the judge of generated images.

A generator is judged by what somebody else sees in its images. This ResNet-18 (He et al. 2016,
arXiv:1512.03385, Table 1; with a 3 x 3 stem for small images, and half the width) looks twice: its
class says whether a requested class was drawn, its 256 penultimate features carry the FID proxy.

    raw image in [0, 1]  ->  (x - mean) / std  ->  stem, 4 x 2 blocks  ->  features  ->  logits

The normalisation sits *inside* the network, its mean and std are buffers computed from the training
split and saved with the weights. So every image, real or generated, goes in raw, and nobody can
normalise twice or forget to.

    python classifier.py            # not needed: the trained classifier is in assets/

Expect (full data, seed 0, 18 epochs): 95.12 % on validation, 94.74 % on the 10,000 test images as
stored (float16, 5.66 MB). It took 54 min on 2 CPU cores, with other work beside it.
Try (with --out try): leave out the augmentation, and compare training and validation accuracy.
Left out on purpose: test-time augmentation, ensembles, pretraining on anything else.
"""
import hashlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data

PRETRAINED = Path(__file__).resolve().parent / "assets" / "fashion-resnet18.pt"

# ---------------------------------------------------------------- the network

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
        self.head = nn.Linear(8 * width, len(data.CLASSES))

    def features(self, images):
        """Raw images (B, 1, 28, 28) in [0, 1] -> penultimate features (B, 256)."""
        h = self.stem((images - self.mean) / self.std)      # (B, 32, 28, 28)
        h = self.blocks(h)                                  # (B, 256, 4, 4)
        return h.mean((2, 3))                               # (B, 256)

    def forward(self, images):
        """Raw images (B, 1, 28, 28) in [0, 1] -> class logits (B, 10)."""
        return self.head(self.features(images))


# ---------------------------------------------------------------- what the judge sees

@torch.no_grad()
def look(judge, images, batch_size=100):
    """What the judge sees: raw images (N, 1, 28, 28) -> (features (N, 256), classes (N,)).

    UserError for another shape, NaN, or values outside [0, 1] (normalised images, or logits).
    Batches are small because larger ones were slower on the CPU.
    """
    if images.dim() != 4 or images.shape[1:] != (1, 28, 28):
        raise data.UserError(f"images have shape {tuple(images.shape)}: reshape to (N, 1, 28, 28)")
    low, high = images.min().item(), images.max().item()
    if not 0 <= low <= high <= 1:
        raise data.UserError(f"images range from {low} to {high}: the classifier takes raw images"
                             " in [0, 1]; take the sigmoid of logits, and do not normalise")
    judge.eval()
    device = judge.mean.device
    features = torch.cat([judge.features(x.to(device)) for x in images.split(batch_size)])
    return features.cpu(), judge.head(features).argmax(1).cpu()


def load_model(path, device="cpu"):
    """(FashionResNet18 in eval mode, what else its checkpoint holds); UserError if unusable."""
    meta = data.read_checkpoint(path, "classifier")
    return data.load_weights(FashionResNet18(), meta, path).to(device), meta


def load_pretrained(device="cpu"):
    """(the frozen judge, its meta with the "sha256" of its file)."""
    model, meta = load_model(PRETRAINED, device)  # missing or damaged? git checkout assets
    meta["sha256"] = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()
    return model, meta


# ---------------------------------------------------------------- training

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


def train(model, train_images, train_labels, val_images, val_labels, epochs, batch_size, lr,
          generator, bf16=False):
    """SGD with Nesterov momentum, OneCycle and label smoothing. Returns the best accuracy on the
    validation images; the model then has the weights of that epoch. generator: of all random
    numbers. FloatingPointError if the loss is not finite."""
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    train_images, train_labels = train_images.to(device), train_labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)  # OneCycle moves the momentum: .95, .85, .95
    steps = math.ceil(len(train_images) / batch_size)   # in one epoch
    # at least 5 steps: of 4, OneCycle would rise for 0 steps, and divide by that
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, pct_start=0.25,
                                                   total_steps=max(5, epochs * steps))
    best_accuracy, best_weights, start = -1.0, None, time.time()
    for epoch in range(1, epochs + 1):
        model.train()
        correct, loss_sum = 0, 0.0
        order = torch.randperm(len(train_images), generator=generator).to(device)
        for step, batch in enumerate(order.split(batch_size), 1):
            if sys.stdout.isatty():                     # an epoch may take minutes
                print(f"epoch {epoch}: step {step}/{steps}", end="\r", flush=True)
            x, y = augment(train_images[batch], generator), train_labels[batch]
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(x)
            logits = logits.float()                     # (B, 10)
            loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}, step {step}:"
                                         " choose a lower learning rate (--lr)")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += (logits.argmax(1) == y).sum().item()
            loss_sum += loss.item() * len(y)
        accuracy = (look(model, val_images)[1] == val_labels).double().mean().item()
        if accuracy >= best_accuracy:
            best_accuracy = accuracy
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        seconds = time.time() - start
        print(f"epoch {epoch:2}/{epochs}  train (augmented): loss {loss_sum / len(order):.4f},"
              f" accuracy {correct / len(order):.2%}  val: accuracy {accuracy:.2%}"
              f"  {seconds:.0f} s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    model.load_state_dict(best_weights)
    return best_accuracy


# ---------------------------------------------------------------- the section

def half_precision(state):
    """Matrices and kernels as float16, half the size. Vectors and buffers stay float32."""
    return {name: value.half() if value.dim() > 1 else value for name, value in state.items()}


def draw_confusion(asked, judged, path, title):
    """Rows: true (or requested) class; columns: what the classifier says; percent of the row."""
    counts = torch.bincount(asked * 10 + judged, minlength=100).view(10, 10)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = data.Figure(figsize=(6, 5.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="judged as", ylabel="true or requested class")
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(10), data.CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), data.CLASSES)
    for row in range(10):
        for column in range(10):
            if counts[row, column]:
                axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center",
                          fontsize=8, color="white" if share[row, column] > 0.5 else "black")
    data.save_figure(figure, path)


def arguments():
    """The flags of this script, with their defaults."""
    parser = data.Parser(__doc__)
    parser.add_argument("--epochs", type=int, default=18, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one step")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--bf16", choices=("auto", "on", "off"), default="auto",
                        help="train in bfloat16; auto: where the hardware is fast at it")
    return parser


@data.command
def main(argv=None):
    """Train, save, test what was saved; returns [path of the checkpoint]."""
    parser = arguments()
    args = parser.parse_args(argv)
    data.check_flags(args)
    device = data.pick_device(args.device)
    bf16 = data.pick_bf16(args.bf16, device)
    dataset = data.load(args.data)

    torch.manual_seed(args.seed)
    model = FashionResNet18(dataset.train_images.mean(), dataset.train_images.std()).to(device)
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"device {device}, bfloat16 {bf16}, {parameters:,} parameters", flush=True)
    start = time.time()
    accuracy = train(model, dataset.train_images, dataset.train_labels,
                     dataset.val_images, dataset.val_labels, args.epochs, args.batch_size, args.lr,
                     torch.Generator().manual_seed(args.seed), bf16)
    name = data.run_name(f"classifier-{dataset.source}-seed{args.seed}", parser, args)
    path = args.out / f"{name}.pt"
    metrics = {"val_accuracy": accuracy, "seconds": time.time() - start}
    data.save_checkpoint(path, script="classifier", config=data.settings(args),
                         source=dataset.source, seed=args.seed, device=str(device), bf16=bf16,
                         metrics=metrics, state_dict=half_precision(model.state_dict()))

    model, _ = load_model(path, device)  # what is measured is what is stored: the float16 file
    _, judged = look(model, dataset.test_images)
    test_accuracy = (judged == dataset.test_labels).double().mean().item()
    draw_confusion(dataset.test_labels, judged, args.out / f"{name}-confusion.png",
                   f"Test accuracy {test_accuracy:.2%}: what is taken for what?")
    print(f"test accuracy {test_accuracy:.2%} ({dataset.source}, reloaded from {path},"
          f" {path.stat().st_size / 1e6:.2f} MB)")
    return [path]


if __name__ == "__main__":
    main()
