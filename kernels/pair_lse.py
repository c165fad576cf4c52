"""Log-sum-exp of each row over its allowed columns: `lse_i = log sum_j e^(s_ij)`.

Work: 1 GEMM, 1 exponential a pair. A program owns BM rows and one part of the columns, and keeps
their running maximum and sum, or the sum alone where the maximum is known; nothing is saved but
these two numbers. With few rows the columns are split so that the card is full, and a second kernel
adds the parts in their order: the same bits every run. Bytes: q once, k once for every BM rows.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Pairs, launch
from ._tile import (
    accumulate,
    add_part,
    exponents,
    first_top,
    inverses,
    leave_out,
    load_rows,
    log_of,
    similarities,
    start,
)


@triton.jit
def _lse(
    q_ptr, k_ptr, lse_ptr, top_ptr, total_ptr, scale, scale_ptr, row_ids_ptr, col_ids_ptr,
    row_inverse_ptr, col_inverse_ptr,
    N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    MAXIMUM: tl.constexpr, ASKED: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    t, zero, serves = start(scale, scale_ptr, tl.maximum(N, M), RECIPROCAL, MAXIMUM)
    if ASKED:
        if not serves:
            return
    top = first_top(zero, BM, MAXIMUM)
    total = tl.zeros((BM,), tl.float32)
    at = tl.arange(0, BD)
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
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, log_of(top, total), mask=rows < N)
    else:
        place = part.to(tl.int64) * N + rows
        tl.store(top_ptr + place, top, mask=rows < N)
        tl.store(total_ptr + place, total, mask=rows < N)


@triton.jit
def combine(
    top_ptr, total_ptr, lse_ptr, scale, scale_ptr, n, N, parts, BLOCK: tl.constexpr,
    MAXIMUM: tl.constexpr, ASKED: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of each row from maximum and sum of its parts, (parts, N), in their order; of
    a sweep that does not serve there are no parts, and what `lse_ptr` holds stays."""
    if ASKED:
        t, zero, serves = start(scale, scale_ptr, n, RECIPROCAL, MAXIMUM)
        if not serves:
            return
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        place = tl.cast(part, tl.int64) * N + rows
        top, total, here = add_part(top_ptr, total_ptr, place, rows < N, top, total)
    tl.store(lse_ptr + rows, log_of(top, total), mask=rows < N)


def pair_lse(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    skip: str = "none",
    offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> Tensor:
    """`reference.pair_lse`."""
    pairs = Pairs(q, k, scale, scale_tensor, reciprocal, skip, offset, row_ids, col_ids)
    lse = pairs.new(pairs.N)
    row_sums(pairs, lse, pairs.ways)
    return lse


def row_sums(pairs: Pairs, lse: Tensor, ways: Sequence[tuple[int, bool]]) -> None:
    """Fills `lse`, (N,) in float32, if one of the ways serves."""
    config, N = pairs.config("sums"), pairs.N
    parts, columns = pairs.split(config)
    top, total = (pairs.new(parts, N), pairs.new(parts, N)) if parts > 1 else (None, None)
    for maximum, asked in ways:
        launch(
            _lse, (triton.cdiv(N, config.BM), parts), pairs.q, pairs.k,
            lse if parts == 1 else None, top, total, *pairs.scale, *pairs.ids, *pairs.inverse,
            *pairs.extents, columns, pairs.D, config.BM, config.BN, config.BD, maximum, asked,
            **pairs.flags, **config.run(),
        )  # fmt: skip
    if parts > 1:
        maximum, asked = ways[0] if len(ways) == 1 else (0, False)  # one of two serves
        launch(
            combine, (triton.cdiv(N, 256),), top, total, lse, *pairs.scale, max(N, pairs.M), N,
            parts, 256, maximum, asked, pairs.rules["RECIPROCAL"],
        )  # fmt: skip
