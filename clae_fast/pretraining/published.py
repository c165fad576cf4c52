"""The CLAE step as its authors' code runs it, waste and all: the yardstick of `clae_step`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from clae_fast import batchnorm_branch
from clae_fast.step import CLAEOutput, unwrapped


def published_step(
    encoder: nn.Module,
    x_i: torch.Tensor,
    x_j: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    eps: float | torch.Tensor = 0.03,
    alpha: float = 1.0,
    *,
    plain: bool = False,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> CLAEOutput:
    """The same step as `clae_step` at its published cost: 15 encoder forwards, 18 for Plain.

    The attack encodes x_i twice, and its `backward()` computes weight gradients that are thrown
    away; Plain encodes x_i anew for the second term, which counts it twice in the main running
    statistics. The parameters' `.grad` are cleared. `clae_step` removes all of it.

    Args:
        encoder: with `DualBatchNorm`. Under DistributedDataParallel the inner one is attacked.
        x_i, x_j: (B, ...) views.
        loss: (z_i, z_j) -> scalar.
        eps, alpha, bounds: as in `clae_step`.
        plain: as the authors' Plain does it.

    Source: the published code of Ho & Vasconcelos, NeurIPS 2020.
    """
    x_adv = x_i.detach().clone().requires_grad_()
    with batchnorm_branch(encoder, "aux"):
        inner = unwrapped(encoder)
        z, z_adv = inner(x_i), inner(x_adv)
    loss(z, z_adv).backward()
    assert x_adv.grad is not None
    x_adv = (x_adv + eps * x_adv.grad.sign()).detach()
    if bounds is not None:
        x_adv = torch.clamp(x_adv, *bounds)
    x_adv.requires_grad_(plain)  # a slip of the published Plain, paid for with an input gradient
    encoder.zero_grad(set_to_none=True)
    with batchnorm_branch(encoder, "main"):
        z_i, z_j = encoder(x_i), encoder(x_j)
    clean = loss(z_i, z_j)
    if plain:
        with batchnorm_branch(encoder, "main"):
            z_i = encoder(x_i)
    with batchnorm_branch(encoder, "aux"):
        z_adv = encoder(x_adv)
    adversarial = loss(z_i, z_adv)
    return CLAEOutput(clean + alpha * adversarial, clean, adversarial, x_adv.detach())
