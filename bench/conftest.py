"""Options, the line for each missing peer, and the results file."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from providers import missing, versions
from timing import gemm_ceiling

from clae_fast.pretraining.files import write_whole
from clae_fast.pretraining.provenance import provenance


def pytest_addoption(parser):
    group = parser.getgroup("clae_fast bench")
    group.addoption("--quick", action="store_true", help="a few small shapes, for correctness")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--threads", type=int, default=None, help="of PyTorch (default: its own)")
    group.addoption(
        "--results", type=Path, default=None, metavar="FILE", help="write all figures as JSON"
    )


class Session:
    """What all benchmarks share; `records` goes to the results file."""

    def __init__(self, config):
        self.device = config.getoption("--device")
        self.quick = config.getoption("--quick")
        if threads := config.getoption("--threads"):
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.records, self.measured = [], {}
        self.ceiling = None

    def gemm(self):
        if self.ceiling is None:
            self.ceiling = gemm_ceiling(self.device, 512 if self.quick else 2048)
        return self.ceiling


def pytest_configure(config):
    config.bench = Session(config)


@pytest.fixture(scope="session")
def bench(request):
    return request.config.bench


def pytest_report_header(config):
    device = config.bench.device
    facts = provenance(device)
    lines = [f"clae_fast bench on {facts['machine']}, {config.bench.threads} threads"]
    return lines + [f"not measured: {name}: {why}" for name, why in missing(device).items()]


def pytest_collection_modifyitems(config, items):
    if config.bench.quick:
        kept = [item for item in items if "quick" in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_sessionfinish(session, exitstatus):
    config, path = session.config, session.config.getoption("--results")
    if path is None or not config.bench.records:
        return
    found = {
        "provenance": provenance(config.bench.device)
        | {"threads": str(config.bench.threads), "system": platform.system()},
        "versions": versions(),
        "gemm_gflops": config.bench.gemm() / 1e9,
        "missing": missing(config.bench.device),
        "records": config.bench.records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
