"""UEL's two levels (reference/pair_uel.py) for stacked views q = k, keys constant.

With `m = negative_weight` and `p_ij = e^(s_ij) / (e^(s_i+) + m sum_j e^(s_ij))`:

    1. sums       lse_i over the negatives, and which of them is the largest      1 GEMM, 1 exp
       margins    the positive against them
    2. losses     sums of log(1 - p), p and p / (1 - p) over all but that one     1 GEMM, 2 exp
       close      the row's loss, and the numbers that its gradient needs
    3. gradient   sum_j g_ij k_j                                                  2 GEMMs, 2 exp

Only the largest negative can have p > 1/2, where 1 - p cancels: its complement is summed without
it. A program owns BM rows, in sweep 3 also BD of the width, and one part of the columns; parts are
added in their order by `margins`, by `close` and by PyTorch: the same bits every run. Saved between
the sweeps: five numbers a row, and five for each part of the columns.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import alarm
from ._launch import Pairs, add_parts, launch, vector
from ._tile import (
    LN2,
    LOG2E,
    add_exponents,
    add_part,
    finite_or_zero,
    leave_out,
    load_rows,
    log_of,
    scale_of,
    similarities,
    softplus_and_sigmoid,
    store_rows,
    weighted_rows,
)


@triton.jit
def _first_largest(x, cols, top, index):
    """The largest of each row so far, and its column; the first of equal ones."""
    here = tl.max(x, 1)
    at = tl.min(tl.where(x == here[:, None], cols[None, :], 2147483647), 1)
    return tl.where(here > top, at, index)


@triton.jit
def _sums(
    q_ptr, k_ptr, top_ptr, total_ptr, index_ptr, scale, scale_ptr, row_ids_ptr, col_ids_ptr,
    N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    index = tl.full((BM,), -1, tl.int32)
    at = tl.arange(0, BD)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
    begin = part * columns_of_part
    for j in range(begin, min(begin + columns_of_part, M), BN):
        cols = j + tl.arange(0, BN)
        k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
        s = similarities(
            q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, BM, BN, BD, PRECISION
        )  # fmt: skip
        x = s * (t * LOG2E)
        x = leave_out(x, rows, cols, N, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
        index = _first_largest(x, cols, top, index)
        e, top, total, keep = add_exponents(x, top, total)
    place = part.to(tl.int64) * N + rows
    tl.store(top_ptr + place, top, mask=rows < N)
    tl.store(total_ptr + place, total, mask=rows < N)
    tl.store(index_ptr + place, index, mask=rows < N)


@triton.jit
def _margins(
    q_ptr, k_ptr, top_ptr, total_ptr, parts_index_ptr, log_z_ptr, index_ptr, margin_ptr, log_m,
    scale, scale_ptr, N, M, offset, q_stride, k_stride, parts,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    index = tl.full((BM,), -1, tl.int32)
    for part in range(parts):
        place = tl.cast(part, tl.int64) * N + rows
        at = tl.load(parts_index_ptr + place, mask=rows < N, other=-1)
        before = top
        top, total, here = add_part(top_ptr, total_ptr, place, rows < N, top, total)
        index = tl.where(here > before, at, index)
    among = rows + offset
    twin = tl.where(among < M // 2, among + M // 2, among - M // 2)
    positive = tl.zeros((BM,), tl.float32)
    for d in range(0, D, BD):
        at = d + tl.arange(0, BD)
        own = load_rows(q_ptr, q_stride, rows, N, at, D, BD).to(tl.float32)
        other = load_rows(k_ptr, k_stride, twin, M, at, D, BD).to(tl.float32)
        positive += tl.sum(own * other, 1)
    positive = positive * t
    margin = log_of(top, total) + log_m - positive
    softplus, slope = softplus_and_sigmoid(margin)
    tl.store(log_z_ptr + rows, positive + softplus, mask=rows < N)
    tl.store(margin_ptr + rows, margin, mask=rows < N)
    tl.store(index_ptr + rows, index, mask=rows < N)


@triton.jit
def _losses(
    q_ptr, k_ptr, log_z_ptr, index_ptr, small_ptr, below_ptr, x_top_ptr, top_ptr, total_ptr,
    scale, scale_ptr, row_ids_ptr, col_ids_ptr, N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    log_z = tl.load(log_z_ptr + rows, mask=rows < N, other=0.0)
    index = tl.load(index_ptr + rows, mask=rows < N, other=-1)
    small = tl.zeros((BM,), tl.float32)
    below = tl.zeros((BM,), tl.float32)
    x_top = tl.full((BM,), 0.0, tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    at = tl.arange(0, BD)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
    begin = part * columns_of_part
    for j in range(begin, min(begin + columns_of_part, M), BN):
        cols = j + tl.arange(0, BN)
        k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
        s = similarities(
            q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, BM, BN, BD, PRECISION
        )  # fmt: skip
        x = s * t - log_z[:, None]
        x = leave_out(x, rows, cols, N, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
        is_top = cols[None, :] == index[:, None]
        x_top += tl.sum(tl.where(is_top, x, 0.0), 1)
        x = tl.where(is_top, -float("inf"), x)
        p = tl.exp(x)
        # p <= 1/2 here, up to rounding: 1 - p keeps its digits
        small += tl.sum(_log1m(p), 1)
        below += tl.sum(p / (1.0 - p), 1)
        e, top, total, keep = add_exponents(x * LOG2E, top, total)
    place = part.to(tl.int64) * N + rows
    tl.store(small_ptr + place, small, mask=rows < N)
    tl.store(below_ptr + place, below, mask=rows < N)
    tl.store(x_top_ptr + place, x_top, mask=rows < N)
    tl.store(top_ptr + place, top, mask=rows < N)
    tl.store(total_ptr + place, total, mask=rows < N)


@triton.jit
def _close(
    small_ptr, parts_below_ptr, x_top_ptr, top_ptr, total_ptr, index_ptr, margin_ptr, loss_ptr,
    below_ptr, odds_ptr, m, log_m, log_m1, N, parts, BM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    index = tl.load(index_ptr + rows, mask=rows < N, other=-1)
    margin = tl.load(margin_ptr + rows, mask=rows < N, other=0.0)
    small = tl.zeros((BM,), tl.float32)
    below = tl.zeros((BM,), tl.float32)
    x_top = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for part in range(parts):
        place = tl.cast(part, tl.int64) * N + rows
        small += tl.load(small_ptr + place, mask=rows < N, other=0.0)
        below += tl.load(parts_below_ptr + place, mask=rows < N, other=0.0)
        x_top += tl.load(x_top_ptr + place, mask=rows < N, other=0.0)
        top, total, here = add_part(top_ptr, total_ptr, place, rows < N, top, total)
    lse_rest = log_of(top, total)
    x_top = tl.where(index < 0, -float("inf"), x_top)
    softplus, slope = softplus_and_sigmoid(margin)
    # log(1 - p_top): small too, or the positive, the other negatives and m - 1 of itself
    a, b, c = -softplus, lse_rest + log_m, x_top + log_m1
    most = finite_or_zero(tl.maximum(a, tl.maximum(b, c)))
    rest = most + tl.log(tl.exp(a - most) + tl.exp(b - most) + tl.exp(c - most))
    large = x_top > -LN2
    log_rest = tl.where(large, rest, _log1m(tl.where(large, 0.0, tl.exp(x_top))))
    tl.store(loss_ptr + rows, softplus - m * (small + log_rest), mask=rows < N)
    tl.store(below_ptr + rows, below, mask=rows < N)
    tl.store(odds_ptr + rows, x_top - log_rest, mask=rows < N)


@triton.jit
def _log1m(p):
    """log(1 - p) for 0 <= p <= 1/2 with all its digits."""
    u = 1.0 - p
    return tl.where(u == 1.0, -p, tl.log(u) * (p / tl.where(u == 1.0, 1.0, 1.0 - u)))


@triton.jit
def _gradient(
    q_ptr, k_ptr, log_z_ptr, index_ptr, margin_ptr, below_ptr, odds_ptr, dq_ptr, row_weight_ptr, m,
    scale, scale_ptr, row_ids_ptr, col_ids_ptr, N, M, offset, q_stride, k_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, M_IS_ONE: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    at = tl.program_id(2) * BD + tl.arange(0, BD)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    log_z = tl.load(log_z_ptr + rows, mask=rows < N, other=0.0)
    index = tl.load(index_ptr + rows, mask=rows < N, other=-1)
    margin = tl.load(margin_ptr + rows, mask=rows < N, other=0.0)
    below = tl.load(below_ptr + rows, mask=rows < N, other=0.0)
    log_odds = tl.load(odds_ptr + rows, mask=rows < N, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
    begin = part * columns_of_part
    for j in range(begin, min(begin + columns_of_part, M), BN):
        cols = j + tl.arange(0, BN)
        k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
        s = similarities(
            q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, BM, BN, BD, PRECISION
        )  # fmt: skip
        x = s * t - log_z[:, None]
        x = leave_out(x, rows, cols, N, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
        is_top = cols[None, :] == index[:, None]
        p = tl.exp(x)
        odds = tl.where(is_top, 0.0, p / (1.0 - p))
        # The odds of the top one may overflow; with a small p they stay in the exponent.
        of_top = tl.exp(x + log_odds[:, None])
        of_top = tl.where(x == -float("inf"), 0.0, of_top)
        of_top = tl.where(is_top, 0.0 if M_IS_ONE else (m - 1.0) * of_top, m * of_top)
        inner = 2.0 - (m - 1.0) * odds - m * (below[:, None] - odds)
        g = m * (p * inner - of_top)
        dq = weighted_rows(g, k, dq, PRECISION)
    softplus, slope = softplus_and_sigmoid(margin)
    odds_of_positive = tl.where(index < 0, 0.0, tl.exp(log_odds - softplus))
    g_positive = slope + m * (below * tl.exp(-softplus) + odds_of_positive)
    among = rows + offset
    twin = tl.where(among < M // 2, among + M // 2, among - M // 2)
    other = load_rows(k_ptr, k_stride, twin, M, at, D, BD).to(tl.float32)
    share = tl.where(part == 0, g_positive, 0.0)  # once, whatever the number of parts
    dq = (dq - share[:, None] * other) * t
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
        dq = dq * row_weight[:, None]
    first = part.to(tl.int64) * N
    store_rows(dq_ptr, D, first + rows, first + N, at, dq, D)


def pair_uel(
    q: Tensor,
    k: Tensor,
    scale: float,
    negative_weight: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    row_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    need_dq: bool = False,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference.pair_uel`."""
    pairs = Pairs(q, k, scale, scale_tensor, reciprocal, "twins", offset, row_ids, col_ids)
    N, D, m = pairs.N, pairs.D, float(negative_weight)
    log_m, log_m1 = math.log(m), math.log(m - 1) if m > 1 else -math.inf
    sums, gradient = pairs.config("uel"), pairs.config("elementwise")
    shared = (*pairs.scale, *pairs.ids, *pairs.extents)
    blocks, rows = (triton.cdiv(N, sums.BM),), (triton.cdiv(N, 32),)
    parts, columns = pairs.split(sums)
    of_sums = (columns, D, sums.BM, sums.BN, sums.BD)
    options = {**pairs.flags, **sums.run()}
    index, index_of_parts = (q.new_empty(n, dtype=torch.int32) for n in (N, parts * N))
    log_z, margin, loss, below, odds = (pairs.new(N) for _ in range(5))
    small, below_of_parts, x_top, top, total = (pairs.new(parts, N) for _ in range(5))
    launch(
        _sums, (*blocks, parts), pairs.q, pairs.k, top, total, index_of_parts, *shared, *of_sums,
        **options,
    )  # fmt: skip
    launch(
        _margins, rows, pairs.q, pairs.k, top, total, index_of_parts, log_z, index, margin, log_m,
        *pairs.scale, *pairs.extents, parts, D, 32, 64,
        pairs.rules["RECIPROCAL"],
    )  # fmt: skip
    launch(
        _losses, (*blocks, parts), pairs.q, pairs.k, log_z, index, small, below_of_parts, x_top,
        top, total, *shared, *of_sums, **options,
    )  # fmt: skip
    launch(
        _close, rows, small, below_of_parts, x_top, top, total, index, margin, loss, below, odds,
        m, log_m, log_m1, N, parts, 32,
    )  # fmt: skip
    if not need_dq:
        return loss + alarm(q, k), pairs.new(0)
    passes = triton.cdiv(D, gradient.BD)
    parts, columns = pairs.split(gradient, passes)
    dq = pairs.new(parts, N, D)
    launch(
        _gradient, (triton.cdiv(N, gradient.BM), parts, passes), pairs.q, pairs.k, log_z, index,
        margin, below, odds, dq, vector(row_weight), m, *shared, columns, D, gradient.BM,
        gradient.BN, gradient.BD, m == 1, **pairs.flags, **gradient.run(),
    )  # fmt: skip
    return loss + alarm(q, k), add_parts(dq, pairs.width)
