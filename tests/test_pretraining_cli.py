"""`clae-fast pretrain`: options, errors, files, figure, Ctrl-C."""

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from clae_fast.pretraining import (
    CheckpointError,
    ConfigError,
    PretrainConfig,
    ResidualEncoder,
    cli,
    files,
    load_run,
    loop,
    pretrain,
)
from clae_fast.pretraining.figures import adversarial_figure, amplification
from clae_fast.pretraining.files import atomic_path, unwritable_reason
from clae_fast.pretraining.output import write_result
from clae_fast.pretraining.progress import MAX_LINES, open_progress


def run(*words):
    parser = argparse.ArgumentParser(prog="clae-fast")
    cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["pretrain", *map(str, words)])
    return args.run(args)


@pytest.fixture
def small(monkeypatch, subset):
    """`pretrain` on 125 images."""
    monkeypatch.setattr(loop, "load_data", lambda *a, **k: subset)


# --- wrong input: exit code 2 and one line that names option, value, expectation ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs 0: expected a whole number of at least 1"),
        (["--batch-size", "0"], "--batch-size 0: expected a whole number of at least 2"),
        (["--eps", "-0.1"], "--eps -0.1: expected a finite number of at least 0"),
        (["--eps", "nan"], "--eps nan: expected a finite number of at least 0"),
        (["--alpha", "inf"], "--alpha inf: expected a finite number of at least 0"),
        (["--lr", "0"], "--lr 0.0: expected a finite number above 0"),
        (["--temperature", "0"], "--temperature 0.0: expected a finite number above 0"),
        (["--data", "cifar99"], "--data cifar99: expected one of mnist5k, digits, cifar10"),
        (["--preset", "simclr"], "--preset simclr: expected one of plain-cifar10, uel-cifar10"),
        (
            ["--eps", "1/2", "--eps-pixels", "8/255"],
            "--eps-pixels 8/255: expected one size of the attack",
        ),
        (["--milestones", "9:0.1"], "--milestones 9:0.1: expected schedule step beside them"),
        (["--encoder", "resnet19"], "--encoder resnet19: expected small, resnet18-cifar, module"),
        (["--encoder", "no_such:thing"], "--encoder no_such:thing: expected a function that impo"),
        (["--encoder", "os:getcwd"], "--encoder os:getcwd: expected a function that returns an nn"),
        (["--device", "cuda:7"], "--device cuda:7: expected a device that is here"),
        (["--accumulate", "2"], "--accumulate 2: expected 1 with this encoder (BatchNorm"),
        (["--attack", "published", "--precision", "float16"], "--attack published: expected exac"),
        (["--attack", "published", "--accumulate", "2"], "--accumulate 2: expected 1 with this"),
        (
            ["--resume", "nowhere"],
            "--resume nowhere: expected the folder of a run, and there",
        ),
        (["--method", "moco"], "--method moco: expected one of plain, uel, simclr"),
        (["--backend", "gpu"], "--backend gpu: expected one of auto, reference, cpp"),
        (["--backend", "cuda"], "--backend cuda: expected one that can run here"),
        (["--seed", "-1"], "--seed -1: expected a whole number of at least 0"),
        (["--threads", "0"], "--threads 0: expected a whole number of at least 1"),
        (["--workers", "-2"], "--workers -2: expected a whole number of at least 0"),
    ],
)
def test_wrong_value(words, message, capsys, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"clae-fast pretrain: error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_exits_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--epochs", "many")
    assert caught.value.code == 2
    assert "--epochs: invalid int value: 'many'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--eps-pixels", "8/x")
    assert "expected a number such as 0.03 or 8/255, got '8/x'" in capsys.readouterr().err


def test_unwritable_output_is_found_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "pretrain", lambda *a, **k: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert run("--output", tmp_path / "file" / "deeper") == 2
    error = capsys.readouterr().err
    assert f"--output {tmp_path / 'file' / 'deeper'}: expected a folder" in error
    assert error.count("\n") == 1


def test_unwritable_reason_tries_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "kept" / "c", tmp_path / "kept"):
        assert unwritable_reason(folder) is None
    (tmp_path / "file").write_text("")
    assert unwritable_reason(tmp_path / "file")
    assert unwritable_reason(tmp_path / "file" / "deeper")

    def refuse(**kwargs):  # root may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    assert unwritable_reason(tmp_path / "a" / "b") == "Permission denied"
    assert {path.name for path in tmp_path.rglob("*")} == {"kept", "file"}


def test_missing_extras_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "EXTRAS", ("torchvision", "no_such_package"))
    assert run("--output", tmp_path) == 1
    assert 'needs no_such_package: pip install "clae-fast[train]"' in capsys.readouterr().err


def test_exploding_run_is_one_line(capsys, tmp_path, small):
    assert (
        run(
            "--lr",
            "1e30",
            "--epochs",
            2,
            "--workers",
            0,
            "--threads",
            1,
            "--output",
            tmp_path / "o",
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "clae-fast pretrain: error: the loss is " in error
    assert "Traceback" not in error
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"config.json", "metrics.jsonl"}


# --- a run ---


FILES = {"config.json", "metrics.jsonl", "checkpoints", "curves.png", "encoder.safetensors"}


def test_run_with_clae_writes_all_files(capsys, tmp_path, monkeypatch, small):
    from safetensors import safe_open
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    assert run("--epochs", 1, "--seed", 3, "--workers", 0, "--threads", 1) == 0
    folder = tmp_path / "runs" / "simclr-clae-mnist5k"
    assert {path.name for path in folder.iterdir()} == FILES | {"adversarial.png", "result.json"}
    names = ("adversarial.png", "curves.png", "encoder.safetensors", "result.json")

    captured = capsys.readouterr()
    for line in ("raw pixels", "untrained encoder", "trained encoder", *names):
        assert line in captured.out
    assert "epoch 1/1  loss " in captured.err  # stderr is no terminal: plain lines
    assert "\r" not in captured.err

    metrics = json.loads((folder / "result.json").read_text())
    assert metrics["config"]["seed"] == 3
    assert metrics["config"]["temperature"] == 0.5
    assert len(metrics["epoch_losses"]) == 1
    accuracies = metrics["knn_accuracy"]
    assert accuracies.pop("best_epoch_on_test") is None
    assert set(accuracies) == {"raw_pixels", "untrained_encoder", "trained_encoder"}
    assert metrics["torch"] == torch.__version__
    assert metrics["train_seconds"] > 0

    with safe_open(folder / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["seed"] == 3
    encoder = ResidualEncoder()
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))  # plain names, strictly


def test_run_without_clae_makes_no_figure(capsys, tmp_path, small):
    (tmp_path / "adversarial.png").write_bytes(b"of an earlier run")
    words = [
        "--no-clae",
        "--method",
        "plain",
        "--epochs",
        1,
        "--workers",
        0,
        "--threads",
        1,
        "--output",
        tmp_path,
    ]
    assert run(*words) == 0
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"result.json"}
    assert "adversarial.png is only made with --clae" in capsys.readouterr().out


def test_help_and_parser_do_not_import_torchvision():
    code = (
        "import sys, argparse\n"
        "from clae_fast.pretraining.cli import add_parser\n"
        "add_parser(argparse.ArgumentParser().add_subparsers()).format_help()\n"
        "heavy = {'torchvision', 'matplotlib', 'mlxtend', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_shows_every_default():
    parser = argparse.ArgumentParser()
    text = " ".join(cli.add_parser(parser.add_subparsers()).format_help().split())
    for field in dataclasses.fields(PretrainConfig):
        option = "--" + field.name.replace("_", "-")
        assert option in text
        default = field.default
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert f"(default: {default:g})" in text
    assert "runs/<method>[-clae]-<data>" in text
    for name in ("simclr-cifar10", "uel-tiny-imagenet"):
        assert name in text.replace("- ", "-")


# --- where runs go ---


SMALL = ("--epochs", 1, "--workers", 0, "--threads", 1, "--no-clae")


def test_a_run_is_never_replaced_unasked(capsys, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL) == 0
    assert run(*SMALL, "--seed", 1) == 0  # its own folder
    first, second = (tmp_path / "runs" / f"simclr-mnist5k{n}" for n in ("", "-2"))
    assert json.loads((second / "result.json").read_text())["config"]["seed"] == 1
    before = (first / "encoder.safetensors").read_bytes()
    capsys.readouterr()
    assert run(*SMALL, "--seed", 2, "--output", first) == 2
    error = capsys.readouterr().err
    assert f"--output {first}: expected a folder without a run (--overwrite replaces it" in error
    assert (first / "encoder.safetensors").read_bytes() == before
    assert run(*SMALL, "--seed", 2, "--output", first, "--overwrite") == 0
    assert (first / "encoder.safetensors").read_bytes() != before
    assert json.loads((first / "config.json").read_text())["seed"] == 2


def test_resume_takes_the_settings_of_the_run(capsys, tmp_path, small):
    def refused(*words):
        capsys.readouterr()
        assert run("--resume", tmp_path / "a", *words) == 2
        return capsys.readouterr().err

    assert run(*SMALL, "--output", tmp_path / "a") == 0
    assert "expected a run that is not finished" in refused()
    (tmp_path / "a" / "result.json").unlink()
    assert "--epochs 5: expected no such option beside --resume" in refused("--epochs", 5)
    assert "--preset uel-cifar10: expected no such option" in refused("--preset", "uel-cifar10")
    assert "--output x: expected no such option beside --resume" in refused("--output", "x")
    assert run("--resume", tmp_path / "a", "--threads", 2, "--workers", 1) == 0
    assert (tmp_path / "a" / "result.json").exists()


def test_resume_before_the_first_checkpoint_says_so(capsys, tmp_path, small):
    assert run(*SMALL, "--output", tmp_path / "a") == 0
    for path in (tmp_path / "a").iterdir():
        if path.name not in ("config.json", "checkpoints"):
            path.unlink()
    for path in sorted((tmp_path / "a" / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert run("--resume", tmp_path / "a") == 0
    assert "has no checkpoint yet, starting anew" in capsys.readouterr().err
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / "config.json").write_text("{")
    assert run("--resume", tmp_path / "a") == 2
    assert "settings in config.json that can be read" in capsys.readouterr().err


def test_encoder_of_the_users(capsys, tmp_path, monkeypatch, small):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.Flatten())\n"
        "def flat():\n"
        "    return nn.Conv2d(1, 4, 5, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ("--epochs", 1, "--workers", 0, "--threads", 1, "--output", tmp_path / "o")
    assert run("--encoder", "mine:net", "--projector", "linear", *words) == 0
    run_again = load_run(tmp_path / "o")
    assert run_again.model.projector.in_features == 4 * 36
    assert run_again.finished
    capsys.readouterr()
    assert run("--encoder", "mine:flat", "--epochs", 1, "--output", tmp_path / "p") == 2
    assert "expected features (B, F) of images, got (2, 4, 6, 6)" in capsys.readouterr().err


def test_images_without_labels(capsys, tmp_path, monkeypatch, subset):
    bare = dataclasses.replace(
        subset, train_labels=None, test_labels=None, test_images=subset.test_images[:0]
    )
    monkeypatch.setattr(loop, "load_data", lambda *a, **k: bare)
    assert run(*SMALL, "--knn-every", 1, "--output", tmp_path / "o") == 0
    assert "no kNN accuracy: the images have no labels" in capsys.readouterr().out
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["knn_accuracy"]["trained_encoder"] is None


def test_a_broken_image_is_named_in_one_line(capsys, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(0, 256, (20 + i, 24, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "a" / "broken.jpg").write_text("no image")
    words = ("--data", "folder", "--data-dir", tmp_path / "photos", "--image-size", 16)
    assert run(*words, *SMALL, "--output", tmp_path / "o") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first == (
        "clae-fast pretrain: warning: skipped a broken image: a/broken.jpg (no image that can "
        "be read)"
    )
    assert json.loads((tmp_path / "o" / "result.json").read_text())["config"]["image_size"] == 16


def test_load_run_names_what_is_wrong(tmp_path, small):
    with pytest.raises(ConfigError, match="expected the folder of a run, and it holds no config"):
        load_run(tmp_path)
    assert run(*SMALL, "--output", tmp_path / "o") == 0
    weights = tmp_path / "o" / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors cannot be read"):
        load_run(tmp_path / "o")
    weights.unlink()
    unfinished = load_run(tmp_path / "o")
    assert (unfinished.epoch, unfinished.finished) == (1, False)


def test_load_run_gives_the_trained_model(tmp_path, small):
    words = ("--epochs", 1, "--workers", 0, "--threads", 1, "--output", tmp_path / "o")
    assert run(*words) == 0
    x = torch.randn(3, 1, 28, 28)
    finished = load_run(tmp_path / "o")
    (tmp_path / "o" / "encoder.safetensors").unlink()
    from_checkpoint = load_run(tmp_path / "o")
    assert not any(".aux." in name for name in from_checkpoint.model.state_dict())
    assert torch.equal(finished.model(x), from_checkpoint.model(x))
    fresh = ResidualEncoder().eval()
    assert not torch.equal(fresh(x), finished.model(x))


# --- files ---


def test_atomic_path_replaces_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.json"
    with atomic_path(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_text() == "first"
    assert target.stat().st_mode & 0o777 == 0o666 & ~current_umask()

    def half_a_file(error):
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            half_a_file(error)
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_that_fails_leaves_the_earlier_run(tmp_path, subset, monkeypatch):
    config = PretrainConfig(epochs=1, workers=0, threads=1, clae=False)
    write_result(pretrain(config, data=subset), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_result(pretrain(config, data=subset), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("channels", [1, 3])
def test_figure_is_a_readable_png(channels, tmp_path):
    from matplotlib.image import imread

    torch.manual_seed(0)
    x = torch.rand(4, channels, 28, 28)
    examples = loop.Examples(x, x.flip(0), x + 0.01 * torch.randn_like(x).sign())
    adversarial_figure(examples, tmp_path / "adversarial.png", title="Title", subtitle="small")
    pixels = imread(tmp_path / "adversarial.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 400
    assert pixels.std() > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["adversarial.png"]
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.01, 50), (0.0092, 50), (0.03, 10), (0.3, 1), (2.0, 1), (0.0, 1)]
)
def test_amplification_is_round_and_fills_the_range(largest, factor):
    assert amplification(torch.tensor([0.0, -largest])) == factor


# --- progress ---


def test_plain_lines_are_few(capsys):
    with open_progress(95, 10, shown=True) as progress:
        for epoch in range(95):
            progress.update(epoch, 10, 1.0)
            progress.end_epoch(epoch, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= MAX_LINES
    assert lines[-1].startswith("epoch 95/95  loss 1.0000")
    assert "images/s" in lines[0]
    assert "s left" in lines[0]


def test_bar_on_a_terminal_shows_loss_rate_and_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with open_progress(2, 10, shown=True) as progress:
        progress.update(0, 10, 1.25)
        time.sleep(0.25)
        progress.update(1, 5, 0.75)
    text = sys.stderr.getvalue()
    for word in ("epoch 2/2", "images/s", "left", "loss 0.750"):
        assert word in text


def test_silent_unless_asked(capsys):
    with open_progress(1, 1, shown=False) as progress:
        progress.update(0, 1, 1.0)
        progress.end_epoch(0, 1.0)
    assert capsys.readouterr().err == ""
