"""The scripts in examples/ on small data: what they train, attack, save and print."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import lightly.loss
import pytest
import timm
import torch
from torch import nn

import clae_fast.pretraining
from clae_fast import DualBatchNorm, NTXentLoss, clae_step, convert_dual_batchnorm

ROOT = Path(__file__).parent.parent
EXAMPLES = ("bare_pytorch", "lightly_simclr", "timm_encoder")
VIT = ("--model", "test_vit", "--model-kwargs", "img_size=28", "patch_size=7")
mnist5k = functools.cache(clae_fast.pretraining.mnist5k)  # two seconds to read


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """One run of a script's main, with a look at every step that it takes."""

    def __init__(self, name, folder, *options):
        self.steps, self.kinds, self.aux = [], set(), []
        self.output = folder / "weights" / "encoder.pt"
        module = load(name)
        module.clae_step, module.mnist5k = self.step, mnist5k
        if name != "lightly_simclr":  # saves nothing
            options = ("--output", str(self.output), *options)
        self.last = module.main(["--limit=64", "--batch-size=32", "--epochs=4", *options])

    def step(self, encoder, x_i, x_j, **options):
        out = clae_step(encoder, x_i, x_j, **options)
        self.encoder = encoder
        self.steps.append((x_i, x_j, out))
        dual = [m for m in encoder.modules() if isinstance(m, DualBatchNorm)]
        self.kinds = {type(m).__name__ for m in dual}
        self.aux.append([m.aux.weight.detach().clone() for m in dual])
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    options = {
        "bare_pytorch": ("bare_pytorch",),
        "lightly_simclr": ("lightly_simclr",),
        "timm_encoder": ("timm_encoder", "--model", "test_resnet"),
        "vit": ("timm_encoder", *VIT, "--epochs=16", "--lr=3e-4"),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work: on a busy machine threads would wait for one another
    try:
        return {
            key: Run(name, tmp_path_factory.mktemp(key), "--eps", "0.05", *more)
            for key, (name, *more) in options.items()
        }
    finally:
        torch.set_num_threads(threads)


every_run = pytest.mark.parametrize("key", [*EXAMPLES, "vit"])


@every_run
def test_loss_falls(runs, key):
    losses = torch.tensor([out.loss.item() for _, _, out in runs[key].steps])
    assert len(losses) == (32 if key == "vit" else 8)
    assert losses.isfinite().all()
    first, _, _, last = losses.view(4, -1).mean(dim=1)  # single steps are noisy: random views
    assert last < first - 0.2
    assert runs[key].last == pytest.approx(float(losses[-2:].mean()))


@every_run
def test_attack_has_size_eps(runs, key):
    for x_i, x_j, out in runs[key].steps:
        assert not torch.equal(x_i, x_j)
        size = (out.x_adv - x_i).abs()
        moved = size > 0
        assert moved.float().mean() > 0.5
        assert (size[moved] - 0.05).abs().max() < 1e-5


@every_run
def test_aux_trained_and_then_gone(runs, key):
    run = runs[key]
    kinds = {
        "bare_pytorch": {"DualBatchNorm2d"},
        "lightly_simclr": {"DualBatchNorm1d", "DualBatchNorm2d"},
        "timm_encoder": {"DualBatchNorm2d"},
        "vit": set(),
    }
    assert run.kinds == kinds[key]
    for first, last in zip(run.aux[0], run.aux[-1], strict=True):
        assert not torch.equal(first, last)  # the optimizer knew it
    assert not any(isinstance(m, DualBatchNorm) for m in run.encoder.modules())
    assert not any(".aux." in name for name in run.encoder.state_dict())


def test_weights_load_into_ordinary_models(runs):
    models = {
        "bare_pytorch": load("bare_pytorch").Encoder(),
        "timm_encoder": timm.create_model("test_resnet", num_classes=0, in_chans=1),
        "vit": timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=28, patch_size=7),
    }
    for key, model in models.items():
        saved = torch.load(runs[key].output)
        model.load_state_dict(saved)
        trained = runs[key].encoder.state_dict()
        prefix = "" if key == "bare_pytorch" else "0."  # the backbone before the projector
        assert all(torch.equal(value, trained[prefix + name]) for name, value in saved.items())


def test_timm_subclass_of_batchnorm_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="'0.bn1': BatchNormAct2d is a BatchNorm subclass"):
        Run("timm_encoder", tmp_path, "--model", "test_efficientnet")


@pytest.mark.parametrize(
    ("family", "num_layers"),
    [
        *(("resnet18", 20), ("resnext50_32x4d", 53)),
        *(("vit_tiny_patch16_224", 0), ("convnext_atto", 0), ("resnet50_gn", 0)),
        *(("efficientnet_b0", None), ("mobilenetv3_small_050", None)),
        *(("regnetx_002", None), ("resnetv2_50", None)),
    ],
)
def test_timm_models_are_as_the_script_says(family, num_layers):
    model = timm.create_model(family, num_classes=0)
    if num_layers is None:
        with pytest.raises(TypeError, match="BatchNormAct2d"):
            convert_dual_batchnorm(model)
    else:
        convert_dual_batchnorm(model)
        assert sum(isinstance(m, DualBatchNorm) for m in model.modules()) == num_layers


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_is_that_of_lightly(temperature):
    z0, z1 = (torch.randn(32, 16, requires_grad=True) for _ in range(2))
    ours = NTXentLoss(temperature)(z0, z1)
    theirs = lightly.loss.NTXentLoss(temperature)(z0, z1)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (z0, z1)), torch.autograd.grad(theirs, (z0, z1)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_loss_object_of_lightly_works_in_the_step():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x_i, x_j = torch.rand(2, 24, 1, 4, 4)
    ours, theirs = (
        clae_step(encoder, x_i, x_j, loss=loss, eps=0.1)
        for loss in (NTXentLoss(0.5), lightly.loss.NTXentLoss(0.5))
    )
    torch.testing.assert_close(ours.clean_loss, theirs.clean_loss)
    assert (ours.x_adv == theirs.x_adv).float().mean() > 0.95  # rounding decides a few signs


def python(folder, *command):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_as_a_command(tmp_path):
    script = str(ROOT / "examples" / "bare_pytorch.py")
    done = python(tmp_path, script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--eps" in done.stdout
    done = python(tmp_path, script, "--epochs", "2", "--limit", "64", "--batch-size", "32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["epoch 1", "epoch 2"]
    accuracy = float(re.fullmatch(r"weighted kNN accuracy (0\.\d+); .*", lines[-1])[1])
    assert 0.1 < accuracy < 1
    assert (tmp_path / "runs" / "bare_pytorch.pt").is_file()


def test_each_script_is_short_and_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert [s.stem for s in scripts] == sorted(EXAMPLES)
    for script in scripts:
        assert script.name in listed
        assert len(script.read_text().splitlines()) < 90
