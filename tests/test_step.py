"""`clae_step` against the published step: the same result, 11 encoder forwards and not 15 or 18."""

import copy
import functools

import published
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clae_fast import (
    InfoNCELoss,
    NTXentLoss,
    UELLoss,
    batchnorm_branch,
    clae_step,
    convert_dual_batchnorm,
    nt_xent_loss,
)

METHODS = {"simclr": NTXentLoss(0.5), "uel": UELLoss(0.1), "plain": InfoNCELoss(0.1)}


def views(B=16, size=8):
    return torch.randn(B, 3, size, size), torch.randn(B, 3, size, size)


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters()}


def relative(a, b):
    return float((a - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_published_step(name):
    """float32, eager: bit for bit (SimCLR, UEL); Plain adds its two encodings in another order."""
    ours, theirs = published.small_encoder(), None
    theirs = copy.deepcopy(ours)
    x_i, x_j = views()
    loss = METHODS[name]
    out = clae_step(ours, x_i, x_j, loss=loss, eps=0.03, alpha=0.7)
    out.loss.backward()
    total, x_adv = published.step(theirs, x_i, x_j, loss, 0.03, 0.7, plain=name == "plain")

    assert torch.equal(out.x_adv, x_adv)
    assert (out.x_adv != x_i).float().mean() > 0.99
    assert torch.equal(out.loss, out.clean_loss + 0.7 * out.adversarial_loss)
    same = torch.equal if name != "plain" else lambda a, b: relative(a, b) < 1e-5
    assert same(out.loss.detach(), total)
    for key, grad in gradients(ours).items():
        assert same(grad, gradients(theirs)[key]), key
    for key, value in ours.state_dict().items():
        other = theirs.state_dict()[key]
        if ".aux." in key:
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
        elif name == "plain" and ("running" in key or "tracked" in key):
            continue  # the published Plain counts x_i twice: next test
        else:
            assert torch.equal(value, other), key


def test_plain_counts_each_view_once():
    net = published.small_encoder()
    alone = copy.deepcopy(net)
    x_i, x_j = views()
    clae_step(net, x_i, x_j, loss=METHODS["plain"])
    alone(x_i), alone(x_j)
    for key, value in alone.state_dict().items():
        if ".aux." not in key:
            assert torch.equal(net.state_dict()[key], value), key
    assert all(v == 3 for k, v in net.state_dict().items() if k.endswith("aux.num_batches_tracked"))


def test_a_shared_batchnorm_is_replayed_too():
    """Two updates in one forward, two forwards."""
    bn = nn.BatchNorm2d(3)
    base = nn.Sequential(bn, nn.Conv2d(3, 3, 3), bn, nn.Flatten(), nn.Linear(108, 4))
    ours = convert_dual_batchnorm(base, momentum=0.3)
    theirs = copy.deepcopy(ours)
    x_i, x_j = views()
    clae_step(ours, x_i, x_j)
    published.step(theirs, x_i, x_j, nt_xent_loss)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_the_attack_sees_a_frozen_encoder():
    """Or a compiled one would compute every weight gradient after all."""

    class Watching(nn.Linear):
        seen = ()

        def forward(self, x):
            self.seen = (*self.seen, self.weight.requires_grad)
            return super().forward(x.flatten(1))

    encoder = Watching(192, 4)
    clae_step(encoder, *views())
    assert encoder.seen == (False, True, True, True)


def test_cumulative_average_is_replayed_too():
    """momentum=None: running statistics are the mean over all batches so far."""
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    ours = convert_dual_batchnorm(base, momentum=None)
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        x_i, x_j = views()
        clae_step(ours, x_i, x_j)
        published.step(theirs, x_i, x_j, nt_xent_loss)
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_several_steps(name):
    """After steps of SGD: within 1e-4, and at most 1e-3 of the pixels flipped."""
    ours = published.small_encoder()
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (ours, theirs)]
    for _ in range(6):
        x_i, x_j = views()
        for optimizer in optimizers:
            optimizer.zero_grad()
        out = clae_step(ours, x_i, x_j, loss=METHODS[name])
        out.loss.backward()
        total, x_adv = published.step(theirs, x_i, x_j, METHODS[name], plain=name == "plain")
        for optimizer in optimizers:
            optimizer.step()
        assert relative(out.loss.detach(), total) < 1e-4
        assert (out.x_adv != x_adv).float().mean() <= 1e-3


@pytest.mark.parametrize("variant", ["compiled", "autocast", "reference kernel"])
def test_other_arithmetic(variant):
    """Within 1e-4 and at most 1e-3 of the pixels flipped."""
    torch._dynamo.reset()
    ours = published.small_encoder()
    theirs = copy.deepcopy(ours)
    x_i, x_j = views()
    encoder = torch.compile(ours) if variant == "compiled" else ours
    loss = NTXentLoss(0.5, backend="reference") if variant == "reference kernel" else nt_xent_loss
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
        out = clae_step(encoder, x_i, x_j, loss=loss)
        out.loss.backward()
        total, x_adv = published.step(theirs, x_i, x_j, nt_xent_loss)
    assert relative(out.loss.detach(), total) < 1e-4
    assert (out.x_adv != x_adv).float().mean() <= 1e-3
    for key, grad in gradients(ours).items():
        assert relative(grad, gradients(theirs)[key]) < (3e-3 if variant == "autocast" else 1e-4)


def test_encoder_forwards(capsys):
    """Measured operations of a ResNet-18, in forwards of one view."""
    from torchvision.models import resnet18

    net = resnet18(num_classes=64)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    convert_dual_batchnorm(net)
    x_i, x_j = views(2, 32)

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    forward = flops(lambda: net(x_i))
    table = {"plain step": flops(lambda: nt_xent_loss(net(x_i), net(x_j)).backward())}
    for name, loss in METHODS.items():
        wasteful = functools.partial(published.step, net, x_i, x_j, loss, plain=name == "plain")
        table[f"published {name}"] = flops(wasteful)
        exact = functools.partial(clae_step, net, x_i, x_j, loss=loss)
        table[f"exact {name}"] = flops(lambda exact=exact: exact().loss.backward())
    table["shared"] = flops(lambda: clae_step(net, x_i, x_j, attack="shared").loss.backward())
    table = {key: round(value / forward, 3) for key, value in table.items()}
    with capsys.disabled():
        print("\nencoder forwards per step:", ", ".join(f"{k} {v}" for k, v in table.items()))
    expected = {
        "plain step": 6,
        "shared": 10,
        **dict.fromkeys((f"exact {name}" for name in METHODS), 11),
        "published simclr": 15,
        "published uel": 15,
        "published plain": 18,
    }
    for key, value in expected.items():
        assert table[key] == pytest.approx(value, abs=0.05), key


@pytest.mark.parametrize("name", METHODS)
def test_shared_attack(name):
    """The attack's gradient through the clean forward; the training terms as ever."""
    ours = published.small_encoder()
    theirs = copy.deepcopy(ours)
    x_i, x_j = views()
    loss = METHODS[name]
    out = clae_step(ours, x_i, x_j, loss=loss, attack="shared")
    out.loss.backward()
    leaf = x_i.clone().requires_grad_()
    z_i = theirs(leaf)
    fresh = z_i.detach().requires_grad_()
    (dz,) = torch.autograd.grad(loss(z_i.detach(), fresh), fresh)
    (g,) = torch.autograd.grad(z_i, leaf, dz, retain_graph=True)
    x_adv = x_i + 0.03 * g.sign()
    assert torch.equal(out.x_adv, x_adv)
    z_j = theirs(x_j)
    with batchnorm_branch(theirs, "aux"):
        z_adv = theirs(x_adv)
    (loss(z_i, z_j) + loss(z_i, z_adv)).backward()
    for key, grad in gradients(ours).items():
        assert torch.equal(grad, gradients(theirs)[key]), key
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


def test_leaves_everything_alone():
    net = published.small_encoder()
    net[7].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    x_i, x_j = views()
    x_i.requires_grad_()
    for attack in ("exact", "shared"):
        with torch.no_grad():
            out = clae_step(net, x_i, x_j, attack=attack)
        assert not out.loss.requires_grad
        assert (out.x_adv != x_i).any()
        out = clae_step(net, x_i, x_j, attack=attack)
        assert out.loss.requires_grad
        assert not out.x_adv.requires_grad
        assert x_i.grad is None
        assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(m.training for m in net.modules())

    class Failing(nn.Module):
        def __init__(self, net, after):
            super().__init__()
            self.net, self.calls = net, after

        def forward(self, x):
            self.calls -= 1
            if self.calls < 0:
                raise KeyError("inside the encoder")
            return self.net(x)

    for after in range(4):
        with pytest.raises(KeyError):
            clae_step(Failing(net, after), x_i, x_j)
        assert [p.requires_grad for p in net.parameters()] == flags
        assert all(getattr(m, "branch", "main") == "main" for m in net.modules())


def test_eval_mode_and_models_without_batchnorm():
    net = published.small_encoder().eval()
    before = copy.deepcopy(net.state_dict())
    clae_step(net, *views()).loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    plain = nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 4))
    out = clae_step(plain, *views())
    out.loss.backward()
    assert plain[2].weight.grad.abs().max() > 0


def test_one_image():
    """drop_last=False: a last batch of one image has nothing to contrast, and trains nothing."""
    net = published.small_encoder()
    x_i, x_j = views(B=1)
    out = clae_step(net, x_i, x_j)
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(out.x_adv, x_i)
    assert all((p.grad == 0).all() for p in net.parameters())


def test_eps_and_bounds_per_channel():
    net = published.small_encoder()
    x_i, x_j = (v.clamp(-1, 1) for v in views())
    eps = torch.tensor([0.1, 0.2, 0.0]).reshape(3, 1, 1)
    out = clae_step(net, x_i, x_j, eps=eps, bounds=(-1.0, torch.ones(3, 1, 1)))
    moved = (out.x_adv - x_i).abs().amax((0, 2, 3))
    torch.testing.assert_close(moved, eps.flatten(), rtol=0, atol=1e-6)
    assert out.x_adv.abs().max() <= 1


def test_the_attack_raises_the_loss():
    net = published.small_encoder()
    x_i, x_j = views()
    without = float(clae_step(net.eval(), x_i, x_j, eps=0.0).adversarial_loss.detach())
    losses = [float(clae_step(net, x_i, x_j, eps=e).adversarial_loss.detach()) for e in (0.03, 0.1)]
    assert without < losses[0] < losses[1]


def test_any_loss():
    """A callable that is not ours, through autograd."""
    net = published.small_encoder()
    twin = copy.deepcopy(net)
    x_i, x_j = views()
    out = clae_step(net, x_i, x_j, loss=lambda a, b: nt_xent_loss(a, b))
    assert torch.equal(out.x_adv, clae_step(twin, x_i, x_j, loss=nt_xent_loss).x_adv)


def test_half_precision_images_into_a_float_encoder():
    """The gradient is rounded to float16 where it reaches the image."""

    class Floating(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(192, 16)
            self.layer.weight.data.mul_(1e-4)

        def forward(self, x):
            return self.layer(x.float().flatten(1))

    x_i, x_j = (v.half() for v in views(64))
    out = clae_step(Floating(), x_i, x_j, eps=0.1)
    assert (out.x_adv != x_i).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_gradients(dtype):
    """The mean over a batch makes float16 gradients too small to have a sign; scaled, they do."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 32))
    net[1].weight.data.mul_(0.05)
    x_i, x_j = views(512)
    loss = NTXentLoss(5.0)
    exact = clae_step(net, x_i, x_j, loss=loss).x_adv - x_i
    half = copy.deepcopy(net).to(dtype)
    x = x_i.to(dtype)
    moved = clae_step(half, x, x_j.to(dtype), loss=loss).x_adv - x
    agree = (moved.sign() == exact.sign()).float().mean()
    assert agree > 0.97
    leaf = x.clone().requires_grad_()
    z = half(leaf)
    loss(z.detach(), z).backward()
    if dtype == torch.float16:
        assert (leaf.grad == 0).float().mean() > 0.05  # what happens unscaled
    assert (moved == 0).float().mean() < 0.01
