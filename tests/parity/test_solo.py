"""`clae_fast.compat.solo` against its formulas written out: solo-learn on PyPI is of 2021."""

import compare
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clae_fast.compat import solo


def simclr(z, indexes, temperature):
    """-log of the positives' share of all other rows, positives summed."""
    z = F.normalize(z, dim=-1)
    s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    same = indexes[:, None] == indexes
    positives = s.masked_fill(~same, -torch.inf)
    return (s.logsumexp(1) - positives.logsumexp(1)).mean()


@compare.examples
@given(
    compare.seeds,
    st.lists(st.integers(0, 5), min_size=2, max_size=16),
    st.integers(2, 24),
    compare.temperatures,
    compare.dtypes,
)
def test_simclr(seed, some, d, temperature, dtype):
    """Several positives a row, in any order, as in the supervised loss."""
    indexes = torch.tensor(some + some[::-1]) * 1000 - 7
    z = compare.draw(seed, len(indexes), d)
    compare.agree(
        solo.simclr_loss_func, simclr, z, indexes, temperature, dtype=dtype,
        t=1 / temperature,
    )  # fmt: skip


def test_simclr_where_theirs_overflows():
    z = torch.randn(8, 4)
    z[4:] = z[:4] + 0.01
    indexes = torch.arange(4).repeat(2)
    assert solo.simclr_loss_func(z, indexes, 0.005).isfinite()
    assert F.normalize(z, dim=1).square().sum(1).div(0.005).exp().isinf().all()


def test_simclr_without_positives_is_infinite_and_alone_0():
    assert solo.simclr_loss_func(torch.randn(3, 4), torch.tensor([1, 1, 2])) == torch.inf
    assert solo.simclr_loss_func(torch.randn(1, 4), torch.tensor([1])) == 0


def moco(query, key, queue, temperature):
    s = torch.cat(((query * key).sum(1, keepdim=True), query @ queue), 1) / temperature
    return F.cross_entropy(s, torch.zeros(len(query), dtype=torch.long))


@compare.examples
@given(
    compare.seeds, compare.batches, compare.widths, st.integers(0, 30), compare.temperatures,
    compare.dtypes,
)  # fmt: skip
def test_moco(seed, n, d, k, temperature, dtype):
    q, key, queue = (F.normalize(compare.draw(seed + i, m, d)) for i, m in enumerate((n, n, k)))
    compare.agree(
        solo.mocov2plus_loss_func,
        moco,
        q,
        key,
        queue.T.contiguous(),
        temperature,
        dtype=dtype,
        t=1 / temperature,
    )


def test_refused():
    with pytest.raises(ValueError, match=r"indexes must be \(4,\)"):
        solo.simclr_loss_func(torch.randn(4, 2), torch.arange(3))
    with pytest.raises(ValueError, match="temperature"):
        solo.simclr_loss_func(torch.randn(4, 2), torch.arange(4), 0.0)
    with pytest.raises(ValueError, match=r"queue must be \(D, K\)"):
        solo.mocov2plus_loss_func(torch.randn(4, 2), torch.randn(4, 2), torch.randn(2))
