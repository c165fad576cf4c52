"""Two random views of each image, by torchvision's v2 transforms.

A v2 transform draws one set of parameters per call, so it is called once per image; a worker
process hides that behind the training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

Transform = Callable[[torch.Tensor], torch.Tensor]
Batch = tuple[torch.Tensor, int]  # indices (B,), seed of their views
Views = tuple[torch.Tensor, torch.Tensor]


def digit_transform(size: int) -> Transform:
    """Crop, small affine, brightness and contrast: one view (C, size, size) of a [0, 1] image.

    No flip: a mirrored digit is another shape.
    """
    return v2.Compose(
        [
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


class TwoViews(Dataset[Views]):
    """Maps (indices (B,), seed) to two batches of normalised views (B, C, H, W).

    Each image of each view has its own parameters. The views are a function of the indices and
    the seed alone: the same in this process and in any worker; the caller's random state is
    left alone.

    Args:
        images: (N, C, H, W) uint8.
        mean, std: per channel, of pixels scaled to [0, 1].
        transform: one [0, 1] image (C, H, W) to one random view in [0, 1].
    """

    def __init__(
        self,
        images: torch.Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        transform: Transform,
    ) -> None:
        self.images = images
        self.transform = transform
        self.normalize = v2.Normalize(list(mean), list(std))

    def __getitem__(self, batch: Batch) -> Views:
        indices, seed = batch
        images = self.images[indices].float() / 255
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # v2 draws from it
            x_i, x_j = (torch.stack([self.transform(x) for x in images]) for _ in range(2))
        return self.normalize(x_i), self.normalize(x_j)


class ShuffledBatches(Sampler[Batch]):
    """A fresh order and fresh view seeds at each iteration; the last batch may be shorter.

    Args:
        num_images: images in the data set.
        batch_size: images in a batch.
        generator: the source of order and seeds; advances by one epoch per iteration.
    """

    def __init__(self, num_images: int, batch_size: int, generator: torch.Generator) -> None:
        self.num_images, self.batch_size, self.generator = num_images, batch_size, generator

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(self.num_images, generator=self.generator)
        seeds = torch.randint(2**62, (len(self),), generator=self.generator)
        yield from zip(order.split(self.batch_size), seeds.tolist(), strict=True)


def view_loader(
    views: TwoViews, batch_size: int, generator: torch.Generator, workers: int
) -> DataLoader[Views]:
    """Iterates over one epoch of (x_i, x_j) at a time; workers stay between epochs."""
    return DataLoader(
        views,
        batch_size=None,  # the sampler makes the batches, each with its seed
        sampler=ShuffledBatches(len(views.images), batch_size, generator),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
