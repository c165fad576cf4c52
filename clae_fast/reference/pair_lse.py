"""Log-sum-exp of each row."""

from torch import Tensor

from ..numerics import full_precision, log_sum_exp
from .sweep import Skip, by_rows, operands


@full_precision
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
    wide: bool = False,
) -> Tensor:
    """`lse_i = log sum_j e^(s_ij)` over the allowed columns, (N,); -inf where there is none.

    `wide`: in float64, so that it is not rounded to t eps.
    """
    q, k, t = operands(q, k, scale, scale_tensor, reciprocal)
    left_out = Skip(skip, offset, row_ids, col_ids)

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        return (log_sum_exp(left_out.similarities(q, k, t, a, b), wide),)

    return by_rows(rows, q.shape[0], k.shape[0])[0]
