"""The contrastive loss with hard or debiased negatives."""

from typing import Any

from torch import Tensor

from .. import validation as check
from ..numerics import full_precision
from ..softmax_rows import hard_negative, negatives_count, negatives_lse
from ..sweeps import Where
from .options import RowOptions, prepare, row_options, weights
from .plan import Plan, Scale, common, fused, reciprocal_scale
from .stacked import stacked_blocks


@fused
def hard_negative_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
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
    r"""HCL: negatives weigh more the harder they are, less the share of them that are positives.

    With `z = [z_i; z_j]`, `s_rc = cos(z_r, z_c) / temperature`, the twin `r+` of row r, its M
    negatives J(r) and `t = 1 / temperature`,

        R_r    = M sum_{j in J(r)} e^{(1 + beta) s_rj} / sum_{j in J(r)} e^{beta s_rj}
        G_r    = max((R_r - tau_plus M e^{s_{r,r+}}) / (1 - tau_plus), M e^{-t})
        loss_r = log(1 + G_r / e^{s_{r,r+}})

    in the log domain: two sweeps, of `(1 + beta) s` and of `beta s`.

    Args:
        z_i: (B, D) embeddings of the first views.
        z_j: (B, D) embeddings of the second views, same dtype and device.
        temperature: positive number, or a one-element float tensor (see `nt_xent_loss`).
        beta: how much harder negatives weigh, a number of at least 0; 0 is the debiased loss, and
            with `tau_plus=0` too it is NT-Xent.
        tau_plus: in [0, 1): the share of the negatives that are of the row's own class.
        sample_weight, ids, extra_negatives, extra_ids: see `nt_xent_loss`.
        reduction: "mean" over all 2B rows, "sum", or "none" for (2B,): rows of z_i, then of z_j.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.
        group, exchange: as in `nt_xent_loss`.

    Returns:
        The loss, 0-dim or (2B,). A row without negatives has loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Source: Robinson et al., "Contrastive Learning with Hard Negative Samples", ICLR 2021, equation
    4 and section 4; `beta=0`: Chuang et al., "Debiased Contrastive Learning", NeurIPS 2020,
    equation 8.

    Example:
        >>> z_i, z_j = torch.randn(8, 16), torch.randn(8, 16)
        >>> plain = hard_negative_loss(z_i, z_j, beta=0.0, tau_plus=0.0)
        >>> torch.testing.assert_close(plain, nt_xent_loss(z_i, z_j))
    """
    check.embeddings("z_i", z_i, "z_j", z_j, empty=group is not None)
    check.positive_scalar("temperature", temperature, z_i)
    check.number("beta", beta, at_least=0)
    check.share("tau_plus", tau_plus)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "hard_negative_loss",
        temperature=temperature,
        beta=beta,
        tau_plus=tau_plus,
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
    hardness = (float(beta), float(tau_plus))
    args = (z_i, z_j, scale, normalize, hardness, options, reduction, Where(*place))
    return Plan(_loss, args, reduction)


@full_precision
def _loss(
    z_i: Tensor,
    z_j: Tensor,
    scale: Scale,
    normalize: bool,
    hardness: tuple[float, float],
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    beta, tau_plus = hardness
    rows = prepare(scale, normalize, where, options.extra_negatives, z_i, z_j)
    blocks = stacked_blocks(rows, options)
    count = negatives_count(blocks)
    harder = negatives_lse(blocks, 1 + beta)
    hard = negatives_lse(blocks, beta) if beta else count.to(harder.dtype).log()
    s_pos = rows.positives(*rows.units).repeat(2)
    loss = hard_negative(harder, hard, count, s_pos, rows.t, tau_plus).to(rows.units[0].z.dtype)
    return rows.pairs.reduce(loss + rows.alarm, weights(options, loss, 2), reduction)
