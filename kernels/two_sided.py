"""Log-sum-exps of rows and columns from one sweep: `log sum_j e^(s_ij)`, `log sum_i e^(s_ij)`; of
stacked views, where q = k and both are the same, on the upper triangle.

Work, where the maximum is known: 1 GEMM, 1 exponential a pair, half of both on the triangle; else
a tile would take as many exponentials as two sweeps. Programs take equal runs of tiles, row by row,
and add to sums of their own for all rows and columns, (programs, N + M), that a second kernel adds
in their order: no atomics, the same bits every run. Bytes beside q and k: 4 (N + M) a program.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Pairs, launch, multiprocessors
from ._tile import (
    KNOWN,
    exponents,
    inverses,
    leave_out,
    load_rows,
    log_of,
    similarities,
    start,
)
from .pair_lse import row_sums


@triton.jit
def _first_of(strip, tiles, SYMMETRIC: tl.constexpr):
    """How many tiles lie in the strips of rows before this one."""
    if SYMMETRIC:
        return strip * tiles - strip * (strip - 1) // 2
    return strip * tiles


@triton.jit
def _strip_of(index, tiles, SYMMETRIC: tl.constexpr):
    """The strip of rows that tile `index` lies in; a root is put right by a step either way."""
    if not SYMMETRIC:
        return index // tiles
    edge = 2.0 * tiles + 1.0
    strip = ((edge - tl.sqrt(tl.maximum(edge * edge - 8.0 * index, 0.0))) * 0.5).to(tl.int32)
    strip = tl.where(_first_of(strip, tiles, SYMMETRIC) > index, strip - 1, strip)
    return tl.where(_first_of(strip + 1, tiles, SYMMETRIC) <= index, strip + 1, strip)


@triton.jit
def _add(total_ptr, at, n, total):
    """What this program has of rows or columns so far, and more of them."""
    before = tl.load(total_ptr + at, mask=at < n, other=0.0)
    tl.store(total_ptr + at, before + total, mask=at < n)


@triton.jit
def _tiles(
    q_ptr, k_ptr, total_ptr, scale, scale_ptr, row_inverse_ptr, col_inverse_ptr, N, M, q_stride,
    k_stride, strips, tiles,
    D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr, SYMMETRIC: tl.constexpr,
    ASKED: tl.constexpr, PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    t, zero, serves = start(scale, scale_ptr, tl.maximum(N, M), RECIPROCAL, KNOWN)
    if ASKED:
        if not serves:
            return
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    count = _first_of(tl.cast(strips, tl.int64), tiles, SYMMETRIC)
    begin = (program * count // programs).to(tl.int32)
    end = ((program + 1) * count // programs).to(tl.int32)
    total_ptr += program * (N if SYMMETRIC else N + M)
    col_total_ptr = total_ptr + (0 if SYMMETRIC else N)
    at = tl.arange(0, BD)
    first, last = _strip_of(begin, tiles, SYMMETRIC), _strip_of(end - 1, tiles, SYMMETRIC)
    for I in range(first, last + 1):
        rows = I * B + tl.arange(0, B)
        q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
        row_inverse = inverses(row_inverse_ptr, rows, N)
        row_total = tl.zeros((B,), tl.float32)
        first_tile = I if SYMMETRIC else 0
        shift = _first_of(I, tiles, SYMMETRIC) - first_tile  # tile (I, J) is number J + shift
        for J in range(max(begin - shift, first_tile), min(end - shift, tiles)):
            cols = J * B + tl.arange(0, B)
            k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
            s = similarities(
                q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, B, B, BD, PRECISION
            )  # fmt: skip
            col_inverse = inverses(col_inverse_ptr, cols, M)
            x = exponents(s, t, row_inverse_ptr, row_inverse, col_inverse)
            x = leave_out(x, rows, cols, N, M, 0, None, None, SKIP)
            x = tl.where(rows[:, None] < N, x, -float("inf"))
            e = tl.exp2(x - zero)
            row_total += tl.sum(e, 1)
            if not SYMMETRIC or J > I:
                _add(col_total_ptr, cols, M, tl.sum(e, 0))
        # Rows of a triangle are columns of strips before: other threads may have written them.
        tl.debug_barrier()
        _add(total_ptr, rows, N, row_total)
        tl.debug_barrier()


@triton.jit
def _add_up(
    total_ptr, lse_ptr, scale, scale_ptr, count, first, length, n, programs, BLOCK: tl.constexpr,
    ASKED: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """The log-sum-exps from the sums of all programs, whose maximum is known: of
    `length` of them from `first` on."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t, zero, serves = start(scale, scale_ptr, n, RECIPROCAL, KNOWN)
    if ASKED:
        if not serves:
            return
    total = tl.zeros((BLOCK,), tl.float32)
    for program in range(programs):
        place = tl.cast(program, tl.int64) * count + first + at
        total += tl.load(total_ptr + place, mask=at < length, other=0.0)
    top = tl.zeros((BLOCK,), tl.float32) + zero
    tl.store(lse_ptr + at, log_of(top, total), mask=at < length)


def both_sums(pairs: Pairs, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The log-sum-exps of rows (N,) and columns (M,), in float32; `symmetric`: k is q. For `large`
    pairs; where the device then finds the scale too large, by a sweep for each."""
    config, N, M = pairs.config("two-sided"), pairs.N, pairs.M
    strips, tiles = triton.cdiv(N, config.BM), triton.cdiv(M, config.BM)
    of_all = tiles * (tiles + 1) // 2 if symmetric else strips * tiles
    programs = max(1, min(of_all, multiprocessors(pairs.q.device)))
    count, asked = N if symmetric else N + M, pairs.ways[0][1]
    total = pairs.new(programs, count).zero_()
    launch(
        _tiles, (programs,), pairs.q, pairs.k, total, *pairs.scale, *pairs.inverse, N, M,
        pairs.q.stride(0), pairs.k.stride(0), strips, tiles, pairs.D, config.BM, config.BD,
        symmetric, asked, **pairs.flags, **config.run(),
    )  # fmt: skip
    # No two results of an operator may share memory.
    lse, lse_col = pairs.new(N), pairs.new(0 if symmetric else M)
    for first, out in ((0, lse), (N, lse_col)):
        launch(
            _add_up, (triton.cdiv(len(out), 256),), total, out, *pairs.scale, count, first,
            len(out), max(N, M), programs, 256, asked, pairs.flags["RECIPROCAL"],
        )  # fmt: skip
    if asked:
        row_sums(pairs, lse, pairs.ways[1:])
        if not symmetric:
            row_sums(pairs.turned(), lse_col, pairs.ways[1:])
    return lse, lse_col
