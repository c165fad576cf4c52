"""Two-level loss of UEL."""

import math

import torch
from torch import Tensor

from ..numerics import alarm, full_precision, log_sum_exp, softplus
from .sweep import Skip, by_rows, operands


@full_precision
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
    """Instance discrimination of UEL (Ye et al., CVPR 2019) on stacked views k (2B, D), an even
    number of rows, of which q (N, D) are those from `offset` on.

    With `m = negative_weight`, the positive `+` and the negatives `j` of row i,

        p_ij = e^(s_ij) / (e^(s_i+) + m sum_j e^(s_ij))
        loss_i = -log p_i+ - m sum_j log(1 - p_ij)

    The keys are constants. Returns the loss (N,) and `dq` (N, D) of `sum_i row_weight_i loss_i`.
    Only the largest negative can have p > 1/2, where 1 - p cancels: its complement is summed
    without it.
    """
    q, k, t = operands(q, k, scale, scale_tensor, reciprocal)
    k = k.detach()
    own = torch.arange(offset, offset + q.shape[0], device=q.device)
    k_pos = k[(own + k.shape[0] // 2) % max(k.shape[0], 1)]
    s_pos = (q * k_pos).sum(-1) * t
    left_out = Skip("twins", offset, row_ids, col_ids)
    m, log_m = negative_weight, math.log(negative_weight)
    log_m1 = math.log(m - 1) if m > 1 else -math.inf

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        s, pos = left_out.similarities(q, k, t, a, b), s_pos[a:b]
        margin = log_sum_exp(s) + log_m - pos
        x = s - (pos + softplus(margin))[:, None]  # log p
        top = x.detach().argmax(-1, keepdim=True)
        is_top = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, top, True)
        x_top = x.gather(-1, top).squeeze(-1)
        small = torch.log1p(-x.masked_fill(is_top, -math.inf).exp()).sum(-1)
        # log(1 - p_top): small too, or the positive, the other negatives and m - 1 of itself
        rest = torch.stack(
            (
                -softplus(margin),
                log_sum_exp(x.masked_fill(is_top, -math.inf)) + log_m,
                x_top + log_m1,
            ),
            -1,
        )
        large = x_top > -math.log(2)
        log_rest = torch.where(
            large | x_top.isnan(),
            log_sum_exp(torch.where(large[:, None], rest, 0.0)),
            torch.log1p(-torch.where(large, -1.0, x_top).exp()),
        )
        loss = softplus(margin) - m * (small + log_rest)
        if not need_dq:
            return loss, q.new_empty(0)
        # The odds of the top one may overflow; with a small p they stay in the exponent.
        p, log_odds_top = x.exp(), (x_top - log_rest)[:, None]
        odds = (p / (1 - p)).masked_fill(is_top, 0.0)
        below = odds.sum(-1, keepdim=True)
        of_itself = (m - 1) * (x + log_odds_top).exp() if m > 1 else torch.zeros_like(x)
        of_top = torch.where(is_top, of_itself, m * (x + log_odds_top).exp())
        g = m * (p * (2 - (m - 1) * odds - m * (below - odds)) - of_top)
        log_p_pos = -softplus(margin)[:, None]
        g_pos = torch.sigmoid(margin)[:, None] + m * (
            below * log_p_pos.exp() + (log_p_pos + log_odds_top).exp()
        )
        dq = (g @ k - g_pos * k_pos[a:b]) * t
        return loss, dq if row_weight is None else dq * row_weight[a:b, None]

    loss, dq = by_rows(rows, q.shape[0], k.shape[0])
    return loss + alarm(q, k), dq
