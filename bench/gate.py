"""Right before fast: the gradient of a provider against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
        self.dq = _rows_of_dq(shape, [x.double() for x in self.inputs], self.begin, self.count)

    def error(self, loss: Callable[..., Tensor]) -> float:
        """||dq - truth|| / ||truth|| over the rows that are looked at."""
        _, (dq, _) = gradients(loss, self.inputs)
        rows = dq[self.begin : self.begin + self.count].double().cpu()
        return float((rows - self.dq).norm() / self.dq.norm())


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE[dtype]


def _rows_of_dq(shape: Shape, xs: list[Tensor], begin: int, count: int) -> Tensor:
    """Rows begin .. begin + count of the gradient of the first input, by the pair operators of the
    specification: all log-sum-exps, then those rows alone."""
    t, B = 1 / shape.temperature, shape.pairs
    norm = xs[0].norm(dim=1, keepdim=True)[begin : begin + count]
    q, k, *n = (F.normalize(x, dim=1) for x in xs)
    mine, partner = q[begin : begin + count], k[begin : begin + count]
    s_pos = (q * k).sum(1) * t
    lse = functools.partial(reference.pair_lse, scale=t)
    grad = functools.partial(reference.pair_grad, scale=t)
    if shape.loss == "nt_xent":
        z = torch.cat((q, k))
        all_lse = lse(z, z, skip="twins")
        r = torch.sigmoid(all_lse - torch.cat((s_pos, s_pos)))
        g = grad(
            mine, z, skip="twins", offset=begin, row_lse=all_lse[begin : begin + count],
            row_weight=r[begin : begin + count], col_lse=all_lse, col_weight=r,
        )  # fmt: skip
        pull, mean = r[:B] + r[B:], 2 * B
    elif shape.loss == "clip":
        by_row, by_col = lse(q, k, skip="diagonal"), lse(k, q, skip="diagonal")
        r, c = torch.sigmoid(by_row - s_pos), torch.sigmoid(by_col - s_pos)
        g = grad(
            mine, k, skip="diagonal", offset=begin, row_lse=by_row[begin : begin + count],
            row_weight=r[begin : begin + count], col_lse=by_col, col_weight=c,
        )  # fmt: skip
        pull, mean = r + c, 2 * B
    else:
        keys, skip = (n[0], "none") if n else (k, "diagonal")
        by_row = lse(mine, keys, skip=skip, offset=begin)
        r = torch.sigmoid(by_row - s_pos[begin : begin + count])
        g = grad(mine, keys, skip=skip, offset=begin, row_lse=by_row, row_weight=r)
        pull, mean = torch.zeros(B, dtype=torch.float64), B
        pull[begin : begin + count] = r
    g = (g - t * pull[begin : begin + count, None] * partner) / mean
    return (g - (g * mine).sum(1, keepdim=True) * mine) / norm
