"""Log-sum-exp and softmax-weighted mean of the keys: `o_i = sum_j e^(s_ij - lse_i) k_j`.

Work: 2 GEMMs, 1 exponential a pair, as a flash-attention forward whose values are its keys: a tile
of k serves both products. A program owns BM rows, BD of the width and one part of the columns; past
BD the similarities are made again for every BD of the output. Parts are added in their order by a
second kernel: the same bits every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import wide
from ._launch import Pairs, launch
from ._tile import (
    accumulate,
    exponents,
    first_top,
    inverses,
    leave_out,
    load_rows,
    log_of,
    similarities,
    start,
    store_rows,
    weighted_units,
)
from .pair_lse import row_sums


@triton.jit
def _mean(
    q_ptr, k_ptr, o_ptr, lse_ptr, top_ptr, total_ptr, scale, scale_ptr, row_ids_ptr, col_ids_ptr,
    row_inverse_ptr, col_inverse_ptr,
    N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
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
    top = first_top(zero, BM, MAXIMUM)
    total = tl.zeros((BM,), tl.float32)
    o = tl.zeros((BM, BD), tl.float32)
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
        e, top, total, keep = accumulate(x, top, total, zero, MAXIMUM)
        o = weighted_units(e, k, row_inverse_ptr, col_inverse, o * keep[:, None], PRECISION)
    if top_ptr is None:
        o = o / tl.where(total == 0.0, 1.0, total)[:, None]
        store_rows(o_ptr, D, rows, N, at, o, D)
        if tl.program_id(2) == 0:
            tl.store(lse_ptr + rows, log_of(top, total), mask=rows < N)
    else:
        place = part.to(tl.int64) * N + rows
        store_rows(o_ptr, D, place, (part.to(tl.int64) + 1) * N, at, o, D)
        if tl.program_id(2) == 0:
            tl.store(top_ptr + place, top, mask=rows < N)
            tl.store(total_ptr + place, total, mask=rows < N)


@triton.jit
def _combine(
    parts_ptr, top_ptr, total_ptr, o_ptr, lse_ptr, N,
    PARTS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    at = tl.program_id(1) * BD + tl.arange(0, BD)
    top = tl.full((BM,), -float("inf"), tl.float32)
    for part in range(PARTS):
        here = tl.load(top_ptr + part * N + rows, mask=rows < N, other=-float("inf"))
        top = tl.maximum(top, here)
    zero = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BM,), tl.float32)
    o = tl.zeros((BM, BD), tl.float32)
    for part in range(PARTS):
        here = tl.load(top_ptr + part * N + rows, mask=rows < N, other=-float("inf"))
        sums = tl.load(total_ptr + part * N + rows, mask=rows < N, other=0.0)
        keep = tl.where(here == -float("inf"), 1.0, tl.exp2(here - zero))
        total += sums * keep
        first = part * N  # below 2^31: columns are split where rows are few
        o += load_rows(parts_ptr, D, first + rows, first + N, at, D, BD) * keep[:, None]
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(o_ptr, D, rows, N, at, o, D)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + rows, log_of(top, total), mask=rows < N)


def pair_mean(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    skip: str = "none",
    offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.pair_mean`."""
    return row_means(Pairs(q, k, scale, scale_tensor, reciprocal, skip, offset, row_ids, col_ids))


def row_means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, (N,), and the mean of the keys, (N, D), in float32."""
    if pairs.wide:
        lse = pairs.new(pairs.N)
        row_sums(pairs, lse, pairs.ways)
        return lse, wide.row_gradient(pairs, (lse, torch.ones_like(lse)), (None, None))
    config, N, D = pairs.config("mean"), pairs.N, pairs.D
    passes = triton.cdiv(D, config.BD)
    parts, columns = pairs.split(config, passes)
    lse, o = pairs.new(N), pairs.new(N, D)
    top = total = None
    of_parts = o
    if parts > 1:
        top, total = pairs.new(parts, N), pairs.new(parts, N)
        of_parts = pairs.new(parts, N, D)
    for maximum, asked in pairs.ways:
        launch(
            _mean, (triton.cdiv(N, config.BM), parts, passes), pairs.q, pairs.k, of_parts, lse, top,
            total, *pairs.scale, *pairs.ids, *pairs.inverse, *pairs.extents, columns, D, config.BM,
            config.BN, config.BD, maximum, asked, **pairs.flags, **config.run(),
        )  # fmt: skip
    if parts > 1:
        launch(
            _combine, (triton.cdiv(N, 32), triton.cdiv(D, 64)), of_parts, top, total, o, lse, N,
            parts, D, 32, 64,
        )  # fmt: skip
    return lse, o[:, : pairs.width].contiguous()
