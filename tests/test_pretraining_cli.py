"""`clae-fast pretrain`: options, errors, files, figure, Ctrl-C."""

import argparse
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from clae_fast.pretraining import (
    PretrainConfig,
    ResidualEncoder,
    cli,
    files,
    loop,
    mnist5k,
    pretrain,
)
from clae_fast.pretraining.figures import adversarial_figure, amplification
from clae_fast.pretraining.files import atomic_path, unwritable_reason
from clae_fast.pretraining.output import write_result
from clae_fast.pretraining.progress import MAX_LINES, open_progress


@pytest.fixture(scope="module")
def subset():
    data = mnist5k()
    return dataclasses.replace(
        data,
        train_images=data.train_images[::32],
        train_labels=data.train_labels[::32],
        test_images=data.test_images[::10],
        test_labels=data.test_labels[::10],
    )


def run(*words):
    parser = argparse.ArgumentParser(prog="clae-fast")
    cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["pretrain", *map(str, words)])
    return args.run(args)


@pytest.fixture
def small(monkeypatch, subset):
    """`pretrain` on 125 images."""
    monkeypatch.setattr(loop, "load_data", lambda name: subset)


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
        (["--data", "cifar99"], "--data cifar99: expected one of mnist5k"),
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
    assert not (tmp_path / "o").exists()


# --- a run ---


def test_run_with_clae_writes_three_files(capsys, tmp_path, monkeypatch, small):
    from safetensors import safe_open
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    assert run("--epochs", 1, "--seed", 3, "--workers", 0, "--threads", 1) == 0
    folder = tmp_path / "runs" / "simclr-clae-mnist5k"
    names = {"adversarial.png", "encoder.safetensors", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == names

    captured = capsys.readouterr()
    for line in ("raw pixels", "untrained encoder", "trained encoder", *names):
        assert line in captured.out
    assert "epoch 1/1  loss " in captured.err  # stderr is no terminal: plain lines
    assert "\r" not in captured.err

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["seed"] == 3
    assert metrics["config"]["temperature"] == 0.5
    assert len(metrics["epoch_losses"]) == 1
    assert set(metrics["knn_accuracy"]) == {"raw_pixels", "untrained_encoder", "trained_encoder"}
    assert metrics["torch"] == torch.__version__
    assert metrics["train_seconds"] > 0

    with safe_open(folder / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == metrics["config"]
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
    assert {p.name for p in tmp_path.iterdir()} == {"encoder.safetensors", "metrics.json"}
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
    text = cli.add_parser(parser.add_subparsers()).format_help()
    config = PretrainConfig()
    for value in (config.epochs, config.batch_size, config.lr, config.eps, config.alpha):
        assert f"(default: {value:g})" in " ".join(text.split())
    assert "runs/<method>[-clae]-<data>" in text


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "clae_fast", "pretrain", "--output", tmp_path / "out"]
        + ["--epochs", "10", "--no-clae"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = process.stderr.readline()  # training has begun: an epoch is over
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker gets it too
    _, rest = process.communicate(timeout=60)
    assert first.startswith("epoch 1/10")
    assert process.returncode == 130
    lines = [line for line in rest.splitlines() if not line.startswith("epoch ")]
    assert lines == ["clae-fast pretrain: interrupted"]
    assert not (tmp_path / "out").exists()


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
