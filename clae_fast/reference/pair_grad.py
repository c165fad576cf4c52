"""Row gradient from saved log-sum-exps."""

import torch
from torch import Tensor

from ..numerics import full_precision
from .sweep import Skip, by_rows, operands, softmax_weights


@full_precision
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
    """`dq_i = t sum_j (row_weight_i e^(s_ij - row_lse_i) + col_weight_j e^(s_ij - col_lse_j)) k_j`.

    Shape (N, D). Either pair may be absent.
    """
    q, k, t = operands(q, k, scale, scale_tensor, reciprocal)
    left_out = Skip(skip, offset, row_ids, col_ids)

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        s = left_out.similarities(q, k, t, a, b)
        g = torch.zeros_like(s)
        if row_lse is not None and row_weight is not None:
            g = g + row_weight[a:b, None] * softmax_weights(s, row_lse[a:b, None])
        if col_lse is not None and col_weight is not None:
            g = g + col_weight * softmax_weights(s, col_lse)
        return ((g @ k) * t,)

    return by_rows(rows, q.shape[0], k.shape[0])[0]
