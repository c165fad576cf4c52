"""NT-Xent, InfoNCE and CLIP with options that the fused operator does not know.

    loss_i = T_i log(1 + e^(lse_i - s_i+)) + t <q_i, T_i k_i+ - sum_j y_ij k_j>

with the target y, T its sum: the first term is the cross-entropy of the positive, which stands
apart, the second is 0 without targets and smoothing, and needs no sweep.
"""

import torch
from torch import Tensor

from ..composite import Pairs, combined
from ..numerics import full_precision, softplus
from ..softmax_rows import Block, linear, negatives_count, negatives_lse, negatives_sum, smoothing
from ..sweeps import Where
from .options import RowOptions, Rows, extra_blocks, numbered, prepare, weights
from .plan import Scale
from .stacked import stacked_blocks


def _row_loss(
    rows: Rows,
    q: Tensor,
    positive: Tensor,
    s_pos: Tensor,
    lse: Tensor,
    blocks: list[Block],
    smooth: float,
    target: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows of the loss. `target`: its sum T (N,) and `T_i k_i+ - sum_j y_ij k_j` (N, D)."""
    loss = softplus(lse - s_pos)
    if target is not None:
        whole, keys = target
        apart = linear(q, keys, rows.t)
        loss = ((1 - smooth) * whole + smooth) * loss + (1 - smooth) * apart
    if smooth:
        others = negatives_sum(blocks)
        loss = loss + smooth * smoothing(q, positive, others, negatives_count(blocks), rows.t)
    return loss.to(q.dtype)


@full_precision
def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    scale: Scale,
    normalize: bool,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    rows = prepare(scale, normalize, where, options.extra_negatives, z_i, z_j)
    u_i, u_j = rows.units
    blocks = stacked_blocks(rows, options)
    z, twins = torch.cat((u_i.z, u_j.z)), torch.cat((u_j.z, u_i.z))
    s_pos = rows.positives(u_i, u_j).repeat(2)
    lse = negatives_lse(blocks)
    loss = _row_loss(rows, z, twins, s_pos, lse, blocks, options.label_smoothing)
    return rows.pairs.reduce(loss + rows.alarm, weights(options, loss, 2), reduction)


@full_precision
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    scale: Scale,
    normalize: bool,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    """One direction; `negative_keys` in the place of the batch's."""
    beside = () if negative_keys is None else (negative_keys,)
    rows = prepare(scale, normalize, where, options.extra_negatives, query, positive_key, *beside)
    q, k = (u.z for u in rows.units[:2])
    ids = numbered(rows.pairs, options)
    both = None if ids.rows is None or ids.columns is None else (ids.rows, ids.columns)
    if negative_keys is None:
        own = () if ids.columns is None else (ids.columns.here,)
        block = Block(rows.pairs, q, k, skip="diagonal", ids=both, own=(k,), own_ids=own)
    else:
        block = Block(rows.pairs.here, q, rows.units[2].z, ids=both)
    blocks = [block, *extra_blocks(rows, q, ids)]
    target = None
    if options.targets is not None:
        y = _as_matrix(options.targets, k.dtype)
        whole = _sum_of_rows(y)
        if negative_keys is None:
            target = whole, _apart(rows.pairs, y, whole, k)
        else:
            first, others = whole[:, None] - _column(y, 0), _columns_after(y, 1)
            target = whole, first * k - _product(others, rows.units[2].z)
    loss = _row_loss(
        rows, q, k, rows.positives(*rows.units[:2]), negatives_lse(blocks), blocks,
        options.label_smoothing, target,
    )  # fmt: skip
    return rows.pairs.reduce(loss + rows.alarm, weights(options, loss), reduction)


@full_precision
def both_ways(
    q: Tensor,
    k: Tensor,
    scale: Scale,
    normalize: bool,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    """Rows (B, 2): of each query, then of each key. The extra negatives are keys."""
    rows = prepare(scale, normalize, where, options.extra_negatives, q, k)
    pairs, (uq, uk) = rows.pairs, rows.units
    ids = numbered(pairs, options)
    narrow = () if ids.rows is None or ids.columns is None else (ids.rows, ids.columns)
    lse = pairs.lse(uq.z, uk.z, *(i.narrow for i in narrow), form="two_way", skip="diagonal")
    by_row, by_col = lse.unbind(1)
    extra = extra_blocks(rows, uq.z, ids)
    s_pos = rows.positives(uq, uk)
    sides = []
    for a, b, order, of, more in (
        (uq.z, uk.z, narrow, by_row, extra),
        (uk.z, uq.z, narrow[::-1], by_col, []),
    ):
        both = (order[0], order[1]) if order else None
        own = tuple(i.here for i in order[1:])
        block = Block(pairs, a, b, skip="diagonal", ids=both, own=(b,), own_ids=own)
        sides.append((a, b, combined(of, *(e.lse() for e in more)), [block, *more]))
    targets = _two_targets(rows, options.targets, uq.z, uk.z)
    loss = torch.stack(
        [
            _row_loss(rows, a, b, s_pos, of, blocks, options.label_smoothing, target)
            for (a, b, of, blocks), target in zip(sides, targets, strict=True)
        ],
        1,
    )
    return pairs.reduce(loss + rows.alarm, weights(options, loss), reduction)


def _two_targets(
    rows: Rows, targets: Tensor | None, q: Tensor, k: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """The targets of queries, and, transposed, of keys: other processes hold their share."""
    if targets is None:
        return None, None
    y, pairs = _as_matrix(targets, q.dtype), rows.pairs
    whole = _sum_of_rows(y)
    by_query = whole, _apart(pairs, y, whole, k)
    start = pairs.sweeps.start(len(k), k)
    mine = torch.arange(start, start + len(k), device=k.device)
    transposed = y.t()
    whole = pairs.total(_sum_of_rows(transposed))[mine]
    apart = _product(_less(transposed, mine, mine - start, whole), q)
    return by_query, (whole, pairs.total(apart)[mine])


def _apart(pairs: Pairs, y: Tensor, whole: Tensor, k: Tensor) -> Tensor:
    """`T_i k_i - sum_j y_ij k_j` from one matrix: an own key's share cancels in it, not in sums."""
    here = torch.arange(len(k), device=k.device)
    matrix = _less(y, here, here + pairs.sweeps.start(len(k), k), whole)
    return _product(matrix, pairs.gather(k))


def _less(y: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The matrix with `values` at these places, less y."""
    if not y.is_sparse:
        return (-y).index_put((rows, columns), values, accumulate=True)
    y = y.coalesce()
    indices = torch.cat((y.indices(), torch.stack((rows, columns))), 1)
    both = torch.cat((-y.values(), values))
    # Right by construction; not to say so warns.
    return torch.sparse_coo_tensor(indices, both, y.shape, check_invariants=False).coalesce()


def _as_matrix(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense or sparse COO, in the dtype of the arithmetic."""
    if targets.layout == torch.sparse_csr:
        targets = targets.to_sparse_coo()
    return targets.to(dtype)


def _product(y: Tensor, keys: Tensor) -> Tensor:
    if y.shape[1] != len(keys):
        raise ValueError(
            f"targets must have a column for each key of all ranks, ({y.shape[0]}, {len(keys)}), "
            f"got {tuple(y.shape)}"
        )
    return torch.sparse.mm(y, keys) if y.is_sparse else y @ keys


def _sum_of_rows(y: Tensor) -> Tensor:
    return torch.sparse.sum(y, 1).to_dense() if y.is_sparse else y.sum(1)


def _column(y: Tensor, j: int) -> Tensor:
    """(N, 1)."""
    return y.select(1, j).to_dense()[:, None] if y.is_sparse else y[:, j : j + 1]


def _columns_after(y: Tensor, j: int) -> Tensor:
    return y.coalesce().narrow_copy(1, j, y.shape[1] - j) if y.is_sparse else y[:, j:]
