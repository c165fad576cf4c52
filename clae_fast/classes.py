"""Sums over rows of equal ids, without a matrix of pairs: O(N log N + N D).

No shape here depends on a value, so nothing waits for a GPU and `torch.compile` sees one graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .composite import Pairs


class Ids(NamedTuple):
    """Ids as numbers from 0, equal exactly where they were equal."""

    here: Tensor  # (N,) int64: of this process's rows
    everywhere: Tensor  # of all processes' rows
    slots: int  # all numbers are below

    @property
    def narrow(self) -> Tensor:
        """As the operators compare them."""
        return self.here.to(torch.int32)


def dense_ids(pairs: Pairs, *ids: Tensor) -> list[Ids]:
    """Numbers for ids of any integer type, the same on all processes and in all arguments."""
    everywhere = [pairs.sweeps.gather(x.to(torch.int64)) for x in ids]
    numbers = _ranks(torch.cat(everywhere))
    out = []
    for x, whole in zip(ids, numbers.split([len(x) for x in everywhere]), strict=True):
        start = pairs.sweeps.start(len(x), x)
        out.append(Ids(whole[start : start + len(x)], whole, len(numbers)))
    return out


def _ranks(ids: Tensor) -> Tensor:
    """Which of its distinct values each one is."""
    ordered, order = ids.sort()
    step = torch.zeros_like(order)
    step[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(order).index_put((order,), step.cumsum(0))


def sums_of_equal(pairs: Pairs, x: Tensor, columns: Ids, rows: Ids) -> Tensor:
    """`sum_j [columns_j = rows_i] x_j` over all processes' columns: (N, ...) from (M, ...)."""
    zeros = x.new_zeros((columns.slots, *x.shape[1:]))
    return pairs.total(zeros.index_put((columns.here,), x, accumulate=True))[rows.here]


class Partners(NamedTuple):
    """Rows of a class two by two, an odd last one left alone."""

    of: Tensor  # (N,): the partner, or the row itself
    paired: Tensor  # (N,) bool
    ids: Tensor  # (N,) int32: equal for the two and nobody else, on all processes


def partners(pairs: Pairs, labels: Ids) -> Partners:
    """Each row's partner among this process's rows of its class, its neighbour where it has one."""
    N = len(labels.here)
    ordered, order = labels.here.sort(stable=True)
    place = torch.arange(N, device=ordered.device)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, place, 0).cummax(0).values
    other = start + ((place - start) ^ 1)
    inside = other.clamp(max=N - 1)
    has = (other < N) & (ordered[inside] == ordered)
    index = torch.zeros_like(order).index_put((order,), torch.where(has, order[inside], order))
    paired = index != place
    ids = torch.minimum(index, place) + pairs.sweeps.start(N, index)
    return Partners(index, paired, ids.to(torch.int32))
