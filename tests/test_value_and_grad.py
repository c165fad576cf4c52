"""Loss and input gradients in one call: which path, which gradients, what is left alone."""

import functools

import pytest
import torch
from torch import nn

import clae_fast as cf
from clae_fast import value_and_grad


def by_autograd(fn, *inputs, **kwargs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = fn(*leaves, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)


def inputs(n=2, dtype=torch.float32):
    return [torch.randn(6, 4, dtype=dtype) for _ in range(n)]


FUSED = [
    cf.nt_xent_loss,
    cf.info_nce_loss,
    cf.uel_loss,
    functools.partial(cf.info_nce_loss, symmetric=True, reduction="sum"),
    functools.partial(functools.partial(cf.uel_loss, temperature=0.3), negative_weight=2.0),
    cf.NTXentLoss(0.2, reduction="sum"),
    cf.InfoNCELoss(torch.tensor(0.2)),
    functools.partial(cf.UELLoss(0.2)),
]


@pytest.mark.parametrize("fn", FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_as_autograd_and_no_graph(fn, dtype, monkeypatch):
    xs = inputs(dtype=dtype)
    loss, grads = by_autograd(fn, *xs)
    for node in ("_Contrast", "_UEL"):
        monkeypatch.setattr(f"clae_fast.autograd.{node}.apply", None)  # a graph would call it
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            got, fused = value_and_grad(fn)(*(x.requires_grad_(enabled) for x in xs))
        assert torch.equal(got, loss)
        assert not got.requires_grad
        for x, a, b in zip(xs, fused, grads, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == x.dtype
            assert not a.requires_grad
            assert x.grad is None


def test_clip_scale_and_bias_are_positional():
    x, y = inputs(dtype=torch.float64)
    args = x, y, torch.tensor([3.0], dtype=torch.float64), torch.tensor(-1.0)
    loss, grads = by_autograd(cf.clip_loss, *args)
    for fn in (cf.clip_loss, cf.ClipLoss()):
        got, fused = value_and_grad(fn)(*args)
        assert torch.equal(got, loss)
        for arg, a, b in zip(args, fused, grads, strict=True):
            torch.testing.assert_close(a, b)
            assert a.shape == arg.shape
    _, fused = value_and_grad(cf.clip_loss)(x, y, 3.0)
    assert fused[2] is None
    _, fused = value_and_grad(cf.clip_loss, argnums=(2, -1))(*args)
    assert fused[0] is None
    assert fused[1] is None
    torch.testing.assert_close(fused[2], grads[2])
    assert fused[3] == 0


def test_queue():
    q, k, queue = inputs(3)
    _, grads = by_autograd(cf.info_nce_loss, q, k, queue)
    _, fused = value_and_grad(cf.info_nce_loss)(q, k, queue)
    assert all(torch.equal(a, b) for a, b in zip(fused, grads, strict=True))
    _, (dq, dk, dqueue) = value_and_grad(cf.info_nce_loss, argnums=[0])(q, k, queue)
    torch.testing.assert_close(dq, grads[0])  # alone it takes one sweep instead of two
    assert dk is None
    assert dqueue is None


def test_inside_torch_compile():
    """Made and called in the compiled function, without a graph break."""

    def both(x, y):
        return value_and_grad(cf.nt_xent_loss)(x, y)

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    (loss, grads), (expected, wanted) = torch.compile(both, fullgraph=True)(x, y), both(x, y)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, grads, wanted))


def test_other_callables_go_through_autograd():
    """A lambda, a subclass, a hooked module, a wrapper of a loss, a positional partial."""
    x, y = inputs()

    class Twice(cf.NTXentLoss):
        def forward(self, *inputs):
            return 2 * super().forward(*inputs)

    hooked = cf.NTXentLoss()
    hooked.register_forward_hook(lambda m, i, out: 3 * out)

    @functools.wraps(cf.nt_xent_loss)
    def half(*inputs, **options):
        return 0.5 * cf.nt_xent_loss(*inputs, **options)

    class Called(cf.NTXentLoss):
        def __call__(self, *inputs):
            return 5 * super().__call__(*inputs)

    patched = cf.NTXentLoss()
    patched.forward = lambda a, b: 7 * base_loss(a, b)
    base, (dx, _) = by_autograd(cf.nt_xent_loss, x, y)
    for fn, factor in ((Called(), 5), (patched, 7)):
        loss, (g, _) = value_and_grad(fn)(x, y)
        torch.testing.assert_close(loss, factor * base)
        torch.testing.assert_close(g, factor * dx)
    backward_hooked = cf.NTXentLoss()
    backward_hooked.register_full_backward_hook(lambda m, gi, go: tuple(2 * g for g in gi))
    _, (g, _) = value_and_grad(backward_hooked)(x, y)
    torch.testing.assert_close(g, 2 * dx)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, out: 4 * out)
    try:
        loss, _ = value_and_grad(cf.NTXentLoss())(x, y)
    finally:
        handle.remove()
    torch.testing.assert_close(loss, 4 * base)
    for fn, factor in ((Twice(), 2), (hooked, 3), (half, 0.5), (lambda a, b: -base_loss(a, b), -1)):
        loss, (g, _) = value_and_grad(fn)(x, y)
        torch.testing.assert_close(loss, factor * base)
        torch.testing.assert_close(g, factor * dx)
    loss, (g,) = value_and_grad(functools.partial(cf.nt_xent_loss, x))(y)
    torch.testing.assert_close(loss, base)
    torch.testing.assert_close(g, by_autograd(cf.nt_xent_loss, x, y)[1][1])


base_loss = cf.nt_xent_loss


def test_autograd_path_leaves_everything_alone():
    net = nn.Linear(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    index = torch.tensor([2])

    def loss(x, index, y):
        return net(x)[index].square().mean() + 0.0 * y.sum().detach()

    with torch.no_grad():
        value, (dx, none, dy) = value_and_grad(loss)(x, index, torch.ones(2))
    assert not value.requires_grad
    assert dx.abs().max() > 0
    assert none is None
    assert (dy == 0).all()
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_loss_that_depends_on_nothing():
    _, grads = value_and_grad(lambda a: torch.ones(()))(torch.randn(3))
    assert torch.equal(grads[0], torch.zeros(3))


def test_inference_tensors():
    with torch.inference_mode():
        x, y = inputs()
    for fn in (cf.nt_xent_loss, lambda a, b: (a * b).sum()):
        _, grads = value_and_grad(fn)(x, y)
        assert all(g.isfinite().all() for g in grads)
    with torch.inference_mode():
        assert value_and_grad(cf.nt_xent_loss)(x, y)[0].isfinite()


def test_gradients_of_the_reference_backend():
    x, y = inputs(dtype=torch.float64)
    _, expected = by_autograd(cf.nt_xent_loss, x, y, backend="reference")
    _, got = value_and_grad(cf.nt_xent_loss)(x, y, backend="reference")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
