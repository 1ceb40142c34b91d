"""Every test of the study: python -m pytest test_all.py (offline, about a minute).

The tests of the maths hold the code against something that is not this code: a closed form,
torch.distributions, numpy. The order is that of the lesson. They are homework, too:
`python test_all.py --blank mine` copies the scripts to a new folder, but for the bodies of the
functions in BLANKS. Write them in your own words, and run the tests there: they judge what the
functions do, and say what is wrong. Tests of scripts that are not in the folder are skipped.
"""
import argparse
import ast
import copy
import gzip
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import struct
import sys
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
SCRIPTS = ("data", "vae", "conv_vae", "beta_vae", "cvae", "classifier", "evaluate")
CLASS_OF = {"vae": "VAE", "conv_vae": "ConvVAE", "beta_vae": "BetaVAE", "cvae": "CVAE"}


def section(name):
    """A script as a module, or None if it, or a script that it imports, is not in this folder."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in SCRIPTS:
            raise
        return None


data, vae, conv_vae, beta_vae, cvae, classifier, evaluate = map(section, SCRIPTS)


@pytest.fixture(autouse=True)
def skip_without_its_scripts(request):
    """A test is skipped if a script that it names is not in this folder."""
    source = inspect.getsource(request.function)
    for name in SCRIPTS:
        if globals()[name] is None and re.search(rf"\b{name}\.", source):
            pytest.skip(f"not in this folder: {name}.py")


def each(*names):
    """Run a test with each of these scripts that is in this folder, as `module`."""
    modules = [section(name) for name in names if section(name)]
    return pytest.mark.parametrize("module", modules, ids=lambda module: module.__name__)


each_model = each(*CLASS_OF)
needs_readme = pytest.mark.skipif(not (HERE / "README.md").exists(), reason="README.md is not here")


@pytest.fixture(scope="session")
def sample():
    return data.load("sample")


@pytest.fixture(scope="session")
def tiny(sample):
    train, test = torch.arange(300) * 16, torch.arange(300) * 6         # images of all classes
    return sample._replace(
        train_images=sample.train_images[train], train_labels=sample.train_labels[train],
        val_images=sample.val_images[::10], val_labels=sample.val_labels[::10],
        test_images=sample.test_images[test], test_labels=sample.test_labels[test])


def given(module, labels):
    """The further argument of a model's methods: the labels, for the CVAE."""
    return (labels,) if module.__name__ == "cvae" else ()


EXTRA = {"beta_vae": {"beta": 1}, "conv_vae": {"warmup": 0.2}, "cvae": {"warmup": 0.2}}


def fit(module, model, dataset, *settings, **extra):
    return module.train(model, dataset.train_images, *given(module, dataset.train_labels),
                        dataset.val_images, *given(module, dataset.val_labels), *settings,
                        **(EXTRA.get(module.__name__, {}) | extra))


def small(module, latent_dim=4):
    more = {"channels": 8} if module.__name__ in ("conv_vae", "cvae") else {}
    return getattr(module, CLASS_OF[module.__name__])(latent_dim, hidden=64, **more)


def spy(model):
    """Lists that fill up: (training mode?, images, labels if any) of each call; each decoded z."""
    calls, decoded, decode = [], [], model.decode

    def noted_decode(z, *y):
        decoded.append(z.detach())
        return decode(z, *y)
    model.decode = noted_decode
    model.register_forward_pre_hook(lambda _, x: calls.append((model.training, *x)))
    return calls, decoded


def kl_oracle(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)) of each latent, by torch.distributions."""
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))


def recon_oracle(logits, x):
    """-log p(x | z), summed over the pixels, by torch.distributions."""
    p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    return -p.log_prob(x).flatten(1).sum(1)


def has_shape(name, tensor, shape, meaning):
    assert tensor.shape == shape, \
        f"{name} has shape {tuple(tensor.shape)}: should be {shape}, {meaning}"


# ================================================================ 1. the loss, reparameterization

@each_model
def test_kl_of_latents_is_that_of_two_gaussians(module):
    torch.manual_seed(0)
    mu, logvar = torch.randn(7, 5), torch.randn(7, 5)
    kl = module.kl_of_latents(mu, logvar)
    has_shape("the result", kl, (7, 5), "one number for each latent of each image")
    assert kl.min() >= 0, "a KL is never negative: is a sign wrong, or a term missing?"
    assert torch.allclose(kl, kl_oracle(mu, logvar), rtol=1e-4, atol=1e-5), \
        "this is not the KL of N(mu, sigma^2) and N(0, 1), where logvar is log sigma^2"


@each_model
def test_kl_is_summed_over_the_latents(module):
    torch.manual_seed(0)
    mu, logvar = torch.randn(7, 5), torch.randn(7, 5)
    _, kl = module.elbo_terms(torch.zeros(7, 1, 28, 28), torch.zeros(7, 1, 28, 28), mu, logvar)
    has_shape("kl", kl, (7,), "one number for each image: sum over the latents only")
    expected = kl_oracle(mu, logvar).sum(1)
    assert torch.allclose(kl, expected, rtol=1e-4), \
        f"kl of the first image is {kl[0]:.3f}: should be {expected[0]:.3f}, summed over latents"


@each_model
def test_recon_is_minus_log_bernoulli(module, sample):
    torch.manual_seed(0)
    x, logits = sample.test_images[:20], torch.randn(20, 1, 28, 28)
    recon, _ = module.elbo_terms(logits, x, torch.zeros(20, 2), torch.zeros(20, 2))
    has_shape("recon", recon, (20,), "one number for each image: sum over the pixels only")
    expected = recon_oracle(logits, x)
    assert torch.allclose(recon, expected, rtol=1e-4), \
        (f"recon of the first image is {recon[0]:.3f}: should be {expected[0]:.3f}, which is"
         " -log p(x | z), summed over the 784 pixels; the decoder gives logits")


@each_model
def test_reparameterized_z(module):
    torch.manual_seed(0)
    mu = torch.tensor([[1.5, -2.0]]).repeat(200_000, 1).requires_grad_()
    logvar = torch.tensor([[0.0, math.log(0.25)]]).repeat(200_000, 1).requires_grad_()
    z = small(module, 2).reparameterize(mu, logvar)
    has_shape("z", z, (200_000, 2), "as mu")
    question = "was z drawn without reparameterization?"
    assert z.requires_grad, f"no gradient reaches mu and logvar: {question}"
    # d/dmu E[z^2] = 2 mu and d/dlogvar E[z^2] = sigma^2
    z.pow(2).sum().backward()
    assert mu.grad is not None, f"no gradient reaches mu: {question}"
    assert logvar.grad is not None, f"no gradient reaches logvar: {question}"
    mean, std = z.mean(0), z.std(0)
    assert torch.allclose(mean, torch.tensor([1.5, -2.0]), atol=0.02), \
        f"the mean of z is {mean.tolist()}: should be mu, [1.5, -2.0]"
    assert torch.allclose(std, torch.tensor([1.0, 0.5]), atol=0.02), \
        f"the std of z is {std.tolist()}: should be sigma, [1.0, 0.5]; logvar is log sigma^2"
    assert abs(z.T.corrcoef()[0, 1]) < 0.02, "both latents have the same eps: draw one for each"
    assert torch.allclose(mu.grad.mean(0), torch.tensor([3.0, -4.0]), atol=0.03), \
        "the gradient with respect to mu is not that of z = mu + sigma * eps"
    assert torch.allclose(logvar.grad.mean(0), torch.tensor([1.0, 0.25]), atol=0.03), \
        "the gradient with respect to logvar is not that of z = mu + sigma * eps"


# ================================================================ 2. training and testing

@each_model
def test_training_step(module, tiny, monkeypatch):
    """Plain gradient descent, by the script and by hand, on the same batches and with same eps."""
    monkeypatch.setattr(torch.optim, "Adam",
                        lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR",
                        lambda *_, **__: types.SimpleNamespace(step=lambda: None))
    torch.manual_seed(0)
    trained = small(module)
    expected = copy.deepcopy(trained)
    calls, decoded = spy(trained)
    extra = {name: 4 if name == "beta" else 0.5 for name in EXTRA.get(module.__name__, {})}
    history = fit(module, trained, tiny, 1, 70, 1e-3, **extra)          # the last batch has only 20
    recons, kls = [], []
    for step, ((_, x, *y), z) in enumerate(zip(calls[:5], decoded)):
        mu, logvar = expected.encode(x, *y)
        eps = ((z - mu) / (logvar / 2).exp()).detach()
        recon = recon_oracle(expected.decode(mu + (logvar / 2).exp() * eps, *y), x)
        kl = kl_oracle(mu, logvar).sum(1)
        weight = min(1, (step / 5) / 0.5) if "warmup" in extra else extra.get("beta", 1)
        recons.append(recon.detach())
        kls.append(kl.detach())
        slopes = torch.autograd.grad((recon + weight * kl).mean(), list(expected.parameters()))
        for parameter, slope in zip(expected.parameters(), slopes):
            parameter.data -= 1e-3 * slope
    assert all(torch.allclose(p, q, atol=2e-5)
               for p, q in zip(trained.parameters(), expected.parameters())), \
        ("a step does not follow the gradient of the loss of its own batch: is it the mean over the"
         " images, and are the gradients of the step before set to zero?")
    assert history[0]["recon"] == pytest.approx(torch.cat(recons).mean().item(), rel=1e-4)
    assert history[0]["kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)


@each_model
def test_an_epoch_is_every_training_image_once_then_the_validation_images(module, tiny):
    images, model = tiny.train_images.clone(), small(module)
    images[:, 0, 0, 0] = torch.arange(300) / 300        # the first pixel tells the number
    calls, _ = spy(model)
    fit(module, model, tiny._replace(train_images=images), 2, 70, 1e-3)
    assert [training for training, *_ in calls] == 2 * [True, True, True, True, True, False]
    orders = []
    for epoch in (calls[:6], calls[6:]):                # 70 + 70 + 70 + 70 + 20, then the test
        numbers = [(300 * x[:, 0, 0, 0]).round().long() for _, x, *_ in epoch[:5]]
        for number, (_, _, *labels) in zip(numbers, epoch):
            assert all(torch.equal(y, tiny.train_labels[number]) for y in labels)
        orders.append(torch.cat(numbers))
        assert torch.equal(orders[-1].sort().values, torch.arange(300))
        for found, expected in zip(epoch[5][1:], (tiny.val_images, tiny.val_labels)):
            assert torch.equal(found, expected), "validation is not on the validation images"
    assert not torch.equal(*orders) and not torch.equal(orders[0], torch.arange(300))


@each_model
def test_adam_and_its_learning_rate(module, tiny, monkeypatch):
    rates, settings = [], set()

    class Noted(torch.optim.Adam):
        def step(self, *args, **more):
            rates.append(self.param_groups[0]["lr"])
            settings.add((*self.param_groups[0]["betas"], self.param_groups[0]["weight_decay"]))
            return super().step(*args, **more)
    monkeypatch.setattr(torch.optim, "Adam", Noted)
    fit(module, small(module), tiny, 10, 30, 1e-3)
    assert settings == {(0.9, 0.99, 0)} and len(rates) == 100
    assert (rates[0], rates[-1]) == pytest.approx((1e-3 / 25, 1e-3 / 25e4), rel=1e-6)
    assert [max(rates), rates[29], rates[64]] == pytest.approx([1e-3, 1e-3, 5e-4], rel=0.02)


@each_model
def test_test_loop(module, sample):
    torch.manual_seed(0)
    model, (x, y) = small(module, 8), (sample.test_images[:250], sample.test_labels[:250])
    calls, decoded = spy(model)
    result = module.test(model, x, *given(module, y), batch_size=100)
    assert torch.equal(torch.cat([images for _, images, *_ in calls]), x), "not every image, once"
    with torch.no_grad():
        mu, logvar = model.encode(x, *given(module, y))
        z = torch.cat(decoded[:3])                      # batches of 100, 100 and 50
        eps = (z - mu) / (logvar / 2).exp()
        assert eps.std().item() == pytest.approx(1, abs=0.1) and abs(eps.mean()) < 0.1, \
            "z is not a draw from q(z | x): the decoder must not be given mu when testing"
        recon = recon_oracle(model.decode(z, *given(module, y)), x)
    for name, values in (("recon", recon), ("kl", kl_oracle(mu, logvar).sum(1))):
        assert result[name] == pytest.approx(values.mean().item(), rel=1e-4), \
            f"{name} is not its mean over all images, with one draw of z for each"
    assert result["total"] == pytest.approx(result["recon"] + result["kl"])


@each_model
def test_active_is_a_mean_kl_above_a_tenth_of_a_nat(module, tiny, monkeypatch):
    model = small(module)
    kl = torch.tensor([2.0, 0.19, 0.21, 0.0])           # of half of the images; it is mu^2 / 2
    mu = torch.stack([kl.mul(2).sqrt(), torch.zeros(4)]).repeat(150, 1)
    monkeypatch.setattr(model, "encode", lambda x, *y: (mu[:len(x)], torch.zeros(len(x), 4)))
    found = module.test(model, tiny.test_images, *given(module, tiny.test_labels), batch_size=100)
    assert found["active"] == 2 and found["kl"] == pytest.approx(1.2)


@each_model
def test_the_lesson_pastes_and_trains_on_any_tensor(module, capsys):
    text, end = inspect.getsource(module), inspect.getsource(module.test)
    block = text[text.index("\nclass "):text.index(end) + len(end)]
    names = {}
    exec("import math, time, torch\n" + block, names)
    torch.manual_seed(0)
    images, labels = torch.rand(70, 1, 28, 28), torch.arange(70) % 10
    model = names[CLASS_OF[module.__name__]](latent_dim=3)
    history = names["train"](model, images, *given(module, labels), images, *given(module, labels),
                             epochs=3, batch_size=20, lr=1e-3, **EXTRA.get(module.__name__, {}))
    assert len(history) == 3 and history[-1]["recon"] < history[0]["recon"]
    printed = capsys.readouterr().out.splitlines()
    for line, epoch in zip(printed, history, strict=True):
        found = [float(number) for number in re.findall(r"(?:recon|KL|total) ([\d.]+)", line)]
        recon, kl, val_recon, val_kl = (epoch[n] for n in ("recon", "kl", "val_recon", "val_kl"))
        assert found == pytest.approx([recon, kl, recon + kl, val_recon, val_kl,
                                       val_recon + val_kl], abs=0.006)
    names["test"](model, images, *given(module, labels))


@each_model
@pytest.mark.parametrize("change, found", [
    (lambda x: x * 255, "from 0 to 255"), (lambda x: (x - 0.286) / 0.353, "from -0.8"),
    (lambda x: x * math.nan, "from nan"), (lambda x: x / 255, "to 0.003922: .*once")],
    ids=("255", "standardised", "nan", "scaled twice"))
def test_images_that_the_loss_cannot_take_are_refused(module, change, found, tiny):
    """All of these would run, and their numbers would be wrong."""
    wrong, labels = change(tiny.train_images[:100]), tiny.train_labels[:100]
    for dataset in (tiny._replace(train_images=wrong, train_labels=labels),
                    tiny._replace(val_images=wrong)):
        with pytest.raises(ValueError, match=found):
            fit(module, small(module), dataset, 1, 50, 1e-3)
    with pytest.raises(ValueError, match=found):
        module.test(small(module), wrong, *given(module, labels))


@each("cvae", "classifier")
@pytest.mark.parametrize("change", (lambda y: y[:50], lambda y: torch.cat([y, y])))
def test_there_is_one_label_for_each_image(module, change, tiny):
    model = classifier.FashionResNet18() if module.__name__ == "classifier" else small(module)
    for split in ("train", "val"):
        labels = {"train": tiny.train_labels, "val": tiny.val_labels}
        labels[split] = change(labels[split])
        with pytest.raises(ValueError, match="give one"):
            module.train(model, tiny.train_images, labels["train"], tiny.val_images, labels["val"],
                         1, 100, 0.1, 0.2)


@each_model
def test_an_exploding_learning_rate_stops_and_tells_what_helps(module, tiny):
    with pytest.raises((FloatingPointError, ValueError, RuntimeError)) as error:
        fit(module, small(module), tiny, 2, 10, 1e9)
    assert "lower lr" in str(error.value) or error.type is not FloatingPointError


# ================================================================ 3. one claim a section

@each("conv_vae", "cvae")
def test_warmup_goes_from_0_to_1_over_the_stated_share_of_all_steps(module, tiny, monkeypatch):
    """With a recon of 0 and a KL of 1, the loss is the weight of the KL itself."""
    losses = []
    monkeypatch.setattr(module, "elbo_terms", lambda logits, x, mu, logvar: (
        0 * logits.sum((1, 2, 3)), 0 * mu.sum(1) + 1))
    monkeypatch.setattr(torch, "isfinite",              # train() asks this of each loss
                        lambda loss: losses.append(loss.item()) or True)
    for warmup, weights in ((0.5, [0, 1 / 3, 2 / 3, 1, 1, 1]), (0, 6 * [1])):
        losses.clear()
        fit(module, small(module), tiny, 2, 100, 1e-3, warmup=warmup)       # 2 x 3 steps
        assert losses == pytest.approx(weights), \
            f"with warmup {warmup} the weights of the six steps are {losses}: should be {weights}"


def test_what_is_my_beta():
    torch.manual_seed(0)
    x, logits, mu, logvar = *torch.rand(2, 16, 1, 28, 28), *torch.randn(2, 16, 10)
    recon, kl = vae.elbo_terms(logits, x, mu, logvar)
    r = -(x * logits.sigmoid().log() + (1 - x) * (-logits).sigmoid().log())     # of each pixel
    k = kl_oracle(mu, logvar)                           # of each latent
    for loss, c, beta in (                              # loss = c (recon + beta KL)
            (recon.mean() + kl.mean(), 1, 1),
            (r.mean() + kl.mean(), 1 / 784, 784),
            (r.mean() + k.mean(), 1 / 784, 784 / 10),
            (r.mean() + k.sum(), 1 / 784, 784 * 16),
            (recon.mean() + k.mean(), 1, 1 / 10),
            (r.mean() + 0.00025 * kl.mean(), 1 / 784, 0.196),
            (r.sum() + k.sum(), 16, 1)):
        assert loss.item() == pytest.approx(c * (recon + beta * kl).mean().item(), rel=1e-4)


def test_two_causes_of_an_ill_vae():
    logits = torch.tensor([10.0, 100.0, 1000.0])
    cost = torch.nn.functional.binary_cross_entropy_with_logits
    falling = cost(logits, torch.full((3,), 1.5), reduction="none")     # pixels above 1
    assert (falling.diff() < 0).all() and falling[-1] == -500
    x, p = torch.ones(3), logits.sigmoid()
    by_hand = -(x * p.log() + (1 - x) * (1 - p).log())
    assert by_hand[-1].isnan() and cost(logits, x).isfinite()


def tells_only(c, found, method):
    others = found.flatten(1)[torch.arange(10) != c]
    assert torch.allclose(others, others[:1], atol=1e-5) \
        and not torch.allclose(found.flatten(1)[c], others[0], atol=1e-5), \
        f"label {c} does not come to {method} as the number 1 at place {c} of ten"


@torch.no_grad()
def test_the_encoder_of_a_cvae_is_told_the_label(sample):
    model, x = cvae.CVAE(4), sample.test_images[:1].expand(10, -1, -1, -1)
    for name, found in zip(("mu", "logvar"), model.encode(x, torch.arange(10))):
        has_shape(name, found, (10, 4), "one number for each latent of each image")
    for c in range(10):
        model.encoder[0].weight.zero_()
        model.encoder[0].weight[:, 16 + c] = 1.0        # after the 16 pixels of a patch
        tells_only(c, model.encode(x, torch.arange(10))[0], "encode")


@torch.no_grad()
def test_the_decoder_of_a_cvae_is_told_the_label():
    model, z = cvae.CVAE(4), torch.randn(1, 4).expand(10, -1)
    has_shape("the result", model.decode(z, torch.arange(10)), (10, 1, 28, 28), "logits")
    for c in range(10):
        model.dense1.weight.zero_()
        model.dense1.weight[:, 4 + c] = 1.0             # after the four latents
        tells_only(c, model.decode(z, torch.arange(10)), "decode")


# ---------------------------------------------------------------- what the latents learned

def test_analysis_orders_active_latents_by_their_kl(sample):
    torch.manual_seed(0)
    model, x = small(beta_vae, 6), sample.test_images
    mu = torch.randn(len(x), 6) * torch.tensor([1, 0, 3, 2, 0.2, 4])        # KL: mu^2 / 2
    model.encode = lambda images: (mu, torch.zeros(len(x), 6))
    found = beta_vae.analyse(model, x)
    assert found["latents"] == [5, 2, 3, 0]
    assert torch.allclose(found["kl_of_latents"], mu.pow(2).mean(0) / 2, rtol=1e-3, atol=1e-5)
    expected = abs(np.corrcoef(mu[:, [5, 2, 3, 0]].T, beta_vae.attributes(x).T)[:4, 4:])
    assert np.allclose(found["correlations"], expected, atol=1e-5)


def test_attributes_of_a_drawn_rectangle():
    x = torch.zeros(3, 1, 28, 28)
    x[0, 0, 8:18, 4:10] = 1.0                           # 10 rows, 6 columns, left of the middle
    x[1] = torch.maximum(x[0], x[0].flip(2))            # with its mirror image, that touches it not
    x[1, 0, 27, 13:15] = 0.2                            # faint: more ink, but no wider or higher
    ink, width, height, symmetry, top = beta_vae.attributes(x).T
    assert ink.tolist() == pytest.approx([60, 120.4, 0], abs=1e-4)
    assert width.tolist() == [6, 12, 0] and height.tolist() == [10, 10, 0]
    assert symmetry[:2].tolist() == pytest.approx([0, 1])
    assert top[:2].tolist() == pytest.approx([0.6, 72 / 120.4])
    assert beta_vae.ATTRIBUTES == ["ink", "width", "height", "symmetry", "top"]


# ---------------------------------------------------------------- the pictures

@pytest.fixture
def figures(monkeypatch):
    saved = []
    monkeypatch.setattr(data.Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    return saved


@pytest.fixture
def grids(monkeypatch):
    """{end of the file name, or title: (logits of the images, rows, columns)} of all grids."""
    drawn = {}

    def image_grid(images, path, title="", rows=(), columns=()):
        name = str(path).rpartition("-")[2]
        drawn[name] = images.clamp(1e-6, 1 - 1e-6).logit(), tuple(rows), tuple(columns)
    monkeypatch.setattr(data, "image_grid", image_grid)
    monkeypatch.setattr(data, "draw_grid", lambda axes, images, title, rows, columns=():
                        image_grid(images, title, rows=rows, columns=columns))
    monkeypatch.setattr(data, "plot_curves", lambda history, path: None)
    return drawn


def plain_decoder(z, *y):
    """Logits (B, 1, 28, 28): column d is z_d; the last row is the label, if there is one."""
    logits = torch.zeros(len(z), 1, 28, 28)
    logits[:, 0, :, :z.shape[1]] = z[:, None]
    if y:
        logits[:, 0, 27] = y[0][:, None] / 2
    return logits


@each("vae", "conv_vae", "cvae")
def test_pictures_of_a_model(module, tiny, grids):
    """In the samples of a CVAE, a row is one z, a column one class; elsewhere all z are others."""
    torch.manual_seed(0)
    model = small(module)
    mu = torch.arange(10.0)[:, None].expand(10, 4) / 5
    model.encode = lambda x, *y: (mu[:len(x)], torch.full((len(x), 4), -20.0))      # sigma is 0
    model.decode = plain_decoder
    module.draw_pictures(model, tiny, [], "folder/stem")
    indices, names = data.one_of_each_class(tiny.test_labels)
    pictures, rows, columns = grids["reconstructions.png"]
    assert rows == ("original", "decoded z")
    assert torch.allclose(pictures[0].sigmoid(), tiny.test_images[indices], atol=1e-5)
    assert torch.allclose(pictures[1, :, 0, 0, :4], mu, atol=1e-3) and columns == tuple(names)
    pictures, rows, columns = grids["samples.png"]
    pictures = pictures.view(8, 10, 28, 28)
    z = pictures[:, :, 0, :4]                           # (8, 10, 4)
    assert (z.mean().item(), z.std().item()) == pytest.approx((0, 1), abs=0.2)
    if module.__name__ != "cvae":
        assert len(z.view(80, 4).unique(dim=0)) == 80
        return
    assert len(z[:, 0].unique(dim=0)) == 8 and torch.allclose(z, z[:, :1], atol=1e-4)
    assert torch.allclose(pictures[:, :, 27, 27], torch.arange(10) / 2, atol=1e-3)
    assert columns == data.CLASSES
    pictures, rows, columns = grids["swaps.png"]        # (10, 11, 1, 28, 28)
    assert torch.allclose(pictures[:, 0].sigmoid(), tiny.test_images[indices], atol=1e-5)
    assert torch.allclose(pictures[:, 1:, 0, 0, :4], mu[:, None].expand(-1, 10, -1), atol=1e-3)
    assert torch.allclose(pictures[:, 1:, 0, 27, 27], torch.arange(10) / 2, atol=1e-3)
    assert rows == tuple(names) and columns == ("real", *data.CLASSES)


def test_the_walk_stays_in_the_prior_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = small(cvae, 2000)
    _, decoded = spy(model)
    cvae.draw_walk(model, tmp_path / "walk.gif")
    walk = torch.stack(decoded)[:, 0]                   # (48, 2000)
    assert torch.allclose(walk.mean(1), torch.zeros(48), atol=0.1)
    assert torch.allclose(walk.std(1), torch.ones(48), atol=0.1)
    steps = (walk.roll(1, 0) - walk).pow(2).mean(1)     # the first step is that from the last z
    assert torch.allclose(steps, torch.tensor(2 - 2 * math.cos(2 * math.pi / 48)), rtol=0.1)
    content = (tmp_path / "walk.gif").read_bytes()
    assert content[:10] == b"GIF89a" + struct.pack("<HH", 640, 88)
    assert content.count(b"\x21\xf9\x04") == 48         # so begins each image of a GIF


def test_the_map_shows_each_place_where_it_is(tiny, figures):
    """The labels are 0 and 12, and the encoder puts these images at (1, 2) and (-1, -2)."""
    labels, model = torch.arange(300) % 2 * 12, small(vae, 2)
    mu, logvar = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -2.0]).expand(300, 2)
    model.encode = lambda x: ((1 - labels[:, None] / 6) * mu, logvar)
    # z0 is the brightness of the left half, z1 that of the right one
    model.decode = lambda z: z.view(-1, 1, 1, 2).expand(-1, 1, 28, 2).repeat_interleave(14, dim=3)
    vae.draw_map(model, tiny._replace(test_labels=labels), "map.png")
    left, right = figures[0].axes
    clouds = {cloud.get_label(): cloud.get_offsets().tolist() for cloud in left.collections}
    assert clouds == {"T-shirt/top": 150 * [[1, 2]], "12": 150 * [[-1, -2]]}
    circle, ellipse, _ = left.lines
    assert np.allclose(np.hypot(*circle.get_data()), 2)
    assert np.ptp(ellipse.get_data(), axis=1) == pytest.approx([4, 4 / math.e], abs=0.01)
    canvas = np.asarray(right.images[0].get_array())        # 16 x 16 images of 28 x 28 pixels, of
    # which we look at one in the left half (row 14, column 7) and one in the right (column 21)
    assert (np.diff(canvas[14, 7::28]) > 0).all()           # z0 rises to the right ...
    assert (np.diff(canvas[14::28, 21]) < 0).all()          # ... and z1 upwards
    assert canvas[14, 7] == pytest.approx(1 / (1 + math.exp(3.75)), abs=1e-3)   # the first place
    shown = right.images[0]
    assert (shown.get_extent(), shown.origin, shown.get_clim()) == ([-4, 4, -4, 4], "upper", (0, 1))


def test_pictures_of_the_sweep(grids, figures):
    sweep = {}
    for beta, latents in ((0.5, [2, 0]), (4.0, [])):
        model = small(beta_vae)
        model.encode = lambda x: (torch.full((1, 4), 0.7), None)
        model.decode = lambda z, beta=beta: plain_decoder(z) + beta
        sweep[beta] = {"model": model, "kl": 9 - beta, "recon": 200 + beta, "latents": latents,
                       "kl_of_latents": torch.tensor([0.5, 0.0, 3.0, 0.0]),
                       "correlations": torch.rand(len(latents), 5)}
    beta_vae.draw_tradeoff(sweep, "tradeoff.png")
    axes = figures[0].axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[8.5, 200.5], [5, 204]]
    assert [(*text.get_position(), text.get_text().strip()) for text in axes.texts] == [
        (8.5, 200.5, "beta 0.5"), (5, 204, "beta 4")]
    pictures, rows, _ = grids["Decoded draws from the prior N(0, I)"]
    assert rows == ("beta 0.5", "beta 4") and len(pictures[0, :, 0, 0, 0].unique()) == 10
    assert torch.allclose(pictures[0] + 3.5, pictures[1], atol=1e-3)        # the same ten z

    beta_vae.draw_traversals(sweep, torch.zeros(1, 1, 28, 28), "traversals.png")
    pictures, rows, columns = grids["beta 0.5"]         # (2, 6, 1, 28, 28)
    assert rows == ("z2: 3.00", "z0: 0.50") and "beta 4" not in grids
    assert columns == ("mu", "-3", "-1.5", "0", "1.5", "3")
    expected = torch.full((2, 6, 4), 0.7)
    expected[0, :, 2] = expected[1, :, 0] = torch.tensor([0.7, -3, -1.5, 0, 1.5, 3])
    assert torch.allclose(pictures[:, :, 0, 0, :4] - 0.5, expected, atol=1e-3)

    beta_vae.draw_attributes({0.5: sweep[0.5]}, "attributes.png")
    axes = figures[2].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["z2", "z0"]
    for text, strength in zip(axes.texts, sweep[0.5]["correlations"].flatten(), strict=True):
        assert text.get_text() == f"{strength:.2f}"
    assert [text.get_position() for text in axes.texts[4:6]] == [(4, 0), (0, 1)]


def test_image_grid_puts_every_image_in_its_cell(figures):
    images = torch.rand(2, 3, 1, 28, 28)
    data.image_grid(images, "grid.png", rows=("a", "b"), columns=("c", "d", "e"))
    axes = figures[0].axes[0]
    shown = axes.images[0]
    assert (shown.origin, shown.get_clim(), shown.cmap.name) == ("upper", (0, 1), "gray")
    assert np.array_equal(shown.get_array()[31:59, 61:89], images[1, 2, 0])
    names = [tick.get_text() for tick in axes.get_yticklabels() + axes.get_xticklabels()]
    assert names == ["a", "b", "c", "d", "e"] and shown.get_array().shape == (60, 90)
    with pytest.raises(ValueError, match="sigmoid of logits"):
        data.image_grid(images * 9 - 4, "grid.png")


def test_curves_of_training_and_validation(figures):
    history = [{"recon": 9, "kl": 1, "val_recon": 8, "val_kl": 2},
               {"recon": 7, "kl": 3, "val_recon": 6, "val_kl": 4}]
    data.plot_curves(history, "curves.png")
    drawn = [(axes.get_title(), line.get_label(), line.get_xydata().tolist())
             for axes in figures[0].axes for line in axes.lines]
    assert drawn == [("recon", "training", [[1, 9], [2, 7]]),
                     ("recon", "validation", [[1, 8], [2, 6]]),
                     ("kl", "training", [[1, 1], [2, 3]]), ("kl", "validation", [[1, 2], [2, 4]])]


def test_models_side_by_side(crude, grids):
    model = small(vae, 4)
    mu = torch.arange(10.0)[:, None].expand(10, 4) / 5
    model.encode, model.decode = lambda x: (mu, torch.full((10, 4), -20.0)), plain_decoder
    evaluate.draw_models({"A": (model, {"recon": 200, "fid_prior": 1})}, crude, "out/of-models.png")
    pictures, rows, columns = grids["models.png"]
    assert torch.allclose(pictures[1, :, 0, 0, :4], mu, atol=1e-3)
    assert len(pictures[2, :, 0, 0, 0].unique()) == 10 and columns == data.CLASSES
    assert rows == ("real images", "A, recon 200.0 nats", "samples, FID 1.00")


# ================================================================ 4. the metrics

def test_fid_of_equal_sets_is_0_and_of_a_shift_its_square():
    a = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-4), "not 0 for equal sets"
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert evaluate.frechet_distance(a, a + shift) == pytest.approx(25, rel=1e-4), \
        "a shift of all features by (3, 4) should cost 3^2 + 4^2"
    with pytest.raises(ValueError, match="give more images than there are features, 6"):
        evaluate.frechet_distance(a, a[:6])


def test_fid_agrees_with_the_symmetric_form():
    """tr (S_a S_b)^1/2 is also the trace of the root of S_a^1/2 S_b S_a^1/2, which is symmetric."""
    rng = np.random.RandomState(1)
    a, b = (rng.randn(n, 8) @ rng.randn(8, 8) + rng.randn(8) for n in (400, 300))
    values, vectors = np.linalg.eigh(np.cov(a.T))
    root = vectors * np.sqrt(values) @ vectors.T
    product = np.sqrt(np.linalg.eigvalsh(root @ np.cov(b.T) @ root)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T))
    expected -= 2 * product
    for x, y in ((a, b), (b, a)):
        found = evaluate.frechet_distance(torch.from_numpy(x).float(), torch.from_numpy(y).float())
        assert found == pytest.approx(expected, rel=1e-5), \
            f"{found:.4f} should be {expected:.4f}: are the covariances over n - 1?"


def test_control_is_a_share_and_diversity_1_for_real_images_and_0_for_one_image_a_class():
    torch.manual_seed(0)
    labels, real = torch.arange(200) % 10, torch.randn(200, 5)
    recognised = torch.where(torch.arange(200) < 10, 4, labels)             # nine of 200 are wrong
    assert evaluate.controllability(recognised, labels) == pytest.approx(1 - 9 / 200)
    with pytest.raises(ValueError, match=r"\(200,\) classes, but \(200, 1\) asked for"):
        evaluate.controllability(recognised, labels[:, None])
    for drawn, expected in (labels < 10, 1), (labels < 5, 0.5):     # half of the classes is lost
        assert expected == pytest.approx(
            evaluate.diversity(real[drawn], labels[drawn], real, labels))
    assert evaluate.diversity(real[:1].expand(200, 5), labels, real, labels) < 1e-3


def test_importance_weighted_bounds_close_in_on_the_likelihood(sample):
    torch.manual_seed(3)
    model, x, y = vae.VAE(2, hidden=16), sample.test_images[:3], sample.test_labels[:3]
    with torch.no_grad():
        model.encoder[-1].bias += 0.5                   # so that q(z | x) is not near the prior
        axis = torch.linspace(-8, 8, 129)
        grid = torch.cartesian_prod(axis, axis)         # (129 * 129, 2)
        log_p = torch.stack([-recon_oracle(model.decode(grid), image.expand(129 * 129, 1, 28, 28))
                             for image in x]).double()  # (3, 129 * 129)
        log_p += torch.distributions.Normal(0, 1).log_prob(grid).sum(1)
        truth = -log_p.logsumexp(1).mean().item() - 2 * math.log(axis[1] - axis[0])

    def bound(draws, repetitions):
        return np.mean([evaluate.importance_weighted_bound(model, x, y, draws)
                        for _ in range(repetitions)])
    one, ten, many = bound(1, 1000), bound(10, 100), bound(4000, 1)
    assert one > ten > many and one - many > 0.5, "more draws should give a tighter bound"
    assert many == pytest.approx(truth, abs=0.05), \
        "with 4000 draws this should be -log p(x): log of the mean of p(x | z) p(z) / q(z | x)"


def test_em_raises_the_likelihood_and_finds_a_planted_mixture():
    torch.manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    spread = torch.tensor([[1.0, 0.5], [0.0, 0.8]])
    z = torch.cat([m + torch.randn(n, 2) @ spread for m, n in zip(means, (1000, 2000, 3000))])
    z, found = z.double(), []

    def log_likelihood(mixture):
        parts = torch.distributions.MultivariateNormal(mixture[1], scale_tril=mixture[2])
        log_p = (mixture[0].log() + parts.log_prob(z[:, None])).T       # (K, N)
        assert torch.allclose(evaluate.log_joint(z, *mixture), log_p, atol=1e-6)
        return log_p.logsumexp(0).mean().item()
    for iterations in (1, 2, 3, 5, 10, 20, 50):
        torch.manual_seed(0)                             # the same start every time
        found.append(log_likelihood(evaluate.fit_gmm(z, 3, iterations, ridge=0)))
    assert min(np.diff(found)) > -1e-9 and found[-1] > found[0] + 0.1
    mixture = max((evaluate.fit_gmm(z, 3, 50, ridge=1e-6) for _ in range(4)), key=log_likelihood)
    order = mixture[0].argsort()
    assert torch.allclose(mixture[0][order], torch.tensor([1, 2, 3]).double() / 6, atol=0.02)
    assert torch.allclose(mixture[1][order].float(), means, atol=0.15)
    assert torch.allclose(evaluate.sample_gmm(mixture, 50_000).T.cov(), z.T.cov(), atol=0.25)


def test_draws_of_z_and_the_ex_post_prior(sample, monkeypatch):
    monkeypatch.setattr(evaluate, "encode", lambda model, images, labels: (
        labels[:, None].expand(-1, 2).float(), torch.full((len(labels), 2), -2.0)))
    fit_gmm, asked, components = evaluate.fit_gmm, torch.arange(2000) % 10, []
    monkeypatch.setattr(evaluate, "fit_gmm", lambda z, K, iterations=3: (
        components.append((K, len(z))) or fit_gmm(z, K, iterations)))
    drawn = evaluate.draw_z(small(vae, 2), sample.train_images, sample.train_labels)
    ex_post = evaluate.sample_ex_post_prior(small(cvae, 2), asked, sample)
    for z, labels in ((drawn, sample.train_labels), (ex_post, asked)):
        noise = z - labels[:, None]
        assert abs(noise.mean()) < 0.03 and noise.std().item() == pytest.approx(0.368, abs=0.02)
    z = evaluate.sample_ex_post_prior(small(vae, 2), asked, sample)
    assert components == 10 * [(1, 500)] + [(50, 5000)]         # fitted to the training images
    assert abs(z.mean() - 4.5) < 0.5 and (z[:, 0] - asked).abs().mean() > 1     # in no order


def crude_look(resnet, images):
    """In place of the classifier: 49 mean grey values, and the brightest of the first ten rows."""
    return (torch.nn.functional.avg_pool2d(images, 4).flatten(1),
            images.sum((1, 3))[:, :10].argmax(1))


@pytest.fixture
def crude(monkeypatch, tiny):
    monkeypatch.setattr(classifier, "look", crude_look)
    recognised = torch.where(torch.arange(300) % 10 == 0, 0, tiny.test_labels)
    features, _ = crude_look(None, tiny.test_images)
    return evaluate.Real(tiny.test_images, tiny.test_labels, None, features, recognised)


def test_measure_of_a_decoder_that_draws_the_class_asked_for(crude, tiny, monkeypatch):
    """As a white row, which crude_look takes for it (4 for many 3). Another draws real images."""
    model, meta, compared, seeds = small(cvae, 2), {"seed": 0, "metrics": {"seconds": 1}}, [], []
    mistaken = torch.arange(300) % 10 > 3
    model.decode = lambda z, y: 18 * torch.nn.functional.one_hot(
        torch.where((y == 3) & mistaken, 4, y), 28)[:, None, :, None].expand(-1, 1, -1, 28) - 9.0
    _, decoded = spy(model)
    monkeypatch.setattr(evaluate, "diversity", lambda *args: compared.extend(args) or 0.0)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    row = evaluate.measure(cvae, model, meta, tiny, crude)
    assert seeds == [0, 1, 2, 3, 4]                     # so that no measurement changes another
    right, real_right = (crude.labels != 3) | ~mistaken, crude.recognised == crude.labels
    assert 0 < row["rarest_class"] == pytest.approx((right & (crude.labels == 3)).sum() / 300)
    assert row["control_prior"] == row["control_decoded"] == right.double().mean()
    assert torch.equal(compared[1], crude.labels[right])
    assert torch.equal(compared[3], crude.labels[real_right])
    assert (decoded[1].mean().item(), decoded[1].std().item()) == pytest.approx((0, 1), abs=0.1)
    assert len(decoded) == 1 + 3 + 10                   # test, three sources of z, iw_10
    for name in ("sample_ex_post_prior", "draw_z"):
        monkeypatch.setattr(evaluate, name, lambda *_: torch.full((len(crude.labels), 2), 9.0))
    monkeypatch.setattr(evaluate, "decode", lambda model, z, labels: (
        crude.images.clamp(1e-6, 1 - 1e-6).logit() if (z == 9).all()
        else torch.zeros(len(z), 1, 28, 28)))
    row = evaluate.measure(vae, small(vae, 2), meta, tiny, crude)
    assert row["fid_decoded"] == row["fid_ex_post"] == pytest.approx(0, abs=1e-4)
    assert row["fid_prior"] > 1 and 0 < row["control_decoded"] < 1


def test_tables_of_means_spreads_and_noise():
    rows = [{"model": "m", "beta": None, "kl": k, "control_x": 0.5} for k in (1, 2, 6)]
    row = evaluate.average(rows)
    std = np.std([1, 2, 6], ddof=1)
    assert row["kl"] == {"mean": 3.0, "std": pytest.approx(std), "n": 3}
    other = row | {"model": "other", "kl": {"mean": 9.0, "std": 3.0, "n": 3}}
    lines = [re.split(r" *\| *", line)[1:-1]
             for line in evaluate.table([row, other], ["kl", "fid", "control_x"])]
    noise = 2 * math.sqrt((2 / 3) * (std ** 2 + 9) / 2)         # s^2: the mean of both variances
    assert lines[2] == ["m", f"3.00±{std:.2f}", "-", "50.0%±0.0%"]
    assert lines[4] == ["noise", f"{noise:.2f}", "-", "0.0%"]
    assert evaluate.average(rows[:1])["kl"] == {"mean": 1, "std": None, "n": 1}


# ================================================================ 5. the classifier

def test_the_pretrained_classifier_normalises_once(sample):
    model, _ = classifier.load_pretrained()
    assert (model.mean.item(), model.std.item()) == pytest.approx((0.2860, 0.3530), abs=1e-3)
    images, labels = sample.test_images[::4], sample.test_labels[::4]
    found, recognised = classifier.look(model.train(), images)      # which puts it into eval mode
    assert (recognised == labels).float().mean() >= 0.93
    with torch.no_grad():
        assert torch.allclose(model.features(images[:20]), found[:20], atol=1e-3)
        stem = model.stem((images[:20] - model.mean) / model.std)
        assert torch.allclose(model.blocks(stem).mean((2, 3)), found[:20], atol=1e-3)
    for wrong in (images * math.nan, images - 0.4, 2 * images, images / 255):
        with pytest.raises(ValueError, match="raw images"):
            classifier.look(model, wrong)


def test_training_the_classifier_keeps_its_best_epoch(tiny, monkeypatch):
    """Validation answers right, wrong, wrong: the weights must be those of the first epoch."""
    states = []

    def look(model, images):
        assert images is tiny.val_images
        states.append(copy.deepcopy(model.state_dict()))
        return None, tiny.val_labels + len(states) - 1
    monkeypatch.setattr(classifier, "look", look)
    model = classifier.FashionResNet18(0.28, 0.35)
    best = classifier.train(model, tiny.train_images[:48], tiny.train_labels[:48], tiny.val_images,
                            tiny.val_labels, 3, 16, 0.01, torch.Generator())
    assert best == 1 and not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert not torch.equal(states[0]["stem.1.running_mean"], states[1]["stem.1.running_mean"])
    assert all(torch.equal(p, states[0][name]) for name, p in model.state_dict().items())


# ================================================================ 6. the data

def test_the_split_is_stable_and_the_sample_balanced_and_raw(sample):
    labels = np.tile(np.arange(10), 6000)
    train, val = data.split_indices(labels)
    assert len(train) == 55_000 and not set(train) & set(val)
    # the indices themselves, as first published: whoever changes them changes every number
    assert hashlib.sha256(val.astype("<i8").tobytes()).hexdigest()[:16] == "3530c710df4783a7"
    assert data.pixel_entropy(sample.test_images).mean().item() == pytest.approx(189.55, abs=0.01)
    for split, size in ((sample[:2], 5000), (sample[2:4], 1000), (sample[4:6], 2000)):
        assert len(split[0]) == size and (split[1].bincount() == size // 10).all()


def test_the_full_set_has_the_known_floor_and_the_sample_is_its_first_images(sample, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", ())
    try:
        full = data.load("full")
    except data.UserError:
        pytest.skip("the full data set is not here (apt install dataset-fashion-mnist)")
    assert [len(images) for images in full[:6:2]] == [55_000, 5_000, 10_000]
    x, y = full.test_images, full.test_labels
    costs = [data.pixel_entropy(images).mean().item() for images in (x, x.mean(0, keepdim=True))]
    assert costs == pytest.approx([189.86, 385.00], abs=0.005)      # the floor; one picture for all
    for c in range(10):
        assert torch.equal(x[y == c][:200], sample.test_images[sample.test_labels == c])


def test_what_is_missing_is_downloaded_verified_and_kept(tmp_path, monkeypatch, capsys):
    """The four files in miniature; the test images lie on the second of two mirrors."""
    labels = np.repeat(np.arange(10), 510).astype(np.uint8)
    images = np.random.RandomState(0).randint(0, 256, (5100, 28, 28)).astype(np.uint8)
    # the IDX format: two zeros, 8 for uint8, the number of dimensions, the dimensions, the bytes
    raw = [struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.tobytes()
           for a in (images, labels, images[:20], labels[:20])]
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in zip(data.FILES, raw)}
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path / "mine"))
    for name, value in {"FILES": sums, "DEBIAN": Path("nowhere"), "MIRRORS": ()}.items():
        monkeypatch.setattr(data, name, value)
    for folder in ("mine", "bad", "good"):
        (tmp_path / folder).mkdir()
    *_, missing, _ = files = dict(zip(sums, raw))
    for name in files.keys() - {missing}:
        (tmp_path / "mine" / name).write_bytes(files[name])
    assert data.load("auto").source == "sample" and "SAMPLE" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{missing}.*get a network, or set FASHION_MNIST_DIR"):
        data.load("full")
    (tmp_path / "bad" / f"{missing}.gz").write_bytes(gzip.compress(b"other bytes"))
    (tmp_path / "good" / f"{missing}.gz").write_bytes(gzip.compress(files[missing]))
    monkeypatch.setattr(data, "MIRRORS", [f"{tmp_path.as_uri()}/{x}/" for x in ("bad", "good")])
    loaded = data.load("auto")
    assert [len(tensor) for tensor in loaded[:6]] == [100] * 2 + [5000] * 2 + [20] * 2
    shutil.rmtree(tmp_path / "good")
    assert torch.equal(data.load("full").test_images, loaded.test_images)   # from the copy
    (tmp_path / "mine" / f"{missing}.gz").write_bytes(gzip.compress(files[missing])[:-20])
    with pytest.raises(ValueError, match=f"{missing}.*get it anew"):        # and never the sample
        data.load("auto")


# ================================================================ 7. the scripts

PICTURES = {"data": 2, "vae": 3, "conv_vae": 3, "beta_vae": 3, "cvae": 5, "classifier": 0}


@each(*PICTURES)
def test_each_script_runs_alone_with_data_py_and_the_sample(module, tmp_path, tiny, monkeypatch,
                                                            capsys):
    (tmp_path / "assets").mkdir()
    np.savez(tmp_path / "assets" / "fashion-mnist-sample.npz", **{
        name: (values[::2, 0] * 255).round().byte() if "images" in name else values[::2].byte()
        for name, values in tiny._asdict().items() if name != "source"})
    name = module.__name__
    for script in {name, "data"}:
        shutil.copy(HERE / f"{script}.py", tmp_path)
        monkeypatch.delitem(sys.modules, script)
    monkeypatch.chdir(tmp_path)
    elsewhere = [place for place in sys.path if Path(place).resolve() != HERE]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    flags = {"data": [], "vae": ["--latent-dim", "2"], "beta_vae": ["--betas", "1"]}.get(name, [])
    flags += ["--data", "sample"] + ["--epochs", "1"] * (name != "data")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    runpy.run_path(f"{name}.py", run_name="__main__")
    assert "data sample train: 150 images, entropy floor" in capsys.readouterr().out
    pictures = [path for path in Path("runs").glob(f"{name}-*") if path.suffix in (".png", ".gif")]
    assert len(pictures) == PICTURES[name] + (name == "vae")    # with two latents, also the map


@each_model
@pytest.mark.parametrize("kept", [[1, 8], [6]], ids=len)
def test_main_trains_as_it_was_told_tests_saves_and_then_draws(module, kept, tiny, tmp_path, capsys,
                                                               monkeypatch):
    saved, name = [], module.__name__

    def noted(*args, **more):
        saved.append(len(list(tmp_path.glob("*.pt"))))
    monkeypatch.setattr(data.Figure, "savefig", noted)
    monkeypatch.setattr(module, "draw_walk", noted, raising=False)
    parts = {"source": "own"}
    for split in ("train", "val", "test"):
        labels = getattr(tiny, f"{split}_labels")
        keep = torch.isin(labels, torch.tensor(kept))
        parts[f"{split}_labels"] = labels[keep]
        parts[f"{split}_images"] = getattr(tiny, f"{split}_images")[keep]
    dataset = data.FashionMNIST(**parts)
    extra = {key: 4.0 if key == "beta" else 0.5 for key in EXTRA.get(name, {})}
    flags = "--seed 3 --epochs 2 --batch-size 20 --lr 0.001 --latent-dim 3".split()
    flags += {"vae": [], "beta_vae": ["--betas", "1", "4", "1"]}.get(name, ["--warmup", "0.5"])
    path = module.main([*flags, "--out", str(tmp_path)], dataset=dataset)
    model, meta = module.load_model(path[1] if name == "beta_vae" else path)
    printed = capsys.readouterr().out
    torch.manual_seed(3)                                # of all random numbers
    retrained = type(model)(latent_dim=3)
    fit(module, retrained, dataset, 2, 20, 0.001, **extra)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), retrained.parameters()))
    assert re.findall("validation.*active", capsys.readouterr().out)[-1] in printed
    torch.manual_seed(3)
    found = module.test(model, dataset.test_images, *given(module, dataset.test_labels))
    assert meta["metrics"] == pytest.approx(found | {"seconds": meta["metrics"]["seconds"]})
    excess = found["recon"] - data.pixel_entropy(dataset.test_images).mean().item()
    assert (f"test (own): recon {found['recon']:.2f} (excess {excess:.2f}), KL {found['kl']:.2f},"
            f" total {found['total']:.2f} nats per image, {found['active']} latents") in printed
    if name == "cvae":
        shares = np.bincount(dataset.test_labels) / len(dataset.test_labels)
        label = sum(-p * math.log(p) if p < 1 else 0.0 for p in shares if p > 0)
        assert f"total + {label:.2f} for the label = {found['total'] + label:.2f}" in printed
    if name == "beta_vae":
        row = "".join(f"{found[key]:8.2f}" for key in ("recon", "kl", "total"))
        assert f"       4{row}{found['active']:8}\n" in printed
    # there were all checkpoints before each picture, and all pictures were drawn
    assert saved == [1 + (name == "beta_vae")] * PICTURES[name]


@pytest.fixture(scope="session")
def study(tmp_path_factory, tiny):
    """A function that runs evaluate.py on a small study: -> path, results, printed lines."""
    out = tmp_path_factory.mktemp("study")

    def run(*flags):
        with pytest.MonkeyPatch.context() as patch:
            names = {module: name for module, name in evaluate.NAMES.items() if module != conv_vae}
            patch.setattr(evaluate, "NAMES", names)
            patch.setattr(data, "load", lambda source: tiny)
            patch.setattr(classifier, "look", crude_look)       # it sees some classes only once
            patch.setattr(evaluate, "diversity", lambda *_: 1.0)
            patch.setattr(sys, "stdout", io.StringIO())
            beta_vae.FLAGS.set_defaults(betas=[0.5, 1.0])
            path = evaluate.main(["--epochs", "1", "--out", str(out), *flags])
            beta_vae.FLAGS.set_defaults(betas=beta_vae.BETAS)
            return path, json.loads(path.read_text()), sys.stdout.getvalue()
    return run


def test_evaluate_trains_what_is_missing_and_its_tables_add_up(study):
    for split, flags in (("test", []), ("val", ["--seeds", "0", "1", "0", "--split", "val"])):
        path, results, printed = study(*flags)
        names = [row["model"] for row in results["rows"]]
        assert names == ["MLP VAE", "beta-VAE 0.5", "beta-VAE 1", "CVAE"]
        for row in results["rows"]:
            found = {name: value for name, value in row.items() if isinstance(value, dict)}
            mean = {name: value["mean"] for name, value in found.items()}
            assert mean["recon"] + mean["kl"] == pytest.approx(mean["total"], abs=1e-9)
            assert mean["recon"] - results["floor"] == pytest.approx(mean["excess"], abs=1e-9)
            assert f"{mean['total']:.2f}" in printed
            assert split == "test" or found["total"]["n"] == 2 and found["total"]["std"] > 0
        assert len({str(row["total"]) for row in results["rows"]}) == 4
        assert all(line in printed for line in evaluate.report(results))
        assert path.with_suffix(".png").exists() and results["stale"] == []


def test_evaluate_trains_only_what_is_missing_and_names_what_does_not_belong(study, tiny):
    """A beta-VAE was deleted, an edited vae.py left its model, and cvae.py was trained on boots."""
    path, *_ = study()
    missing, edited, boots = (path.with_name(f"{name}-sample-seed0-epochs1.pt")
                              for name in ("beta_vae-beta1.0", "vae", "cvae"))
    missing.unlink()
    torch.save(torch.load(edited, weights_only=True) | {"code": "another text"}, edited)
    nines = tiny.train_labels == 9
    cvae.main(["--epochs", "1", "--out", str(path.parent)], dataset=tiny._replace(
        train_images=tiny.train_images[nines], train_labels=tiny.train_labels[nines]))
    _, again, printed = study()
    assert re.findall("^training (.*?) on", printed, re.MULTILINE) == [str(missing)]
    assert again["stale"] == [
        f"- {edited} was made with other code: delete it, run again",
        f"- {boots} was made with other training images: delete it, run again"]
    assert all(printed.count(line) == 2 for line in again["stale"])         # at once, and below


@needs_readme
def test_readme_and_report_show_the_recorded_tables():
    results = json.loads((HERE / "results" / "results.json").read_text(encoding="utf-8"))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    whole = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    assert (results["data"], results["split"], results["epochs"]) == ("full", "test", None)
    assert len(results["seeds"]) >= 3 and results["stale"] == []
    for line in evaluate.report(results)[1:]:
        assert line in whole, line
    few = [row for row in results["rows"] if row["beta"] is None]
    for line in evaluate.table(few, ["excess", "kl", "total", "fid_prior", "rarest_class",
                                     "control_prior"]):
        assert line in readme, line


@needs_readme
def test_the_snippets_of_the_readme_work(study, tmp_path, monkeypatch, sample):
    results, *_ = study()
    monkeypatch.setattr(classifier, "look", crude_look)
    monkeypatch.setattr(data, "load", lambda source="auto": sample)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = vae.main(["--epochs", "1", "--latent-dim", "2", "--out", "try2"], dataset=sample)
    path.rename("try2/vae-sample-seed0-latent-dim2.pt")
    Path("runs").mkdir()
    for script in ("vae", "cvae"):
        shutil.copy(results.with_name(f"{script}-sample-seed0-epochs1.pt"),
                    f"runs/{script}-full-seed0.pt")
    matplotlib.image.imsave("mine.png", sample.test_images[0, 0].numpy(), cmap="gray")
    np.save("mine.npy", (255 * sample.test_images[:300, 0]).byte().numpy())
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        names = {}
        if "import" in block:
            exec(block, names)
        if "log_p" in names:                            # the total is an upper bound, and near
            assert 0 < names["found"]["total"] + names["log_p"] < 20
    assert {"bags.png", "mine-decoded.png"} <= set(os.listdir())


# ================================================================ 8. mistakes

@pytest.mark.parametrize("name, flags", [
    ("vae", "--epochs 0"), ("vae", "--epoch 3"), ("vae", "--lr nan"), ("conv_vae", "--warmup -1"),
    ("beta_vae", "--betas 1 inf"), ("cvae", "--data mnist"), ("evaluate", "--seeds 1 x"),
    ("vae", "--device abacus"), ("vae", f"--out {__file__}")])
def test_a_bad_flag_ends_in_one_line(name, flags, capsys, monkeypatch, tiny):
    monkeypatch.setattr(data, "load", lambda source: tiny)
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        data.run((section(name) or pytest.skip(f"not here: {name}")).main)
    *_, line = [str(stop.value), *capsys.readouterr().err.splitlines()]
    assert re.match(r"([\w.]+: )?error: ", line)


def test_run_hides_no_error_that_it_does_not_know():
    def fail(error):
        raise error
    for error in (RuntimeError("not enough memory"), OSError("disk full"), ValueError("x")):
        with pytest.raises(type(error), match=str(error)):
            data.run(lambda: fail(error))
    for error in (data.UserError("a"), FloatingPointError("a"), KeyboardInterrupt()):
        with pytest.raises(SystemExit, match="^(error: a|interrupted: .*)$"):
            data.run(lambda: fail(error))


def test_a_checkpoint_comes_back_as_it_was_saved_and_runs_no_code(tmp_path, tiny):
    args = vae.FLAGS.parse_args(f"--latent-dim 3 --lr 0.01 --seed 5 --out {tmp_path}".split())
    model, path = vae.VAE(3), data.run_path(args, "own")
    assert path.name == "vae-own-seed5-lr0.01-latent-dim3.pt"   # all that is not the default
    data.save_checkpoint(path, args, tiny, {"total": 1.5}, model.state_dict(), beta=0.5)
    found, meta = vae.load_model(path)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters()))
    assert (meta["source"], meta["seed"], meta["beta"]) == ("sample", 5, 0.5)
    mirrored = tiny._replace(train_images=tiny.train_images.flip(3))
    mixed = tiny._replace(train_labels=tiny.train_labels.flip(0))
    assert len({meta["training images"], *map(data.checksum, (tiny, mirrored, mixed))}) == 3
    harmful = type("Harmful", (), {"__reduce__": lambda self: (os.mkdir, (f"{tmp_path}/harm",))})
    path.write_bytes(pickle.dumps(harmful(), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        vae.load_model(path)
    assert not (tmp_path / "harm").exists()


def test_a_file_that_cannot_be_renamed_is_kept_and_named(tmp_path):
    (tmp_path / "g").mkdir()                            # by which no file can be replaced
    with pytest.raises(OSError) as error:
        data.write_file(tmp_path / "g", b"new")
    kept, = tmp_path.glob("g.*")
    assert kept.read_bytes() == b"new" and str(kept) in str(error.value)


@needs_readme
def test_no_file_grows_above_its_ceiling():
    ceilings = (315, 275, 260, 335, 295, 215, 360, 1200)
    for name, ceiling in zip((*SCRIPTS, "test_all"), ceilings, strict=True):
        lines = (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= ceiling and max(map(len, lines)) <= 100, name


def planted(name, source, monkeypatch):
    """Put a script with another text in the place of the real one, for the tests of this file."""
    module = types.ModuleType(name)
    module.__file__ = str(HERE / f"{name}.py")
    exec(compile(source, name, "exec"), vars(module))
    monkeypatch.setitem(globals(), name, module)
    return module


def failure(test, module, request):
    """The error by which a test of this file ends, or None. module: for tests of each model."""
    words = {word: module if word == "module" else request.getfixturevalue(word)
             for word in inspect.signature(test).parameters}
    try:
        test(**words)
    except (AssertionError, NotImplementedError) as error:
        return error


# "Break it": what is edited in vae.py, and the test that must fail then
BREAK_IT = [
    ("recon.flatten(1).sum(1)", "recon.flatten(1).mean(1)", test_recon_is_minus_log_bernoulli),
    ("with_logits(logits, x", "with_logits(logits.sigmoid(), x", test_recon_is_minus_log_bernoulli),
    ("(mu, logvar).sum(1)", "(mu, logvar).mean(1)", test_kl_is_summed_over_the_latents),
    ("(mu.pow(2) + logvar.exp()", "(logvar.exp()", test_kl_of_latents_is_that_of_two_gaussians),
    ("mu + torch.exp(0.5 * logvar) * eps", "mu + logvar * eps", test_reparameterized_z),
    ("torch.randn_like(mu)", "torch.rand_like(mu)", test_reparameterized_z),
    ("z = self.reparameterize(mu, logvar)",
     "z = self.reparameterize(mu, logvar) if self.training else mu", test_test_loop),
    ("            optimizer.zero_grad()\n", "", test_training_step),
]


@needs_readme
@pytest.mark.parametrize("text, edit, test", BREAK_IT, ids=lambda x: getattr(x, "__name__", ""))
def test_break_it(text, edit, test, request, monkeypatch):
    source = (HERE / "vae.py").read_text(encoding="utf-8")
    if text not in source:
        pytest.skip("vae.py says it in other words here")
    module = planted("vae", source.replace(text, edit), monkeypatch)
    assert isinstance(failure(test, module, request), AssertionError)


@needs_readme
def test_the_readme_names_the_test_that_notices_each_edit():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `\w+`: .*<br>`(test_\w+)` \|$", readme, re.MULTILINE)
    assert named == [test.__name__ for _, _, test in BREAK_IT]


# what `--blank` takes out of the scripts, and the tests that judge it
BLANKS = {
    ("vae", "reparameterize"): [test_reparameterized_z],
    ("vae", "kl_of_latents"): [test_kl_of_latents_is_that_of_two_gaussians],
    ("vae", "elbo_terms"): [test_kl_is_summed_over_the_latents, test_recon_is_minus_log_bernoulli],
    ("conv_vae", "beta"): [test_warmup_goes_from_0_to_1_over_the_stated_share_of_all_steps],
    ("cvae", "encode"): [test_the_encoder_of_a_cvae_is_told_the_label],
    ("cvae", "decode"): [test_the_decoder_of_a_cvae_is_told_the_label],
    ("evaluate", "frechet_distance"): [test_fid_of_equal_sets_is_0_and_of_a_shift_its_square,
                                       test_fid_agrees_with_the_symmetric_form],
    ("evaluate", "importance_weighted_bound"):
        [test_importance_weighted_bounds_close_in_on_the_likelihood],
}


def blanked(source, names):
    """A script without the bodies of some functions (docstrings stay) and values of variables."""
    lines = source.splitlines(keepends=True)
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: -getattr(node, "lineno", 0)):
        name = None
        if isinstance(node, ast.FunctionDef):
            name, start, indent = node.name, node.body[0].end_lineno, node.col_offset + 4
        elif isinstance(node, ast.Assign):
            name, start, indent = ast.unparse(node.targets[0]), node.lineno - 1, node.col_offset
        if name in names:
            lines[start:node.end_lineno] = [
                " " * indent + f'raise NotImplementedError("{name} is blank: write it")\n']
    return "".join(lines)


@needs_readme
@pytest.mark.parametrize("name, blank", BLANKS, ids=lambda word: word)
def test_the_tests_of_a_blank_fail_until_it_is_filled(name, blank, request, monkeypatch):
    """All blanks of a script are empty but those above this one; then this one is filled, too."""
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    blanks = [other for script, other in BLANKS if script == name]
    below = blanks[blanks.index(blank):]
    for test in BLANKS[name, blank]:
        module = planted(name, blanked(source, below), monkeypatch)
        assert str(failure(test, module, request)) == f"{blank} is blank: write it"
        module = planted(name, blanked(source, below[1:]), monkeypatch)
        assert failure(test, module, request) is None


def write_blanks(folder):
    shutil.copytree(HERE / "assets", folder / "assets")
    for name in (*SCRIPTS, "test_all"):
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        names = [blank for script, blank in BLANKS if script == name]
        (folder / f"{name}.py").write_text(blanked(text, names), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blank", metavar="FOLDER", type=Path, required=True)
    write_blanks(parser.parse_args().blank)
