"""Adversarial examples against any loss: FGSM and PGD, at the price of the input gradient alone."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import validation as check
from .backends import requested, serving
from .grad import leaf
from .numerics import compute_dtype, no_autocast
from .ops import call

Size = float | Tensor
Bounds = tuple[Size, Size] | None
NORMS = ("linf", "l2")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch `requires_grad` off for all parameters inside the `with`; the exact flags come back.

    A backward for the input alone then computes no weight gradient, compiled or not, and keeps no
    activation that only a weight gradient needs.

    Args:
        model: any module.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> with frozen(net):
        ...     x_adv = fgsm(lambda x: net(x).square().mean(), torch.randn(8, 4), 0.1)
    """
    _module("model", model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def fgsm(
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: Size,
    *,
    bounds: Bounds = None,
    model: nn.Module | None = None,
) -> Tensor:
    """One step of the fast gradient sign method: `x_adv = clip(x + eps sign(d loss_fn(x) / dx))`.

    Works under `torch.no_grad`; leaves `.grad`, modes and flags alone, also on error. Buffers
    change as the closure's own forward changes them, unless `model` is given.

    Args:
        loss_fn: x -> scalar, to be increased. Only signs are used: in half precision multiply a
            small loss by a power of two, or tiny gradients round to sign 0.
        x: float tensor of any shape.
        eps: in units of x, a number of at least 0 or a tensor that broadcasts to x (normalised
            images: eps / std per channel).
        bounds: None or (low, high), numbers or tensors that broadcast to x; the result lies inside,
            both read in the dtype of x.
        model: frozen during the attack (see `frozen`), and its buffers are restored.

    Returns:
        x_adv, detached, of the shape, dtype and layout of x.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
        RuntimeError: under `torch.inference_mode`.

    Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015,
    section 4.

    Example:
        >>> net, x = nn.Linear(4, 2), torch.rand(8, 4)
        >>> x_adv = fgsm(lambda x: net(x).square().mean(), x, 8 / 255, bounds=(0, 1), model=net)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    check_attack("fgsm", x, eps, bounds)
    with _undisturbed(model):
        grad = input_gradient(loss_fn, x)
    return sign_step(x, grad, x, eps, eps, bounds)


def pgd(
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: Size,
    *,
    step_size: Size,
    num_steps: int,
    norm: str = "linf",
    random_start: bool = False,
    bounds: Bounds = None,
    generator: torch.Generator | None = None,
    model: nn.Module | None = None,
) -> Tensor:
    """Projected gradient ascent on `loss_fn` within a ball around x.

        linf:  x <- project(x + step_size sign(g)),  |x - x0| <= eps elementwise
        l2:    x <- project(x + step_size u),        |(x - x0) / eps|_2 <= 1 per sample,
               u = step_size g / |step_size g|_2  in units of step_size: with numbers
               x + step_size g / |g|_2 and |x - x0|_2 <= eps; with per-channel sizes eps / std the
               same in the pixels' own units

    and into the bounds after each step. Everything that is not here is as in `fgsm`.

    Args:
        loss_fn, x, eps, bounds, model: as in `fgsm`.
        step_size: in units of x, a number of at least 0 or a tensor that broadcasts to x.
        num_steps: at least 1.
        norm: "linf" or "l2"; the first dimension of x is the samples.
        random_start: start uniformly inside the ball instead of at x.
        generator: for the random start; on the device of x.

    Returns:
        x_adv, detached.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
        RuntimeError: under `torch.inference_mode`.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
    2018, section 2.

    Example:
        >>> net, x = nn.Linear(4, 2), torch.rand(8, 4)
        >>> options = {"step_size": 0.1, "num_steps": 5, "norm": "l2"}
        >>> x_adv = pgd(lambda x: net(x).square().mean(), x, 0.5, **options)
        >>> bool(((x_adv - x).norm(dim=1) <= 0.5 + 1e-5).all())
        True
    """
    check_attack("pgd", x, eps, bounds)
    _size("step_size", step_size, x)
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
    check.word("norm", norm, NORMS)
    if norm == "l2" and x.dim() < 1:
        raise ValueError("x must have a dimension of samples for norm='l2', got shape ()")
    check.flag("random_start", random_start)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"generator must be on {x.device} as x is, got {generator.device}")
    x0 = leaf(x)
    with _undisturbed(model):
        x_adv = _random_start(x0, eps, norm, bounds, generator) if random_start else x0
        for _ in range(num_steps):
            grad = input_gradient(loss_fn, x_adv)
            if norm == "linf":
                x_adv = sign_step(x_adv, grad, x0, step_size, eps, bounds)
            else:
                x_adv = _l2_step(x_adv, grad, x0, step_size, eps, bounds)
    return x_adv


def input_gradient(loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`d loss_fn(x) / dx` and nothing else: no `.grad` but that of a private leaf is touched."""
    check.function("loss_fn", loss_fn)
    with torch.enable_grad():
        start = leaf(x).requires_grad_()
        loss = loss_fn(start)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError("loss_fn must depend on x, got a result that does not require grad")
        with no_autocast(loss):
            torch.autograd.backward(loss, inputs=[start])
    if start.grad is None:
        raise ValueError("loss_fn must depend on x, got a result that does not")
    return start.grad


@torch.no_grad()
def sign_step(x: Tensor, grad: Tensor, x0: Tensor, step: Size, eps: Size, bounds: Bounds) -> Tensor:
    """`sign_step` of the operators, with numbers or tensors."""
    sizes = [_split(value) for value in (step, eps, *(bounds or (None, None)))]
    (step_, _), (eps_, _), (low, _), (high, _) = sizes
    return call(
        "sign_step", x, grad, x0, step_ or 0.0, eps_ or 0.0, low, high,
        *(tensor for _, tensor in sizes), backend=serving("sign_step", requested(None)),
    )  # fmt: skip


def _split(value: Size | None) -> tuple[float | None, Tensor | None]:
    if isinstance(value, Tensor):
        return None, value
    return (None if value is None else float(value)), None


def _per_sample_norm(x: Tensor) -> Tensor:
    """L2 norm over all but the first dimension, kept for broadcasting."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *(1,) * (x.dim() - 1))


@torch.no_grad()
def _l2_step(x: Tensor, grad: Tensor, x0: Tensor, step: Size, eps: Size, bounds: Bounds) -> Tensor:
    dtype = compute_dtype(x.dtype)
    grad = grad.to(dtype)
    largest = grad.abs().flatten(1).amax(1) if grad.numel() else grad.new_zeros(len(grad))
    largest = largest.reshape(-1, *(1,) * (x.dim() - 1))
    # Scaled first: the squares of a tiny or huge gradient leave the range.
    direction = grad / torch.where(largest == 0, 1.0, largest) * step
    norm = _per_sample_norm(direction)
    # No gradient, no step.
    move = direction / torch.where(norm == 0, 1.0, norm) * step
    return _into_ball(x.to(dtype) + move, x0.to(dtype), eps, bounds).to(x.dtype)


def _into_ball(x: Tensor, x0: Tensor, eps: Size, bounds: Bounds) -> Tensor:
    delta = x - x0
    eps = torch.as_tensor(eps, dtype=delta.dtype, device=delta.device)
    ratio = torch.where(eps > 0, delta / torch.where(eps > 0, eps, 1.0), 0.0)
    delta = torch.where(eps > 0, delta, 0.0 * delta) / _per_sample_norm(ratio).clamp_min(1.0)
    return _clip(x0 + delta, bounds)


def _clip(x: Tensor, bounds: Bounds) -> Tensor:
    if bounds is None:
        return x
    low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in bounds)
    return torch.minimum(torch.maximum(x, low), high)


@torch.no_grad()
def _random_start(
    x: Tensor, eps: Size, norm: str, bounds: Bounds, generator: torch.Generator | None
) -> Tensor:
    """Uniform in the ball around x."""
    dtype = compute_dtype(x.dtype)
    options: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": x.device}
    if norm == "linf":
        noise = torch.rand(x.shape, **options) * 2 - 1
    else:
        noise = torch.randn(x.shape, **options)
        dims = max(1, math.prod(x.shape[1:]))
        radius = torch.rand(x.shape[:1], **options).pow(1 / dims)
        noise = noise / _per_sample_norm(noise) * radius.reshape(-1, *(1,) * (x.dim() - 1))
    return _clip(x.to(dtype) + noise * eps, bounds).to(x.dtype)


@contextlib.contextmanager
def _undisturbed(model: nn.Module | None) -> Iterator[None]:
    """The model frozen inside, its buffers put back afterwards."""
    if model is None:
        yield
        return
    _module("model", model)
    saved = [
        (m, dict(m._buffers), {n: b.clone() for n, b in m._buffers.items() if b is not None})
        for m in model.modules()
    ]
    try:
        with frozen(model):
            yield
    finally:
        with torch.no_grad():
            for module, buffers, values in saved:
                for name, value in values.items():
                    buffer = buffers[name]
                    assert buffer is not None
                    # an inference tensor cannot be written to: its copy takes its place
                    buffers[name] = value if buffer.is_inference() else buffer.copy_(value)
                module._buffers.clear()
                module._buffers.update(buffers)


def _module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")


def check_attack(what: str, x: Any, eps: Any, bounds: Any, name: str = "x") -> None:
    """The arguments that every attack has."""
    check.not_inference_mode(what)
    check.float_tensor(name, x)
    _size("eps", eps, x)
    if bounds is None:
        return
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"bounds must be None or (low, high), got {bounds!r}")
    for end, bound in zip(("low", "high"), bounds, strict=True):
        if isinstance(bound, Tensor):
            _broadcasts(f"bounds {end}", bound, x)
        elif not check.is_number(bound) or math.isnan(bound):
            raise ValueError(f"bounds {end} must be a number or a tensor, got {bound!r}")
    if not any(isinstance(b, Tensor) for b in bounds) and bounds[0] > bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds!r}")


def _size(name: str, value: Any, x: Tensor) -> None:
    """A step or radius: a finite number of at least 0, or a tensor, whose values are not read."""
    if isinstance(value, Tensor):
        _broadcasts(name, value, x)
    else:
        check.number(name, value, at_least=0)


def _broadcasts(name: str, value: Tensor, x: Tensor) -> None:
    check.float_tensor(name, value)
    if value.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as x is, got {value.device}")
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to x {tuple(x.shape)}, got {tuple(value.shape)} "
            "(per channel: (C, 1, 1))"
        )
