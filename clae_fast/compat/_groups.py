"""Positives that are given by equal ids: the blocks of the N x M similarities that hold them.

Each id is one dense block of its rows by its columns. Blocks of about one size are computed
together, padded to at most twice their size a side: memory is O((N + M) D) and what the positives
themselves take, one number a pair.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import full_precision, log_sum_exp
from ._rows import Ids


class Block(NamedTuple):
    """Ids of about one size: G of them, R rows and C columns at most."""

    rows: Tensor  # (G, R) indices
    columns: Tensor  # (G, C) indices
    row_there: Tensor  # (G, R) bool: not padding
    keep: Tensor  # (G, R, C) bool: a positive pair


class _Side(NamedTuple):
    order: Tensor  # indices sorted by id
    start: Tensor  # where each id begins in it
    size: Tensor  # how many rows it has


def _side(ids: Tensor, number: int) -> _Side:
    size = torch.bincount(ids, minlength=number)
    return _Side(ids.argsort(stable=True), size.cumsum(0) - size, size)


def _members(side: _Side, which: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices (G, width) of the members of the ids `which`, and which of them are no padding."""
    place = torch.arange(width, device=which.device)
    there = place < side.size[which, None]
    return side.order[side.start[which, None] + torch.where(there, place, 0)], there


def blocks(ids: Ids, itself: Tensor | None) -> Iterator[Block]:
    """All pairs of equal ids; `itself` (N,): the column that is row i itself, which is none."""
    number = int(torch.cat(ids).max()) + 1
    rows, columns = (_side(side, number) for side in ids)
    sizes = torch.stack((rows.size, columns.size), 1).tolist()
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, (r, c) in enumerate(sizes):
        if r and c and not (itself is not None and r == c == 1):
            buckets.setdefault((r.bit_length(), c.bit_length()), []).append(i)
    for members in buckets.values():
        which = torch.tensor(members, device=ids[0].device)
        row, row_there = _members(rows, which, max(sizes[m][0] for m in members))
        column, column_there = _members(columns, which, max(sizes[m][1] for m in members))
        keep = row_there[:, :, None] & column_there[:, None, :]
        if itself is not None:
            keep = keep & (itself[row][:, :, None] != column[:, None, :])
        yield Block(row, column, row_there, keep)


@full_precision
def positive_lse(u: Tensor, v: Tensor, ids: Ids, itself: Tensor | None, scale: float) -> Tensor:
    """`log sum e^(scale <u_i, v_j>)` (N,) over the positives of row i; -inf where it has none."""
    out = u.new_full((len(u),), -torch.inf)
    for block in blocks(ids, itself):
        s = u[block.rows] @ v[block.columns].mT * scale
        lse = log_sum_exp(s.masked_fill(~block.keep, -torch.inf))
        out = out.index_put((block.rows[block.row_there],), lse[block.row_there])
    return out


class Pairs(NamedTuple):
    """Positive pairs, row by row and in the order of their columns."""

    rows: Tensor  # (P,)
    columns: Tensor  # (P,)
    similarity: Tensor  # (P,)


@full_precision
def positive_pairs(u: Tensor, v: Tensor, ids: Ids, itself: Tensor | None) -> Pairs:
    """Every positive pair with its `<u_i, v_j>`."""
    index = torch.empty(0, dtype=torch.long, device=u.device)
    parts = [(index, index, u.new_empty(0))]
    for block in blocks(ids, itself):
        s = u[block.rows] @ v[block.columns].mT
        shape = block.keep.shape
        row = block.rows[:, :, None].expand(shape)[block.keep]
        column = block.columns[:, None, :].expand(shape)[block.keep]
        parts.append((row, column, s[block.keep]))
    row, column, similarity = (torch.cat(part) for part in zip(*parts, strict=True))
    order = (row * len(v) + column).argsort()
    return Pairs(row[order], column[order], similarity[order])
