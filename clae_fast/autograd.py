"""The fused losses for autograd, and without it.

The operators return the gradients together with the loss, so a backward only multiplies by what
comes from upstream. `backend="reference"` bypasses this for plain PyTorch, which may be
differentiated as often as one likes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .numerics import as_given, compute_dtype, effective_scale, full_precision, to_raw, unit_rows
from .ops import raw

Need = Sequence[bool]


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def _scale_grad(dscale: Tensor, scale: float, scale_tensor: Tensor, reciprocal: bool) -> Tensor:
    """Gradient of the tensor behind `t`: of the temperature in `t = 1 / temperature`, say."""
    x = scale_tensor.detach().to(dscale.dtype)
    slope = -scale / (x * x) if reciprocal else scale
    return (dscale.reshape(x.shape) * slope).to(scale_tensor.dtype)


def _records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd needs a node; raises where it could not be right."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func transforms are not supported by the fused losses: use "
            'clae_fast.value_and_grad, or backend="reference", which supports them'
        )
    return True


class _FirstOrder(torch.autograd.Function):
    """Runs the arithmetic of a backward under create_graph; a second backward raises.

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
            'backend="reference", which supports it'
        )


def _once(fn: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """`fn(*tensors)` in a backward, guarded against a second one."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FirstOrder.apply(fn, *tensors)
    return fn(*tensors)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        negatives: Tensor | None,
        scale: float,
        scale_tensor: Tensor | None,
        reciprocal: bool,
        form: str,
        normalize: bool,
        reduction: str,
        backend: str,
    ) -> Tensor:
        need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
        now = [n and reduction != "none" for n in need]  # "none" needs the upstream weights first
        rows, lse_row, lse_col, *grads = raw.contrast(
            q, k, negatives, scale, scale_tensor, reciprocal, form, normalize, *now, backend=backend
        )
        ctx.save_for_backward(q, k, negatives, scale_tensor, lse_row, lse_col, *grads)
        ctx.need, ctx.reduction, ctx.count = need, reduction, rows.numel()
        ctx.options = scale, reciprocal, form, normalize, backend
        return reduce_rows(rows, reduction)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        need, reduction, count = ctx.need, ctx.reduction, ctx.count
        scale, reciprocal, form, normalize, backend = ctx.options

        def gradients(g: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            q, k, negatives, scale_tensor, lse_row, lse_col = saved[:6]
            options = (scale, scale_tensor, reciprocal)
            grads: Sequence[Tensor]
            if reduction == "none":
                pair_grad = functools.partial(raw.pair_grad, backend=backend)
                saved_rows = (form, normalize, lse_row, lse_col)
                grads = reference.contrast_grad(
                    q, k, negatives, *options, *saved_rows, g, need, pair_grad
                )
            else:
                factor = g / count if reduction == "mean" else g
                grads = [x * factor for x in saved[6:]]
            return _contrast_gradients(need, grads, q, k, negatives, *options)

        dq, dk, dnegatives, dscale = _once(gradients, grad_output, *ctx.saved_tensors)
        return dq, dk, dnegatives, None, dscale, None, None, None, None, None


def _contrast_gradients(
    need: Need,
    grads: Any,
    q: Any,
    k: Any,
    negatives: Any,
    scale: float,
    scale_tensor: Any,
    reciprocal: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients asked for, in the dtypes of their inputs; cast last, as half is narrow."""
    dq, dk, dnegatives, dscale = grads
    return (
        dq.to(q.dtype) if need[0] else None,
        dk.to(k.dtype) if need[1] else None,
        dnegatives.to(negatives.dtype) if need[2] and negatives is not None else None,
        _scale_grad(dscale, scale, scale_tensor, reciprocal) if need[3] else None,
    )


def contrast_loss(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    form: str,
    normalize: bool,
    reduction: str,
    backend: str,
) -> Tensor:
    """The losses of `reference.contrast`, reduced; differentiable."""
    options = (scale, scale_tensor, reciprocal, form, normalize)
    if backend == "reference":
        return reduce_rows(reference.contrast(q, k, negatives, *options).loss, reduction)
    if _records_gradient(q, k, negatives, scale_tensor):
        return _Contrast.apply(q, k, negatives, *options, reduction, backend)
    return reduce_rows(raw.contrast(q, k, negatives, *options, backend=backend)[0], reduction)


def contrast_value_and_grad(
    need: Need,
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    form: str,
    normalize: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The reduced loss and its gradients for (q, k, negatives, scale_tensor), without a graph."""
    rows, _, _, *grads = raw.contrast(
        q, k, negatives, scale, scale_tensor, reciprocal, form, normalize, *need, backend=backend
    )
    if reduction == "mean":
        grads = [x * (1 / rows.numel()) for x in grads]
    return reduce_rows(rows, reduction), _contrast_gradients(
        need, grads, q, k, negatives, scale, scale_tensor, reciprocal
    )


@full_precision
def _uel_rows(
    z_i: Tensor,
    z_j: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    normalize: bool,
    negative_weight: float,
    need: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the loss (2B,); each row's own gradient (2B, D) and slope in `t` (2B,).

    The keys are constants, so row r touches no other row's input: any upstream weights can be
    multiplied in afterwards.
    """
    dtype = compute_dtype(z_i.dtype)
    unit = (unit_rows if normalize else as_given)(torch.cat((z_i, z_j)).to(dtype))
    rows, dq = raw.pair_uel(
        unit.z, unit.z, scale, negative_weight, scale_tensor, reciprocal, need_dq=need,
        backend=backend,
    )  # fmt: skip
    if not need:
        return rows, dq, dq
    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    return rows, to_raw(dq, unit), (unit.z * dq).sum(-1) / t  # Euler


class _UEL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_i: Tensor,
        z_j: Tensor,
        scale: float,
        scale_tensor: Tensor | None,
        reciprocal: bool,
        normalize: bool,
        negative_weight: float,
        reduction: str,
        backend: str,
    ) -> Tensor:
        ctx.need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        rows, dz, dscale = _uel_rows(
            z_i, z_j, scale, scale_tensor, reciprocal, normalize, negative_weight, True, backend
        )
        ctx.save_for_backward(z_i, z_j, scale_tensor, dz, dscale)
        ctx.reduction, ctx.count = reduction, rows.numel()
        ctx.options = scale, reciprocal
        return reduce_rows(rows, reduction)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        need, mean, count = ctx.need, ctx.reduction == "mean", ctx.count
        scale, reciprocal = ctx.options

        def gradients(g: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            z_i, z_j, scale_tensor, dz, dscale = saved
            weight = (g / count if mean else g).expand(count)
            return _uel_gradients(
                need, z_i, z_j, scale, scale_tensor, reciprocal, dz, dscale, weight
            )

        dz_i, dz_j, dscale = _once(gradients, grad_output, *ctx.saved_tensors)
        return dz_i, dz_j, None, dscale, None, None, None, None, None


def _uel_gradients(
    need: Need,
    z_i: Any,
    z_j: Any,
    scale: float,
    scale_tensor: Any,
    reciprocal: bool,
    dz: Any,
    dscale: Any,
    weight: Tensor,
) -> tuple[Tensor | None, ...]:
    B = z_i.shape[0]
    return (
        (dz[:B] * weight[:B, None]).to(z_i.dtype) if need[0] else None,
        (dz[B:] * weight[B:, None]).to(z_j.dtype) if need[1] else None,
        _scale_grad((dscale * weight).sum(), scale, scale_tensor, reciprocal) if need[2] else None,
    )


def uel_loss(
    z_i: Tensor,
    z_j: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    normalize: bool,
    negative_weight: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """`reference.pair_uel` on the stacked views, reduced; differentiable."""
    if backend == "reference":
        dtype = compute_dtype(z_i.dtype)
        z = torch.cat((z_i, z_j)).to(dtype)
        z = unit_rows(z).z if normalize else z
        rows = reference.pair_uel(z, z, scale, negative_weight, scale_tensor, reciprocal)[0]
        return reduce_rows(rows, reduction)
    options = (scale, scale_tensor, reciprocal, normalize, negative_weight)
    if _records_gradient(z_i, z_j, scale_tensor):
        return _UEL.apply(z_i, z_j, *options, reduction, backend)
    return reduce_rows(_uel_rows(z_i, z_j, *options, False, backend)[0], reduction)


def uel_value_and_grad(
    need: Need,
    z_i: Tensor,
    z_j: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    normalize: bool,
    negative_weight: float,
    reduction: str,
    backend: str,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The reduced loss and its gradients for (z_i, z_j, scale_tensor), without a graph."""
    rows, dz, dscale = _uel_rows(
        z_i, z_j, scale, scale_tensor, reciprocal, normalize, negative_weight, any(need), backend
    )
    weight = rows.new_full((), 1 / rows.numel() if reduction == "mean" else 1.0)
    return reduce_rows(rows, reduction), _uel_gradients(
        need, z_i, z_j, scale, scale_tensor, reciprocal, dz, dscale, weight.expand(rows.numel())
    )
