"""Losses inside autograd and torch.compile: second derivatives, penalties, unbroken graphs."""

import functools

import dense
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad

from clae_fast import clip_loss, info_nce_loss, nt_xent_loss, uel_loss, use_backend

LOSSES = {
    "nt_xent": nt_xent_loss,
    "info_nce": info_nce_loss,
    "symmetric": functools.partial(info_nce_loss, symmetric=True),
    "uel": uel_loss,
    "clip": lambda x, y, **o: clip_loss(x, y, 5.0, normalize=True, **o),
}


def pair(dtype=torch.float64, B=6, D=4):
    return [torch.randn(B, D, dtype=dtype, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "uel"])
def test_second_derivative_of_the_reference(name):
    """gradcheck and gradgradcheck through the public loss."""
    fn = functools.partial(LOSSES[name], backend="reference")
    assert torch.autograd.gradcheck(fn, pair(B=3, D=3))
    assert torch.autograd.gradgradcheck(fn, pair(B=3, D=3))


def test_second_derivative_of_uel():
    """Its keys are constants, which finite differences cannot know: against the dense formula."""
    x, y = pair(B=4)
    seconds = []
    for loss in (uel_loss(x, y, backend="reference"), dense.uel(x, y, 10.0).mean()):
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), (x, y), materialize_grads=True))
    for a, b in zip(*seconds, strict=True):
        assert dense.error(a, b) < 1e-10


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_penalty(name, reduction):
    """A second backward through the fused gradients raises; through the reference it is right."""
    x, y = pair()

    def penalty(**options):
        loss = LOSSES[name](x, y, reduction=reduction, **options).sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        assert g.requires_grad  # or the penalty would silently train nothing
        return g, g.square().sum()

    fused, value = penalty()
    words = 'backend="reference" without a group, which supports it'
    with pytest.raises(RuntimeError, match=words):
        value.backward()
    with use_backend("reference"):
        exact, value = penalty()
        value.backward()
    torch.testing.assert_close(fused, exact)
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_create_graph_alone_is_legal(name):
    x, y = pair()
    loss = LOSSES[name](x, y)
    created = torch.autograd.grad(loss, (x, y), create_graph=True)
    plain = torch.autograd.grad(LOSSES[name](x, y), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(created, plain, strict=True))


def test_retain_graph_and_two_losses():
    x, y = pair()
    loss = nt_xent_loss(x, y)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    x.grad = None
    (nt_xent_loss(x, y) + 0.5 * info_nce_loss(x, y)).backward()
    expected = torch.autograd.grad(nt_xent_loss(x, y), x)[0]
    expected = expected + 0.5 * torch.autograd.grad(info_nce_loss(x, y), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_functorch_is_refused_and_works_on_the_reference():
    x, y = (v.detach() for v in pair())
    for loss in (nt_xent_loss, uel_loss):
        with pytest.raises(RuntimeError, match=r"torch\.func.*backend=\"reference\""):
            torch.func.grad(lambda x, loss=loss: loss(x, y))(x)
        with pytest.raises(RuntimeError, match=r"torch\.func.*backend=\"reference\""):
            torch.func.jvp(lambda x, loss=loss: loss(x, y), (x,), (torch.ones_like(x),))
        got = torch.func.grad(lambda x, loss=loss: loss(x, y, backend="reference"))(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(leaf, y), leaf)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", [*LOSSES, "queue"])
def test_compile(name, reduction):
    """One graph, dynamic batch, learnable temperature; the numbers of eager."""
    torch._dynamo.reset()
    queue = torch.randn(9, 4) if name == "queue" else None

    def step(layer, x, y, tau):
        z_i, z_j = layer(x), layer(y)
        if name == "queue":
            return info_nce_loss(z_i, z_j, queue, temperature=tau, reduction=reduction).sum()
        if name == "clip":
            return clip_loss(z_i, z_j, 1 / tau, reduction=reduction).sum()
        return LOSSES[name](z_i, z_j, temperature=tau, reduction=reduction).sum()

    layer = torch.nn.Linear(5, 4)
    tau = torch.tensor(0.3, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for B in (6, 11, 3):
        x, y = torch.randn(B, 5), torch.randn(B, 5)
        grads = []
        for fn in (step, compiled):
            layer.zero_grad(), setattr(tau, "grad", None)
            loss = fn(layer, x, y, tau)
            loss.backward()
            grads.append([loss.detach(), tau.grad, *(p.grad.clone() for p in layer.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_compile_does_not_recompile_for_every_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fn = torch.compile(nt_xent_loss, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for B in (4, 7, 9, 12):
        fn(torch.randn(B, 8, requires_grad=True), torch.randn(B, 8))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


def test_compile_follows_use_backend():
    """The backend is chosen when the compiled function runs, not for good when it is traced."""
    torch._dynamo.reset()
    fn = torch.compile(nt_xent_loss, fullgraph=True)
    x, y = (v.detach() for v in pair(torch.float32))
    fn(x, y)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
        fn(x, y)
    with use_backend("reference"):
        torch.testing.assert_close(fn(x, y), nt_xent_loss(x, y))


@pytest.mark.parametrize("loss", [nt_xent_loss, uel_loss])
def test_batched_upstream_weights(loss):
    """What jacobian(vectorize=True) and is_grads_batched do to `reduction="none"`."""
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def rows(q, **options):
        return loss(q, y, reduction="none", **options)

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(lambda q: rows(q, backend="reference"), x)
    torch.testing.assert_close(jacobian(rows, x, vectorize=True), expected)


def test_forward_mode_is_refused():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        nt_xent_loss(y, y)
        with pytest.raises(RuntimeError, match='use backend="reference"'):
            nt_xent_loss(dual, y)
        loss = nt_xent_loss(dual, y, backend="reference")
        assert forward_ad.unpack_dual(loss).tangent is not None


def test_vmap():
    x, y = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    expected = torch.stack([nt_xent_loss(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.vmap(nt_xent_loss)(x, y), expected)


def test_no_graph_where_none_is_needed():
    x, y = (v.detach() for v in pair())
    assert not nt_xent_loss(x, y).requires_grad
    with torch.no_grad():
        assert not uel_loss(*pair()).requires_grad
    with torch.inference_mode():
        assert nt_xent_loss(x, y).isfinite()
