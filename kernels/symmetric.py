"""Log-sum-exps of stacked views, `lse_i = log sum_j e^(s_ij)` for q = k, on the upper triangle.

Work: 1/2 GEMM, 1/2 exponential a pair where the maximum is known, else 1: a tile serves its rows
and, transposed, its columns. Programs take equal runs of tiles, row by row, and add to a maximum
and a sum of their own for all N rows, (programs, N), that a second kernel adds in their order: no
atomics, the same bits every run. Bytes beside z: 4 N a program, 8 N unless the maximum is known.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Pairs, launch, multiprocessors
from ._tile import (
    KNOWN,
    LOG2E,
    finite_or_zero,
    known_maximum,
    leave_out,
    load_rows,
    log_of,
    scale_of,
    similarities,
)
from .pair_lse import combine


@triton.jit
def _first_of(strip, tiles):
    """How many tiles of the upper triangle lie in the strips of rows before this one."""
    return strip * tiles - strip * (strip - 1) // 2


@triton.jit
def _strip_of(index, tiles):
    """The strip of rows that tile `index` lies in; the root is put right by a step either way."""
    edge = 2.0 * tiles + 1.0
    strip = ((edge - tl.sqrt(tl.maximum(edge * edge - 8.0 * index, 0.0))) * 0.5).to(tl.int32)
    strip = tl.where(_first_of(strip, tiles) > index, strip - 1, strip)
    return tl.where(_first_of(strip + 1, tiles) <= index, strip + 1, strip)


@triton.jit
def _add(top_ptr, total_ptr, rows, N, top, total, MAXIMUM: tl.constexpr):
    """Maximum and sum of this program's rows so far, with more of them."""
    before = tl.load(total_ptr + rows, mask=rows < N, other=0.0)
    if MAXIMUM == KNOWN:
        tl.store(total_ptr + rows, before + total, mask=rows < N)
    else:
        was = tl.load(top_ptr + rows, mask=rows < N, other=0.0)
        was = tl.where(before == 0.0, -float("inf"), was)
        now = tl.maximum(was, tl.where(total == 0.0, -float("inf"), top))
        zero = finite_or_zero(now)
        before = tl.where(before == 0.0, 0.0, before * tl.exp2(finite_or_zero(was) - zero))
        total = tl.where(total == 0.0, 0.0, total * tl.exp2(finite_or_zero(top) - zero))
        tl.store(total_ptr + rows, before + total, mask=rows < N)
        tl.store(top_ptr + rows, now, mask=rows < N)


@triton.jit
def _own_maxima(x):
    """Maximum and sum of 2^(x - maximum) of each row, and of each column."""
    row_top, col_top = tl.max(x, 1), tl.max(x, 0)
    row_sum = tl.sum(tl.exp2(x - finite_or_zero(row_top)[:, None]), 1)
    col_sum = tl.sum(tl.exp2(x - finite_or_zero(col_top)[None, :]), 0)
    return row_top, row_sum, col_top, col_sum


@triton.jit
def _triangle(
    z_ptr, top_ptr, total_ptr, scale, scale_ptr, N, z_stride, tiles,
    D: tl.constexpr, B: tl.constexpr, BD: tl.constexpr, MAXIMUM: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    count = tiles * (tiles + 1) // 2
    begin = (program * count // programs).to(tl.int32)
    end = ((program + 1) * count // programs).to(tl.int32)
    total_ptr += program * N
    if MAXIMUM != KNOWN:
        top_ptr += program * N
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    known, zero = known_maximum(t, N)
    zero *= LOG2E
    at = tl.arange(0, BD)
    first, last = _strip_of(begin, tiles), _strip_of(end - 1, tiles)
    for I in range(first, last + 1):
        rows = I * B + tl.arange(0, B)
        q = load_rows(z_ptr, z_stride, rows, N, at, D, BD)
        row_top = tl.full((B,), -float("inf"), tl.float32)
        row_total = tl.zeros((B,), tl.float32)
        of_strip = _first_of(I, tiles) - I  # tile (I, J) is number of_strip + J
        # What other threads wrote for the strips before.
        tl.debug_barrier()
        for J in range(max(begin - of_strip, I), min(end - of_strip, tiles)):
            cols = J * B + tl.arange(0, B)
            k = load_rows(z_ptr, z_stride, cols, N, at, D, BD)
            s = similarities(
                q, k, z_ptr, z_stride, rows, N, z_ptr, z_stride, cols, N, D, B, B, BD, PRECISION
            )  # fmt: skip
            x = leave_out(s * (t * LOG2E), rows, cols, N, N, 0, None, None, SKIP)
            x = tl.where(rows[:, None] < N, x, -float("inf"))
            if MAXIMUM == KNOWN:
                e = tl.exp2(x - zero)
                row_total += tl.sum(e, 1)
                col_top, col_sum = tl.full((B,), 0.0, tl.float32), tl.sum(e, 0)
            else:
                if known:
                    e = tl.exp2(x - zero)
                    here, row_sum = tl.zeros((B,), tl.float32) + zero, tl.sum(e, 1)
                    col_top, col_sum = tl.zeros((B,), tl.float32) + zero, tl.sum(e, 0)
                else:
                    here, row_sum, col_top, col_sum = _own_maxima(x)
                here = tl.where(row_sum == 0.0, -float("inf"), here)
                now = tl.maximum(row_top, here)
                at_zero = finite_or_zero(now)
                row_total = tl.where(
                    row_total == 0.0, 0.0, row_total * tl.exp2(finite_or_zero(row_top) - at_zero)
                ) + tl.where(row_sum == 0.0, 0.0, row_sum * tl.exp2(finite_or_zero(here) - at_zero))
                row_top = now
            if J > I:
                _add(top_ptr, total_ptr, cols, N, col_top, col_sum, MAXIMUM)
        tl.debug_barrier()
        _add(top_ptr, total_ptr, rows, N, row_top, row_total, MAXIMUM)


@triton.jit
def _add_up(
    total_ptr, lse_ptr, scale, scale_ptr, N, programs, BLOCK: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of each row from the sums of all programs, whose maximum is known."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, zero = known_maximum(scale_of(scale, scale_ptr, RECIPROCAL), N)
    total = tl.zeros((BLOCK,), tl.float32)
    for program in range(programs):
        place = tl.cast(program, tl.int64) * N + rows
        total += tl.load(total_ptr + place, mask=rows < N, other=0.0)
    top = tl.zeros((BLOCK,), tl.float32) + zero * LOG2E
    tl.store(lse_ptr + rows, log_of(top, total), mask=rows < N)


def symmetric_sums(pairs: Pairs) -> Tensor:
    """The log-sum-exp of each row, (N,) in float32, where q is k and the maximum is known, or may
    be: with maxima of its own a tile takes as many exponentials as both halves of the square."""
    config, N = pairs.config("triangle"), pairs.N
    tiles = triton.cdiv(N, config.BM)
    programs = max(1, min(tiles * (tiles + 1) // 2, multiprocessors(pairs.q.device)))
    known = pairs.maximum == KNOWN.value
    lse, total = pairs.new(N), pairs.new(programs, N).zero_()
    top = None if known else pairs.new(programs, N)
    launch(
        _triangle, (programs,), pairs.q, top, total, *pairs.scale, N, pairs.q.stride(0), tiles,
        pairs.D, config.BM, config.BD, pairs.maximum, **pairs.flags, **config.run(),
    )  # fmt: skip
    blocks = (triton.cdiv(N, 256),)
    if known:
        reciprocal = pairs.flags["RECIPROCAL"]
        launch(_add_up, blocks, total, lse, *pairs.scale, N, programs, 256, reciprocal)
    else:
        launch(combine, blocks, top, total, lse, N, programs, 256)
    return lse
