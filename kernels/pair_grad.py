"""Row gradient from saved log-sum-exps:
`dq_i = t sum_j (row_weight_i e^(s_ij - row_lse_i) + col_weight_j e^(s_ij - col_lse_j)) k_j`.

Work: 2 GEMMs, 2 exponentials a pair; 1 where one pair of arguments is there or the maximum is
known. A program owns BM rows, BD of the width and one part of
the columns; past BD the similarities are made again for every BD of the output. No two programs add
to one element; parts are added in their order: the same bits every run. Nothing is saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import effective_scale
from . import wide
from ._launch import Pairs, launch
from ._tile import (
    KNOWN,
    LOG2E,
    ONLINE,
    finite_or_zero,
    known_maximum,
    leave_out,
    load_rows,
    scale_of,
    similarities,
    store_rows,
    weighted_rows,
)


@triton.jit
def _of_two(x, row_zero, row_weight, col_zero, col_weight):
    """row_weight e^(s - row_lse) + col_weight e^(s - col_lse)."""
    g = row_weight[:, None] * tl.exp2(x - row_zero[:, None])
    return g + col_weight[None, :] * tl.exp2(x - col_zero[None, :])


@triton.jit
def _of_one(x, row_zero, row_weight, col_zero, col_weight, zero):
    """The same from e^(s - zero), which serves both where the maximum is known."""
    of_row = row_weight * tl.exp2(zero - row_zero)
    of_col = col_weight * tl.exp2(zero - col_zero)
    return tl.exp2(x - zero) * (of_row[:, None] + of_col[None, :])


@triton.jit
def _grad(
    q_ptr, k_ptr, dq_ptr, row_lse_ptr, row_weight_ptr, col_lse_ptr, col_weight_ptr,
    scale, scale_ptr, row_ids_ptr, col_ids_ptr,
    N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SCALED: tl.constexpr,
    MAXIMUM: tl.constexpr, ASKED: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    at = tl.program_id(2) * BD + tl.arange(0, BD)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    known, zero = known_maximum(t, tl.maximum(N, M))
    if ASKED:
        if known != (MAXIMUM == KNOWN):
            return
    zero *= LOG2E
    if row_lse_ptr is not None:
        row_lse = tl.load(row_lse_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
        row_zero = finite_or_zero(row_lse) * LOG2E
        row_weight = tl.load(row_weight_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    dq = tl.zeros((BM, BD), tl.float32)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
    begin = part * columns_of_part
    for j in range(begin, min(begin + columns_of_part, M), BN):
        cols = j + tl.arange(0, BN)
        k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
        s = similarities(
            q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, BM, BN, BD, PRECISION
        )  # fmt: skip
        x = leave_out(s * (t * LOG2E), rows, cols, N, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
        if col_lse_ptr is not None:
            col_lse = tl.load(col_lse_ptr + cols, mask=cols < M, other=0.0).to(tl.float32)
            col_zero = finite_or_zero(col_lse) * LOG2E
            col_weight = tl.load(col_weight_ptr + cols, mask=cols < M, other=0.0).to(tl.float32)
        if row_lse_ptr is not None and col_lse_ptr is not None:
            if MAXIMUM == KNOWN:
                g = _of_one(x, row_zero, row_weight, col_zero, col_weight, zero)
            else:
                g = _of_two(x, row_zero, row_weight, col_zero, col_weight)
        elif row_lse_ptr is not None:
            g = row_weight[:, None] * tl.exp2(x - row_zero[:, None])
        elif col_lse_ptr is not None:
            g = col_weight[None, :] * tl.exp2(x - col_zero[None, :])
        else:
            g = tl.zeros((BM, BN), tl.float32)
        dq = weighted_rows(g, k, dq, PRECISION)
    if SCALED:
        dq = dq * t
    first = part.to(tl.int64) * N
    store_rows(dq_ptr, D, first + rows, first + N, at, dq, D)


def row_gradient(
    pairs: Pairs,
    row_lse: Tensor | None,
    row_weight: Tensor | None,
    col_lse: Tensor | None,
    col_weight: Tensor | None,
    scaled: bool,
) -> Tensor:
    """The sum above, with or without the factor t; (N, D) in float32."""
    by_row = (
        (row_lse, row_weight) if row_lse is not None and row_weight is not None else (None,) * 2
    )
    by_col = (
        (col_lse, col_weight) if col_lse is not None and col_weight is not None else (None,) * 2
    )
    if pairs.wide:
        dq = wide.row_gradient(pairs, by_row, by_col)
        if scaled:
            dq *= effective_scale(*pairs.scale, pairs.rules["RECIPROCAL"], torch.float32)
        return dq
    config, N, D = pairs.config("gradient"), pairs.N, pairs.D
    passes = triton.cdiv(D, config.BD)
    parts, columns = pairs.split(config, passes)
    dq = pairs.new(parts, N, D)
    # One exponential serves either way where rows or columns alone have weights.
    two = row_weight is not None and col_weight is not None
    for maximum, asked in pairs.ways if two else ((int(ONLINE.value), False),):
        launch(
            _grad, (triton.cdiv(N, config.BM), parts, passes), pairs.q, pairs.k, dq, *by_row,
            *by_col, *pairs.scale, *pairs.ids, *pairs.extents, columns, D, config.BM, config.BN,
            config.BD, scaled, maximum, asked, **pairs.flags, **config.run(),
        )  # fmt: skip
    return dq[0] if parts == 1 else dq.sum(0)


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
    return row_gradient(pairs, row_lse, row_weight, col_lse, col_weight, scaled=True)
