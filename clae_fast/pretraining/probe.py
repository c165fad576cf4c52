"""Features of a frozen encoder, and their weighted k-nearest-neighbour accuracy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from .data import Images
from .encoders import ContrastiveModel


def pixel_features(images: Images, size: int = 32) -> torch.Tensor:
    """The baseline that learns nothing: (N, C, H, W) uint8 -> (N, C*h*w) float32 in [0, 1].

    Images larger than `size` x `size`, and those in a list, which may differ in size, are resized
    to that first: N x 12 KiB, however large they are.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    if isinstance(images, torch.Tensor) and max(images.shape[-2:]) <= size:
        return images.flatten(1).float() / 255
    out: torch.Tensor | None = None
    for i, image in enumerate(images):
        small = VF.resize(image, [size, size], antialias=True).flatten()
        if out is None:
            out = torch.empty(len(images), len(small))
        torch.div(small, 255, out=out[i])
    assert out is not None
    return out


def evaluation_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """(C, H, W) -> (C, size, size): nothing drawn by chance.

    An image of that size stays as it is, another square one is resized (as published for Tiny
    ImageNet), any other is resized to 256 / 224 of `size` on its shorter side and cut in its
    middle.
    """
    height, width = image.shape[-2:]
    if height == width:
        return image if height == size else VF.resize(image, [size, size], antialias=True)
    return VF.center_crop(VF.resize(image, [round(size * 256 / 224)], antialias=True), [size, size])


@torch.no_grad()
def encode_both(
    encoder: ContrastiveModel,
    images: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    batch_size: int = 500,
    image_size: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features h (N, F) and z (N, D) of all images, each encoded once, float32 on the CPU.

    In eval mode, main BatchNorm; the mode is restored.

    Args:
        encoder: on `device`.
        images: (N, C, H, W) uint8, or a sequence of (C, H, W) uint8 images of any size; N >= 1.
        mean, std: per channel, of pixels scaled to [0, 1].
        batch_size: images in one forward; bounds the memory, not the result.
        image_size: side of what the encoder sees (see `evaluation_view`); None: as they are.
        device: None: that of the encoder.

    Raises:
        ValueError: no images.
    """
    return _encode(encoder, images, mean, std, batch_size, image_size, device, encoder.projector)


def encode_images(
    encoder: nn.Module,
    images: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    batch_size: int = 500,
    image_size: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Features (N, F) of all images, each encoded once; otherwise as `encode_both`.

    h of an encoder with a method `encode` (the projector is left out), the output of any other.
    """
    return _encode(encoder, images, mean, std, batch_size, image_size, device, None)[0]


@torch.no_grad()
def _encode(
    encoder: nn.Module,
    images: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    image_size: int | None,
    device: torch.device | str | None,
    projector: nn.Module | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    encode = getattr(encoder, "encode", encoder)
    if device is None:
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    normalize = v2.Normalize(list(mean), list(std))
    was_training = encoder.training
    encoder.eval()
    features, projections = [], []
    try:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            if image_size is None:
                x = batch if isinstance(batch, torch.Tensor) else torch.stack(list(batch))
                x = x.to(device).float() / 255
            else:
                views = [evaluation_view(image.float() / 255, image_size) for image in batch]
                x = torch.stack(views).to(device)
            h = encode(normalize(x))
            features.append(h.float().cpu())
            if projector is not None:
                projections.append(projector(h).float().cpu())
    finally:
        encoder.train(was_training)
    return torch.cat(features), torch.cat(projections) if projections else torch.empty(0)


def check_features(what: str, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises a ValueError unless features are (N, F), finite, and labels (N,) int64, N >= 1."""
    if features.dim() != 2 or len(features) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{what}_features and {what}_labels: expected (N, F) and (N,) with N >= 1, got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"{what}_labels: expected torch.int64, got {labels.dtype}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{what}_features: expected finite numbers, got NaN or Inf")


@torch.no_grad()
def weighted_knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 200,
    sigma: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Accuracy of the weighted vote of the k nearest training features.

        score_c = sum over the k nearest n of [y_n = c] exp(cos(q, k_n) / sigma)

    Args:
        train_features: (N, F), the memory bank.
        train_labels: (N,) int64, 0..C-1.
        test_features: (M, F); every one is counted.
        test_labels: (M,) int64.
        k: neighbours; min(k, N) are used.
        sigma: temperature of the vote.
        chunk: test rows at a time: memory is O(chunk * N).

    Raises:
        ValueError: features that are not finite, lengths that do not match, k or sigma that is
            not positive.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", section 3.4; k = 200 and sigma = 0.1 as CLAE evaluates Plain and UEL.
    """
    check_features("train", train_features, train_labels)
    check_features("test", test_features, test_labels)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    if not (isinstance(sigma, (int, float)) and 0 < sigma < math.inf):
        raise ValueError(f"sigma: expected a positive number, got {sigma!r}")
    # Not F.normalize(train_features): a second bank would double the memory.
    inverse = 1 / train_features.norm(dim=1).clamp_min(1e-12)
    num_classes = int(train_labels.max()) + 1
    correct = 0
    for queries, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        cosines = (F.normalize(queries, dim=1) @ train_features.T) * inverse
        cosines, nearest = cosines.topk(min(k, len(inverse)), dim=1)
        # The nearest has vote 1: no order changes, and one is left however small sigma is.
        votes = ((cosines - cosines[:, :1]) / sigma).exp()
        scores = votes.new_zeros(len(queries), num_classes)
        scores.scatter_add_(1, train_labels[nearest], votes)
        correct += int((scores.argmax(dim=1) == labels).sum())
    return correct / len(test_labels)
