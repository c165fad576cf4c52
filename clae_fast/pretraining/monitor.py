"""Sums the losses and stops at the first that is not finite."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import PretrainConfig


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or Inf: at which step and epoch, and the likely cause."""


class LossMonitor:
    """Collects the step losses of an epoch and reads them in groups.

    Reading a loss waits for the device, so on a GPU `every` steps are read at once and a NaN is
    found that much later; the step that is named is the first all the same.

    Args:
        config: for the words of the error.
        encoder: whose weights tell the cause.
        every: losses read together.

    `total` (the losses times their images) and `images` are of the epoch so far.
    """

    def __init__(self, config: PretrainConfig, encoder: nn.Module, every: int = 1) -> None:
        self.config, self.encoder, self.every = config, encoder, every
        self.total, self.images = 0.0, 0
        self.last = math.nan
        self._waiting: list[tuple[int, torch.Tensor, int]] = []

    def add(self, epoch: int, step: int, num_steps: int, loss: torch.Tensor, images: int) -> None:
        """The loss (a mean over `images`) of that step of `num_steps` in that epoch, from 0."""
        self._waiting.append((step, loss, images))
        if len(self._waiting) >= self.every or step + 1 == num_steps:
            self.read(epoch, num_steps)

    def read(self, epoch: int, num_steps: int) -> None:
        """Read what waits.

        Raises:
            NonFiniteLossError: the first loss that is NaN or Inf.
        """
        if not self._waiting:
            return
        values = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        for (step, _, images), value in zip(self._waiting, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss is {value} at step {step + 1} of {num_steps} in epoch "
                    f"{epoch + 1} of {self.config.epochs}: {cause(self.encoder, self.config)}"
                )
            self.total += value * images
            self.images += images
            self.last = value
        self._waiting.clear()

    def check_weights(self, epoch: int) -> None:
        """Raises NonFiniteLossError where weights or statistics are NaN or Inf after an epoch."""
        tensors = [p for p in self.encoder.state_dict().values() if p.is_floating_point()]
        if not all(bool(torch.isfinite(p).all()) for p in tensors):
            raise NonFiniteLossError(
                f"the weights or statistics are not finite after epoch {epoch + 1} of "
                f"{self.config.epochs}: {cause(self.encoder, self.config)}"
            )


def cause(encoder: nn.Module, config: PretrainConfig) -> str:
    """The likely cause, and what to change."""
    largest = max((float(p.detach().abs().max()) for p in encoder.parameters()), default=0.0)
    if not largest < 1e4:  # also NaN
        return f"the weights grew to {largest:.3g}; lower lr (now {config.lr:g})"
    return (
        f"the weights are in order (largest {largest:.3g}), so the embeddings or the loss "
        f"overflowed; raise temperature (now {config.loss_temperature:g}) or lower "
        f"lr (now {config.lr:g})"
    )
