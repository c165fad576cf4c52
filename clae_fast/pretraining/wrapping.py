"""An encoder for several processes: BatchNorm over all images, gradients averaged."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from clae_fast.sync_batchnorm import SyncBatchNorm

from .config import ConfigError, PretrainConfig
from .processes import Processes

_SYNCHRONIZED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)


@contextlib.contextmanager
def synchronized_batchnorm(
    encoder: nn.Module, config: PretrainConfig, processes: Processes
) -> Iterator[None]:
    """Every BatchNorm of the encoder is a SyncBatchNorm inside the `with`, in several processes.

    The same objects under another class: parameters, buffers and state_dict keys stay.

    Raises:
        ConfigError: a BatchNorm of a class that is not known here.
    """
    layers = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and processes.size > 1]
    before = [(layer, type(layer), dict(layer.__dict__)) for layer in layers]
    for _, kind, _ in before:
        if kind not in _SYNCHRONIZED:
            raise ConfigError(
                "encoder",
                config.encoder,
                "one whose BatchNorm layers are PyTorch's own in several processes, got "
                f"{kind.__qualname__}",
            )
    try:
        for layer in layers:
            layer.__class__ = SyncBatchNorm
            layer.__dict__.setdefault("process_group", None)
        yield
    finally:
        for layer, kind, names in before:
            layer.__class__ = kind
            if "process_group" not in names:
                layer.__dict__.pop("process_group", None)


def data_parallel(encoder: nn.Module, processes: Processes) -> nn.Module:
    """The encoder under DistributedDataParallel in several processes, else as it is."""
    if processes.size == 1:
        return encoder
    # PyTorch gave the option another name; the old one warns.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in names)
    options: dict[str, Any] = {"find_unused_parameters": False, buffers: False}
    return DistributedDataParallel(encoder, **options)
