"""Encoders by name, and the projector that the loss sees them through."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import ConfigError, PretrainConfig


class ContrastiveModel(nn.Module):
    """h = encode(x), the representation to keep; z = forward(x) = projector(h), for the loss.

    Args:
        backbone: (B, C, H, W) normalised images -> h (B, F).
        projector: h (B, F) -> z (B, D), not yet of unit length.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) normalised images -> h (B, F)."""
        h: torch.Tensor = self.backbone(x)
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) normalised images -> z (B, D), not yet of unit length."""
        z: torch.Tensor = self.projector(self.encode(x))
        return z


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut: (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual_backbone(in_channels: int, width: int) -> nn.Sequential:
    """A stem that halves the image and three residual blocks of `width`, 2 and 4 times `width`
    channels, then the mean over each quarter of the image: where a stroke lies tells digits
    apart. (B, C, H, W) -> (B, 16 * width)."""
    backbone = nn.Sequential(
        nn.Conv2d(in_channels, width, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def mlp(features: int, hidden: int, projection: int) -> nn.Sequential:
    """Without BatchNorm, so a batch of one image trains too."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, projection))


class ResidualEncoder(ContrastiveModel):
    """The encoder "small": for 28 x 28 to 32 x 32 images, trained in a minute by two CPU cores.

    Args:
        in_channels: of the images.
        width: channels of the first block; h has 16 * width.
        hidden: width of the projector's hidden layer.
        projection: width of z.
    """

    def __init__(
        self, in_channels: int = 1, width: int = 16, hidden: int = 128, projection: int = 64
    ) -> None:
        super().__init__(residual_backbone(in_channels, width), mlp(16 * width, hidden, projection))


def resnet18_cifar(in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 with a 3 x 3 stem of stride 1 and no pooling after it: h (B, 512).

    Its convolutions start as `nn.Conv2d` does, as published for 32 x 32 images.

    Source: He et al. 2016, section 4.2, for the stem; CLAE's encoder for 32 x 32 images.
    """
    from torchvision.models import resnet18

    net: nn.Module = resnet18(weights=None)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return net


def torchvision_resnets() -> tuple[str, ...]:
    """Names of the ResNets that this torchvision has."""
    from torchvision import models

    kinds = ("resnet", "resnext", "wide_resnet")
    return tuple(name for name in models.list_models(module=models) if name.startswith(kinds))


def build_encoder(config: PretrainConfig, in_channels: int, image_size: int) -> ContrastiveModel:
    """The model that the settings name, with fresh weights from the global random state.

    Args:
        config: its `encoder`, `projector`, `hidden` and `projection` count.
        in_channels: of the images.
        image_size: side of the images, for the width of a user's encoder.

    Raises:
        ConfigError: an unknown name, a function that cannot be imported or does not return an
            encoder.
    """
    if config.encoder == "small":
        backbone: nn.Module = residual_backbone(in_channels, 16)
    elif config.encoder == "resnet18-cifar":
        backbone = resnet18_cifar(in_channels)
    elif ":" in config.encoder:
        backbone = _of_the_user(config.encoder)
    else:
        backbone = _of_torchvision(config.encoder, in_channels)
    features = _feature_width(config, backbone, in_channels, image_size)
    return ContrastiveModel(backbone, _projector(config, features))


def _projector(config: PretrainConfig, features: int) -> nn.Module:
    if config.projector == "none":
        return nn.Identity()
    if config.projector == "linear":
        return nn.Linear(features, config.projection)
    default = 128 if config.encoder == "small" else features
    return mlp(features, default if config.hidden is None else config.hidden, config.projection)


def _of_torchvision(name: str, in_channels: int) -> nn.Module:
    from torchvision import models

    known = torchvision_resnets()
    if name not in known:
        raise ConfigError(
            "encoder",
            name,
            "small, resnet18-cifar, module:function or one of torchvision's " + ", ".join(known),
        )
    net: nn.Module = models.get_model(name, weights=None)
    net.fc = nn.Identity()
    if in_channels != 3:
        conv1: Any = net.conv1
        net.conv1 = nn.Conv2d(
            in_channels, 64, conv1.kernel_size, conv1.stride, conv1.padding, bias=False
        )
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def _of_the_user(name: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # an installed command does not look there, `python -m` does
        sys.path.append(here)
    try:
        make: Callable[[], object] = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError("encoder", name, f"a function that imports ({reason})") from error
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "encoder", name, f"a function that is called without arguments ({error})"
        ) from error
    backbone = make()
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            "encoder", name, f"a function that returns an nn.Module, got {type(backbone).__name__}"
        )
    return backbone


@torch.no_grad()
def _feature_width(
    config: PretrainConfig, backbone: nn.Module, in_channels: int, image_size: int
) -> int:
    was_training = backbone.training
    backbone.eval()
    try:
        h = backbone(torch.zeros(2, in_channels, image_size, image_size))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            "encoder",
            config.encoder,
            f"one that takes images of {in_channels} x {image_size} x {image_size} ({error})",
        ) from error
    finally:
        backbone.train(was_training)
    if not isinstance(h, torch.Tensor) or h.dim() != 2 or len(h) != 2:
        got = tuple(h.shape) if isinstance(h, torch.Tensor) else type(h).__name__
        raise ConfigError("encoder", config.encoder, f"features (B, F) of images, got {got}")
    return h.shape[1]
