"""What a run gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import PretrainConfig
from .encoders import ContrastiveModel


@dataclass(frozen=True)
class Examples:
    """A few images of the last epoch's first step, each (n, C, H, W), pixels scaled to [0, 1]."""

    x_i: torch.Tensor
    x_j: torch.Tensor
    x_adv: torch.Tensor


@dataclass(frozen=True)
class PretrainResult:
    """What a run gives.

    `data` is the data set's name. `encoder` is an ordinary model (main BatchNorm) in eval mode,
    on the CPU. `epoch_losses` are means over the images. `examples` is None without CLAE. The kNN
    accuracies are of h on the test split, None where the images have no labels; `knn_history`
    holds (epoch, accuracy) as often as `knn_every` asks.
    """

    config: PretrainConfig
    data: str
    encoder: ContrastiveModel
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch_losses: tuple[float, ...]
    knn_pixels: float | None
    knn_untrained: float | None
    knn_trained: float | None
    knn_history: tuple[tuple[int, float], ...]
    train_seconds: float
    images_per_second: float
    examples: Examples | None

    @property
    def best_knn(self) -> tuple[int, float] | None:
        """(epoch, accuracy) of the best in `knn_history`: chosen on the test images."""
        return max(self.knn_history, key=lambda pair: pair[1], default=None)
