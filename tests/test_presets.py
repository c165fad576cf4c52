"""Presets beside the published values; every setting as an option."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from clae_fast import InfoNCELoss, NTXentLoss, UELLoss
from clae_fast.pretraining import ConfigError, PretrainConfig, build_encoder, preset
from clae_fast.pretraining.augmentation import build_transform
from clae_fast.pretraining.options import add_settings, given_settings, milestones, number
from clae_fast.pretraining.presets import PRESETS, render_presets
from clae_fast.pretraining.training_step import make_loss

ROOT = Path(__file__).parent.parent
CIFAR = ("cifar10", "cifar100")


def test_every_method_and_data_set_has_one():
    assert set(PRESETS) == {
        f"{m}-{d}" for m in ("plain", "uel", "simclr") for d in (*CIFAR, "tiny-imagenet")
    }
    for name in PRESETS:
        config = preset(name)
        assert f"{config.method}-{config.data}" == name


@pytest.mark.parametrize("name", [f"{m}-{d}" for m in ("plain", "uel") for d in CIFAR])
def test_published_values_of_plain_and_uel(name):
    c = preset(name)
    assert (c.epochs, c.batch_size, c.drop_last) == (301, 128, True)
    assert (c.optimizer, c.lr, c.momentum, c.weight_decay) == ("sgd", 0.03, 0.9, 5e-4)
    assert c.milestones == ((120, 0.1), (160, 0.05), (200, 0.01))
    assert (c.loss_temperature, c.eps, c.alpha, c.aux_momentum) == (0.1, 0.03, 1.0, 0.01)
    assert (c.encoder, c.projector, c.projection) == ("resnet18-cifar", "linear", 128)
    assert (c.image_size, c.normalization, c.augmentation) == (32, "data", "instance")


@pytest.mark.parametrize("data", CIFAR)
def test_published_values_of_simclr(data):
    c = preset(f"simclr-{data}")
    assert (c.epochs, c.batch_size, c.drop_last) == (100, 256, True)
    assert (c.optimizer, c.lr, c.weight_decay, c.schedule) == ("adam", 3e-4, 0.0, "constant")
    assert (c.loss_temperature, c.eps, c.alpha, c.aux_momentum) == (0.5, 0.03, 1.0, 0.01)
    assert (c.encoder, c.projector, c.hidden, c.projection) == ("resnet18-cifar", "mlp", 512, 64)
    assert (c.image_size, c.normalization, c.augmentation) == (32, "half", "simclr")


@pytest.mark.parametrize("method", ["plain", "uel", "simclr"])
def test_published_values_of_tiny_imagenet(method):
    c = preset(f"{method}-tiny-imagenet")
    assert (c.epochs, c.batch_size, c.image_size) == (100, 128, 224)
    assert (c.encoder, c.normalization) == ("resnet18", "data")
    assert c.optimizer == ("adam" if method == "simclr" else "sgd")


def test_presets_build_what_they_name():
    losses = {"plain": InfoNCELoss, "uel": UELLoss, "simclr": NTXentLoss}
    for name in PRESETS:
        config = preset(name)
        assert type(make_loss(config)) is losses[config.method]
        if name.endswith("cifar100"):
            continue  # as cifar10
        model = build_encoder(config, 3, 64 if config.image_size == 224 else 32).eval()
        x = torch.rand(2, 3, 64, 64) if config.image_size == 224 else torch.rand(2, 3, 32, 32)
        assert model.encode(x).shape == (2, 512)
        assert model(x).shape == (2, config.projection)
        view = build_transform(config, config.image_size)(torch.rand(3, 48, 40))
        assert view.shape == (3, config.image_size, config.image_size)


def test_overrides():
    c = preset("simclr-cifar10", epochs=3, eps_pixels=8 / 255)
    assert (c.epochs, c.eps, c.eps_pixels) == (3, None, 8 / 255)
    assert preset("plain-cifar10", schedule="cosine").milestones == ()
    assert preset("plain-cifar10", milestones=((2, 0.5),)).milestones == ((2, 0.5),)
    with pytest.raises(
        ConfigError, match="eps_pixels=0.1: expected one size of the attack, and eps"
    ):
        preset("simclr-cifar10", eps=0.1, eps_pixels=0.1)


def test_unknown_preset_lists_the_names():
    with pytest.raises(ConfigError, match="preset='simclr-mnist': expected one of plain-cifar10"):
        preset("simclr-mnist")


def test_docs_are_generated():
    assert (ROOT / "docs" / "presets.md").read_text() == render_presets()


# --- options ---


def parse(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_settings(parser)
    return given_settings(parser.parse_args(words))


def test_only_what_was_given():
    assert parse() == {}
    assert parse("--epochs", "3", "--no-clae", "--lr", "1e-3") == {
        "epochs": 3,
        "clae": False,
        "lr": 1e-3,
    }


def test_every_field_is_an_option_and_reads_its_own_value():
    words = {
        "eps_pixels": ("8/255", 8 / 255),
        "milestones": ("2:0.5,4:0.1", ((2, 0.5), (4, 0.1))),
        "temperature": ("0.2", 0.2),
        "eps": ("0.1", 0.1),
    }
    for field in dataclasses.fields(PretrainConfig):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            assert parse(option) == {field.name: True}
            assert parse("--no-" + option[2:]) == {field.name: False}
            continue
        default = 7 if field.default is None else field.default
        text, value = words.get(field.name, (str(default), default))
        assert parse(option, text) == {field.name: value}
        assert type(parse(option, text)[field.name]) is type(value)


def test_every_option_has_help():
    for field in dataclasses.fields(PretrainConfig):
        assert len(field.metadata["help"]) > 5
        assert field.metadata["group"]


def test_numbers_and_milestones():
    assert number("8/255") == 8 / 255
    for wrong in ("8/", "1/0", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number such as"):
            number(wrong)
    for wrong in ("3", "3:x", "a:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected epochs and factors"):
            milestones(wrong)


def test_settings_survive_json():
    import json

    config = preset("uel-tiny-imagenet", eps_pixels=0.1)
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="speed=3: expected a setting that this version knows"):
        PretrainConfig.from_dict({"speed": 3})


def test_eps_of_digits_and_photographs():
    assert PretrainConfig().eps_normalized == 0.3
    assert PretrainConfig(data="cifar10").eps_normalized == 0.03
    assert PretrainConfig(eps=0.1).eps_normalized == 0.1
    assert PretrainConfig(eps_pixels=0.1).eps_normalized is None
