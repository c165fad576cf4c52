"""The gradients of the contrastive losses, put together from `pair_grad` sweeps.

The specification of the fused operator uses it with its own sweeps, the backward of
`reduction="none"`, which must know the upstream weights first, with those of any backend.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import (
    Unit,
    as_given,
    compute_dtype,
    cosine,
    effective_scale,
    full_precision,
    to_raw,
    unit_rows,
)


class Operands(NamedTuple):
    """The rows of a contrast as its sweeps take them."""

    q: Unit
    k: Unit
    negatives: Unit | None
    stacked: Tensor | None  # of nt_xent: [q; k]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, negatives: Tensor | None, form: str, normalize: bool
    ) -> "Operands":
        dtype = compute_dtype(q.dtype)
        rows = unit_rows if normalize else as_given
        uq, uk = rows(q.to(dtype)), rows(k.to(dtype))
        un = None if negatives is None else rows(negatives.to(dtype))
        return cls(uq, uk, un, torch.cat((uq.z, uk.z)) if form == "nt_xent" else None)


@full_precision
def contrast_grad(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    form: str,
    normalize: bool,
    lse_row: Tensor,
    lse_col: Tensor,
    weight: Tensor,
    need: Sequence[bool],
    pair_grad: Callable[..., Tensor],
    rows: Operands | None = None,
    mean: Tensor | None = None,
    halves: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sum(weight * contrast(...).loss)` from the saved log-sum-exps.

    With `r = weight * sigmoid(lse - s+) = weight * (1 - p+)` per row, each is a `pair_grad` sweep
    over the negatives less the positives' share. A row's own unit vector is taken off its
    positive: the Jacobian drops it, and `z+ - z` of an aligned pair keeps its digits.

    `need` names the wanted ones of (dq, dk, dnegatives, dscale); `pair_grad` does the sweeps.
    `rows`: the operands, where they are known already; `mean`: the mean of each query's negatives
    (`pair_mean`), which saves one_way a sweep. `halves`: both views of nt_xent sweep apart, which
    gives the same bits whether or not the other half is wanted.
    """
    need_dq, need_dk, need_dnegatives, need_dscale = need
    dtype = compute_dtype(q.dtype)
    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    uq, uk, un, stacked = rows or Operands.of(q, k, negatives, form, normalize)
    cos = cosine(uq, uk)
    sweep = functools.partial(
        pair_grad, scale=scale, scale_tensor=scale_tensor, reciprocal=reciprocal
    )
    gq = gk = gn = euler = q.new_empty(0, dtype=dtype)  # gradients through the negatives alone
    if form == "nt_xent":
        B, z = q.shape[0], stacked
        r = weight * torch.sigmoid(lse_row - torch.cat((cos, cos)) * t)
        r_pos = r[:B] + r[B:]
        columns = {"col_lse": lse_row, "col_weight": r}
        by_row = {"row_lse": lse_row, "row_weight": r}
        want_q, want_k = need_dq or need_dscale, need_dk or need_dscale
        if want_q and want_k and not halves:
            both = sweep(z, z, skip="twins", **by_row, **columns)
            gq, gk = both[:B], both[B:]
        elif want_q:
            gq = sweep(uq.z, z, skip="twins", row_lse=lse_row[:B], row_weight=r[:B], **columns)
        if want_k and (halves or not want_q):
            gk = sweep(
                uk.z, z, skip="twins", offset=B, row_lse=lse_row[B:], row_weight=r[B:], **columns
            )
        if need_dscale:
            euler = 0.5 * ((uq.z * gq).sum() + (uk.z * gk).sum())
    elif form == "one_way":
        r = r_pos = weight * torch.sigmoid(lse_row - cos * t)
        keys, skip = (uk, "diagonal") if un is None else (un, "none")
        columns = {"col_lse": lse_row, "col_weight": r}
        if (need_dq or need_dscale) and mean is not None:
            gq = (r * t)[:, None] * mean
        elif need_dq or need_dscale:
            gq = sweep(uq.z, keys.z, skip=skip, row_lse=lse_row, row_weight=r)
        if need_dk:  # beside explicit negatives, a key meets its positive alone
            gk = sweep(uk.z, uq.z, skip=skip, **columns) if un is None else torch.zeros_like(uk.z)
        if need_dnegatives and un is not None:
            gn = sweep(un.z, uq.z, skip=skip, **columns)
        if need_dscale:
            euler = (uq.z * gq).sum()
    else:
        r_row, r_col = (
            weight * torch.sigmoid(torch.stack((lse_row, lse_col), 1) - cos[:, None] * t)
        ).unbind(1)
        r_pos = r_row + r_col
        by_row = {"row_lse": lse_row, "row_weight": r_row, "col_lse": lse_col, "col_weight": r_col}
        by_col = {"row_lse": lse_col, "row_weight": r_col, "col_lse": lse_row, "col_weight": r_row}
        if need_dq or need_dscale:
            gq = sweep(uq.z, uk.z, skip="diagonal", **by_row)
        if need_dk:
            gk = sweep(uk.z, uq.z, skip="diagonal", **by_col)
        if need_dscale:
            euler = (uq.z * gq).sum()
    own_q, own_k = (torch.where(u.on_sphere, u.z, 0.0) for u in (uq, uk))
    share = (r_pos * t)[:, None]
    none = [q.new_empty(0, dtype=dtype) for _ in need]
    return (
        to_raw(gq - share * (uk.z - own_q), uq) if need_dq else none[0],
        to_raw(gk - share * (uq.z - own_k), uk) if need_dk else none[1],
        to_raw(gn, un) if need_dnegatives and un is not None else none[2],
        # Euler: t dL/dt = sum <z, dz> over the rows of S, before the Jacobian
        (euler / t - (r_pos * cos).sum()).reshape(1) if need_dscale else none[3],
    )
