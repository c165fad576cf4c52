"""Sweeps of rows too wide for registers: a block of similarities at a time in memory, products by
PyTorch (cuBLAS), and what stands between them, elementwise, in two kernels.

Work: as many GEMMs as the sweep has, 1 or 2 exponentials a pair, and 8 to 14 bytes a pair that stay
in the L2 cache: 24 MB of similarities, whatever N and M. float32 products are PyTorch's own: tf32
if its switch allows. Blocks come one after the other, in their order: the same bits every run.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Pairs, launch
from ._tile import LOG2E, add_exponents, finite_or_zero, leave_out, log_of, scale_of

ROWS, BLOCK_BYTES = 2048, 24 << 20  # of a block of similarities: about half of an H100's L2
Two = tuple[Tensor | None, Tensor | None]


@triton.jit
def _sums(
    s_ptr, top_ptr, total_ptr, scale, scale_ptr, row_ids_ptr, col_ids_ptr, first, end, left, right,
    M, offset, BM: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of 2^(x - maximum) of rows first to end so far, and of a block more."""
    rows = first + tl.program_id(0) * BM + tl.arange(0, BM)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    top = tl.load(top_ptr + rows, mask=rows < end, other=-float("inf"))
    total = tl.load(total_ptr + rows, mask=rows < end, other=0.0)
    places = s_ptr + (rows - first).to(tl.int64)[:, None] * (right - left)
    for j in range(left, right, BN):
        cols = j + tl.arange(0, BN)
        inside = (rows[:, None] < end) & (cols[None, :] < right)
        s = tl.load(places + (cols - left)[None, :], mask=inside, other=0.0)
        x = leave_out(s * (t * LOG2E), rows, cols, end, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
        x = tl.where(cols[None, :] < right, x, -float("inf"))
        e, top, total, keep = add_exponents(x, top, total)
    tl.store(top_ptr + rows, top, mask=rows < end)
    tl.store(total_ptr + rows, total, mask=rows < end)


@triton.jit
def _weights(
    s_ptr, g_ptr, row_lse_ptr, row_weight_ptr, col_lse_ptr, col_weight_ptr, scale, scale_ptr,
    row_ids_ptr, col_ids_ptr, first, end, left, right, M, offset,
    BM: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """row_weight e^(s - row_lse) + col_weight e^(s - col_lse) of a block."""
    rows = first + tl.program_id(0) * BM + tl.arange(0, BM)
    cols = left + tl.program_id(1) * BN + tl.arange(0, BN)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    places = (rows - first).to(tl.int64)[:, None] * (right - left) + (cols - left)[None, :]
    inside = (rows[:, None] < end) & (cols[None, :] < right)
    s = tl.load(s_ptr + places, mask=inside, other=0.0)
    x = leave_out(s * (t * LOG2E), rows, cols, end, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
    g = tl.zeros((BM, BN), tl.float32)
    if row_lse_ptr is not None:
        row_lse = tl.load(row_lse_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
        row_weight = tl.load(row_weight_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
        g += row_weight[:, None] * tl.exp2(x - (finite_or_zero(row_lse) * LOG2E)[:, None])
    if col_lse_ptr is not None:
        col_lse = tl.load(col_lse_ptr + cols, mask=cols < right, other=0.0).to(tl.float32)
        col_weight = tl.load(col_weight_ptr + cols, mask=cols < right, other=0.0).to(tl.float32)
        g += col_weight[None, :] * tl.exp2(x - (finite_or_zero(col_lse) * LOG2E)[None, :])
    tl.store(g_ptr + places, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _close(top_ptr, total_ptr, lse_ptr, N, BLOCK: tl.constexpr):
    """Log-sum-exps of maxima and sums."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(top_ptr + rows, mask=rows < N, other=0.0)
    total = tl.load(total_ptr + rows, mask=rows < N, other=0.0)
    tl.store(lse_ptr + rows, log_of(top, total), mask=rows < N)


class _Block(NamedTuple):
    """Rows first to end, columns left to right, and their similarities before the scale."""

    first: int
    end: int
    left: int
    right: int
    s: Tensor

    @property
    def extents(self) -> tuple[int, int, int, int]:
        return self[:4]


def _blocks(pairs: Pairs) -> Iterator[_Block]:
    """All of them, the columns of some rows before the next rows."""
    rows = max(1, min(pairs.N, ROWS))
    columns = max(1, min(pairs.M, BLOCK_BYTES // (4 * rows)))
    memory = pairs.new(rows * columns)
    for first in range(0, pairs.N, rows):
        end = min(first + rows, pairs.N)
        for left in range(0, pairs.M, columns):
            right = min(left + columns, pairs.M)
            s = memory[: (end - first) * (right - left)].view(end - first, right - left)
            _multiply(pairs.q[first:end], pairs.k[left:right].T, s)
            yield _Block(first, end, left, right, s)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out + a b, in float32, from 16 bits too."""
    options = {}
    if a.dtype != torch.float32:
        if a.device.type == "cpu":  # the interpreter's; PyTorch would round the result
            a, b = a.float(), b.float()
        else:
            options = {"out_dtype": torch.float32}
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def row_sums(pairs: Pairs, lse: Tensor) -> None:
    """Fills the log-sum-exp of each row, (N,)."""
    top, total = pairs.new(pairs.N).fill_(-torch.inf), pairs.new(pairs.N).zero_()
    for block in _blocks(pairs):
        launch(
            _sums, (triton.cdiv(block.end - block.first, 4),), block.s, top, total, *pairs.scale,
            *pairs.ids, *block.extents, pairs.M, pairs.offset, 4, 1024, **pairs.rules,
        )  # fmt: skip
    launch(_close, (triton.cdiv(pairs.N, 256),), top, total, lse, pairs.N, 256)


def row_gradient(pairs: Pairs, by_row: Two, by_col: Two) -> Tensor:
    """sum_j (row_weight e^(s - row_lse) + col_weight e^(s - col_lse)) k_j, (N, D)."""
    dq = pairs.new(pairs.N, pairs.D).zero_()
    rounded = pairs.q.dtype == torch.bfloat16  # float16 has no range for weights
    keys = pairs.k if rounded else pairs.k.float()
    for block in _blocks(pairs):
        g = pairs.q.new_empty(block.s.shape) if rounded else block.s
        rows, columns = block.s.shape
        launch(
            _weights, (triton.cdiv(rows, 8), triton.cdiv(columns, 512)), block.s, g, *by_row,
            *by_col, *pairs.scale, *pairs.ids, *block.extents, pairs.M, pairs.offset, 8, 512,
            **pairs.rules,
        )  # fmt: skip
        mine = dq[block.first : block.end]
        _multiply(g, keys[block.left : block.right], mine, add=block.left > 0)
    return dq


def row_means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, (N,), and the mean of the keys, (N, D)."""
    lse = pairs.new(pairs.N)
    row_sums(pairs, lse)
    return lse, row_gradient(pairs, (lse, torch.ones_like(lse)), (None, None))
