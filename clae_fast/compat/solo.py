"""`solo.losses` (solo-learn): `simclr_loss_func`, `mocov2plus_loss_func`."""

import torch
from torch import Tensor

from .. import functional
from .. import validation as check
from ..numerics import full_precision
from ._gather import all_rows, gather, world
from ._groups import positive_lse
from ._rows import cross_entropy, labels_tensor, one_dtype, row_lse, rows_of, shared_ids

__all__ = ["mocov2plus_loss_func", "simclr_loss_func"]


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR's loss of all views at once: rows with equal `indexes` are each other's positives.

    Replaces `solo.losses.simclr.simclr_loss_func`: z (N * views, D), normalised here; several
    positives are summed inside the logarithm; a row with negatives only makes the loss infinite;
    with a process group the rows of all processes are contrasted. Theirs overflows float32 at
    temperatures below about 0.011, this does not. Not served: temperatures that are not positive.

    Example:
        >>> from clae_fast.compat.solo import simclr_loss_func
        >>> simclr_loss_func(torch.randn(8, 16), torch.arange(4).repeat(2)).shape
        torch.Size([])
    """
    check.matrix("z", z)
    check.positive_number("temperature", temperature)
    labels_tensor("indexes", indexes)
    if indexes.shape != z.shape[:1]:
        raise ValueError(f"indexes must be ({len(z)},) as z has rows, got {tuple(indexes.shape)}")
    return _simclr(z, indexes, temperature)


@full_precision
def _simclr(z: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    u = rows_of(z, True).z
    rank, processes = world()
    keys = gather(u) if processes > 1 else u
    ids = shared_ids(indexes, all_rows(indexes) if processes > 1 else indexes)
    itself = torch.arange(rank * len(u), (rank + 1) * len(u), device=u.device)
    positive = positive_lse(u, keys, ids, itself, 1 / temperature)
    negative = row_lse(u, keys if processes > 1 else None, scale=1 / temperature, ids=ids)
    alone = (negative == -torch.inf) & (positive == -torch.inf)
    return torch.where(alone, 0.0, cross_entropy(negative, positive)).mean()


def mocov2plus_loss_func(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1
) -> Tensor:
    """MoCo's loss: query and key (N, D), a queue (D, K), all normalised by the caller.

    Replaces `solo.losses.mocov2plus.mocov2plus_loss_func`. Not served: temperatures that are not
    positive.

    Example:
        >>> from clae_fast.compat.solo import mocov2plus_loss_func
        >>> mocov2plus_loss_func(torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 64)).shape
        torch.Size([])
    """
    check.float_tensor("queue", queue)
    if queue.dim() != 2:
        raise ValueError(f"queue must be (D, K), got shape {tuple(queue.shape)}")
    query, key = one_dtype(query, key)
    check.embeddings("query", query, "key", key)
    check.same_kind("query", query, "queue", queue, any_float=True)
    if len(queue) != query.shape[1]:
        raise ValueError(
            f"queue must be ({query.shape[1]}, K) as query has columns, got {tuple(queue.shape)}"
        )
    return functional.info_nce_loss(query, key, queue.T, temperature=temperature, normalize=False)
