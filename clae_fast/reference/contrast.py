"""The fused contrastive losses: rows, and gradients of their weighted sum, from raw embeddings."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..contrast_grad import Operands, contrast_grad
from ..numerics import (
    alarm,
    compute_dtype,
    cosine,
    effective_scale,
    full_precision,
    softplus,
)
from .pair_grad import pair_grad
from .pair_lse import pair_lse

FORMS = ("nt_xent", "one_way", "two_way")


class ContrastOutput(NamedTuple):
    """What `contrast` returns; parts that were not asked for have no elements."""

    loss: Tensor  # (2B,) for nt_xent, (N,) for one_way, (B, 2) for two_way; () if reduced
    lse_row: Tensor  # log-sum-exp over the negatives of each row
    lse_col: Tensor  # and of each column (two_way)
    dq: Tensor
    dk: Tensor
    dnegatives: Tensor
    dscale: Tensor  # (1,)


def contrast_rows(
    rows: Operands, t: Tensor | float, form: str, lse: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row and the log-sum-exps, of which `lse(rows, columns, skip=...)` does each."""
    q, k, negatives, stacked = rows
    s_pos = cosine(q, k) * t
    lse_col = s_pos.new_empty(0)
    if form == "nt_xent":
        lse_row = lse(stacked, stacked, skip="twins")
        loss = softplus(lse_row - torch.cat((s_pos, s_pos)))
    elif form == "one_way":
        keys, skip = (k, "diagonal") if negatives is None else (negatives, "none")
        lse_row = lse(q.z, keys.z, skip=skip)
        loss = softplus(lse_row - s_pos)
    else:
        lse_row, lse_col = lse(q.z, k.z, skip="diagonal"), lse(k.z, q.z, skip="diagonal")
        loss = softplus(torch.stack((lse_row, lse_col), 1) - s_pos[:, None])
    # A NaN or Inf in a row that is not normalised could hide behind e^-inf.
    given = (q.z, k.z) if negatives is None else (q.z, k.z, negatives.z)
    return loss + alarm(*given), lse_row, lse_col


@full_precision
def contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    form: str = "nt_xent",
    normalize: bool = True,
    need_dq: bool = False,
    need_dk: bool = False,
    need_dnegatives: bool = False,
    need_dscale: bool = False,
    reduction: str = "none",
) -> ContrastOutput:
    """Contrastive loss of each row, and the gradients of their sum.

    With `reduction` "sum" or "mean" the loss is that of the rows, (), and the gradients are its.

    `loss_r = log(1 + e^(lse_r - s_r+))`: the positive `+` stands apart from the log-sum-exp over
    the negatives, so well-aligned pairs keep their digits.

        nt_xent   rows are [q; k] (2B), negatives all others of the stack      (SimCLR)
        one_way   rows are q (N), negatives the other keys, or `negatives`     (InfoNCE, MoCo)
        two_way   both directions over the same pairs, (B, 2)                  (CLIP)
    """
    dtype = compute_dtype(q.dtype)
    if scale_tensor is not None:  # once: its gradient is summed in this dtype, and rounded last
        scale_tensor = scale_tensor.to(dtype)
    lse = functools.partial(pair_lse, scale=scale, scale_tensor=scale_tensor, reciprocal=reciprocal)
    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    if form not in FORMS:
        raise ValueError(f"form must be 'nt_xent', 'one_way' or 'two_way', got {form!r}")
    rows = Operands.of(q, k, negatives, form, normalize)
    loss, lse_row, lse_col = contrast_rows(rows, t, form, lse)
    reduced = loss
    if reduction != "none":
        reduced = loss.mean() if reduction == "mean" else loss.sum()
    wanted = (need_dq, need_dk, need_dnegatives, need_dscale)
    if not any(wanted):
        return ContrastOutput(
            reduced, lse_row, lse_col, *(q.new_empty(0, dtype=dtype) for _ in wanted)
        )
    weight = torch.full_like(loss, 1 / loss.numel() if reduction == "mean" else 1.0)
    grads = contrast_grad(
        q, k, negatives, scale, scale_tensor, reciprocal, form, normalize, lse_row, lse_col,
        weight, wanted, pair_grad, rows,
    )  # fmt: skip
    return ContrastOutput(reduced, lse_row, lse_col, *grads)
