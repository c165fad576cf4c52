"""The instance discrimination of UEL."""

from typing import Any

from torch import Tensor

from .. import autograd
from .. import validation as check
from ..classes import dense_ids
from ..composite import Pairs
from ..sweeps import Where
from .options import RowOptions, row_options, weights
from .plan import Plan, common, fused, reciprocal_scale


@fused
def uel_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negative_weight: float = 1.0,
    sample_weight: Tensor | None = None,
    ids: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""Instance discrimination of UEL: find the twin, and be told from every other row.

    With `z = [z_i; z_j]`, `s_rc = cos(z_r, z_c) / temperature`, the twin `r+` of row r, the
    negatives J(r) (neither r nor r+) and `m = negative_weight`,

        p_rc   = e^{s_rc} / (e^{s_{r,r+}} + m sum_{j in J(r)} e^{s_rj})
        loss_r = -log p_{r,r+} - m sum_{j in J(r)} log(1 - p_rj)

    The keys (second index) are constants by definition: the gradient reaches a row as an anchor
    only.

    Args:
        z_i: (B, D) embeddings of the first views.
        z_j: (B, D) embeddings of the second views, same dtype and device.
        temperature: positive number, or a one-element float tensor (see `nt_xent_loss`).
        negative_weight: m, a number of at least 1 (below, `1 - p` could turn negative).
        sample_weight: see `nt_xent_loss`.
        ids: see `nt_xent_loss`.
        reduction: "mean" over all 2B rows, "sum", or "none" for (2B,): rows of z_i, then of z_j.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.
        group, exchange: as in `nt_xent_loss`.

    Returns:
        The loss, 0-dim or (2B,). A pair alone in its batch has loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Source: Ye et al., "Unsupervised Embedding Learning via Invariant and Spreading Instance
    Feature", CVPR 2019, section 3; CLAE's second baseline.

    Example:
        >>> z_i, z_j = torch.randn(8, 16), torch.randn(8, 16)
        >>> float(uel_loss(z_i, z_i)) < float(uel_loss(z_i, z_j))
        True
    """
    check.embeddings("z_i", z_i, "z_j", z_j, empty=group is not None)
    check.positive_scalar("temperature", temperature, z_i)
    check.number("negative_weight", negative_weight, at_least=1)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "uel_loss",
        temperature=temperature,
        negative_weight=negative_weight,
        sample_weight=sample_weight,
        ids=ids,
    )
    scale, tensor, reciprocal = reciprocal_scale(temperature)
    options = (scale, reciprocal, normalize, float(negative_weight), reduction, *place)
    if sample_weight is not None or ids is not None:
        rows = row_options("z_i", z_i, z_i.shape[0], sample_weight=sample_weight, ids=ids)
        told = autograd.UELOptions(*options)._replace(reduction="none")
        return Plan(_loss, (z_i, z_j, tensor, told, rows, reduction, Where(*place)), reduction)
    args = (z_i, z_j, tensor, autograd.UELOptions(*options))
    with_grad = None if place[1] else autograd.uel_value_and_grad
    return Plan(autograd.uel_loss, args, reduction, with_grad, 3, (0, 1))


def _loss(
    z_i: Tensor,
    z_j: Tensor,
    temperature: Tensor | None,
    told: autograd.UELOptions,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    pairs, ids = Pairs(where, 1.0), None
    if options.row_ids is not None:
        ids = dense_ids(pairs, options.row_ids.repeat(2))[0].narrow
    rows = autograd.uel_loss(z_i, z_j, temperature, told, ids)
    return pairs.reduce(rows, weights(options, rows, 2), reduction)
