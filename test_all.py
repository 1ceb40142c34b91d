"""Every test of the study: python -m pytest test_all.py (offline, on real images, 3 minutes).

Each test states a fact and holds it against something that is not this code: a closed form,
torch.distributions, numpy, a hand-made file, or another process. The order is that of the lesson:
loss, training, sections, metrics, judge, data, scripts, what users do wrong. At the end stands a
list of mistakes, and `python test_all.py --mutants` shows that the tests catch each of them.
"""
import contextlib
import copy
import gzip
import hashlib
import http.server
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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


@pytest.fixture
def tiny(sample):
    """300 / 100 / 100 real images of all classes."""
    pick = torch.arange(300) * 16 % 5000
    return sample._replace(train_images=sample.train_images[pick],
                           train_labels=sample.train_labels[pick],
                           val_images=sample.val_images[::10], val_labels=sample.val_labels[::10],
                           test_images=sample.test_images[::20],
                           test_labels=sample.test_labels[::20])


def given(module, labels):
    """The further argument of a model's methods: the labels, for the CVAE."""
    return (labels,) if module is cvae else ()


def fit(module, model, dataset, epochs, batch_size, lr, **extra):
    """module.train on a FashionMNIST, whichever arguments it takes."""
    if module is beta_vae:
        extra.setdefault("beta", 1)
    return module.train(model, dataset.train_images, *given(module, dataset.train_labels),
                        dataset.val_images, *given(module, dataset.val_labels),
                        epochs, batch_size, lr, **extra)


def save(path, **contents):
    """Write a checkpoint with everything that each checkpoint has, and these contents."""
    usual = {"script": "vae", "config": {"latent_dim": 2}, "source": "sample", "seed": 0,
             "metrics": {}, "state_dict": {}}
    data.save_checkpoint(path, **usual | contents)


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
def test_kl_is_that_of_torch_distributions(module):
    torch.manual_seed(0)
    mu, logvar = torch.randn(7, 5), torch.randn(7, 5)
    _, kl = module.elbo_terms(torch.zeros(7, 1, 28, 28), torch.zeros(7, 1, 28, 28), mu, logvar)
    assert torch.allclose(kl, kl_oracle(mu, logvar), rtol=1e-5)


@each_model
def test_recon_is_minus_log_bernoulli_on_binary_images(module, sample):
    torch.manual_seed(0)
    x, logits = sample.test_images[:20].round(), torch.randn(20, 1, 28, 28)
    recon, _ = module.elbo_terms(logits, x, torch.zeros(20, 2), torch.zeros(20, 2))
    assert torch.allclose(recon, recon_oracle(logits, x), rtol=1e-5)


@each_model
def test_recon_of_the_perfect_decoder_is_the_floor_and_nothing_is_below(module, sample):
    x, zero = sample.test_images[:100], torch.zeros(100, 2)
    perfect, _ = module.elbo_terms(x.clamp(1e-6, 1 - 1e-6).logit(), x, zero, zero)
    assert torch.allclose(perfect, data.pixel_entropy(x), atol=0.05)
    for seed in range(5):
        torch.manual_seed(seed)
        other, _ = module.elbo_terms(torch.randn_like(x) * 3, x, zero, zero)
        assert (other > data.pixel_entropy(x)).all()


@each_model
def test_reparameterized_z_has_the_right_mean_std_and_gradient(module):
    torch.manual_seed(0)
    mu = torch.tensor([[1.5, -2.0]]).repeat(200_000, 1).requires_grad_()
    logvar = torch.tensor([[0.0, math.log(0.25)]]).repeat(200_000, 1).requires_grad_()
    z = MODELS[module](2).reparameterize(mu, logvar)
    assert torch.allclose(z.mean(0), torch.tensor([1.5, -2.0]), atol=0.02)
    assert torch.allclose(z.std(0), torch.tensor([1.0, 0.5]), atol=0.02)
    # d/dmu E[z^2] = 2 mu and d/dlogvar E[z^2] = sigma^2
    z.pow(2).sum().backward()
    assert torch.allclose(mu.grad.mean(0), torch.tensor([3.0, -4.0]), atol=0.03)
    assert torch.allclose(logvar.grad.mean(0), torch.tensor([1.0, 0.25]), atol=0.03)


@five_seeds
def test_the_reparameterized_gradient_has_the_mean_of_the_score_function_and_less_variance(seed):
    """d/dmu E[(z - 3)^2] = 2 (mu - 3), by two estimators."""
    torch.manual_seed(seed)
    mu = torch.full((100_000, 1), 1.0, requires_grad=True)
    logvar = torch.zeros(100_000, 1)
    z = vae.VAE(1).reparameterize(mu, logvar)
    through_z, = torch.autograd.grad((z - 3).pow(2).sum(), mu)
    score = (z - 3).detach().pow(2) * (z - mu).detach()     # f(z) d log q(z) / d mu, sigma = 1
    assert through_z.mean().item() == pytest.approx(-4, abs=0.05)
    assert score.mean().item() == pytest.approx(-4, abs=0.2)
    assert through_z.var() < 0.2 * score.var()


@each_model
@pytest.mark.parametrize("latent_dim", [1, 20])
def test_shapes(module, latent_dim, sample):
    model = MODELS[module](latent_dim)
    x, y = sample.test_images[:6], given(module, sample.test_labels[:6])
    logits, mu, logvar = model(x, *y)
    assert logits.shape == x.shape
    assert mu.shape == logvar.shape == (6, latent_dim)
    assert model.decode(torch.zeros(6, latent_dim), *y).shape == x.shape
    recon, kl = module.elbo_terms(logits, x, mu, logvar)
    assert recon.shape == kl.shape == (6,)


def test_pixel_entropy_is_bernoulli_entropy(sample):
    x = sample.test_images[:50]
    expected = torch.distributions.Bernoulli(x.flatten(1)).entropy().nan_to_num().sum(1)
    assert torch.allclose(data.pixel_entropy(x), expected, rtol=1e-4)
    assert data.pixel_entropy(x.round()).abs().max() == 0


# ================================================================ 2. training and testing

@each_model
def test_a_training_step_follows_the_gradient_of_this_batch_alone(module, tiny, monkeypatch,
                                                                  capsys):
    """Plain gradient descent in place of Adam, once by the script and once by hand."""
    class Constant:
        def __init__(self, optimizer, lr, total_steps):
            pass

        def step(self):
            pass

    def sgd(parameters, lr, **_):
        return torch.optim.SGD(parameters, lr)
    monkeypatch.setattr(torch.optim, "Adam", sgd)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", Constant)
    torch.manual_seed(0)
    trained = MODELS[module](4)
    expected = copy.deepcopy(trained)
    extra = {vae: {}, beta_vae: {"beta": 3}}.get(module, {"warmup_epochs": 0.5})
    torch.manual_seed(1)
    fit(module, trained, tiny, 1, 50, 1e-3, **extra)
    torch.manual_seed(1)
    for step, batch in enumerate(torch.randperm(300).split(50)):
        x, y = tiny.train_images[batch], given(module, tiny.train_labels[batch])
        mu, logvar = expected.encode(x, *y)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        weight = {vae: 1, beta_vae: 3}.get(module, min(1, step / 3))
        loss = (recon_oracle(expected.decode(z, *y), x) + weight * kl_oracle(mu, logvar)).mean()
        for parameter, slope in zip(expected.parameters(),
                                    torch.autograd.grad(loss, list(expected.parameters()))):
            parameter.data -= 1e-3 * slope
    for p, q in zip(trained.parameters(), expected.parameters()):
        assert torch.allclose(p, q, atol=2e-5)


@each_model
def test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight(module, sample):
    torch.manual_seed(0)
    model, (x, y) = MODELS[module](8), (sample.test_images[:250], sample.test_labels[:250])
    torch.manual_seed(5)
    result = module.test(model, x, *given(module, y), batch_size=100)
    torch.manual_seed(5)
    recon, kl = [], []
    for part in range(0, 250, 100):
        b, c = x[part:part + 100], given(module, y[part:part + 100])
        mu, logvar = model.encode(b, *c)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        recon.append(recon_oracle(model.decode(z, *c), b))
        kl.append(kl_oracle(mu, logvar))
    assert result["recon"] == pytest.approx(torch.cat(recon).mean().item(), rel=1e-5)
    assert result["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5)
    assert result["total"] == result["recon"] + result["kl"]


@each_model
def test_test_loop_switches_dropout_off(module, sample):
    """No model here has a layer that differs in training and testing. A student may add one."""
    torch.manual_seed(0)
    model, x, y = MODELS[module](4), sample.test_images[:50], sample.test_labels[:50]
    totals = []
    for decoder in (model.decoder, torch.nn.Sequential(model.decoder, torch.nn.Dropout(0.9))):
        model.decoder = decoder
        model.train()
        torch.manual_seed(1)
        totals.append(module.test(model, x, *given(module, y))["total"])
    assert totals[0] == totals[1]


@each_model
def test_training_switches_dropout_on_again_after_each_validation(module, tiny, capsys):
    modes = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x
    model = MODELS[module](4)
    model.decoder = torch.nn.Sequential(model.decoder, Spy())
    fit(module, model, tiny, 2, 150, 1e-3)
    assert modes == [True, True, False] * 2


@each_model
def test_same_seed_same_weights_other_seed_others(module, tiny, capsys):
    def weights(seed):
        torch.manual_seed(seed)
        model = MODELS[module](4)
        fit(module, model, tiny, 1, 100, 1e-3)
        return torch.cat([p.flatten() for p in model.parameters()])
    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def lesson_block(module):
    """The source of a script from its first class to the end of test()."""
    text = inspect.getsource(module)
    end = text.index('return {"recon": mean_recon')
    return text[text.index("\nclass "):text.index("\n", end)]


@each_model
def test_the_lesson_pastes_and_trains_on_any_tensor(module, capsys):
    """Nothing above it but the three imports; nothing of this project inside."""
    names = {}
    exec("import math, time, torch\n" + lesson_block(module), names)
    torch.manual_seed(0)
    images, labels = torch.rand(70, 1, 28, 28), torch.arange(70) % 10
    extra = {"beta": 2} if module is beta_vae else {}
    model = names[MODELS[module].__name__](latent_dim=3)
    history = names["train"](model, images, *given(module, labels), images, *given(module, labels),
                             epochs=3, batch_size=20, lr=1e-3, **extra)
    assert len(history) == 3 and history[-1]["recon"] < history[0]["recon"]
    total = names["test"](model, images, *given(module, labels))["total"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all("recon" in line and "KL" in line for line in printed)
    assert total == pytest.approx(history[-1]["val_recon"] + history[-1]["val_kl"], rel=0.01)


@each_model
@pytest.mark.parametrize("images", [torch.full((8, 1, 28, 28), 255.0), torch.randn(8, 1, 28, 28),
                                    torch.full((8, 1, 28, 28), math.nan)])
def test_pixels_outside_0_to_1_are_refused_before_the_training(module, images, tiny):
    for split in ("train", "val"):
        wrong = tiny._replace(**{f"{split}_images": images, f"{split}_labels": torch.arange(8)})
        with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
            fit(module, MODELS[module](2), wrong, 1, 4, 1e-3)


@each_model
def test_an_exploding_learning_rate_stops_with_epoch_and_step(module, tiny, capsys):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d+: choose a lower learning"):
        fit(module, MODELS[module](), tiny, 2, 10, 1e9)


@each_model
def test_script_prints_and_saves_the_test_of_the_test_images(module, tiny, tmp_path, capsys):
    flags = ["--betas", "1"] if module is beta_vae else []
    path, = module.main(["--epochs", "1", "--out", str(tmp_path), *flags], dataset=tiny)
    model, meta = module.load_model(path)
    torch.manual_seed(0)
    expected = module.test(model, tiny.test_images, *given(module, tiny.test_labels))["total"]
    assert meta["metrics"]["total"] == pytest.approx(expected, rel=1e-6)
    assert f"total {expected:.2f}" in capsys.readouterr().out


# ================================================================ 3. one claim a section

def test_a_short_training_beats_the_best_constant_image(sample, capsys):
    p = sample.train_images.mean(0).clamp(1e-4, 1 - 1e-4)  # the best one image for all
    constant = recon_oracle(p.logit().expand_as(sample.test_images), sample.test_images)
    torch.manual_seed(0)
    model = vae.VAE()
    fit(vae, model, sample, 6, 128, 2e-3)
    assert constant.mean() > 350  # so that "well below" means something
    assert vae.test(model, sample.test_images)["total"] < constant.mean() - 70


def test_a_decoder_that_ignores_z_ends_in_posterior_collapse(tiny, capsys):
    torch.manual_seed(0)
    model = vae.VAE(4)
    model.decoder[0].weight.requires_grad_(False).zero_()
    fit(vae, model, tiny, 25, 20, 3e-3)
    assert vae.test(model, tiny.test_images)["kl"] < 0.05
    with torch.no_grad():
        assert not beta_vae.is_active(model.encode(tiny.test_images)[0]).any()


def test_the_map_shows_each_place_of_the_latent_space_where_it_is(tmp_path, sample, monkeypatch):
    """A decoder that draws z1 as brightness of the left half, z2 as that of the right one."""
    figures = []
    monkeypatch.setattr(data, "save_figure", lambda figure, path: figures.append(figure))
    model = vae.VAE(2)

    def decode(z):
        half = z.view(-1, 1, 1, 2).expand(-1, 1, 28, 2)
        return half.repeat_interleave(14, dim=3)
    monkeypatch.setattr(model, "decode", decode)
    vae.draw_map(model, sample, tmp_path / "map.png")
    left, right = figures[0].axes
    points = np.concatenate([c.get_offsets() for c in left.collections])
    assert len(points) == len(sample.test_images)
    canvas = np.asarray(right.images[0].get_array())        # 16 x 16 images of 30 x 30 pixels
    assert (np.diff(canvas[15, 8::30]) > 0).all()           # z1 rises to the right ...
    assert (np.diff(canvas[15::30, 22]) < 0).all()          # ... and z2 upwards
    assert canvas[15, 8] == pytest.approx(1 / (1 + math.exp(1.8808)), abs=1e-3)


def test_the_idea_is_drawn_where_the_posterior_is(tmp_path, sample, monkeypatch):
    """Sigma is 0.1 and 0.2; the decoder draws z1 as the brightness of its image."""
    figures = []
    monkeypatch.setattr(data, "save_figure", lambda figure, path: figures.append(figure))
    model, mu = vae.VAE(2), torch.tensor([0.5, -1.0])
    monkeypatch.setattr(model, "encode", lambda x: (
        mu.repeat(len(x), 1), torch.tensor([0.1, 0.2]).pow(2).log().repeat(len(x), 1)))
    monkeypatch.setattr(model, "decode", lambda z: z[:, :1, None, None].expand(-1, 1, 28, 28))
    torch.manual_seed(0)
    vae.draw_idea(model, sample, tmp_path / "idea.png")
    image, space, decoded = figures[0].axes
    ellipse, centre, draws = (np.stack(line.get_data()) for line in space.lines)    # (2, points)
    assert np.allclose(ellipse.max(1) - ellipse.min(1), [0.4, 0.8], atol=0.01)      # 4 sigma
    assert np.allclose(centre[:, 0], mu) and draws.shape == (2, 3)
    canvas = np.asarray(decoded.images[0].get_array())
    assert np.allclose(canvas[15::30, 15], 1 / (1 + np.exp(-draws[0])), atol=1e-6)
    assert np.allclose(image.images[0].get_array()[1:29, 1:29], sample.test_images[0, 0])


@warmed_up
def test_warmup_goes_from_0_to_1_over_the_stated_steps_and_stays(module):
    weights = [module.kl_weight(step, 4) for step in range(7)]
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert module.kl_weight(0, 0) == 1


@warmed_up
def test_warmup_counts_training_steps_only(module, tiny, capsys):
    """Printed is the weight at the last step of an epoch; an epoch has three steps here."""
    for epochs, warmup_epochs, weights in ((3, 2, ["0.33", "0.83", "1.00"]),    # 2/6, 5/6, 1
                                           (1, 50, ["0.67"])):  # not longer than the training
        fit(module, MODELS[module](2), tiny, epochs, 100, 1e-3, warmup_epochs=warmup_epochs)
        assert re.findall(r"KL weight ([\d.]+)", capsys.readouterr().out) == weights


def test_warmup_lets_the_kl_grow_first(tiny, capsys):
    kl = {}
    for warmup_epochs in (0, 6):
        torch.manual_seed(0)
        history = fit(conv_vae, conv_vae.ConvVAE(8), tiny, 6, 10, 1e-3, warmup_epochs=warmup_epochs)
        kl[warmup_epochs] = history[1]["kl"]
    assert kl[6] > 1.3 * kl[0]


def test_beta_1_is_the_plain_vae_to_the_last_bit(tiny, capsys):
    trained = []
    for model, module in ((vae.VAE(4), vae), (beta_vae.BetaVAE(4), beta_vae)):
        torch.manual_seed(0)
        model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        fit(module, model, tiny, 2, 100, 1e-3)
        trained.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


def test_beta_weighs_the_gradient_of_the_kl(tiny, capsys):
    ends = {}
    for beta in (0, 50):
        torch.manual_seed(0)
        model = beta_vae.BetaVAE(4)
        fit(beta_vae, model, tiny, 8, 50, 2e-3, beta=beta)
        ends[beta] = beta_vae.test(model, tiny.test_images)
    assert ends[50]["kl"] < 0.2 * ends[0]["kl"]
    assert ends[50]["recon"] > ends[0]["recon"]


WILD = {  # the loss as written -> its beta for 784 pixels, z latents, a batch of b
    "sums over pixels and latents": (lambda r, k: r.sum((1, 2, 3)).mean() + k.sum(1).mean(), 1),
    "BCE averaged over pixels": (lambda r, k: r.mean() + k.sum(1).mean(), 784),
    "both averaged": (lambda r, k: r.mean() + k.mean(), 784 / 10),
    "mean BCE, KL summed over the batch": (lambda r, k: r.mean() + k.sum(), 784 * 16),
    "means, KL times 0.00025": (lambda r, k: r.mean() + 0.00025 * k.sum(1).mean(),
                                784 * 0.00025),
}


@pytest.mark.parametrize("name", WILD)
def test_what_is_my_beta(name, sample):
    """Its gradient is a grad recon + b grad KL and nothing besides; then its beta is b / a."""
    loss, beta = WILD[name]
    torch.manual_seed(0)
    model, x = beta_vae.BetaVAE(10).double(), sample.train_images[:16].double()
    mu, logvar = model.encode(x)
    logits = model.decode(model.reparameterize(mu, logvar))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1)  # (16, 10)

    def gradient(value):
        parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True,
                                    materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])
    terms = beta_vae.elbo_terms(logits, x, mu, logvar)
    basis = torch.stack([gradient(term.mean()) for term in terms], dim=1)
    wild = gradient(loss(bce, kl))
    a, b = torch.linalg.lstsq(basis, wild[:, None]).solution[:, 0]
    assert (b / a).item() == pytest.approx(beta)
    assert (a * basis[:, 0] + b * basis[:, 1] - wild).norm() < 1e-9 * wild.norm()


def test_cvae_gives_each_label_its_own_input(sample):
    model, x = cvae.CVAE(4).eval(), sample.test_images[:1].expand(10, -1, -1, -1)
    with torch.no_grad():
        for c in range(10):
            for layer, label in ((model.decoder[0], 4 + c), (model.encoder[0], 16 + c)):
                layer.weight.zero_()
                layer.weight[:, label] = 1.0            # all that this layer can see is class c
            for found in (model.decode(torch.randn(10, 4), torch.arange(10)).flatten(1),
                          model.encode(x, torch.arange(10))[0]):
                others = found[torch.arange(10) != c]
                assert torch.allclose(others, others[:1], atol=1e-5)
                assert not torch.allclose(found[c], others[0], atol=1e-5)


def test_what_the_label_tells_z_need_not_tell(tiny, capsys):
    """Ten images, one a class: a VAE must tell them apart in z, a CVAE is told which one it is."""
    first, _ = data.one_of_each_class(tiny.test_labels)
    one = tiny.test_images[first]
    ten = tiny._replace(train_images=one.repeat(15, 1, 1, 1),
                        train_labels=torch.arange(10).repeat(15))
    ends = {}
    for module in (conv_vae, cvae):
        torch.manual_seed(0)
        model = MODELS[module](4, channels=16)
        fit(module, model, ten, 80, 30, 3e-3, warmup_epochs=0)
        ends[module] = module.test(model, one, *given(module, torch.arange(10)))
    assert ends[conv_vae]["kl"] > math.log(10) and ends[cvae]["kl"] < 0.6 * ends[conv_vae]["kl"]
    assert ends[cvae]["recon"] < ends[conv_vae]["recon"] + 5


# ---------------------------------------------------------------- what the latents learned

def test_a_latent_is_active_if_its_variance_is_above_a_hundredth():
    torch.manual_seed(0)
    z = torch.randn(1000, 4)
    z = (z - z.mean(0)) / z.std(0) * torch.tensor([1, 0.0099, 0.0101, 0]).sqrt()
    assert beta_vae.is_active(z).tolist() == [True, False, True, False]


def test_conv_vae_prints_how_many_latents_are_active(tiny, tmp_path, capsys):
    flags = ["--epochs", "1", "--batch-size", "20", "--out", str(tmp_path)]
    path, = conv_vae.main(flags, dataset=tiny)
    mu, _ = conv_vae.load_model(path)[0].encode(tiny.test_images)
    active = sum(variance > 0.01 for variance in mu.var(0).tolist())
    assert f"active latents: {active} of 32\n" in capsys.readouterr().out and 0 < active < 32


def test_analysis_orders_active_latents_by_their_kl_which_sum_to_the_kl(sample):
    torch.manual_seed(0)
    model = beta_vae.BetaVAE(6).eval()
    with torch.no_grad():
        model.encoder[-1].weight[:6] *= 30 * torch.tensor([1, 0, 9, 3, 0, 27.0])[:, None]
    found = beta_vae.analyse(model, sample.test_images)
    assert found.latents == [5, 2, 3, 0] and found.active == 4
    assert found.rho.shape == (4, 6) and found.gap == beta_vae.gap(found.rho)
    mu, logvar = model.encode(sample.test_images)
    assert found.kl.sum().item() == pytest.approx(kl_oracle(mu, logvar).mean().item(), rel=1e-4)
    ink = sample.test_images.sum((1, 2, 3)).argsort().argsort().double()
    z5 = mu[:, 5].argsort().argsort().double()              # no two are equal: plain ranks
    expected = abs(np.corrcoef(z5.numpy(), ink.numpy())[0, 1])
    assert found.rho[0, 0].item() == pytest.approx(expected, abs=2e-3)


def test_beaten_is_the_share_of_the_null_that_is_smaller(sample, monkeypatch):
    monkeypatch.setattr(beta_vae, "rotated_gaps", lambda *_: torch.tensor([-1.0, -1.0, -1.0, 2.0]))
    found = beta_vae.analyse(beta_vae.BetaVAE(2), sample.test_images)
    assert found.beaten == 0.75 and found.null == -0.25


def test_analysis_and_pictures_of_a_collapsed_model(sample, tmp_path, capsys):
    model = beta_vae.BetaVAE(3).eval()
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
    found = beta_vae.analyse(model, sample.test_images)
    assert found.latents == [] and found.gap == found.null == found.beaten == 0
    sweep = {1.0: (model, found, {"kl": 0.0, "excess": 50.0})}
    beta_vae.draw_comparison(sweep, sample.test_images[:1], tmp_path / "x")
    assert len(list(tmp_path.glob("x-*.png"))) == 3


def test_attributes_of_a_drawn_rectangle():
    x = torch.zeros(1, 1, 28, 28)
    x[0, 0, 8:18, 4:10] = 1.0                            # 10 rows, 6 columns, left of the middle
    found = dict(zip(beta_vae.ATTRIBUTES, beta_vae.attributes(x)[0].tolist()))
    assert found["ink"] == 60 and (found["width"], found["height"]) == (6, 10)
    assert found["centre"] == pytest.approx(12.5) and found["top"] == pytest.approx(0.6)
    assert found["symmetry"] == 0                        # its mirror image touches it nowhere
    both = dict(zip(beta_vae.ATTRIBUTES, beta_vae.attributes(torch.maximum(x, x.flip(3)))[0]))
    assert both["symmetry"] == 1 and both["width"] == 20 and both["height"] == 10
    x[0, 0, 27, 27] = 0.2                                # faint: more ink, but the same box
    assert beta_vae.attributes(x)[0, :3].tolist() == pytest.approx([60.2, 6, 10])
    ink, width, height = beta_vae.attributes(torch.zeros(1, 1, 28, 28))[0, :3].tolist()
    assert width == height == 0 and ink < 1e-5           # and a black image has none of them


def test_rank_correlation_is_pearson_of_the_ranks_with_ties_shared():
    a = torch.tensor([[3.0], [1.0], [3.0], [7.0], [5.0]])                   # ranks 2.5 1 2.5 5 4
    b = torch.tensor([[0.1, 1.0], [0.4, 1.0], [0.3, 2.0], [0.9, 2.0], [0.5, 9.0]])
    ranks_a, ranks_b = [2.5, 1, 2.5, 5, 4], ([1, 3, 2, 5, 4], [1.5, 1.5, 3.5, 3.5, 5])
    expected = [abs(np.corrcoef(ranks_a, ranks)[0, 1]) for ranks in ranks_b]
    assert beta_vae.rank_correlation(a, b)[0].tolist() == pytest.approx(expected)
    z = torch.randn(50, 2)
    assert beta_vae.rank_correlation(z, -z.exp()).diagonal().tolist() == pytest.approx([1, 1])
    assert beta_vae.rank_correlation(torch.ones(9, 1), torch.rand(9, 2)).tolist() == [[0, 0]]


def test_gap_is_one_where_each_attribute_has_its_latent_and_zero_where_two_share_it():
    assert beta_vae.gap(torch.eye(4)) == 1
    assert beta_vae.gap(torch.ones(4, 4)) == 0
    assert beta_vae.gap(torch.tensor([[0.9, 0.2], [0.4, 0.6]])) == pytest.approx((0.5 + 0.4) / 2)
    assert beta_vae.gap(torch.tensor([[0.1], [0.9], [0.5]])) == pytest.approx(0.4)   # to the next
    assert beta_vae.gap(torch.ones(1, 3)) == 1 and beta_vae.gap(torch.ones(0, 3)) == 0


@five_seeds
def test_planted_axes_exceed_every_rotation_and_arbitrary_axes_do_not(seed):
    torch.manual_seed(seed)
    z = torch.randn(2000, 4)
    ordered = beta_vae.gap(beta_vae.rank_correlation(z, z.exp()))           # attribute k = exp(z_k)
    assert ordered > 0.9 and beta_vae.rotated_gaps(z, z.exp()).max() < 0.9 * ordered
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q     # by which the axes lose their meaning
    null = beta_vae.rotated_gaps(z @ rotation, z, rotations=100)
    turned = beta_vae.gap(beta_vae.rank_correlation(z @ rotation, z))
    assert null.min() <= turned <= null.max()


def test_the_null_only_rotates(monkeypatch):
    """Rotations keep all distances between codes, and each of them is another one."""
    torch.manual_seed(0)
    mu, seen = torch.randn(50, 4) * torch.tensor([1, 2, 3, 0.1]), []

    def record(codes, values):
        seen.append(codes)
        return torch.ones(4, 6)
    monkeypatch.setattr(beta_vae, "rank_correlation", record)
    beta_vae.rotated_gaps(mu, torch.randn(50, 6))
    assert len(seen) == 20 and not torch.allclose(seen[0], seen[1], atol=0.1)
    for codes in seen:
        assert torch.allclose(torch.pdist(codes), torch.pdist(mu), rtol=1e-3)


# ================================================================ 4. the metrics

def features(n, mean, cov, seed):
    return torch.from_numpy(np.random.RandomState(seed).multivariate_normal(mean, cov, n))


def test_fid_of_identical_sets_is_0_and_of_a_shift_its_square():
    a = features(500, np.zeros(6), np.diag([1, 2, 3, 4, 5, 6]), 0)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert evaluate.frechet_distance(a, a + shift) == pytest.approx(25)


def test_fid_of_scaled_axes_is_the_diagonal_closed_form():
    a = features(500, np.zeros(4), np.eye(4), 0)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly cov = I
    sigma = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    expected = ((1 - sigma) ** 2).sum().item()
    assert evaluate.frechet_distance(a, a * sigma) == pytest.approx(expected)


def test_fid_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric():
    rng = np.random.RandomState(1)
    a = features(400, rng.randn(8), np.cov(rng.randn(8, 50)), 2).float()
    b = features(300, rng.randn(8), np.cov(rng.randn(8, 50)), 3).float()
    m1, m2, s1, s2 = a.double().mean(0), b.double().mean(0), np.cov(a.T), np.cov(b.T)
    product = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()  # not symmetric: eigvals
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(s1) + np.trace(s2) - 2 * product
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert evaluate.frechet_distance(b, a) == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert evaluate.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, 1e-3)


def test_fid_survives_features_that_are_always_zero():
    a, b = torch.randn(50, 5).relu(), torch.randn(50, 5).relu()
    a[:, 0] = b[:, 0] = 0
    assert 0 <= evaluate.frechet_distance(a, b) < 1


def test_fid_refuses_fewer_images_than_features_and_nan():
    with pytest.raises(ValueError, match=r"\(5, 8\).*at least 9"):
        evaluate.frechet_distance(torch.randn(5, 8), torch.randn(50, 8))
    with pytest.raises(ValueError, match="finite"):
        evaluate.frechet_distance(torch.randn(50, 8), torch.full((50, 8), math.nan))


def test_controllability_is_a_share_in_all_and_in_the_worst_class():
    asked = torch.arange(40) % 10
    judged = torch.where((asked == 3) & (torch.arange(40) < 20), 4, asked)  # half of class 3
    assert evaluate.controllability(judged, asked) == (pytest.approx(0.95), 0.5)
    assert evaluate.controllability(asked, asked) == (1, 1)


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


def test_images_learned_by_heart_are_nearest_to_training_images():
    torch.manual_seed(0)
    train, unseen = torch.rand(400, 1, 28, 28), torch.rand(100, 1, 28, 28)
    new = torch.rand(500, 1, 28, 28)
    assert evaluate.memorised(new, train, unseen) == pytest.approx(0.8, abs=0.1)    # by chance
    assert evaluate.memorised(train[300:] + 0.01, train, unseen) == 1
    assert evaluate.memorised(unseen - 0.01, train, unseen) == 0


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_importance_weighted_bounds_are_ordered_and_close_in_on_the_true_likelihood(latent_dim,
                                                                                    sample):
    torch.manual_seed(3)
    model, x = vae.VAE(latent_dim, hidden=16), sample.test_images[:6]
    with torch.no_grad():  # log p(x) by quadrature over the latent space
        axis = torch.linspace(-8, 8, {1: 3201, 2: 129}[latent_dim])
        grid = torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim)
        log_prior = torch.distributions.Normal(0, 1).log_prob(grid).sum(1)
        log_cell = latent_dim * math.log(axis[1] - axis[0])
        logits = model.decode(grid)
        truth = torch.stack([(log_prior - vae.elbo_terms(logits, i.expand_as(logits), grid, grid)[0]
                              ).double().logsumexp(0) + log_cell for i in x[:, None]])
    bounds = evaluate.importance_weighted_bound(model, x, sample.test_labels[:6], draws=5000,
                                                counts=(1, 10, 100, 5000))
    assert bounds["iw_1"] > bounds["iw_10"] > bounds["iw_100"] > bounds["iw_5000"] - 1e-9
    gained = bounds["iw_1"] - bounds["iw_5000"]
    assert gained > 0.5  # the bound was loose enough for this to mean something
    assert bounds["iw_5000"] == pytest.approx(-truth.mean().item(), abs=0.05)
    # K = 1 is the negative ELBO, with the KL by Monte Carlo instead of in closed form
    elbo = np.array([vae.test(model, x)["total"] for _ in range(1000)])
    error = elbo.std() / 1000 ** 0.5
    assert bounds["iw_1"] == pytest.approx(elbo.mean(), abs=4 * error)
    assert 4 * error < 0.1 * gained


def test_log_joint_is_that_of_torch_distributions():
    torch.manual_seed(0)
    z, means, factors = torch.randn(9, 3), torch.randn(4, 3), torch.randn(4, 3, 3).tril()
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
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


@five_seeds
def test_no_iteration_of_em_lowers_the_likelihood(seed):
    torch.manual_seed(seed)
    z, _ = planted_mixture()
    found = []
    for iterations in (1, 2, 3, 5, 10, 20, 50, 100):
        torch.manual_seed(seed)                          # the same start every time
        mixture = evaluate.fit_gmm(z, 3, iterations, ridge=0)
        found.append(log_likelihood(z, mixture))
    assert found == sorted(found) and found[-1] > found[0] + 0.1


@five_seeds
def test_em_finds_a_planted_mixture(seed):
    """One start may end in a local optimum. The best of six finds the truth."""
    torch.manual_seed(seed)
    z, means = planted_mixture()
    fits = [evaluate.fit_gmm(z, 3, ridge=1e-6) for _ in range(6)]
    weights, found, factors = max(fits, key=lambda mixture: log_likelihood(z, mixture))
    order = weights.argsort()
    assert torch.allclose(weights[order], torch.tensor([1, 2, 3]).double() / 6, atol=0.02)
    assert torch.allclose(found[order].float(), means, atol=0.15)
    drawn = evaluate.sample_gmm(weights, found, factors, 50_000)
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
    for codes in (z, z[:, :1]):
        mixture = evaluate.fit_gmm(codes, 30, iterations=30)
        assert all(tensor.isfinite().all() for tensor in mixture)
        assert mixture[0].sum().item() == pytest.approx(1)
        assert evaluate.sample_gmm(*mixture, 7).shape == (7, codes.shape[1])


def test_the_ex_post_prior_of_a_cvae_is_one_gaussian_for_each_class(sample, monkeypatch):
    """Codes that lie around the number of their class are drawn again around that number."""
    def encode(model, images, labels):
        return labels[:, None].expand(-1, 2).float(), torch.full((len(labels), 2), -9.0)
    monkeypatch.setattr(evaluate, "encode", encode)
    asked = torch.arange(50) % 10
    z = evaluate.sample_ex_post_prior(cvae.CVAE(2), asked, sample)
    assert torch.allclose(z, asked[:, None].expand(50, 2).float(), atol=0.3)
    z = evaluate.sample_ex_post_prior(vae.VAE(2), torch.arange(2000) % 10, sample)
    assert z.mean().item() == pytest.approx(4.5, abs=0.5)       # of all classes, in no order
    assert (z[:, 0] - torch.arange(2000) % 10).abs().mean() > 1


@each_model
def test_codes_and_images_of_a_model_are_those_of_its_own_methods(module, sample):
    model, x, y = MODELS[module](3).eval(), sample.test_images[:9], sample.test_labels[:9]
    mu, logvar = model.encode(x, *given(module, y))
    assert torch.equal(torch.stack(evaluate.encode(model, x, y)), torch.stack([mu, logvar]))
    assert torch.equal(evaluate.decode(model, mu, y), model.decode(mu, *given(module, y)))


def test_judged_images_tell_fid_control_and_diversity(judge, sample):
    model, _ = judge
    images, labels = sample.test_images[::2], sample.test_labels[::2]
    real = evaluate.Real(images, labels, model, *classifier.look(model, images))
    logits = images.double().logit()                     # infinite for 0 and 1, which is right
    same = evaluate.judge_images(logits.float(), labels, real, "x")
    assert same["fid_x"] == pytest.approx(0, abs=1e-4)
    assert same["diversity_x"] == pytest.approx(1, abs=1e-3)
    accuracy = (real.judged == labels).double().mean().item()
    assert same["control_x"] == pytest.approx(accuracy, abs=2e-3)
    assert 0.5 < same["worst_x"] < same["control_x"]
    noise = evaluate.judge_images(torch.randn_like(images), None, real, "x")
    assert list(noise) == ["fid_x"] and noise["fid_x"] > 5


def test_no_measurement_changes_the_figures_of_another(judge, sample, monkeypatch):
    """A step that uses up more random numbers than usual leaves all other figures as they are."""
    small = sample._replace(train_images=sample.train_images[::10],
                            train_labels=sample.train_labels[::10])
    images, labels = sample.test_images[::5], sample.test_labels[::5]
    real = evaluate.Real(images, labels, judge[0], *classifier.look(judge[0], images))
    torch.manual_seed(0)
    model, entry = cvae.CVAE(2).eval(), evaluate.STUDY[-1]
    meta = {"seed": 0, "metrics": {"seconds": 1.0}, "device": "cpu"}
    first = evaluate.measure(entry, model, meta, small, real)
    for name in ("judge_images", "sample_ex_post_prior", "memorised"):
        whole = getattr(evaluate, name)

        def wasteful(*args, whole=whole):
            found = whole(*args)
            torch.rand(7)
            return found
        monkeypatch.setattr(evaluate, name, wasteful)
    assert evaluate.measure(entry, model, meta, small, real) == first
    torch.manual_seed(0)                                 # and the total is that of the script
    assert first["total"] == cvae.test(model, images, labels)["total"]
    assert first["excess"] == pytest.approx(
        first["recon"] - data.pixel_entropy(images).mean().item())


def test_seeds_are_averaged_with_n_minus_1():
    rows = [{"model": "m", "params": 5, "kl": k, "control": None} for k in (1.0, 2.0, 6.0)]
    row = evaluate.average(rows)
    assert row["kl"] == {"mean": 3.0, "std": pytest.approx(np.std([1, 2, 6], ddof=1)), "n": 3}
    assert row["control"] is None and row["params"] == 5
    assert evaluate.average(rows[:1]) == rows[0]


def test_noise_is_the_pooled_spread_of_a_difference_and_unknown_for_one_seed():
    rows = [{"x": {"mean": 1.0, "std": std, "n": 3}} for std in (3.0, 4.0)]
    # Var(a - b) = s^2 + s^2 with s^2 = (9 + 16) / 2; and twice its root
    assert evaluate.noise(rows, "x") == pytest.approx(2 * math.sqrt(25))
    assert evaluate.noise([{"x": 1.0}, {"x": None}], "x") is None


def test_a_table_is_markdown_with_dashes_where_nothing_applies():
    rows = [{"model": "a", "params": 1234567, "kl": {"mean": 2.0, "std": 0.5, "n": 3},
             "control_x": {"mean": 0.25, "std": 0.125, "n": 3}},
            {"model": "bb", "params": 5, "kl": None, "control_x": None}]
    assert evaluate.table(rows, ["model", "params", "kl", "control_x"]) == [
        "| model | params    | kl        | control_x   |",
        "| ----- | --------- | --------- | ----------- |",
        "| a     | 1,234,567 | 2.00±0.50 | 25.0%±12.5% |",
        "| bb    | 5         | –         | –           |",
        "| noise | –         | 1.41      | 35.4%       |"]


# ================================================================ 5. the judge

@pytest.fixture(scope="session")
def judge():
    return classifier.load_pretrained()


def test_resnet18_has_18_weight_layers_and_the_known_size():
    model = classifier.FashionResNet18()
    layers = [name for name, m in model.named_modules()
              if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and "shortcut" not in name]
    assert len(layers) == 18
    widths, expected, inputs = (32, 64, 128, 256), 9 * 32 + 2 * 32, 32
    for w in widths:
        expected += 9 * inputs * w + 3 * 9 * w * w + 4 * 2 * w       # two blocks with their norms
        expected += (inputs * w + 2 * w) if inputs != w else 0       # projection shortcut
        inputs = w
    assert sum(p.numel() for p in model.parameters()) == expected + 256 * 10 + 10 == 2_797_034


def test_normalisation_is_inside_and_applied_once(sample):
    torch.manual_seed(0)
    bare, wrapped = classifier.FashionResNet18(0, 1), classifier.FashionResNet18(0.3, 0.4)
    wrapped.load_state_dict(bare.state_dict() | {"mean": torch.tensor(0.3),
                                                 "std": torch.tensor(0.4)})
    x = sample.test_images[:8]
    expected = bare.eval()((x - 0.3) / 0.4)
    assert torch.allclose(wrapped.eval()(x), expected, atol=1e-5)
    assert {"mean", "std"} <= set(wrapped.state_dict())


def test_pretrained_judge_is_accurate_small_and_batch_independent(judge, sample):
    model, meta = judge
    assert classifier.PRETRAINED.stat().st_size <= 6_000_000
    assert meta["source"] == "full" and meta["seed"] == 0
    assert model.mean.item() == pytest.approx(0.2860, abs=1e-3)
    assert model.std.item() == pytest.approx(0.3530, abs=1e-3)
    seen, judged = classifier.look(model, sample.test_images)
    assert (judged == sample.test_labels).float().mean() >= 0.93
    x = sample.test_images[:20]
    with torch.no_grad():
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-3)
        assert torch.allclose(model.features(x), seen[:20], atol=1e-3)


@pytest.mark.parametrize("images", [torch.full((2, 1, 28, 28), math.nan), torch.zeros(2, 784),
                                    torch.full((2, 1, 28, 28), -0.4), 2 * torch.ones(2, 1, 28, 28)])
def test_judge_refuses_what_is_not_a_raw_image(images):
    with pytest.raises(ValueError, match="images"):
        classifier.look(classifier.FashionResNet18(), images)


def test_augmentation_keeps_shape_range_and_varies(sample):
    x = sample.train_images[:64]
    a = classifier.augment(x, torch.Generator().manual_seed(0))
    assert a.shape == x.shape and 0 <= a.min() and a.max() <= 1
    b = classifier.augment(x, torch.Generator().manual_seed(1))
    assert not torch.equal(a, x) and not torch.equal(a, b)
    assert sum(torch.equal(a[i], x[i]) for i in range(64)) < 10


def test_classifier_trains_and_measures_the_reloaded_file(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda source: tiny)
    path, = classifier.main(["--epochs", "1", "--out", str(tmp_path)])
    model, meta = classifier.load_model(path)
    _, judged = classifier.look(model, tiny.test_images)
    expected = (judged == tiny.test_labels).double().mean()
    assert f"test accuracy {expected:.2%}" in capsys.readouterr().out
    assert meta["state_dict"]["head.weight"].dtype == torch.float16
    assert [p.name for p in tmp_path.glob("*.png")] == [f"{path.stem}-confusion.png"]


def test_classifier_keeps_the_weights_of_the_best_epoch(tiny, monkeypatch, capsys):
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


def test_a_classifier_of_other_shape_or_without_its_normalisation_is_refused(judge, tmp_path):
    state = judge[0].state_dict()
    nine = state | {"head.weight": state["head.weight"][:9], "head.bias": state["head.bias"][:9]}
    bare = {name: value for name, value in state.items() if name not in ("mean", "std")}
    for wrong, reason in ((nine, "missing none"), (bare, "missing mean, unknown none")):
        path = tmp_path / "judge.pt"
        save(path, script="classifier", state_dict=wrong)
        with pytest.raises(ValueError, match=f"judge.pt.*{reason}.*train the model again"):
            classifier.load_model(path)


# ================================================================ 6. the data

def idx(array):
    """IDX bytes of a uint8 array, written from the format's description."""
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I",
                                                                   *array.shape) + array.tobytes()


def test_idx_parser_reads_hand_made_bytes_zipped_or_not(monkeypatch):
    images = np.arange(2 * 28 * 28).astype(np.uint8).reshape(2, 28, 28)
    for array in (images, np.array([3, 9], np.uint8)):
        monkeypatch.setattr(data, "FILES", {"x": hashlib.sha256(idx(array)).hexdigest()})
        assert np.array_equal(data.unpack(gzip.compress(idx(array)), "x", "x.gz"), array)
        assert np.array_equal(data.unpack(idx(array), "x", "x"), array)


@pytest.mark.parametrize("raw", [b"", b"PK\3\4" * 9, gzip.compress(b"")[:-5],
                                 gzip.compress(idx(np.zeros(5, np.uint8))),
                                 gzip.compress(idx(np.zeros((60_000, 28, 28), np.uint8)), 1)])
def test_bytes_that_are_not_the_data_set_are_refused_whatever_their_shape(raw):
    with pytest.raises(ValueError, match="here.gz: damaged, or other data"):
        data.unpack(raw, "train-images-idx3-ubyte", "here.gz")


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
    sizes = {"train": 5000, "val": 1000, "test": 2000}
    for split, size in sizes.items():
        x, y = getattr(sample, f"{split}_images"), getattr(sample, f"{split}_labels")
        assert x.shape == (size, 1, 28, 28) and x.dtype == torch.float32
        assert x.min() == 0 and x.max() == 1
        assert y.dtype == torch.int64 and (y.bincount() == size // 10).all()
    assert data.SAMPLE.stat().st_size <= 4_000_000


@pytest.fixture(scope="session")
def full():
    for folder in data.FOLDERS:
        if all(data.find_file(folder, name) for name in data.FILES):
            return folder
    pytest.skip("the full data set is not here (apt install dataset-fashion-mnist)")


def test_sample_is_the_first_images_of_each_class_of_the_full_set(full, sample):
    raw = [data.unpack(data.find_file(full, n).read_bytes(), n, n) for n in data.FILES]

    def first(labels, start, stop):
        return np.sort(np.concatenate([np.flatnonzero(labels == c)[start:stop] for c in range(10)]))

    for x, y, rows, images, labels in (
            (*raw[:2], first(raw[1], 0, 500), sample.train_images, sample.train_labels),
            (*raw[:2], first(raw[1], 500, 600), sample.val_images, sample.val_labels),
            (*raw[2:], first(raw[3], 0, 200), sample.test_images, sample.test_labels)):
        assert np.array_equal(x[rows], (images[:, 0] * 255).round().numpy().astype(np.uint8))
        assert np.array_equal(y[rows], labels.numpy())


def test_full_set_loads_with_the_known_floor(full):
    loaded = data.load("full")
    assert [len(t) for t in loaded[:6]] == [55_000] * 2 + [5_000] * 2 + [10_000] * 2
    assert (loaded.val_labels.bincount() == 500).all()
    assert data.pixel_entropy(loaded.test_images).mean().item() == pytest.approx(189.86, abs=0.005)


@pytest.fixture
def small_files(monkeypatch, tmp_path):
    """The four files in miniature, with their own checksums; the working folder is empty."""
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(10), 510).astype(np.uint8)
    arrays = [rng.randint(0, 256, (5100, 28, 28)).astype(np.uint8), labels,
              rng.randint(0, 256, (20, 28, 28)).astype(np.uint8), labels[:20]]
    raw = {name: idx(array) for name, array in zip(data.FILES, arrays)}
    monkeypatch.setattr(data, "FILES", {n: hashlib.sha256(b).hexdigest() for n, b in raw.items()})
    monkeypatch.setattr(data, "FOLDERS", (Path("fashion-mnist"), Path("nowhere")))
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return {name: gzip.compress(content, 1) for name, content in raw.items()}


@pytest.fixture
def server():
    """A web server on this machine: server(handler(path) -> (status, body)) -> its address."""
    running = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, body, *length = answer(self.path.strip("/"))
                with contextlib.suppress(ConnectionError):  # who stalled too long is gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(length[0] if length else len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/"

    yield start
    for one in running:
        one.shutdown()


def test_download_goes_from_bad_mirrors_to_a_good_one(monkeypatch, small_files, server):
    monkeypatch.setattr(data, "MIRRORS", (
        server(lambda path: (404, b"gone")),
        server(lambda path: (200, gzip.compress(b"wrong bytes"))),
        server(lambda path: (200, small_files[path[:-3]][:99], len(small_files[path[:-3]]))),
        server(lambda path: (200, small_files[path[:-3]]))))
    loaded = data.load("full")
    assert [len(t) for t in loaded[:6]] == [100] * 2 + [5000] * 2 + [20] * 2
    files = sorted(path.name for path in Path("fashion-mnist").iterdir())
    assert files == sorted(f"{name}.gz" for name in small_files)
    monkeypatch.setattr(data, "MIRRORS", ())  # the second time needs no network
    assert data.load("auto").source == "full"


@pytest.mark.parametrize("exists", [True, False])
def test_download_goes_into_the_empty_folder_that_was_chosen(monkeypatch, small_files, server,
                                                             exists):
    monkeypatch.setenv("FASHION_MNIST_DIR", "chosen")
    if exists:
        Path("chosen").mkdir()
    monkeypatch.setattr(data, "MIRRORS", (server(lambda path: (200, small_files[path[:-3]])),))
    assert data.load("full").source == "full"
    assert len(list(Path("chosen").iterdir())) == 4 and not Path("fashion-mnist").exists()


@pytest.mark.parametrize("place", ["fashion-mnist", "chosen", "~/chosen"])
def test_unzipped_files_are_as_good_as_zipped_ones(monkeypatch, small_files, place):
    monkeypatch.setenv("HOME", os.getcwd())
    if place != "fashion-mnist":
        monkeypatch.setenv("FASHION_MNIST_DIR", place)
    folder = Path(place).expanduser()
    folder.mkdir()
    for name, content in small_files.items():
        (folder / name).write_bytes(gzip.decompress(content))
    monkeypatch.setattr(data, "MIRRORS", ())
    assert data.load("auto").source == "full"


def test_a_mirror_that_stalls_is_given_up(monkeypatch, small_files, server):
    release, real = threading.Event(), data.urllib.request.urlopen

    def stall(path):
        release.wait(20)
        return 200, b""
    monkeypatch.setattr(data, "MIRRORS", (server(stall),
                                          server(lambda path: (200, small_files[path[:-3]]))))
    monkeypatch.setattr(data.urllib.request, "urlopen",
                        lambda url, timeout: real(url, timeout=timeout / 50))
    assert data.load("full").source == "full"
    release.set()


def test_without_data_and_network_auto_uses_the_sample_and_full_refuses(monkeypatch, small_files,
                                                                        server, capsys):
    monkeypatch.setattr(data, "MIRRORS", (server(lambda path: (500, b"")), "http://127.0.0.1:9/"))
    assert data.load("auto").source == "sample"
    assert "SAMPLE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="network"):
        data.load("full")


@pytest.mark.parametrize("harm", ["truncate", "other data", "empty", "directory", "missing",
                                  "labels in place of images", "wrong magic"])
def test_a_wrong_file_is_named_and_never_replaced_by_the_sample(small_files, monkeypatch, harm):
    folder = Path("mine")
    folder.mkdir()
    for name, content in small_files.items():
        (folder / f"{name}.gz").write_bytes(content)
    victim = folder / "t10k-images-idx3-ubyte.gz"
    content = victim.read_bytes()
    victim.unlink()
    if harm == "directory":
        victim.mkdir()
    elif harm != "missing":
        victim.write_bytes({"truncate": content[:-20], "empty": b"",
                            "other data": gzip.compress(idx(np.zeros((20, 28, 28), np.uint8))),
                            "labels in place of images": small_files["t10k-labels-idx1-ubyte"],
                            "wrong magic": gzip.compress(b"MAGI" + gzip.decompress(content)[4:])
                            }[harm])
    monkeypatch.setenv("FASHION_MNIST_DIR", str(folder))
    for source in ("auto", "full"):
        with pytest.raises(ValueError, match="t10k-images"):
            data.load(source)


def test_no_bytes_however_wild_end_in_a_traceback():
    """Random bytes, and a good file with random bytes in it: refused, by the name of the file."""
    rng, name = np.random.RandomState(0), "t10k-labels-idx1-ubyte"
    good = bytearray(gzip.compress(idx(rng.randint(0, 10, 500).astype(np.uint8))))
    for _ in range(2000):
        raw = bytearray(good) if rng.rand() < 0.7 else bytearray(rng.bytes(rng.randint(0, 600)))
        for _ in range(rng.randint(1, 4)):
            if raw:
                raw[rng.randint(len(raw))] = rng.randint(256)
        with pytest.raises(ValueError, match="here.gz: damaged, or other data"):
            data.unpack(bytes(raw), name, "here.gz")


# ================================================================ 7. the scripts

@pytest.mark.parametrize("name", ["elbo_terms", "test", "kl_weight", "is_active", "Residual"])
def test_what_is_the_same_in_several_scripts_is_word_for_word_the_same(name):
    modules = {"test": (vae, conv_vae, beta_vae), "kl_weight": (conv_vae, cvae),
               "is_active": (conv_vae, beta_vae)}.get(name, MODELS)
    assert len({inspect.getsource(getattr(module, name)) for module in modules}) == 1


def test_models_that_are_the_same_in_several_scripts_are_word_for_word_the_same():
    assert len({inspect.getsource(c.reparameterize) for c in MODELS.values()}) == 1
    assert inspect.getsource(beta_vae.BetaVAE).replace("Beta", "").replace("10", "20") == \
        inspect.getsource(vae.VAE).replace("10", "20")


def test_the_loop_of_the_beta_vae_is_that_of_the_vae_but_for_beta():
    changed = inspect.getsource(beta_vae.train)
    for beta, plain in ((", lr, beta)", ", lr)"), ("recon + beta KL", "the negative ELBO"),
                        ("(recon + beta * kl).mean()           # the one change in the loop",
                         "(recon + kl).mean()")):
        assert changed.count(beta) == 1
        changed = changed.replace(beta, plain)
    assert changed == inspect.getsource(vae.train)


def test_lines_are_at_most_100_characters_wide():
    for name in (*SCRIPTS, "test_all"):
        lines = (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 100, name


def run(folder, script, *flags, environment=()):
    """python <script>.py in the folder, without network or display; its standard output."""
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "utf-8",
                                "https_proxy": "http://127.0.0.1:9", "PYTHONPATH": "",
                                **dict(environment)}
    environment.pop("DISPLAY", None)
    done = subprocess.run([sys.executable, f"{script}.py", *flags], cwd=folder, env=environment,
                          capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_starts_with_the_lesson_and_tells_the_defaults(script):
    text = run(HERE, script, "--help")
    assert text.index("Section") < text.index(f"python {script}.py") < text.rindex("--out")
    assert "(default: runs)" in text


FIGURES = {
    "data": ("samples", "distributions"),
    "vae": ("reconstructions", "samples", "curves", "map"),
    "conv_vae": ("reconstructions", "samples", "curves"),
    "beta_vae": ("tradeoff", "traversals", "attributes"),
    "cvae": ("reconstructions", "samples", "curves", "styles", "swaps"),
}


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Each script run by itself, in a folder with nothing but itself, data.py and the sample."""
    out, texts = tmp_path_factory.mktemp("runs"), {}
    for script in FIGURES:
        alone = tmp_path_factory.mktemp(script)
        (alone / "assets").mkdir()
        for name in (f"{script}.py", "data.py", f"assets/{data.SAMPLE.name}"):
            shutil.copy(HERE / name, alone / name)
        flags = ["--data", "sample", "--out", str(out)]
        if script != "data":
            flags += ["--epochs", "1"]
        texts[script] = run(alone, script, *flags)
        if script == "vae":
            run(alone, script, *flags, "--latent-dim", "2")
    return out, texts


@pytest.mark.parametrize("script", FIGURES)
def test_script_runs_alone_with_data_py_and_the_sample(script, study):
    out, texts = study
    assert "data sample train: 5,000 images, entropy floor 187.5" in texts[script]
    for figure in FIGURES[script]:
        assert list(out.glob(f"{script}-*{figure}.png")), figure
    if script != "data":
        assert re.search(r"^test \(sample\)", texts[script], re.MULTILINE)
        assert all("-sample-seed0-epochs1" in path.name for path in out.glob("*.pt"))
    assert not list(out.glob("*.part"))


def test_conv_vae_prints_the_baseline_beside_itself(study, tiny, tmp_path, capsys):
    _, texts = study                                     # there, only a trial with 1 epoch exists
    assert re.search(r"vae-sample-seed0.pt: not usable.* rerun vae.py", texts["conv_vae"])
    baseline = tmp_path / "vae-sample-seed0.pt"
    save(baseline, metrics={"recon": 1.25, "kl": 2.25, "total": 3.5})
    conv_vae.main(["--epochs", "1", "--out", str(tmp_path)], dataset=tiny)
    assert f"the MLP VAE in {baseline}: recon 1.25, KL 2.25, total 3.50" in capsys.readouterr().out


@pytest.fixture(scope="session")
def evaluated(study, sample):
    """python evaluate.py after the study, on 1,000 / 500 / 670 of its images: the results, what was
    printed, the folder, and which scripts were called to train."""
    small = {f"{split}_{kind}": getattr(sample, f"{split}_{kind}")[::step]
             for split, step in (("train", 5), ("val", 2), ("test", 3))
             for kind in ("images", "labels")}
    small = sample._replace(**small)
    out, _ = study
    with pytest.MonkeyPatch.context() as patch:
        loads, printed = [], []
        patch.setattr(data, "load", lambda source: loads.append(source) or small)
        patch.setattr("builtins.print", lambda *words, sep=" ", **_: printed.append(
            sep.join(map(str, words))))
        path, = evaluate.main(["--data", "sample", "--epochs", "1", "--out", str(out)])
    return json.loads(path.read_text()), "\n".join(printed), out, loads


def test_evaluate_reuses_the_checkpoints_and_its_table_adds_up(evaluated):
    results, text, out, loads = evaluated
    assert " left" not in text, "trained again although the checkpoints were there"
    assert loads == ["sample"], "the data set is loaded once"
    assert results["data"] == "sample" and results["split"] == "test" and results["seeds"] == [0]
    sha = hashlib.sha256(classifier.PRETRAINED.read_bytes()).hexdigest()
    assert results["judge_sha256"] == sha
    names = [row["model"] for row in results["rows"]]
    sweep = [f"β-VAE β={beta:g}" for beta in (0.25, 0.5, 1, 2, 4, 8, 16)]
    assert names == ["MLP VAE", "Conv VAE", *sweep, "CVAE"]
    for row in results["rows"]:
        assert row["recon"] + row["kl"] == pytest.approx(row["total"], abs=1e-9)
        assert row["recon"] - results["floor"] == pytest.approx(row["excess"], abs=1e-9)
        assert row["fid_prior"] > results["yardsticks"]["fid of halves of the images"]
        assert f"{row['total']:.2f}" in text
        assert (row["active"] is None) == (row["beta"] is None)
        assert (row["control_prior"] is None) == (row["model"] != "CVAE")
    for row in (results["rows"][0], results["rows"][1], results["rows"][-1]):
        bounds = [row["iw_1"], row["iw_10"], row["iw_100"]]
        assert bounds == sorted(bounds, reverse=True) and bounds[-1] > results["floor"] - 20
    assert all(line in text for line in evaluate.report(results))
    for figure in ("models", "beta-tradeoff", "beta-traversals", "beta-attributes"):
        assert (out / f"results-sample-seeds0-epochs1-{figure}.png").exists()


def flags_of_a_study(out, **more):
    parser = evaluate.data.Parser("")
    args = parser.parse_args(["--data", "sample", "--out", str(out)])
    for name, value in {"device": "cpu", "epochs": None, **more}.items():
        setattr(args, name, value)
    return args


def test_evaluate_trains_what_is_missing_and_only_that(tiny, tmp_path, capsys):
    args = flags_of_a_study(tmp_path, epochs=1)
    for entry in (evaluate.STUDY[0], evaluate.STUDY[2]):
        path = evaluate.find_or_train(entry, 3, args, tiny)
        assert "epoch   1/1" in capsys.readouterr().out
        assert entry.script.load_model(path)[1]["seed"] == 3
        written = path.stat().st_mtime_ns
        assert evaluate.find_or_train(entry, 3, args, tiny) == path
        assert path.stat().st_mtime_ns == written and capsys.readouterr().out == ""


@pytest.mark.parametrize("harm", ["config", "source", "script", "seed", "beta"])
def test_evaluate_refuses_a_checkpoint_of_another_study(harm, study, tmp_path, tiny):
    runs, _ = study
    name = "vae-sample-seed0-epochs1.pt"
    meta = data.read_checkpoint(runs / name, "vae")
    changed = {"config": {"config": meta["config"] | {"lr": 0.5}}, "source": {"source": "full"},
               "script": {"script": "cvae"}, "seed": {"seed": 5}, "beta": {"beta": 2.0}}[harm]
    data.save_checkpoint(tmp_path / name, **meta | changed)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=name):
        evaluate.find_or_train(evaluate.STUDY[0], 0, flags_of_a_study(tmp_path, epochs=1), tiny)
    assert (tmp_path / name).read_bytes() == before


def test_readme_and_report_show_the_recorded_tables():
    results = json.loads((HERE / "results" / "results.json").read_text(encoding="utf-8"))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    whole = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    assert results["data"] == "full" and results["split"] == "test" and results["epochs"] is None
    for line in evaluate.report(results):
        if line.startswith(("|", "-")):
            assert line in whole, line
    rows = {row["model"]: row for row in results["rows"]}
    assert rows["Conv VAE"]["total"]["mean"] < rows["MLP VAE"]["total"]["mean"]
    assert results["seeds"] == [0, 1, 2, 3, 4] and rows["MLP VAE"]["total"]["n"] == 5
    sweep = [row for row in results["rows"] if row["beta"]]
    best = min(sweep, key=lambda row: row["total"]["mean"])["beta"]
    few = [row for row in results["rows"] if row["beta"] in (None, 1.0, best)]
    columns = ["model", "excess", "kl", "total", "fid_prior", "control_prior"]
    for line in evaluate.table(few, columns):
        assert line in readme, line


# ================================================================ 8. what users do wrong

@pytest.mark.parametrize("module, flags", [
    (vae, ["--epochs", "0"]), (vae, ["--epochs", "-3"]), (vae, ["--epochs", "many"]),
    (vae, ["--epochs", "2.5"]), (vae, ["--batch-size", "99999999"]),
    (conv_vae, ["--batch-size", "0"]), (cvae, ["--latent-dim", "0"]), (vae, ["--lr", "nan"]),
    (vae, ["--lr", "inf"]), (vae, ["--lr", "0"]), (vae, ["--lr", "-1"]),
    (cvae, ["--latent-dim", "-1"]), (beta_vae, ["--betas", "-1"]), (beta_vae, ["--betas"]),
    (beta_vae, ["--betas", "1", "1.0"]), (beta_vae, ["--betas", "0.30000001"]),
    (evaluate, ["--seeds", *map(str, range(17))]), (vae, ["--out", "~nobody-of-that-name/x"]),
    (vae, ["--epochs", 3]), (vae, ["--data", "mnist"]),
    (vae, ["--device", "abacus"]), (vae, ["--device", "meta"]), (vae, ["--seed", "-1"]),
    (vae, ["--seed", "9" * 20]), (evaluate, ["--split", "train"]), (evaluate, ["--epochs", "0"]),
    (evaluate, ["--seeds", "1", "1"]), (data, ["--nonsense"]), (conv_vae, ["--bf16", "maybe"]),
    (conv_vae, ["--warmup-epochs", "-1"]), (conv_vae, ["--weight-decay", "-1"]),
    (vae, ["--epoch", "3"]), (data, ["--out", __file__]), (vae, ["--out", __file__]),
    (cvae, ["--out", "/proc/none"]), (vae, ["--out", "a\0b"]), (vae, "--epochs 3"),
], ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else getattr(v, "__name__", v))
def test_a_bad_flag_is_one_line_and_exit_code_2(module, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


WORDS = ("--epochs", "--batch-size", "--lr", "--latent-dim", "--seed", "--device", "--data",
         "--out", "--betas", "--warmup-epochs", "--seeds", "--split", "--bf16", "--train-only",
         "--weight-decay", "--", "-", "", " ", "0", "1", "-1", "1e400", "on", "off",
         "-inf", "nan", "0.5", "1_0", "١", "0x10", "9" * 20, "cpu", "cuda:99", "val", "full",
         "sample", "/proc", "\x00", "\n", "é", "a" * 300, "None", "[1]", "--epochs=2", "--lr=")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flags_however_wild_end_in_a_traceback(script, monkeypatch, capsys, tmp_path):
    """Random words: either one line and exit code 2, or they are good flags and data is loaded."""
    class Loaded(Exception):
        pass

    def load(source):
        raise Loaded
    module, rng = globals()[script], np.random.RandomState(0)
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(data, "pick_bf16", lambda choice, device: False)
    monkeypatch.chdir(tmp_path)
    refused = 0
    for _ in range(300):
        words = list(rng.choice(WORDS, rng.randint(1, 6)))
        try:
            with pytest.raises(SystemExit) as stop:
                module.main([str(word) for word in words])
        except Loaded:
            continue
        error = capsys.readouterr().err
        assert stop.value.code == 2, words
        assert error.startswith("error: ") and error.count("\n") == 1, words
        refused += 1
    assert 100 < refused


def test_a_flag_that_is_not_the_default_stands_in_the_name_in_plain_words():
    for module, flags, name in (
            (vae, [], "x"), (vae, ["--epochs", "24"], "x"), (vae, ["--epochs", "3"], "x-epochs3"),
            (vae, ["--seed", "4", "--device", "cpu", "--out", "y", "--data", "sample"], "x"),
            (vae, ["--latent-dim", "2", "--lr", "0.01"], "x-lr0.01-latent-dim2"),
            (conv_vae, ["--warmup-epochs", "0", "--bf16", "off"], "x-warmup-epochs0.0-bf16off"),
            (beta_vae, ["--betas", "4", "--train-only"], "x")):
        parser = module.arguments()
        assert data.run_name("x", parser, parser.parse_args(flags)) == name


@pytest.mark.parametrize("choice, kind, expected", [
    ("on", "cpu", True), ("off", "cpu", False), ("auto", "mps", False)])
def test_bfloat16_can_be_chosen(choice, kind, expected):
    assert data.pick_bf16(choice, torch.device(kind)) is expected


@pytest.mark.parametrize("slow, expected", [(torch.float32, True), (torch.bfloat16, False)])
def test_bfloat16_is_chosen_by_itself_where_it_is_fast(slow, expected, monkeypatch):
    class Matrix:
        def __init__(self, dtype):
            self.dtype = dtype

        def __matmul__(self, other):
            time.sleep(0.02 if self.dtype == slow else 0)
            return self

        def __getitem__(self, index):
            return torch.zeros(())
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: Matrix(dtype))
    assert data.pick_bf16("auto", torch.device("cpu")) is expected


@pytest.mark.parametrize("module, model", [(conv_vae, conv_vae.ConvVAE), (cvae, cvae.CVAE)])
def test_training_in_bfloat16_computes_the_network_in_it_and_the_loss_in_float32(module, model,
                                                                                 tiny, capsys):
    seen = []
    whole = module.elbo_terms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "elbo_terms", lambda *a: seen.append(a[0].dtype) or whole(*a))
        torch.manual_seed(0)
        network = model(2)
        network.decoder.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        fit(module, network, tiny, 1, 300, 1e-3, bf16=True)
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float32]  # step, validation


def test_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "deep" / "x.pt"
    save(path, seed=3, weights=torch.arange(4.0))
    meta = data.read_checkpoint(path, "vae")
    assert meta["weights"].tolist() == [0, 1, 2, 3] and meta["seed"] == 3
    with pytest.raises(ValueError, match="made by vae.py, not by cvae.py"):
        data.read_checkpoint(path, "cvae")
    path.write_bytes(path.read_bytes()[:-100])
    for broken in (path, tmp_path / "absent.pt"):
        with pytest.raises(ValueError, match=f"{broken.name}: not usable.*rerun vae.py"):
            data.read_checkpoint(broken, "vae")


def test_malicious_checkpoint_is_refused_unread(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="evil.pt: not usable"):
        data.read_checkpoint(tmp_path / "evil.pt", "vae")
    assert not (tmp_path / "harm").exists()


@each_model
def test_checkpoint_of_another_model_or_shape_is_refused(module, tmp_path):
    small, large = MODELS[module](2), MODELS[module](3)
    for name, script, model in (("a.pt", "other", small), ("b.pt", module.__name__, large)):
        save(tmp_path / name, script=script, state_dict=model.state_dict())
        with pytest.raises(ValueError, match=name):
            module.load_model(tmp_path / name)


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "f: No space left.*; make space"),
    (KeyboardInterrupt(), "")])
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


def test_the_checkpoint_is_saved_before_the_pictures(tiny, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no picture today")
    for module in (vae, conv_vae, cvae):
        monkeypatch.setattr(module, "draw_pictures", fails)
        with pytest.raises(RuntimeError):
            module.main(["--epochs", "1", "--out", str(tmp_path)], dataset=tiny)
        assert list(tmp_path.glob(f"{module.__name__}-*.pt"))


@each_model
@pytest.mark.parametrize("kept", [[0, 1, 2, 4, 5, 6, 7, 9], [6]])
def test_classes_that_are_missing_crash_neither_training_nor_pictures(module, kept, tiny, tmp_path,
                                                                      capsys):
    def some(images, labels):
        keep = torch.isin(labels, torch.tensor(kept))
        return images[keep], labels[keep]
    some_of_each = [tensor for i in range(0, 6, 2) for tensor in some(tiny[i], tiny[i + 1])]
    flags = ["--betas", "1"] if module is beta_vae else []
    path, = module.main(["--epochs", "1", "--out", str(tmp_path), *flags],
                        dataset=data.FashionMNIST(*some_of_each, "sample"))
    assert path.exists() and len(list(tmp_path.glob("*.png"))) >= 3


def test_device_auto_is_usable_and_unknown_is_refused():
    assert torch.zeros(1, device=data.pick_device()).item() == 0
    for name in ("abacus", "meta", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"no device {name} here"):
            data.pick_device(name)


def test_image_grid_puts_every_image_in_its_cell(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data.Figure, "savefig", lambda figure, *a, **k: seen.append(
        figure.axes[0].images[0].get_array()))
    images = torch.rand(2, 3, 28, 28)
    data.image_grid(images, tmp_path / "grid.png", rows=("a", "b"))
    assert seen[0].shape == (60, 90)
    assert torch.equal(torch.as_tensor(np.asarray(seen[0][31:59, 61:89])), images[1, 2])
    with pytest.raises(ValueError, match="sigmoid of logits"):
        data.image_grid(images * 9 - 4, tmp_path / "grid.png")


def interrupt(folder, signal_number, code, wait_for):
    """Start Python code in the folder, send the signal once it printed wait_for; (code, stderr)."""
    process = subprocess.Popen([sys.executable, "-u", "-c", code], cwd=folder, encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(HERE)})
    for line in process.stdout:
        if wait_for in line:
            process.send_signal(signal_number)
            break
    process.stdout.close()
    error = process.stderr.read()
    return process.wait(60), error


def test_ctrl_c_in_training_is_one_true_line_and_leaves_nothing(tmp_path):
    flags = "['--data', 'sample', '--epochs', '500', '--out', 'runs']"
    code = ("import signal, vae\n"                      # a shell's background jobs ignore Ctrl-C
            f"signal.signal(signal.SIGINT, signal.default_int_handler)\nvae.main({flags})")
    status, error = interrupt(tmp_path, signal.SIGINT, code, "epoch   1")
    assert status == 130
    assert error.count("\n") == 1 and error.startswith("error: interrupted")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path):
    code = ("import data, pathlib, torch\n"
            "for k in range(10**6):\n"
            "    data.save_checkpoint(pathlib.Path('x.pt'), script='vae', config={}, seed=0, k=k,"
            " source='sample', metrics={}, weights=torch.full((300_000,), float(k)))\n"
            "    print('saved', k)\n")
    for wait_for in ("saved 0", "saved 3", "saved 8"):
        status, _ = interrupt(tmp_path, signal.SIGKILL, code, wait_for)
        assert status == -signal.SIGKILL
        saved = data.read_checkpoint(tmp_path / "x.pt", "vae")
        assert (saved["weights"] == saved["k"]).all() and saved["k"] >= int(wait_for.split()[1])


def python(folder, code, **more):
    """Run Python code in a folder, with this project on its path; the completed process."""
    environment = os.environ | {"PYTHONPATH": str(HERE)} | more.pop("environment", {})
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True,
                          encoding="utf-8", errors="replace", timeout=120, env=environment, **more)


def one_line(process):
    """Is this a program that ended with exit code 2 and one line?"""
    return (process.returncode == 2 and process.stderr.startswith("error: ")
            and process.stderr.count("\n") == 1)


TRIAL = "import vae; vae.main(['--data', 'sample', '--epochs', '1', '--out', 'out'])"


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes there")
@pytest.mark.parametrize("kilobytes, kept", [(3000, 0), (60, 0), (6500, 1)])
def test_a_full_disk_is_one_line_and_leaves_no_half_files(tmp_path, kilobytes, kept):
    """Files may not be larger than this: the checkpoint has 6.5 MB, pictures a tenth of a MB."""
    import resource
    limit = kilobytes * 1024
    big = ("import data; whole = data.write_file\n"
           "def write_file(path, content):\n"           # with room for all but one picture
           "    whole(path, content if 'samples' not in path.name else content * 100)\n"
           "data.write_file = write_file\n") if kept else ""
    done = python(tmp_path, big + TRIAL, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    assert one_line(done), done.stderr
    assert "File too large; make space" in done.stderr
    assert not list(tmp_path.glob("out/*.part"))
    assert len(list(tmp_path.glob("out/*.pt"))) == kept     # what was finished before is kept


def test_a_pipe_that_is_closed_ends_the_program_in_silence(tmp_path):
    with subprocess.Popen([sys.executable, "-c", TRIAL.replace("'1'", "'9'")], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(HERE)}, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_a_letter_prints_a_question_mark(tmp_path, encoding):
    code = "import data; data.main(['--data', 'sample', '--out', 'größe-β'])"
    done = python(tmp_path, code, environment={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout and len(list((tmp_path / "größe-β").glob("*.png"))) == 2


def test_in_a_notebook_main_takes_its_defaults_and_not_the_flags_of_the_kernel(tmp_path):
    code = ("import sys, data, vae\n"
            "sys.argv = ['/x/ipykernel_launcher.py', '-f', '/x/kernel-1.json']\n"
            "def load(source):\n    print('loads', source); sys.exit(0)\n"
            "data.load = load\nvae.main()")
    done = python(tmp_path, code)
    assert done.returncode == 0 and done.stdout == "loads auto\n", done.stderr


def test_a_matplotlib_backend_that_is_not_installed_does_no_harm(tmp_path):
    code = "import data; data.main(['--data', 'sample', '--out', 'out'])"
    for backend in ("module://not_installed.backend", "nonsense"):
        done = python(tmp_path, code, environment={"MPLBACKEND": backend})
        assert done.returncode == 0, done.stderr


def test_a_download_that_cannot_be_written_tells_what_helps(monkeypatch, small_files, server):
    Path("fashion-mnist").write_bytes(b"a file where a folder should be")
    monkeypatch.setattr(data, "MIRRORS", (server(lambda path: (200, small_files[path[:-3]])),))
    with pytest.raises(ValueError, match="train-images.*set --out or FASHION_MNIST_DIR"):
        data.load("auto")


@each_model
def test_weights_of_a_compiled_model_are_named(module, tmp_path):
    state = MODELS[module](2).state_dict()
    save(tmp_path / "x.pt", script=module.__name__,
         state_dict={f"_orig_mod.{name}": value for name, value in state.items()})
    first = min(state)
    with pytest.raises(ValueError, match=rf"x.pt.*missing {first}, unknown _orig_mod.{first}.*"
                                         "rename them, or train"):
        module.load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("harm", ["script", "config", "source", "seed", "metrics", "state_dict",
                                  "a list of weights", "a weight that is not a number"])
def test_a_checkpoint_that_lacks_something_is_named(harm, tmp_path):
    state = vae.VAE(2).state_dict()
    meta = {"script": "vae", "config": {"latent_dim": 2}, "source": "sample", "seed": 0,
            "metrics": {}, "state_dict": state}
    if harm in meta:
        del meta[harm]
    elif harm == "a list of weights":
        meta["state_dict"] = ["encoder.1.weight"]
    else:
        state["encoder.1.bias"][3] = math.nan
    data.save_checkpoint(tmp_path / "x.pt", **meta)
    with pytest.raises(ValueError, match="x.pt: (not usable|weights that do not fit)"):
        vae.load_model(tmp_path / "x.pt")


def test_names_that_are_too_long_for_a_file_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="File name too long"):
        data.write_file(tmp_path / ("x" * 300), b"content")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_output_onto_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-u", HERE / "data.py", "--data", "sample"],
                              cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert one_line(done), done.stderr


def test_two_processes_may_write_the_same_file(tmp_path):
    code = ("import data, pathlib\n"
            "for k in range(300): data.write_file(pathlib.Path('x'), bytes([k % 256]) * 100_000)")
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                                  env=os.environ | {"PYTHONPATH": str(HERE)}) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    content = (tmp_path / "x").read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_home_folder_in_out_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    data.main(["--data", "sample", "--out", "~/runs"])
    assert (tmp_path / "runs" / "data-samples.png").exists()


def test_a_default_of_float64_is_refused_in_one_line(capsys):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(SystemExit):
            vae.main(["--data", "sample"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert capsys.readouterr().err.startswith("error: call torch.set_default_dtype(torch.float32)")


def test_the_snippets_of_the_readme_work(study, tmp_path, monkeypatch, capsys):
    """Every Python block of README.md, after a vae.py and a cvae.py of one epoch."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
              if "import" in block]
    runs, _ = study
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for script in ("vae", "cvae"):
        shutil.copy(runs / f"{script}-sample-seed0-epochs1.pt", f"runs/{script}-full-seed0.pt")
    figure = data.Figure((0.28, 0.28), 100)              # a picture of one's own, 28 x 28 pixels
    figure.add_axes((0, 0, 1, 1)).bar([0], [1])
    figure.savefig("mine.png")
    np.save("mine.npy", np.random.RandomState(0).randint(0, 256, (300, 28, 28)).astype(np.uint8))
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 3 and {"bags.png", "mine-decoded.png"} <= set(os.listdir())


# ================================================================ 9. mistakes that must be noticed

FOUR = ("vae", "conv_vae", "beta_vae", "cvae")
# The files a mistake is planted in, the text as it is, the text with the mistake, the test that has
# to fail. What stands in several files is replaced in all of them, so that the tests of equal lines
# see nothing.
MUTANTS = [
    # recon averaged over pixels
    (FOUR, "recon.flatten(1).sum(1)", "recon.flatten(1).mean(1)",
     "test_recon_is_minus_log_bernoulli_on_binary_images"),
    # the sigmoid taken twice
    (FOUR, "binary_cross_entropy_with_logits(logits, x,",
     "binary_cross_entropy_with_logits(logits.sigmoid(), x,",
     "test_recon_is_minus_log_bernoulli_on_binary_images"),
    # KL without its 1/2, without mu^2, with the sign of log sigma^2 turned, averaged over latents
    (FOUR, "kl = 0.5 * (mu", "kl = 1.0 * (mu", "test_kl_is_that_of_torch_distributions"),
    (FOUR, "(mu.pow(2) + logvar.exp() - logvar - 1).sum(1)", "(logvar.exp() - logvar - 1).sum(1)",
     "test_kl_is_that_of_torch_distributions"),
    (FOUR, "logvar.exp() - logvar - 1).sum(1)", "logvar.exp() + logvar - 1).sum(1)",
     "test_kl_is_that_of_torch_distributions"),
    (FOUR, "- logvar - 1).sum(1)", "- logvar - 1).mean(1)",
     "test_kl_is_that_of_torch_distributions"),
    # log sigma^2 or sigma^2 taken for sigma
    (FOUR, "mu + torch.exp(0.5 * logvar) * eps", "mu + logvar * eps",
     "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    (FOUR, "torch.exp(0.5 * logvar) * eps", "torch.exp(logvar) * eps",
     "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    # uniform noise, no noise, one noise for the whole batch
    (FOUR, "eps = torch.randn_like(mu)", "eps = torch.rand_like(mu)",
     "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    (FOUR, "return mu + torch.exp(0.5 * logvar) * eps", "return mu",
     "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    (FOUR, "eps = torch.randn_like(mu)", "eps = torch.randn_like(mu[:1])",
     "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    # the posterior mean reported; a return inside the test loop; train() in the test loop
    (FOUR, "z = self.reparameterize(mu, logvar)",
     "z = self.reparameterize(mu, logvar) if self.training else mu",
     "test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight"),
    (FOUR, "    mean_recon, mean_kl = recon_sum / len(images), kl_sum / len(images)\n    return {",
     "        mean_recon, mean_kl = recon_sum / len(images), kl_sum / len(images)\n"
     "        return {",
     "test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight"),
    (FOUR, "    model.eval()\n    device", "    model.train()\n    device",
     "test_test_loop_switches_dropout_off"),
    (FOUR, "        model.train()\n        recon_sum", "        recon_sum",
     "test_training_switches_dropout_on_again_after_each_validation"),
    # warm-up left on at evaluation, or never ending, or counting epochs
    (("conv_vae", "cvae"), 'return {"recon": mean_recon,',
     'mean_kl *= kl_weight(len(images), 1000)\n    return {"recon": mean_recon,',
     "test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight"),
    (("conv_vae", "cvae"), "min(1.0, step / warmup_steps)", "step / (step + warmup_steps)",
     "test_warmup_goes_from_0_to_1_over_the_stated_steps_and_stays"),
    (("conv_vae", "cvae"), "w = kl_weight(steps_taken, warmup_steps)",
     "w = kl_weight(epoch - 1, warmup_epochs)", "test_warmup_counts_training_steps_only"),
    # gradients never zeroed; pixels never checked; tested on the training images
    (FOUR, "            optimizer.zero_grad()\n", "",
     "test_a_training_step_follows_the_gradient_of_this_batch_alone"),
    (FOUR, "        if not 0 <= images.min() <= images.max() <= 1:", "        if False:",
     "test_pixels_outside_0_to_1_are_refused_before_the_training"),
    (FOUR, "metrics = test(model, dataset.test_images", "metrics = test(model, dataset.val_images",
     "test_script_prints_and_saves_the_test_of_the_test_images"),
    # beta left out of the loss
    (("beta_vae",), "(recon + beta * kl).mean()", "(recon + kl).mean()",
     "test_beta_weighs_the_gradient_of_the_kl"),
    # active by standard deviation, or by another threshold
    (("beta_vae",), "mu.var(dim=0) > 0.01", "mu.std(dim=0) > 0.01",
     "test_a_latent_is_active_if_its_variance_is_above_a_hundredth"),
    (("beta_vae",), "mu.var(dim=0) > 0.01", "mu.var(dim=0) > 0.02",
     "test_a_latent_is_active_if_its_variance_is_above_a_hundredth"),
    # ranks without ties; beaten the wrong way round; the lower half taken for the upper
    (("beta_vae",), "(smaller + smaller_or_equal).T", "(smaller + smaller).T",
     "test_rank_correlation_is_pearson_of_the_ranks_with_ties_shared"),
    (("beta_vae",), "(null < gap(rho))", "(null > gap(rho))",
     "test_beaten_is_the_share_of_the_null_that_is_smaller"),
    (("beta_vae",), "x[:, :14].sum((1, 2)) / ink", "x[:, 14:].sum((1, 2)) / ink",
     "test_attributes_of_a_drawn_rectangle"),
    # the gap to the smallest instead of the next; a null that stretches the codes
    (("beta_vae",), "second = ordered[1] if", "second = ordered[-1] if",
     "test_gap_is_one_where_each_attribute_has_its_latent_and_zero_where_two_share_it"),
    (("beta_vae",), "rotation = torch.linalg.qr(gaussian).Q ", "rotation = gaussian ",
     "test_the_null_only_rotates"),
    # the map upside down
    (("vae",), "z2 = quantiles.flip(0).repeat", "z2 = quantiles.repeat",
     "test_the_map_shows_each_place_of_the_latent_space_where_it_is"),
    # one-hot shifted by one; decoder or encoder ignores y
    (("cvae",), "one_hot(y, 10).to(z.dtype)", "one_hot((y + 1) % 10, 10).to(z.dtype)",
     "test_cvae_gives_each_label_its_own_input"),
    (("cvae",), "torch.cat([z, label], dim=1)", "torch.cat([z, 0 * label], dim=1)",
     "test_cvae_gives_each_label_its_own_input"),
    (("cvae",), "torch.cat([patches, planes], dim=1)", "torch.cat([patches, 0 * planes], dim=1)",
     "test_cvae_gives_each_label_its_own_input"),
    # training and validation overlap; pixels divided by 256 or standardised
    (("data",), "np.setdiff1d(np.arange(len(labels)), val)", "np.arange(len(labels))",
     "test_split_is_stratified_disjoint_and_stable"),
    (("data",), "/ np.float32(255)", "/ np.float32(256)", "test_sample_is_balanced_raw_and_small"),
    (("data",), "torch.from_numpy(images[:, None] / np.float32(255))",
     "torch.from_numpy((images[:, None] / np.float32(255) - 0.286) / 0.353).float()",
     "test_sample_is_balanced_raw_and_small"),
    # images normalised twice or never for the classifier; it is left in training mode
    (("classifier",), "self.stem((images - self.mean) / self.std)",
     "self.stem(((images - self.mean) / self.std - self.mean) / self.std)",
     "test_normalisation_is_inside_and_applied_once"),
    (("classifier",), "self.stem((images - self.mean) / self.std)", "self.stem(images)",
     "test_normalisation_is_inside_and_applied_once"),
    (("classifier",), "    judge.eval()\n", "    judge.train()\n",
     "test_pretrained_judge_is_accurate_small_and_batch_independent"),
    # the last epoch of the classifier in place of the best
    (("classifier",), "if accuracy >= best_accuracy:", "if True:",
     "test_classifier_keeps_the_weights_of_the_best_epoch"),
    # FID: covariance over n, a ridge, without the means, without the root
    (("evaluate",), "a.T.cov(), b.T.cov()", "a.T.cov(correction=0), b.T.cov(correction=0)",
     "test_fid_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric"),
    (("evaluate",), "values, vectors = torch.linalg.eigh(cov_a)",
     "cov_a = cov_a + 1e-3 * torch.eye(len(cov_a))\n"
     "    values, vectors = torch.linalg.eigh(cov_a)",
     "test_fid_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric"),
    (("evaluate",), "shift @ shift + cov_a", "cov_a",
     "test_fid_of_identical_sets_is_0_and_of_a_shift_its_square"),
    (("evaluate",), "root_a @ cov_b @ root_a).clamp(min=0).sqrt()",
     "root_a @ cov_b @ root_a).clamp(min=0)",
     "test_fid_of_scaled_axes_is_the_diagonal_closed_form"),
    # log-mean-exp without the mean; importance weights without p(z) and q(z | x)
    (("evaluate",), "groups.logsumexp(dim=2) - math.log(k)", "groups.logsumexp(dim=2)",
     "test_importance_weighted_bounds_are_ordered_and_close_in_on_the_true_likelihood"),
    (("evaluate",), "log_w.append(log_ratio - recon)", "log_w.append(-recon)",
     "test_importance_weighted_bounds_are_ordered_and_close_in_on_the_true_likelihood"),
    # EM without its weights, or with covariances around the wrong mean
    (("evaluate",), "rows.append(weight.log() - log_norm", "rows.append(-log_norm",
     "test_log_joint_is_that_of_torch_distributions"),
    (("evaluate",), "centred = z - means[k] ", "centred = z - z.mean(0) ",
     "test_no_iteration_of_em_lowers_the_likelihood"),
    # one Gaussian for all classes of the CVAE; one stream of random numbers for all measurements
    (("evaluate",), "codes[dataset.train_labels == c]", "codes",
     "test_the_ex_post_prior_of_a_cvae_is_one_gaussian_for_each_class"),
    (("evaluate",), "    torch.manual_seed(3) ", "    pass ",
     "test_no_measurement_changes_the_figures_of_another"),
    # nearest of the unseen images counted; one seed taken for no spread; spread over n seeds
    (("evaluate",), "(nearest < len(train_images))", "(nearest >= len(train_images))",
     "test_images_learned_by_heart_are_nearest_to_training_images"),
    (("evaluate",), "for std in stds)) if stds else None", "for std in stds)) if stds else 0.0",
     "test_noise_is_the_pooled_spread_of_a_difference_and_unknown_for_one_seed"),
    (("evaluate",), '"std": stdev(values)', '"std": stdev(values) * (1 - 1 / len(values)) ** 0.5',
     "test_seeds_are_averaged_with_n_minus_1"),
]


def test_every_mutant_still_finds_its_line_and_its_test():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert f"plants {len(MUTANTS)} mistakes" in " ".join(readme.split())
    assert all(name in globals() for name in re.findall(r"`(test_\w+)`", readme))
    for files, text, mistake, test in MUTANTS:
        assert text != mistake and test in globals(), text
        for file in files:
            assert text in (HERE / f"{file}.py").read_text(encoding="utf-8"), (text, file)


def run_mutants():
    """Plant each mistake in a copy of the sources, where its test must fail by an assertion; the
    number of mistakes that lived."""
    lived = 0
    with tempfile.TemporaryDirectory() as folder:
        for files, text, mistake, test in MUTANTS:
            for name in (*SCRIPTS, "test_all"):
                source = (HERE / f"{name}.py").read_text(encoding="utf-8")
                if name in files:
                    source = source.replace(text, mistake)
                Path(folder, f"{name}.py").write_text(source, encoding="utf-8")
            shutil.copytree(HERE / "assets", Path(folder, "assets"), dirs_exist_ok=True)
            command = [sys.executable, "-m", "pytest", "-qx", "--tb=line", "-p", "no:cacheprovider",
                       f"test_all.py::{test}"]
            output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
            caught = re.search("AssertionError|assert |Failed: DID NOT RAISE", output)
            lived += not caught
            print("caught" if caught else "LIVED ", f"{mistake.strip()!r} by {test}", flush=True)
    print(f"{len(MUTANTS)} mistakes, {lived} lived")
    return lived


if __name__ == "__main__":
    if sys.argv[1:] != ["--mutants"]:
        sys.exit("python -m pytest test_all.py runs the tests; python test_all.py --mutants shows"
                 " that they catch mistakes")
    sys.exit(min(1, run_mutants()))
