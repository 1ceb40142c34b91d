"""Section 6 needs a classifier that judges generated images: FashionResNet18.

A generator is judged by what somebody else sees in its images. This ResNet-18 (He et al. 2016,
arXiv:1512.03385, Table 1; with a first convolution of 3 x 3 and no pooling after it, as our images
are small, and half as many channels) tells two things: which class it recognises, and 256 features,
the numbers before its last layer. evaluate.py uses the class to see whether a model drew what it
was asked for, and the features to see how far drawn images are from real ones.

    raw image in [0, 1]  ->  (x - mean) / std  ->  stem  ->  8 blocks  ->  features  ->  logits

(The stem is the first convolution; two blocks at a time work at the same resolution.) The
normalisation sits inside the network: its mean and std are those of the training images, and
are saved with the weights. So every image, real or generated, goes in raw, and nobody can normalise
twice or forget to.

    python classifier.py            # hours, and not needed: the trained classifier is in assets/

The classifier in assets/ (full data, seed 0, 18 epochs, by an earlier version of this script) is
right for 95.12 % of the validation images and for 94.74 % of the test images.
Try: --data sample --epochs 5 --out try, with and without augment() in train(): what changes?
"""
import math
import time

import torch

import data

PRETRAINED = data.ASSETS / "fashion-resnet18.pt"

# ---------------------------------------------------------------- the network

class BasicBlock(torch.nn.Module):
    """relu( shortcut(x) + two 3 x 3 convolutions of x )."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(outputs)
        self.shortcut = torch.nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                torch.nn.BatchNorm2d(outputs))

    def forward(self, x):
        h = self.norm1(self.conv1(x)).relu()
        return (self.shortcut(x) + self.norm2(self.conv2(h))).relu()


class FashionResNet18(torch.nn.Module):
    """18 weight layers: stem, 16 convolutions in eight blocks, head (shortcuts are not counted)."""

    def __init__(self, mean=0.0, std=1.0, width=32):
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(width), torch.nn.ReLU())
        blocks, inputs = [], width
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = torch.nn.Sequential(*blocks)
        self.head = torch.nn.Linear(8 * width, len(data.CLASSES))

    def features(self, images):
        """Raw images (B, 1, 28, 28) in [0, 1] -> penultimate features (B, 256)."""
        h = self.stem((images - self.mean) / self.std)      # (B, 32, 28, 28)
        h = self.blocks(h)                                  # (B, 256, 4, 4)
        return h.mean((2, 3))                               # (B, 256)

    def forward(self, images):
        """Raw images (B, 1, 28, 28) in [0, 1] -> class logits (B, 10)."""
        return self.head(self.features(images))


# ---------------------------------------------------------------- what the classifier sees

def check_images(images):
    """ValueError unless images are raw: not normalised, no logits, not scaled twice."""
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and 0.1 < high <= 1):              # with nan, every comparison is False
        raise ValueError(f"images range from {low:.4g} to {high:.4g}, but the classifier takes raw"
                         " images in [0, 1]: take the sigmoid of logits, and do not normalise")


@torch.no_grad()
def look(resnet, images):
    """Raw images (N, 1, 28, 28) -> (features (N, 256), recognised classes (N,)), on the CPU."""
    check_images(images)
    resnet.eval()
    device = next(resnet.parameters()).device
    # batches of 100, because larger ones were slower on the CPU
    features = torch.cat([resnet.features(x.to(device)) for x in images.split(100)])
    return features.cpu(), resnet.head(features).argmax(1).cpu()


def load_model(path, device="cpu"):
    """(FashionResNet18 in eval mode, all that its checkpoint holds). Code in a file is not run."""
    meta = torch.load(path, map_location="cpu", weights_only=True)
    model = FashionResNet18()                           # mean and std are loaded with the weights
    model.load_state_dict(meta["state_dict"])
    return model.eval().to(device), meta


def load_pretrained(device="cpu"):
    """The frozen classifier in assets/, as load_model gives it."""
    return load_model(PRETRAINED, device)


# ---------------------------------------------------------------- training

def augment(images, generator):
    """Images (B, 1, 28, 28) -> as many, each shifted by up to 2 pixels in both directions; half of
    them are mirrored, and half of them get a grey box, which covers up to 12 x 12 pixels."""
    def random(low, high):                              # a whole number from low to high
        return torch.randint(low, high + 1, (), generator=generator).item()
    augmented = []
    for x in torch.nn.functional.pad(images, (2, 2, 2, 2)):     # (1, 32, 32), a copy of the image
        row, column = random(0, 4), random(0, 4)
        x = x[:, row:row + 28, column:column + 28]      # (1, 28, 28)
        if random(0, 1):
            x = x.flip(2)
        if random(0, 1):
            row, column, grey = random(0, 27), random(0, 27), random(0, 255) / 255
            x[:, row:row + random(4, 12), column:column + random(4, 12)] = grey
        augmented.append(x)
    return torch.stack(augmented)


def train(model, train_images, train_labels, val_images, val_labels, epochs, batch_size, lr,
          generator):
    """SGD with Nesterov momentum, OneCycle and label smoothing, on images (N, 1, 28, 28) and labels
    (N,). Returns the best accuracy on the validation images; the model then has the weights of that
    epoch. generator: of all random numbers. FloatingPointError if the loss is not finite."""
    check_images(train_images)
    if (train_labels.shape, val_labels.shape) != (train_images.shape[:1], val_images.shape[:1]):
        raise ValueError("give one label for each image")
    device = next(model.parameters()).device
    train_images, train_labels = train_images.to(device), train_labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    steps = epochs * math.ceil(len(train_images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   cycle_momentum=False)    # leave it at 0.9
    best_accuracy, best_weights, start = -1.0, None, time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        correct, loss_sum = 0, 0.0
        order = torch.randperm(len(train_images), generator=generator)
        for step, indices in enumerate(order.split(batch_size)):
            if step % 50 == 0:
                print(".", end="", flush=True)          # an epoch takes minutes
            x = augment(train_images[indices.to(device)], generator)        # (B, 1, 28, 28)
            y = train_labels[indices.to(device)]                            # (B,)
            logits = model(x)                                               # (B, 10)
            loss = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} in epoch {epoch}: choose a lower lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += (logits.argmax(1) == y).sum().item()
            loss_sum += loss.item() * len(y)
        _, recognised = look(model, val_images)
        accuracy = (recognised == val_labels).double().mean().item()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        print(f" epoch {epoch}/{epochs}: training (augmented) loss {loss_sum / len(order):.4f}"
              f" accuracy {correct / len(order):.2%}, validation accuracy {accuracy:.2%},"
              f" {time.perf_counter() - start:.0f} s", flush=True)
    model.load_state_dict(best_weights)
    return best_accuracy


# ---------------------------------------------------------------- the section

FLAGS = data.flags(__file__, __doc__, epochs=18, batch_size=128, lr=0.1)


def main(argv=None, dataset=None):
    """Train, save, test what was saved. argv: a list of flags, or None for those of the command
    line; dataset: what data.load() gave, or None to load it. Returns the path of the checkpoint."""
    args = FLAGS.parse_args(argv)
    device = data.pick_device(args.device)
    dataset = dataset or data.load(args.data)
    path = data.run_path(args, dataset.source)

    torch.manual_seed(args.seed)
    model = FashionResNet18(dataset.train_images.mean(), dataset.train_images.std()).to(device)
    accuracy = train(model, dataset.train_images, dataset.train_labels,
                     dataset.val_images, dataset.val_labels, args.epochs, args.batch_size, args.lr,
                     torch.Generator().manual_seed(args.seed))
    # matrices and kernels are stored as float16, which halves the file
    halved = {name: value.half() if value.dim() > 1 else value
              for name, value in model.state_dict().items()}
    data.save_checkpoint(path, args, dataset, {"val_accuracy": accuracy}, halved)

    model, _ = load_model(path, device)                 # what is tested is what is stored
    _, recognised = look(model, dataset.test_images)
    test_accuracy = (recognised == dataset.test_labels).double().mean().item()
    print(f"test ({dataset.source}): accuracy {test_accuracy:.2%}\n-> {path}")
    return path


if __name__ == "__main__":
    data.run(main)
