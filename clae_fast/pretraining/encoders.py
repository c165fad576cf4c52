"""A residual encoder for 28 x 28 to 32 x 32 images that two CPU cores train in a minute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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


class ResidualEncoder(nn.Module):
    """h = encode(x), the representation to keep; z = forward(x) = projector(h), for the loss.

    A stem that halves the image and three residual blocks of `width`, 2 and 4 times `width`
    channels, then the mean over each quarter of the image: where a stroke lies tells digits
    apart. The projector is an MLP without BatchNorm, so a batch of one image trains too.

    Args:
        in_channels: of the images.
        width: channels of the first block; h has 16 * width.
        hidden: width of the projector's hidden layer.
        projection: width of z.
    """

    def __init__(
        self, in_channels: int = 1, width: int = 16, hidden: int = 128, projection: int = 64
    ) -> None:
        super().__init__()
        features = 4 * width * 4
        self.backbone = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, projection)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) normalised images -> h (B, 16 * width)."""
        h: torch.Tensor = self.backbone(x)
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) normalised images -> z (B, projection), not yet of unit length."""
        z: torch.Tensor = self.projector(self.encode(x))
        return z
