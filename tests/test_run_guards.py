"""What must not happen to a run: other images or threads, lost files, endless or empty training."""

import dataclasses
import json
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from runs import stop_after
from torch import nn
from torchvision.ops import StochasticDepth

from clae_fast.pretraining import (
    CheckpointError,
    ConfigError,
    ContrastiveModel,
    ImageData,
    Interrupted,
    NonFiniteLossError,
    PretrainConfig,
    load_data,
    load_run,
    preset,
    pretrain,
    step_cost,
    weighted_knn,
)
from clae_fast.pretraining import loop as loop_module
from clae_fast.pretraining.accumulate import check_independent
from clae_fast.pretraining.augmentation import view_size
from clae_fast.pretraining.checkpoint import checkpoints, load_checkpoint
from clae_fast.pretraining.compare import compare
from clae_fast.pretraining.decode import decode, read_images
from clae_fast.pretraining.encoders import resnet18_cifar
from clae_fast.pretraining.evaluate import evaluate
from clae_fast.pretraining.options import without_effect
from clae_fast.pretraining.probe import pixel_features


def settings(**changes):
    return PretrainConfig(
        **{"epochs": 2, "batch_size": 32, "workers": 0, "threads": 1, "clae": False} | changes
    )


# ------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "mine"}, "data mnist5k, these have mine"),
        ({"std": (0.5,)}, "std"),
        ({"size": 32}, "image_size 28, these have 32"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(change, says, subset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            pretrain(settings(), data=subset, folder=tmp_path)
    with pytest.raises(CheckpointError, match=says):
        pretrain(
            settings(), data=dataclasses.replace(subset, **change), folder=tmp_path, resume=True
        )


def test_a_resumed_run_keeps_its_threads(subset, tmp_path, monkeypatch):
    used = []
    real = loop_module.TrainingStep.__call__
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            pretrain(settings(threads=3), data=subset, folder=tmp_path)
    state = load_checkpoint(checkpoints(tmp_path)[-1])[1]
    assert state["threads"] == 3
    config = settings(threads=None)
    before = torch.get_num_threads()

    def step(self, x_i, x_j):
        used.append(torch.get_num_threads())
        return real(self, x_i, x_j)

    monkeypatch.setattr(loop_module.TrainingStep, "__call__", step)
    pretrain(config, data=subset, folder=tmp_path, resume=True)
    assert set(used) == {3}
    assert torch.get_num_threads() == before


def test_the_size_of_the_views_does_not_depend_on_memory(tmp_path):
    from test_pretraining_data import write_tiny

    write_tiny(tmp_path)
    config = settings(data="tiny-imagenet")
    sizes = {
        view_size(config, load_data("tiny-imagenet", tmp_path, memory_gib=gib)) for gib in (4, 0)
    }
    assert sizes == {64}


def test_evaluate_refuses_other_images(subset, tmp_path, capsys):
    from clae_fast.__main__ import main
    from clae_fast.pretraining.output import write_result

    mine = dataclasses.replace(subset, name="mine")
    write_result(pretrain(settings(epochs=1), data=mine, folder=tmp_path), tmp_path)
    loaded = load_run(tmp_path)
    assert (loaded.data, loaded.image_size, loaded.mean) == ("mine", 28, subset.mean)
    assert main(["evaluate", str(tmp_path), "--probes", "knn"]) == 2
    assert "of name mine, not mnist5k" in capsys.readouterr().err
    # From Python, with the images of one's own:
    assert evaluate(loaded.model, mine, loaded.config, probes=["knn"]).knn_h > 0.5


# ----------------------------------------------------------------------------- nothing is lost


def test_what_is_no_run_is_not_overwritten(subset, tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="mine=1: expected a setting that this version knows"):
        pretrain(settings(), data=subset, folder=tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}'


def test_overwriting_leaves_what_is_not_the_runs(subset, tmp_path):
    pretrain(settings(epochs=1), data=subset, folder=tmp_path)
    mine = tmp_path / "checkpoints" / "mine"
    mine.mkdir()
    pretrain(settings(epochs=1), data=subset, folder=tmp_path, overwrite=True)
    assert mine.is_dir()
    assert len(checkpoints(tmp_path)) == 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before(subset, tmp_path):
    config = settings(epochs=3)
    whole = pretrain(config, data=subset, folder=tmp_path)
    older, newest = checkpoints(tmp_path)
    os.truncate(newest / "state.pt", 100)
    with pytest.warns(UserWarning, match=f"{newest}/state.pt cannot be read.*the one before"):
        again = pretrain(config, data=subset, folder=tmp_path, resume=True)
    assert again.epoch_losses == whole.epoch_losses
    for path in (older, newest):
        os.truncate(path / "state.pt", 100)
    with (
        pytest.warns(UserWarning, match="the one before"),
        pytest.raises(CheckpointError, match=f"{older}/state.pt cannot be read: [^\\n]*$"),
    ):
        pretrain(config, data=subset, folder=tmp_path, resume=True)


def test_ctrl_c_in_the_last_step_is_answered(subset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Interrupted) as stopped:
            pretrain(settings(), data=subset, folder=tmp_path)
    assert "after the last epoch of 2; to go on" in stopped.value.message
    resumed = pretrain(settings(), data=subset, folder=tmp_path, resume=True)
    assert resumed.epoch_losses == pretrain(settings(), data=subset).epoch_losses


def test_a_comparison_does_not_take_another_run_away(subset, tmp_path):
    pretrain(settings(lr=0.1), data=subset, folder=tmp_path / "baseline-seed0")
    before = checkpoints(tmp_path / "baseline-seed0")
    with pytest.raises(ConfigError, match="runs made with these settings"):
        compare(settings(), (0,), variants=["baseline"], folder=tmp_path, data=subset)
    assert checkpoints(tmp_path / "baseline-seed0") == before


def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)  # as for want of memory


def test_a_memory_figure_that_cannot_be_had_is_none(subset, monkeypatch):
    monkeypatch.setattr(step_cost, "_peak_in_this_process", killed)
    config = settings()
    shape, half = (4, 1, 28, 28), (0.5,)
    assert step_cost._peak_memory(config, shape, half, half) is None


# ------------------------------------------------------------------- training that trains nothing


def test_float16_that_never_steps_is_an_error(subset):
    config = settings(precision="float16", epochs=8, batch_size=32)

    class Broken(ContrastiveModel):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(784, 8)), nn.Identity())
            self.backbone[1].weight.register_hook(lambda g: g * torch.nan)

    with pytest.raises(NonFiniteLossError, match=r"gradients overflowed in every one.*precision"):
        pretrain(config, data=subset, encoder=Broken())


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_accumulation_refuses_what_draws_random_numbers(p):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), StochasticDepth(p, "row"))
    before = torch.get_rng_state()
    for _ in range(10):
        with pytest.raises(ConfigError, match="it draws random numbers, as dropout does"):
            check_independent(encoder, torch.Size((1, 8, 8)), 2)
    assert torch.equal(torch.get_rng_state(), before)
    check_independent(encoder[:2], torch.Size((1, 8, 8)), 2)


def test_a_last_batch_of_one_image_that_cannot_be_trained_is_named(subset):
    data = dataclasses.replace(
        subset, train_images=subset.train_images[:33], train_labels=subset.train_labels[:33]
    )
    encoder = ContrastiveModel(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8)), nn.Identity()
    )
    with pytest.raises(ConfigError, match=r"batch_size=32: expected one that leaves no last batch"):
        pretrain(settings(epochs=1), data=data, encoder=encoder)


# --------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("sigma", [1e-3, 1e-5])
def test_knn_votes_do_not_underflow(sigma):
    """No cosine is near 1 here; the nearest neighbour decides."""
    g = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 24, generator=g) for n in (300, 100))
    labels = torch.randint(5, (300,), generator=g)
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (train, test)]
    nearest = labels[(unit[1] @ unit[0].T).argmax(1)]
    assert weighted_knn(train, labels, test, nearest, k=200, sigma=sigma) >= 0.99


def test_cifar_convolutions_start_as_published():
    net = resnet18_cifar()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= fan_in**-0.5
            assert float(module.weight.detach().std()) == pytest.approx(
                (3 * fan_in) ** -0.5, rel=0.1
            )


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("simclr-cifar10", 1000), ("uel-cifar10", 1000), ("uel-tiny-imagenet", 200),
     ("simclr-tiny-imagenet", 1000)],
)  # fmt: skip
def test_probe_epochs_as_published(name, epochs, subset, monkeypatch):
    from clae_fast.pretraining import evaluate as module
    from clae_fast.pretraining.encoders import ResidualEncoder

    asked = []
    monkeypatch.setattr(module, "adam_probe", lambda *a, epochs, **k: asked.append(epochs))
    config = preset(name, image_size=28, normalization="data", device="cpu")
    assert module.evaluate(ResidualEncoder(), subset, config, probes=["adam"]).knn_pixels is None
    assert asked == [epochs]


def test_pixel_features_stay_small():
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features = pixel_features(images)
    assert features.shape == (3, 3 * 32 * 32)
    assert torch.equal(features, pixel_features(list(images)))


# ---------------------------------------------------------------------------------- images


def write(path, size=(8, 8), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def test_one_memory_budget_for_both_splits(tmp_path):
    for split in ("train", "test"):
        for i in range(4):
            write(tmp_path / split / "a" / f"{i}.png", (16, 16))
    each = 4 * 3 * 16 * 16
    for room, held in ((2 * each, True), (2 * each - 1, False)):
        data = load_data("folder", tmp_path, memory_gib=room / 2**30)
        assert isinstance(data.train_images, torch.Tensor) is held
        assert isinstance(data.test_images, torch.Tensor) is held
        assert len(data.test_images) == 4


def test_sizes_that_differ_late(tmp_path):
    for i, side in enumerate((8, 8, 12)):
        write(tmp_path / f"{i}.png", (side, side), value=i)
    images = read_images([tmp_path / f"{i}.png" for i in range(3)], tmp_path, 1.0).images
    assert [tuple(x.shape) for x in images] == [(3, 8, 8), (3, 8, 8), (3, 12, 12)]
    assert [int(x.max()) for x in images] == [0, 1, 2]


def test_decoding_in_threads_leaves_the_warning_filters_alone(tmp_path, monkeypatch):
    write(tmp_path / "big.png", (40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    before = list(warnings.filters)
    found = []

    def attempt():
        with pytest.raises(ValueError, match="1,600 pixels, more than PIL's limit of 1,000"):
            decode(tmp_path / "big.png")
        found.append(1)

    def attempts():
        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with pytest.warns(Image.DecompressionBombWarning):
        attempts()
    assert len(found) == 8
    with pytest.warns(UserWarning, match="more than PIL's limit"):
        read_images([tmp_path / "big.png"], tmp_path, 1.0)
    assert list(warnings.filters) == before


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folders_of_a_split_by_other_names(name, tmp_path):
    for split in ("train", name):
        for i in range(3):
            write(tmp_path / split / "a" / f"{i}.png")
            write(tmp_path / split / "b" / f"{i}.png")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "unlabelled.png")
    data = load_data("folder", tmp_path)
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "6 test images in 2 classes" in data.summary()


def test_images_beside_class_folders_are_named(tmp_path):
    for i in range(6):
        write(tmp_path / "a" / f"{i}.png")
    write(tmp_path / "loose.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "a" / "link.png")
    with (
        pytest.warns(UserWarning, match=r"left out 1 images in .* such as loose\.png"),
        pytest.warns(UserWarning, match=r"skipped a broken image: a/link\.png"),
    ):
        data = load_data("folder", tmp_path)
    assert len(data.train_images) + len(data.test_images) == 6
    assert len(data.skipped) == 2
    assert data.summary().endswith("1 class: every accuracy is 1")


def test_lines_of_tiny_imagenets_annotations(tmp_path):
    from test_pretraining_data import write_tiny

    folder, _, test = write_tiny(tmp_path)
    path = folder / "val" / "val_annotations.txt"
    good = path.read_text()
    path.write_text(good + "\n \n")
    assert len(load_data("tiny-imagenet", tmp_path).test_images) == len(test)
    path.write_text(good + "val_9.JPEG n00\n")
    with pytest.raises(ConfigError, match="expected lines of a file, a tab and a class, got"):
        load_data("tiny-imagenet", tmp_path)


PIXELS = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_images": PIXELS.float()}, r"train_images=.*float32.*torch\.uint8"),
        ({"train_images": PIXELS[:0]}, "train_images='no images': expected at least one"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, r"train_labels=.*expected \(4,\)"),
        ({"test_labels": torch.zeros(4)}, r"test_labels=.*float32.*int64"),
        (
            {"test_images": PIXELS.expand(4, 3, 8, 8)},
            "test_images='3 channels': expected 1, as train_images",
        ),
        ({"mean": (0.5, 0.5)}, "mean=.*expected 1 numbers, one per channel"),
        ({"std": (0.0,)}, "std=.*expected numbers above 0"),
    ],
)
def test_image_data_is_checked(change, says):
    labels = torch.zeros(4, dtype=torch.int64)
    good = {"name": "x", "train_images": PIXELS, "train_labels": labels, "test_images": PIXELS,
            "test_labels": labels, "mean": (0.5,), "std": (0.5,)}  # fmt: skip
    ImageData(**good)
    with pytest.raises(ConfigError, match=says):
        ImageData(**good | change)


# -------------------------------------------------------------------------------- settings


def test_settings_take_paths_and_numpy_numbers(tmp_path):
    config = PretrainConfig(data_dir=tmp_path, lr=np.float32(0.5))
    assert json.loads(json.dumps(config.to_dict()))["lr"] == 0.5
    assert config.data_dir == str(tmp_path)
    with pytest.raises(ConfigError, match="eps_pixels=8.0: expected at most 1"):
        PretrainConfig(eps_pixels=8.0)
    with pytest.raises(ConfigError, match="epoch=3: expected a setting that this version knows"):
        preset("uel-cifar10", epoch=3)
    with pytest.raises(ConfigError, match="variants='published': expected others.*float16"):
        compare(PretrainConfig(precision="float16"), (0,), folder=tmp_path)


def test_settings_without_effect_are_told(capsys, tmp_path, monkeypatch):
    config = PretrainConfig(clae=False, projector="none", schedule="step", milestones=((99, 0.1),))
    names = ("eps", "momentum", "hidden", "milestones", "download", "lr", "clae")
    assert without_effect(config, names) == {
        "eps": "without CLAE",
        "momentum": "with adamw",
        "hidden": "with projector none",
        "milestones": "in 12 epochs",
        "download": "with data mnist5k",
    }
    from clae_fast.__main__ import main

    words = ["--no-clae", "--attack", "shared", "--data", "folder", "--data-dir", str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *words]) == 2
    err = capsys.readouterr().err
    assert "warning: --attack has no effect without CLAE" in err


def test_an_encoder_that_needs_arguments_is_named(monkeypatch, tmp_path):
    (tmp_path / "my_encoders.py").write_text("def needs(width):\n    raise SystemError\n")
    monkeypatch.syspath_prepend(tmp_path)
    from clae_fast.pretraining.encoders import build_encoder

    with pytest.raises(ConfigError, match="a function that is called without arguments.*width"):
        build_encoder(PretrainConfig(encoder="my_encoders:needs"), 1, 28)
