"""The decoupled contrastive loss, and the weights of DCLW."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import validation as check
from ..numerics import full_precision
from ..softmax_rows import dcl, negatives_lse
from ..sweeps import Sweeps, Where
from .options import RowOptions, prepare, row_options, weights
from .plan import Plan, Scale, common, fused, reciprocal_scale
from .stacked import stacked_blocks

WeightFn = Callable[[Tensor, Tensor], Tensor]


@fused
def dcl_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight_fn: WeightFn | None = None,
    sample_weight: Tensor | None = None,
    ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""DCL: NT-Xent without the positive in the denominator.

    With `z = [z_i; z_j]`, `s_rc = cos(z_r, z_c) / temperature`, the twin `r+` of row r and its
    negatives J(r) (neither r nor r+),

        loss_r = -w_r s_{r,r+} + log sum_{j in J(r)} e^{s_rj}

    Args:
        z_i: (B, D) embeddings of the first views.
        z_j: (B, D) embeddings of the second views, same dtype and device.
        temperature: positive number, or a one-element float tensor (see `nt_xent_loss`).
        weight_fn: None (w = 1), or a function of the views as the loss uses them (normalised), of
            (B, D) and (B, D), to the weights (B,) of the first one's rows; it is called for each
            order. DCLW: `negative_mises_fisher_weights(sigma)`.
        sample_weight, ids, extra_negatives, extra_ids: see `nt_xent_loss`.
        reduction: "mean" over all 2B rows, "sum", or "none" for (2B,): rows of z_i, then of z_j.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.
        group, exchange: as in `nt_xent_loss`.

    Returns:
        The loss, 0-dim or (2B,). A row without negatives has loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Equivalent to::

        z = F.normalize(torch.cat((z_i, z_j)), dim=1)
        s = z @ z.T / temperature
        positive = s.diagonal(B).repeat(2)
        r = torch.arange(2 * B)
        negatives = s.masked_fill(r[:, None] % B == r % B, -torch.inf)
        (negatives.logsumexp(1) - positive).mean()

    Source: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, equations 5 and 6.

    Example:
        >>> z_i, z_j = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = dcl_loss(z_i, z_j, weight_fn=negative_mises_fisher_weights(0.5))
        >>> loss.shape
        torch.Size([])
    """
    check.embeddings("z_i", z_i, "z_j", z_j, empty=group is not None)
    check.positive_scalar("temperature", temperature, z_i)
    if weight_fn is not None:
        check_weight_fn(weight_fn)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "dcl_loss",
        temperature=temperature,
        weight_fn=weight_fn,
        sample_weight=sample_weight,
        ids=ids,
        extra_ids=extra_ids,
    )
    options = row_options(
        "z_i",
        z_i,
        z_i.shape[0],
        sample_weight=sample_weight,
        ids=ids,
        extra_negatives=extra_negatives,
        extra_ids=extra_ids,
    )
    scale = reciprocal_scale(temperature)
    args = (z_i, z_j, scale, normalize, weight_fn, options, reduction, Where(*place))
    return Plan(_loss, args, reduction)


def check_weight_fn(weight_fn: Any) -> None:
    """A function that takes two arguments. It is not called: its own errors are its own."""
    if isinstance(weight_fn, _MisesFisher) or torch.compiler.is_compiling():
        return
    check.function("weight_fn", weight_fn)
    try:
        signature = inspect.signature(weight_fn)
    except (TypeError, ValueError):  # a builtin tells nothing
        return
    try:
        signature.bind(None, None)
    except TypeError:
        got = f"{getattr(weight_fn, '__name__', type(weight_fn).__name__)}{signature}"
        factory = weight_fn is negative_mises_fisher_weights
        meant = ": did you mean negative_mises_fisher_weights(sigma)?" if factory else ""
        raise TypeError(f"weight_fn must map two (B, D) to (B,), got {got}{meant}") from None


@full_precision
def _loss(
    z_i: Tensor,
    z_j: Tensor,
    scale: Scale,
    normalize: bool,
    weight_fn: WeightFn | None,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    rows = prepare(scale, normalize, where, options.extra_negatives, z_i, z_j)
    u_i, u_j = rows.units
    w = None
    if weight_fn is not None:
        if where.group and isinstance(weight_fn, _MisesFisher):
            weight_fn = functools.partial(weight_fn, over=rows.pairs.sweeps)
        halves = (weight_fn(u_i.z, u_j.z), weight_fn(u_j.z, u_i.z))
        for half in halves:
            if not isinstance(half, Tensor) or half.shape != z_i.shape[:1]:
                got = tuple(half.shape) if isinstance(half, Tensor) else type(half).__name__
                raise ValueError(f"weight_fn must return ({z_i.shape[0]},), got {got}")
        w = torch.cat(halves)
    s_pos = rows.positives(u_i, u_j).repeat(2)
    loss = dcl(negatives_lse(stacked_blocks(rows, options)), s_pos, w).to(u_i.z.dtype)
    return rows.pairs.reduce(loss + rows.alarm, weights(options, loss, 2), reduction)


@dataclasses.dataclass(frozen=True)
class _MisesFisher:
    sigma: float

    def __call__(self, z_i: Tensor, z_j: Tensor, over: Sweeps | None = None) -> Tensor:
        mine = (z_i.detach() * z_j.detach()).sum(-1) / self.sigma
        if over is None:
            return 2 - len(mine) * torch.softmax(mine, 0)
        everyone, start = over.gather(mine), over.start(len(mine), mine)
        return (2 - len(everyone) * torch.softmax(everyone, 0))[start : start + len(mine)]


def negative_mises_fisher_weights(sigma: float = 0.5) -> WeightFn:
    r"""The weights of DCLW: less for pairs that agree already.

    `w_i = 2 - B softmax_i(<z_i, z_j> / sigma)`; their mean over the batch is 1, and they are
    constants to the gradient.

    Args:
        sigma: positive number: how evenly the weights spread.

    Returns:
        A function for `weight_fn` of `dcl_loss`: (B, D), (B, D) to (B,).

    Raises:
        ValueError: for a sigma that is not positive.

    Source: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, section 3.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(8, 16))
        >>> w = negative_mises_fisher_weights()(z, z.roll(1, 0))
        >>> torch.testing.assert_close(w.mean(), torch.tensor(1.0))
    """
    check.positive_number("sigma", sigma)
    return _MisesFisher(float(sigma))
