"""Ours against a peer: the value and every gradient, judged by the peer in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
LIMIT = {torch.float64: 1e-8, torch.float32: 5e-4}  # for a result where theirs cancels
VALUE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}  # the value has no Jacobian
VALUE_EPS = 4  # of a similarity of t, where the value cancels
LARGEST_SCALE = 100  # t, 1 / temperature: where CLIP trains
WEIGHT = 3  # the largest that a value has upstream
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 24)  # of width 1 every cosine is 1 or -1, and every gradient rounding
batches = st.integers(2, 17)
scales = st.floats(1.0, LARGEST_SCALE)
temperatures = st.floats(-math.log(LARGEST_SCALE), math.log(2.0)).map(math.exp)

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
    """The value, and the gradients of `WEIGHT value` (of a weighted sum if it is no scalar)."""
    leaves = [
        x.detach().clone().to(dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]
    value = loss(*leaves)
    weights = torch.linspace(1, WEIGHT, max(value.numel(), 2), dtype=torch.float64)
    (value * weights[-value.numel() :].reshape(value.shape)).sum().backward()
    grads = [x.grad for x in leaves if real(x)]
    return [value.detach(), *grads]


def norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(x.double().norm())


def shortest(x: Tensor) -> float:
    """The length of the shortest row that is not 0; 1 of what has no rows."""
    lengths = x.detach().double().norm(dim=-1) if x.dim() > 1 else x.new_ones(1)
    lengths = lengths[lengths > 0]
    return float(lengths.min()) if len(lengths) else 1.0


def longest(*rows: Tensor) -> float:
    """The length of the longest row."""
    return max([1.0, *(float(x.norm(dim=-1).max()) for x in rows if x.numel())])


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
    t: float = 1.0,
    theirs_truth: Callable[..., Tensor] | None = None,
) -> None:
    """Each result by its own size: within the tolerance of theirs in float64, or of five times the
    distance of theirs in `dtype`, but never further off than LIMIT of its own norm.

    Only what rounding decides is exempt, by the largest similarity `t` of this example (1 over the
    temperature for rows on the sphere): the value is off by a few t eps; the terms of a gradient
    are WEIGHT t / |x| at most, each with a softmax weight that is off by t eps / 2. Where they
    cancel (at the optimum, or where a row meets its positive alone) nothing else is left. And what
    theirs is in `dtype` is right too: a step (which losses are 0, so that a mean does not count
    them) may fall elsewhere in float64.
    """
    t, eps = max(t, 1.0), torch.finfo(dtype).eps
    truth = outcome(theirs_truth or theirs, inputs, torch.float64)
    mine, peers = (outcome(f, inputs, dtype) for f in (ours, theirs))
    assert mine[0].dtype == dtype
    lengths = [1.0, *(shortest(x) for x in inputs if real(x))]
    for i, (a, b, c, length) in enumerate(zip(mine, truth, peers, lengths, strict=True)):
        assert a is None or a.isfinite().all()
        value = i == 0
        tolerance = (VALUE_TOLERANCE if value else TOLERANCE)[dtype]
        peer = min(5 * distance(c, b), LIMIT[dtype] * norm(b))
        floor = VALUE_EPS * eps * t if value else eps / 2 * WEIGHT * t**2 / length
        allowed = max(tolerance * norm(b), peer, floor)
        what = "the value" if value else f"the gradient of input {i - 1}"
        off = distance(a, b)
        same = distance(a, c) <= tolerance * norm(c)
        assert off <= allowed or same, f"{what}: {off:.3g} > {allowed:.3g}"
