"""The linf update of FGSM and PGD."""

from typing import Any

import torch
from torch import Tensor

from ..numerics import compute_dtype


def sign_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step: float,
    eps: float,
    low: float | None = None,
    high: float | None = None,
    step_tensor: Tensor | None = None,
    eps_tensor: Tensor | None = None,
    low_tensor: Tensor | None = None,
    high_tensor: Tensor | None = None,
) -> Tensor:
    """`min(max(v, x0 - eps, low), x0 + eps, high)` with `v = x + step * sign(grad)`, in that order.

    A tensor replaces its number and broadcasts to x. `sign(0) = 0`; NaN in any input is NaN out.
    Half precision is computed in float32 and rounded once.
    """
    dtype = compute_dtype(x.dtype)

    def value(number: float | None, tensor: Tensor | None) -> Any:
        return number if tensor is None else tensor.to(dtype)

    step_, eps_ = value(step, step_tensor), value(eps, eps_tensor)
    low_, high_ = value(low, low_tensor), value(high, high_tensor)
    v, g, start = x.to(dtype), grad.to(dtype), x0.to(dtype)
    v = v + torch.where(g.isnan(), g, g.sign()) * step_  # torch.sign(nan) is 0
    v = torch.minimum(torch.maximum(v, start - eps_), start + eps_)
    if low_ is not None:
        v = v.clamp_min(low_)
    if high_ is not None:
        v = v.clamp_max(high_)
    return v.to(x.dtype)
