"""InfoNCE against the batch, a queue, or each query's own negatives."""

from typing import Any

from torch import Tensor

from .. import autograd
from .. import validation as check
from ..group_autograd import reduce_over_group, shared
from ..numerics import (
    alarm,
    compute_dtype,
    effective_scale,
    full_precision,
    log_sum_exp,
    promoted,
    softplus,
    unit_rows,
)
from ..sweeps import Where
from . import composed
from .options import row_options
from .plan import Plan, common, contrast, fused, reciprocal_scale

NEGATIVE_MODES = ("unpaired", "paired")


@fused
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    negative_mode: str = "unpaired",
    symmetric: bool = False,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    targets: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    extra_ids: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str | None = None,
    group: Any = None,
    exchange: str = "auto",
) -> Plan:
    r"""InfoNCE: each query must find its own key among negatives.

    With `s_ij = cos(query_i, key_j) / temperature` and the negatives J(i) of row i,

        loss_i = -s_ii + log(e^{s_ii} + sum_{j in J(i)} e^{s_ij})

    Args:
        query: (N, D).
        positive_key: (N, D), same dtype and device; row i is the positive of query i.
        negative_keys: None: the other rows of `positive_key` (CLAE's Plain). (M, D): a queue or
            memory bank, shared by all queries (MoCo); the other positives are then no negatives.
            With a group, the same on every rank.
            (N, M, D) with `negative_mode="paired"`: each query's own. Of any float dtype: a
            float32 queue meets bfloat16 queries in float32, and each gets its gradient in its own.
        temperature: positive number, or a one-element float tensor (see `nt_xent_loss`).
        negative_mode: "unpaired" or "paired" (plain PyTorch, memory N x M x D as its input has).
        symmetric: also let each key find its query, as CLIP does; without `negative_keys` only.
        sample_weight, label_smoothing: see `nt_xent_loss`; a weight (N,) is a query's, and its
            key's if symmetric.
        targets: None: each query's own key. (N, N), dense, sparse COO or sparse CSR, constant: how
            much of each key (column) is each query's target; (N, 1 + M) with a queue, the own key
            first. See `clip_loss`. PyTorch compiles no sparse ones: they end a `torch.compile`
            graph.
        query_ids, key_ids: (N,) and, of the keys that are negatives, (N,) or (M,), of any integer
            type: keys with the id of a query are none of its negatives, its own key stays its
            positive. Not together with targets.
        extra_negatives: (M', D), any float dtype: keys beside the batch's or the queue, which all
            queries meet.
        extra_ids: (M',): see `nt_xent_loss`.
        reduction: "mean" over all rows, "sum", or "none": (N,), or (N, 2) if symmetric (queries,
            keys).
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend` ("paired" is plain PyTorch whatever it says).
        group, exchange: as in `nt_xent_loss`.

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
    check.embeddings("query", query, "positive_key", positive_key, empty=group is not None)
    check.positive_scalar("temperature", temperature, query)
    check.word("negative_mode", negative_mode, NEGATIVE_MODES)
    check.flag("symmetric", symmetric)
    check.share("label_smoothing", label_smoothing)
    place = common(
        reduction,
        normalize,
        backend,
        group,
        exchange,
        "info_nce_loss",
        temperature=temperature,
        symmetric=symmetric,
        negative_mode=negative_mode,
        negative_keys=_rows_of(negative_keys),
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
        targets=targets,
        query_ids=query_ids,
        extra_ids=extra_ids,
    )
    scale = reciprocal_scale(temperature)
    given = (sample_weight, targets, query_ids, key_ids, extra_negatives, extra_ids)
    asked = bool(label_smoothing) or any(x is not None for x in given)
    if negative_keys is None:
        if negative_mode == "paired":
            raise ValueError('negative_mode="paired" needs negative_keys (N, M, D), got None')
    elif symmetric:
        raise ValueError(
            "symmetric=True contrasts within the batch: negative_keys must be None, got "
            f"{type(negative_keys).__name__}"
        )
    elif negative_mode == "unpaired":
        check.embeddings(
            "query", query, "negative_keys", negative_keys, same_rows=False,
            empty=group is not None, any_float=True,
        )  # fmt: skip
    else:
        check.same_kind("query", query, "negative_keys", negative_keys, any_float=True)
        N, D = query.shape
        if negative_keys.dim() != 3 or negative_keys.shape[::2] != (N, D):
            raise ValueError(
                f'negative_keys must be ({N}, M, {D}) with negative_mode="paired", got '
                f"{tuple(negative_keys.shape)}"
            )
        if asked:
            raise ValueError(
                'negative_mode="paired" takes none of sample_weight, label_smoothing, targets, '
                "query_ids, key_ids, extra_negatives and extra_ids; got one of them (weight the "
                'rows of reduction="none" instead)'
            )
        args = (
            query,
            positive_key,
            negative_keys,
            *scale,
            normalize,
            reduction,
            place[1],
            place[3],
        )
        return Plan(_paired_loss, args, reduction)
    if asked:
        columns = negative_keys.shape[0] if negative_keys is not None else None
        target_columns = None if columns is None else 1 + columns
        if columns is None and not place[1]:
            target_columns = query.shape[0]
        rows = row_options(
            "query", query, query.shape[0], sample_weight=sample_weight, targets=targets,
            label_smoothing=label_smoothing, query_ids=query_ids, key_ids=key_ids,
            columns=columns, extra_negatives=extra_negatives, extra_ids=extra_ids,
            target_columns=target_columns,
        )  # fmt: skip
        told = (scale, normalize, rows, reduction, Where(*place))
        if symmetric:
            return Plan(composed.both_ways, (query, positive_key, *told), reduction)
        return Plan(composed.info_nce, (query, positive_key, negative_keys, *told), reduction)
    if negative_keys is not None and negative_keys.dtype != query.dtype:
        query, positive_key, negative_keys = promoted(query, positive_key, negative_keys)
    options = ("two_way" if symmetric else "one_way", normalize, reduction, *place)
    return contrast(query, positive_key, negative_keys, scale, *options, slots=(0, 1, 2))


def _rows_of(negative_keys: Any) -> Any:
    """How many a queue has, which is the same on every rank."""
    shared = isinstance(negative_keys, Tensor) and negative_keys.dim() == 2
    return len(negative_keys) if shared else None


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
    group: str,
    call: str,
) -> Tensor:
    """InfoNCE with each query's own negatives: a batch of matrix-vector products, no sweep."""
    q, k, n = promoted(query, positive_key, negative_keys)
    dtype = compute_dtype(q.dtype)
    q, k, n = (x.to(dtype) for x in (q, k, n))
    if normalize:
        q, k, n = (unit_rows(x).z for x in (q, k, n))
    if group:
        scale_tensor = shared(scale_tensor, group, call)
    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    s_pos = (q * k).sum(-1) * t
    s_neg = (n @ q[:, :, None]).squeeze(-1) * t
    rows = softplus(log_sum_exp(s_neg) - s_pos)
    rows = rows if normalize else rows + alarm(q, k, n)
    if group:
        return reduce_over_group(rows, reduction, group, call)
    return autograd.reduce_rows(rows, reduction)
