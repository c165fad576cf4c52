"""Checkpoints and `resume`: the same numbers as without a break, whatever ended the process."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import stop_after
from torch import nn

from clae_fast.pretraining import (
    CheckpointError,
    ConfigError,
    ContrastiveModel,
    Interrupted,
    NonFiniteLossError,
    PretrainConfig,
    load_run,
    pretrain,
)
from clae_fast.pretraining import checkpoint as checkpoint_module
from clae_fast.pretraining import loop as loop_module
from clae_fast.pretraining.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from clae_fast.pretraining.metrics import Metrics, read_metrics


def settings(**changes):
    return PretrainConfig(
        **{"epochs": 3, "batch_size": 32, "workers": 0, "threads": 1, "log_every": 1} | changes
    )


def numbers(folder):
    """metrics.jsonl without what time decides."""
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder)]


def assert_same(whole, resumed):
    assert resumed.epoch_losses == whole.epoch_losses
    assert resumed.knn_trained == whole.knn_trained
    assert resumed.knn_untrained == whole.knn_untrained
    assert resumed.knn_history == whole.knn_history
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(resumed.encoder.state_dict()[name], value), name
    assert (whole.examples is None) == (resumed.examples is None)
    if whole.examples is not None:
        assert torch.equal(whole.examples.x_adv, resumed.examples.x_adv)


class Dropping(ContrastiveModel):
    """Dropout draws from the global random state: that must go on too."""

    def __init__(self):
        backbone = nn.Sequential(
            nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
        )
        super().__init__(backbone, nn.Linear(4 * 36, 8))


@pytest.mark.parametrize(
    "changes",
    [
        {"knn_every": 2},
        {"clae": False, "optimizer": "sgd", "lr": 0.05, "method": "plain"},
        {"precision": "bfloat16", "method": "uel", "optimizer": "adam", "lr": 1e-3},
        {"precision": "float16", "workers": 1, "epochs": 2},
    ],
)
@pytest.mark.parametrize("steps", [2, 4, 7])  # of 4 an epoch: inside, at its end, in the next
def test_resume_gives_the_numbers_of_an_unbroken_run(changes, steps, subset, tmp_path, monkeypatch):
    config = settings(**changes)
    whole = pretrain(config, data=subset, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match="to go on: clae-fast pretrain --resume"):
            pretrain(config, data=subset, folder=tmp_path / "cut")
    resumed = pretrain(config, data=subset, folder=tmp_path / "cut", resume=True)
    assert_same(whole, resumed)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_resume_continues_dropout(subset, tmp_path, monkeypatch):
    def encoder():
        torch.manual_seed(0)
        return Dropping()

    config = settings()
    whole = pretrain(config, data=subset, encoder=encoder(), folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            pretrain(config, data=subset, encoder=encoder(), folder=tmp_path / "cut")
    resumed = pretrain(config, data=subset, encoder=encoder(), folder=tmp_path / "cut", resume=True)
    assert_same(whole, resumed)


def test_resume_after_a_crash_between_checkpoints(subset, tmp_path, monkeypatch):
    """The metrics of steps after the checkpoint are cut, not repeated."""
    config = settings()
    whole = pretrain(config, data=subset, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        real, count = loop_module.TrainingStep.__call__, 0

        def step(self, x_i, x_j):
            nonlocal count
            count += 1
            if count == 7:
                raise RuntimeError("power cut")
            return real(self, x_i, x_j)

        patch.setattr(loop_module.TrainingStep, "__call__", step)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(config, data=subset, folder=tmp_path / "cut")
    assert len(read_metrics(tmp_path / "cut")) == 7  # 6 steps and an epoch
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')  # a torn line
    assert len(read_metrics(tmp_path / "cut")) == 7
    resumed = pretrain(config, data=subset, folder=tmp_path / "cut", resume=True)
    assert_same(whole, resumed)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_anew(subset, tmp_path):
    config = settings(epochs=1)
    whole = pretrain(config, data=subset)
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    resumed = pretrain(config, data=subset, folder=tmp_path, resume=True)
    assert_same(whole, resumed)
    assert read_metrics(tmp_path)[0]["loss"] > 0


def test_a_fresh_run_replaces_what_an_earlier_one_left(subset, tmp_path):
    pretrain(settings(epochs=2), data=subset, folder=tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"folder=.*expected a folder without a run"):
        pretrain(settings(epochs=1, seed=1), data=subset, folder=tmp_path)
    pretrain(settings(epochs=1, seed=1), data=subset, folder=tmp_path, overwrite=True)
    assert [int(path.name) for path in checkpoints(tmp_path)] == [4]
    assert not (tmp_path / "result.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_metrics_lines(subset, tmp_path):
    config = settings(epochs=2, knn_every=1, log_every=3)
    result = pretrain(config, data=subset, folder=tmp_path)
    lines = read_metrics(tmp_path)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 3),
        ("epoch", 4),
        ("step", 6),
        ("epoch", 8),
    ]
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert tuple(line["loss"] for line in epochs) == result.epoch_losses
    assert [line["knn_accuracy"] for line in epochs] == [a for _, a in result.knn_history]
    assert epochs[-1]["knn_accuracy"] == result.knn_trained
    for line in lines:
        if line["event"] == "step":
            total = line["clean_loss"] + config.alpha * line["adversarial_loss"]
            assert line["loss"] == pytest.approx(total, rel=1e-5)
            assert line["batch"] == 32
    assert lines[0]["lr"] == pytest.approx(config.lr * (1 + 0.5**0.5) / 2)  # cosine, step 2 of 8


def test_tensorboard_holds_the_same_numbers(subset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(settings(epochs=1, tensorboard=True), data=subset, folder=tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    board = [(e.step, e.value) for e in events.Scalars("step/loss")]
    ours = [(x["step"], x["loss"]) for x in read_metrics(tmp_path) if x["event"] == "step"]
    assert [step for step, _ in board] == [step for step, _ in ours]
    assert [v for _, v in board] == pytest.approx([v for _, v in ours], rel=1e-6)


def test_tensorboard_of_a_resumed_run_has_every_step_once(subset, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(epochs=2, tensorboard=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            pretrain(config, data=subset, folder=tmp_path)
    pretrain(config, data=subset, folder=tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("step/loss")] == list(range(1, 9))
    assert [e.step for e in events.Scalars("epoch/loss")] == [4, 8]


def test_missing_tensorboard_is_named(subset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard=True: expected the package tensorboard"):
        pretrain(settings(tensorboard=True), data=subset, folder=tmp_path)


def test_nan_keeps_the_last_good_checkpoint(subset, tmp_path, monkeypatch):
    real, count = loop_module.TrainingStep.__call__, 0

    def step(self, x_i, x_j):
        nonlocal count
        count += 1
        return real(self, x_i * (torch.nan if count == 7 else 1), x_j)

    monkeypatch.setattr(loop_module.TrainingStep, "__call__", step)
    with pytest.raises(NonFiniteLossError) as caught:
        pretrain(settings(), data=subset, folder=tmp_path)
    message = str(caught.value)
    assert "the loss is nan at step 3 of 4 in epoch 2 of 3: " in message
    last = checkpoints(tmp_path)[-1]
    assert message.endswith(f"the last good checkpoint: {last}")
    weights, state = load_checkpoint(last)
    assert state["epoch"] == 1
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())
    assert load_run(tmp_path).epoch == 1


# --- the files ---


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    weights = {"w": torch.arange(3.0)}
    save_checkpoint(tmp_path, weights, {"n": 1}, 1)

    def torn(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.torch, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, weights, {"n": 2}, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    for step in (2, 3):
        save_checkpoint(tmp_path, weights, {"n": step}, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000002", "000000003"]
    loaded, state = load_checkpoint(checkpoints(tmp_path)[-1])
    assert torch.equal(loaded["w"], weights["w"])
    assert state == {"n": 3}


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    path = save_checkpoint(tmp_path, {"w": torch.ones(2)}, {"n": 1}, 1)
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"000000001/state\.pt cannot be read"):
        load_checkpoint(path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(path)


def test_no_code_is_run_when_a_checkpoint_is_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    path = save_checkpoint(tmp_path, {"w": torch.ones(2)}, {"n": 1}, 1)
    torch.save({"n": Evil()}, path / "state.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_other_data_is_refused(subset, tmp_path):
    pretrain(settings(epochs=1), data=subset, folder=tmp_path)
    other = dataclasses.replace(
        subset, train_images=subset.train_images[1:], train_labels=subset.train_labels[1:]
    )
    with pytest.raises(CheckpointError, match="num_images 125, these have 124"):
        pretrain(settings(epochs=1), data=other, folder=tmp_path, resume=True)


def test_resume_with_other_settings_is_refused(subset, tmp_path):
    pretrain(settings(epochs=1), data=subset, folder=tmp_path)
    for changes in ({"lr": 0.1}, {"epochs": 2}, {"seed": 4}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))}=.*as the run was started"):
            pretrain(settings(**{"epochs": 1} | changes), data=subset, folder=tmp_path, resume=True)
    pretrain(settings(epochs=1, workers=1), data=subset, folder=tmp_path, resume=True)


def test_lost_metrics_are_not_replaced_by_zeros(subset, tmp_path):
    pretrain(settings(epochs=1), data=subset, folder=tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    pretrain(settings(epochs=1), data=subset, folder=tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_metrics_keep_the_given_length(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write("step", 1, loss=0.5)
        length = metrics.length
        metrics.write("step", 2, loss=0.25)
    with Metrics(tmp_path, length) as metrics:
        metrics.write("step", 2, loss=0.125)
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5, 0.125]
    assert read_metrics(tmp_path / "nowhere") == []


KILLED = """
import os, signal, sys
from clae_fast.pretraining import checkpoint
from clae_fast.__main__ import main

real, count = checkpoint.torch.save, 0

def save(state, path):
    global count
    count += 1
    if count == 2:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    real(state, path)

checkpoint.torch.save = save
main(sys.argv[1:])
"""


def command(*words):
    return [sys.executable, "-m", "clae_fast", "pretrain", *map(str, words)]


def test_kill_9_in_the_middle_of_a_checkpoint(tmp_path):
    """The whole command line: killed while it writes the second checkpoint, then resumed."""
    words = ["--data", "digits", "--epochs", 3, "--threads", 1, "--workers", 0, "--no-clae"]
    subprocess.run(command(*words, "--output", tmp_path / "whole"), check=True)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "pretrain", *map(str, words), "--output", tmp_path / "cut"]
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(checkpoints(tmp_path / "cut")) == 1
    subprocess.run(command("--resume", tmp_path / "cut"), check=True)
    whole, cut = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")
    )
    for key in ("epoch_losses", "knn_accuracy"):
        assert whole[key] == cut[key]
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    weights = [load_run(tmp_path / name).model.state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    left = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(number, tmp_path):
    process = subprocess.Popen(
        command("--output", tmp_path / "out", "--epochs", 10, "--no-clae"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline().startswith("mnist5k: 4,000 training images and 1,000 test")
    first = process.stderr.readline()  # training has begun: an epoch is over
    time.sleep(0.3)
    os.killpg(process.pid, number)  # as terminals and job schedulers do: the worker gets it too
    _, rest = process.communicate(timeout=60)
    assert first.startswith("epoch 1/10")
    assert process.returncode == 130
    lines = [line for line in rest.splitlines() if not line.startswith("epoch ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("clae-fast pretrain: interrupted at step ")
    assert lines[0].endswith(f"to go on: clae-fast pretrain --resume {tmp_path / 'out'}")
    assert checkpoints(tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
