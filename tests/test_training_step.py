"""The training step of every kind: the same gradients, whatever saves work or memory."""

import math

import pytest
import torch
from torch import nn

from clae_fast import convert_dual_batchnorm
from clae_fast.pretraining import ConfigError, PretrainConfig, ResidualEncoder
from clae_fast.pretraining.accumulate import accumulated_step, check_independent
from clae_fast.pretraining.training_step import TrainingStep, make_loss

IMAGE = torch.Size((1, 12, 12))
METHODS = ["plain", "uel", "simclr"]


class Independent(nn.Module):
    """No BatchNorm: every image alone."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2), nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(),
            nn.Dropout(dropout), nn.Linear(6 * 25, 8),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


def small():
    return ResidualEncoder(width=4)


def make(config, build=Independent, mean=(0.3,), std=(0.25,)):
    torch.manual_seed(1)
    encoder = build()
    if config.clae and any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()):
        convert_dual_batchnorm(encoder)
    return encoder, TrainingStep(
        config, encoder.train(), make_loss(config), mean, std, IMAGE, torch.device("cpu")
    )


def views(batch=10):
    torch.manual_seed(2)
    return torch.randn(batch, *IMAGE), torch.randn(batch, *IMAGE)


def gradients(encoder):
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def settings(**changes):
    return PretrainConfig(**{"batch_size": 10, "eps": 0.1, "alpha": 0.7} | changes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clae", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 10])
def test_accumulation_gives_the_gradient_of_the_whole_batch(method, clae, parts):
    whole_encoder, whole = make(settings(method=method, clae=clae))
    parted_encoder, parted = make(settings(method=method, clae=clae, accumulate=parts))
    x_i, x_j = views()
    expected, out = whole(x_i, x_j), parted(x_i, x_j)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.clean_loss, expected.clean_loss, rtol=1e-5, atol=1e-6)
    a, b = gradients(parted_encoder), gradients(whole_encoder)
    assert (a - b).norm() / b.norm() < 1e-4
    assert (out.x_adv is None) is not clae
    if clae:
        assert (out.x_adv != expected.x_adv).float().mean() < 1e-3


def test_accumulation_holds_one_part_at_a_time():
    """Activations that wait for a backward: those of a part, not of the batch."""
    encoder, _ = make(settings())
    x_i, x_j = views(60)
    alive, most = 0, 0

    def peak(step):
        nonlocal alive, most
        alive = most = 0

        class Held:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.numel()
                alive += self.size
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            step()
        return most

    loss = make_loss(settings())
    whole = peak(
        lambda: accumulated_step(encoder, x_i, x_j, loss, part_size=60, clae=True, eps=0.1)
    )
    parted = peak(
        lambda: accumulated_step(encoder, x_i, x_j, loss, part_size=6, clae=True, eps=0.1)
    )
    assert parted < whole / 5


def test_accumulation_is_refused_where_it_is_not_exact():
    with pytest.raises(ConfigError, match="accumulate=2: expected 1 with this encoder .BatchNorm"):
        make(settings(accumulate=2), small)
    with pytest.raises(ConfigError, match="it draws random numbers, as dropout"):
        make(settings(accumulate=2), lambda: Independent(dropout=0.5))

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Independent()

        def forward(self, x):
            return self.net(x - x.mean(0))

    with pytest.raises(ConfigError, match="images couple"):
        make(settings(accumulate=2), Centred)
    encoder = Independent()
    before = torch.get_rng_state()
    check_independent(encoder, IMAGE, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_published_step_has_the_same_gradients(method):
    x_i, x_j = views()
    found = {}
    for attack in ("exact", "published"):
        encoder, step = make(settings(method=method, attack=attack), small)
        out = step(x_i, x_j)
        found[attack] = (out.loss, gradients(encoder), out.x_adv)
    exact, published = found["exact"], found["published"]
    torch.testing.assert_close(exact[0], published[0], rtol=1e-6, atol=0)
    assert (exact[1] - published[1]).norm() / published[1].norm() < 1e-5
    assert torch.equal(exact[2], published[2])


@pytest.mark.parametrize("attack", ["exact", "published", "shared"])
def test_pixel_sizes_and_clamping(attack):
    mean, std = (0.3,), (0.25,)
    config = settings(attack=attack, eps=None, eps_pixels=8 / 255, clamp=True)
    encoder, step = make(config, small, mean, std)
    torch.manual_seed(0)
    pixels_i, pixels_j = torch.rand(2, 10, *IMAGE)
    out = step((pixels_i - 0.3) / 0.25, (pixels_j - 0.3) / 0.25)
    pixels = out.x_adv * 0.25 + 0.3
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
    moved = (pixels - pixels_i).abs()
    assert moved.max() < 8 / 255 + 1e-6
    inside = (pixels_i > 0.04) & (pixels_i < 0.96) & (moved > 1e-6)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(
        moved[inside], torch.full_like(moved[inside], 8 / 255), atol=1e-6, rtol=0
    )


def test_each_channel_has_its_own_normalised_size():
    config = settings(eps=None, eps_pixels=0.1)
    step = TrainingStep(
        config, Independent(), make_loss(config), (0.5,) * 3, (0.2, 0.25, 0.5), IMAGE,
        torch.device("cpu"),
    )  # fmt: skip
    torch.testing.assert_close(step.eps.flatten(), torch.tensor([0.5, 0.4, 0.2]))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_follows_float32(precision, method):
    x_i, x_j = views(16)
    found = {}
    for name in ("float32", precision):
        encoder, step = make(settings(method=method, precision=name), small)
        out = step(x_i, x_j)
        grad = gradients(encoder) / step.scaler.get_scale()
        found[name] = (out.loss, grad, out.x_adv)
        assert out.loss.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in encoder.parameters())
    full, half = found["float32"], found[precision]
    assert abs(half[0] - full[0]) < 0.02 * full[0]
    cosine = torch.cosine_similarity(half[1], full[1], dim=0)
    assert cosine > {"bfloat16": 0.93, "float16": 0.98}[precision]  # 8 and 11 bits of mantissa
    same = ((half[2] - x_i).sign() == (full[2] - x_i).sign()).float().mean()
    assert same > {"bfloat16": 0.85, "float16": 0.97}[precision]
    # No sign was lost to a gradient that became 0.
    assert ((half[2] - x_i) == 0).float().mean() <= ((full[2] - x_i) == 0).float().mean() + 0.01


def test_small_float16_gradients_survive():
    """A loss so flat that its unscaled attack gradient is below the smallest float16."""
    config = settings(precision="float16", temperature=1.0)
    encoder, _ = make(settings(), small)
    with torch.no_grad():
        encoder.backbone[0].weight.mul_(1e-3)
        encoder.backbone[1].weight.mul_(1e-3)
    step = TrainingStep(
        config, encoder, make_loss(config), (0.3,), (0.25,), IMAGE, torch.device("cpu")
    )
    x_i, x_j = views(16)
    out = step(x_i, x_j)
    assert ((out.x_adv - x_i) != 0).float().mean() > 0.9


def test_an_overflowing_float16_step_is_left_out():
    config = settings(precision="float16", clae=False)
    encoder, step = make(config, small)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    step(*views())
    before = [p.detach().clone() for p in encoder.parameters()]
    next(iter(encoder.parameters())).grad.fill_(math.inf)
    scale = step.scaler.get_scale()
    step.update(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert step.scaler.get_scale() < scale


@pytest.mark.parametrize("clae", [False, True])
def test_compiled_gives_the_same(clae):
    x_i, x_j = views()
    eager_encoder, eager = make(settings(clae=clae), small)
    compiled_encoder, compiled = make(settings(clae=clae, compile=True), small)
    a, b = eager(x_i, x_j), compiled(x_i, x_j)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-5)
    ga, gb = gradients(eager_encoder), gradients(compiled_encoder)
    assert (ga - gb).norm() / ga.norm() < 1e-3
