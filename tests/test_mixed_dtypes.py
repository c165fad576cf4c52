"""A queue or extra negatives of another float dtype than the embeddings."""

import pytest
import torch
from dense import error

import clae_fast as cf
from clae_fast import autograd

KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LABELS = torch.tensor([0, 0, 1, 1, 2])
LOSSES = {
    "queue": lambda q, k, n, **o: cf.info_nce_loss(q, k, n, **o),
    "queue, weighted": lambda q, k, n, **o: cf.info_nce_loss(
        q, k, n, sample_weight=torch.ones(5), **o
    ),
    "paired": lambda q, k, n, **o: cf.info_nce_loss(
        q, k, n.expand(5, 7, 6), negative_mode="paired", **o
    ),
    "info_nce": lambda q, k, n, **o: cf.info_nce_loss(q, k, extra_negatives=n, **o),
    "symmetric": lambda q, k, n, **o: cf.info_nce_loss(
        q, k, symmetric=True, extra_negatives=n, **o
    ),
    "nt_xent": lambda q, k, n, **o: cf.nt_xent_loss(q, k, extra_negatives=n, **o),
    "dcl": lambda q, k, n, **o: cf.dcl_loss(q, k, extra_negatives=n, **o),
    "hard": lambda q, k, n, **o: cf.hard_negative_loss(q, k, extra_negatives=n, **o),
    "clip": lambda q, k, n, **o: cf.clip_loss(q, k, 3.0, extra_negatives=n, **o),
    "sup_con": lambda q, k, n, **o: (
        cf.sup_con_loss(q, LABELS, extra_negatives=n, **o) + 0 * k.sum()
    ),
}


@pytest.mark.parametrize("theirs", KINDS, ids=str)
@pytest.mark.parametrize("own", KINDS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_promoted(name, own, theirs):
    """The value of the wider dtype; each gradient in its input's own."""
    q, k, n = torch.randn(5, 6).to(own), torch.randn(5, 6).to(own), torch.randn(7, 6).to(theirs)
    wide = torch.promote_types(torch.promote_types(own, theirs), torch.float32)
    exact = [x.to(wide, copy=True).requires_grad_() for x in (q, k, n)]
    expected = LOSSES[name](*exact)
    expected.backward()
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, n)]
    loss = LOSSES[name](*leaves)
    loss.backward()
    assert loss.dtype == wide
    assert error(loss, expected) < 1e-5
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        tolerance = 1e-2 if leaf.element_size() == 2 else 1e-4
        assert error(leaf.grad, reference.grad, 1e-3) < tolerance


@pytest.mark.parametrize("learned", [False, True])
def test_value_and_grad(learned):
    t = nn_parameter() if learned else 0.2
    q, k = (torch.randn(5, 6).bfloat16() for _ in range(2))
    n = torch.randn(7, 6)
    loss, grads = cf.value_and_grad(cf.info_nce_loss)(q, k, n, temperature=t)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
    expected, exact = cf.value_and_grad(cf.info_nce_loss)(q.float(), k.float(), n, temperature=t)
    assert loss == expected
    assert all(error(a, b) < 1e-2 for a, b in zip(grads, exact, strict=True))


def nn_parameter():
    return torch.nn.Parameter(torch.tensor(0.2))


def test_moco_under_autocast():
    """The recipe: an encoder in bfloat16, a queue in float32."""
    encoder = torch.nn.Linear(8, 6)
    queue = cf.MemoryQueue(16, 6, random=True)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        q = encoder(x)
        with torch.no_grad():
            k = encoder(x + 0.1)
        assert q.dtype == torch.bfloat16
        loss = cf.info_nce_loss(q, k, queue(), temperature=0.07)
    loss.backward()
    queue.enqueue(k)
    assert loss.dtype == torch.float32
    assert encoder.weight.grad.abs().sum() > 0


def test_equal_dtypes_are_not_cast(monkeypatch):
    """The fused call gets the very tensors."""
    seen = []

    def spy(*args):
        seen.extend(args[:3])
        return args[0].sum()

    monkeypatch.setattr(autograd, "contrast_loss", spy)
    tensors = [torch.randn(5, 6).bfloat16() for _ in range(3)]
    cf.info_nce_loss(*tensors)
    assert all(a is b for a, b in zip(seen, tensors, strict=True))
