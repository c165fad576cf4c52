"""Options, the line for each missing peer, and the results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch._dynamo
from providers import missing, versions

from clae_fast.pretraining.files import unwritable_reason, write_whole
from clae_fast.pretraining.provenance import provenance


def pytest_addoption(parser):
    group = parser.getgroup("clae_fast bench")
    group.addoption("--quick", action="store_true", help="a few small shapes, for correctness")
    group.addoption("--seconds", type=float, default=5.0, help="about how long each shape is timed")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--threads", type=int, default=None, help="of PyTorch (default: its own)")
    group.addoption(
        "--results", type=Path, default=None, metavar="FILE", help="write all figures as JSON"
    )


MOST_THREADS = 1024  # PyTorch would try, and run out of memory


class Session:
    """What all benchmarks share; `records` goes to the results file, `notes` to the summary."""

    def __init__(self, config):
        self.device = device_of(config.getoption("--device"))
        self.quick = config.getoption("--quick")
        self.seconds = config.getoption("--seconds")
        if not 0 < self.seconds < float("inf"):
            raise pytest.UsageError(f"--seconds {self.seconds:g}: expected a number above 0")
        threads = config.getoption("--threads")
        if threads is not None:
            if not 1 <= threads <= MOST_THREADS:
                raise pytest.UsageError(
                    f"--threads {threads}: expected a number from 1 to {MOST_THREADS}"
                )
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        if self.device == "cuda":  # what others compute in float32 may use the tensor cores too
            torch.set_float32_matmul_precision("high")
        self.records, self.notes, self.measured = [], [], {}
        self.gemm_n = 512 if self.quick else 2048
        self.facts = provenance(self.device) | {"threads": str(self.threads)} | versions()


def device_of(name):
    if name not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {name}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: expected a GPU, and PyTorch sees none")
    return name


def not_a_folder(path):
    """Why no file can be made there, or None."""
    while not path.exists():
        path = path.parent
    return unwritable_reason(path) if path.is_dir() else f"{path} is a file"


@pytest.hookimpl(tryfirst=True)  # before the plugin reads its options
def pytest_configure(config):
    path = config.getoption("--results")
    if path is not None and (
        reason := "a folder" if path.is_dir() else not_a_folder(path.absolute().parent)
    ):
        raise pytest.UsageError(f"--results {path}: expected a file that can be written ({reason})")
    # What is timed as compiled was compiled.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    config.bench = Session(config)
    if config.bench.quick:
        config.option.benchmark_quiet = True  # no table of times


@pytest.fixture(scope="session")
def bench(request):
    return request.config.bench


def pytest_report_header(config):
    bench = config.bench
    return f"clae_fast bench on {bench.facts['machine']}, {bench.threads} threads"


def pytest_collection_modifyitems(config, items):
    bench = config.bench
    kept = [
        item
        for item in items
        if (not bench.quick or "quick" in item.keywords)
        and (bench.device == "cpu" or "cpu" not in item.keywords)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    bench = config.bench
    terminalreporter.section("clae_fast bench")
    if bench.quick:
        terminalreporter.write_line("--quick looks at correctness; its times say nothing.")
    for name, why in missing(bench.device).items():
        terminalreporter.write_line(f"not measured: {name}: {why}")
    for note in dict.fromkeys(bench.notes):
        terminalreporter.write_line(note)


def pytest_runtest_teardown(item):
    if item.config.bench.device == "cuda":  # a run there may be cut short
        save(item.config)


def pytest_sessionfinish(session, exitstatus):
    save(session.config)


def save(config):
    """All figures so far."""
    path = config.getoption("--results")
    if path is None or not config.bench.records:
        return
    found = {
        "provenance": config.bench.facts,
        "quick": config.bench.quick,
        "device": config.bench.device,
        "gemm_n": config.bench.gemm_n,
        "missing": missing(config.bench.device),
        "records": config.bench.records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
