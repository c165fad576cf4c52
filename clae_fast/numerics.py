"""Small numerics that the reference and the glue around the operators share."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def promoted(*tensors: Tensor) -> list[Tensor]:
    """All in the widest dtype among them; as they are where it is one. Gradients come back in
    each one's own."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    return [x.to(dtype) for x in tensors]


def full_precision(
    fn: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Run `fn` with autocast off: it would cast float32 embeddings down in the matmuls."""

    @functools.wraps(fn)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        # The meta device computes nothing, and autocast does not know it.
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return fn(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args, **kwargs)

    return run


def no_autocast(x: Tensor | None) -> contextlib.AbstractContextManager[object]:
    """Autocast off on the device of x, for a backward that is run inside autocast."""
    if x is None or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def effective_scale(
    scale: float, scale_tensor: Tensor | None, reciprocal: bool, dtype: torch.dtype
) -> Tensor | float:
    """`t`, a number or a 0-dim tensor of `dtype`."""
    if scale_tensor is None:
        return scale
    value = scale_tensor.to(dtype).reshape(())
    return scale / value if reciprocal else scale * value


class Unit(NamedTuple):
    """Rows on the sphere, and what the Jacobian of the normalisation needs."""

    z: Tensor  # (N, D)
    inverse_norm: Tensor  # (N, 1): 0 for a zero row
    on_sphere: Tensor  # (N, 1) bool: False where the norm is below 1e-12, or overflows


def unit_rows(x: Tensor) -> Unit:
    """`x / max(|x|, 1e-12)` per row, as F.normalize, with gradient 0 at a zero row. (..., D)."""
    # The literal is meant: torch 2.10 takes a global float for a symbol when it compiles.
    squares = (x * x).sum(-1, keepdim=True)
    zero = squares == 0
    norm = torch.where(zero, 1.0, squares).sqrt()  # sqrt has no slope at 0
    inverse = torch.where(zero, 0.0, 1 / norm.clamp_min(1e-12))
    return Unit(x * inverse, inverse, (norm > 1e-12) & ~zero & norm.isfinite())


def as_given(x: Tensor) -> Unit:
    """Rows that are used as they are: the Jacobian is the identity."""
    one = x.new_ones((x.shape[0], 1))
    return Unit(x, one, torch.zeros_like(one, dtype=torch.bool))


def to_raw(dz: Tensor, unit: Unit) -> Tensor:
    """Jacobian of the normalisation: `dx = (dz - z <z, dz>) / |x|`."""
    radial = (unit.z * dz).sum(-1, keepdim=True)
    return (dz - torch.where(unit.on_sphere, radial, 0.0) * unit.z) * unit.inverse_norm


def wide(x: Tensor) -> Tensor:
    """In float64: differences of sums keep their digits, and on a CPU the order is fixed."""
    return x if x.device.type == "mps" else x.double()


def cosine(a: Unit, b: Unit, dtype: torch.dtype | None = None) -> Tensor:
    """`<a_i, b_i>` (N,), on the sphere as `1 - |a - b|^2 / 2`, in this dtype before 1 is near.

    The slope of that is `b - a`, which keeps its digits for an aligned pair, where the slope `b` of
    the dot product lies almost wholly along a and is lost in the projection.
    """
    dtype = a.z.dtype if dtype is None else dtype
    distance = (a.z - b.z).square().sum(-1).to(dtype)
    on_sphere = (a.on_sphere & b.on_sphere).squeeze(-1)
    return torch.where(on_sphere, 1 - 0.5 * distance, (a.z * b.z).sum(-1).to(dtype))


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)`; F.softplus turns linear at 20, which float64 notices.

    0 at -inf with derivatives of 0, where the second one of logaddexp is NaN.
    """
    nothing = x == -math.inf
    return torch.where(nothing, 0.0, torch.logaddexp(x.masked_fill(nothing, 0.0), x.new_zeros(())))


def log_sum_exp(s: Tensor, in_float64: bool = False) -> Tensor:
    """Over the last dimension; -inf for a row that is empty or all -inf, with gradient 0 there."""
    dtype = torch.float64 if in_float64 else s.dtype
    if s.shape[-1] == 0:
        return s.sum(-1).to(dtype) - math.inf
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    total = (s - top).exp().sum(-1).to(dtype)
    empty = total == 0
    lse = top.squeeze(-1).to(dtype) + torch.where(empty, 1.0, total).log()
    return torch.where(empty, -math.inf, lse)


def alarm(*tensors: Tensor) -> Tensor:
    """0, or NaN when any element is NaN or Inf: an e^-inf must not hide one."""
    return sum(((x.detach() * 0).sum() for x in tensors), start=tensors[0].new_zeros(()))
