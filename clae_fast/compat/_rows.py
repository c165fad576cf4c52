"""The log-sum-exp of each row over other rows: what a drop-in is made of that is no public loss.

It takes its positives as O(N D) dot products and its negatives as one `row_lse`; the N x M
similarities exist a tile at a time.
"""

from typing import Any

import torch
from torch import Tensor

from .. import validation as check
from ..backends import requested
from ..composite import Pairs
from ..numerics import (
    Unit,
    as_given,
    compute_dtype,
    full_precision,
    promoted,
    softplus,
    unit_rows,
)
from ..sweeps import Where

Ids = tuple[Tensor, Tensor]


def sweeps(scale: float | Tensor = 1.0) -> Pairs:
    """The differentiable sweeps over this process's keys, on the backend in use."""
    return Pairs(Where(requested(None)), scale)


@full_precision
def row_lse(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    skip: str = "none",
    ids: Ids | None = None,
) -> Tensor:
    """`log sum_j e^(scale <q_i, k_j>)` (N,); -inf where no column is left.

    Args:
        q: (N, D), float32 or float64.
        k: (M, D) of the same dtype; None: q itself.
        scale: positive; a 0-dim tensor of q's dtype and device gets its gradient.
        skip: "none", "diagonal" or, with `k=None` only, "twins".
        ids: int32 (N,) and (M,): pairs with equal ids are left out.
    """
    if k is None:
        lse = sweeps(scale).lse(q, q, *(ids or ()), form="self", skip=skip)
    else:
        lse = sweeps(scale).lse(q, k, *(ids or ()), skip=skip)
    return lse.to(q.dtype)


def one_dtype(*embeddings: Tensor) -> list[Tensor]:
    """Embeddings in the widest float dtype among them, as the libraries' products take them."""
    floating = all(isinstance(x, Tensor) and x.dtype in check.FLOAT_DTYPES for x in embeddings)
    return promoted(*embeddings) if floating else list(embeddings)  # the checks name what is not


def scalar(name: str, value: Any) -> None:
    """A positive number, or a one-element tensor or Parameter, whose value is not read."""
    if isinstance(value, Tensor):
        check.one_element(name, value, value)
    else:
        check.positive_number(name, value, check.NUMBER_OR_TENSOR)


def scalar_like(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or the tensor as a 0-dim one where and as `like` is computed."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, compute_dtype(like.dtype)).reshape(())


def labels_tensor(name: str, labels: Any) -> None:
    """Labels are tensors in the libraries too."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")


def rows_of(x: Tensor, normalize: bool) -> Unit:
    """The rows in the dtype of the arithmetic, on the sphere or as they are."""
    return (unit_rows if normalize else as_given)(x.to(compute_dtype(x.dtype)))


def shared_ids(rows: Tensor, columns: Tensor) -> Ids:
    """Labels of any dtype as int32 ids that are equal where the labels are."""
    if rows.is_meta:
        raise ValueError("labels must have values to be compared, got meta tensors")
    both = torch.cat((rows, columns)).unique(return_inverse=True)[1].to(torch.int32)
    return both[: len(rows)], both[len(rows) :]


def cross_entropy(lse: Tensor, positive: Tensor) -> Tensor:
    """`-positive + log(e^positive + e^lse)` per row: lse is that of the negatives alone."""
    return softplus(lse - positive)
