"""The fused losses for autograd, and without it.

The operators return the gradients together with the loss, so a backward only multiplies by what
comes from upstream. `backend="reference"` bypasses this for plain PyTorch, which may be
differentiated as often as one likes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .contrast_grad import contrast_grad
from .group_autograd import reduce_over_group, shared
from .numerics import (
    as_given,
    compute_dtype,
    effective_scale,
    full_precision,
    no_autocast,
    to_raw,
    unit_rows,
)
from .ops import call, raw

Need = Sequence[bool]
Gradients = tuple[Tensor | None, ...]


class ContrastOptions(NamedTuple):
    """What `contrast` is told beside its tensors; `t` as in `numerics.effective_scale`."""

    scale: float
    reciprocal: bool
    form: str
    normalize: bool
    reduction: str
    backend: str
    group: str = ""
    exchange: str = "auto"
    call: str = ""


class UELOptions(NamedTuple):
    """What `pair_uel` is told beside its tensors."""

    scale: float
    reciprocal: bool
    normalize: bool
    negative_weight: float
    reduction: str
    backend: str
    group: str = ""
    exchange: str = "auto"
    call: str = ""


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def _scale_grad(
    dscale: Tensor, scale_tensor: Tensor, options: ContrastOptions | UELOptions
) -> Tensor:
    """Gradient of the tensor behind `t`: of the temperature in `t = 1 / temperature`, say."""
    x = scale_tensor.detach().to(dscale.dtype)
    slope = -options.scale / (x * x) if options.reciprocal else options.scale
    return (dscale.reshape(x.shape) * slope).to(scale_tensor.dtype)


# ------------------------------------------------------------------------- what all of them need


def _records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd needs a node; raises where it could not be right."""
    _refuse_transforms(tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_transforms(tensors: Sequence[Tensor | None]) -> None:
    """torch.func.grad would raise obscurely, forward derivatives be silently 0; vmap is fine."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        functorch = torch._C._functorch
        kinds = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
        if any(level.key() in kinds for level in functorch.get_interpreter_stack() or ()):
            raise RuntimeError(
                "derivatives of torch.func are not supported by the fused losses: use "
                'clae_fast.value_and_grad, or backend="reference" without a group, which supports '
                "them"
            )
    elif forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            "forward-mode derivatives are not supported by the fused losses: use "
            'backend="reference" without a group, which supports them'
        )


class _FirstOrder(torch.autograd.Function):
    """Runs the arithmetic of a backward under create_graph; differentiating that raises.

    Gradients saved in forward are constants to autograd, so the second derivative would be
    silently wrong. The original inputs come along: the result requires grad, and a gradient
    penalty cannot be dropped unnoticed.
    """

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return fn(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "double backward through a fused loss is not supported: use "
            'backend="reference" without a group, which supports it'
        )


def _once(fn: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """`fn(*tensors)` in a backward, in full precision, guarded against a second one."""
    if torch.compiler.is_compiling():
        return fn(*tensors)
    with no_autocast(tensors[0]):
        return _FirstOrder.apply(fn, *tensors) if torch.is_grad_enabled() else fn(*tensors)


# -------------------------------------------------------------------- NT-Xent, InfoNCE and CLIP


def _contrast(
    need: Need,
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale_tensor: Tensor | None,
    o: ContrastOptions,
) -> Any:
    """The reduced loss, the log-sum-exps, and the gradients."""
    if o.group:
        return call(
            "group_contrast", q, k, negatives, o.scale, scale_tensor, o.reciprocal, o.form,
            o.normalize, *need, o.reduction, o.group, o.exchange, o.call, backend=o.backend,
        )  # fmt: skip
    return call(
        "contrast", q, k, negatives, o.scale, scale_tensor, o.reciprocal, o.form, o.normalize,
        *need, o.reduction, backend=o.backend,
    )  # fmt: skip


def _contrast_gradients(
    need: Need,
    grads: Any,
    q: Any,
    k: Any,
    negatives: Any,
    scale_tensor: Any,
    options: ContrastOptions,
) -> Gradients:
    """The gradients asked for, in the dtypes of their inputs; cast last, as half is narrow."""
    dq, dk, dnegatives, dscale = grads
    return (
        dq.to(q.dtype) if need[0] else None,
        dk.to(k.dtype) if need[1] else None,
        dnegatives.to(negatives.dtype) if need[2] and negatives is not None else None,
        _scale_grad(dscale, scale_tensor, options) if need[3] else None,
    )


def _given(need: Need, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x for n, x in zip(need, tensors, strict=True) if n)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        negatives: Tensor | None,
        scale_tensor: Tensor | None,
        options: ContrastOptions,
    ) -> Tensor:
        need = ctx.needs_input_grad[:4]
        # "none" must know the upstream weights before it can sum
        now = [n and options.reduction != "none" for n in need]
        tensors = (q, k, negatives, scale_tensor)
        loss, lse_row, lse_col, *grads = _contrast(now, *tensors, options)
        # What was not asked for is empty: keeping it would cost time at every small batch.
        later = (lse_row, lse_col) if options.reduction == "none" else _given(now, grads)
        ctx.save_for_backward(*tensors, *later)
        ctx.need, ctx.options = need, options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        need, o = ctx.need, ctx.options

        def gradients(g: Tensor, *saved: Any) -> Gradients:
            q, k, negatives, scale_tensor = saved[:4]
            grads: Sequence[Tensor | None]
            if o.reduction == "none":
                lse_row, lse_col = saved[4:]
                told = (
                    q, k, negatives, o.scale, scale_tensor, o.reciprocal, o.form, o.normalize,
                    lse_row, lse_col, g,
                )  # fmt: skip
                # By the dispatcher: upstream weights may come in batches that only it sees.
                if o.group:
                    grads = raw.group_contrast_grad.default(
                        *told, *need, o.group, o.exchange, o.call, backend=o.backend
                    )
                else:
                    sweep = functools.partial(raw.pair_grad.default, backend=o.backend)
                    grads = contrast_grad(*told, need, sweep)
            else:
                scaled = iter([x * g for x in saved[4:]])
                grads = [next(scaled) if n else None for n in need]
            return _contrast_gradients(need, grads, q, k, negatives, scale_tensor, o)

        return *_once(gradients, grad_output, *ctx.saved_tensors), None


def contrast_loss(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale_tensor: Tensor | None,
    options: ContrastOptions,
) -> Tensor:
    """The losses of `reference.contrast`, reduced; differentiable."""
    if options.backend == "reference" and not options.group:
        scale = (options.scale, scale_tensor, options.reciprocal)
        rows = reference.contrast(q, k, negatives, *scale, options.form, options.normalize).loss
        return reduce_rows(rows, options.reduction)
    if _records_gradient(q, k, negatives, scale_tensor):
        return _Contrast.apply(q, k, negatives, scale_tensor, options)
    loss: Tensor = _contrast((False,) * 4, q, k, negatives, scale_tensor, options)[0]
    return loss


def contrast_value_and_grad(
    need: Need,
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale_tensor: Tensor | None,
    options: ContrastOptions,
) -> tuple[Tensor, Gradients]:
    """The reduced loss and its gradients for (q, k, negatives, scale_tensor), without a graph."""
    loss, _, _, *grads = _contrast(need, q, k, negatives, scale_tensor, options)
    return loss, _contrast_gradients(need, grads, q, k, negatives, scale_tensor, options)


# ------------------------------------------------------------------------------------------- UEL


@full_precision
def _uel_rows(
    z_i: Tensor,
    z_j: Tensor,
    scale_tensor: Tensor | None,
    ids: Tensor | None,
    o: UELOptions,
    need: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the loss (2B,); each row's own gradient (2B, D) and slope in `t` (2B,).

    The keys are constants, so row r touches no other row's input: any upstream weights can be
    multiplied in afterwards.
    """
    dtype = compute_dtype(z_i.dtype)
    unit = (unit_rows if o.normalize else as_given)(torch.cat((z_i, z_j)).to(dtype))
    if o.group:
        rows, dq = call(
            "group_uel", unit.z, o.scale, o.negative_weight, scale_tensor, o.reciprocal, ids, need,
            o.group, o.exchange, o.call, backend=o.backend,
        )  # fmt: skip
    else:
        rows, dq = call(
            "pair_uel", unit.z, unit.z, o.scale, o.negative_weight, scale_tensor, o.reciprocal,
            row_ids=ids, col_ids=ids, need_dq=need, backend=o.backend,
        )  # fmt: skip
    if not need:
        return rows, dq, dq
    t = effective_scale(o.scale, scale_tensor, o.reciprocal, dtype)
    return rows, to_raw(dq, unit), (unit.z * dq).sum(-1) / t  # Euler


def _uel_gradients(
    need: Need,
    weight: Tensor,
    z_i: Any,
    z_j: Any,
    scale_tensor: Any,
    dz: Any,
    dscale: Any,
    options: UELOptions,
) -> Gradients:
    """Upstream weights (2B,) times each row's own gradient, in the dtypes of the inputs."""
    B = z_i.shape[0]
    return (
        (dz[:B] * weight[:B, None]).to(z_i.dtype) if need[0] else None,
        (dz[B:] * weight[B:, None]).to(z_j.dtype) if need[1] else None,
        _scale_grad((dscale * weight).sum(), scale_tensor, options) if need[2] else None,
    )


class _UEL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_i: Tensor,
        z_j: Tensor,
        scale_tensor: Tensor | None,
        ids: Tensor | None,
        options: UELOptions,
    ) -> Tensor:
        rows, dz, dscale = _uel_rows(z_i, z_j, scale_tensor, ids, options, True)
        ctx.save_for_backward(z_i, z_j, scale_tensor, dz, dscale)
        ctx.need, ctx.options, ctx.count = ctx.needs_input_grad[:3], options, rows.numel()
        return reduce_rows(rows, options.reduction)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        need, options, count = ctx.need, ctx.options, ctx.count

        def gradients(g: Tensor, *saved: Any) -> Gradients:
            weight = (g / count if options.reduction == "mean" else g).expand(count)
            z_i, z_j, scale_tensor, dz, dscale = saved
            return _uel_gradients(need, weight, z_i, z_j, scale_tensor, dz, dscale, options)

        return *_once(gradients, grad_output, *ctx.saved_tensors), None, None


def uel_loss(
    z_i: Tensor,
    z_j: Tensor,
    scale_tensor: Tensor | None,
    options: UELOptions,
    ids: Tensor | None = None,
) -> Tensor:
    """`reference.pair_uel` on the stacked views, reduced; differentiable.

    `ids`: int32 (2B,), over a group numbered alike on all ranks.
    """
    if options.group:
        scale_tensor = shared(scale_tensor, options.group, options.call)
        rows = _uel_loss(z_i, z_j, scale_tensor, ids, options._replace(reduction="none"))
        return reduce_over_group(rows, options.reduction, options.group, options.call)
    return _uel_loss(z_i, z_j, scale_tensor, ids, options)


def _uel_loss(
    z_i: Tensor,
    z_j: Tensor,
    scale_tensor: Tensor | None,
    ids: Tensor | None,
    options: UELOptions,
) -> Tensor:
    if options.backend == "reference" and not options.group:
        z = torch.cat((z_i, z_j)).to(compute_dtype(z_i.dtype))
        z = unit_rows(z).z if options.normalize else z
        scale = (options.scale, options.negative_weight, scale_tensor, options.reciprocal)
        rows = reference.pair_uel(z, z, *scale, row_ids=ids, col_ids=ids)[0]
        return reduce_rows(rows, options.reduction)
    if _records_gradient(z_i, z_j, scale_tensor):
        return _UEL.apply(z_i, z_j, scale_tensor, ids, options)
    rows = _uel_rows(z_i, z_j, scale_tensor, ids, options, False)[0]
    return reduce_rows(rows, options.reduction)


def uel_value_and_grad(
    need: Need, z_i: Tensor, z_j: Tensor, scale_tensor: Tensor | None, options: UELOptions
) -> tuple[Tensor, Gradients]:
    """The reduced loss and its gradients for (z_i, z_j, scale_tensor), without a graph."""
    rows, dz, dscale = _uel_rows(z_i, z_j, scale_tensor, None, options, any(need))
    factor = 1 / rows.numel() if options.reduction == "mean" else 1.0
    weight = rows.new_full((), factor).expand(rows.numel())
    return reduce_rows(rows, options.reduction), _uel_gradients(
        need, weight, z_i, z_j, scale_tensor, dz, dscale, options
    )
