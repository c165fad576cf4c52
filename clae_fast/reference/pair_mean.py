"""Log-sum-exp and softmax-weighted mean of the keys, in one sweep."""

from torch import Tensor

from ..numerics import full_precision, log_sum_exp
from .sweep import Skip, by_rows, operands, softmax_weights


@full_precision
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
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`lse` (N,) and `o_i = sum_j softmax_j(s_i) k_j` (N, D) over the allowed columns.

    `d lse_i / d q_i = t o_i`: loss and query gradient in one sweep. `o_i` is 0 where nothing is
    allowed. `wide`: lse in float64.
    """
    q, k, t = operands(q, k, scale, scale_tensor, reciprocal)
    left_out = Skip(skip, offset, row_ids, col_ids)

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        s = left_out.similarities(q, k, t, a, b)
        lse = log_sum_exp(s, wide)
        return lse, softmax_weights(s, lse[:, None].to(s.dtype)) @ k

    lse, o = by_rows(rows, q.shape[0], k.shape[0])
    return lse, o
