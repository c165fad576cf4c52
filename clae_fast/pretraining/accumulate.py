"""A contrastive step whose batch is encoded in parts, with the gradient of the whole batch.

The loss couples all images, so adding up the losses of parts is another loss. Here every part is
encoded without a graph, the loss of the whole batch gives the embeddings' gradients, and every
part is encoded again to carry its rows back: one more forward for each image, and only one part's
activations in memory. Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", section 3.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_fast import frozen, value_and_grad
from clae_fast.adversarial import Bounds, Size, sign_step
from clae_fast.step import CLAEOutput, unwrapped

from .config import ConfigError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check_independent(encoder: nn.Module, image: torch.Size, parts: int) -> None:
    """Refuse an encoder whose embedding of an image depends on the others or on chance.

    Args:
        encoder: tried on a copy, in training mode.
        image: (C, H, W).
        parts: as asked for, to be named.

    Raises:
        ConfigError: naming the reason.
    """
    expected = "1 with this encoder ({}: parts would give another gradient than the whole batch)"
    if any(isinstance(m, _BatchNorm) for m in encoder.modules()):
        raise ConfigError("accumulate", parts, expected.format("BatchNorm couples the images"))
    trial = copy.deepcopy(encoder).train()
    parameter = next(encoder.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *image, generator=generator).to(parameter.device, parameter.dtype)
    cuda = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        before = _random_states(cuda)
        whole = trial(x)
        # Not whether two results differ: a mask that is rarely drawn would pass.
        drew = any(not torch.equal(a, b) for a, b in zip(before, _random_states(cuda), strict=True))
        apart = torch.cat([trial(x[:2]), trial(x[2:])])
    if drew:
        reason = "it draws random numbers, as dropout does"
        raise ConfigError("accumulate", parts, expected.format(reason))
    if not torch.allclose(whole, apart, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
        raise ConfigError("accumulate", parts, expected.format("images couple"))


def _random_states(cuda: list[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]


def accumulated_step(
    encoder: nn.Module,
    x_i: torch.Tensor,
    x_j: torch.Tensor,
    loss: Loss,
    *,
    part_size: int,
    clae: bool,
    eps: Size = 0.03,
    alpha: float = 1.0,
    bounds: Bounds = None,
    scale: float | torch.Tensor = 1.0,
) -> CLAEOutput:
    """The step of `clae_step` (or without CLAE), with the weight gradients added to `.grad`.

    Args:
        encoder: treats every image alone (see `check_independent`), so it has one branch. Under
            DistributedDataParallel gradients are averaged once, after the last part.
        x_i, x_j: (B, ...) views.
        loss: (z_i, z_j) -> scalar.
        part_size: images encoded at a time.
        clae: with the adversarial term.
        eps, alpha, bounds: as in `clae_step`.
        scale: what the loss is multiplied by before the backward.

    Returns:
        CLAEOutput, detached; without CLAE the adversarial loss is 0 and x_adv is x_i.
    """
    inner = unwrapped(encoder)
    z_i, z_j = _encode(inner, x_i, part_size), _encode(inner, x_j, part_size)
    views, embeddings = [x_i, x_j], [z_i, z_j]
    x_adv = x_i
    if clae:
        x_adv = _attack(inner, x_i, z_i, loss, part_size, eps, bounds)
        views.append(x_adv)
        embeddings.append(_encode(inner, x_adv, part_size))
    leaves = [z.requires_grad_() for z in embeddings]
    with torch.enable_grad():
        clean = loss(leaves[0], leaves[1])
        adversarial = loss(leaves[0], leaves[2]) if clae else torch.zeros_like(clean)
        total = clean + alpha * adversarial
        (total * scale).backward()
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for view, leaf in zip(views, leaves, strict=True):
        assert leaf.grad is not None
        parts += zip(view.split(part_size), leaf.grad.split(part_size), strict=True)
    for number, (x, dz) in enumerate(parts, 1):
        with contextlib.nullcontext() if number == len(parts) else _alone(encoder):
            encoder(x).backward(dz)
    return CLAEOutput(total.detach(), clean.detach(), adversarial.detach(), x_adv)


def _alone(encoder: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients stay in this process inside."""
    no_sync = getattr(encoder, "no_sync", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[None] = no_sync()
    return context


@torch.no_grad()
def _encode(encoder: nn.Module, x: torch.Tensor, part_size: int) -> torch.Tensor:
    return torch.cat([encoder(part) for part in x.split(part_size)])


def _attack(
    encoder: nn.Module,
    x: torch.Tensor,
    z: torch.Tensor,
    loss: Loss,
    part_size: int,
    eps: Size,
    bounds: Bounds,
) -> torch.Tensor:
    _, (_, dz) = value_and_grad(loss, argnums=1)(z, z)
    assert dz is not None
    # Only signs matter: a largest entry near 1 keeps small ones alive in half precision.
    dz = torch.ldexp(dz.float(), -torch.frexp(dz.float().abs().amax()).exponent).to(z.dtype)
    attacked = []
    with frozen(encoder):
        for part, d in zip(x.split(part_size), dz.split(part_size), strict=True):
            start = part.detach().requires_grad_()
            torch.autograd.backward(encoder(start), d, inputs=[start])
            assert start.grad is not None
            attacked.append(sign_step(part, start.grad, part, eps, eps, bounds))
    return torch.cat(attacked)
