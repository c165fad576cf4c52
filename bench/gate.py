"""Right before fast: loss and gradients of a provider against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from own import own
from shapes import Shape
from torch import Tensor

from clae_fast import reference

BY_SWEEPS = ("nt_xent", "info_nce", "info_nce, queue", "clip")  # `_truth` of all others: autograd
FULL_UP_TO = 4096  # rows of S; above, the gradients of 256 of them are looked at
SAMPLE = 256
# float32 explains 2e-5 at the scales of the shapes; weights or rows rounded to 16 bits, with exact
# sums, are off by 2e-4 in float16 and 1.7e-3 to 2.8e-3 in bfloat16: twice that at least.
GRADIENT_LIMIT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def inputs(shape: Shape, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Random embeddings, never zeros: positives are noisy copies, as training makes them."""
    g = torch.Generator(device).manual_seed(seed)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, shape.width, generator=g, device=device)

    q = random(shape.pairs)
    found = [q, q + shape.noise * random(shape.pairs)]
    if shape.queue or shape.extra:
        found.append(random(shape.queue or shape.extra))
    return [x.to(shape.dtype) for x in found]


def gradients(
    loss: Callable[..., Tensor], xs: list[Tensor], learned: int = 2
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of the first inputs, `shape.learned` of them."""
    leaves = [x.detach().requires_grad_(i < learned) for i, x in enumerate(xs)]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves[:learned]]


class Errors(NamedTuple):
    """Of one way of calling a provider; None: that way gives no gradient."""

    loss: float  # |loss - truth| / max(|truth|, 1)
    gradient: float | None  # the largest of ||dx - truth|| / ||truth|| of the inputs

    def wrong(self, shape: Shape) -> str | None:
        """What is off by more than the dtype explains, or None."""
        half = shape.dtype in (torch.float16, torch.bfloat16)
        limit = GRADIENT_LIMIT[shape.dtype] if half else max(2e-6, 1e-7 / shape.temperature)
        if not self.loss <= limit:
            return f"loss error {self.loss:.1e}, allowed {limit:.0e}"
        limit = GRADIENT_LIMIT[shape.dtype]
        if self.gradient is not None and not self.gradient <= limit:
            return f"gradient error {self.gradient:.1e}, allowed {limit:.0e}"
        return None


class Truth:
    """Loss and gradient rows of a shape in float64, once for all providers."""

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        begin = shape.pairs // 3 if shape.rows > FULL_UP_TO else 0
        self.rows = slice(begin, begin + SAMPLE if begin else None)
        self.inputs = inputs(shape, device=device)
        loss, grads = _truth(shape, [x.double() for x in self.inputs], self.rows)
        self.loss, self.gradients = loss, [g.cpu() for g in grads]

    def of_loss(self, value: Tensor) -> Errors:
        """Errors of a loss alone."""
        return Errors(abs(float(value) - self.loss) / max(abs(self.loss), 1.0), None)

    def of(self, value: Tensor, grads: Sequence[Tensor | None]) -> Errors:
        """Errors of a loss and the gradients of the first inputs."""
        errors = []
        for x, truth in zip(grads, self.gradients, strict=True):
            if x is None:
                errors.append(math.inf)
                continue
            difference = x[self.rows].double().cpu() - truth
            errors.append(float(difference.norm() / truth.norm()))
        worst = float(torch.tensor(errors).max())  # of Python, max() may drop a NaN
        return Errors(self.of_loss(value).loss, worst)


def _truth(shape: Shape, xs: list[Tensor], rows: slice) -> tuple[float, list[Tensor]]:
    """The mean loss, and those rows of the gradients, by the pair operators of the specification:
    all log-sum-exps, then the rows alone. UEL, whose operator is no sum of them, and the family:
    autograd through the specification, all rows.
    """
    if shape.kind not in BY_SWEEPS:
        loss = own(shape, "reference", str(xs[0].device))
        value, grads = gradients(loss, xs, shape.learned)
        return float(value), [x[rows] for x in grads if x is not None]
    t, B = 1 / shape.temperature, shape.pairs
    q, k, *n = (F.normalize(x, dim=1) for x in xs)
    cos = (q * k).sum(1)
    lse = functools.partial(reference.pair_lse, scale=t)
    if shape.loss == "nt_xent":
        z = torch.cat((q, k))
        all_lse = lse(z, z, skip="twins")
        margin = all_lse - torch.cat((cos, cos)) * t
        r = torch.sigmoid(margin)
        both = {"col_lse": all_lse, "col_weight": r, "skip": "twins"}
        g = [
            _sweep(x, z, t, rows, (all_lse[half], r[half]), offset=start, **both)
            for x, half, start in ((q, slice(0, B), 0), (k, slice(B, None), B))
        ]
        pull, mean = r[:B] + r[B:], 2 * B
    elif shape.loss == "clip":
        by_row, by_col = lse(q, k, skip="diagonal"), lse(k, q, skip="diagonal")
        margin = torch.cat((by_row, by_col)) - torch.cat((cos, cos)) * t
        r, c = torch.sigmoid(margin).chunk(2)
        g = [
            _sweep(q, k, t, rows, (by_row, r), col_lse=by_col, col_weight=c, skip="diagonal"),
            _sweep(k, q, t, rows, (by_col, c), col_lse=by_row, col_weight=r, skip="diagonal"),
        ]
        pull, mean = r + c, 2 * B
    else:
        keys, skip = (n[0], "none") if n else (k, "diagonal")
        by_row = lse(q, keys, skip=skip)
        margin = by_row - cos * t
        r = torch.sigmoid(margin)
        g = [_sweep(q, keys, t, rows, (by_row, r), skip=skip), torch.zeros_like(k[rows])]
        if not n:
            g[1] = _sweep(k, q, t, rows, None, col_lse=by_row, col_weight=r, skip=skip)
        pull, mean = r, B
    found = []
    for x, mine, partner, dz in zip(xs, (q, k), (k, q), g, strict=False):
        dz = (dz - t * pull[rows, None] * partner[rows]) / mean
        radial = (dz * mine[rows]).sum(1, keepdim=True) * mine[rows]
        found.append((dz - radial) / x[rows].norm(dim=1, keepdim=True))
    loss = float(torch.logaddexp(margin, torch.zeros_like(margin)).mean())
    return loss, found


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
