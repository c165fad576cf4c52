"""Random views by torchvision's v2 transforms, as published per method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torchvision.transforms import v2

from .config import GREY_DIGITS, PretrainConfig

if TYPE_CHECKING:
    from .data import ImageData

Transform = Callable[[torch.Tensor], torch.Tensor]


def digit_transform(size: int) -> Transform:
    """Crop, small affine, brightness and contrast: one view (C, size, size) of a [0, 1] image.

    No flip: a mirrored digit is another shape. Images of another size are resized first.
    """
    return v2.Compose(
        [
            v2.Resize(size, antialias=True),
            v2.RandomAffine(
                degrees=15,
                scale=(0.8, 1.2),
                shear=15,
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.RandomCrop(size, padding=size // 12),
            # Without it the brightness of the strokes alone tells the images apart.
            v2.ColorJitter(brightness=0.7, contrast=0.7),
        ]
    )


def instance_transform(size: int) -> Transform:
    """One view (C, size, size) of a [0, 1] image, as CLAE trains Plain and UEL.

    Crop of 20 to 100 % of the area, jitter of 0.4 in brightness, contrast, saturation and hue,
    grey with probability 0.2, flip. Source: the published code of CLAE, `Plain/main.py`.
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomGrayscale(0.2),
            v2.RandomHorizontalFlip(),
        ]
    )


def simclr_transform(size: int) -> Transform:
    """One view (C, size, size) of a [0, 1] image, as CLAE trains SimCLR: no blur.

    Crop of 8 to 100 % of the area, flip, with probability 0.8 a jitter of 0.8 in brightness,
    contrast and saturation and 0.2 in hue, grey with probability 0.2. Source: Chen et al. 2020,
    appendix A, at strength 1; the published code of CLAE.
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
    )


_TRANSFORMS = {
    "digits": digit_transform,
    "instance": instance_transform,
    "simclr": simclr_transform,
}


def build_transform(config: PretrainConfig, size: int) -> Transform:
    """The transform that the settings name, for views of that size."""
    name = config.augmentation
    if name == "auto":
        if config.data in GREY_DIGITS:
            name = "digits"
        else:
            name = "simclr" if config.method == "simclr" else "instance"
    return _TRANSFORMS[name](size)


def normalization(
    config: PretrainConfig, data: ImageData
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels scaled to [0, 1]."""
    if config.normalization == "half":
        half = (0.5,) * len(data.mean)
        return half, half
    return data.mean, data.std


def view_size(config: PretrainConfig, data: ImageData) -> int:
    """Side of the views in pixels: as set, else that of the images, 224 where they differ."""
    if config.image_size is not None:
        return config.image_size
    if data.size is not None:
        return data.size
    images = data.train_images
    return images.shape[-1] if isinstance(images, torch.Tensor) and config.data != "folder" else 224
