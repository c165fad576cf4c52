"""The losses as functions: check the input, name the operator and its arguments, reduce.

`B` pairs, `N` rows, `M` columns, `D` width; `cos(a, b) = <a, b> / (|a| |b|)`, or `<a, b>` with
`normalize=False`. All losses accept float16, bfloat16, float32 and float64 embeddings; half
precision is computed in float32, gives a float32 loss and gradients in its own dtype; those of a
mean over many rows can underflow float16 (below 6e-8 they are 0): scale the loss before the
backward as `torch.amp.GradScaler` does, or use `reduction="sum"`. Memory grows as N x D, never as
N x M.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor

from . import autograd
from . import validation as check
from .backends import requested
from .numerics import (
    alarm,
    compute_dtype,
    effective_scale,
    full_precision,
    log_sum_exp,
    softplus,
    unit_rows,
)

Scale = tuple[float, Tensor | None, bool]
NEGATIVE_MODES = ("unpaired", "paired")


class Plan(NamedTuple):
    """A loss as data: which operator, on what, and where the positional inputs went."""

    loss: Callable[..., Tensor]
    args: tuple[Any, ...]
    reduction: str
    value_and_grad: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]] | None = None
    gradients: int = 0  # how many of them value_and_grad knows
    slots: tuple[int | None, ...] = ()  # which belongs to each positional input; None: it is 0
    bias: Tensor | None = None  # cancels in the softmax, and yet is part of the graph


def add_bias(loss: Tensor, bias: Tensor | None) -> Tensor:
    """The loss with its bias, whose gradient is 0 and whose NaN is seen."""
    return loss if bias is None else loss + 0.0 * bias.to(loss.dtype).reshape(())


P = ParamSpec("P")
PLANS: dict[Callable[..., Tensor], Callable[..., Plan]] = {}
"""How `value_and_grad` finds the fused call behind a loss."""


def _fused(plan: Callable[P, Plan]) -> Callable[P, Tensor]:
    """Make a loss of a plan: same signature, the loss as its result."""

    @functools.wraps(plan)
    def loss(*inputs: P.args, **options: P.kwargs) -> Tensor:
        fused = plan(*inputs, **options)
        return add_bias(fused.loss(*fused.args), fused.bias)

    signature = inspect.signature(plan).replace(return_annotation=Tensor)
    loss.__signature__ = signature  # type: ignore[attr-defined]
    loss.__annotations__ = {**plan.__annotations__, "return": Tensor}
    PLANS[loss] = plan
    return loss


def _contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: Scale,
    *options: Any,
    slots: tuple[int | None, ...],
    bias: Tensor | None = None,
) -> Plan:
    """A plan for `contrast`, whose gradients are (q, k, negatives, scale_tensor).

    `options` are form, normalize, reduction and backend.
    """
    number, tensor, reciprocal = scale
    told = autograd.ContrastOptions(number, reciprocal, *options)
    args = (q, k, negatives, tensor, told)
    fused = autograd.contrast_value_and_grad
    return Plan(autograd.contrast_loss, args, told.reduction, fused, 4, slots, bias)


def _scale(temperature: float | Tensor) -> Scale:
    """`t = 1 / temperature` as (scale, scale_tensor, reciprocal)."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature, True
    return 1.0 / float(temperature), None, False


def _common(reduction: str, normalize: bool, backend: str | None) -> str:
    """Checks the keywords that every loss has; the backend to use."""
    if reduction not in check.REDUCTIONS:
        check.word("reduction", reduction, check.REDUCTIONS)
    check.flag("normalize", normalize)
    return requested(backend)


@_fused
def nt_xent_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
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
        reduction: "mean" over all 2B rows, "sum", or "none" for (2B,): rows of z_i, then of z_j.
        normalize: divide each row by its L2 norm first, in the same pass.
        backend: None (the best there is), or as in `use_backend`.

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
    check.embeddings("z_i", z_i, "z_j", z_j)
    check.positive_scalar("temperature", temperature, z_i)
    backend = _common(reduction, normalize, backend)
    options = ("nt_xent", normalize, reduction, backend)
    return _contrast(z_i, z_j, None, _scale(temperature), *options, slots=(0, 1))


@_fused
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    negative_mode: str = "unpaired",
    symmetric: bool = False,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
) -> Plan:
    r"""InfoNCE: each query must find its own key among negatives.

    With `s_ij = cos(query_i, key_j) / temperature` and the negatives J(i) of row i,

        loss_i = -s_ii + log(e^{s_ii} + sum_{j in J(i)} e^{s_ij})

    Args:
        query: (N, D).
        positive_key: (N, D); row i is the positive of query i.
        negative_keys: None: the other rows of `positive_key` (CLAE's Plain). (M, D): a queue or
            memory bank, shared by all queries (MoCo); the other positives are then no negatives.
            (N, M, D) with `negative_mode="paired"`: each query's own.
        temperature: positive number, or a one-element float tensor (see `nt_xent_loss`).
        negative_mode: "unpaired" or "paired" (plain PyTorch, memory N x M x D as its input has).
        symmetric: also let each key find its query, as CLIP does; without `negative_keys` only.
        reduction: "mean" over all rows, "sum", or "none": (N,), or (N, 2) if symmetric (queries,
            keys).
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend` ("paired" is plain PyTorch whatever it says).

    Returns:
        The loss, 0-dim, (N,) or (N, 2). A row without negatives has loss 0.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Equivalent to (without negative_keys)::

        s = F.normalize(query, dim=1) @ F.normalize(positive_key, dim=1).T / temperature
        F.cross_entropy(s, torch.arange(N))

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    equation 4; queue: He et al., "Momentum Contrast", CVPR 2020, equation 1.

    Example:
        >>> q, k, queue = torch.randn(8, 16), torch.randn(8, 16), torch.randn(64, 16)
        >>> info_nce_loss(q, k, queue, temperature=0.07, reduction="none").shape
        torch.Size([8])
    """
    check.embeddings("query", query, "positive_key", positive_key)
    check.positive_scalar("temperature", temperature, query)
    check.word("negative_mode", negative_mode, NEGATIVE_MODES)
    check.flag("symmetric", symmetric)
    backend = _common(reduction, normalize, backend)
    scale = _scale(temperature)
    if negative_keys is None:
        if negative_mode == "paired":
            raise ValueError('negative_mode="paired" needs negative_keys (N, M, D), got None')
    elif symmetric:
        raise ValueError(
            "symmetric=True contrasts within the batch: negative_keys must be None, got "
            f"{type(negative_keys).__name__}"
        )
    elif negative_mode == "unpaired":
        check.embeddings("query", query, "negative_keys", negative_keys, same_rows=False)
    else:
        check.same_kind("query", query, "negative_keys", negative_keys)
        N, D = query.shape
        if negative_keys.dim() != 3 or negative_keys.shape[::2] != (N, D):
            raise ValueError(
                f'negative_keys must be ({N}, M, {D}) with negative_mode="paired", got '
                f"{tuple(negative_keys.shape)}"
            )
        args = (query, positive_key, negative_keys, *scale, normalize, reduction)
        return Plan(_paired_loss, args, reduction)
    options = ("two_way" if symmetric else "one_way", normalize, reduction, backend)
    return _contrast(query, positive_key, negative_keys, scale, *options, slots=(0, 1, 2))


@full_precision
def _paired_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    normalize: bool,
    reduction: str,
) -> Tensor:
    """InfoNCE with each query's own negatives: a batch of matrix-vector products, no sweep."""
    dtype = compute_dtype(query.dtype)
    q, k, n = (x.to(dtype) for x in (query, positive_key, negative_keys))
    if normalize:
        q, k, n = (unit_rows(x).z for x in (q, k, n))
    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    s_pos = (q * k).sum(-1) * t
    s_neg = (n @ q[:, :, None]).squeeze(-1) * t
    rows = softplus(log_sum_exp(s_neg) - s_pos)
    return autograd.reduce_rows(rows if normalize else rows + alarm(q, k, n), reduction)


@_fused
def uel_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negative_weight: float = 1.0,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
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
        reduction: "mean" over all 2B rows, "sum", or "none" for (2B,): rows of z_i, then of z_j.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.

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
    check.embeddings("z_i", z_i, "z_j", z_j)
    check.positive_scalar("temperature", temperature, z_i)
    check.number("negative_weight", negative_weight, at_least=1)
    backend = _common(reduction, normalize, backend)
    scale, tensor, reciprocal = _scale(temperature)
    options = (scale, reciprocal, normalize, float(negative_weight), reduction, backend)
    args = (z_i, z_j, tensor, autograd.UELOptions(*options))
    return Plan(autograd.uel_loss, args, reduction, autograd.uel_value_and_grad, 3, (0, 1))


@_fused
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
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
        reduction: "mean" over both directions of all rows, "sum", or "none" for (B, 2): images,
            texts.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`.

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
    check.embeddings("image_features", image_features, "text_features", text_features)
    check.positive_scalar("logit_scale", logit_scale, image_features)
    bias = None
    if isinstance(logit_bias, Tensor):
        check.one_element("logit_bias", logit_bias, image_features)
        bias = logit_bias
    elif logit_bias is not None:
        check.number("logit_bias", logit_bias)
    backend = _common(reduction, normalize, backend)
    scale: Scale
    if isinstance(logit_scale, Tensor):
        scale = (1.0, logit_scale, False)
    else:
        scale = (float(logit_scale), None, False)
    options = ("two_way", normalize, reduction, backend)
    return _contrast(
        image_features, text_features, None, scale, *options, slots=(0, 1, 3, None), bias=bias
    )
