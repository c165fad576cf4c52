"""FGSM, PGD and frozen: the formula, the ball, the bounds, and everything left as it was."""

import pytest
import torch
from torch import nn

from clae_fast import fgsm, frozen, nt_xent_loss, pgd, use_backend, value_and_grad

SHAPE = (4, 3, 5, 6)


def images(dtype=torch.float32):
    return torch.rand(SHAPE, dtype=torch.float64).to(dtype)


def weights():
    return torch.linspace(-1, 1, 5 * 6).reshape(5, 6)


def loss_fn(x):
    """Its gradient has both signs and zeros."""
    return (x.float() * weights().round(decimals=0)).sum() + x.float().square().sum() * 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fgsm(dtype, backend):
    x = images(dtype)
    with use_backend(backend):
        x_adv = fgsm(loss_fn, x, 0.125, bounds=(0.25, 0.75))
    sign = weights().round(decimals=0).sign()
    expected = (x.double() + 0.125 * sign).clamp(0.25, 0.75)
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad
    torch.testing.assert_close(x_adv.double(), expected.to(dtype).double(), rtol=0, atol=0)


def test_per_channel_eps_and_bounds():
    """Normalised images: eps / std and the pixel range of each channel."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])
    shape = (3, 1, 1)
    x = (images() - mean.reshape(shape)) / std.reshape(shape)
    bounds = tuple(((b - mean) / std).reshape(shape) for b in (0.0, 1.0))
    eps = (8 / 255 / std).reshape(shape)
    for fmt in (torch.contiguous_format, torch.channels_last):
        for attack in (
            lambda x: fgsm(loss_fn, x, eps, bounds=bounds),
            lambda x: pgd(loss_fn, x, eps, step_size=eps / 4, num_steps=6, bounds=bounds),
        ):
            x_adv = attack(x.contiguous(memory_format=fmt))
            assert x_adv.is_contiguous(memory_format=fmt)
            pixels = (x_adv - x) * std.reshape(shape)
            assert pixels.abs().max() <= 8 / 255 + 1e-6
            assert pixels.abs().max() > 8 / 255 - 1e-3
            assert (x_adv >= bounds[0]).all()
            assert (x_adv <= bounds[1]).all()
    with use_backend("reference"):
        assert torch.equal(
            fgsm(loss_fn, x, eps, bounds=bounds), fgsm(loss_fn, x, eps, bounds=bounds)
        )


def test_sizes_that_only_the_reference_knows():
    """Per image and per pixel: the automatic choice falls back, a forced kernel says why not."""
    x = images()
    eps = torch.rand(4, 1, 1, 1)
    expected = x + eps * weights().round(decimals=0).sign()
    torch.testing.assert_close(fgsm(loss_fn, x, eps), expected)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="vary per channel only"):
        fgsm(loss_fn, x, eps)
    odd = images().transpose(1, 2)
    torch.testing.assert_close(fgsm(lambda v: v.sum(), odd, 0.1), odd + 0.1, rtol=0, atol=1e-7)


def test_nan_gradient_is_visible():
    for backend in ("auto", "reference"):
        with use_backend(backend):
            x_adv = fgsm(lambda x: (x - 0.5).sqrt().sum(), images(), 0.1, bounds=(0, 1))
        assert x_adv.isnan().any()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv.bias.requires_grad_(False)

    def forward(self, x):
        return self.bn(self.conv(x)).relu().flatten(1)


def state(net):
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [p.requires_grad for p in net.parameters()],
        [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        [m.training for m in net.modules()],
    )


def same(a, b):
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1] == b[1]
    assert all((g is None) == (h is None) and (g is None or torch.equal(g, h))
               for g, h in zip(a[2], b[2], strict=True))  # fmt: skip
    assert a[3] == b[3]


ATTACKS = {
    "fgsm": lambda fn, x, **o: fgsm(fn, x, 0.1, **o),
    "linf": lambda fn, x, **o: pgd(fn, x, 0.1, step_size=0.05, num_steps=3, **o),
    "l2": lambda fn, x, **o: pgd(fn, x, 1.0, step_size=0.5, num_steps=3, norm="l2", **o),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_everything_is_left_as_it_was(name):
    """Flags, gradients, modes and, given the model, buffers; under no_grad; also on error."""
    net, x = Net(), images().requires_grad_()
    net(x).square().mean().backward()
    x.grad = None
    before = state(net)

    def closure(v):
        assert torch.is_grad_enabled()
        assert not any(p.requires_grad for p in net.parameters())
        return net(v).square().mean()

    def broken(v):
        net(v)
        raise KeyError("from the closure")

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            x_adv = ATTACKS[name](closure, x, model=net)
        assert (x_adv != x).any()
        assert x.grad is None
        same(state(net), before)
        with pytest.raises(KeyError):
            ATTACKS[name](broken, x, model=net)
        same(state(net), before)
    # without `model`, the closure's own forwards move the statistics, and nothing else happens
    ATTACKS[name](lambda v: net(v).square().mean(), x)
    after = state(net)
    assert not torch.equal(after[0]["bn.running_mean"], before[0]["bn.running_mean"])
    same((before[0], *after[1:]), before)


def test_no_weight_gradients_are_computed():
    """One forward, one backward for the input: two thirds of a full backward."""
    from torch.utils.flop_counter import FlopCounterMode

    net, x = Net(), images()
    with FlopCounterMode(display=False) as forward:
        net(x)
    with FlopCounterMode(display=False) as attack:
        fgsm(lambda v: net(v).square().mean(), x, 0.1, model=net)
    assert attack.get_total_flops() == 2 * forward.get_total_flops()


def test_linf_is_repeated_projection():
    x = images(torch.float64)
    x_adv = x
    for _ in range(4):
        leaf = x_adv.clone().requires_grad_()
        (g,) = torch.autograd.grad((leaf - 0.3).abs().sum(), leaf)
        x_adv = (x_adv + 0.03 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    out = pgd(lambda v: (v - 0.3).abs().sum(), x, 0.1, step_size=0.03, num_steps=4, bounds=(0, 1))
    assert torch.equal(out, x_adv)


def test_l2():
    x = images(torch.float64)
    target = torch.rand(SHAPE, dtype=torch.float64)
    out = pgd(
        lambda v: -(v - target).square().sum(), x, 0.7, step_size=0.2, num_steps=20, norm="l2"
    )
    delta = (out - x).flatten(1)
    wanted = (target - x).flatten(1)
    assert (delta.norm(dim=1) <= 0.7 + 1e-9).all()
    torch.testing.assert_close(delta, 0.7 * wanted / wanted.norm(dim=1, keepdim=True))
    # a gradient of zero moves nothing
    assert torch.equal(
        pgd(lambda v: (v * 0).sum(), x, 1.0, step_size=1.0, num_steps=2, norm="l2"), x
    )


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20, 1e30])
def test_l2_of_extreme_gradients(size):
    """Their squares leave float32's range; the step has its length all the same."""
    x = images()
    out = pgd(lambda v: (v * size).sum(), x, 1.0, step_size=0.5, num_steps=1, norm="l2")
    moved = (out - x).flatten(1)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((4,), 0.5), rtol=1e-5, atol=0)


def test_buffers_that_the_forward_replaces_or_makes():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", None)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.last = x.detach().mean()
            self.count = self.count + 1
            self.register_buffer("new", torch.ones(()))
            return x.sum()

    model = Counting()
    count = model.count
    fgsm(model, images(), 0.1, model=model)
    assert model.last is None
    assert model.count is count
    assert count == 0
    assert list(model._buffers) == ["last", "count"]
    with torch.inference_mode():
        model.count = torch.full((), 3.0)
    fgsm(lambda v: v.sum(), images(), 0.1, model=model)
    assert model.count == 3


@pytest.mark.parametrize("value", [0.1, 0.3])
def test_one_element_tensors(value):
    """As numbers, in the C++ kernel too."""
    x = images()
    size, low, high = torch.tensor([value]), torch.tensor(0.2), torch.full((1, 1, 1, 1), 0.8)
    expected = fgsm(loss_fn, x, value, bounds=(0.2, 0.8))
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            assert torch.equal(fgsm(loss_fn, x, size, bounds=(low, high)), expected)


def test_l2_in_the_pixels_units():
    """Per-channel sizes eps / std give what attacking the unnormalised images gives."""
    x = images(torch.float64)
    std = torch.tensor([0.2, 0.25, 0.5], dtype=torch.float64).reshape(3, 1, 1)
    a = torch.randn(SHAPE, dtype=torch.float64)
    options = {"num_steps": 5, "norm": "l2"}
    pixels = pgd(lambda v: (v * a).sin().sum(), x, 0.5, step_size=0.2, **options)
    normal = pgd(
        lambda v: (v * std * a).sin().sum(), x / std, 0.5 / std, step_size=0.2 / std, **options
    )
    torch.testing.assert_close(normal * std, pixels)
    one = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    still = pgd(lambda v: (v * a).sum(), x, one, step_size=0.2, **options)
    assert torch.equal(still[:, 1], x[:, 1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start(norm):
    x = torch.full((512, 8), 0.5)

    def run(seed, **options):
        g = torch.Generator().manual_seed(seed)
        return pgd(lambda v: (v * 0).sum(), x, 0.3, step_size=0.0, num_steps=1, norm=norm,
                   random_start=True, generator=g, **options)  # fmt: skip

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    delta = run(1) - x
    if norm == "linf":
        assert delta.abs().max() <= 0.3 + 1e-6
        assert delta.std() == pytest.approx(0.3 / 3**0.5, rel=0.05)
    else:
        radius = delta.norm(dim=1)
        assert radius.max() <= 0.3 + 1e-6
        assert radius.pow(8).mean() == pytest.approx(0.3**8 / 2, rel=0.1)  # uniform in volume
    assert delta.mean().abs() < 0.01
    clipped = run(1, bounds=(0.45, 0.5))
    assert clipped.min() >= 0.45
    assert clipped.max() <= 0.5
    torch.manual_seed(3)
    a = pgd(lambda v: v.sum(), x, 0.3, step_size=0.1, num_steps=1, norm=norm, random_start=True)
    assert (a - x).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pgd_in_half_precision(dtype):
    for name in ("linf", "l2"):
        out = ATTACKS[name](lambda v: v.float().square().sum(), images(dtype), bounds=(0, 1))
        assert out.dtype == dtype
        assert out.min() >= 0
        assert out.max() <= 1


def test_inputs_from_inference_mode():
    with torch.inference_mode():
        x = images()
    assert (fgsm(lambda v: v.sum(), x, 0.1) > x).all()
    assert (pgd(lambda v: v.sum(), x, 0.1, step_size=0.1, num_steps=1) > x).all()


def test_frozen():
    net = Net()
    flags = [p.requires_grad for p in net.parameters()]
    assert flags.count(False) == 1

    def fail_inside():
        with frozen(net):
            assert not any(p.requires_grad for p in net.parameters())
            with frozen(net):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [p.requires_grad for p in net.parameters()] == flags


def test_attack_on_a_contrastive_loss():
    """PGD raises the loss of the views step by step; what users come for."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(90, 16))
    x_i, x_j = images(), images()
    z_j = net(x_j).detach()

    def loss(x):
        return nt_xent_loss(net(x), z_j, temperature=0.1)

    start = loss(x_i).item()
    one = loss(fgsm(loss, x_i, 0.05, model=net)).item()
    many = loss(pgd(loss, x_i, 0.05, step_size=0.02, num_steps=10, model=net)).item()
    assert start < one < many + 1e-6
    _, (g, _) = value_and_grad(nt_xent_loss)(net(x_i), z_j)
    assert g.shape == (4, 16)
