"""Ours against a peer: the value and every gradient, judged by the peer in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 24)  # of width 1 every cosine is 1 or -1, and every gradient rounding
batches = st.integers(2, 17)
temperatures = st.floats(0.05, 2.0)

examples = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


def draw(seed: int, *shape: int) -> Tensor:
    """Rows of any length, in float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) * (0.5 + seed % 5)


def real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def outcome(
    loss: Callable[..., Tensor], inputs: Sequence[Any], dtype: torch.dtype
) -> list[Tensor | None]:
    """The value, and the gradients of `3 value` (of a weighted sum if it is no scalar)."""
    leaves = [
        x.detach().clone().to(dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]
    value = loss(*leaves)
    weights = torch.linspace(1, 3, max(value.numel(), 2), dtype=torch.float64)[-value.numel() :]
    (value * weights.reshape(value.shape)).sum().backward()
    grads = [x.grad for x in leaves if real(x)]
    return [value.detach(), *grads]


def norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(x.double().norm())


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """Theirs has no gradient where ours is 0, and the other way round."""
    if a is None or b is None:
        return norm(a) + norm(b)
    assert a.shape == b.shape, f"{tuple(a.shape)} != {tuple(b.shape)}"
    return norm(a.double() - b.double())


def agree(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *inputs: Any,
    dtype: torch.dtype,
    theirs_truth: Callable[..., Tensor] | None = None,
) -> None:
    """Ours is within the tolerance of theirs in float64, or nearer to it than theirs is in `dtype`.

    Gradients are measured against the largest of them, or 1: at the optimum, and where a row meets
    its positive alone, each is the rounding of terms of about that size.
    """
    truth = outcome(theirs_truth or theirs, inputs, torch.float64)
    mine, peers = (outcome(f, inputs, dtype) for f in (ours, theirs))
    assert mine[0].dtype == dtype
    largest = max(norm(g) for g in truth[1:])
    for i, (a, b, c) in enumerate(zip(mine, truth, peers, strict=True)):
        assert a is None or a.isfinite().all()
        scale = max(norm(b), *((largest, 1.0) if i else (0.1,)))
        allowed = max(TOLERANCE[dtype] * scale, 2 * distance(c, b))
        what = "the value" if i == 0 else f"the gradient of input {i - 1}"
        assert distance(a, b) <= allowed, f"{what}: {distance(a, b):.3g} > {allowed:.3g}"
