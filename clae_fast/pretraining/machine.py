"""Device and threads of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import ConfigError, PretrainConfig


def choose_device(config: PretrainConfig) -> torch.device:
    """The device that the settings name.

    Raises:
        ConfigError: a GPU that is not there.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError("device", config.device, f"a device that is here ({count} GPUs)")
    return device


def default_threads(config: PretrainConfig) -> int:
    """What the workers leave of PyTorch's threads, 1 to 4.

    With more threads than free cores, OpenMP's threads spin while they wait for one another: on
    two cores a step then takes several times as long. Past 4 the small encoder gains nothing.
    """
    return max(1, min(4, torch.get_num_threads() - config.workers))


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """PyTorch's threads set to `count`, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
