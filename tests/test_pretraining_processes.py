"""Pre-training in two processes: the numbers of one, one writer, stops and resumes together."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import mnist_subset
from processes import run
from runs import stop_after

from clae_fast.pretraining import (
    ConfigError,
    Interrupted,
    PretrainConfig,
    load_run,
    pretrain,
)
from clae_fast.pretraining import loop as loop_module
from clae_fast.pretraining.checkpoint import checkpoints, load_checkpoint
from clae_fast.pretraining.launch import launch
from clae_fast.pretraining.machine import choose_device, default_threads
from clae_fast.pretraining.metrics import read_metrics
from clae_fast.pretraining.processes import OtherProcessError, Processes, run_processes
from clae_fast.pretraining.runs import read_config
from clae_fast.pretraining.views import EpochBatches, TwoViews, check_shares

TESTS = Path(__file__).parent
WORLD = 2


def settings(**changes):
    """125 images in batches of 40: the last batch has 5, 2 for one process and 3 for the other."""
    return PretrainConfig(
        **{
            "epochs": 2, "batch_size": 40, "workers": 0, "threads": 1, "log_every": 1,
            "optimizer": "sgd", "lr": 0.05, "encoder": "double_net:with_batchnorm",
            "projector": "none", "view_seeds": "image",
        } | changes
    )  # fmt: skip


CASES = {
    "simclr": {"knn_every": 1},
    "plain_without_clae": {"method": "plain", "clae": False, "workers": 1},
    "uel_shared": {"method": "uel", "attack": "shared"},
    "published": {"attack": "published"},
    "plain_published": {"attack": "published", "method": "plain", "eps_pixels": 0.1, "clamp": True},
    "accumulated": {"encoder": "double_net:independent", "accumulate": 3},
    "one_seed_a_batch": {"view_seeds": "batch", "epochs": 1},
    "compiled": {"compile": True, "epochs": 1},
}
DROPOUT = {"encoder": "double_net:with_dropout", "epochs": 3}


def outcome(result):
    """What can be saved of a result."""
    return {
        "weights": result.encoder.state_dict(),
        "kinds": [type(m).__name__ for m in result.encoder.modules()],
        "losses": list(result.epoch_losses),
        "knn": [result.knn_untrained, result.knn_trained, result.knn_pixels],
        "history": [list(pair) for pair in result.knn_history],
        "examples": None if result.examples is None else list(vars(result.examples).values()),
    }


def numbers(folder):
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder)]


def interrupted(config, data, folder, steps, rank):
    """The signal comes to one process only."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            stop_after(patch, steps)
        with pytest.raises(Interrupted) as caught:
            pretrain(config, data=data, folder=folder)
    return caught.value.message


def worker(rank, folder):
    data, folder = mnist_subset(32), Path(folder)
    real = torch.compile
    torch.compile = functools.partial(real, backend="aot_eager")
    found = {}
    for name, changes in CASES.items():
        found[name] = outcome(pretrain(settings(**changes), data=data, folder=folder / name))
    torch.compile = real
    config = settings(**DROPOUT)
    found["whole"] = outcome(pretrain(config, data=data, folder=folder / "whole"))
    found["message"] = interrupted(config, data, folder / "cut", 6, rank)
    if rank == 0:
        shutil.copytree(folder / "cut", folder / "cut_for_one")
    found["cut"] = outcome(pretrain(config, data=data, folder=folder / "cut", resume=True))
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            interrupted_alone(patch, data, folder / "of_one")
    torch.distributed.barrier()
    two = settings(epochs=3)
    found["of_one"] = outcome(pretrain(two, data=data, folder=folder / "of_one", resume=True))
    found["message_of_one"] = interrupted(two, data, folder / "of_two", 6, rank)
    return found | {"errors": errors(data, folder, rank)}


def interrupted_alone(patch, data, folder):
    """A run of one process, before the others join it."""
    patch.setattr(loop_module, "run_processes", alone)
    stop_after(patch, 6)
    with pytest.raises(Interrupted):
        pretrain(settings(epochs=3), data=data, folder=folder)


class alone:
    def __init__(self, config):
        pass

    def __enter__(self):
        return Processes()

    def __exit__(self, *_):
        pass


def errors(data, folder, rank):
    """Every process ends with an error, whichever of them has met it."""
    found = []

    def note(kinds, job):
        with pytest.raises(kinds) as caught:
            job()
        found.append(f"{type(caught.value).__name__}: {caught.value}")

    note(ConfigError, lambda: pretrain(settings(batch_size=31), data=data))
    note(ConfigError, lambda: pretrain(settings(), data=mnist_subset(32 - rank)))
    note(
        (ConfigError, OtherProcessError),
        lambda: pretrain(settings(), data=data, folder=folder / "whole"),
    )
    with run_processes(settings()) as processes:

        def job():
            if rank == 1:
                raise OSError("no such disk")

        note((OSError, OtherProcessError), lambda: processes.together(job))
        assert processes.any(rank == 1)
        assert not processes.any(False)
        assert processes.gather(rank) == [0, 1]
        assert processes.first_alone(lambda: rank + 5) == 5
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder):
    return run(worker, WORLD, str(folder), within=300)


def assert_close(got, expected):
    assert got["kinds"] == expected["kinds"]
    assert got["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-6, atol=1e-8)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert got["knn"] == expected["knn"]
    assert got["history"] == expected["history"]
    assert (got["examples"] is None) == (expected["examples"] is None)
    for a, b in zip(got["examples"] or [], expected["examples"] or [], strict=True):
        assert (a != b).float().mean() < 1e-3  # signs of gradients that are 0 but for rounding


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(found, folder, name, subset):
    changes = CASES[name] | {"compile": False}
    expected = outcome(pretrain(settings(**changes), data=subset, folder=folder / f"{name}_alone"))
    for part in found:
        assert_close(part[name], expected)
    ours, theirs = numbers(folder / name), numbers(folder / f"{name}_alone")
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.pop("event") == b.pop("event")
        assert a == pytest.approx(b, rel=1e-6)


def test_a_signal_to_one_process_stops_all_after_the_same_step(found, folder):
    for part in found:
        assert part["message"].startswith("interrupted at step 2 of 4 in epoch 2 of 3; to go on")
        assert "to go on: torchrun --nproc-per-node 2 -m clae_fast pretrain" in part["message"]
    assert [path.name for path in checkpoints(folder / "cut_for_one")] == ["000000004", "000000006"]


def test_resumed_by_as_many_it_gives_the_very_numbers(found, folder):
    for part in found:  # dropout too: the random states of both were kept
        whole, cut = part["whole"], part["cut"]
        assert all(torch.equal(cut["weights"][k], v) for k, v in whole["weights"].items())
        assert cut["losses"] == whole["losses"]
    assert numbers(folder / "cut") == numbers(folder / "whole")


def test_every_process_draws_its_own_random_numbers(found, folder):
    _, state = load_checkpoint(checkpoints(folder / "whole")[-1])
    first, second = state["rng"]
    assert not torch.equal(first, second)
    weights = [part["whole"]["weights"] for part in found]  # and has the same result
    assert all(torch.equal(weights[1][k], v) for k, v in weights[0].items())


def test_resumed_by_another_number_of_processes(found, folder, subset):
    """Without dropout: the numbers of a run of one, from one to two and from two to one."""
    config = settings(epochs=3)
    expected = outcome(pretrain(config, data=subset))
    for part in found:
        assert_close(part["of_one"], expected)
    resumed = pretrain(config, data=subset, folder=folder / "of_two", resume=True)
    assert_close(outcome(resumed), expected)
    with_dropout = settings(**DROPOUT)
    alone = pretrain(with_dropout, data=subset, folder=folder / "cut_for_one", resume=True)
    assert len(alone.epoch_losses) == 3
    assert alone.epoch_losses[0] == found[0]["whole"]["losses"][0]


def test_errors_reach_every_process(found):
    for rank, part in enumerate(found):
        small, other, held, disk = part["errors"]
        assert other.startswith("ConfigError: data_dir='data': expected the same images in all")
        assert other.endswith("num_images is 125 in the first and 130 in process 1")
        assert small.startswith("ConfigError: batch_size=31: expected one that leaves an image")
        assert small.endswith("of 2 processes (the smallest of 125 images has 1), or drop_last")
        assert "expected a folder without a run" in held
        assert held.startswith(
            "ConfigError" if rank == 0 else "OtherProcessError: process 0 of 2 failed: ConfigError"
        )
        assert disk == (
            "OSError: no such disk"
            if rank == 1
            else "OtherProcessError: process 1 of 2 failed: OSError: no such disk"
        )


# --- without a process group ---


def test_views_of_an_image_do_not_depend_on_the_number_of_processes(subset):
    indices = torch.arange(11)

    def shifted(image):
        return image + torch.rand(1)

    for per_image in (True, False):
        options = {"mean": (0.1,), "std": (0.3,), "transform": shifted, "per_image": per_image}
        views = functools.partial(TwoViews, subset.train_images, **options)
        whole = views()[indices, 5]
        parts = [views(processes=Processes(rank, 3))[indices, 5] for rank in range(3)]
        assert [len(x) for x, _ in parts] == [3, 4, 4]
        for which in range(2):
            assert torch.equal(torch.cat([part[which] for part in parts]), whole[which])
        assert not torch.equal(whole[0], whole[1])


def test_batches_that_leave_a_process_without_an_image():
    check_shares(EpochBatches(10, 4, 0), Processes(0, 2))
    check_shares(EpochBatches(10, 4, 0, drop_last=True), Processes(0, 4))
    for batches, size in ((EpochBatches(10, 4, 0), 3), (EpochBatches(3, 4, 0, drop_last=True), 4)):
        with pytest.raises(ConfigError, match=r"batch_size=4: .*or drop_last"):
            check_shares(batches, Processes(1, size))


def test_what_torchrun_says(monkeypatch):
    assert launch() == (0, 1, 0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch().size == 1  # of some other launcher: nobody to meet
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch() == (3, 4, 1, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert default_threads(PretrainConfig(workers=1)) == 2  # of 3 cores
    assert choose_device(PretrainConfig(device="cpu")).type == "cpu"
    with pytest.raises(ConfigError, match=r"device='cuda:1': expected cuda, cpu or auto"):
        choose_device(PretrainConfig(device="cuda:1"))


# --- the command line under torchrun ---


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        + ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "clae_fast", "pretrain"]
        + [str(word) for word in words],
        cwd=TESTS,  # where double_net lies
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


DIGITS = ("--data", "digits", "--workers", 0, "--no-clae", "--batch-size", 200)
SMALL = ("--encoder", "double_net:with_batchnorm", "--projector", "none")


def test_the_command_line_has_one_writer(tmp_path):
    process = start(*DIGITS, *SMALL, "--epochs", 2, "--output", tmp_path / "out")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("trained encoder") == 2  # one of them "untrained encoder"
    assert err.count("digits: 1,442 training images") == 1
    assert err.count("epoch 2/2") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [8, 10, 16]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["config"]["threads"] == default_threads_of_two()
    assert load_run(tmp_path / "out").finished


def default_threads_of_two():
    cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // 2))


def test_sigterm_then_one_process_goes_on(tmp_path, monkeypatch):
    process = start(*DIGITS, *SMALL, "--epochs", 60, "--output", tmp_path / "out")
    while "epoch" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, err = process.communicate(timeout=60)
    assert err.count("clae-fast pretrain: interrupted ") == 1, err
    assert "Error: " not in err.split("interrupted ")[0]
    state = checkpoints(tmp_path / "out")
    assert state
    stop_after(monkeypatch, 12)
    with pytest.raises(Interrupted):
        pretrain(read_config(tmp_path / "out"), folder=tmp_path / "out", resume=True)
    assert int(checkpoints(tmp_path / "out")[-1].name) == int(state[-1].name) + 12
    steps = [x["step"] for x in read_metrics(tmp_path / "out") if x["event"] == "step"]
    assert steps == list(range(10, int(state[-1].name) + 13, 10))


def test_a_process_that_fails_ends_the_run(tmp_path):
    began = time.monotonic()
    process = start(
        *DIGITS, "--encoder", "double_net:failing", "--projector", "none", "--output", tmp_path
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "RuntimeError: out of luck" in err
    assert time.monotonic() - began < 100


def test_a_wrong_setting_is_one_line(tmp_path):
    process = start(*DIGITS, "--batch-size", 131, "--output", tmp_path / "out")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("clae-fast pretrain: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("clae-fast pretrain: error: --batch-size 131: expected one that ")
    assert not (tmp_path / "out").exists()
