"""Row gradient from saved log-sum-exps:
`dq_i = t sum_j (row_weight_i e^(s_ij - row_lse_i) + col_weight_j e^(s_ij - col_lse_j)) k_j`.

Work: 2 GEMMs, 2 exponentials a pair; 1 where rows or columns alone have weights, or the maximum is
known. A program owns BM rows, BD of the width and one part of
the columns; past BD the similarities are made again for every BD of the output. No two programs add
to one element; parts are added in their order: the same bits every run. Nothing is saved.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import effective_scale
from . import wide
from ._launch import Pairs, add_parts, launch
from ._tile import (
    KNOWN,
    LOG2E,
    ONLINE,
    exponents,
    finite_or_zero,
    inverses,
    leave_out,
    load_rows,
    similarities,
    start,
    store_rows,
    weighted_units,
)


@triton.jit
def _grad(
    q_ptr, k_ptr, dq_ptr, row_lse_ptr, row_weight_ptr, col_lse_ptr, col_weight_ptr,
    scale, scale_ptr, row_ids_ptr, col_ids_ptr,
    row_inverse_ptr, col_inverse_ptr,
    N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SCALED: tl.constexpr,
    MAXIMUM: tl.constexpr, ASKED: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    at = tl.program_id(2) * BD + tl.arange(0, BD)
    t, zero, serves = start(scale, scale_ptr, tl.maximum(N, M), RECIPROCAL, MAXIMUM)
    if ASKED:
        if not serves:
            return
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
        if MAXIMUM != KNOWN:
            row_lse = tl.load(row_lse_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
            row_zero = finite_or_zero(row_lse) * LOG2E
    dq = tl.zeros((BM, BD), tl.float32)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
    row_inverse = inverses(row_inverse_ptr, rows, N)
    begin = part * columns_of_part
    for j in range(begin, min(begin + columns_of_part, M), BN):
        cols = j + tl.arange(0, BN)
        k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
        s = similarities(
            q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, BM, BN, BD, PRECISION
        )  # fmt: skip
        col_inverse = inverses(col_inverse_ptr, cols, M)
        x = exponents(s, t, row_inverse_ptr, row_inverse, col_inverse)
        x = leave_out(x, rows, cols, N, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
        e, g = tl.exp2(x - zero), tl.zeros((BM, BN), tl.float32)  # of known maxima
        if row_weight_ptr is not None:
            if MAXIMUM != KNOWN:
                e = tl.exp2(x - row_zero[:, None])
            g += row_weight[:, None] * e
        if col_weight_ptr is not None:
            col_weight = tl.load(col_weight_ptr + cols, mask=cols < M, other=0.0).to(tl.float32)
            if MAXIMUM != KNOWN:
                col_lse = tl.load(col_lse_ptr + cols, mask=cols < M, other=0.0).to(tl.float32)
                e = tl.exp2(x - finite_or_zero(col_lse)[None, :] * LOG2E)
            g += col_weight[None, :] * e
        dq = weighted_units(g, k, row_inverse_ptr, col_inverse, dq, PRECISION)
    if SCALED:
        dq = dq * t
    first = part.to(tl.int64) * N
    store_rows(dq_ptr, D, first + rows, first + N, at, dq, D)


class Weights(NamedTuple):
    """Of rows or of columns: log-sum-exp, weight, and weight e^(zero - lse) with the known maximum
    `zero`, which one exponential of the pair then serves for rows and columns."""

    lse: Tensor
    weight: Tensor
    at_zero: Tensor | None = None

    @classmethod
    def of(cls, lse: Tensor | None, weight: Tensor | None) -> "Weights | None":
        return None if lse is None or weight is None else cls(lse.contiguous(), weight.contiguous())

    def given(self, known: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the kernel takes."""
        return (None, self.at_zero) if known else (self.lse, self.weight)


def row_gradient(
    pairs: Pairs, by_row: Weights | None, by_col: Weights | None, scaled: bool
) -> Tensor:
    """The sum above, with or without the factor t, in float32: (parts, N, D), to be added up."""
    if pairs.wide:
        dq = wide.row_gradient(
            pairs, *((None, None) if x is None else x[:2] for x in (by_row, by_col))
        )
        if scaled:
            dq *= effective_scale(*pairs.scale, pairs.rules["RECIPROCAL"], torch.float32)
        return dq[None]
    config, N, D = pairs.config("gradient"), pairs.N, pairs.D
    passes = triton.cdiv(D, config.BD)
    parts, columns = pairs.split(config, passes)
    dq = pairs.new(parts, N, D)
    there = [x for x in (by_row, by_col) if x is not None]
    either = all(x.at_zero is not None for x in there)
    for maximum, asked in pairs.ways if either else ((int(ONLINE.value), False),):
        known = maximum == KNOWN.value
        weights = ((None, None) if x is None else x.given(known) for x in (by_row, by_col))
        launch(
            _grad, (triton.cdiv(N, config.BM), parts, passes), pairs.q, pairs.k, dq,
            *itertools.chain.from_iterable(weights), *pairs.scale, *pairs.ids, *pairs.inverse,
            *pairs.extents, columns, D, config.BM, config.BN, config.BD, scaled, maximum, asked,
            **pairs.flags, **config.run(),
        )  # fmt: skip
    return dq


def pair_grad(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    skip: str = "none",
    offset: int = 0,
    row_lse: Tensor | None = None,
    row_weight: Tensor | None = None,
    col_lse: Tensor | None = None,
    col_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> Tensor:
    """`reference.pair_grad`."""
    pairs = Pairs(q, k, scale, scale_tensor, reciprocal, skip, offset, row_ids, col_ids)
    by_row, by_col = Weights.of(row_lse, row_weight), Weights.of(col_lse, col_weight)
    return add_parts(row_gradient(pairs, by_row, by_col, scaled=True), pairs.width)
