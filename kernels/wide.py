"""Gradients of rows too wide for registers: a block of similarities at a time in memory, products
by PyTorch (cuBLAS), and what stands between them, elementwise, in one kernel.

Work: 2 GEMMs, 1 or 2 exponentials a pair, and 8 to 14 bytes a pair that stay in the L2 cache: 24 MB
of similarities, whatever N and M, three launches for each. float32 products are PyTorch's own: tf32
if its switch allows. Weights of float16 rows, for which float16 has no range, are split into two
bfloat16 numbers, and so are the rows, exactly: 4 GEMMs of 16 bits, where one of float32 would take
ten times as long. Blocks come one after the other, in their order: the same bits every run.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Pairs, launch
from ._tile import LOG2E, exponents, finite_or_zero, inverses, leave_out, scale_of

ROWS, BLOCK_BYTES = 2048, 24 << 20  # of a block of similarities: about half of an H100's L2
Two = tuple[Tensor | None, Tensor | None]


@triton.jit
def _weights(
    s_ptr, g_ptr, rest_ptr, row_lse_ptr, row_weight_ptr, col_lse_ptr, col_weight_ptr, scale,
    scale_ptr, row_ids_ptr, col_ids_ptr, row_inverse_ptr, col_inverse_ptr, first, end, left, right,
    M, offset,
    BM: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """row_weight e^(s - row_lse) + col_weight e^(s - col_lse) of a block; with `rest_ptr` also what
    rounding leaves."""
    rows = first + tl.program_id(0) * BM + tl.arange(0, BM)
    cols = left + tl.program_id(1) * BN + tl.arange(0, BN)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    places = (rows - first).to(tl.int64)[:, None] * (right - left) + (cols - left)[None, :]
    inside = (rows[:, None] < end) & (cols[None, :] < right)
    s = tl.load(s_ptr + places, mask=inside, other=0.0)
    col_inverse = inverses(col_inverse_ptr, cols, right)
    row_inverse = inverses(row_inverse_ptr, rows, end)
    x = exponents(s, t, row_inverse_ptr, row_inverse, col_inverse)
    x = leave_out(x, rows, cols, end, M, offset, row_ids_ptr, col_ids_ptr, SKIP)
    g = tl.zeros((BM, BN), tl.float32)
    if row_lse_ptr is not None:
        row_lse = tl.load(row_lse_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
        row_weight = tl.load(row_weight_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
        g += row_weight[:, None] * tl.exp2(x - (finite_or_zero(row_lse) * LOG2E)[:, None])
    if col_lse_ptr is not None:
        col_lse = tl.load(col_lse_ptr + cols, mask=cols < right, other=0.0).to(tl.float32)
        col_weight = tl.load(col_weight_ptr + cols, mask=cols < right, other=0.0).to(tl.float32)
        g += col_weight[None, :] * tl.exp2(x - (finite_or_zero(col_lse) * LOG2E)[None, :])
    if col_inverse_ptr is not None:
        g = g * col_inverse[None, :]
    rounded = g.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + places, rounded, mask=inside)
    if rest_ptr is not None:
        rest = g - rounded.to(tl.float32)
        tl.store(rest_ptr + places, rest.to(rest_ptr.dtype.element_ty), mask=inside)


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


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is x: exactly, for a float16 one of normal range."""
    high = x.bfloat16()
    return high, (x.float() - high.float()).bfloat16()


def row_gradient(pairs: Pairs, by_row: Two, by_col: Two) -> Tensor:
    """sum_j (row_weight e^(s - row_lse) + col_weight e^(s - col_lse)) k_j, (N, D)."""
    dq = pairs.new(pairs.N, pairs.D).zero_()
    dtype, split = pairs.q.dtype, pairs.q.dtype == torch.float16
    keys = _split(pairs.k) if split else (pairs.k,)
    for block in _blocks(pairs):
        g, rest = block.s, None
        if dtype != torch.float32:
            g = block.s.new_empty(block.s.shape, dtype=torch.bfloat16)
            rest = torch.empty_like(g) if split else None
        rows, columns = block.s.shape
        launch(
            _weights, (triton.cdiv(rows, 8), triton.cdiv(columns, 512)), block.s, g, rest, *by_row,
            *by_col, *pairs.scale, *pairs.ids, *pairs.inverse, *block.extents, pairs.M,
            pairs.offset, 8, 512, **pairs.rules,
        )  # fmt: skip
        mine, part = dq[block.first : block.end], slice(block.left, block.right)
        add = block.left > 0
        if rest is not None:
            _multiply(g, keys[1][part], mine, add)  # small terms first
            _multiply(rest, keys[0][part], mine, add=True)
            add = True
        _multiply(g, keys[0][part], mine, add)
    return dq[:, : pairs.width].contiguous()
