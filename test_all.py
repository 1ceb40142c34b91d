"""Every test of the study: python -m pytest test_all.py (offline, a good minute).

The tests of the maths hold the code against something that is not this code: a closed form,
torch.distributions, numpy, a hand-made file, or another process. The order is that of the lesson:
loss, training, sections, metrics, classifier, data, scripts, what users do wrong. At the end stands
a list of mistakes, and `python test_all.py --mutants` shows that the tests catch each of them.
"""
import copy
import difflib
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import beta_vae
import classifier
import conv_vae
import cvae
import data
import evaluate
import vae

HERE = Path(__file__).resolve().parent
SCRIPTS = ("data", "vae", "conv_vae", "beta_vae", "cvae", "classifier", "evaluate")
MODELS = {vae: vae.VAE, conv_vae: conv_vae.ConvVAE, beta_vae: beta_vae.BetaVAE, cvae: cvae.CVAE}
warmed_up = pytest.mark.parametrize("module", (conv_vae, cvae), ids=lambda m: m.__name__)
each_model = pytest.mark.parametrize("module", MODELS, ids=lambda m: m.__name__)
five_seeds = pytest.mark.parametrize("seed", range(5))


@pytest.fixture(scope="session")
def sample():
    return data.load("sample")


@pytest.fixture(scope="session")
def tiny(sample):
    """300 / 100 / 300 real images of all classes."""
    train, test = torch.arange(300) * 16, torch.arange(300) * 6
    return sample._replace(
        train_images=sample.train_images[train], train_labels=sample.train_labels[train],
        val_images=sample.val_images[::10], val_labels=sample.val_labels[::10],
        test_images=sample.test_images[test], test_labels=sample.test_labels[test])


def given(module, labels):
    """The further argument of a model's methods: the labels, for the CVAE."""
    return (labels,) if module is cvae else ()


def fit(module, model, dataset, epochs, batch_size, lr, **extra):
    """module.train on a FashionMNIST, whichever arguments it takes."""
    if module is beta_vae:
        extra.setdefault("beta", 1)
    if module in (conv_vae, cvae):
        extra.setdefault("warmup", 0.2)
    return module.train(model, dataset.train_images, *given(module, dataset.train_labels),
                        dataset.val_images, *given(module, dataset.val_labels),
                        epochs, batch_size, lr, **extra)


def small(module, latent_dim=4):
    """A model with few weights, which trains fast."""
    more = {"channels": 8} if module in (conv_vae, cvae) else {}
    return MODELS[module](latent_dim, hidden=64, **more)


def kl_oracle(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)), summed over the latents, by torch.distributions."""
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1)


def recon_oracle(logits, x):
    """-log p(x | z), summed over the pixels, by torch.distributions."""
    p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    return -p.log_prob(x).flatten(1).sum(1)


# ================================================================ 1. the loss, reparameterization

@each_model
def test_kl_is_that_of_two_gaussians(module):
    torch.manual_seed(0)
    mu, logvar = torch.randn(7, 5), torch.randn(7, 5)
    _, kl = module.elbo_terms(torch.zeros(7, 1, 28, 28), torch.zeros(7, 1, 28, 28), mu, logvar)
    assert torch.allclose(kl, kl_oracle(mu, logvar), rtol=1e-5), \
        "kl is not the KL of N(mu, sigma^2) and N(0, I), summed over the latents"


@each_model
def test_recon_is_minus_log_bernoulli(module, sample):
    torch.manual_seed(0)
    x, logits = sample.test_images[:20].round(), torch.randn(20, 1, 28, 28)
    recon, _ = module.elbo_terms(logits, x, torch.zeros(20, 2), torch.zeros(20, 2))
    assert torch.allclose(recon, recon_oracle(logits, x), rtol=1e-5), \
        "recon is not -log p(x | z), summed over the pixels"


@each_model
def test_recon_of_the_perfect_decoder_is_the_floor(module, sample):
    x, zero = sample.test_images[:100], torch.zeros(100, 2)
    perfect, _ = module.elbo_terms(x.clamp(1e-6, 1 - 1e-6).logit(), x, zero, zero)
    assert torch.allclose(perfect, data.pixel_entropy(x), atol=0.05)
    for seed in range(5):
        torch.manual_seed(seed)
        other, _ = module.elbo_terms(torch.randn_like(x) * 3, x, zero, zero)
        assert (other > data.pixel_entropy(x)).all()


@each_model
def test_reparameterized_z(module):
    torch.manual_seed(0)
    mu = torch.tensor([[1.5, -2.0]]).repeat(200_000, 1).requires_grad_()
    logvar = torch.tensor([[0.0, math.log(0.25)]]).repeat(200_000, 1).requires_grad_()
    z = small(module, 2).reparameterize(mu, logvar)
    assert torch.allclose(z.mean(0), torch.tensor([1.5, -2.0]), atol=0.02), "the mean is not mu"
    assert torch.allclose(z.std(0), torch.tensor([1.0, 0.5]), atol=0.02), "the std is not sigma"
    # d/dmu E[z^2] = 2 mu and d/dlogvar E[z^2] = sigma^2
    z.pow(2).sum().backward()
    assert torch.allclose(mu.grad.mean(0), torch.tensor([3.0, -4.0]), atol=0.03)
    assert torch.allclose(logvar.grad.mean(0), torch.tensor([1.0, 0.25]), atol=0.03)


def test_pixel_entropy_is_bernoulli_entropy(sample):
    x = sample.test_images[:50]
    expected = torch.distributions.Bernoulli(x.flatten(1)).entropy().nan_to_num().sum(1)
    assert torch.allclose(data.pixel_entropy(x), expected, rtol=1e-4)
    assert data.pixel_entropy(x.round()).abs().max() == 0


# ================================================================ 2. training and testing

@each_model
def test_training_step(module, tiny, monkeypatch):
    """Plain gradient descent in place of Adam, once by the script and once by hand. Both draw the
    same random numbers, since they draw in the same order: the batches, then eps of each."""
    calls = []                                          # of the schedule

    class Constant:
        def __init__(self, optimizer, lr, total_steps, **_):
            calls.append(total_steps)

        def step(self):
            calls.append("step")
    monkeypatch.setattr(torch.optim, "Adam",
                        lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", Constant)
    torch.manual_seed(0)
    trained = small(module)
    expected = copy.deepcopy(trained)
    extra = {}
    if module is beta_vae:
        extra = {"beta": 4}
    elif module is not vae:
        extra = {"warmup": 0.5}                         # of six steps
    torch.manual_seed(1)
    fit(module, trained, tiny, 1, 50, 1e-3, **extra)
    torch.manual_seed(1)
    for step, batch in enumerate(torch.randperm(300).split(50)):
        x, y = tiny.train_images[batch], given(module, tiny.train_labels[batch])
        mu, logvar = expected.encode(x, *y)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        weight = extra.get("beta", 1)
        if "warmup" in extra:
            weight = min(1, (step / 6) / 0.5)
        loss = (recon_oracle(expected.decode(z, *y), x) + weight * kl_oracle(mu, logvar)).mean()
        for parameter, slope in zip(expected.parameters(),
                                    torch.autograd.grad(loss, list(expected.parameters()))):
            parameter.data -= 1e-3 * slope
    assert all(torch.allclose(p, q, atol=2e-5)
               for p, q in zip(trained.parameters(), expected.parameters())), \
        "a step does not follow the gradient of the loss of its own batch"
    assert calls == [6] + 6 * ["step"], "the schedule was not made for these six steps"


@each_model
def test_test_loop(module, sample):
    torch.manual_seed(0)
    model, (x, y) = small(module, 8), (sample.test_images[:250], sample.test_labels[:250])
    with torch.no_grad():
        model.encoder[-1].weight[:3] *= 20                  # three latents vary more than others
    torch.manual_seed(5)
    result = module.test(model, x, *given(module, y), batch_size=100)
    torch.manual_seed(5)
    recon, kl, means = [], [], []
    for part in range(0, 250, 100):
        b, c = x[part:part + 100], given(module, y[part:part + 100])
        mu, logvar = model.encode(b, *c)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        recon.append(recon_oracle(model.decode(z, *c), b))
        kl.append(kl_oracle(mu, logvar))
        means.append(mu.detach())
    for name, values in (("recon", recon), ("kl", kl)):
        assert result[name] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5), \
            f"{name} is not its mean over all images, with one draw of z for each"
    assert result["total"] == result["recon"] + result["kl"]
    variances = np.var(torch.cat(means).numpy(), axis=0, ddof=1)
    assert result["active"] == sum(variances > 0.01) and 0 < result["active"] < 8


def test_active_is_a_variance_above_a_hundredth():
    torch.manual_seed(0)
    z = torch.randn(1000, 4)
    z = (z - z.mean(0)) / z.std(0) * torch.tensor([1, 0.0099, 0.0101, 0]).sqrt()
    assert vae.is_active(z).tolist() == [True, False, True, False]


@each_model
def test_train_and_eval_mode_take_turns(module, tiny):
    modes = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x
    model = small(module)
    model.decoder = torch.nn.Sequential(model.decoder, Spy())
    fit(module, model, tiny, 2, 150, 1e-3)
    assert modes == [True, True, False] * 2             # an epoch: two batches, then a test


@each_model
def test_same_seed_same_weights_other_seed_others(module, tiny):
    def weights(seed):
        torch.manual_seed(seed)
        model = small(module)
        fit(module, model, tiny, 1, 100, 1e-3)
        return torch.cat([p.flatten() for p in model.parameters()])
    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def lesson_block(module):
    """The source of a script from its first class to the end of test()."""
    text = inspect.getsource(module)
    end = inspect.getsource(module.test)
    return text[text.index("\nclass Residual"):text.index(end) + len(end)]


@each_model
def test_the_lesson_pastes_and_trains_on_any_tensor(module, capsys):
    """Nothing above it but the three imports; nothing of this project inside."""
    names = {}
    exec("import math, time, torch\n" + lesson_block(module), names)
    torch.manual_seed(0)
    images, labels = torch.rand(70, 1, 28, 28), torch.arange(70) % 10
    extra = {vae: {}, beta_vae: {"beta": 2}}.get(module, {"warmup": 0.2})
    model = names[MODELS[module].__name__](latent_dim=3)
    history = names["train"](model, images, *given(module, labels), images, *given(module, labels),
                             epochs=3, batch_size=20, lr=1e-3, **extra)
    assert len(history) == 3 and history[-1]["recon"] < history[0]["recon"]
    total = names["test"](model, images, *given(module, labels))["total"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all("recon" in line and "KL" in line for line in printed)
    assert total == pytest.approx(history[-1]["val_recon"] + history[-1]["val_kl"], rel=0.01)


@each_model
@pytest.mark.parametrize("change, reason", [
    (lambda x: x * 255, "pixels must lie"), (lambda x: (x - 0.286) / 0.353, "pixels must lie"),
    (lambda x: x * math.nan, "pixels must lie"), (lambda x: x.double(), "of torch.float64"),
    (lambda x: (x * 255).byte(), "of torch.uint8"), (lambda x: x.half(), "of torch.float16"),
    (lambda x: x[:, 0], r"are \(8, 28, 28\)"), (lambda x: x.expand(-1, 3, -1, -1), r"\(8, 3, 28"),
    (lambda x: x[:, :, :16, :16], r"are \(8, 1, 16, 16\)"), (lambda x: x[:0], r"are \(0, 1, 28"),
], ids=("255", "standardised", "nan", "double", "bytes", "half", "flat", "colour", "16", "none"))
def test_images_that_the_loss_cannot_take_are_refused(module, change, reason, tiny):
    """In one sentence, before the training; the test refuses them, too."""
    wrong = change(tiny.train_images[:8])
    labels, model = given(module, torch.arange(len(wrong))), small(module)
    for split in ("train", "val"):
        dataset = tiny._replace(**{f"{split}_images": wrong,
                                   f"{split}_labels": torch.arange(len(wrong))})
        with pytest.raises(ValueError, match=reason):
            fit(module, model, dataset, 1, 4, 1e-3)
    with pytest.raises(ValueError, match=reason):
        module.test(model, wrong, *labels)


@pytest.mark.parametrize("labels, reason", [
    (torch.arange(299) % 10, r"are \(299,\)"), (torch.arange(300) % 10 + 1, "from 0 to 9"),
    (torch.zeros(300), "of torch.float32"), (torch.zeros(300, 1, dtype=torch.int64), r"\(300, 1\)"),
], ids=("few", "from 1", "float", "column"))
def test_labels_that_do_not_belong_to_the_images_are_refused(labels, reason, tiny):
    with pytest.raises(ValueError, match=reason):
        fit(cvae, small(cvae), tiny._replace(train_labels=labels), 1, 100, 1e-3)
    with pytest.raises(ValueError, match=reason):
        cvae.test(small(cvae), tiny.test_images, labels)
    with pytest.raises(ValueError, match="one label from 0 to 9 for each image"):
        classifier.train(classifier.FashionResNet18(), tiny.train_images, labels,
                         tiny.val_images, tiny.val_labels, 1, 100, 0.1, torch.Generator())


@each_model
def test_an_exploding_learning_rate_stops_and_tells_what_helps(module, tiny):
    with pytest.raises(FloatingPointError, match="in epoch 1: choose a lower learning rate"):
        fit(module, small(module), tiny, 2, 10, 1e9)


# ================================================================ 3. one claim a section

def test_a_short_training_beats_the_best_constant_image(sample):
    p = sample.train_images.mean(0).clamp(1e-4, 1 - 1e-4)  # the best one image for all
    constant = recon_oracle(p.logit().expand_as(sample.test_images), sample.test_images)
    torch.manual_seed(0)
    model = vae.VAE(hidden=256)
    fit(vae, model, sample, 5, 128, 2e-3)
    assert vae.test(model, sample.test_images)["total"] < constant.mean() - 70      # of 384 nats


def test_a_decoder_that_ignores_z_ends_in_posterior_collapse(tiny):
    torch.manual_seed(0)
    model = small(vae)
    model.decoder[0].weight.requires_grad_(False).zero_()
    fit(vae, model, tiny, 25, 20, 3e-3)
    found = vae.test(model, tiny.test_images)
    assert found["kl"] < 0.05 and found["active"] == 0


def test_the_map_shows_each_place_where_it_is(tmp_path, sample, monkeypatch):
    """A decoder that draws z0 as brightness of the left half, z1 as that of the right one."""
    figures, model = [], small(vae, 2)
    monkeypatch.setattr(data, "save_figure", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(model, "decode", lambda z: (
        z.view(-1, 1, 1, 2).expand(-1, 1, 28, 2).repeat_interleave(14, dim=3)))
    vae.draw_map(model, sample, tmp_path / "map.png")
    left, right = figures[0].axes
    points = np.concatenate([c.get_offsets() for c in left.collections])
    assert len(points) == len(sample.test_images)
    assert len(left.lines) == 11                            # a circle and ten ellipses
    canvas = np.asarray(right.images[0].get_array())        # 16 x 16 images of 28 x 28 pixels, of
    # which we look at one in the left half (row 14, column 7) and one in the right (column 21)
    assert (np.diff(canvas[14, 7::28]) > 0).all()           # z0 rises to the right ...
    assert (np.diff(canvas[14::28, 21]) < 0).all()          # ... and z1 upwards
    assert right.images[0].get_extent() == [*left.get_xlim(), *left.get_ylim()] == [-4, 4, -4, 4]
    assert canvas[14, 7] == pytest.approx(1 / (1 + math.exp(3.75)), abs=1e-3)   # the first place


@warmed_up
def test_warmup_goes_from_0_to_1_over_the_stated_share_of_all_steps(module, tiny, monkeypatch):
    """With a recon of 0 and a KL of 1, the loss is w itself."""
    losses = []

    def constant_terms(logits, x, mu, logvar):
        zero = 0 * (logits.sum() + mu.sum() + logvar.sum())     # backward() can go through it
        return zero.expand(len(x)), (zero + 1).expand(len(x))

    def note(loss):                                     # train() asks of each loss if it is finite
        losses.append(loss.item())
        return True
    monkeypatch.setattr(module, "elbo_terms", constant_terms)
    monkeypatch.setattr(torch, "isfinite", note)
    for warmup, weights in ((0.5, [0, 1 / 3, 2 / 3, 1, 1, 1]), (0, 6 * [1])):
        losses.clear()
        fit(module, small(module), tiny, 2, 100, 1e-3, warmup=warmup)       # 2 x 3 steps
        assert losses == pytest.approx(weights)


def test_warmup_lets_the_kl_grow_first(tiny):
    kl = {}
    for warmup in (0, 1):
        torch.manual_seed(0)
        history = fit(conv_vae, small(conv_vae, 8), tiny, 6, 10, 2e-3, warmup=warmup)
        kl[warmup] = history[1]["kl"]
    assert kl[1] > 1.3 * kl[0]


def test_beta_1_is_the_plain_vae_to_the_last_bit(tiny):
    trained = []
    for module in (vae, beta_vae):
        torch.manual_seed(0)
        model = small(module)
        fit(module, model, tiny, 2, 100, 1e-3)
        trained.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


def test_beta_weighs_the_gradient_of_the_kl(tiny):
    ends = {}
    for beta in (0, 50):
        torch.manual_seed(0)
        model = small(beta_vae)
        fit(beta_vae, model, tiny, 8, 30, 2e-3, beta=beta)
        ends[beta] = beta_vae.test(model, tiny.test_images)
    assert ends[50]["kl"] < 0.2 * ends[0]["kl"]
    assert ends[50]["recon"] > ends[0]["recon"]


# r: recon of each pixel (16, 1, 28, 28); k: KL of each latent (16, 10). A loss as somebody wrote
# it, and the c and beta with which it is c * (recon + beta * KL), in nats per image
LOSSES = {
    "both summed, averaged over the batch":
        (lambda r, k: r.sum((1, 2, 3)).mean() + k.sum(1).mean(), 1, 1),
    "BCE averaged over pixels": (lambda r, k: r.mean() + k.sum(1).mean(), 1 / 784, 784),
    "both averaged": (lambda r, k: r.mean() + k.mean(), 1 / 784, 784 / 10),
    "mean BCE, KL summed over the batch": (lambda r, k: r.mean() + k.sum(), 1 / 784, 784 * 16),
    "KL averaged over latents": (lambda r, k: r.sum((1, 2, 3)).mean() + k.mean(), 1, 1 / 10),
    "mean BCE, KL times 0.00025":
        (lambda r, k: r.mean() + 0.00025 * k.sum(1).mean(), 1 / 784, 784 * 0.00025),
    "everything summed": (lambda r, k: r.sum() + k.sum(), 16, 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_my_beta(name):
    """c only scales the gradients, which Adam hardly sees; beta is what sums and means make."""
    loss, c, beta = LOSSES[name]
    for seed in range(3):
        torch.manual_seed(seed)
        r, k = torch.rand(16, 1, 28, 28), torch.rand(16, 10)
        recon, kl = r.flatten(1).sum(1), k.sum(1)       # (16,) each, as elbo_terms gives them
        assert loss(r, k).item() == pytest.approx(c * (recon + beta * kl).mean().item())


def test_cvae_gives_each_label_its_own_input(sample):
    """If the first layer sees nothing but whether the label is c, it tells c from all other labels,
    and cannot tell those apart."""
    model, x = cvae.CVAE(4).eval(), sample.test_images[:1].expand(10, -1, -1, -1)
    with torch.no_grad():
        for c in range(10):
            for layer, label in ((model.decoder[0], 4 + c), (model.encoder[0], 16 + c)):
                layer.weight.zero_()
                layer.weight[:, label] = 1.0
            for found in (model.decode(torch.randn(10, 4), torch.arange(10)).flatten(1),
                          model.encode(x, torch.arange(10))[0]):
                others = found[torch.arange(10) != c]
                assert torch.allclose(others, others[:1], atol=1e-5)
                assert not torch.allclose(found[c], others[0], atol=1e-5)


def test_what_the_label_tells_z_need_not_tell(tiny):
    """Ten images, one a class: a VAE must tell them apart in z, a CVAE is told which one it is."""
    first, _ = data.one_of_each_class(tiny.test_labels)
    one = tiny.test_images[first]
    ten = tiny._replace(train_images=one.repeat(15, 1, 1, 1), val_images=one,
                        train_labels=torch.arange(10).repeat(15), val_labels=torch.arange(10))
    ends = {}
    for module in (conv_vae, cvae):
        torch.manual_seed(0)
        model = small(module)
        fit(module, model, ten, 100, 50, 5e-3, warmup=0)
        ends[module] = module.test(model, one, *given(module, torch.arange(10)))
    # to tell which of ten equally frequent images it is takes log 10 nats, or more
    assert ends[conv_vae]["kl"] > math.log(10) and ends[cvae]["kl"] < 0.6 * ends[conv_vae]["kl"]
    assert ends[cvae]["recon"] < ends[conv_vae]["recon"] + 5                # not for a worse recon


# ---------------------------------------------------------------- what the latents learned

def test_analysis_orders_active_latents_by_their_kl(sample):
    torch.manual_seed(0)
    model = small(beta_vae, 6).eval()
    with torch.no_grad():
        model.encoder[-1].weight[:6] *= 30 * torch.tensor([1, 0, 9, 3, 0, 27.0])[:, None]
    found = beta_vae.analyse(model, sample.test_images)
    assert found["latents"] == [5, 2, 3, 0]
    assert found["correlations"].shape == (4, 5)
    assert found["gap"] == beta_vae.gap(found["correlations"])
    mu, logvar = model.encode(sample.test_images)
    kl = kl_oracle(mu, logvar).mean().item()
    assert found["kl_of_latents"].sum().item() == pytest.approx(kl, rel=1e-4)
    expected = np.corrcoef(mu[:, 5].detach(), sample.test_images.sum((1, 2, 3)))[0, 1]
    assert found["correlations"][0, 0].item() == pytest.approx(abs(expected), abs=1e-5)
    values = beta_vae.attributes(sample.test_images)
    rotated = beta_vae.rotated_gaps(mu[:, found["latents"]], values)
    assert found["rotated_gap"] == pytest.approx(np.mean(rotated))
    assert found["difference"] == found["gap"] - found["rotated_gap"]


def test_analysis_and_pictures_of_a_model_without_active_latents(sample, tmp_path):
    model = small(beta_vae, 3).eval()
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
    found = beta_vae.analyse(model, sample.test_images)
    assert found["latents"] == [] and found["gap"] == found["rotated_gap"] == 0
    sweep = {1.0: {"model": model, "kl": 0.0, "recon": 250.0, **found}}
    beta_vae.draw_traversals(sweep, sample.test_images[:1], tmp_path / "traversals.png")
    beta_vae.draw_attributes(sweep, tmp_path / "attributes.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_attributes_of_a_drawn_rectangle():
    x = torch.zeros(1, 1, 28, 28)
    x[0, 0, 8:18, 4:10] = 1.0                            # 10 rows, 6 columns, left of the middle
    found = dict(zip(beta_vae.ATTRIBUTES, beta_vae.attributes(x)[0].tolist()))
    assert found["ink"] == 60 and (found["width"], found["height"]) == (6, 10)
    assert found["top"] == pytest.approx(0.6)
    assert found["symmetry"] == 0                        # its mirror image touches it nowhere
    both = dict(zip(beta_vae.ATTRIBUTES, beta_vae.attributes(torch.maximum(x, x.flip(3)))[0]))
    assert both["symmetry"] == 1 and both["width"] == 12 and both["height"] == 10
    x[0, 0, 27, 27] = 0.2                                # faint: more ink, but no wider or higher
    assert beta_vae.attributes(x)[0, :3].tolist() == pytest.approx([60.2, 6, 10])
    ink, width, height = beta_vae.attributes(torch.zeros(1, 1, 28, 28))[0, :3].tolist()
    assert width == height == 0 and ink < 1e-5           # and a black image has none of them


def test_correlation_is_that_of_numpy_without_its_sign():
    torch.manual_seed(0)
    a, b = torch.randn(50, 3), torch.randn(50, 2)
    expected = abs(np.corrcoef(a.T, b.T)[:3, 3:])
    assert np.allclose(beta_vae.correlation(a, b), expected)
    assert beta_vae.correlation(a, -2 * a).diagonal().tolist() == pytest.approx([1, 1, 1])
    assert beta_vae.correlation(torch.ones(9, 1), torch.rand(9, 2)).tolist() == [[0, 0]]


def test_gap_is_one_for_latents_of_their_own_and_zero_for_shared_ones():
    assert beta_vae.gap(torch.eye(4)) == 1
    assert beta_vae.gap(torch.ones(4, 4)) == 0
    assert beta_vae.gap(torch.tensor([[0.9, 0.2], [0.4, 0.6]])) == pytest.approx((0.5 + 0.4) / 2)
    assert beta_vae.gap(torch.tensor([[0.1], [0.9], [0.5]])) == pytest.approx(0.4)   # to the next
    assert beta_vae.gap(torch.ones(1, 3)) == 1 and beta_vae.gap(torch.ones(0, 3)) == 0


@five_seeds
def test_planted_axes_exceed_every_rotation_and_arbitrary_axes_do_not(seed):
    torch.manual_seed(seed)
    z = torch.randn(2000, 4)
    # attribute k is exp(z_k), which grows with z_k, but not in a straight line
    planted = beta_vae.gap(beta_vae.correlation(z, z.exp()))
    assert planted > 0.6 and max(beta_vae.rotated_gaps(z, z.exp())) < 0.9 * planted
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q     # by which the axes lose their meaning
    gaps = beta_vae.rotated_gaps(z @ rotation, z, rotations=100)
    turned = beta_vae.gap(beta_vae.correlation(z @ rotation, z))
    assert min(gaps) <= turned <= max(gaps)


def test_random_axes_are_rotations_of_latents_of_equal_spread_and_differ(monkeypatch):
    """Rotations keep all distances, and each of them is another one."""
    torch.manual_seed(0)
    mu, seen = torch.randn(50, 4) * torch.tensor([1, 2, 3, 0.1]), []
    monkeypatch.setattr(beta_vae, "correlation",
                        lambda rotated, values: seen.append(rotated) or torch.ones(4, 6))
    beta_vae.rotated_gaps(mu, torch.randn(50, 6))
    assert len(seen) == 20 and not torch.allclose(seen[0], seen[1], atol=0.1)
    for rotated in seen:
        assert torch.allclose(torch.pdist(rotated), torch.pdist(mu / mu.std(0)), rtol=1e-3)


@five_seeds
def test_axes_that_mean_nothing_have_no_difference_however_they_are_spread(seed):
    """Each attribute is a random mixture of all latents, and none of these weighs more in it than
    the others, on average."""
    torch.manual_seed(seed)
    differences = []
    for _ in range(50):
        z = torch.randn(500, 6)
        mu, values = z * torch.tensor([1, 0.8, 0.6, 0.4, 0.3, 0.2]), z @ torch.randn(6, 6)
        own = beta_vae.gap(beta_vae.correlation(mu, values))
        differences.append(own - np.mean(beta_vae.rotated_gaps(mu, values)))
    error = np.std(differences) / 50 ** 0.5             # the standard error of their mean
    assert abs(np.mean(differences)) < 3 * error and error < 0.03


# ================================================================ 4. the metrics

def features(n, mean, cov, seed):
    return torch.from_numpy(np.random.RandomState(seed).multivariate_normal(mean, cov, n))


def test_fid_of_equal_sets_is_0_and_of_a_shift_its_square():
    a = features(500, np.zeros(6), np.diag([1, 2, 3, 4, 5, 6]), 0)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert evaluate.frechet_distance(a, a + shift) == pytest.approx(25)


def test_fid_of_scaled_axes():
    a = features(500, np.zeros(4), np.eye(4), 0)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly cov = I
    sigma = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    expected = ((1 - sigma) ** 2).sum().item()
    assert evaluate.frechet_distance(a, a * sigma) == pytest.approx(expected)


def test_fid_agrees_with_the_symmetric_form():
    """tr (S_a S_b)^1/2 is also the trace of the root of S_a^1/2 S_b S_a^1/2, which is symmetric."""
    rng = np.random.RandomState(1)
    a = features(400, rng.randn(8), np.cov(rng.randn(8, 50)), 2).float()
    b = features(300, rng.randn(8), np.cov(rng.randn(8, 50)), 3).float()
    m1, m2, s1, s2 = a.double().mean(0), b.double().mean(0), np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values) @ vectors.T
    product = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root)).sum()
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(s1) + np.trace(s2) - 2 * product
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert evaluate.frechet_distance(b, a) == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert evaluate.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, 1e-3)


def test_fid_survives_features_that_are_always_zero_and_a_single_feature():
    torch.manual_seed(0)
    a, b = torch.randn(50, 5).relu(), torch.randn(50, 5).relu()
    a[:, 0] = b[:, 0] = 0
    assert 0 <= evaluate.frechet_distance(a, b) < 1
    a, b = a[:, 1:2], 3 * a[:, 1:2]                     # (s_a - s_b)^2 and the shift of the mean
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-4)


def test_fid_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match=r"\(5, 8\): give more images"):
        evaluate.frechet_distance(torch.randn(5, 8), torch.randn(50, 8))
    with pytest.raises(ValueError, match="finite"):
        evaluate.frechet_distance(torch.randn(50, 8), torch.full((50, 8), math.nan))


def test_controllability_is_a_share():
    asked = torch.arange(40) % 10
    recognised = torch.where((asked == 3) & (torch.arange(40) < 20), 4, asked)  # half of class 3
    assert evaluate.controllability(recognised, asked) == pytest.approx(0.95)
    assert evaluate.controllability(asked, asked) == 1


def test_diversity_is_1_for_real_images_and_0_for_one_image_a_class():
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    real = torch.randn(200, 5)
    assert evaluate.diversity(real, labels, real, labels) == pytest.approx(1)
    assert evaluate.diversity(real / 2, labels, real, labels) == pytest.approx(0.5)
    assert evaluate.diversity(real[:1].expand(200, 5), labels, real, labels) < 1e-3
    assert evaluate.diversity(real[:0], labels[:0], real, labels) == 0
    half = labels < 5  # classes of which nothing is left count as 0
    assert evaluate.diversity(real[half], labels[half], real, labels) == pytest.approx(0.5)


def test_importance_weighted_bounds_close_in_on_the_likelihood(sample):
    """The likelihood is a sum over a fine grid of z, which has two dimensions."""
    torch.manual_seed(3)
    model, x, y = vae.VAE(2, hidden=16), sample.test_images[:6], sample.test_labels[:6]
    with torch.no_grad():
        model.encoder[-1].bias += 0.5                   # so that q(z | x) is not near the prior
        axis = torch.linspace(-8, 8, 129)
        grid = torch.cartesian_prod(axis, axis)         # (129 * 129, 2)
        log_prior = torch.distributions.Normal(0, 1).log_prob(grid).sum(1)
        log_cell = 2 * math.log(axis[1] - axis[0])      # the area of a cell of the grid
        logits = model.decode(grid)
        truth = []
        for image in x:
            log_p = -recon_oracle(logits, image.expand_as(logits)) + log_prior
            truth.append(log_p.double().logsumexp(0).item() + log_cell)

    def bound(draws, repetitions):
        return np.mean([evaluate.importance_weighted_bound(model, x, y, draws)
                        for _ in range(repetitions)])
    bounds = [bound(1, 1000), bound(10, 100), bound(100, 10), bound(4000, 1)]
    assert bounds == sorted(bounds, reverse=True)
    gained = bounds[0] - bounds[-1]
    assert gained > 0.5  # the bound was loose enough for this to mean something
    assert bounds[-1] == pytest.approx(-np.mean(truth), abs=0.05)
    # K = 1 is the negative ELBO, with the KL by Monte Carlo instead of in closed form
    elbo = np.array([vae.test(model, x)["total"] for _ in range(1000)])
    error = elbo.std() / 1000 ** 0.5
    assert bounds[0] == pytest.approx(elbo.mean(), abs=5 * error)
    assert 5 * error < 0.15 * gained                    # small beside what K = 4000 gains


def test_log_joint_is_that_of_torch_distributions():
    torch.manual_seed(0)
    z, means, factors = torch.randn(9, 3), torch.randn(4, 3), torch.randn(4, 3, 3).tril()
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.5)    # in place: the diagonal is positive now
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = torch.stack([weights[k].log() + torch.distributions.MultivariateNormal(
        means[k], scale_tril=factors[k]).log_prob(z) for k in range(4)])
    assert torch.allclose(evaluate.log_joint(z, weights, means, factors), expected, atol=1e-4)


def planted_mixture():
    """Six thousand points in three clusters of 1000, 2000 and 3000, and the means of these."""
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    spread = torch.tensor([[1.0, 0.5], [0.0, 0.8]])
    z = torch.cat([m + torch.randn(n, 2) @ spread for m, n in zip(means, (1000, 2000, 3000))])
    return z.double(), means


def log_likelihood(z, mixture):
    return evaluate.log_joint(z, *mixture).logsumexp(0).mean().item()


def test_no_iteration_of_em_lowers_the_likelihood():
    torch.manual_seed(0)
    z, _ = planted_mixture()
    found = []
    for iterations in (1, 2, 3, 5, 10, 20, 50):
        torch.manual_seed(0)                             # the same start every time
        mixture = evaluate.fit_gmm(z, 3, iterations, ridge=0)
        found.append(log_likelihood(z, mixture))
    assert found == sorted(found) and found[-1] > found[0] + 0.1


def test_em_finds_a_planted_mixture():
    """One start may end in a local optimum. The best of four finds the truth."""
    torch.manual_seed(0)
    z, means = planted_mixture()
    fits = [evaluate.fit_gmm(z, 3, 50, ridge=1e-6) for _ in range(4)]
    weights, found, factors = max(fits, key=lambda mixture: log_likelihood(z, mixture))
    order = weights.argsort()
    assert torch.allclose(weights[order], torch.tensor([1, 2, 3]).double() / 6, atol=0.02)
    assert torch.allclose(found[order].float(), means, atol=0.15)
    drawn = evaluate.sample_gmm((weights, found, factors), 50_000)
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.08)
    assert torch.allclose(drawn.T.cov(), z.T.cov(), atol=0.25)


def test_em_with_one_component_is_the_sample_mean_and_covariance():
    torch.manual_seed(0)
    z = torch.randn(500, 4) @ torch.randn(4, 4) + 3
    _, mean, factor = evaluate.fit_gmm(z, 1, iterations=1, ridge=0)
    assert torch.allclose(mean[0], z.mean(0), atol=1e-4)
    assert torch.allclose(factor[0] @ factor[0].T, z.T.cov(correction=0), atol=1e-3)


def test_em_survives_more_components_than_clusters_and_a_single_dimension():
    torch.manual_seed(0)
    z = torch.cat([torch.zeros(40, 3), torch.ones(40, 3)]) + 1e-3 * torch.randn(80, 3)
    for points in (z, z[:, :1]):
        mixture = evaluate.fit_gmm(points, 30, iterations=30)
        assert all(tensor.isfinite().all() for tensor in mixture)
        assert mixture[0].sum().item() == pytest.approx(1)
        assert evaluate.sample_gmm(mixture, 7).shape == (7, points.shape[1])


def test_the_ex_post_prior_of_a_cvae_is_one_gaussian_a_class(sample, monkeypatch):
    """z that lie around the number of their class are drawn again around that number."""
    def encode(model, images, labels):
        return labels[:, None].expand(-1, 2).float(), torch.full((len(labels), 2), -9.0)
    monkeypatch.setattr(evaluate, "encode", encode)
    fit_gmm = evaluate.fit_gmm
    monkeypatch.setattr(evaluate, "fit_gmm", lambda z, components, iterations=3: fit_gmm(
        z, components, iterations))                     # 3 instead of 100: enough here, and faster
    asked = torch.arange(50) % 10
    z = evaluate.sample_ex_post_prior(small(cvae, 2), asked, sample)
    assert torch.allclose(z, asked[:, None].expand(50, 2).float(), atol=0.3)
    z = evaluate.sample_ex_post_prior(small(vae, 2), torch.arange(2000) % 10, sample)
    assert z.mean().item() == pytest.approx(4.5, abs=0.5)       # of all classes, in no order
    assert (z[:, 0] - torch.arange(2000) % 10).abs().mean() > 1


def crude_look(resnet, images):
    """In place of the classifier, and much faster: 49 mean grey values as features, the brightest
    of the first ten rows as class."""
    return (torch.nn.functional.avg_pool2d(images, 4).flatten(1),
            images.sum((1, 3))[:, :10].argmax(1))


@pytest.fixture
def crude(monkeypatch, tiny):
    """The Real images of tiny, of which every tenth was not recognised."""
    monkeypatch.setattr(classifier, "look", crude_look)
    labels = tiny.test_labels
    recognised = torch.where(torch.arange(len(labels)) % 10 == 0, (labels + 1) % 10, labels)
    features, _ = crude_look(None, tiny.test_images)
    return evaluate.Real(tiny.test_images, labels, None, features, recognised)


def test_measure_of_a_decoder_that_draws_the_class_asked_for(crude, tiny, monkeypatch):
    """It draws a single white row, and crude_look takes that for the class."""
    model, meta, asked = small(cvae, 2).eval(), {"seed": 0, "metrics": {"seconds": 1.5}}, []

    def decode(model, z, labels):
        asked.append(labels)
        images = torch.full((len(labels), 1, 28, 28), -9.0)
        images[torch.arange(len(labels)), 0, labels] = 9.0
        return images
    monkeypatch.setattr(evaluate, "decode", decode)
    row = evaluate.measure(cvae, model, meta, tiny, crude)
    assert row["control_prior"] == row["control_decoded"] == row["control_swap"] == 1
    assert row["diversity_prior"] == 0                  # one image a class
    of_prior, of_ex_post, of_decoded, of_swap = asked[:4]       # then come those of iw_10
    for labels in (of_prior, of_ex_post, of_decoded):
        assert torch.equal(labels, tiny.test_labels)
    assert (of_swap != tiny.test_labels).all()
    assert (row["model"], row["beta"], row["latent_dim"]) == ("CVAE", None, 2)
    assert row["params"] == sum(p.numel() for p in model.parameters()) and row["seconds"] == 1.5


def test_measure_of_a_decoder_that_redraws_the_real_images(crude, tiny, monkeypatch):
    """It does so only if all z are 9; those of real images and of the ex-post prior are made so."""
    model, meta = small(vae, 2).eval(), {"seed": 0, "metrics": {"seconds": 1.5}}
    for name in ("sample_ex_post_prior", "draw_z"):
        monkeypatch.setattr(evaluate, name, lambda *_: torch.full((len(tiny.test_labels), 2), 9.0))
    monkeypatch.setattr(evaluate, "decode", lambda model, z, labels: (
        tiny.test_images.clamp(1e-6, 1 - 1e-6).logit() if (z == 9).all()
        else torch.zeros(len(z), 1, 28, 28)))
    row = evaluate.measure(vae, model, meta, tiny, crude)
    assert row["fid_decoded"] == row["fid_ex_post"] == pytest.approx(0, abs=1e-4)
    assert row["fid_prior"] > 1
    _, recognised = classifier.look(None, tiny.test_images)
    accuracy = (recognised == tiny.test_labels).double().mean().item()
    assert row["control_decoded"] == pytest.approx(accuracy) and 0 < accuracy < 1


def test_no_measurement_changes_another(crude, tiny, monkeypatch):
    """A step that uses up more random numbers than usual leaves all other numbers as they are."""
    torch.manual_seed(0)
    model, meta = small(cvae, 2).eval(), {"seed": 0, "metrics": {"seconds": 1.0}}

    def wasteful(function):
        def wrapped(*args):
            found = function(*args)
            torch.rand(7)
            return found
        return wrapped
    first = evaluate.measure(cvae, model, meta, tiny, crude)
    for module, name in ((classifier, "look"), (evaluate, "sample_ex_post_prior"), (cvae, "test")):
        monkeypatch.setattr(module, name, wasteful(getattr(module, name)))
    assert evaluate.measure(cvae, model, meta, tiny, crude) == first
    torch.manual_seed(0)                                 # and the total is that of the script
    assert first["total"] == cvae.test(model, tiny.test_images, tiny.test_labels)["total"]
    floor = data.pixel_entropy(tiny.test_images).mean().item()
    assert first["excess"] == pytest.approx(first["recon"] - floor)


def test_seeds_are_averaged_with_n_minus_1():
    rows = [{"model": "m", "params": 5, "kl": k, "beta": 0.5} for k in (1, 2, 6)]
    row = evaluate.average(rows)
    assert row["kl"] == {"mean": 3.0, "std": pytest.approx(np.std([1, 2, 6], ddof=1)), "n": 3}
    assert row["beta"] == 0.5 and row["params"] == 5
    assert evaluate.average(rows[:1]) == rows[0]


def test_noise_is_the_pooled_spread_of_a_difference():
    rows = [{"x": {"mean": 1.0, "std": std, "n": 3}} for std in (3.0, 4.0)]
    # Var(a - b) = s^2 + s^2 with s^2 = (9 + 16) / 2; and twice its root
    assert evaluate.noise(rows, "x") == pytest.approx(2 * math.sqrt(25))
    assert evaluate.noise([{"x": 1.0}, {}], "x") is None


# ================================================================ 5. the classifier

@pytest.fixture(scope="session")
def pretrained():
    return classifier.load_pretrained()


def test_normalisation_is_inside_and_applied_once(sample):
    torch.manual_seed(0)
    bare, wrapped = classifier.FashionResNet18(0, 1), classifier.FashionResNet18(0.3, 0.4)
    wrapped.load_state_dict(bare.state_dict() | {"mean": torch.tensor(0.3),
                                                 "std": torch.tensor(0.4)})
    x = sample.test_images[:8]
    expected = bare.eval()((x - 0.3) / 0.4)
    assert torch.allclose(wrapped.eval()(x), expected, atol=1e-5)
    assert {"mean", "std"} <= set(wrapped.state_dict())


def test_the_pretrained_classifier(pretrained, sample):
    model, meta = pretrained
    assert classifier.PRETRAINED.stat().st_size <= 6_000_000
    assert meta["source"] == "full" and meta["seed"] == 0
    assert model.mean.item() == pytest.approx(0.2860, abs=1e-3)
    assert model.std.item() == pytest.approx(0.3530, abs=1e-3)
    images, labels = sample.test_images[::2], sample.test_labels[::2]
    found, recognised = classifier.look(model, images)
    assert (recognised == labels).float().mean() >= 0.93
    x = images[:20]
    with torch.no_grad():
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-3)
        assert torch.allclose(model.features(x), found[:20], atol=1e-3)


@pytest.mark.parametrize("images", [torch.full((2, 1, 28, 28), math.nan), torch.zeros(2, 784),
                                    torch.full((2, 1, 28, 28), -0.4), 2 * torch.ones(2, 1, 28, 28)],
                         ids=["nan", "flat", "standardised", "too bright"])
def test_the_classifier_refuses_what_is_not_a_raw_image(images):
    with pytest.raises(ValueError, match="images"):
        classifier.look(classifier.FashionResNet18(), images)
    labels, generator = torch.zeros(2, dtype=torch.int64), torch.Generator()
    with pytest.raises(ValueError, match="images"):
        classifier.train(classifier.FashionResNet18(), images, labels, images, labels, 1, 2, 0.1,
                         generator)


def test_augmentation_keeps_shape_range_and_varies(sample):
    x = sample.train_images[:64]
    a = classifier.augment(x, torch.Generator().manual_seed(0))
    assert a.shape == x.shape and 0 <= a.min() and a.max() <= 1
    b = classifier.augment(x, torch.Generator().manual_seed(1))
    assert not torch.equal(a, x) and not torch.equal(a, b)
    assert sum(torch.equal(a[i], x[i]) for i in range(64)) < 10


def test_the_classifier_keeps_its_best_epoch(tiny, monkeypatch):
    """Validation answers right, wrong, wrong: the weights must be those of the first epoch."""
    answers, states = [], []

    def look(model, images):
        states.append(copy.deepcopy(model.state_dict()))
        answers.append(tiny.val_labels if not answers else tiny.val_labels + 1)
        return None, answers[-1]
    monkeypatch.setattr(classifier, "look", look)
    model = classifier.FashionResNet18(0.28, 0.35)
    best = classifier.train(model, tiny.train_images[:64], tiny.train_labels[:64], tiny.val_images,
                            tiny.val_labels, 3, 32, 0.01, torch.Generator())
    assert best == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[0][name])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


# ================================================================ 6. the data

def idx(array):
    """IDX bytes of a uint8 array, written from the format's description."""
    header = 0, 0, 8, array.ndim, *array.shape          # 8 stands for uint8
    return struct.pack(f">BBBB{array.ndim}I", *header) + array.tobytes()


def test_split_is_stratified_disjoint_and_stable():
    labels = np.tile(np.arange(10), 6000)
    train, val = data.split_indices(labels)
    assert len(train) == 55_000 and len(val) == 5_000
    assert not set(train) & set(val)
    assert (np.bincount(labels[val]) == 500).all()
    # the indices themselves, as first published: whoever changes them changes every number
    assert hashlib.sha256(val.astype("<i8").tobytes()).hexdigest()[:16] == "3530c710df4783a7"


def test_sample_is_balanced_raw_and_small(sample):
    assert sample.source == "sample"
    for split, size in {"train": 5000, "val": 1000, "test": 2000}.items():
        x, y = getattr(sample, f"{split}_images"), getattr(sample, f"{split}_labels")
        assert x.shape == (size, 1, 28, 28) and x.dtype == torch.float32
        assert x.min() == 0 and x.max() == 1
        assert y.dtype == torch.int64 and (y.bincount() == size // 10).all()
    assert data.SAMPLE.stat().st_size <= 4_000_000


def test_the_full_set_has_the_known_floor_and_the_sample_is_its_first_images(sample, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", ())
    try:
        full = data.load("full")
    except data.UserError:
        pytest.skip("the full data set is not here (apt install dataset-fashion-mnist)")
    assert [len(tensor) for tensor in full[:6]] == [55_000] * 2 + [5_000] * 2 + [10_000] * 2
    assert (full.val_labels.bincount() == 500).all()
    assert data.pixel_entropy(full.test_images).mean().item() == pytest.approx(189.86, abs=0.005)
    first = torch.cat([(full.test_labels == c).nonzero()[:200, 0] for c in range(10)]).sort().values
    assert torch.equal(full.test_images[first], sample.test_images)
    assert torch.equal(full.test_labels[first], sample.test_labels)


@pytest.fixture
def files(monkeypatch, tmp_path):
    """The four files in miniature, with their own checksums; the working folder is empty."""
    rng, labels = np.random.RandomState(0), np.repeat(np.arange(10), 510).astype(np.uint8)
    arrays = [rng.randint(0, 256, (5100, 28, 28)).astype(np.uint8), labels,
              rng.randint(0, 256, (20, 28, 28)).astype(np.uint8), labels[:20]]
    raw = {name: idx(array) for name, array in zip(data.FILES, arrays)}
    monkeypatch.setattr(data, "FILES", {n: hashlib.sha256(b).hexdigest() for n, b in raw.items()})
    monkeypatch.setattr(data, "FOLDERS", (Path("fashion-mnist"), Path("nowhere")))
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/",))          # nobody is there
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in raw.items()}


@pytest.fixture
def server(tmp_path_factory):
    """A web server on this machine: (the folder that it serves, its address)."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_what_is_missing_comes_from_the_first_good_mirror(monkeypatch, files, server):
    """It comes into the folder that the user chose, where three of the files are already."""
    monkeypatch.setenv("HOME", os.getcwd())
    monkeypatch.setenv("FASHION_MNIST_DIR", "~/chosen")
    *here, missing = sorted(files)
    Path("chosen").mkdir()
    for name in here:
        Path("chosen", name[:-3]).write_bytes(gzip.decompress(files[name]))
    with pytest.raises(ValueError, match=f"{missing}.*network"):            # never the sample
        data.load("auto")
    folder, address = server
    for mirror, content in {"empty": None, "other": gzip.compress(b"other bytes"),
                            "cut": files[missing][:99], "good": files[missing]}.items():
        (folder / mirror).mkdir()
        if content:
            (folder / mirror / missing).write_bytes(content)
    urlopen = urllib.request.urlopen                    # with less patience, to save time:
    monkeypatch.setattr(urllib.request, "urlopen",
                        lambda url, timeout: urlopen(url, timeout=timeout / 50))
    with socket.create_server(("127.0.0.1", 0)) as silent:                  # it never answers
        monkeypatch.setattr(data, "MIRRORS", (
            "http://127.0.0.1:9/", f"http://127.0.0.1:{silent.getsockname()[1]}/",
            *[f"{address}/{mirror}/" for mirror in ("empty", "other", "cut", "good")]))
        loaded = data.load("auto")
    assert loaded.source == "full"
    assert [len(tensor) for tensor in loaded[:6]] == [100] * 2 + [5000] * 2 + [20] * 2
    assert {path.name for path in Path("chosen").iterdir()} == {missing, *(n[:-3] for n in here)}
    monkeypatch.setattr(data, "MIRRORS", ())                                # no network any more
    assert torch.equal(data.load("auto").test_images, loaded.test_images)


def test_without_data_and_network_auto_uses_the_sample_and_says_so(files, capsys):
    assert data.load("auto").source == "sample"
    assert "SAMPLE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="train-images.*network"):
        data.load("full")
    with pytest.raises(ValueError, match="no data 'smaple': choose auto, full or sample"):
        data.load("smaple")


def test_a_wrong_file_is_named_and_never_replaced_by_the_sample(files):
    folder = Path("fashion-mnist")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = folder / "t10k-images-idx3-ubyte.gz"
    labels = files["t10k-labels-idx1-ubyte.gz"]
    for wrong in (files[path.name][:-20], b"", b"PK\3\4" * 9, labels, "a folder"):
        path.unlink()
        if wrong == "a folder":
            path.mkdir()
        else:
            path.write_bytes(wrong)
        for source in ("auto", "full"):
            with pytest.raises(ValueError, match="t10k-images.*(get it anew|put a readable file)"):
                data.load(source)


# ================================================================ 7. the scripts

def new_lines(before, after):
    """How many lines of the source of after, a function or class, are not in that of before."""
    sources = [inspect.getsource(whole).splitlines() for whole in (before, after)]
    return sum(line.startswith("+ ") for line in difflib.ndiff(*sources))


def test_each_section_changes_the_lesson_before_it_only_where_it_must():
    for name in ("elbo_terms", "is_active", "check_images", "Residual"):
        assert len({inspect.getsource(getattr(module, name)) for module in MODELS}) == 1, name
    # so many lines are new; we have read them, and they belong to the lesson of their section
    for before, after, count in (
            (vae.VAE, beta_vae.BetaVAE, 2), (vae.VAE, conv_vae.ConvVAE, 12),
            (conv_vae.ConvVAE, cvae.CVAE, 18),
            (vae.train, beta_vae.train, 3), (vae.train, conv_vae.train, 8),
            (conv_vae.train, cvae.train, 9), (vae.test, beta_vae.test, 0),
            (vae.test, conv_vae.test, 0), (conv_vae.test, cvae.test, 7),
            (vae.draw_pictures, conv_vae.draw_pictures, 0)):
        assert new_lines(before, after) == count, f"{after.__module__}.{after.__name__}"


def test_lines_are_at_most_100_characters_wide_and_files_at_most_400_lines_long():
    for module in (*MODELS, data, classifier, evaluate):
        lines = inspect.getsource(module).splitlines()
        assert max(map(len, lines)) <= 100 and len(lines) <= 400, module.__name__


PICTURES = {                                            # that each script draws
    data: {"samples", "distributions"},
    vae: {"reconstructions", "samples", "curves", "map"},
    conv_vae: {"reconstructions", "samples", "curves"},
    beta_vae: {"tradeoff", "traversals", "attributes"},
    cvae: {"reconstructions", "samples", "curves", "swaps"},
    classifier: set(),
}


def start(words, folder, **environment):
    """python WORDS in a folder, without network or display."""
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "utf-8",
                                "https_proxy": "http://127.0.0.1:9", **environment}
    environment.pop("DISPLAY", None)
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                            errors="replace")


def test_each_script_runs_alone_with_data_py_and_the_sample(tmp_path, tiny):
    """All at the same time, each in a folder with nothing but itself, data.py and 150 images."""
    arrays = {}
    for split in ("train", "val", "test"):              # every second image, as numbers to 255
        images, labels = getattr(tiny, f"{split}_images"), getattr(tiny, f"{split}_labels")
        arrays[f"{split}_images"] = (images[::2, 0] * 255).round().byte()
        arrays[f"{split}_labels"] = labels[::2].byte()
    started = {}
    for module in PICTURES:
        folder = tmp_path / module.__name__
        (folder / "assets").mkdir(parents=True)
        np.savez(folder / "assets" / data.SAMPLE.name, **arrays)
        for name in {module.__name__, "data"}:
            shutil.copy(HERE / f"{name}.py", folder)
        flags = ["--data", "sample"] + ([] if module is data else ["--epochs", "1"])
        flags += {vae: ["--latent-dim", "2"], beta_vae: ["--betas", "1"]}.get(module, [])
        started[module] = start([f"{module.__name__}.py", *flags], folder, OMP_NUM_THREADS="1")
    for module, process in started.items():
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "data sample train: 150 images, entropy floor" in printed
        made = [path.name for path in (tmp_path / module.__name__ / "runs").iterdir()]
        assert {name[:-4].rpartition("-")[2] for name in made
                if name.endswith(".png")} == PICTURES[module]
        assert not [name for name in made if name.endswith(".part")]
        if module is not data:
            assert re.search(r"^test \(sample\)", printed, re.MULTILINE)
            assert all(name.startswith(f"{module.__name__}-") and "-sample-seed0-epochs1" in name
                       for name in made)


@each_model
@pytest.mark.parametrize("kept", [list(range(10)), [0, 1, 2, 4, 7, 9], [6]], ids=len)
def test_main_tests_saves_and_then_draws(module, kept, tiny, tmp_path, capsys, monkeypatch):
    """It does so also if some classes are missing, or all but one."""
    saved, save_figure = [], data.save_figure

    def look_first(figure, path):
        saved.append(len(list(tmp_path.glob("*.pt"))))
        save_figure(figure, path)
    monkeypatch.setattr(data, "save_figure", look_first)
    parts = {"source": "own"}
    for split in ("train", "val", "test"):
        keep = torch.isin(getattr(tiny, f"{split}_labels"), torch.tensor(kept))
        for name in (f"{split}_images", f"{split}_labels"):
            parts[name] = getattr(tiny, name)[keep]
    dataset = data.FashionMNIST(**parts)
    flags = ["--betas", "1"] if module is beta_vae else []
    path = module.main(["--epochs", 1, "--out", tmp_path, *flags], dataset=dataset)
    path = path[0] if module is beta_vae else path
    model, meta = module.load_model(path)
    torch.manual_seed(0)
    expected = module.test(model, dataset.test_images, *given(module, dataset.test_labels))
    for name in ("recon", "kl", "total", "active"):
        assert meta["metrics"][name] == pytest.approx(expected[name], rel=1e-6)
    printed = capsys.readouterr().out
    excess = expected["recon"] - data.pixel_entropy(dataset.test_images).mean().item()
    assert f"test (own): recon {expected['recon']:.2f} (excess {excess:.2f})" in printed
    assert f"total {expected['total']:.2f} nats per image\n{expected['active']} of " in printed
    if module is cvae:
        assert f"total + log 10 = {expected['total'] + math.log(10):.2f}" in printed
    # there was a checkpoint before each picture, and all pictures were drawn
    assert saved == [1] * len(PICTURES[module] - {"map"})
    assert meta["code"] == inspect.getsource(module)


@pytest.fixture(scope="session")
def study(tmp_path_factory, tiny):
    """python evaluate.py of a small study (VAE, two β-VAEs, CVAE) with a crude classifier: a
    function that runs it, and returns the path of its results and what was printed."""
    out = tmp_path_factory.mktemp("study")

    def run():
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "NAMES", {module: name for module, name
                                              in evaluate.NAMES.items() if module is not conv_vae})
            patch.setattr(beta_vae, "BETAS", [0.5, 1.0])
            patch.setattr(data, "load", lambda source: tiny)
            patch.setattr(classifier, "look", crude_look)
            patch.setattr("builtins.print", lambda *words, sep=" ", **_: printed.append(
                sep.join(map(str, words))))
            path = evaluate.main(["--epochs", "1", "--out", str(out)])
        return path, "\n".join(printed)
    return run


def test_evaluate_trains_what_is_missing_and_its_tables_add_up(study):
    path, printed = study()
    results = json.loads(path.read_text())
    # the prior of all four models, the ex-post prior of all but the two β-VAEs
    assert printed.count("measuring images from the prior") == 4
    assert printed.count("measuring images from the ex-post prior") == 2
    assert results["data"] == "sample" and results["split"] == "test" and results["seeds"] == [0]
    assert [row["model"] for row in results["rows"]] == [
        "MLP VAE", "β-VAE β=0.5", "β-VAE β=1", "CVAE"]
    for row in results["rows"]:
        assert row["recon"] + row["kl"] == pytest.approx(row["total"], abs=1e-9)
        assert row["recon"] - results["floor"] == pytest.approx(row["excess"], abs=1e-9)
        assert row["fid_prior"] > results["yardsticks"]["fid of halves of the images"]
        assert f"{row['total']:.2f}" in printed
    differences = [row["difference"] for row in results["rows"][1:3]]
    pooled, = [value for name, value in results["yardsticks"].items() if "difference" in name]
    assert pooled["mean"] == pytest.approx(np.mean(differences)) and pooled["n"] == 2
    assert pooled["std"] == pytest.approx(np.std(differences, ddof=1))
    assert all(line in printed for line in evaluate.report(results))
    assert path.with_suffix(".png").exists()
    shown = {*evaluate.MAIN, *evaluate.IMAGES, *evaluate.CONTROL, *evaluate.SWEEP, *evaluate.SIZE}
    for row in results["rows"]:
        assert set(row) <= shown | {"beta"}, "a number is computed that no table shows"


def test_evaluate_names_what_another_version_of_a_script_trained(study):
    """An edited vae.py left its checkpoint; and nothing is trained a second time."""
    path, _ = study()
    first = json.loads(path.read_text())
    checkpoint = path.with_name("vae-sample-seed0-epochs1.pt")
    meta = torch.load(checkpoint, weights_only=True)
    edited = meta | {"code": meta["code"].replace("0.5 * (mu", "0.7 * (mu")}
    torch.save(edited, checkpoint)
    path, printed = study()
    torch.save(meta, checkpoint)
    again = json.loads(path.read_text())
    assert first["stale"] == [] and len(again["stale"]) == 1
    line = again["stale"][0]
    assert line.startswith(f"- {checkpoint} was trained by another version of vae.py")
    assert printed.count(line) == 2 and "epoch 1/1" not in printed          # at once, and below
    assert [row["total"] for row in first["rows"]] == [row["total"] for row in again["rows"]]


def test_readme_and_report_show_the_recorded_tables():
    results = json.loads((HERE / "results" / "results.json").read_text(encoding="utf-8"))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    whole = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    assert results["data"] == "full" and results["split"] == "test" and results["epochs"] is None
    assert len(results["seeds"]) >= 3 and results["stale"] == []
    for line in evaluate.report(results):
        if line.startswith(("|", "-")):
            assert line in whole, line
    few = [row for row in results["rows"] if row["beta"] is None]
    columns = ["model", "excess", "kl", "total", "fid_prior", "control_prior"]
    for line in evaluate.table(few, columns):
        assert line in readme, line


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_formulas_in_the_text_survive_the_parser_of_github(page):
    """It eats a backslash before punctuation, and takes underscores after a brace for emphasis.
    Displayed formulas stand in blocks of the language math, which it leaves alone."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (HERE / page).read_text(encoding="utf-8"),
                  flags=re.DOTALL)
    assert "$$" not in text and text.count("$") % 2 == 0
    for formula in text.split("$")[1::2]:
        assert "\n" not in formula and not re.search(r"\\[^a-zA-Z]|\}_", formula), formula


def test_the_snippets_of_the_readme_work(study, tmp_path, monkeypatch, sample):
    """Every Python block of README.md that imports something is run, in a folder in which there is
    what README.md says: trained models of vae.py and cvae.py, a picture, an array of images."""
    results, _ = study()
    monkeypatch.setattr(data, "load", lambda source="auto": sample)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = vae.main(["--epochs", 1, "--latent-dim", 2, "--out", "try2"], dataset=sample)
    path.rename("try2/vae-sample-seed0-latent-dim2.pt")
    Path("runs").mkdir()
    for script in ("vae", "cvae"):
        shutil.copy(results.with_name(f"{script}-sample-seed0-epochs1.pt"),
                    f"runs/{script}-full-seed0.pt")
    figure = data.Figure((0.28, 0.28), 100)              # a picture of one's own, 28 x 28 pixels
    figure.add_axes((0, 0, 1, 1)).bar([0], [1])
    figure.savefig("mine.png")
    np.save("mine.npy", np.random.RandomState(0).randint(0, 256, (300, 28, 28)).astype(np.uint8))
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        names = {}
        if "import" in block:
            exec(block, names)
        if "log_p" in names:                            # the total is an upper bound, and near
            assert 0 < names["total"] + names["log_p"] < 20
    assert {"bags.png", "walk.png", "mine-decoded.png"} <= set(os.listdir())
    assert Path("runs/vae-trousers-bags-seed0-epochs3.pt").exists()


# ================================================================ 8. what users do wrong

@pytest.mark.parametrize("module, flags", [
    (vae, ["--epochs", "0"]), (vae, ["--epochs", "many"]), (vae, ["--epoch", "3"]),
    (vae, ["--lr", "nan"]), (conv_vae, ["--warmup", "1.5"]), (beta_vae, ["--betas", "-1"]),
    (cvae, ["--data", "mnist"]), (vae, ["--device", "abacus"]), (vae, ["--device", "meta"]),
    (evaluate, ["--seeds", "1", "x"]), (vae, ["--out", __file__]), (vae, ["--out", "a\0b"]),
    (vae, ["--out", "~nobody-of-that-name/x"]),
    (vae, "--epochs 3"),                                # a text, and no list of flags
    (data, ["\n"]),                                     # would break the message in two lines
], ids=lambda v: repr(v) if isinstance(v, (list, str)) else v.__name__)
def test_a_bad_flag_is_one_line_and_exit_code_2(module, flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_and_other_errors_stay_as_they_are(error, capsys):
    def fail(error):
        raise error
    with pytest.raises(SystemExit) as stop:
        data.command(fail)(error)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory: close programs, or lower")
    with pytest.raises(RuntimeError, match="a mistake in this code"):
        data.command(fail)(RuntimeError("a mistake in this code"))


def test_a_flag_that_is_not_the_default_stands_in_the_name_in_plain_words(tmp_path):
    for module, flags, name in (
            (vae, "--epochs 24", "vae-own-seed0.pt"),   # which is the default
            (vae, "--seed 4 --device cpu", "vae-own-seed4.pt"),
            (vae, "--latent-dim 2 --lr 0.01", "vae-own-seed0-lr0.01-latent-dim2.pt"),
            (conv_vae, "--warmup 0", "conv_vae-own-seed0-warmup0.0.pt")):
        args = data.read_flags(module.flags(), f"{flags} --out {tmp_path}".split())
        assert data.run_path(args, "own") == tmp_path / name


def test_a_checkpoint_comes_back_as_it_was_saved_and_others_are_refused(tmp_path):
    args = data.read_flags(vae.flags(), ["--latent-dim", 3, "--seed", 5, "--out", tmp_path])
    model, path = vae.VAE(3), tmp_path / "deep" / "x.pt"
    data.save_checkpoint(path, args, "own", {"total": 1.5}, model.state_dict(), beta=0.5)
    found, meta = vae.load_model(path)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters()))
    assert (meta["script"], meta["source"], meta["seed"], meta["beta"]) == ("vae", "own", 5, 0.5)
    assert meta["config"] == {"epochs": 24, "batch_size": 256, "lr": 2.5e-3, "latent_dim": 3}

    class Evil:                                         # code that would run when it is loaded
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    def saved(content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()
    nan = {name: value * math.nan for name, value in model.state_dict().items()}
    for content, reason in (
            (saved(meta | {"script": "cvae"}), "saved by cvae.py"),
            (saved(model.state_dict()), "script"),
            (saved(meta | {"config": {"latent_dim": 4}}), "size mismatch"),
            (saved(meta | {"config": {}}), "latent_dim"), (saved(meta | {"state_dict": ["a"]}), ""),
            (saved(meta | {"state_dict": nan}), "some weights are not finite"),
            (saved(meta)[:-100], ""), (b"", ""), (pickle.dumps(Evil(), protocol=2), "")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s)x.pt: no model of vae.py.*{reason}"):
            vae.load_model(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "f: No space left on device; make space"),
    (KeyboardInterrupt("stop"), "stop")], ids=["full disk", "Ctrl-C"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(error, message, tmp_path,
                                                                 monkeypatch):
    path = tmp_path / "f"
    data.write_file(path, b"old")

    def fails(self, content):
        with open(self, "wb") as file:
            file.write(content[:2])
        raise error
    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises((data.UserError, KeyboardInterrupt), match=message):
        data.write_file(path, b"newer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_training_leaves_finished_models_and_no_half_file(tmp_path, tiny, capsys,
                                                                         monkeypatch):
    """Ctrl-C in the middle of the second of two trainings, of three steps each."""
    losses = []

    def isfinite(loss):                                 # train() asks this of each loss
        losses.append(loss)
        if len(losses) == 5:
            raise KeyboardInterrupt
        return True
    monkeypatch.setattr(torch, "isfinite", isfinite)
    with pytest.raises(SystemExit) as stop:
        beta_vae.main(["--betas", 1, 2, "--epochs", 1, "--batch-size", 100, "--out", tmp_path],
                      dataset=tiny)
    assert stop.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted") and error.count("\n") == 1
    saved, = tmp_path.iterdir()
    beta_vae.load_model(saved)


def test_a_pipe_that_is_closed_ends_the_program_in_silence(tmp_path):
    """As in `python data.py | head -1`. (And with a backend of matplotlib that is not there, which
    does no harm, since no script imports pyplot.)"""
    with start(["-u", str(HERE / "data.py"), "--data", "sample"], tmp_path,
               MPLBACKEND="module://not_there") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


@pytest.mark.parametrize("console", [None, io.TextIOWrapper(io.BytesIO(), encoding="ascii")],
                         ids=["none", "ascii"])
def test_a_poor_console_does_no_harm(console, tmp_path, tiny, monkeypatch):
    """There may be no console, or one that cannot print the name of the folder."""
    monkeypatch.setattr(data, "load", lambda source: tiny)
    monkeypatch.setattr(sys, "stdout", console)
    data.main(["--out", tmp_path / "größe-β"])
    assert len(list((tmp_path / "größe-β").glob("*.png"))) == 2


def test_in_a_notebook_the_flags_of_its_kernel_are_ignored(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(data, "load", lambda source: tiny)
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel-1.json"])
    monkeypatch.chdir(tmp_path)
    data.main()
    assert len(list(Path("runs").glob("*.png"))) == 2


def test_image_grid_puts_every_image_in_its_cell_and_refuses_other_shapes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data.Figure, "savefig", lambda figure, *_, **__: seen.append(
        np.asarray(figure.axes[0].images[0].get_array())))
    images = torch.rand(2, 3, 1, 28, 28)
    data.image_grid(images, tmp_path / "grid.png", rows=("a", "b"))
    data.image_grid(images[:, :, 0], tmp_path / "grid.png")
    assert seen[0].shape == (60, 90) and np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0][31:59, 61:89], images[1, 2, 0])
    for wrong in (images[0, 0], images.expand(-1, -1, 3, -1, -1), images[:, :, 0, :20]):
        with pytest.raises(ValueError, match=r"make it \(rows, columns, 28, 28\)"):
            data.image_grid(wrong, tmp_path / "grid.png")
    with pytest.raises(ValueError, match="sigmoid of logits"):
        data.image_grid(images * 9 - 4, tmp_path / "grid.png")


def test_pictures_do_not_depend_on_the_users_matplotlib_settings(tmp_path, tiny):
    drawn, model = [], small(vae, 2)
    sweep = {1.0: {"model": small(beta_vae), "kl": 1.0, "recon": 2.0}}

    @data.command
    def main():
        data.image_grid(tiny.test_images[:6].view(2, 3, 28, 28), tmp_path / "a.png")
        data.plot_curves([dict.fromkeys(("recon", "kl", "val_recon", "val_kl"), 1)],
                         tmp_path / "b.png")
        beta_vae.draw_tradeoff(sweep, tmp_path / "c.png")
        vae.draw_map(model, tiny, tmp_path / "d.png")
    for settings in ({}, {"savefig.format": "pdf", "image.origin": "lower", "axes.grid": True,
                          "figure.facecolor": "red", "text.usetex": True, "font.size": 30}):
        with matplotlib.rc_context(settings):
            main()
        drawn.append([(tmp_path / f"{name}.png").read_bytes() for name in "abcd"])
    assert drawn[0] == drawn[1] and all(png.startswith(b"\x89PNG") for png in drawn[0])


# ================================================================ 9. mistakes that must be noticed

# {test: the mistakes that it has to notice}. A mistake: (scripts, their text, what replaces it).
# What stands in several scripts is replaced in all of them.
MISTAKES = {
    test_recon_is_minus_log_bernoulli: [
        (MODELS, "recon.flatten(1).sum(1)", "recon.flatten(1).mean(1)"),
        (MODELS, "_with_logits(logits, x", "_with_logits(logits.sigmoid(), x")],
    test_kl_is_that_of_two_gaussians: [
        (MODELS, "kl = 0.5 * (mu", "kl = 1.0 * (mu"),
        (MODELS, "(mu.pow(2) + logvar.exp()", "(logvar.exp()"),
        (MODELS, "logvar.exp() - logvar", "logvar.exp() + logvar"),
        (MODELS, "- logvar - 1).sum(1)", "- logvar - 1).mean(1)")],
    test_reparameterized_z: [
        (MODELS, "torch.exp(0.5 * logvar) * eps", "logvar * eps"),
        (MODELS, "torch.exp(0.5 * logvar) * eps", "torch.exp(logvar) * eps"),
        (MODELS, "torch.randn_like(mu)", "torch.rand_like(mu)"),
        (MODELS, "return mu + torch.exp(0.5 * logvar) * eps", "return mu"),
        (MODELS, "torch.randn_like(mu)", "torch.randn_like(mu[:1])")],
    test_test_loop: [
        (MODELS, "z = self.reparameterize(mu, logvar)", "z = mu"),
        (MODELS, "        all_mu.append(mu)\n", "        all_mu.append(mu)\n        break\n"),
        (MODELS, 'return {"recon":', 'mean_kl *= 0.9; return {"recon":')],
    test_train_and_eval_mode_take_turns: [
        (MODELS, "model.eval()\n", "model.train()\n"),
        (MODELS, "        model.train()\n", "")],
    test_active_is_a_variance_above_a_hundredth: [
        (MODELS, "mu.var(dim=0) > 0.01", "mu.std(dim=0) > 0.01"),
        (MODELS, "mu.var(dim=0) > 0.01", "mu.var(dim=0) > 0.02")],
    test_training_step: [
        (MODELS, "optimizer.zero_grad()", "pass"),
        (MODELS, "total_steps=steps", "total_steps=steps + 1")],
    test_images_that_the_loss_cannot_take_are_refused: [
        (MODELS, "not (images.min() >= 0 and images.max() <= 1)", "False")],
    test_main_tests_saves_and_then_draws: [
        (MODELS, "test(model, dataset.test_images", "test(model, dataset.val_images")],
    test_warmup_goes_from_0_to_1_over_the_stated_share_of_all_steps: [
        ([conv_vae, cvae], "min(1.0, progress / warmup)", "progress / warmup"),
        ([conv_vae, cvae], "progress = step / steps", "progress = epoch / epochs")],
    test_beta_weighs_the_gradient_of_the_kl: [
        ([beta_vae], "recon + beta * kl", "recon + kl")],
    test_correlation_is_that_of_numpy_without_its_sign: [
        ([beta_vae], ".abs().nan_to_num()", ".nan_to_num()")],
    test_attributes_of_a_drawn_rectangle: [
        ([beta_vae], "x[:, :14].sum((1, 2))", "x[:, 14:].sum((1, 2))")],
    test_gap_is_one_for_latents_of_their_own_and_zero_for_shared_ones: [
        ([beta_vae], "- ordered[1])", "- ordered[-1])")],
    test_random_axes_are_rotations_of_latents_of_equal_spread_and_differ: [
        ([beta_vae], "torch.linalg.qr(gaussian).Q", "gaussian"),
        ([beta_vae], "scaled = mu / mu.std(dim=0)", "scaled = mu")],
    test_analysis_orders_active_latents_by_their_kl: [
        ([beta_vae], " if active[d]]", "]")],
    test_the_map_shows_each_place_where_it_is: [
        ([vae], "in middles.flip(0):", "in middles:")],
    test_cvae_gives_each_label_its_own_input: [
        ([cvae], "one_hot(y, 10).to(z.dtype)", "one_hot((y + 1) % 10, 10).to(z.dtype)"),
        ([cvae], "torch.cat([z, label], dim=1)", "torch.cat([z, 0 * label], dim=1)"),
        ([cvae], "torch.cat([patches, planes]", "torch.cat([patches, 0 * planes]")],
    test_split_is_stratified_disjoint_and_stable: [
        ([data], "np.setdiff1d(np.arange(len(labels)), val)", "np.arange(len(labels))")],
    test_sample_is_balanced_raw_and_small: [
        ([data], "/ np.float32(255)", "/ np.float32(256)"),
        ([data], "/ np.float32(255)", "/ np.float32(255) - np.float32(0.286)")],
    test_normalisation_is_inside_and_applied_once: [
        ([classifier], "(images - self.mean) /", "(images - 2 * self.mean) /"),
        ([classifier], "self.stem((images - self.mean) / self.std)", "self.stem(images)")],
    test_the_pretrained_classifier: [
        ([classifier], "resnet.eval()", "resnet.train()")],
    test_the_classifier_keeps_its_best_epoch: [
        ([classifier], "if accuracy > best_accuracy:", "if True:")],
    test_fid_agrees_with_the_symmetric_form: [
        ([evaluate], "/ (len(a) - 1)", "/ len(a)"),
        ([evaluate], "cov_a @ cov_b", "(cov_a + 1e-3 * torch.eye(len(cov_a))) @ cov_b")],
    test_fid_of_equal_sets_is_0_and_of_a_shift_its_square: [
        ([evaluate], "(mean_a - mean_b).pow(2).sum() + of_covariances", "of_covariances")],
    test_fid_of_scaled_axes: [
        ([evaluate], "2 * eigenvalues.sqrt().sum()", "2 * eigenvalues.sum()")],
    test_importance_weighted_bounds_close_in_on_the_likelihood: [
        ([evaluate], "logsumexp(dim=0) - math.log(draws)", "logsumexp(dim=0)"),
        ([evaluate], "-recon + log_prior - log_q", "-recon")],
    test_log_joint_is_that_of_torch_distributions: [
        ([evaluate], "weight.log() - 0.5 * u", "-0.5 * u")],
    test_no_iteration_of_em_lowers_the_likelihood: [
        ([evaluate], "centred = z - means[k]", "centred = z - z.mean(0)")],
    test_the_ex_post_prior_of_a_cvae_is_one_gaussian_a_class: [
        ([evaluate], "real_z[dataset.train_labels == c]", "real_z")],
    test_no_measurement_changes_another: [
        ([evaluate], "    torch.manual_seed(3)\n", "")],
    test_measure_of_a_decoder_that_draws_the_class_asked_for: [
        ([evaluate], "randint(1, 10,", "randint(0, 1,")],
    test_evaluate_names_what_another_version_of_a_script_trained: [
        ([evaluate], 'meta.get("code") != code', "False")],
    test_noise_is_the_pooled_spread_of_a_difference: [
        ([evaluate], "mean(variances)) if variances else None", "mean([0.0, *variances]))")],
    test_seeds_are_averaged_with_n_minus_1: [
        ([evaluate], '"std": stdev(values)', '"std": stdev(values) * 0.9')],
}


def test_every_mistake_still_finds_its_line():
    for mistakes in MISTAKES.values():
        for scripts, text, mistake in mistakes:
            assert all(text in inspect.getsource(script) for script in scripts), text
            assert text != mistake


def plant_mistakes():
    """Plant each mistake in a copy of the sources, where its test must fail by an assertion.
    Returns the number of mistakes that lived."""
    lived = 0
    for test, mistakes in MISTAKES.items():
        for scripts, text, mistake in mistakes:
            with tempfile.TemporaryDirectory() as folder:
                for path in HERE.glob("*.py"):
                    shutil.copy(path, folder)
                shutil.copytree(HERE / "assets", Path(folder, "assets"))
                for script in scripts:
                    source = inspect.getsource(script).replace(text, mistake)
                    Path(folder, f"{script.__name__}.py").write_text(source, encoding="utf-8")
                output = subprocess.run(
                    [sys.executable, "-m", "pytest", "-qx", "--tb=line", "-p", "no:cacheprovider",
                     f"test_all.py::{test.__name__}"], cwd=folder, capture_output=True, text=True)
            caught = re.search("AssertionError|assert |Failed: DID NOT RAISE", output.stdout)
            if not caught:
                lived += 1
            print("caught" if caught else "LIVED ", repr(mistake), "by", test.__name__, flush=True)
    print(f"{lived} mistakes lived")
    return lived


if __name__ == "__main__":
    if sys.argv[1:] != ["--mutants"]:
        sys.exit("python -m pytest test_all.py runs the tests; python test_all.py --mutants shows"
                 " that they catch mistakes")
    sys.exit(min(1, plant_mistakes()))
