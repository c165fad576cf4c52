"""`clae_fast.compat.lightly` against lightly."""

import copy
import functools

import compare
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightly import loss as peer
from lightly.loss.dcl_loss import negative_mises_fisher_weights

from clae_fast.compat import lightly as ours

signed = compare.temperatures.flatmap(lambda t: st.sampled_from([t, t, -t]))


def views(seed, n, d):
    return compare.draw(seed, n, d), compare.draw(seed + 1, n, d)


@compare.examples
@given(compare.seeds, compare.batches, compare.widths, signed, compare.dtypes)
def test_nt_xent(seed, n, d, temperature, dtype):
    losses = (library.NTXentLoss(temperature=temperature) for library in (ours, peer))
    compare.agree(*losses, *views(seed, n, d), dtype=dtype, t=1 / abs(temperature))


@compare.examples
@given(
    compare.seeds,
    st.integers(1, 9),
    compare.widths,
    st.integers(1, 20),
    compare.temperatures,
    compare.dtypes,
)
def test_memory_bank(seed, n, d, size, temperature, dtype):
    """The loss, its gradients and the bank after each of several batches, wrap-around included."""
    banks = []
    for library in (ours, peer):
        torch.manual_seed(seed)
        banks.append(library.NTXentLoss(temperature, (size, d)).to(dtype))
    mine, theirs = banks
    truth = copy.deepcopy(theirs).double()
    assert mine.state_dict() == theirs.state_dict() == {}
    for step in range(4):
        _same_bank(mine, theirs)
        truth.memory_bank.bank.copy_(theirs.memory_bank.bank)
        again = functools.partial(_on_a_copy, theirs)
        compare.agree(
            functools.partial(_on_a_copy, mine),
            again,
            *views(seed + 2 * step, n, d),
            dtype=dtype,
            t=1 / temperature,
            theirs_truth=functools.partial(_on_a_copy, truth),
        )
        z = [x.to(dtype) for x in views(seed + 2 * step, n, d)]
        for loss in (mine, theirs):
            loss(*z)  # constants leave the bank alone
        _same_bank(mine, theirs)
        for loss in (mine, theirs):
            loss(z[0].clone().requires_grad_(), z[1])
    _same_bank(mine, theirs)


def _on_a_copy(loss, *inputs):
    return copy.deepcopy(loss)(*inputs)


def _same_bank(mine, theirs):
    names = [dict(loss.named_buffers()).keys() for loss in (mine, theirs)]
    assert names[0] == names[1]
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(mine.named_buffers())[name], buffer, rtol=1e-6, atol=1e-6)


def squares(out0, out1):
    """A differentiable weight function: its gradient counts."""
    return ((out0 - out1) ** 2).sum(1)


@compare.examples
@given(
    compare.seeds,
    compare.batches,
    compare.widths,
    signed,
    st.sampled_from([None, squares]),
    compare.dtypes,
)
def test_dcl(seed, n, d, temperature, weight_fn, dtype):
    losses = (library.DCLLoss(temperature, weight_fn) for library in (ours, peer))
    compare.agree(*losses, *views(seed, n, d), dtype=dtype, t=1 / abs(temperature))


@compare.examples
@given(
    compare.seeds,
    compare.batches,
    compare.widths,
    compare.temperatures,
    st.floats(0.1, 2.0),
    compare.dtypes,
)
@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_dclw(seed, n, d, temperature, sigma, dtype):
    losses = (library.DCLWLoss(temperature, sigma) for library in (ours, peer))
    compare.agree(*losses, *views(seed, n, d), dtype=dtype, t=1 / abs(temperature))


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_weights():
    z = views(0, 5, 3)
    theirs = negative_mises_fisher_weights(*z, sigma=0.3)
    torch.testing.assert_close(ours.negative_mises_fisher_weights(*z, sigma=0.3), theirs)


def test_a_pair_alone():
    """Nothing to contrast. Theirs gives 0 for NT-Xent and -inf for DCL, ours 0."""
    losses = (library.NTXentLoss() for library in (ours, peer))
    compare.agree(*losses, *views(0, 1, 3), dtype=torch.float64)
    z = [x.requires_grad_() for x in views(0, 1, 3)]
    assert peer.DCLLoss()(*z) == -torch.inf
    loss = ours.DCLLoss()(*z)
    loss.backward()
    assert loss == 0
    assert all((x.grad == 0).all() for x in z)


@pytest.mark.parametrize("size", [-1, 7, (3, -1), (1, 2, 3)])
def test_a_bad_size_is_refused_by_both(size):
    for library in (ours, peer):
        with pytest.raises(ValueError, match="size"):
            library.NTXentLoss(memory_bank_size=size)


def test_a_temperature_of_0_is_refused_by_both():
    for library in (ours, peer):
        with pytest.raises(ValueError, match="1e-8"):
            library.NTXentLoss(temperature=0.0)
