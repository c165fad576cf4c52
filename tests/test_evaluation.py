"""Features, probes, `clae-fast evaluate` and export, each against an independent way."""

import argparse
import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clae_fast import convert_dual_batchnorm
from clae_fast.pretraining import (
    ConfigError,
    ContrastiveModel,
    PretrainConfig,
    ResidualEncoder,
    encode_images,
    evaluate_cli,
    pixel_features,
    pretrain,
    weighted_knn,
    write_result,
)
from clae_fast.pretraining import export as export_module
from clae_fast.pretraining.evaluate import evaluate
from clae_fast.pretraining.export import check_export, export_encoder
from clae_fast.pretraining.linear_probe import adam_probe, logistic_probe
from clae_fast.pretraining.probe import encode_both, evaluation_view

MEAN, STD = (0.1,), (0.3,)


def clouds(count, classes=4, width=6, spread=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=g)
    return centres[labels] + spread * torch.randn(count, width, generator=g), labels


# --- features ---


def test_both_features_come_from_one_pass():
    encoder = ResidualEncoder(width=4).train()
    images = torch.randint(0, 256, (13, 1, 28, 28), dtype=torch.uint8)
    seen = 0

    def count(module, args):
        nonlocal seen
        seen += len(args[0])

    handle = encoder.backbone.register_forward_pre_hook(count)
    h, z = encode_both(encoder, images, MEAN, STD, batch_size=5)
    handle.remove()
    assert seen == 13
    assert encoder.training
    encoder.eval()
    x = (images.float() / 255 - MEAN[0]) / STD[0]
    torch.testing.assert_close(h, encoder.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z, encoder(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(h, encode_images(encoder, images, MEAN, STD, batch_size=5))


def test_images_of_many_sizes():
    encoder = ResidualEncoder(3, width=4).eval()
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in
              ((32, 32), (64, 64), (50, 90), (90, 50))]  # fmt: skip
    h = encode_images(encoder, images, (0.5,) * 3, (0.5,) * 3, image_size=32, batch_size=3)
    views = torch.stack([evaluation_view(x.float() / 255, 32) for x in images])
    assert views.shape == (4, 3, 32, 32)
    torch.testing.assert_close(h, encoder.encode((views - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
    assert torch.equal(views[0], images[0].float() / 255)
    whole = F.interpolate(images[1].float()[None] / 255, (32, 32), mode="bilinear", antialias=True)[
        0
    ]
    torch.testing.assert_close(views[1], whole, rtol=1e-4, atol=1e-5)
    # A square of colour in the middle of a wide image stays in the middle.
    wide = torch.zeros(3, 40, 100)
    wide[:, 15:25, 45:55] = 1
    view = evaluation_view(wide, 32)
    assert view[:, 12:20, 12:20].mean() > 0.5
    assert view[:, :, :8].max() < 1e-3


def test_pixel_features_of_a_list():
    images = [torch.full((3, 20, 30), v, dtype=torch.uint8) for v in (0, 255)]
    features = pixel_features(images)
    assert features.shape == (2, 3 * 32 * 32)
    assert torch.equal(features.mean(1), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("k", "sigma"), [(1, 0.1), (7, 0.5), (500, 0.07)])
def test_knn_against_a_loop(k, sigma):
    (train, y), (test, target) = clouds(60, spread=3), clouds(37, spread=3, seed=1)
    right = 0
    for q, label in zip(test.double(), target.tolist(), strict=True):
        cosines = [float(q @ x / (q.norm() * x.norm())) for x in train.double()]
        nearest = sorted(range(60), key=lambda n: -cosines[n])[:k]
        votes = [0.0] * 4
        for n in nearest:
            votes[int(y[n])] += math.exp(cosines[n] / sigma)
        right += votes.index(max(votes)) == label
    assert weighted_knn(train, y, test, target, k=k, sigma=sigma, chunk=10) == right / 37
    assert 0.2 < right / 37 < 1


# --- probes ---


def test_logistic_probe_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    (x, y), (xt, yt) = clouds(200, spread=2), clouds(150, spread=2, seed=1)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    model = LogisticRegression(C=0.5, max_iter=1000)
    model.fit(((x.double() - mean) / std).numpy(), y.numpy())
    expected = model.score(((xt.double() - mean) / std).numpy(), yt.numpy())
    result = logistic_probe(x, y, xt, yt, c=0.5)
    assert result.converged
    assert result.accuracy == pytest.approx(expected, abs=1 / 150)
    assert 0.5 < expected < 1
    assert not logistic_probe(x, y, xt, yt, max_iter=1).converged


def test_adam_probe_is_the_plain_loop():
    (x, y), (xt, yt) = clouds(50, spread=2), clouds(40, spread=2, seed=1)
    torch.manual_seed(3)
    model = nn.Linear(6, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    order, history = torch.Generator().manual_seed(3), []
    for _ in range(12):
        permutation = torch.randperm(50, generator=order)
        for start in range(0, 50, 16):  # the last batch has two
            chosen = permutation[start : start + 16]
            loss = nn.CrossEntropyLoss()(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(float((model(xt).argmax(1) == yt).float().mean()))
    before = torch.get_rng_state()
    result = adam_probe(x, y, xt, yt, epochs=12, batch_size=16, lr=0.01, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.history == pytest.approx(history)
    assert result.accuracy == result.history[-1]
    assert result.best == max(result.history)
    assert result.history[result.best_epoch - 1] == result.best


def test_the_last_epoch_is_not_the_best_on_test():
    """Test labels that contradict the training: every epoch of training makes it worse."""
    (x, y), (xt, yt) = clouds(80), clouds(80, seed=1)
    result = adam_probe(x, y, xt, (yt + 1) % 4, epochs=40, batch_size=20, lr=0.05)
    assert result.accuracy < result.best
    assert result.best_epoch < 40


def test_separable_features_are_separated():
    (x, y), (xt, yt) = clouds(120, spread=0.1), clouds(90, spread=0.1, seed=1)
    assert logistic_probe(x, y, xt, yt).accuracy == 1
    assert adam_probe(x, y, xt, yt, epochs=60, batch_size=16, lr=0.05).accuracy == 1


def test_a_class_that_training_lacks_counts_as_wrong():
    (x, y), (xt, _) = clouds(60), clouds(10, seed=1)
    assert adam_probe(x, y, xt, torch.full((10,), 9), epochs=2, batch_size=16).accuracy == 0


def test_wrong_probe_arguments_are_named():
    x, y = clouds(20)
    for arguments, message in (
        ((x, y[:5], x, y), r"train_features and train_labels: expected \(N, F\) and \(N,\) with"),
        ((x, y, x[:0], y[:0]), "test_features and test_labels: expected"),
        ((x, y.float(), x, y), "train_labels: expected torch.int64"),
        ((x * math.nan, y, x, y), "train_features: expected finite numbers"),
        ((x, y, x[:, :3], y), "test_features: expected width 6, that of train_features, got 3"),
        ((x, torch.zeros_like(y), x, y), "train_labels: expected at least two classes"),
    ):
        for probe in (logistic_probe, adam_probe):
            with pytest.raises(ValueError, match=message):
                probe(*arguments)
    with pytest.raises(ValueError, match="epochs: expected a whole number of at least 1, got 0"):
        adam_probe(x, y, x, y, epochs=0)


# --- evaluate ---


@pytest.mark.parametrize(("method", "features"), [("simclr", "h"), ("uel", "z")])
def test_evaluate_encodes_every_image_once(method, features, larger_subset):
    torch.manual_seed(0)
    model = ResidualEncoder(width=8).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    config = PretrainConfig(method=method)
    result = evaluate(model, larger_subset, config, probe_epochs=30)
    assert sum(seen) == len(larger_subset.train_images) + len(larger_subset.test_images)
    sets = (larger_subset.train_images, larger_subset.test_images)
    (h, z), (ht, zt) = (encode_both(model, x, larger_subset.mean, larger_subset.std) for x in sets)
    y, yt = larger_subset.train_labels, larger_subset.test_labels
    assert result.knn_h == weighted_knn(h, y, ht, yt, sigma=0.1)
    assert result.knn_z == weighted_knn(z, y, zt, yt, sigma=0.5 if method == "simclr" else 0.1)
    assert result.knn_pixels == weighted_knn(*(
        t for x, labels in zip(sets, (y, yt), strict=True) for t in (pixel_features(x), labels)
    ))  # fmt: skip
    assert result.features == features
    seen_by_probes = (h, ht) if features == "h" else (F.normalize(z, dim=1), F.normalize(zt, dim=1))
    assert result.logistic == logistic_probe(seen_by_probes[0], y, seen_by_probes[1], yt)
    batch_size = 256 if method == "simclr" else 128
    expected = adam_probe(
        seen_by_probes[0], y, seen_by_probes[1], yt, epochs=30, batch_size=batch_size
    )
    assert result.adam == expected
    json.dumps(result.to_dict())


def test_evaluate_names_what_is_wrong(larger_subset):
    model, config = ResidualEncoder(width=4), PretrainConfig()
    bare = dataclasses.replace(larger_subset, train_labels=None, test_labels=None)
    with pytest.raises(ConfigError, match="data='mnist5k': expected images with labels"):
        evaluate(model, bare, config)
    for arguments, message in (
        ({"features": "x"}, "features='x': expected h or z"),
        ({"probes": ("svm",)}, "probes='svm': expected one of knn, logistic, adam"),
        ({"k": 0}, "k=0: expected"),
        ({"sigma": 0.0}, "sigma=0.0: expected"),
        ({"probe_epochs": 0}, "probe_epochs=0: expected"),
        ({"probe_batch_size": 0}, "probe_batch_size=0: expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(model, larger_subset, config, **arguments)


# --- export ---


@pytest.mark.parametrize("what", ["h", "z"])
@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_export_and_back(what, suffix, tmp_path):
    from safetensors.torch import load_file

    model = ResidualEncoder(width=4).eval()
    with torch.no_grad():
        model.backbone[1].running_mean.normal_()
    dual = convert_dual_batchnorm(copy.deepcopy(model))
    path = tmp_path / "new" / f"encoder{suffix}"
    export_encoder(dual, path, in_channels=1, image_size=28, what=what)
    assert any(".aux." in name for name in dual.state_dict())  # the caller's is left as it is
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 28, 28)
        expected = model.encode(x) if what == "h" else model(x)
        if suffix == ".pt2":
            out = torch.export.load(path).module()(x)
        else:
            fresh = ResidualEncoder(width=4).eval()
            (fresh if what == "z" else fresh.backbone).load_state_dict(load_file(path))
            out = fresh(x) if what == "z" else fresh.encode(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_onnx_follows_the_model(tmp_path):
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    model = ResidualEncoder(width=4).eval()
    path = tmp_path / "encoder.onnx"
    export_encoder(model, path, in_channels=1, image_size=12)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]
    session = ReferenceEvaluator(str(path))
    for batch in (1, 3):
        x = torch.randn(batch, 1, 12, 12)
        (out,) = session.run(None, {"images": x.numpy()})
        np.testing.assert_allclose(out, model.encode(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_export_names_what_is_wrong(tmp_path, monkeypatch):
    model = ResidualEncoder(width=4)
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.safetensors"):
        export_encoder(model, tmp_path / "a.bin", in_channels=1, image_size=28)
    with pytest.raises(ConfigError, match="export_what='y': expected h or z"):
        export_encoder(model, tmp_path / "a.pt2", in_channels=1, image_size=28, what="y")
    real = export_module.importlib.util.find_spec
    monkeypatch.setattr(
        export_module.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else real(name),
    )
    with pytest.raises(ConfigError, match="pip install onnxscript"):
        check_export("a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(tmp_path):
    class Untraceable(nn.Module):
        def forward(self, x):
            return x.flatten(1) if float(x.sum()) > 1 else x.flatten(1) * 2

    model = ContrastiveModel(Untraceable(), nn.Identity())
    with pytest.raises(Exception, match=r".+"):
        export_encoder(model, tmp_path / "a.pt2", in_channels=1, image_size=8)
    assert list(tmp_path.iterdir()) == []


# --- the command ---


@pytest.fixture(scope="module")
def finished(larger_subset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = PretrainConfig(epochs=1, workers=0, threads=1, clae=False)
    write_result(pretrain(config, data=larger_subset, folder=folder), folder)
    return folder


def run(*words):
    parser = argparse.ArgumentParser(prog="clae-fast")
    evaluate_cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["evaluate", *map(str, words)])
    return args.run(args)


@pytest.fixture
def small(monkeypatch, larger_subset):
    from clae_fast.pretraining import data

    monkeypatch.setattr(data, "load_data", lambda *a, **k: larger_subset)


def test_the_command_prints_and_writes(capsys, finished, tmp_path, small):
    path = tmp_path / "model.safetensors"
    assert run(finished, "--probe-epochs", 5, "--export", path) == 0
    printed = capsys.readouterr().out
    for words in ("epoch 1 of 1 (finished)", "raw pixels", "z, the projection", "logistic",
                  "Adam, last epoch", "chosen on the test images", str(path)):  # fmt: skip
        assert words in printed
    written = json.loads((finished / "evaluation.json").read_text())
    assert len(written["adam"]["history"]) == 5
    assert f"{written['knn_h']:.1%}" in printed
    assert written["finished"] is True
    assert path.exists()


def test_the_command_names_what_is_wrong(capsys, finished, tmp_path, small):
    for words, message in (
        ((tmp_path / "nowhere",), "RUN "),
        ((finished, "--probes", "svm"), "--probes svm: expected one of knn, logistic, adam"),
        ((finished, "--features", "y"), "--features y: expected h or z"),
        ((finished, "--k", "0"), "--k 0: expected a whole number of at least 1"),
        ((finished, "--export", "a.bin"), "--export a.bin: expected a name that ends in"),
        ((finished, "--export-what", "y"), "--export-what y: expected h or z"),
        ((finished, "--device", "cuda:9"), "--device cuda:9: expected a device that is here"),
        ((finished, "--output", finished / "config.json" / "x"), "--output "),
    ):
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith(f"clae-fast evaluate: error: {message}"), error
        assert error.count("\n") == 1
