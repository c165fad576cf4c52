"""The pair operators with a loss's scale and backend bound, over all keys there are.

A loss that is glue over operators asks an object of this kind for its sweeps. Here the keys are
those of this process; over a process group the same calls, with this process's share of the keys,
reach the others' too (`distributed.py`).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .numerics import compute_dtype
from .ops import call


class Sweeps(Protocol):
    """`q` are this process's rows; `k`, `col_*` its share of the columns. `skip` and its offset
    relate them; other processes' columns are only left out where ids are equal."""

    def lse(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        """`reference.pair_lse` over all columns; `wide` where `of_rows` says so."""

    def grad(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        """`reference.pair_grad` over all columns."""

    def sigmoid(self, q: Tensor, k: Tensor, **rules: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`reference.pair_sigmoid` over all columns; row i's positive is this process's i."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes."""

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; they may differ in number."""

    def start(self, rows: int, like: Tensor) -> int:
        """Where this process's rows begin among those that `gather` returns."""

    def upstream(self, g: Tensor) -> Tensor:
        """What arrives at a loss that all processes return, as the gradient of this one's share."""


class Where(NamedTuple):
    """Which kernels sweep, and over which processes' keys."""

    backend: str
    group: str = ""
    exchange: str = "auto"
    call: str = ""

    @property
    def here(self) -> "Where":
        """The same over this process's keys alone."""
        return Where(self.backend)


def of_rows(x: Tensor, where: Where) -> torch.dtype:
    """The dtype of what is one number a row, log-sum-exps and positives.

    A float32 of about t is off by t eps: the weights of a row would not sum to 1, and a gradient
    that is a small difference of such sums would be that error. On a CPU they are float64.
    """
    wide = x.device.type == "cpu" and where.backend != "triton"
    return torch.float64 if wide else compute_dtype(x.dtype)


class Local(NamedTuple):
    """Sweeps over this process's keys alone."""

    scale: float
    scale_tensor: Tensor | None
    reciprocal: bool
    backend: str

    def _scale(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "scale_tensor": self.scale_tensor,
            "reciprocal": self.reciprocal,
            "backend": self.backend,
        }

    def lse(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        return call("pair_lse", q, k, **self._scale(), **rules)

    def mean(self, q: Tensor, k: Tensor, **rules: Any) -> tuple[Tensor, Tensor]:
        return call("pair_mean", q, k, **self._scale(), **rules)

    def grad(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        return call("pair_grad", q, k, **self._scale(), **rules)

    def sigmoid(self, q: Tensor, k: Tensor, **rules: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return call("pair_sigmoid", q, k, **self._scale(), **rules)

    def total(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def start(self, rows: int, like: Tensor) -> int:
        return 0

    def upstream(self, g: Tensor) -> Tensor:
        return g
