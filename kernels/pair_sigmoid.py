"""Sigmoid loss of every pair (SigLIP): `loss_i = sum_j log(1 + e^(-y s_ij))`, and its gradients.

`y = +1` on the diagonal and -1 elsewhere. Elementwise, so no reduction comes before the gradient:
one sweep makes loss, slopes and dq (2 GEMMs, 1 exponential a pair), one with rows and columns
exchanged makes dk (2 more). A program owns BM rows, BD of the width and one part of the columns;
parts are added in their order: the same bits every run. Nothing is saved.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..numerics import alarm
from ._launch import Pairs, add_parts, launch, vector
from ._tile import (
    load_rows,
    scale_of,
    similarities,
    softplus_and_sigmoid,
    store_rows,
    weighted_rows,
)


@triton.jit
def _sigmoid(
    x_ptr, y_ptr, loss_ptr, slope_ptr, dx_ptr, row_weight_ptr, col_weight_ptr, bias, bias_ptr,
    scale, scale_ptr, row_ids_ptr, col_ids_ptr, N, M, offset, x_stride, y_stride, columns_of_part,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    at = tl.program_id(2) * BD + tl.arange(0, BD)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    b = bias
    if bias_ptr is not None:
        b += tl.load(bias_ptr).to(tl.float32)
    row_weight = tl.full((BM,), 1.0, tl.float32)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    loss = tl.zeros((BM,), tl.float32)
    slope = tl.zeros((BM,), tl.float32)
    dx = tl.zeros((BM, BD), tl.float32)
    x = load_rows(x_ptr, x_stride, rows, N, at, D, BD)
    begin = part * columns_of_part
    for j in range(begin, min(begin + columns_of_part, M), BN):
        cols = j + tl.arange(0, BN)
        y = load_rows(y_ptr, y_stride, cols, M, at, D, BD)
        s = similarities(
            x, y, x_ptr, x_stride, rows, N, y_ptr, y_stride, cols, M, D, BM, BN, BD, PRECISION
        )  # fmt: skip
        s = s * t + b
        positive = (rows + offset)[:, None] == cols[None, :]
        out = cols[None, :] >= M
        if row_ids_ptr is not None:
            row_ids = tl.load(row_ids_ptr + rows, mask=rows < N, other=0)
            col_ids = tl.load(col_ids_ptr + cols, mask=cols < M, other=0)
            out |= (row_ids[:, None] == col_ids[None, :]) & ~positive
        signed = tl.where(out, -float("inf"), tl.where(positive, -s, s))
        softplus, g = softplus_and_sigmoid(signed)
        loss += tl.sum(softplus, 1)
        g = tl.where(positive, -g, g) * row_weight[:, None]
        if col_weight_ptr is not None:
            col_weight = tl.load(col_weight_ptr + cols, mask=cols < M, other=0.0)
            g *= col_weight.to(tl.float32)[None, :]
        slope += tl.sum(g, 1)
        if dx_ptr is not None:
            dx = weighted_rows(g, y, dx, PRECISION)
    first = part.to(tl.int64) * N
    if dx_ptr is not None:
        store_rows(dx_ptr, D, first + rows, first + N, at, dx * t, D)
    if loss_ptr is not None:
        mine = (rows < N) & (tl.program_id(2) == 0)
        tl.store(loss_ptr + first + rows, loss, mask=mine)
        tl.store(slope_ptr + first + rows, slope, mask=mine)


def pair_sigmoid(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    bias_tensor: Tensor | None = None,
    row_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    need_dq: bool = False,
    need_dk: bool = False,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.pair_sigmoid`."""

    def sweep(
        pairs: Pairs, need_loss: bool, need_dx: bool, *weights: Any
    ) -> tuple[Tensor | None, ...]:
        """Loss, slope and dx of the rows, None where not needed."""
        # Without a gradient one pass over the width is enough, whatever it is.
        config, N, D = pairs.config("elementwise"), pairs.N, pairs.D
        passes = triton.cdiv(D, config.BD) if need_dx else 1
        parts, columns = pairs.split(config, passes)
        sums = [pairs.new(parts, N) if need_loss else None for _ in range(2)]
        dx = pairs.new(parts, N, D) if need_dx else None
        launch(
            _sigmoid, (triton.cdiv(N, config.BM), parts, passes), pairs.q, pairs.k, *sums, dx,
            *weights, float(bias), bias_tensor, *pairs.scale, *pairs.ids, *pairs.extents, columns,
            D, config.BM, config.BN, config.BD, **pairs.flags, **config.run(),
        )  # fmt: skip
        found = [None if x is None else add_parts(x) for x in sums]
        return *found, None if dx is None else add_parts(dx, pairs.width)

    row_weight = vector(row_weight)
    scaling = (scale, scale_tensor, reciprocal, "none")
    pairs = Pairs(q, k, *scaling, offset, row_ids, col_ids)
    loss, slope, dq = sweep(pairs, True, need_dq, row_weight, None)
    dk = None
    if need_dk:
        turned = Pairs(k, q, *scaling, -offset, col_ids, row_ids)
        dk = sweep(turned, False, True, None, row_weight)[2]
    return (
        loss + alarm(q, k),
        slope,
        pairs.new(0) if dq is None else dq,
        pairs.new(0) if dk is None else dk,
    )
