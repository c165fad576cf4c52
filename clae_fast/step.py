"""The CLAE training step, without the waste of the published one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import validation as check
from .adversarial import Bounds, Size, check_attack, frozen, sign_step
from .batchnorm import aux_layers, batchnorm_branch, replay_aux, running_statistics
from .grad import leaf, value_and_grad
from .graphed import GraphedAttack
from .losses import NTXentLoss
from .sync_batchnorm import synchronizing_groups

ATTACKS = ("exact", "shared")


@functools.cache
def _default_loss() -> NTXentLoss:
    """One for all calls, as a GraphedAttack asks for."""
    return NTXentLoss(0.5)


class CLAEOutput(NamedTuple):
    """What `clae_step` returns; `out.loss.backward()` trains."""

    loss: Tensor
    """`clean_loss + alpha * adversarial_loss`, 0-dim."""
    clean_loss: Tensor
    adversarial_loss: Tensor
    x_adv: Tensor
    """The adversarial images, detached, as x_i."""


def clae_step(
    encoder: nn.Module,
    x_i: Tensor,
    x_j: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    eps: Size = 0.03,
    alpha: float = 1.0,
    attack: str | GraphedAttack = "exact",
    bounds: Bounds = None,
) -> CLAEOutput:
    """Contrastive loss of two views, and of one view with its adversarial example.

        attack   x_adv = clip(x_i + eps sign(d/dx' L(f_aux(x_i), f_aux(x'))  at x' = x_i))
        train    loss  = L(f(x_i), f(x_j)) + alpha L(f(x_i), f_aux(x_adv))

    `f` uses the main BatchNorm statistics, `f_aux` the auxiliary ones. In encoder forwards F (a
    backward costs 1 F for inputs and 1 F for weights), backward included: the plain step takes 6 F,
    the published CLAE step 15 F (SimCLR, UEL) or 18 F (Plain), this one 11 F: the attack is one
    forward and one backward for the input alone. For an encoder without dropout the result is the
    published step's: bit for bit in float32 for losses of two views that are encoded once; the aux
    statistics, which the published attack advances twice, are replayed. One quirk is left out: the
    published Plain encodes x_i twice and counts it twice in the main statistics.

    In several processes a loss over all of them (`group="world"`) and SyncBatchNorm, converted
    before the dual conversion, make it the step of one process on the whole batch.

    Args:
        encoder: x -> embeddings (B, D); converted by `convert_dual_batchnorm` if it has any
            BatchNorm. Pass the module that DistributedDataParallel (built with
            `find_unused_parameters=False, broadcast_buffers=False`) or `fully_shard` made of it:
            the attack sends no gradients.
        x_i: (B, ...) first views; the ones that are attacked.
        x_j: (B, ...) second views, same shape.
        loss: (z_i, z_j) -> scalar: `NTXentLoss` (SimCLR), `InfoNCELoss` (Plain), `UELLoss` (UEL) or
            any callable. None: `NTXentLoss(0.5)`. In several processes give it a `group`.
        eps: in units of x_i, a number or a tensor that broadcasts to it. 0.03 is the published
            value, in normalised units.
        alpha: weight of the adversarial term, at least 0.
        attack: "exact", or "shared": take the attack's gradient on the clean forward of x_i, 10 F.
            Another method (main statistics in the attack), for eager encoders. A `GraphedAttack`
            is "exact", replayed as a CUDA graph.
        bounds: None, as published, or (low, high) as in `fgsm`.

    Returns:
        CLAEOutput. Main statistics advance by x_i and x_j, aux by the attack (twice) and x_adv.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
        RuntimeError: under `torch.inference_mode`.

    Source: Ho & Vasconcelos, "Contrastive Learning with Adversarial Examples", NeurIPS 2020,
    section 3 and the published code.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32))
        >>> encoder = convert_dual_batchnorm(net)
        >>> out = clae_step(encoder, torch.rand(8, 1, 4, 4), torch.rand(8, 1, 4, 4), eps=0.1)
        >>> out.loss.backward()
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be an nn.Module, got {type(encoder).__name__}")
    check_attack("clae_step", x_i, eps, bounds, name="x_i")
    check.same_kind("x_i", x_i, "x_j", x_j)
    if x_j.shape != x_i.shape or x_i.dim() < 2 or x_i.shape[0] == 0:
        raise ValueError(
            "x_i and x_j must be two views of one batch, (B, ...) with B >= 1, got "
            f"{tuple(x_i.shape)} and {tuple(x_j.shape)}"
        )
    check.number("alpha", alpha, at_least=0)
    if not isinstance(attack, GraphedAttack):
        check.word("attack", attack, ATTACKS)
    if loss is None:
        loss = _default_loss()
    check.function("loss", loss)
    if getattr(loss, "reduction", None) == "none":
        raise ValueError('loss must return a scalar, got one with reduction="none"')

    if attack != "shared":
        inner = unwrapped(encoder)
        if isinstance(attack, GraphedAttack):
            grad = attack.gradient(_attack_gradient, inner, x_i, loss)
        else:
            grad = _attack_gradient(inner, x_i, loss)
        with batchnorm_branch(encoder, "main"):
            z_i = _encode(encoder, x_i)
    else:
        # The graph of the clean forward serves twice: for the attack, then for training.
        with batchnorm_branch(encoder, "main"), torch.enable_grad():
            start = leaf(x_i).requires_grad_()
            z_i = _encode(encoder, start)
            _backward_to_input(encoder, z_i, start, loss, retain_graph=True)
        assert start.grad is not None
        grad = start.grad
    x_adv = sign_step(leaf(x_i), grad, x_i, eps, eps, bounds)
    with batchnorm_branch(encoder, "main"):
        z_j = _encode(encoder, x_j)
    clean_loss = loss(z_i, z_j)
    if z_i.requires_grad and torch.is_grad_enabled() and not clean_loss.requires_grad:
        raise ValueError("loss must depend on the embeddings, got one without a gradient")
    with batchnorm_branch(encoder, "aux"):
        z_adv = _encode(encoder, x_adv)
    adversarial_loss = loss(z_i, z_adv)
    total = clean_loss + alpha * adversarial_loss
    return CLAEOutput(total, clean_loss, adversarial_loss, x_adv)


def _attack_gradient(
    encoder: nn.Module, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`d/dx' L(f_aux(x), f_aux(x'))` at x' = x, from one forward: both branches are equal there."""
    layers = aux_layers(encoder)
    before = running_statistics(layers)
    with batchnorm_branch(encoder, "aux"), frozen(encoder), torch.enable_grad():
        start = leaf(x).requires_grad_()
        _backward_to_input(encoder, _encode(encoder, start), start, loss)
    replay_aux(before, layers)  # the published attack runs two such forwards
    assert start.grad is not None
    return start.grad


def _backward_to_input(
    encoder: nn.Module,
    z: Tensor,
    x: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    retain_graph: bool = False,
) -> None:
    """Fill `x.grad` with the gradient of `loss(z as a constant, z)`, up to a positive factor."""
    if not z.requires_grad:
        raise ValueError("encoder's output must depend on its input, got one without a gradient")
    anchor = z.detach()
    _, (_, dz) = value_and_grad(loss, argnums=1)(anchor, anchor)
    assert dz is not None
    half = any(v.dtype in (torch.float16, torch.bfloat16) for v in (x, z))
    if half or torch.is_autocast_enabled(z.device.type):
        # Only signs matter: a largest entry near 1 keeps small ones from becoming 0.
        dz = dz.float()
        dz = torch.ldexp(dz, -torch.frexp(_largest(encoder, dz)).exponent)
    # backward and not autograd.grad: the latter raises under FlopCounterMode
    torch.autograd.backward(z, dz.to(z.dtype), inputs=[x], retain_graph=retain_graph)
    if x.grad is None:
        raise ValueError("encoder's output must depend on its input, got one that does not")


def _largest(encoder: nn.Module, dz: Tensor) -> Tensor:
    """The largest |dz|, of all processes whose gradients a SyncBatchNorm adds up: one factor."""
    largest = dz.abs().amax() if dz.numel() else dz.new_zeros(())
    for group in synchronizing_groups(encoder):
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return largest


def _encode(encoder: nn.Module, x: Tensor) -> Tensor:
    z = encoder(x)
    if not isinstance(z, Tensor):
        raise TypeError(f"encoder must return a tensor (B, D), got {type(z).__name__}")
    return z


def unwrapped(encoder: nn.Module) -> nn.Module:
    """The module to attack: DDP would wait for weight gradients that are not computed."""
    original = getattr(encoder, "_orig_mod", encoder)  # of torch.compile
    if isinstance(original, DistributedDataParallel):
        return original.module
    return encoder
