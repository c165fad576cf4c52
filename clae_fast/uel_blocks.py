"""UEL's two levels (reference/pair_uel.py) when the keys come in blocks, from rank after rank.

With the log-sum-exp known, the second level is sums over the keys, and so are the gradients; the
largest negative, which alone can have p > 1/2, is kept apart across blocks as within one:

    level 2    x = s - log z;  sum log(1 - p), sum p / (1 - p), log sum p, over all but the largest
    gradient   dq = t sum_j g_ij k_j,  g = m p (2 - m A + p / (1 - p)),  A = sum p / (1 - p)

Plain PyTorch, a chunk of rows at a time: of the similarities no more is kept than in `reference`.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import alarm, log_sum_exp, softplus
from .reference.sweep import Skip, by_rows

Blocks = Callable[[], Iterable[tuple[Tensor, Skip]]]
"""Passes over the keys: each block with the rule of what to leave out in it; own block first."""


class _Level(NamedTuple):
    """What is known of each row's negatives so far, all (N,)."""

    x_top: Tensor  # the largest log p
    block: Tensor  # where it is
    column: Tensor
    small: Tensor  # sum log(1 - p) over the others
    below: Tensor  # sum p / (1 - p)
    rest: Tensor  # log sum p


def uel_over_blocks(
    z: Tensor,
    s_pos: Tensor,
    lse: Tensor,
    t: Tensor | float,
    negative_weight: float,
    blocks: Blocks,
    need_dq: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row (N,), and each row's own gradient (N, D).

    Args:
        z: (N, D) rows, two stacked views.
        s_pos: (N,) similarity of each row and its twin.
        lse: (N,) over the negatives.
        t: the scale.
        negative_weight: m of `uel_loss`.
        blocks: see `Blocks`.
        need_dq: whether the gradient is wanted.
    """
    m, log_m = negative_weight, math.log(negative_weight)
    log_m1 = math.log(m - 1) if m > 1 else -math.inf
    margin = lse + log_m - s_pos
    log_z = s_pos + softplus(margin)
    level = _second_level(z, t, log_z, blocks)
    log_p_pos = -softplus(margin)
    # log(1 - p_top): small too, or the positive, the other negatives and m - 1 of itself
    rest = log_sum_exp(torch.stack((log_p_pos, level.rest + log_m, level.x_top + log_m1), -1))
    large = level.x_top > -math.log(2)
    small = torch.log1p(-torch.where(large, -1.0, level.x_top).exp())
    log_rest = torch.where(large | level.x_top.isnan(), rest, small)
    loss = -log_p_pos - m * (level.small + log_rest) + alarm(z)
    if not need_dq:
        return loss, z.new_empty(0)
    log_odds = level.x_top - log_rest
    g_pos = torch.sigmoid(margin) + m * (
        level.below * log_p_pos.exp() + (log_p_pos + log_odds).exp()
    )
    dq = -g_pos[:, None] * z.roll(len(z) // 2, 0)
    for number, (k, left_out) in enumerate(blocks()):
        dq += _pull(z, k, t, log_z, left_out, number, level, log_odds, m)
    return loss, dq * t


def _second_level(z: Tensor, t: Tensor | float, log_z: Tensor, blocks: Blocks) -> _Level:
    """Sums of all blocks, in their order."""
    none = torch.full_like(log_z, -math.inf)
    zero, nowhere = torch.zeros_like(log_z), torch.full_like(log_z, -1, dtype=torch.int64)
    level = _Level(none, nowhere, nowhere, zero, zero, none)
    for number, (k, left_out) in enumerate(blocks()):
        if not len(k):
            continue

        def rows(a: int, b: int, k: Tensor = k, left_out: Skip = left_out) -> tuple[Tensor, ...]:
            x = left_out.similarities(z, k, t, a, b) - log_z[a:b, None]
            top = x.argmax(-1, keepdim=True)
            x_top = x.gather(-1, top).squeeze(-1)
            x = x.scatter(-1, top, -math.inf)
            p = x.exp()
            sums = torch.log1p(-p).sum(-1), (p / (1 - p)).sum(-1), log_sum_exp(x)
            return x_top, top.squeeze(-1), *sums

        x_top, index, *sums = by_rows(rows, len(z), len(k))
        here = _Level(x_top, torch.full_like(index, number), index, *sums)
        level = _merge(level, here)
    return level


def _merge(a: _Level, b: _Level) -> _Level:
    """Both; the smaller of the two largest has p <= 1/2 and joins the sums."""
    later = b.x_top > a.x_top
    lower = torch.where(later, a.x_top, b.x_top)
    p = lower.exp()
    return _Level(
        # NaN goes on: a comparison would lose it
        torch.where(later, b.x_top, a.x_top + 0 * b.x_top.nan_to_num(neginf=0.0, nan=math.nan)),
        torch.where(later, b.block, a.block),
        torch.where(later, b.column, a.column),
        a.small + b.small + torch.log1p(-p),
        a.below + b.below + p / (1 - p),
        torch.logaddexp(torch.logaddexp(a.rest, b.rest), lower),
    )


def _pull(
    z: Tensor,
    k: Tensor,
    t: Tensor | float,
    log_z: Tensor,
    left_out: Skip,
    number: int,
    level: _Level,
    log_odds: Tensor,
    m: float,
) -> Tensor:
    """`sum_j g_ij k_j` over one block's negatives."""
    index = torch.where(level.block == number, level.column, -1)
    columns = torch.arange(len(k), device=k.device)

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        x = left_out.similarities(z, k, t, a, b) - log_z[a:b, None]
        is_top = columns == index[a:b, None]
        p = x.exp()
        odds = (p / (1 - p)).masked_fill(is_top, 0.0)
        # The odds of the top one may overflow; with a small p they stay in the exponent.
        of_top = (x + log_odds[a:b, None]).exp()
        of_top = torch.where(x == -math.inf, 0.0, of_top)
        of_top = torch.where(is_top, (m - 1) * of_top if m > 1 else 0.0, m * of_top)
        below = level.below[a:b, None]
        g = m * (p * (2 - (m - 1) * odds - m * (below - odds)) - of_top)
        return (g @ k,)

    return by_rows(rows, len(z), len(k))[0]
