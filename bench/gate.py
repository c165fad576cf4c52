"""Right before fast: the gradient of a provider against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor

from clae_fast import reference

FULL_UP_TO = 4096  # rows of S; above, 256 of them are looked at
SAMPLE = 256
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def inputs(shape: Shape, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Random embeddings, never zeros: positives are noisy copies, as training makes them."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(shape.pairs, shape.width, generator=g)
    k = q + torch.randn(shape.pairs, shape.width, generator=g)
    found = [q, k]
    if shape.queue:
        found.append(torch.randn(shape.queue, shape.width, generator=g))
    return [x.to(device) for x in found]


def gradients(loss: Callable[..., Tensor], xs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of the first two inputs (a queue needs none)."""
    leaves = [x.detach().requires_grad_(i < 2) for i, x in enumerate(xs)]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves[:2] if x.grad is not None]


class Truth:
    """Loss and gradient rows of a shape in float64, once for all providers."""

    def __init__(self, shape: Shape) -> None:
        self.inputs = inputs(shape)
        self.begin, self.count = 0, shape.pairs
        if shape.rows > FULL_UP_TO:
            self.begin, self.count = shape.pairs // 3, SAMPLE
        xs = [x.double() for x in self.inputs]
        self.gradients = _rows(shape, xs, slice(self.begin, self.begin + self.count))

    def error(self, loss: Callable[..., Tensor]) -> float:
        """The larger of ||dq - truth|| / ||truth|| and the same of dk, over the rows looked at."""
        _, got = gradients(loss, self.inputs)
        if len(got) != 2:
            return float("inf")  # a gradient is missing
        rows = slice(self.begin, self.begin + self.count)
        return max(
            float((x[rows].double().cpu() - truth).norm() / truth.norm())
            for x, truth in zip(got, self.gradients, strict=True)
        )


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE[dtype]


def _rows(shape: Shape, xs: list[Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """Those rows of dq and dk, by the pair operators of the specification: all log-sum-exps, then
    the rows alone."""
    t, B = 1 / shape.temperature, shape.pairs
    q, k, *n = (F.normalize(x, dim=1) for x in xs)
    cos = (q * k).sum(1)
    lse = functools.partial(reference.pair_lse, scale=t)
    if shape.loss == "nt_xent":
        z = torch.cat((q, k))
        all_lse = lse(z, z, skip="twins")
        r = torch.sigmoid(all_lse - torch.cat((cos, cos)) * t)
        both = {"col_lse": all_lse, "col_weight": r, "skip": "twins"}
        g = [
            _sweep(x, z, t, rows, (all_lse[half], r[half]), offset=start, **both)
            for x, half, start in ((q, slice(0, B), 0), (k, slice(B, None), B))
        ]
        pull, mean = r[:B] + r[B:], 2 * B
    elif shape.loss == "clip":
        by_row, by_col = lse(q, k, skip="diagonal"), lse(k, q, skip="diagonal")
        r, c = torch.sigmoid(by_row - cos * t), torch.sigmoid(by_col - cos * t)
        g = [
            _sweep(q, k, t, rows, (by_row, r), col_lse=by_col, col_weight=c, skip="diagonal"),
            _sweep(k, q, t, rows, (by_col, c), col_lse=by_row, col_weight=r, skip="diagonal"),
        ]
        pull, mean = r + c, 2 * B
    else:
        keys, skip = (n[0], "none") if n else (k, "diagonal")
        by_row = lse(q, keys, skip=skip)
        r = torch.sigmoid(by_row - cos * t)
        g = [_sweep(q, keys, t, rows, (by_row, r), skip=skip), torch.zeros_like(k[rows])]
        if not n:
            g[1] = _sweep(k, q, t, rows, None, col_lse=by_row, col_weight=r, skip=skip)
        pull, mean = r, B
    found = []
    for x, mine, partner, dz in zip(xs, (q, k), (k, q), g, strict=False):
        dz = (dz - t * pull[rows, None] * partner[rows]) / mean
        radial = (dz * mine[rows]).sum(1, keepdim=True) * mine[rows]
        found.append((dz - radial) / x[rows].norm(dim=1, keepdim=True))
    return found[0], found[1]


def _sweep(
    x: Tensor,
    keys: Tensor,
    t: float,
    rows: slice,
    by_row: tuple[Tensor, Tensor] | None,
    offset: int = 0,
    **options: Any,
) -> Tensor:
    if by_row is not None:
        options |= {"row_lse": by_row[0][rows], "row_weight": by_row[1][rows]}
    return reference.pair_grad(x[rows], keys, t, offset=offset + rows.start, **options)
