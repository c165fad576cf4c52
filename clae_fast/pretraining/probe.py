"""Weighted k-nearest-neighbour evaluation of frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .encoders import ResidualEncoder


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) uint8 -> (N, C*H*W) float32 in [0, 1]: the baseline that learns nothing."""
    return images.flatten(1).float() / 255


@torch.no_grad()
def encode_images(
    encoder: ResidualEncoder,
    images: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    batch_size: int = 500,
) -> torch.Tensor:
    """Features h (N, F) of all images in eval mode, main BatchNorm; the mode is restored.

    Args:
        encoder: anything with `encode`: (B, C, H, W) normalised -> (B, F).
        images: (N, C, H, W) uint8.
        mean, std: per channel, of pixels scaled to [0, 1].
        batch_size: images in one forward; bounds the memory, not the result.
    """
    shift, scale = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    was_training = encoder.training
    encoder.eval()
    try:
        return torch.cat(
            [encoder.encode((x.float() / 255 - shift) / scale) for x in images.split(batch_size)]
        )
    finally:
        encoder.train(was_training)


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
        ValueError: features that are not finite, or lengths that do not match.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", section 3.4; k = 200 and sigma = 0.1 as CLAE evaluates Plain and UEL.
    """
    for what, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if len(features) != len(labels) or len(labels) == 0:
            raise ValueError(
                f"{what}_features and {what}_labels: expected the same length, at least 1, "
                f"got {len(features)} and {len(labels)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"{what}_labels: expected torch.int64, got {labels.dtype}")
        if not torch.isfinite(features).all():
            raise ValueError(f"{what}_features: expected finite numbers, got NaN or Inf")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    bank = F.normalize(train_features, dim=1)
    num_classes = int(train_labels.max()) + 1
    correct = 0
    for queries, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        cosines, nearest = (F.normalize(queries, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        # The largest cosine is 1: subtracting it changes no order and any sigma is safe.
        votes = ((cosines - 1) / sigma).exp()
        scores = votes.new_zeros(len(queries), num_classes)
        scores.scatter_add_(1, train_labels[nearest], votes)
        correct += int((scores.argmax(dim=1) == labels).sum())
    return correct / len(test_labels)
