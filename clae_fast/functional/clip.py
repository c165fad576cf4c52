"""The symmetric loss of CLIP."""

from typing import Any

from torch import Tensor

from .. import validation as check
from ..sweeps import Where
from . import composed
from .options import row_options
from .plan import Plan, Scale, common, contrast, fused


@fused
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    targets: Tensor | None = None,
    ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""CLIP: images find their texts and texts their images.

    With `s_ij = logit_scale <image_i, text_j> (+ logit_bias)`,

        loss_i = (-s_ii + log sum_j e^{s_ij},  -s_ii + log sum_j e^{s_ji})

    Args:
        image_features: (B, D), usually normalised by the model.
        text_features: (B, D), same dtype and device.
        logit_scale: positive number or one-element float tensor: the scale itself, not its
            logarithm; gets its gradient.
        logit_bias: None, a number or a one-element tensor. It cancels in the softmax: its gradient
            is zero, and exists.
        sample_weight: (B,): weights of the pairs, in both directions: see `nt_xent_loss`.
        label_smoothing: see `nt_xent_loss`.
        targets: None: each image's own text. (B, B), dense, sparse COO or sparse CSR, constant: how
            much of each text (column) is each image's target; transposed for the texts. Rows need
            not sum to 1: `loss_i = sum_j y_ij (log sum_k e^{s_ik} - s_ij)`; a row of zeros gives 0.
            Not checked, as that would wait for a GPU; must be >= 0. PyTorch compiles no sparse
            ones: they end a `torch.compile` graph.
        ids: see `nt_xent_loss`; not together with targets.
        extra_negatives: (M, D): texts beside the batch's (hard captions, say), which all images
            meet and which look for no image themselves.
        extra_ids: see `nt_xent_loss`.
        reduction: "mean" over both directions of all rows, "sum", or "none" for (B, 2): images,
            texts.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.
        group, exchange: as in `nt_xent_loss`.

    Returns:
        The loss, 0-dim or (B, 2). A pair alone in its batch has loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Equivalent to::

        s = logit_scale * image_features @ text_features.T
        (F.cross_entropy(s, torch.arange(B)) + F.cross_entropy(s.T, torch.arange(B))) / 2

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    ICML 2021, figure 3.

    Example:
        >>> x, y = torch.randn(8, 16), torch.randn(8, 16)
        >>> clip_loss(x, y, 10.0, normalize=True, reduction="none").shape
        torch.Size([8, 2])
    """
    check.embeddings(
        "image_features", image_features, "text_features", text_features, empty=group is not None
    )
    check.positive_scalar("logit_scale", logit_scale, image_features)
    bias = None
    if isinstance(logit_bias, Tensor):
        check.one_element("logit_bias", logit_bias, image_features)
        bias = logit_bias
    elif logit_bias is not None:
        check.number("logit_bias", logit_bias, expected=f"None, {check.NUMBER_OR_TENSOR}")
    check.share("label_smoothing", label_smoothing)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "clip_loss",
        logit_scale=logit_scale,
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
        targets=targets,
        ids=ids,
        extra_ids=extra_ids,
    )
    scale: Scale
    if isinstance(logit_scale, Tensor):
        scale = (1.0, logit_scale, False)
    else:
        scale = (float(logit_scale), None, False)
    asked = (sample_weight, targets, ids, extra_negatives, extra_ids)
    if label_smoothing or any(x is not None for x in asked):
        rows = row_options(
            "image_features", image_features, image_features.shape[0], ids=ids, targets=targets,
            target_columns=None if place[1] else image_features.shape[0],
            sample_weight=sample_weight, label_smoothing=label_smoothing,
            extra_negatives=extra_negatives, extra_ids=extra_ids,
        )  # fmt: skip
        args = (image_features, text_features, scale, normalize, rows, reduction, Where(*place))
        return Plan(composed.both_ways, args, reduction, bias=bias)
    options = ("two_way", normalize, reduction, *place)
    return contrast(
        image_features, text_features, None, scale, *options, slots=(0, 1, 3, None), bias=bias
    )
