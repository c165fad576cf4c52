"""The supervised contrastive loss."""

from typing import Any

import torch
from torch import Tensor

from .. import validation as check
from ..classes import dense_ids, partners, sums_of_equal
from ..composite import combined
from ..numerics import Unit, full_precision, wide
from ..softmax_rows import Block, linear, negatives_count, negatives_sum, sup_con
from ..sweeps import Where
from .options import Numbered, RowOptions, extra_blocks, prepare, row_options, weights
from .plan import Plan, Scale, common, fused, reciprocal_scale


@fused
def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    extra_negatives: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""SupCon: each row must find all other rows of its label.

    With `s_ij = cos(z_i, z_j) / temperature` and P(i) the other rows with the label of row i,

        loss_i = -1/|P(i)| sum_{p in P(i)} s_ip + log sum_{j != i} e^{s_ij}

    The sum over P(i) is one product with a sum over the class: positives need no sweep.

    Args:
        features: (N, D), or (B, V, D): V views of each of B samples.
        labels: (N,) or (B,), any integer type.
        temperature: positive number, or a one-element float tensor (see `nt_xent_loss`).
        sample_weight: (N,) or (B,): see `nt_xent_loss`.
        label_smoothing: e in [0, 1): `1 - e` of each row's target on its positives, e spread over
            all columns.
        extra_negatives: (M, D): rows of no label here, more negatives for every row.
        reduction: "mean" over all rows (rows without positives count as 0), "sum", or "none" for
            (N,) or (B V,), in the order of the input.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.
        group, exchange: as in `nt_xent_loss`.

    Returns:
        The loss, 0-dim, (N,) or (B V,). A row without positives has loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Equivalent to::

        z = F.normalize(features, dim=1)
        s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        same = (labels[:, None] == labels).fill_diagonal_(False)
        -(s.log_softmax(1).where(same, 0).sum(1) / same.sum(1).clamp(min=1)).mean()

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (without its
    constant factor `tau / tau_base`).

    Example:
        >>> features, labels = torch.randn(8, 2, 16), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> sup_con_loss(features, labels, reduction="none").shape
        torch.Size([16])
    """
    check.float_tensor("features", features)
    if features.dim() not in (2, 3):
        raise ValueError(f"features must be (N, D) or (B, V, D), got {tuple(features.shape)}")
    if 0 in features.shape[1:] or (not len(features) and group is None):
        raise ValueError(f"features must have no empty dimension, got {tuple(features.shape)}")
    samples = features.shape[0]
    check.integers("labels", labels, samples, features)
    check.positive_scalar("temperature", temperature, features)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "sup_con_loss",
        temperature=temperature,
        views=features.shape[1:-1],
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
    )
    options = row_options(
        "features",
        features.flatten(0, -2),
        samples,
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
        extra_negatives=extra_negatives,
    )
    scale = reciprocal_scale(temperature)
    args = (features, labels, scale, normalize, options, reduction, Where(*place))
    return Plan(_loss, args, reduction)


@full_precision
def _loss(
    features: Tensor,
    labels: Tensor,
    scale: Scale,
    normalize: bool,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    views = features.shape[1] if features.dim() == 3 else 1
    rows = prepare(scale, normalize, where, options.extra_negatives, features.flatten(0, -2))
    pairs, t, (unit,) = rows.pairs, rows.t, rows.units
    (classes,) = dense_ids(pairs, labels.repeat_interleave(views))
    z = unit.z
    # One positive of each row stands apart, its neighbour in the class; the two have one id, by
    # which the sweep leaves both out.
    index, paired, pair_ids = partners(pairs, classes)
    partner = Unit(*(x[index] for x in unit))
    extra = extra_blocks(rows, z, Numbered())
    lse = combined(
        pairs.lse(z, z, pair_ids, pair_ids, form="self"), *(block.lse() for block in extra)
    )
    loss = sup_con(lse, rows.positives(unit, partner), paired)

    wide_z = wide(z)
    one = z.new_ones(len(z))
    count = sums_of_equal(pairs, one, classes, classes) - 1
    mean = (sums_of_equal(pairs, wide_z, classes, classes) - wide_z) / count.clamp(min=1)[:, None]
    apart = torch.where(paired[:, None], wide(partner.z), 0.0)
    only = (paired & (count == 1))[:, None]
    loss = loss + linear(z, torch.where(only, 0.0, apart - mean), t)
    if options.label_smoothing:
        others = [Block(pairs, z, z, own=(z,)), *extra]
        spread = mean - negatives_sum(others) / negatives_count(others).clamp(min=1)[:, None]
        loss = loss + options.label_smoothing * linear(z, spread, t)
    loss = torch.where(count > 0, loss, 0.0).to(z.dtype) + rows.alarm
    weight = weights(options, loss)
    return pairs.reduce(
        loss, None if weight is None else weight.repeat_interleave(views), reduction
    )
