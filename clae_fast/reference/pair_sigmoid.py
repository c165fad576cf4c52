"""Sigmoid loss of every pair."""

import math

import torch
from torch import Tensor

from ..numerics import alarm, full_precision, softplus
from .sweep import Skip, by_rows, operands


@full_precision
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
    """Sigmoid loss of every pair (SigLIP, arXiv 2303.15343): `loss_i = sum_j log(1 + e^(-y s_ij))`.

    `s_ij = t <q_i, k_j> + bias`, `y = +1` for j = i + offset and -1 elsewhere; other pairs with
    equal ids are left out. Returns the loss (N,), `g_i = row_weight_i sum_j dloss_i/ds_ij` (N,)
    whose sum is the gradient of the bias, and `dq` (N, D), `dk` (M, D) of
    `sum_i row_weight_i loss_i`.
    """
    q, k, t = operands(q, k, scale, scale_tensor, reciprocal)
    b = bias if bias_tensor is None else bias + bias_tensor.to(q.dtype).reshape(())
    weight = q.new_ones(q.shape[0]) if row_weight is None else row_weight

    def sweep(
        x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, transposed: bool
    ) -> tuple[Tensor, ...]:
        same_ids = Skip("none", 0, x_ids, y_ids)
        diagonal = Skip("diagonal", -offset if transposed else offset, None, None)

        def rows(start: int, stop: int) -> tuple[Tensor, ...]:
            positive = diagonal.mask(start, stop, y.shape[0], x.device)
            assert positive is not None
            s = (x[start:stop] @ y.mT) * t + b
            signed = torch.where(positive, -s, s)  # -y s
            same = same_ids.mask(start, stop, y.shape[0], x.device)
            if same is not None:
                signed = signed.masked_fill(same & ~positive, -math.inf)
            g = torch.where(positive, -1.0, 1.0) * torch.sigmoid(signed)
            g = g * (weight if transposed else weight[start:stop, None])
            return softplus(signed).sum(-1), g.sum(-1), (g @ y) * t

        return by_rows(rows, x.shape[0], y.shape[0])

    loss, g, dq = sweep(q, k, row_ids, col_ids, transposed=False)
    dk = sweep(k, q, col_ids, row_ids, transposed=True)[2] if need_dk else q.new_empty(0)
    return loss + alarm(q, k), g, dq if need_dq else q.new_empty(0), dk
