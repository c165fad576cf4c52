"""Host side of the C++ kernels: what they can run, layouts, allocation."""

import itertools
import math

import torch
from torch import Tensor

from .numerics import compute_dtype

_SIGN_STEP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def memory_format(x: Tensor) -> torch.memory_format | None:
    """The dense order of x that the kernel walks, None if there is none."""
    if x.is_contiguous():
        return torch.contiguous_format
    for dim, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=fmt):
            return fmt
    return None


def _per_channel(tensor: Tensor, x: Tensor) -> bool:
    """Broadcasts to x along dimension 1 alone."""
    shape = (1,) * (x.dim() - tensor.dim()) + tuple(tensor.shape)
    return tensor.numel() == 1 or (x.dim() >= 2 and tensor.numel() == shape[1] == x.shape[1])


def layout_refusal(x: Tensor, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why a kernel that walks dense memory, channel by channel at most, cannot run these."""
    if memory_format(x) is None:
        return "x is neither contiguous nor channels_last"
    if not all(t is None or _per_channel(t, x) for t in tensors):
        return "step, eps and bounds may vary per channel only"
    return None


def sign_step_refusal(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step: float,
    eps: float,
    low: float | None = None,
    high: float | None = None,
    *tensors: Tensor | None,
) -> str | None:
    """Why `sign_step` cannot run these, None if it can."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device}"
    if x.dtype not in _SIGN_STEP_DTYPES:
        return f"it knows float32, bfloat16 and float64, x is {x.dtype}"
    return layout_refusal(x, tensors)


def sign_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step: float,
    eps: float,
    low: float | None = None,
    high: float | None = None,
    *tensors: Tensor | None,
) -> Tensor:
    """`reference.sign_step`, one pass over memory."""
    order = memory_format(x)
    assert order is not None
    grad, x0 = (t.to(x.dtype).contiguous(memory_format=order) for t in (grad, x0))
    out = torch.empty_like(x)
    numbers = [step, eps, -math.inf if low is None else low, math.inf if high is None else high]
    numbers = [
        float(t) if t is not None and t.numel() == 1 else n
        for n, t in itertools.zip_longest(numbers, tensors)
    ]
    channels = None
    if any(t is not None and t.numel() > 1 for t in tensors):
        channels = x.new_empty((4, x.shape[1]), dtype=compute_dtype(x.dtype))
        for row, n, t in itertools.zip_longest(channels, numbers, tensors):
            row.copy_(t.reshape(-1)) if t is not None and t.numel() > 1 else row.fill_(n)
    torch.ops.clae_fast_C.sign_step(
        x, grad, x0, out, *numbers, channels, order != torch.contiguous_format
    )
    return out
