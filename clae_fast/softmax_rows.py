"""What the softmax losses are made of: the columns a row meets, and the loss of a row.

Everything that depends on pairs, classes or all columns alike is linear in the keys, so it is a sum
of keys per row, O(N D); only the log-sum-exps over the negatives are sweeps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .classes import Ids, sums_of_equal
from .composite import Pairs, combined
from .numerics import softplus, wide


class Block(NamedTuple):
    """Columns as negatives of rows: those that neither `skip` nor equal ids leave out."""

    pairs: Pairs
    q: Tensor  # (N, D)
    k: Tensor  # (M, D)
    form: str = "one_way"
    skip: str = "none"
    ids: tuple[Ids, Ids] | None = None  # of rows and columns
    own: tuple[Tensor, ...] = ()  # (N, D) each: the columns that skip leaves out
    own_ids: tuple[Tensor, ...] = ()  # (N,) each: their ids

    def lse(self, factor: float = 1.0) -> Tensor:
        """Log-sum-exp of `factor s` over the negatives, (N,)."""
        ids = () if self.ids is None else (self.ids[0].narrow, self.ids[1].narrow)
        return self.pairs.lse(self.q, self.k, *ids, form=self.form, skip=self.skip, factor=factor)

    def keys(self) -> Tensor:
        """The sum of the negatives, (N, D), in float64."""
        return self._sum(wide(self.k), [wide(x) for x in self.own])

    def number(self) -> Tensor:
        """The number of negatives, (N,)."""
        one = self.k.new_ones(1)
        return self._sum(one.expand(len(self.k)), [one.expand(len(x)) for x in self.own])

    def _sum(self, x: Tensor, own: list[Tensor]) -> Tensor:
        total = self.pairs.total(x.sum(0, keepdim=True))
        if self.ids is not None:
            rows, columns = self.ids
            total = total - sums_of_equal(self.pairs, x, columns, rows)
            equal = [ids == rows.here for ids in self.own_ids]  # gone already
            own = [
                torch.where(e.reshape(-1, *[1] * (o.dim() - 1)), 0.0, o)
                for e, o in zip(equal, own, strict=True)
            ]
        total = total.expand(len(self.q), *x.shape[1:])
        for o in own:
            total = total - o
        return total


def negatives_lse(blocks: list[Block], factor: float = 1.0) -> Tensor:
    """Log-sum-exp over the negatives in all blocks, (N,)."""
    return combined(*(b.lse(factor) for b in blocks))


def negatives_count(blocks: list[Block]) -> Tensor:
    """How many negatives there are in all blocks, (N,)."""
    return torch.stack([b.number() for b in blocks]).sum(0)


def negatives_sum(blocks: list[Block]) -> Tensor:
    """The sum of the negatives in all blocks, (N, D), in float64."""
    return torch.stack([b.keys() for b in blocks]).sum(0)


def smoothing(
    q: Tensor, positive: Tensor, others: Tensor, count: Tensor, t: Tensor | float
) -> Tensor:
    """`t <q, positive - mean of the allowed columns>` (N,): what spreading a row's target evenly
    adds. The allowed columns are one positive and `count` more, whose sum is `others`."""
    mean = (wide(positive) + others) / (count[:, None] + 1)
    return linear(q, torch.where(count[:, None] == 0, 0.0, wide(positive) - mean), t)


def linear(q: Tensor, keys: Tensor, t: Tensor | float) -> Tensor:
    """`t <q_i, keys_i>` (N,), summed in the dtype of the keys, in float64."""
    return wide((q * keys).sum(-1)) * t


def dcl(lse: Tensor, s_pos: Tensor, weight: Tensor | None) -> Tensor:
    """`-w s+ + lse` over the negatives alone; 0 where there are none."""
    none = lse == -torch.inf
    rows = torch.where(none, 0.0, lse) - (s_pos if weight is None else weight * s_pos)
    return torch.where(none, 0.0, rows)


def hard_negative(
    lse_harder: Tensor,
    lse_hard: Tensor,
    count: Tensor,
    s_pos: Tensor,
    t: Tensor | float,
    tau_plus: float,
) -> Tensor:
    """`log(1 + Ng / e^(s+))` in the log domain, from the log-sum-exps of (1 + beta) s and beta s.

    `Ng = max((R - tau_plus M e^(s+)) / (1 - tau_plus), M e^-t)`, `R = M e^(lse_harder - lse_hard)`;
    0 where there are no negatives (M = 0).
    """
    none = count == 0
    harder, hard = (torch.where(none, 0.0, x) for x in (lse_harder, lse_hard))
    log_m = torch.where(none, 1.0, count).to(harder.dtype).log()
    log_ng = harder - hard + log_m
    if tau_plus:
        log_tau, log_1_tau = math.log(tau_plus), math.log1p(-tau_plus)
        gap = s_pos + log_m + log_tau - log_ng
        above = gap >= 0  # nothing is left: the floor holds. False for a NaN, which must go on
        gap = torch.where(above, -1.0, gap)
        left = log_ng + (-torch.expm1(gap)).log() - log_1_tau
        log_ng = torch.where(above, -torch.inf, left)
    rows = softplus(torch.maximum(log_ng, log_m - t) - s_pos)
    return torch.where(none, 0.0, rows)


def sup_con(lse: Tensor, s_partner: Tensor, paired: Tensor) -> Tensor:
    """`lse - s` of a row's partner, which stands apart; `lse` of a row without one."""
    return torch.where(paired, softplus(lse - torch.where(paired, s_partner, 0.0)), lse)
