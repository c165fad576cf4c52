"""Device and threads of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import ConfigError, PretrainConfig
from .launch import launch


def choose_device(config: PretrainConfig) -> torch.device:
    """The device that the settings name; of several processes each has a GPU of its own.

    Raises:
        ConfigError: a GPU that is not there, or one for several processes.
    """
    here = launch()
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and here.size > 1:
        if ":" in name:
            raise ConfigError("device", config.device, "cuda, cpu or auto in several processes")
        device = torch.device("cuda", here.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError("device", config.device, f"a device that is here ({count} GPUs)")
    return device


def default_threads(config: PretrainConfig) -> int:
    """What the workers leave of PyTorch's threads, or of this process's cores, 1 to 4.

    With more threads than free cores, OpenMP's threads spin while they wait for one another: on
    two cores a step then takes several times as long. Past 4 the small encoder gains nothing.
    """
    processes = launch().local_size
    # torchrun sets PyTorch's threads to 1, however many cores there are.
    threads = torch.get_num_threads() if processes == 1 else _cores() // processes
    return max(1, min(4, threads - config.workers))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """PyTorch's threads set to `count`, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
