"""The log-sum-exp of each row as a differentiable function: what no single public loss is made of.

A drop-in that is not one of the library's losses takes its positives from here as O(N D) dot
products and its negatives as one `row_lse`; the N x M similarities exist a tile at a time.
"""

from typing import Any

import torch
from torch import Tensor

from .. import autograd, reference
from .. import validation as check
from ..backends import requested
from ..numerics import Unit, as_given, compute_dtype, full_precision, softplus, unit_rows
from ..sweeps import Local

Ids = tuple[Tensor, Tensor]


class _RowLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        sweeps: Local,
        skip: str,
    ) -> Tensor:
        lse = sweeps.lse(q, q if k is None else k, skip=skip, row_ids=row_ids, col_ids=col_ids)
        ctx.save_for_backward(q, k, row_ids, col_ids, lse)
        ctx.need, ctx.sweeps, ctx.skip = ctx.needs_input_grad[:2], sweeps, skip
        return lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (need_q, need_k), sweeps, skip = ctx.need, ctx.sweeps, ctx.skip

        def gradients(weight: Tensor, *saved: Any) -> tuple[Tensor | None, Tensor | None]:
            q, k, row_ids, col_ids, lse = saved
            weight = weight.contiguous()
            rows = {"row_lse": lse, "row_weight": weight}
            columns = {"col_lse": lse, "col_weight": weight}
            ids = {"row_ids": row_ids, "col_ids": col_ids, "skip": skip}
            if k is None:
                return sweeps.grad(q, q, **rows, **columns, **ids), None
            swapped = {"row_ids": col_ids, "col_ids": row_ids, "skip": skip}
            return (
                sweeps.grad(q, k, **rows, **ids) if need_q else None,
                sweeps.grad(k, q, **columns, **swapped) if need_k else None,
            )

        grads = autograd._once(gradients, grad_output, *ctx.saved_tensors)
        return *grads, None, None, None, None


@full_precision
def row_lse(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float = 1.0,
    skip: str = "none",
    ids: Ids | None = None,
) -> Tensor:
    """`log sum_j e^(scale <q_i, k_j>)` (N,); -inf where no column is left.

    Args:
        q: (N, D), float32 or float64.
        k: (M, D) of the same dtype; None: q itself.
        scale: positive.
        skip: "none", "diagonal" or, with `k=None` only, "twins".
        ids: int32 (N,) and (M,): pairs with equal ids are left out.
    """
    backend = requested(None)
    row_ids, col_ids = ids or (None, None)
    if backend == "reference":
        keys = q if k is None else k
        rules = {"skip": skip, "row_ids": row_ids, "col_ids": col_ids}
        return reference.pair_lse(q, keys, scale, **rules)  # type: ignore[arg-type]
    sweeps = Local(scale, None, False, backend)
    if autograd._records_gradient(q, k):
        lse: Tensor = _RowLse.apply(q, k, row_ids, col_ids, sweeps, skip)
        return lse
    return sweeps.lse(q, q if k is None else k, skip=skip, row_ids=row_ids, col_ids=col_ids)


def rows_of(x: Tensor, normalize: bool) -> Unit:
    """The rows in the dtype of the arithmetic, on the sphere or as they are."""
    return (unit_rows if normalize else as_given)(x.to(compute_dtype(x.dtype)))


def shared_ids(rows: Tensor, columns: Tensor) -> Ids:
    """Labels of any dtype as int32 ids that are equal where the labels are."""
    both = torch.cat((rows, columns)).unique(return_inverse=True)[1].to(torch.int32)
    return both[: len(rows)], both[len(rows) :]


def cross_entropy(lse: Tensor, positive: Tensor) -> Tensor:
    """`-positive + log(e^positive + e^lse)` per row: lse is that of the negatives alone."""
    return softplus(lse - positive)


def pair(first: str, x: Any, second: str, y: Any) -> None:
    """Two embeddings of one shape (N, D), dtype and device."""
    check.embeddings(first, x, second, y)
