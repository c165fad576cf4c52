"""The sigmoid loss of SigLIP."""

from typing import Any

from torch import Tensor

from .. import validation as check
from ..classes import dense_ids
from ..group_autograd import shared
from ..numerics import full_precision
from ..other_positives import other_positives
from ..sweeps import Where
from .options import RowOptions, prepare, row_options, weights
from .plan import Plan, Scale, common, fused


@fused
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    positive_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""SigLIP: each image-text pair on its own is told to match or not to.

    With `s_ij = logit_scale <image_i, text_j> + logit_bias` and `y_ij` = 1 where i = j (or their
    ids are equal), else -1,

        loss_i = sum_j log(1 + e^{-y_ij s_ij})

    Args:
        image_features: (B, D), usually normalised by the model.
        text_features: (B, D), same dtype and device.
        logit_scale: positive number or one-element float tensor: the scale itself, not its
            logarithm; gets its gradient.
        logit_bias: a number or a one-element float tensor, which gets its gradient.
        positive_ids: None, or (B,) of any integer type: pairs of equal ids are positives too.
            Finding them waits for a GPU, and ends a `torch.compile` graph. What they add to the
            sweep of the backend is plain PyTorch, whatever the backend, a block at a time.
        sample_weight: (B,), weights of the images: see `nt_xent_loss`.
        reduction: "mean" over the B images (of the sum over all texts), "sum", or "none" for (B,).
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.
        group, exchange: as in `nt_xent_loss`.

    Returns:
        The loss, 0-dim or (B,).

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Equivalent to::

        s = logit_scale * image_features @ text_features.T + logit_bias
        y = 2 * torch.eye(B) - 1
        -F.logsigmoid(y * s).sum() / B

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, equation 1 and
    algorithm 1.

    Example:
        >>> x, y, bias = torch.randn(8, 16), torch.randn(8, 16), torch.tensor(-10.0)
        >>> siglip_loss(x, y, 10.0, bias, normalize=True, reduction="none").shape
        torch.Size([8])
    """
    names, empty = ("image_features", "text_features"), group is not None
    check.embeddings(names[0], image_features, names[1], text_features, empty=empty)
    check.positive_scalar("logit_scale", logit_scale, image_features)
    if isinstance(logit_bias, Tensor):
        check.one_element("logit_bias", logit_bias, image_features)
    else:
        check.number("logit_bias", logit_bias, expected=check.NUMBER_OR_TENSOR)
    samples = image_features.shape[0]
    if positive_ids is not None:
        check.integers("positive_ids", positive_ids, samples, image_features)
        if positive_ids.is_meta:
            raise ValueError("positive_ids must have values to be sorted by, got meta tensors")
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "siglip_loss",
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        positive_ids=positive_ids,
        sample_weight=sample_weight,
    )
    options = row_options("image_features", image_features, samples, sample_weight=sample_weight)
    scale: Scale
    if isinstance(logit_scale, Tensor):
        scale = (1.0, logit_scale, False)
    else:
        scale = (float(logit_scale), None, False)
    args = (
        image_features,
        text_features,
        scale,
        logit_bias,
        normalize,
        positive_ids,
        options,
        reduction,
        Where(*place),
    )
    return Plan(_loss, args, reduction)


@full_precision
def _loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Scale,
    logit_bias: float | Tensor,
    normalize: bool,
    positive_ids: Tensor | None,
    options: RowOptions,
    reduction: str,
    where: Where,
) -> Tensor:
    rows = prepare(scale, normalize, where, None, image_features, text_features)
    pairs, (x, y) = rows.pairs, rows.units
    dtype = x.z.dtype
    bias = (
        logit_bias.to(dtype).reshape(())
        if isinstance(logit_bias, Tensor)
        else x.z.new_full((), logit_bias)  # written there: nothing is copied from the host
    )
    if where.group:
        bias = shared(bias, where.group, where.call)
    extra: Tensor | None = None
    both: tuple[Tensor | None, Tensor | None] = (None, None)
    if positive_ids is not None:
        (ids,) = dense_ids(pairs, positive_ids)
        both = (ids.narrow, ids.narrow)
        extra = other_positives(pairs, x.z, y.z, ids, bias)
    weight = weights(options, x.z)
    if reduction == "none":
        loss = pairs.sigmoid(x.z, y.z, bias, *both)
        loss = loss if extra is None else loss + extra
        return (loss if weight is None else loss * weight) + rows.alarm
    # The weights of the sum are known: its gradients come from the same sweep.
    one = x.z.new_ones(len(x.z))
    weight = pairs.mean_weights(one, weight, reduction)
    weight = one if weight is None else weight
    loss = pairs.sigmoid(x.z, y.z, bias, *both, weight=weight)
    loss = loss if extra is None else loss + (extra * weight).sum()
    return pairs.objective(loss + rows.alarm)
