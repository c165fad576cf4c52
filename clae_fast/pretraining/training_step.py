"""One training step of any kind: forward, attack, backward; the gradients are in `.grad`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from clae_fast import GraphedAttack, InfoNCELoss, NTXentLoss, UELLoss, clae_step
from clae_fast.backends import requested

from .accumulate import accumulated_step, check_independent
from .config import ConfigError, PretrainConfig
from .processes import Processes
from .published import published_step
from .wrapping import data_parallel

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOSSES: dict[str, type[nn.Module]] = {
    "simclr": NTXentLoss,
    "plain": InfoNCELoss,
    "uel": UELLoss,
}


class StepResult(NamedTuple):
    """Detached: the loss that was minimised, its two parts, and the attacked images."""

    loss: torch.Tensor
    clean_loss: torch.Tensor
    adversarial_loss: torch.Tensor | None
    x_adv: torch.Tensor | None


def make_loss(
    config: PretrainConfig,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> nn.Module:
    """The loss of the method, tried once so that a backend that cannot run is named at the start.

    Of several processes it is the loss of all their embeddings.

    Raises:
        ConfigError: the backend cannot run the loss here.
    """
    backend = None if config.backend == "auto" else config.backend
    try:
        forced = requested(None)
    except ValueError as error:
        raise ConfigError("backend", config.backend, f"no other setting in its way: {error}") from (
            error
        )
    try:
        options: dict[str, Any] = {"temperature": config.loss_temperature, "backend": backend}
        if processes is not None and processes.group is not None:
            options["group"] = processes.group
        loss = _LOSSES[config.method](**options)
        z = torch.eye(4, device=device)
        loss(z, z)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        value = config.backend
        if backend is None and forced != "auto":
            value = f"auto, which CLAE_FAST_BACKEND or use_backend makes {forced}"
        raise ConfigError("backend", value, f"one that can run here ({reason})") from error
    return loss


class TrainingStep:
    """`step(x_i, x_j)` computes the loss of a batch and the gradients of the weights.

    Args:
        config: method, attack, precision, accumulation, compilation.
        encoder: in training mode, on `device`, with DualBatchNorm where CLAE is on.
        loss: of `make_loss`.
        mean, std: per channel: what turns pixel units into normalised ones.
        image: (C, H, W) of a view.
        device: of the encoder.
        processes: of the run; several average the gradients.

    Raises:
        ConfigError: accumulation with an encoder for which it is not exact; a CUDA graph without a
            GPU.
    """

    def __init__(
        self,
        config: PretrainConfig,
        encoder: nn.Module,
        loss: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image: torch.Size,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.loss, self.device = config, loss, device
        self.dtype = _DTYPES[config.precision]
        # Scaling keeps small float16 gradients from becoming 0; elsewhere it does nothing.
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.dtype is torch.float16, init_scale=2.0**12
        )
        if config.accumulate > 1:
            check_independent(encoder, image, config.accumulate)
        self.encoder = data_parallel(encoder, processes or Processes())
        if config.cuda_graph and device.type != "cuda":
            raise ConfigError("cuda_graph", True, f"a GPU, and the run is on {device}")
        self.attack = GraphedAttack() if config.cuda_graph else config.attack
        if config.compile:
            self.encoder = cast("nn.Module", torch.compile(self.encoder))
        m, s = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.eps: float | torch.Tensor
        if config.eps_pixels is not None:
            self.eps = config.eps_pixels / s
        else:
            assert config.eps_normalized is not None
            self.eps = config.eps_normalized
        self.bounds = ((0 - m) / s, (1 - m) / s) if config.clamp else None

    def __call__(self, x_i: torch.Tensor, x_j: torch.Tensor) -> StepResult:
        """Views (B, C, H, W) on the device. Adds to `.grad`, scaled by `self.scaler`."""
        config = self.config
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            if config.accumulate > 1:
                return self._in_parts(x_i, x_j)
            if not config.clae:
                total = self.loss(self.encoder(x_i), self.encoder(x_j))
                result = StepResult(total.detach(), total.detach(), None, None)
            else:
                if config.attack == "published":
                    out = published_step(
                        self.encoder,
                        x_i,
                        x_j,
                        self.loss,
                        self.eps,
                        config.alpha,
                        plain=config.method == "plain",
                        bounds=self.bounds,
                    )
                else:
                    out = clae_step(
                        self.encoder,
                        x_i,
                        x_j,
                        loss=self.loss,
                        eps=self.eps,
                        alpha=config.alpha,
                        attack=self.attack,
                        bounds=self.bounds,
                    )
                total = out.loss
                result = StepResult(
                    total.detach(),
                    out.clean_loss.detach(),
                    out.adversarial_loss.detach(),
                    out.x_adv,
                )
        self.scaler.scale(total).backward()
        return result

    def _in_parts(self, x_i: torch.Tensor, x_j: torch.Tensor) -> StepResult:
        config = self.config
        out = accumulated_step(
            self.encoder,
            x_i,
            x_j,
            self.loss,
            part_size=-(-len(x_i) // config.accumulate),
            clae=config.clae,
            eps=self.eps,
            alpha=config.alpha,
            bounds=self.bounds,
            scale=self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
        )
        if not config.clae:
            return StepResult(out.loss, out.clean_loss, None, None)
        return StepResult(*out)

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Apply the gradients; with float16 a step whose gradients overflowed is left out.

        Returns:
            False when so many were left out in a row that the scale (halved each time) fell below
            1: the gradients themselves are not finite.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        return not self.scaler.is_enabled() or self.scaler.get_scale() >= 1
