"""Every test of the study: python -m pytest test_all.py (offline, on real images, 3 minutes).

Each test states a fact and holds it against something that is not this code: a closed form,
torch.distributions, numpy, a hand-made file, or another process. That the tests catch what they
should: python test_all.py --mutants (the list is at the end of this file, 3 minutes).
"""
import contextlib
import copy
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
import signal
import struct
import subprocess
import sys
import tempfile
import threading
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
BETAS = (0.25, 0.5, 1, 2, 4, 8, 16)
MODELS = {vae: vae.VAE, conv_vae: conv_vae.ConvVAE, beta_vae: beta_vae.BetaVAE, cvae: cvae.CVAE}
each_model = pytest.mark.parametrize("module", MODELS, ids=lambda m: m.__name__)


@pytest.fixture(scope="session")
def sample():
    return data.load("sample")


@pytest.fixture
def tiny(sample):
    """300 / 100 / 100 real images, all classes."""
    pick = torch.arange(300) * 16 % 5000
    return sample._replace(train_images=sample.train_images[pick],
                           train_labels=sample.train_labels[pick],
                           val_images=sample.val_images[::10], val_labels=sample.val_labels[::10],
                           test_images=sample.test_images[::20],
                           test_labels=sample.test_labels[::20])


def given(module, labels):
    return (labels,) if module is cvae else ()


# ---------------------------------------------------------------- data


def idx(array):
    """IDX bytes of a uint8 array, written from the format's description."""
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I",
                                                                   *array.shape) + array.tobytes()


def test_idx_parser_reads_hand_made_bytes(monkeypatch):
    images = np.arange(2 * 28 * 28).astype(np.uint8).reshape(2, 28, 28)
    for array in (images, np.array([3, 9], np.uint8)):
        checksum = hashlib.sha256(idx(array)).hexdigest()
        monkeypatch.setattr(data, "FILES", {"x": checksum})
        assert np.array_equal(data.unpack(gzip.compress(idx(array)), "x", "x.gz"), array)


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
        if all((folder / f"{name}.gz").exists() for name in data.FILES):
            return folder
    pytest.skip("the full data set is not here (apt install dataset-fashion-mnist)")


def test_sample_is_the_first_images_of_each_class_of_the_full_set(full, sample):
    raw = [data.unpack((full / f"{n}.gz").read_bytes(), n, n) for n in data.FILES]

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
    assert loaded.floor["test"] == pytest.approx(189.86, abs=0.005)


def test_pixel_entropy_is_bernoulli_entropy(sample):
    x = sample.test_images[:50]
    expected = torch.distributions.Bernoulli(x.flatten(1)).entropy().nan_to_num().sum(1)
    assert torch.allclose(data.pixel_entropy(x), expected, rtol=1e-4)
    assert data.pixel_entropy(x.round()).abs().max() == 0


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


def test_without_data_and_network_auto_uses_the_sample_and_full_refuses(monkeypatch, small_files,
                                                                        server, capsys):
    monkeypatch.setattr(data, "MIRRORS", (server(lambda path: (500, b"")), "http://127.0.0.1:9/"))
    assert data.load("auto").source == "sample"
    assert "SAMPLE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="network"):
        data.load("full")


@pytest.mark.parametrize("harm", ["truncate", "other data", "empty", "directory", "missing",
                                  "labels in place of images", "wrong magic", "no gzip"])
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
                            "wrong magic": gzip.compress(b"MAGI" + gzip.decompress(content)[4:]),
                            "no gzip": gzip.decompress(content)}[harm])
    monkeypatch.setenv("FASHION_MNIST_DIR", str(folder))
    for source in ("auto", "full"):
        with pytest.raises(ValueError, match="t10k-images"):
            data.load(source)


# ---------------------------------------------------------------- plumbing


@pytest.mark.parametrize("module, flags", [
    (vae, ["--epochs", "0"]), (vae, ["--epochs", "-3"]), (vae, ["--epochs", "many"]),
    (conv_vae, ["--batch-size", "0"]), (cvae, ["--latent-dim", "0"]), (vae, ["--lr", "nan"]),
    (cvae, ["--latent-dim", "-1"]), (beta_vae, ["--betas", "-1"]),
    (beta_vae, ["--betas", "1", "1"]), (beta_vae, ["--betas", "1", "1.0000001"]),
    (beta_vae, ["--image", "2000"]), (beta_vae, ["--image", "-1"]),
    (vae, ["--lr", "inf"]), (vae, ["--data", "mnist"]), (vae, ["--device", "abacus"]),
    (evaluate, ["--split", "train"]), (evaluate, ["--seeds", "1", "1"]), (vae, ["--seed", "-1"]),
    (evaluate, ["--deep", "--split", "val"]),
    (classifier, ["--batch-size", "1"]), (data, ["--nonsense"]),
    (conv_vae, ["--epochs", "2", "--warmup-epochs", "3"]),
    (conv_vae, ["--warmup-epochs", "-1"]),
    (data, ["--data", "sample", "--out", __file__]), (vae, ["--data", "sample", "--out", __file__]),
    (cvae, ["--data", "sample", "--out", "/proc/none"]), (conv_vae, ["--weight-decay", "-1"]),
], ids=lambda v: " ".join(v) if isinstance(v, list) else v.__name__)
def test_a_bad_flag_is_one_line_and_exit_code_2(module, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = data.save_checkpoint(tmp_path / "deep" / "x.pt", seed=3, weights=torch.arange(4.0))
    assert data.read_checkpoint(path, seed=3)["weights"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="'seed': 4"):
        data.read_checkpoint(path, seed=4)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="x.pt"):
        data.read_checkpoint(path)


def test_malicious_checkpoint_is_refused_unread(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="evil.pt: unusable"):
        data.read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = data.write_atomically(tmp_path / "f", lambda file: file.write(b"old"))

    def dies(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, dies)
    assert path.read_bytes() == b"old"


def test_a_trial_run_never_has_the_name_of_the_real_one(tmp_path):
    parser = data.Parser("")
    parser.training(epochs=20, lr=1e-3, latent_dim=5)
    names = [data.run_path(parser, parser.parse_args(["--out", str(tmp_path), *flags]), "vae",
                           "full", "latent_dim")[0].name
             for flags in ([], ["--epochs", "20"], ["--epochs", "1"], ["--epochs", "2"])]
    assert names[0] == names[1] == "vae-full-seed0.pt"
    assert len(set(names)) == 3


@each_model
def test_checkpoint_of_another_model_or_shape_is_refused(module, tmp_path):
    small, large = MODELS[module](2), MODELS[module](3)
    other = data.save_checkpoint(tmp_path / "a.pt", script="other", config={"latent_dim": 2},
                                 state_dict=small.state_dict())
    shape = data.save_checkpoint(tmp_path / "b.pt", script=module.__name__,
                                 config={"latent_dim": 2}, state_dict=large.state_dict())
    for path in (other, shape):
        with pytest.raises(ValueError, match=path.name):
            module.load_model(path)


def test_device_auto_is_usable_and_unknown_is_refused():
    assert torch.zeros(1, device=data.pick_device()).item() == 0
    with pytest.raises(ValueError, match="abacus"):
        data.pick_device("abacus")


def test_image_grid_puts_every_image_in_its_cell(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data.Figure, "savefig", lambda figure, *a, **k: seen.append(
        figure.axes[0].images[0].get_array()))
    images = torch.rand(2, 3, 28, 28)
    data.image_grid(images, tmp_path / "grid.png", rows=("a", "b"))
    assert seen[0].shape == (60, 90)
    assert torch.equal(torch.as_tensor(np.asarray(seen[0][31:59, 61:89])), images[1, 2])


# ---------------------------------------------------------------- the loss and the models


@each_model
def test_kl_is_that_of_torch_distributions(module):
    torch.manual_seed(0)
    mu, logvar = torch.randn(7, 5), torch.randn(7, 5)
    _, kl = module.elbo_terms(torch.zeros(7, 1, 28, 28), torch.zeros(7, 1, 28, 28), mu, logvar)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1)
    assert torch.allclose(kl, expected, rtol=1e-5)


@each_model
def test_recon_is_minus_log_bernoulli_on_binary_images(module, sample):
    torch.manual_seed(0)
    x, logits = sample.test_images[:20].round(), torch.randn(20, 1, 28, 28)
    recon, _ = module.elbo_terms(logits, x, torch.zeros(20, 2), torch.zeros(20, 2))
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(recon, expected, rtol=1e-5)


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
        log_p = torch.distributions.Bernoulli(logits=model.decode(z, *c), validate_args=False)
        recon.append(-log_p.log_prob(b).flatten(1).sum(1))
        q = torch.distributions.Normal(mu, (logvar / 2).exp())
        kl.append(torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1))
    assert result["recon"] == pytest.approx(torch.cat(recon).mean().item(), rel=1e-5)
    assert result["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5)
    assert result["total"] == result["recon"] + result["kl"]


@each_model
def test_same_seed_same_weights_other_seed_others(module, tiny, capsys):
    def weights(seed):
        torch.manual_seed(seed)
        model = MODELS[module](4)
        extra = {conv_vae: {"warmup_epochs": 1}, beta_vae: {"beta": 2}}.get(module, {})
        module.train(model, tiny, 1, 100, 1e-3, torch.device("cpu"), **extra)
        return torch.cat([p.flatten() for p in model.parameters()])
    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_an_exploding_learning_rate_stops_with_epoch_and_step(tiny, capsys):
    with pytest.raises(ValueError, match=r"epoch 1, step \d+: lower --lr"):
        vae.train(vae.VAE(), tiny, 2, 10, 1e9, torch.device("cpu"))


def test_warmup_goes_from_0_to_1_over_the_stated_steps_and_stays():
    weights = [conv_vae.kl_weight(step, 4) for step in range(7)]
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert conv_vae.kl_weight(0, 0) == 1


def test_warmup_lets_the_kl_grow_first(tiny, capsys):
    kl = {}
    for warmup_epochs in (0, 100):
        torch.manual_seed(0)
        model = conv_vae.ConvVAE(4)
        history = conv_vae.train(model, tiny, 6, 50, 2e-3, torch.device("cpu"), warmup_epochs)
        kl[warmup_epochs] = history[-1]["kl"]
    assert kl[100] > 1.5 * kl[0]


def test_beta_1_is_the_plain_vae_to_the_last_bit(tiny, capsys):
    trained = []
    for model, module, extra in ((vae.VAE(4), vae, ()), (beta_vae.BetaVAE(4), beta_vae, (1,))):
        torch.manual_seed(0)
        model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        module.train(model, tiny, 2, 100, 1e-3, torch.device("cpu"), *extra)
        trained.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


def test_warmup_counts_training_steps_only(tiny, capsys):
    history = conv_vae.train(conv_vae.ConvVAE(2), tiny, 2, 100, 1e-3, torch.device("cpu"), 2)
    assert [w for h in history for w in h["weights"]] == [i / 6 for i in range(6)]


def test_beta_weighs_the_gradient_of_the_kl(tiny, capsys):
    ends = {}
    for beta in (0, 50):
        torch.manual_seed(0)
        model = beta_vae.BetaVAE(4)
        beta_vae.train(model, tiny, 8, 50, 2e-3, torch.device("cpu"), beta)
        ends[beta] = beta_vae.test(model, tiny.test_images)
    assert ends[50]["kl"] < 0.2 * ends[0]["kl"]
    assert ends[50]["recon"] > ends[0]["recon"]


def test_cvae_encoder_and_decoder_each_depend_on_the_label(sample):
    torch.manual_seed(0)
    model, x, y = cvae.CVAE(4).eval(), sample.test_images[:5], sample.test_labels[:5]
    z = torch.randn(5, 4)
    assert not torch.allclose(model.encode(x, y)[0], model.encode(x, (y + 1) % 10)[0])
    assert not torch.allclose(model.decode(z, y), model.decode(z, (y + 1) % 10))
    order = torch.tensor([4, 2, 0, 1, 3])  # permuting the requests permutes the images
    assert torch.allclose(model.decode(z, y)[order], model.decode(z[order], y[order]), atol=1e-5)


def test_a_short_training_beats_the_best_constant_image(sample, capsys):
    p = sample.train_images.mean(0).clamp(1e-4, 1 - 1e-4)  # the best one image for all
    constant = torch.nn.functional.binary_cross_entropy(
        p.expand_as(sample.test_images), sample.test_images, reduction="none").flatten(1).sum(1)
    torch.manual_seed(0)
    model = vae.VAE()
    vae.train(model, sample, 6, 128, 2e-3, torch.device("cpu"))
    learned = vae.test(model, sample.test_images)["total"]
    assert constant.mean() > 350  # so that "well below" means something
    assert learned < constant.mean() - 70


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
    if hasattr(module, "mixed_precision"):
        monkeypatch.setattr(module, "mixed_precision", lambda device: contextlib.nullcontext())
    torch.manual_seed(0)
    trained = MODELS[module](4)
    expected = copy.deepcopy(trained)
    extra = {conv_vae: {"warmup_epochs": 2}, beta_vae: {"beta": 3}}.get(module, {})
    torch.manual_seed(1)
    module.train(trained, tiny, 1, 100, 1e-3, torch.device("cpu"), **extra)
    torch.manual_seed(1)
    for step, batch in enumerate(torch.randperm(300).split(100)):
        x, y = tiny.train_images[batch], given(module, tiny.train_labels[batch])
        mu, logvar = expected.encode(x, *y)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        p = torch.distributions.Bernoulli(logits=expected.decode(z, *y), validate_args=False)
        q = torch.distributions.Normal(mu, (logvar / 2).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
        weight = {conv_vae: step / 6, beta_vae: 3}.get(module, 1)
        loss = (weight * kl.sum() - p.log_prob(x).sum()) / 100
        for parameter, slope in zip(expected.parameters(),
                                    torch.autograd.grad(loss, list(expected.parameters()))):
            parameter.data -= 1e-3 * slope
    for p, q in zip(trained.parameters(), expected.parameters()):
        assert torch.allclose(p, q, atol=2e-5)


@each_model
def test_script_prints_the_test_of_the_test_images(module, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "load", lambda source: tiny)
    flags = ["--betas", "1"] if module is beta_vae else []
    path, = module.main(["--epochs", "1", "--out", str(tmp_path), *flags])
    model, meta = module.load_model(path)
    torch.manual_seed(0)
    expected = module.test(model, tiny.test_images, *given(module, tiny.test_labels))["total"]
    assert meta["metrics"]["total"] == pytest.approx(expected, rel=1e-6)
    assert f"{expected:.2f}" in capsys.readouterr().out


def test_the_reparameterized_gradient_has_the_mean_of_the_score_function_and_less_variance():
    """d/dmu E[(z - 3)^2] = 2 (mu - 3), by two estimators."""
    torch.manual_seed(0)
    mu = torch.full((100_000, 1), 1.0, requires_grad=True)
    logvar = torch.zeros(100_000, 1)
    z = vae.VAE(1).reparameterize(mu, logvar)
    through_z, = torch.autograd.grad((z - 3).pow(2).sum(), mu)
    score = (z - 3).detach().pow(2) * (z - mu).detach()     # f(z) d log q(z) / d mu, sigma = 1
    assert through_z.mean().item() == pytest.approx(-4, abs=0.05)
    assert score.mean().item() == pytest.approx(-4, abs=0.2)
    assert through_z.var() < 0.2 * score.var()


def test_a_decoder_that_ignores_z_ends_in_posterior_collapse(tiny, capsys):
    torch.manual_seed(0)
    model = vae.VAE(4)
    model.decoder[0].weight.requires_grad_(False).zero_()
    vae.train(model, tiny, 25, 20, 3e-3, torch.device("cpu"))
    assert vae.test(model, tiny.test_images)["kl"] < 0.05
    with torch.no_grad():
        assert beta_vae.active_units(model.encode(tiny.test_images)[0]) == 0


def test_a_dimension_that_is_copied_out_of_x_is_active(sample):
    mu = torch.stack([sample.test_images[:, 0, 14, 14], torch.full((2000,), 0.7)], dim=1)
    assert beta_vae.active_units(mu) == 1


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
    one = tiny.test_images[[int((tiny.test_labels == c).nonzero()[0]) for c in range(10)]]
    ten = tiny._replace(train_images=one.repeat(15, 1, 1, 1),
                        train_labels=torch.arange(10).repeat(15))
    ends = {}
    for module, extra in ((conv_vae, {"warmup_epochs": 0}), (cvae, {})):
        torch.manual_seed(0)
        model = MODELS[module](4, channels=16)
        module.train(model, ten, 80, 30, 3e-3, torch.device("cpu"), **extra)
        ends[module] = module.test(model, one, *given(module, torch.arange(10)))
    assert ends[conv_vae]["kl"] > math.log(10) and ends[cvae]["kl"] < 0.6 * ends[conv_vae]["kl"]
    assert ends[cvae]["recon"] < ends[conv_vae]["recon"] + 5


def test_training_on_nan_stops_and_names_the_step(tiny, capsys):
    broken = tiny._replace(train_images=tiny.train_images.clone())
    broken.train_images[7] = math.nan
    with pytest.raises(ValueError, match=r"loss is nan in epoch 1, step \d: lower --lr"):
        vae.train(vae.VAE(2), broken, 1, 100, 1e-3, torch.device("cpu"))


# ---------------------------------------------------------------- what the latent space learned


def test_active_units_counts_dimensions_that_move():
    torch.manual_seed(0)
    mu = torch.randn(1000, 5) * torch.tensor([1, 0.5, 0.09, 0.0, 0.11])
    assert beta_vae.active_units(mu) == 3


def test_analysis_orders_active_dimensions_by_their_kl_which_sum_to_the_kl(sample):
    torch.manual_seed(0)
    model = beta_vae.BetaVAE(6).eval()
    with torch.no_grad():
        model.encoder[-1].weight[:6] *= 30 * torch.tensor([1, 0, 9, 3, 0, 27.0])[:, None]
    numbers, learned = beta_vae.analyse(model, sample, sample.test_images, sample.test_labels)
    _, dimension_kl, active, rho, effect = learned
    assert active == [5, 2, 3, 0] and numbers["active_units"] == 4
    assert rho.shape == effect.shape == (4, 6)
    mu, logvar = model.encode(sample.test_images)
    _, kl = vae.elbo_terms(sample.test_images, sample.test_images, mu, logvar)
    assert dimension_kl.sum().item() == pytest.approx(kl.mean().item(), rel=1e-4)


def test_beaten_is_the_share_of_the_null_that_is_smaller(sample, monkeypatch):
    monkeypatch.setattr(beta_vae, "rotated_gaps", lambda *_: torch.tensor([-1.0, -1.0, -1.0, 2.0]))
    model = beta_vae.BetaVAE(2)
    numbers, _ = beta_vae.analyse(model, sample, sample.test_images, sample.test_labels)
    assert numbers["beaten"] == 0.75 and numbers["null"] == -0.25


def test_analysis_of_a_collapsed_model_finds_nothing(sample):
    model = beta_vae.BetaVAE(3).eval()
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
    numbers, learned = beta_vae.analyse(model, sample, sample.test_images, sample.test_labels)
    assert learned[2] == [] and numbers["gap"] == numbers["null"] == numbers["beaten"] == 0
    assert numbers["probe"] == pytest.approx(0.1, abs=1e-6)   # one class for all images


def test_linear_probe_is_least_squares(sample):
    torch.manual_seed(0)
    mu, y = sample.train_images[::5].flatten(1)[:, 200:260], sample.train_labels[::5]
    test_mu, test_y = sample.test_images.flatten(1)[:, 200:260], sample.test_labels
    a, b = (torch.cat([m, torch.ones(len(m), 1)], 1).double() for m in (mu, test_mu))
    w = torch.linalg.lstsq(a, torch.eye(10, dtype=torch.float64)[y]).solution
    expected = ((b @ w).argmax(1) == test_y).double().mean().item()
    assert beta_vae.linear_probe(mu, y, test_mu, test_y, ridge=1e-9) == pytest.approx(expected)


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
    assert beta_vae.attributes(torch.zeros(1, 1, 28, 28)).isfinite().all()


def test_rank_correlation_is_pearson_of_the_ranks_with_ties_shared():
    a = torch.tensor([[3.0], [1.0], [3.0], [7.0], [5.0]])                   # ranks 2.5 1 2.5 5 4
    b = torch.tensor([[0.1, 1.0], [0.4, 1.0], [0.3, 2.0], [0.9, 2.0], [0.5, 9.0]])
    ranks_a, ranks_b = [2.5, 1, 2.5, 5, 4], ([1, 3, 2, 5, 4], [1.5, 1.5, 3.5, 3.5, 5])
    expected = [abs(np.corrcoef(ranks_a, ranks)[0, 1]) for ranks in ranks_b]
    assert beta_vae.rank_correlation(a, b)[0].tolist() == pytest.approx(expected)
    z = torch.randn(50, 2)
    assert beta_vae.rank_correlation(z, -z.exp()).diagonal().tolist() == pytest.approx([1, 1])


def test_gap_is_one_where_each_attribute_has_its_dimension_and_zero_where_two_share_it():
    assert beta_vae.gap(torch.eye(4)) == 1
    assert beta_vae.gap(torch.ones(4, 4)) == 0
    assert beta_vae.gap(torch.tensor([[0.9, 0.2], [0.4, 0.6]])) == pytest.approx((0.5 + 0.4) / 2)
    assert beta_vae.gap(torch.ones(1, 3)) == 1 and beta_vae.gap(torch.ones(0, 3)) == 0


def test_planted_axes_exceed_every_rotation_and_arbitrary_axes_do_not():
    torch.manual_seed(0)
    z = torch.randn(2000, 4)
    ordered = beta_vae.gap(beta_vae.rank_correlation(z, z.exp()))           # attribute k = exp(z_k)
    assert ordered > 0.9 and beta_vae.rotated_gaps(z, z.exp()).max() < 0.75 * ordered
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q     # by which the axes lose their meaning
    null = beta_vae.rotated_gaps(z @ rotation, z)
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


def test_traversal_effect_finds_the_cause():
    """A decoder in which z_1 alone moves the ink: effect there, none elsewhere."""
    class Decoder:
        def decode(self, z):                             # logits: all pixels as bright as z_1
            return z[:, 1, None, None, None].expand(-1, 1, 28, 28)
    effect = beta_vae.traversal_effect(Decoder(), torch.randn(5, 3), [1, 2], torch.full((6,), 2.0))
    ink = 784 * (torch.tensor(2.0).sigmoid() - torch.tensor(-2.0).sigmoid())
    assert effect.shape == (2, 6) and effect[0, 0].item() == pytest.approx(ink.item() / 2, rel=1e-4)
    assert effect[1].abs().max() < 1e-3


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


# ---------------------------------------------------------------- the classifier


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
    _, judged = classifier.look(model, sample.test_images)
    assert (judged == sample.test_labels).float().mean() >= 0.93
    x = sample.test_images[:20]
    with torch.no_grad():
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-3)
        assert model.features(x).shape == (20, 256)


def test_augmentation_keeps_shape_range_and_varies(sample):
    x = sample.train_images[:64]
    a = classifier.augment(x, torch.Generator().manual_seed(0))
    assert a.shape == x.shape and 0 <= a.min() and a.max() <= 1
    b = classifier.augment(x, torch.Generator().manual_seed(1))
    assert not torch.equal(a, x) and not torch.equal(a, b)
    same = [torch.equal(a[i], x[i]) for i in range(64)]
    assert sum(same) < 10


def test_interrupted_classifier_goes_on_to_the_same_weights(tiny, tmp_path, capsys, monkeypatch):
    def run(path, stop_after=None):
        torch.manual_seed(0)
        model = classifier.FashionResNet18(0.28, 0.35)
        parser = data.Parser("")
        args = parser.parse_args([])
        args.epochs, args.batch_size, args.lr, args.seed = 2, 100, 0.05, 0
        real, saves = classifier.save_checkpoint, []

        def save(*a, **k):
            saves.append(real(*a, **k))
            if len(saves) == stop_after:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(classifier, "save_checkpoint", save)
            classifier.train(model, tiny, args, torch.device("cpu"), path, {"x": 1})
        return model
    whole = run(tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.pt", stop_after=1)
    resumed = run(tmp_path / "b.pt")
    for p, q in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(p, q)


# ---------------------------------------------------------------- the protocol


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


def test_a_judge_with_other_classes_or_without_its_normalisation_is_refused(judge, tmp_path):
    state = judge[0].state_dict()
    nine = state | {"head.weight": state["head.weight"][:9], "head.bias": state["head.bias"][:9]}
    bare = {name: value for name, value in state.items() if name not in ("mean", "std")}
    for wrong, reason in ((nine, "head.weight.*9"), (bare, "mean")):
        path = data.save_checkpoint(tmp_path / "judge.pt", script="classifier", config={},
                                    state_dict=wrong)
        with pytest.raises(ValueError, match=f"judge.pt: unusable.*{reason}.*restore or retrain"):
            classifier.load_model(path)


def test_images_learned_by_heart_are_nearer_to_training_than_to_validation():
    torch.manual_seed(0)
    train, val, new = torch.randn(4000, 5), torch.randn(400, 5), torch.randn(2000, 5)
    chance = 4000 / 4400
    fresh = evaluate.nearness(new, train, val)
    assert fresh["nearer_train"] == pytest.approx(chance, abs=0.03)
    assert fresh["nearest_train"] == pytest.approx(fresh["nearest_val"], rel=0.1)
    copied = evaluate.nearness(train[-2000:] + 0.001, train, val)  # wherever in the training set
    assert copied["nearer_train"] == 1 > fresh["nearer_train"]


@pytest.mark.parametrize("images", [torch.full((2, 1, 28, 28), math.nan), torch.zeros(2, 784),
                                    torch.full((2, 1, 28, 28), -0.4), 2 * torch.ones(2, 1, 28, 28)])
def test_judge_refuses_what_is_not_a_raw_image(images):
    with pytest.raises(ValueError, match="images"):
        evaluate.look(classifier.FashionResNet18(), images)


def test_controllability_is_a_share_in_all_and_by_class():
    asked = torch.arange(20) % 10
    judged = torch.where(asked == 3, 4, asked)
    share, by_class = evaluate.controllability(judged, asked)
    assert share == pytest.approx(0.9)
    assert by_class == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="0 to 9"):
        evaluate.controllability(judged, asked + 1)


def test_batches_keep_the_order_and_give_each_image_its_label():
    x, y = torch.arange(2300.0), torch.arange(2300) % 10
    both = evaluate.in_batches(lambda a, b: a * 10 + b, torch.device("cpu"), x, y)
    assert torch.equal(both, x * 10 + y)


def test_log_joint_is_that_of_torch_distributions():
    torch.manual_seed(0)
    z, means, factors = torch.randn(9, 3), torch.randn(4, 3), torch.randn(4, 3, 3).tril()
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = torch.stack([weights[k].log() + torch.distributions.MultivariateNormal(
        means[k], scale_tril=factors[k]).log_prob(z) for k in range(4)])
    assert torch.allclose(evaluate.log_joint(z.T, weights, means, factors), expected, atol=1e-4)


def test_em_finds_a_planted_mixture_and_its_likelihood_never_falls():
    torch.manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    z = torch.cat([m + torch.randn(n, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.8]])
                   for m, n in zip(means, (1000, 2000, 3000))])
    weights, found, factors, history = evaluate.fit_gmm(z.double(), 3, ridge=1e-6)
    assert all(b >= a - 1e-9 for a, b in zip(history, history[1:]))
    order = weights.argsort()
    assert torch.allclose(weights[order], torch.tensor([1, 2, 3]).double() / 6, atol=0.02)
    assert torch.allclose(found[order].float(), means, atol=0.1)
    drawn = evaluate.sample_gmm(weights, found, factors, 50_000).float()
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.05)
    assert torch.allclose(drawn.T.cov(), z.T.cov(), atol=0.15)


def test_em_with_one_component_is_the_sample_mean_and_covariance():
    torch.manual_seed(0)
    z = torch.randn(500, 4) @ torch.randn(4, 4) + 3
    _, mean, factor, _ = evaluate.fit_gmm(z, 1, iterations=1, ridge=0)
    assert torch.allclose(mean[0].float(), z.mean(0), atol=1e-5)
    assert torch.allclose((factor[0] @ factor[0].T).float(), z.T.cov(correction=0), atol=1e-4)


def test_em_survives_more_components_than_clusters():
    torch.manual_seed(0)
    z = torch.cat([torch.zeros(40, 3), torch.ones(40, 3)]) + 1e-3 * torch.randn(80, 3)
    weights, means, factors, history = evaluate.fit_gmm(z, 30, iterations=30)
    for tensor in (weights, means, factors, torch.tensor(history)):
        assert tensor.isfinite().all()
    assert weights.sum() == pytest.approx(1)
    assert len(means.unique(dim=0)) == 30, "two components seeded anew at the same point"


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_importance_weighted_bounds_are_ordered_and_close_in_on_the_true_likelihood(latent_dim,
                                                                                    sample):
    torch.manual_seed(3)
    model, x = vae.VAE(latent_dim, hidden=16), sample.test_images[:6]
    for p in model.decoder.parameters():
        p.data *= 3  # so that z matters and q is far from the true posterior
    with torch.no_grad():  # log p(x) by quadrature over the latent space
        axis = torch.linspace(-8, 8, {1: 3201, 2: 129}[latent_dim])
        grid = torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim)
        log_prior = torch.distributions.Normal(0, 1).log_prob(grid).sum(1)
        log_cell = latent_dim * math.log(axis[1] - axis[0])
        logits = model.decode(grid)
        truth = torch.stack([(log_prior - vae.elbo_terms(logits, i.expand_as(logits), grid, grid)[0]
                              ).double().logsumexp(0) + log_cell for i in x[:, None]])
    bounds = evaluate.importance_weighted_bound(model, vae.elbo_terms, x, draws=5000,
                                                counts=(1, 10, 100, 5000))
    assert bounds[1] > bounds[10] > bounds[100] > bounds[5000] - 1e-9
    assert bounds[1] - bounds[5000] > 0.5  # the bound was loose enough for this to mean something
    assert bounds[5000] == pytest.approx(-truth.mean().item(), abs=0.05)
    # K = 1 is the negative ELBO, with the KL by Monte Carlo instead of in closed form
    elbo = np.array([vae.test(model, x)["total"] for _ in range(1000)])
    error = elbo.std() / 1000 ** 0.5
    assert bounds[1] == pytest.approx(elbo.mean(), abs=4 * error)
    assert 4 * error < 0.1 * (bounds[1] - bounds[5000])


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


def test_seeds_are_averaged_with_n_minus_1():
    rows = [{"model": "m", "latent_dim": 2, "params": 5, "kl": k, "fid_gmm": None,
             "by": [k, 2 * k]} for k in (1.0, 2.0, 6.0)]
    row = evaluate.average(rows)
    assert row["kl"] == {"mean": 3.0, "std": pytest.approx(np.std([1, 2, 6], ddof=1)), "n": 3}
    assert row["fid_gmm"] is None and row["by"][1]["mean"] == 6 and row["params"] == 5
    assert evaluate.average(rows[:1]) == rows[0]


def test_verdict_ranks_and_calls_noise_what_is_within_the_spread():
    """b leads a by 3, a leads c by 1, all with a spread of 1; c stands for a CVAE."""
    def row(name, figure, std):
        value = {"mean": figure, "std": std, "n": 3} if std else figure
        keys = "total", "fid_prior", "fid_gmm", "fid_recon"
        return {"model": name} | dict.fromkeys(keys, value)
    rows = [row("a", 8.0, 1.0), row("b", 5.0, 1.0), row("c", 9.0, 1.0)]
    rows[2]["total_plus_log10"] = {"mean": 11.0, "std": 1.0, "n": 3}
    sweep = [row(f"β-VAE β={beta}", 3.0 - beta, 0.3) | {"gap": 0.1} for beta in (1, 2)]
    lines = evaluate.verdict([*rows, *sweep])
    assert lines[1] == "- total (CVAE: + log 10): b 5.00 < a 8.00 < c 11.00"
    assert lines[2:5] == [f"- FID {name}: b 5.00 < a 8.00 ≈ c 9.00"
                          for name in ("prior", "ex-post", "recon")]
    assert lines[5] == "- total: β-VAE β=2 1.00 < β=1 2.00"
    one_seed = [row(r["model"], r["total"]["mean"], 0) for r in rows] + sweep
    assert evaluate.verdict(one_seed)[2] == "- FID prior: b 5.00 ≈ a 8.00 ≈ c 9.00"


# ---------------------------------------------------------------- faults


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


def test_wrong_bytes_of_the_right_length_are_refused(monkeypatch, small_files, server):
    def turned(path):
        good = small_files[path[:-3]]
        return 200, good[:200] + bytes([good[200] ^ 1]) + good[201:]
    monkeypatch.setattr(data, "MIRRORS", (server(turned),))
    with pytest.raises(ValueError, match="network"):
        data.load("full")
    assert not Path("fashion-mnist").exists() or not list(Path("fashion-mnist").iterdir())


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


def test_ctrl_c_in_training_is_one_line_and_leaves_nothing(tmp_path):
    flags = "['--data', 'sample', '--epochs', '500', '--out', 'runs']"
    code = ("import signal, vae\n"                      # a shell's background jobs ignore Ctrl-C
            f"signal.signal(signal.SIGINT, signal.default_int_handler)\nvae.main({flags})")
    status, error = interrupt(tmp_path, signal.SIGINT, code, "epoch   1")
    assert status == 130
    assert error.count("\n") == 1 and error.startswith("error: interrupted")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path):
    code = ("import data, pathlib, torch\n"
            "path = pathlib.Path('x.pt')\n"
            "for k in range(10**6):\n"
            "    data.save_checkpoint(path, k=k, weights=torch.full((300_000,), float(k)))\n"
            "    print('saved', k)\n")
    for wait_for in ("saved 0", "saved 3", "saved 8"):
        status, _ = interrupt(tmp_path, signal.SIGKILL, code, wait_for)
        assert status == -signal.SIGKILL
        saved = data.read_checkpoint(tmp_path / "x.pt")
        assert (saved["weights"] == saved["k"]).all() and saved["k"] >= int(wait_for.split()[1])


WORDS = ("--epochs", "--batch-size", "--lr", "--latent-dim", "--seed", "--device", "--data",
         "--out", "--betas", "--warmup-epochs", "--seeds", "--split", "--image",
         "--reuse", "--weight-decay", "--deep", "-h ", "--", "-", "", " ", "0", "1", "-1", "1e400",
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
    monkeypatch.setattr(module, "load", load)
    monkeypatch.chdir(tmp_path)
    refused = 0
    for _ in range(500):
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


# ---------------------------------------------------------------- the house


@pytest.mark.parametrize("name", ["elbo_terms", "plot_curves", "show", "pictures", "test",
                                  "mixed_precision"])
def test_what_is_the_same_in_several_scripts_is_word_for_word_the_same(name):
    different = {"pictures": (beta_vae, cvae), "test": (cvae,)}.get(name, ())
    texts = [inspect.getsource(getattr(module, name)) for module in (*MODELS, classifier)
             if hasattr(module, name) and module not in different]
    assert len(texts) >= 2 and len(set(texts)) == 1


def test_classes_that_are_the_same_in_several_scripts_are_word_for_word_the_same():
    assert len({inspect.getsource(c.reparameterize) for c in MODELS.values()}) == 1
    assert inspect.getsource(conv_vae.Residual) == inspect.getsource(cvae.Residual)
    assert inspect.getsource(beta_vae.BetaVAE).replace("Beta", "").replace("10", "20") == \
        inspect.getsource(vae.VAE).replace("10", "20")


@each_model
def test_model_and_loss_work_pasted_alone_into_a_notebook(module, sample):
    helpers = [module.Residual] if hasattr(module, "Residual") else []
    names = {"torch": torch}
    for thing in (*helpers, MODELS[module], module.elbo_terms):
        exec(inspect.getsource(thing), names)
    x, y = sample.test_images[:4], given(module, sample.test_labels[:4])
    logits, mu, logvar = names[MODELS[module].__name__]()(x, *y)
    assert names["elbo_terms"](logits, x, mu, logvar)[0].shape == (4,)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_starts_with_the_lesson(script):
    text = run(HERE, script, "--help")
    assert f"python {script}.py" in text and "--out" in text


def test_scripts_stay_short_and_narrow():
    for name in SCRIPTS:
        lines = (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= {"evaluate": 400}.get(name, 300), name
        assert max(map(len, lines)) <= 100, name
    assert len((HERE / "README.md").read_text(encoding="utf-8").splitlines()) < 300


# ---------------------------------------------------------------- each script as a process


def run(folder, script, *flags):
    """python <script>.py in the folder, without network or display; its standard output."""
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "utf-8",
                                "https_proxy": "http://127.0.0.1:9", "PYTHONPATH": ""}
    environment.pop("DISPLAY", None)
    done = subprocess.run([sys.executable, f"{script}.py", *flags], cwd=folder, env=environment,
                          capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


FIGURES = {
    "data": ("samples", "distributions"),
    "vae": ("reconstructions", "samples", "curves"),
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
        flags = () if script == "data" else ("--epochs", "1")
        texts[script] = run(alone, script, "--data", "sample", "--out", str(out), *flags)
    return out, texts


@pytest.mark.parametrize("script", FIGURES)
def test_script_runs_alone_with_data_py_and_the_sample(script, study):
    out, texts = study
    assert "data sample train: 5,000 images, entropy floor 187.5" in texts[script]
    names = [path.name for path in out.glob(f"{script}*.png")]
    for figure in FIGURES[script]:
        assert any(name.endswith(f"-{figure}.png") for name in names), (figure, names)
    if script != "data":
        assert re.search(r"^test.*sample", texts[script], re.MULTILINE)
        assert all("sample" in path.name for path in out.glob("*.pt"))
    assert not list(out.glob("*.part")) and not list(out.glob("*.probe"))


@pytest.fixture(scope="session")
def evaluated(study, sample):
    """python evaluate.py --deep after the study, on 1,000 / 500 / 667 of its images: the results,
    what was printed, the folder."""
    small = {f"{split}_{kind}": getattr(sample, f"{split}_{kind}")[::step]
             for split, step in (("train", 5), ("val", 2), ("test", 3))
             for kind in ("images", "labels")}
    floor = sample.floor | {"test": data.pixel_entropy(small["test_images"]).mean().item()}
    small = sample._replace(**small, floor=floor)
    out, _ = study
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as text:
        for module in (evaluate, *MODELS):
            patch.setattr(module, "load", lambda source: small)
        patch.setattr(evaluate, "SIZES", (300, 667, 1000))
        with contextlib.redirect_stdout(text):
            evaluate.main(["--data", "sample", "--epochs", "1", "--out", str(out), "--deep"])
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return results, text.getvalue(), out


def test_evaluate_reuses_the_checkpoints_and_its_table_adds_up(evaluated):
    results, text, _ = evaluated
    assert " left" not in text, "trained again although the checkpoints were there"
    assert results["data"] == "sample" and results["split"] == "test" and results["seeds"] == [0]
    sha = hashlib.sha256(classifier.PRETRAINED.read_bytes()).hexdigest()
    assert results["judge_sha256"] == sha
    names = [row["model"] for row in results["rows"]]
    sweep = [f"β-VAE β={beta:g}" for beta in BETAS]
    assert names == ["MLP VAE", "Conv VAE", *sweep, "CVAE"]
    for row in results["rows"]:
        assert row["recon"] + row["kl"] == pytest.approx(row["total"], abs=1e-9)
        assert row["recon"] - results["floor"] == pytest.approx(row["excess"], abs=1e-9)
        assert row["fid_prior"] > results["yardsticks"]["fid_sampling_floor"]
        assert f"{row['total']:.2f}" in text
    last = results["rows"][-1]
    assert last["total_plus_log10"] == pytest.approx(last["total"] + math.log(10))
    assert f"CVAE {last['total_plus_log10']:.2f}" in text
    table = text[text.index("model "):].split("\n\n")[0].splitlines()
    assert len(table) == 1 + 3 + len(BETAS)
    tables = text[text.index("model "):text.index("What this says")].splitlines()
    assert max(map(len, tables)) <= 100
    for row in (results["rows"][0], results["rows"][1], last):
        bounds = [row[f"iw_{k}"] for k in evaluate.DRAWS]
        assert bounds == sorted(bounds, reverse=True) and bounds[-1] > results["floor"] - 20
    assert last["swap_asked"] + last["swap_kept"] <= 1


def test_evaluate_deep_adds_fid_at_several_n_other_mixtures_and_the_nearest_images(evaluated):
    results, text, out = evaluated
    for row in (results["rows"][0], results["rows"][1], results["rows"][-1]):
        assert row["fid_667"] == row["fid_prior"] != row["fid_300"] and "fid_1000" not in row
        assert 0 < row["nearer_train"] < 1
        assert f"{row['nearer_train']:.1%}" in text
    for row in results["rows"][:2]:
        assert len({row["fid_gmm"], row["fid_gmm_1"], row["fid_gmm_10"]}) == 3
    assert (out / "results-sample-test-seeds0-epochs1-deep.png").exists()
    assert len(list(out.glob("*-nearest.png"))) == 3


@each_model
def test_evaluate_repeats_the_test_that_each_script_made_to_the_last_digit(module, study, sample):
    out, _ = study
    paths = list(out.glob(f"{module.__name__}-*sample-*.pt"))
    assert len(paths) == (7 if module is beta_vae else 1)
    for path in paths:
        model, meta = module.load_model(path)
        torch.manual_seed(meta["seed"])
        again = module.test(model, sample.test_images, *given(module, sample.test_labels))
        assert again["total"] == pytest.approx(meta["metrics"]["total"], rel=1e-6)


def test_evaluate_refuses_a_checkpoint_of_another_study(tmp_path, study, capsys):
    runs, _ = study
    path = next(runs.glob("vae-sample-*.pt"))
    meta = data.read_checkpoint(path)
    meta["config"]["epochs"] = 7
    data.save_checkpoint(tmp_path / path.name, **meta)
    before = (tmp_path / path.name).read_bytes()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--data", "sample", "--epochs", "1", "--out", str(tmp_path)])
    assert stop.value.code == 2 and path.name in capsys.readouterr().err
    assert (tmp_path / path.name).read_bytes() == before


def test_conv_vae_shows_itself_beside_the_baseline(study, capsys):
    out, _ = study
    path, = out.glob("conv_vae-sample-*.pt")
    meta = data.read_checkpoint(path)
    baseline, = out.glob("vae-sample-*.pt")
    conv_vae.compare(meta["metrics"], meta["shown"], path, baseline)
    mlp = data.read_checkpoint(baseline)["metrics"]
    expected = f"total: MLP {mlp['total']:.2f}, conv {meta['metrics']['total']:.2f}"
    assert expected in capsys.readouterr().out
    assert path.with_name(f"{path.stem}-beside-mlp.png").exists()
    conv_vae.compare(meta["metrics"], meta["shown"], path, out / "vae-nowhere.pt")
    assert "run vae.py" in capsys.readouterr().out
    older = data.save_checkpoint(out / "vae-older.pt", script="vae", metrics=mlp)
    conv_vae.compare(meta["metrics"], meta["shown"], path, older)
    older.unlink()  # other tests count what is in this folder
    assert "run vae.py" in capsys.readouterr().out


def test_classifier_trains_and_measures_the_reloaded_file(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "load", lambda source: tiny)
    path, = classifier.main(["--epochs", "1", "--out", str(tmp_path)])
    model, meta = classifier.load_model(path)
    _, judged = classifier.look(model, tiny.test_images)
    expected = (judged == tiny.test_labels).double().mean()
    assert f"test accuracy {expected:.2%}" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()
    assert meta["state_dict"]["head.weight"].dtype == torch.float16
    assert not list(tmp_path.glob("*resume*"))


def test_readme_shows_the_recorded_table():
    recorded = (HERE / "results" / "results.md").read_text(encoding="utf-8")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", recorded, re.MULTILINE)
    assert len(tables) == 4                             # the fourth, of --deep, stands there alone
    assert all(table in readme for table in tables[:3])
    results = json.loads((HERE / "results" / "results.json").read_text(encoding="utf-8"))
    assert results["data"] == "full" and results["split"] == "test"
    assert recorded == "\n".join(evaluate.report(results, markdown=True)) + "\n"
    for line in evaluate.verdict(results["rows"]):
        assert line in readme
    totals = {row["model"]: row["total"]["mean"] for row in results["rows"]}
    assert totals["Conv VAE"] < totals["MLP VAE"] and results["seeds"] == [0, 1, 2]


# ---------------------------------------------------------------- python test_all.py --mutants

FOUR = ("vae", "conv_vae", "beta_vae", "cvae")
# a mistake: the files it is planted in, the text as it is, the text with the mistake in it, and
# the test that has to fail for it. Whatever stands in several files is replaced in all of them, so
# that the tests of equal lines see nothing.
MUTANTS = {
    "recon averaged over pixels": (
        FOUR, "recon.flatten(1).sum(1)", "recon.flatten(1).mean(1)",
        "test_recon_is_minus_log_bernoulli_on_binary_images"),
    "sigmoid taken twice": (
        FOUR, "binary_cross_entropy_with_logits(logits, x,",
        "binary_cross_entropy_with_logits(logits.sigmoid(), x,",
        "test_recon_is_minus_log_bernoulli_on_binary_images"),
    "KL without its 1/2": (
        FOUR, "kl = 0.5 * (mu", "kl = 1.0 * (mu", "test_kl_is_that_of_torch_distributions"),
    "KL without mu^2": (
        FOUR, "(mu.pow(2) + logvar.exp()", "(logvar.exp()",
        "test_kl_is_that_of_torch_distributions"),
    "KL with the sign of log sigma^2 turned": (
        FOUR, "logvar.exp() - logvar - 1).sum(1)", "logvar.exp() + logvar - 1).sum(1)",
        "test_kl_is_that_of_torch_distributions"),
    "KL averaged over latents": (
        FOUR, "- logvar - 1).sum(1)", "- logvar - 1).mean(1)",
        "test_kl_is_that_of_torch_distributions"),
    "log sigma^2 taken for sigma": (
        FOUR, "mu + torch.exp(0.5 * logvar) * eps", "mu + logvar * eps",
        "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    "sigma^2 taken for sigma": (
        FOUR, "torch.exp(0.5 * logvar) * eps", "torch.exp(logvar) * eps",
        "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    "uniform instead of normal noise": (
        FOUR, "eps = torch.randn_like(mu)", "eps = torch.rand_like(mu)",
        "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    "no noise": (
        FOUR, "return mu + torch.exp(0.5 * logvar) * eps", "return mu",
        "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    "one noise for the whole batch": (
        FOUR, "eps = torch.randn_like(mu)", "eps = torch.randn_like(mu[:1])",
        "test_reparameterized_z_has_the_right_mean_std_and_gradient"),
    "posterior mean reported": (
        FOUR, "z = self.reparameterize(mu, logvar)",
        "z = self.reparameterize(mu, logvar) if self.training else mu",
        "test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight"),
    "return inside the test loop": (
        FOUR, "    recon, kl = (sums / len(images)).tolist()\n    return {",
        "        recon, kl = (sums / len(images)).tolist()\n        return {",
        "test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight"),
    "warm-up left on at evaluation": (
        ("conv_vae",), 'return {"recon": recon, "kl": kl, "total": recon + kl}',
        'kl *= kl_weight(len(images), 1000)\n    return {"recon": recon, "kl": kl, '
        '"total": recon + kl}',
        "test_test_loop_is_a_sample_estimate_over_all_images_at_full_kl_weight"),
    "warm-up that never ends": (
        ("conv_vae",), "min(1.0, step / warmup_steps)", "step / (step + warmup_steps)",
        "test_warmup_goes_from_0_to_1_over_the_stated_steps_and_stays"),
    "gradients never zeroed": (
        FOUR, "            optimizer.zero_grad()\n", "",
        "test_a_training_step_follows_the_gradient_of_this_batch_alone"),
    "tested on the training images": (
        FOUR, "test(model, data.test_images.to(device)", "test(model, data.train_images.to(device)",
        "test_script_prints_the_test_of_the_test_images"),
    "beta left out of the loss": (
        ("beta_vae",), "(recon + beta * kl).mean()", "(recon + kl).mean()",
        "test_beta_weighs_the_gradient_of_the_kl"),
    "active units by standard deviation": (
        ("beta_vae",), "mu.var(0) > 0.01", "mu.std(0) > 0.01",
        "test_active_units_counts_dimensions_that_move"),
    "probe without its constant": (
        ("beta_vae",), "(0, 1), value=1.0)", "(0, 1), value=0.0)",
        "test_linear_probe_is_least_squares"),
    "ranks without ties": (
        ("beta_vae",), "torch.searchsorted(ordered, columns) + torch.searchsorted",
        "torch.searchsorted(ordered, columns) + 0 * torch.searchsorted",
        "test_rank_correlation_is_pearson_of_the_ranks_with_ties_shared"),
    "beaten counted the wrong way round": (
        ("beta_vae",), "(null < gap(rho))", "(null > gap(rho))",
        "test_beaten_is_the_share_of_the_null_that_is_smaller"),
    "lower half taken for the upper": (
        ("beta_vae",), "x[:, :14].sum((1, 2)) / ink", "x[:, 14:].sum((1, 2)) / ink",
        "test_attributes_of_a_drawn_rectangle"),
    "gap to the smallest instead of the next": (
        ("beta_vae",), "(largest - second).mean()", "(largest - rho.min(0).values).mean()",
        "test_gap_is_one_where_each_attribute_has_its_dimension_and_zero_where_two_share_it"),
    "null of stretched instead of rotated codes": (
        ("beta_vae",), "torch.linalg.qr(torch.randn(d, d, generator=rng)).Q",
        "torch.randn(d, d, generator=rng)", "test_the_null_only_rotates"),
    "effect not in standard deviations": (
        ("beta_vae",), "(after - before).mean(0) / spread", "(after - before).mean(0)",
        "test_traversal_effect_finds_the_cause"),
    "one-hot shifted by one": (
        ("cvae",), "one_hot(y, 10).to(z.dtype)", "one_hot((y + 1) % 10, 10).to(z.dtype)",
        "test_cvae_gives_each_label_its_own_input"),
    "decoder ignores y": (
        ("cvae",), "torch.cat([z, label], dim=1)", "torch.cat([z, 0 * label], dim=1)",
        "test_cvae_encoder_and_decoder_each_depend_on_the_label"),
    "encoder ignores y": (
        ("cvae",), "torch.cat([patches, planes], dim=1)", "torch.cat([patches, 0 * planes], dim=1)",
        "test_cvae_encoder_and_decoder_each_depend_on_the_label"),
    "training and validation overlap": (
        ("data",), "np.setdiff1d(np.arange(len(labels)), val)", "np.arange(len(labels))",
        "test_split_is_stratified_disjoint_and_stable"),
    "pixels divided by 256": (
        ("data",), "/ np.float32(255)", "/ np.float32(256)",
        "test_sample_is_balanced_raw_and_small"),
    "pixels standardised": (
        ("data",), "torch.from_numpy(a[:, None] / np.float32(255))",
        "torch.from_numpy((a[:, None] / np.float32(255) - 0.286) / 0.353).float()",
        "test_sample_is_balanced_raw_and_small"),
    "normalised twice for the classifier": (
        ("classifier",), "self.stem((images - self.mean) / self.std)",
        "self.stem(((images - self.mean) / self.std - self.mean) / self.std)",
        "test_normalisation_is_inside_and_applied_once"),
    "never normalised for the classifier": (
        ("classifier",), "self.stem((images - self.mean) / self.std)", "self.stem(images)",
        "test_normalisation_is_inside_and_applied_once"),
    "classifier left in training mode": (
        ("classifier",), "    judge.eval()\n", "    judge.train()\n",
        "test_pretrained_judge_is_accurate_small_and_batch_independent"),
    "covariance over n": (
        ("evaluate",), "a.T.cov(), b.T.cov()", "a.T.cov(correction=0), b.T.cov(correction=0)",
        "test_fid_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric"),
    "a ridge in the FID": (
        ("evaluate",), "values, vectors = torch.linalg.eigh(cov_a)",
        "cov_a = cov_a + 1e-3 * torch.eye(len(cov_a))\n"
        "    values, vectors = torch.linalg.eigh(cov_a)",
        "test_fid_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric"),
    "FID without its means": (
        ("evaluate",), "shift @ shift + cov_a", "cov_a",
        "test_fid_of_identical_sets_is_0_and_of_a_shift_its_square"),
    "FID without the root": (
        ("evaluate",), "root_a @ cov_b @ root_a).clamp(min=0).sqrt()",
        "root_a @ cov_b @ root_a).clamp(min=0)",
        "test_fid_of_scaled_axes_is_the_diagonal_closed_form"),
    "log-mean-exp without the mean": (
        ("vae",), ".logsumexp(2) - math.log(k)", ".logsumexp(2)",
        "test_importance_weighted_bounds_are_ordered_and_close_in_on_the_true_likelihood"),
    "importance weights without p(z) and q(z)": (
        ("vae",), "log_w.append(log_ratio - recon)", "log_w.append(-recon)",
        "test_importance_weighted_bounds_are_ordered_and_close_in_on_the_true_likelihood"),
    "EM without its weights": (
        ("evaluate",), "rows.append(weight.log() - log_norm", "rows.append(-log_norm",
        "test_log_joint_is_that_of_torch_distributions"),
    "one seed is taken for no spread": (
        ("evaluate",), 'row.get(f"{key}_std", math.inf)', 'row.get(f"{key}_std", 0.0)',
        "test_verdict_ranks_and_calls_noise_what_is_within_the_spread"),
    "spread over n seeds": (
        ("evaluate",), "/ (len(values) - 1))", "/ len(values))",
        "test_seeds_are_averaged_with_n_minus_1"),
}


def test_every_mutant_still_finds_its_line_and_its_test():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert f"plants {len(MUTANTS)} mistakes" in " ".join(readme.split())
    assert all(name in globals() for name in re.findall(r"`(test_\w+)`", readme))
    for name, (files, text, mistake, test) in MUTANTS.items():
        assert text != mistake and test in globals(), name
        for file in files:
            assert text in (HERE / f"{file}.py").read_text(encoding="utf-8"), (name, file)


def pytest_in(folder, tests):
    """Run the named tests in a folder with a copy of the sources; the completed process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line",
               *(f"test_all.py::{test}" for test in tests)]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=600,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def kill_mutants(record):
    """Plant each mistake in a copy of the sources; its test must fail there, by an assertion: the
    copy runs, and is wrong. What was caught before, in the same sources, is not tried again."""
    sources = [HERE / f"{name}.py" for name in (*SCRIPTS, "test_all")]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    done = json.loads(record.read_text()) if record.exists() else {}
    done = done if done.get("sources") == version else {"sources": version, "caught": {}}
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for path in sources:
            shutil.copy(path, folder)
        shutil.copytree(HERE / "assets", folder / "assets")
        clean = pytest_in(folder, sorted({test for *_, test in MUTANTS.values()}))
        if clean.returncode:
            sys.exit(f"{clean.stdout}\nerror: these tests fail without any mutant; mend them first")
        for name, (files, text, mistake, test) in MUTANTS.items():
            if name not in done["caught"]:
                for file in files:
                    source = (HERE / f"{file}.py").read_text(encoding="utf-8")
                    (folder / f"{file}.py").write_text(source.replace(text, mistake),
                                                       encoding="utf-8")
                found = re.search(r"^.*(?:AssertionError|assert ).*$",
                                  pytest_in(folder, [test]).stdout, re.MULTILINE)
                for file in files:
                    shutil.copy(HERE / f"{file}.py", folder)
                if found:
                    done["caught"][name] = test
                    data.write_atomically(record, lambda f: f.write(json.dumps(done).encode()))
                else:
                    survivors.append(name)
            verdict = "caught  " if name in done["caught"] else "SURVIVED"
            print(verdict, f"{name}: {test}", flush=True)
    print(f"{len(MUTANTS)} mutants, {len(survivors)} survivors (kept in {record})")
    return survivors


if __name__ == "__main__":
    if sys.argv[1:] != ["--mutants"]:
        data.fail("python -m pytest test_all.py runs the tests, python test_all.py --mutants shows"
                  " that they catch what they should")
    sys.exit(bool(kill_mutants(HERE / "runs" / "mutants.json")))
