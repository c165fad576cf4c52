"""Statistics of a batch of pairs against their dense formulas."""

import pytest
import torch
import torch.nn.functional as F
from dense import backends_with, error

from clae_fast import PairStats, pair_stats

BACKENDS = backends_with("pair_lse")


def dense(x, y, normalize=True):
    """In float64, matrices and all; uniformity as in the paper's own code, by pdist."""
    x, y = x.double(), y.double()
    if normalize:
        x, y = F.normalize(x), F.normalize(y)
    s = x @ y.T
    n, itself = len(x), torch.eye(len(x), dtype=torch.bool)
    top = [(a.argmax(1) == torch.arange(n)).double().mean() for a in (s, s.T)]
    uniformity = [torch.pdist(z).square().mul(-2).exp().mean().log() for z in (x, y)]
    return PairStats(
        (top[0] + top[1]) / 2, *top, s.diagonal().mean(), s[~itself].mean(),
        (x - y).square().sum(1).mean(), (uniformity[0] + uniformity[1]) / 2,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_float64(dtype, normalize, backend):
    for n, d in ((2, 3), (7, 40), (127, 5)):
        x = torch.randn(n, d)
        y = (x + 0.7 * torch.randn(n, d)).to(dtype)
        x = (0.5 * x).to(dtype)
        with torch.enable_grad():
            got = pair_stats(x.requires_grad_(), y, normalize=normalize, backend=backend)
        ref = dense(x.detach(), y, normalize)
        for name, a, b in zip(PairStats._fields, got, ref, strict=True):
            assert a.shape == ()
            assert not a.requires_grad
            assert error(a, b, 0.1) < (1e-12 if dtype == torch.float64 else 3e-6), (name, n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1.0, 1e2, 1e3, 1e4])
def test_offsets_do_not_move_distances(offset, backend):
    """What all rows have in common, or each of two clusters, is large beside their distances."""
    x, y = (torch.randn(40, 6) + offset for _ in range(2))
    far = torch.cat((x[:20], x[20:] - 2 * offset))
    for a, b in ((x, y), (far, far.flip(0))):
        got = pair_stats(a, b, normalize=False, backend=backend)
        ref = dense(a, b, normalize=False)
        assert got.uniformity <= 0
        assert error(got.uniformity, ref.uniformity) < 1e-6
        assert error(got.alignment, ref.alignment) < 1e-6


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize("normalize", [True, False])
def test_collapse_does_not_hide_the_nearest(noise, normalize):
    """Similarities all but 1, closer to each other than float32 has numbers there."""
    center = F.normalize(torch.randn(1, 32))
    x = center + noise * torch.randn(256, 32) / 32**0.5
    y = x + 0.3 * noise * torch.randn(256, 32) / 32**0.5
    got, exact = pair_stats(x, y, normalize=normalize), dense(x, y, normalize)
    assert (exact.top1 == 1) == normalize  # lengths decide elsewhere
    for a, b in zip(got[:3], exact[:3], strict=True):
        assert abs(a - b) <= 1 / 256 * (not normalize)


def test_a_row_of_zeros_is_not_on_the_sphere():
    """0 to everything: above what is on the other side, below what is on this one."""
    x = torch.randn(20, 3)
    y = x + 0.5 * torch.randn(20, 3)
    y[4] = x[7] = 0
    for a, b in zip(pair_stats(x, y)[:3], dense(x, y)[:3], strict=True):
        assert abs(a - b) < 1e-6 + 1 / 20  # row 7 is a tie


def test_directions_differ():
    """Every row of z_i finds its own; two of z_j look for the first of z_i."""
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    y = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    stats, exact = pair_stats(x, y), dense(x, y)
    assert stats.top1_i != stats.top1_j
    for got, ref in zip(stats[:3], exact[:3], strict=True):
        assert error(got, ref) < 1e-6


def test_ties_are_misses():
    """A collapsed encoder finds nothing, whatever the order."""
    z = torch.ones(6, 4)
    stats = pair_stats(z, z)
    assert stats.top1 == 0
    assert stats.alignment == 0
    assert abs(stats.uniformity) < 1e-6
    assert stats.negative_similarity == 1


def test_one_pair():
    z = torch.randn(1, 4)
    stats = pair_stats(z, z)
    assert stats.top1 == 1
    assert stats.negative_similarity.isnan()
    assert stats.uniformity.isnan()


def test_no_large_tensor():
    z = torch.randn(8192, 4)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,))
                if isinstance(t, torch.Tensor)
            )  # fmt: skip
            return out

    with Watch():
        pair_stats(z, z)
    assert max(sizes) <= 1 << 23


def test_nan_stays_visible():
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    x[2, 1] = torch.nan
    stats = pair_stats(x, y)
    assert all(v.isnan() for v in stats[3:])


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"z_j must be \(3, 2\)"):
        pair_stats(torch.randn(3, 2), torch.randn(2, 2))
    with pytest.raises(TypeError, match="normalize must be True or False"):
        pair_stats(torch.randn(3, 2), torch.randn(3, 2), normalize=1)
