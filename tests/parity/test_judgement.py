"""What `compare.agree` lets pass: planted errors."""

import compare
import pytest
import torch


class _Off(torch.autograd.Function):
    """x, with a gradient that is off by a share of its norm, in a direction of its own."""

    @staticmethod
    def forward(ctx, x, share):
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        other = g.roll(1, -1)
        return g + ctx.share * g.norm() / other.norm() * other, None


def pair(share, size):
    """A loss of two inputs, the gradient of the first of about this size, of the second 100."""

    def theirs(x, y):
        return (size * x.cos() + 100 * y.sin()).sum()

    return lambda x, y: theirs(_Off.apply(x, share), y), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2e-2, 1.0, 1e3])
def test_a_gradient_is_judged_by_its_own_norm(size, dtype):
    inputs = compare.draw(0, 4, 6) + 2, compare.draw(1, 4, 6)
    compare.agree(*pair(0.0, size), *inputs, dtype=dtype)
    for share in (1e-3, 1e-1):
        with pytest.raises(AssertionError, match="the gradient of input 0"):
            compare.agree(*pair(share, size), *inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_of_theirs_allows_no_larger_one_than_the_limit(dtype):
    """However far off theirs is."""
    ours, theirs = pair(1e-3, 1.0)
    bad = pair(1e-1, 1.0)[0]
    inputs = compare.draw(0, 4, 6) + 2, compare.draw(1, 4, 6)
    with pytest.raises(AssertionError, match="the gradient of input 0"):
        compare.agree(ours, bad, *inputs, dtype=dtype, theirs_truth=theirs)


def test_the_value_too():
    x = (compare.draw(0, 4, 6),)
    with pytest.raises(AssertionError, match="the value"):
        compare.agree(
            lambda x: 1.001 * x.square().mean(), lambda x: x.square().mean(), *x,
            dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("t", [1.0, 30.0])
def test_the_value_by_its_own_similarities(t):
    """A value near 0 is exempt by what t of this example rounds to, and by no larger t."""
    x = (torch.full((4, 6), 1e-3, dtype=torch.float64),)
    for off, passes in ((t * 1e-7, True), (t * 1e-6, False)):

        def ours(x, off=off):
            return x.square().mean() + off

        def theirs(x):
            return x.square().mean()

        if passes:
            compare.agree(ours, theirs, *x, dtype=torch.float32, t=t)
        else:
            with pytest.raises(AssertionError, match="the value"):
                compare.agree(ours, theirs, *x, dtype=torch.float32, t=t)


def test_a_gradient_near_0_by_its_own_similarities():
    """Rounding of t = 20 excuses 400 times as much as that of t = 1."""
    ours, theirs = pair(0.5, 1e-6)
    inputs = compare.draw(0, 4, 6) + 2, compare.draw(1, 4, 6)
    compare.agree(ours, theirs, *inputs, dtype=torch.float32, t=20)
    with pytest.raises(AssertionError, match="the gradient of input 0"):
        compare.agree(ours, theirs, *inputs, dtype=torch.float32)
