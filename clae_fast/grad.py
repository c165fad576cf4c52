"""Loss and input gradients in one call."""

from __future__ import annotations  # torch.compile traces no annotation of a nested function

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import validation as check
from .functional import PLANS, Plan, add_bias
from .losses import FORWARDS, ContrastiveLoss
from .numerics import no_autocast

Gradients = tuple[Tensor | None, ...]


def value_and_grad(
    loss_fn: Callable[..., Tensor], argnums: int | Sequence[int] | None = None
) -> Callable[..., tuple[Tensor, Gradients]]:
    """The loss and its gradients for the inputs, both detached.

    A loss of this library, its module or a `functools.partial` with keywords takes the fused call,
    which builds no graph; any other callable goes through autograd. Works under `torch.no_grad`
    and leaves every `.grad` alone.

    Args:
        loss_fn: returns a 0-dim tensor.
        argnums: which positional inputs to differentiate; None: every floating-point tensor.

    Returns:
        A function of the same inputs that returns `(loss, grads)`, with one entry in `grads` per
        positional input: its gradient, in its shape and dtype, or None where none was asked for.

    Raises:
        ValueError: for argnums that name no input; from the call, for a loss that is not a scalar
            (`reduction="none"`) or argnums that name no floating-point tensor.
        RuntimeError: under `torch.inference_mode`, for a callable that needs autograd.

    Example:
        >>> z_i, z_j = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss, (dz_i, dz_j) = value_and_grad(nt_xent_loss)(z_i, z_j)
        >>> loss, (_, dz_j) = value_and_grad(NTXentLoss(0.1), argnums=1)(z_i, z_j)
    """
    check.function("loss_fn", loss_fn)
    chosen = _argnums(argnums)

    @functools.wraps(loss_fn, updated=())
    def run(*inputs: Any, **kwargs: Any) -> tuple[Tensor, Gradients]:
        need = _needed(chosen, inputs)
        detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        plan = _plan(loss_fn, detached, kwargs)
        if plan is None or plan.value_and_grad is None:
            return _by_autograd(loss_fn, need, inputs, kwargs)
        if plan.reduction == "none":
            raise _not_scalar('reduction="none"')
        with torch.no_grad():
            slots = [slot for slot, wanted in zip(plan.slots, need, strict=False) if wanted]
            flags = tuple(i in slots for i in range(plan.gradients))
            loss, grads = plan.value_and_grad(flags, *plan.args)
            return add_bias(loss, plan.bias), tuple(
                _like(None if slot is None else grads[slot], x) if wanted else None
                for x, slot, wanted in zip(inputs, plan.slots, need, strict=False)
            )

    return run


def _like(grad: Tensor | None, x: Tensor) -> Tensor:
    """In x's dtype, as a plan may have computed in a wider one; None is 0."""
    return torch.zeros_like(x) if grad is None else grad.to(x.dtype)


def _argnums(argnums: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if argnums is None:
        return None
    chosen: tuple[Any, ...] = (argnums,)
    if isinstance(argnums, Sequence):
        chosen = tuple(argnums)
    if not chosen:
        raise ValueError(f"argnums must name at least one input, got {argnums!r}")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise TypeError(f"argnums must be an int, a sequence of ints or None, got {argnums!r}")
    return chosen


def _needed(chosen: tuple[int, ...] | None, inputs: tuple[Any, ...]) -> list[bool]:
    """Per positional input: is its gradient asked for?"""
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
    if chosen is None:
        if not any(floating):
            raise ValueError(
                "inputs must hold a floating-point tensor among the positional ones (gradients are "
                f"of positional inputs), got {[type(x).__name__ for x in inputs]}"
            )
        return floating
    need = [False] * len(inputs)
    for i in chosen:
        if not -len(inputs) <= i < len(inputs) or not floating[i]:
            what = type(inputs[i]).__name__ if -len(inputs) <= i < len(inputs) else "nothing"
            raise ValueError(
                f"argnums must name floating-point tensors among the {len(inputs)} positional "
                f"inputs, got {i} ({what})"
            )
        need[i] = True
    return need


def _plan(loss_fn: Callable[..., Tensor], inputs: list[Any], kwargs: dict[str, Any]) -> Plan | None:
    """The fused call behind a loss of this library; None for any other callable."""
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        return _plan(loss_fn.func, inputs, {**loss_fn.keywords, **kwargs})
    if isinstance(loss_fn, ContrastiveLoss):
        if not _is_plain(loss_fn) or kwargs:
            return None
        return _plan(type(loss_fn).function, inputs, loss_fn.keywords())
    # By identity of a plain function: a wrapper around a loss is another loss.
    plan = PLANS.get(loss_fn) if isinstance(loss_fn, types.FunctionType) else None
    return None if plan is None else plan(*inputs, **kwargs)


def _is_plain(module: ContrastiveLoss) -> bool:
    """Calling it is calling our forward: no other forward, no other call, no hooks."""
    ours = type(module).forward in FORWARDS and "forward" not in vars(module)
    return ours and type(module).__call__ is nn.Module.__call__ and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        torch.nn.modules.module._has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _by_autograd(
    loss_fn: Callable[..., Tensor],
    need: list[bool],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Gradients]:
    check.not_inference_mode("value_and_grad of a callable outside this library")
    with torch.enable_grad():
        leaves = [
            leaf(x).requires_grad_(wanted) if isinstance(x, Tensor) else x
            for x, wanted in zip(inputs, need, strict=True)
        ]
        loss = loss_fn(*leaves, **kwargs)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            is_tensor = isinstance(loss, Tensor)
            raise _not_scalar(f"shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__)
        wanted = [x for x, n in zip(leaves, need, strict=True) if n]
        if loss.requires_grad and wanted:
            # Not autograd.grad: it raises under FlopCounterMode. The leaves are private.
            with no_autocast(loss):  # as PyTorch advises: its own products would be cast down
                torch.autograd.backward(loss, inputs=wanted)
    grads = (None if not n else x.grad for x, n in zip(leaves, need, strict=True))
    return loss.detach(), tuple(
        torch.zeros_like(x) if n and g is None else g
        for x, n, g in zip(leaves, need, grads, strict=True)
    )


def leaf(x: Tensor) -> Tensor:
    """x cut from its graph; a copy where x was made in inference mode."""
    return x.clone() if x.is_inference() else x.detach()


def _not_scalar(got: Any) -> ValueError:
    return ValueError(f"loss_fn must return a scalar (0-dim tensor), got {got}")
