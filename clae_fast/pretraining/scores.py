"""The kNN accuracies of a run."""

from __future__ import annotations

import torch

from .config import PretrainConfig
from .data import ImageData
from .encoders import ContrastiveModel
from .monitor import NonFiniteLossError, cause
from .probe import encode_images, pixel_features, weighted_knn


def encoder_accuracy(
    encoder: ContrastiveModel,
    config: PretrainConfig,
    data: ImageData,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int,
    device: torch.device,
) -> float | None:
    """Weighted kNN accuracy of h on the test split; None where the images have no labels.

    Raises:
        NonFiniteLossError: features that are not finite.
    """
    if data.train_labels is None or data.test_labels is None:
        return None
    train, test = (
        encode_images(encoder, images, mean, std, image_size=image_size, device=device)
        for images in (data.train_images, data.test_images)
    )
    try:
        return weighted_knn(train, data.train_labels, test, data.test_labels)
    except ValueError as error:  # weights so large that the features overflow
        raise NonFiniteLossError(
            f"the trained encoder's {error}: {cause(encoder, config)}"
        ) from error


def pixel_accuracy(data: ImageData) -> float | None:
    """The same of raw pixels."""
    if data.train_labels is None or data.test_labels is None:
        return None
    return weighted_knn(
        pixel_features(data.train_images),
        data.train_labels,
        pixel_features(data.test_images),
        data.test_labels,
    )
