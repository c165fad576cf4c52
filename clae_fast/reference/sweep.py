"""What every sweep over the pairs shares: the skip rules, and rows in chunks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..numerics import compute_dtype, effective_scale

CHUNK_ELEMENTS = 1 << 23
"""Similarities held at once: 32 MiB in float32, from where glibc maps each buffer and gives it
back. Smaller ones come from the heap, which the small results in between fragment."""


def softmax_weights(s: Tensor, lse: Tensor) -> Tensor:
    """`e^(s - lse)`, 0 where lse is -inf (there every s is)."""
    return (s - torch.where(lse == -math.inf, 0.0, lse)).exp()


def operands(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """q and k in the dtype of the arithmetic, and `t`."""
    dtype = compute_dtype(q.dtype)
    return q.to(dtype), k.to(dtype), effective_scale(scale, scale_tensor, reciprocal, dtype)


class Skip(NamedTuple):
    rule: str
    offset: int
    row_ids: Tensor | None
    col_ids: Tensor | None

    def mask(self, start: int, stop: int, columns: int, device: torch.device) -> Tensor | None:
        """(stop - start, columns), True where a pair is left out; None: nowhere."""
        if self.rule not in ("none", "diagonal", "twins"):
            raise ValueError(f"skip must be 'none', 'diagonal' or 'twins', got {self.rule!r}")
        mask: Tensor | None = None
        if self.rule != "none":
            row = torch.arange(start + self.offset, stop + self.offset, device=device)[:, None]
            col = torch.arange(columns, device=device)
            mask = col == row
            if self.rule == "twins":
                mask = mask | (col == (row + columns // 2) % columns)
        if self.row_ids is not None and self.col_ids is not None:
            same = self.row_ids[start:stop, None] == self.col_ids
            mask = same if mask is None else mask | same
        return mask

    def similarities(
        self, q: Tensor, k: Tensor, t: Tensor | float, start: int, stop: int
    ) -> Tensor:
        """`s` for rows start..stop, -inf where left out."""
        s = (q[start:stop] @ k.mT) * t
        mask = self.mask(start, stop, k.shape[0], q.device)
        return s if mask is None else s.masked_fill(mask, -math.inf)


Rows = Callable[[int, int], tuple[Tensor, ...]]


def by_rows(rows: Rows, n_rows: int, n_columns: int) -> tuple[Tensor, ...]:
    """Run `rows(start, stop)` chunk by chunk and join; autograd recomputes instead of keeping."""
    step = max(1, CHUNK_ELEMENTS // max(n_columns, 1))
    if n_rows <= step:
        return rows(0, n_rows)
    spans = [(a, min(a + step, n_rows)) for a in range(0, n_rows, step)]
    if torch.is_grad_enabled():
        parts = [
            checkpoint(rows, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in spans
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    # In place: small results kept between large temporaries would fragment the heap.
    out: tuple[Tensor, ...] | None = None
    for a, b in spans:
        part = rows(a, b)
        if out is None:
            out = tuple(x.new_empty((n_rows if len(x) else 0, *x.shape[1:])) for x in part)
        for whole, x in zip(out, part, strict=True):
            if len(x):
                whole[a:b] = x
    assert out is not None
    return out
