"""Two-level loss of UEL."""

import math

import torch
from torch import Tensor

from ..numerics import compute_dtype, effective_scale, full_precision, log_sum_exp, softplus
from .sweep import Skip, alarm, by_rows


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
) -> tuple[Tensor, Tensor]:
    """Instance discrimination of UEL (Ye et al., CVPR 2019) on stacked views `q = k` (2B, D).

    With `m = negative_weight`, the positive `+` and the negatives `j` of row i,

        p_ij = e^(s_ij) / (e^(s_i+) + m sum_j e^(s_ij))
        loss_i = -log p_i+ - m sum_j log(1 - p_ij)

    The keys are constants. Returns the loss (2B,) and `dq` (2B, D) of `sum_i row_weight_i loss_i`.
    Only the largest negative can have p > 1/2, where 1 - p cancels: its complement is summed
    without it.
    """
    dtype = compute_dtype(q.dtype)
    q, k = q.to(dtype), k.to(dtype).detach()
    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    k_pos = k.roll(k.shape[0] // 2, 0)
    s_pos = (q * k_pos).sum(-1) * t
    left_out = Skip("twins", 0, row_ids, col_ids)
    m, log_m = negative_weight, math.log(negative_weight)
    log_m1 = math.log(m - 1) if m > 1 else -math.inf

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        s, pos = left_out.similarities(q, k, t, a, b), s_pos[a:b]
        margin = log_sum_exp(s) + log_m - pos
        lse = pos + softplus(margin)
        top = s.detach().argmax(-1, keepdim=True)
        is_top = torch.zeros_like(s, dtype=torch.bool).scatter_(-1, top, True)
        s_top = s.gather(-1, top).squeeze(-1)
        rest = log_sum_exp(s.masked_fill(is_top, -math.inf)) + log_m
        # log(1 - p_top): the positive, the other negatives and (m - 1) copies of the top one
        alone = log_sum_exp(torch.stack((pos, rest, s_top + log_m1), -1)) - lse
        has_negative = s_top > -math.inf
        alone = torch.where(has_negative | s_top.isnan(), alone, 0.0)
        p = (s - lse[:, None]).exp().masked_fill(is_top, 0.0)
        loss = softplus(margin) - m * (torch.log1p(-p).sum(-1) + alone)
        if not need_dq:
            return loss, q.new_empty(0)
        odds_top = (torch.where(has_negative, s_top, -math.inf) - lse - alone).exp()[:, None]
        odds = torch.where(is_top, odds_top, p / (1 - p))
        p = (s - lse[:, None]).exp()
        total = odds.sum(-1, keepdim=True)
        g = m * (p * (1 - m * total) + odds)
        g_pos = torch.sigmoid(margin)[:, None] + m * total * (pos - lse).exp()[:, None]
        dq = (g @ k - g_pos * k_pos[a:b]) * t
        return loss, dq if row_weight is None else dq * row_weight[a:b, None]

    loss, dq = by_rows(rows, q.shape[0], k.shape[0])
    return loss + alarm(q, k), dq
