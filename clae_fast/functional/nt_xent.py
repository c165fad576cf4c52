"""NT-Xent, the loss of SimCLR."""

from typing import Any

from torch import Tensor

from .. import validation as check
from ..sweeps import Where
from . import composed
from .options import row_options
from .plan import Plan, common, contrast, fused, reciprocal_scale


@fused
def nt_xent_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""NT-Xent, the loss of SimCLR: each view must find its twin among the 2B - 1 other rows.

    With `z = [z_i; z_j]`, `s_rc = cos(z_r, z_c) / temperature` and the twin `r+` of row r,

        loss_r = -s_{r,r+} + log sum_{c != r} e^{s_rc}

    computed as `log(1 + e^(lse over the negatives - s_{r,r+}))`, which does not cancel.

    Args:
        z_i: (B, D) embeddings of the first views.
        z_j: (B, D) embeddings of the second views, same dtype and device.
        temperature: positive number, or a one-element float tensor, which gets its gradient if it
            requires one; its value is not checked, as that would wait for a GPU (0 gives NaN).
        sample_weight: (B,): weights of the pairs, for both rows of each. "mean" is then
            `sum_r w_r loss_r / sum_r w_r`, and 0 where the sum of weights is 0; "sum" and "none"
            are of `w_r loss_r`. Not checked, as that would wait for a GPU; must be >= 0.
        label_smoothing: e in [0, 1): `1 - e` of each row's target on its twin, e spread evenly over
            all columns that it meets, the twin among them.
        ids: (B,) of any integer type: pairs of equal ids (two crops of one image, two copies of a
            text) are no negatives of each other. A row's own twin stays its positive.
        extra_negatives: (M, D), any float dtype (the wider of the two is computed in): more
            negatives for every row, beside the batch's; they get their gradient if they require
            one, in their dtype.
        extra_ids: (M,), where `ids` are given: left out of rows of equal ids.
        reduction: "mean" over all 2B rows, "sum", or "none" for (2B,): rows of z_i, then of z_j.
        normalize: divide each row by its L2 norm first, in the same pass.
        backend: None (the best there is), or as in `use_backend`.
        group: None: the batch is this process's. "world" or a torch.distributed ProcessGroup: it is
            that of all ranks, each with its own rows, of any number. Every rank gets the mean or
            sum of all rows and gradients whose average over the ranks (DDP's) is the whole
            batch's; with "none" its own rows. All must call, and weight the result alike.
        exchange: of keys between ranks: "gather" (all at once), "ring" (one rank's at a time: least
            memory), or "auto", by size.

    Returns:
        The loss, 0-dim or (2B,). A pair alone in its batch has nothing to contrast: loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Equivalent to::

        z = F.normalize(torch.cat((z_i, z_j)), dim=1)
        s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        F.cross_entropy(s, torch.arange(2 * B).roll(B))

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
    ICML 2020, equation 1.

    Example:
        >>> z_i, z_j = torch.randn(8, 16), torch.randn(8, 16)
        >>> float(nt_xent_loss(z_i, z_i)) < float(nt_xent_loss(z_i, z_j))
        True
    """
    check.embeddings("z_i", z_i, "z_j", z_j, empty=group is not None)
    check.positive_scalar("temperature", temperature, z_i)
    check.share("label_smoothing", label_smoothing)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "nt_xent_loss",
        temperature=temperature,
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
        ids=ids,
        extra_ids=extra_ids,
    )
    asked = (sample_weight, ids, extra_negatives, extra_ids)
    if label_smoothing or any(x is not None for x in asked):
        rows = row_options(
            "z_i", z_i, z_i.shape[0], sample_weight=sample_weight, ids=ids,
            label_smoothing=label_smoothing, extra_negatives=extra_negatives, extra_ids=extra_ids,
        )  # fmt: skip
        args = (z_i, z_j, reciprocal_scale(temperature), normalize, rows, reduction, Where(*place))
        return Plan(composed.nt_xent, args, reduction)
    options = ("nt_xent", normalize, reduction, *place)
    return contrast(z_i, z_j, None, reciprocal_scale(temperature), *options, slots=(0, 1))
