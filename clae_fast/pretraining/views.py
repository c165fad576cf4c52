"""Two random views of each image, in an order and with seeds that (seed, epoch, step) fix.

Of several processes each makes the views of its part of the batch. With a seed for each image the
others' need not be drawn for that; with one for the batch, the stream of one process, they must.

A v2 transform draws one set of parameters per call, so it is called once per image; a worker
process hides that behind the training step.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from .augmentation import Transform
from .config import ConfigError
from .processes import Processes

Batch = tuple[torch.Tensor, int]  # indices (B,), seed of their views
Views = tuple[torch.Tensor, torch.Tensor]


class TwoViews(Dataset[Views]):
    """Maps (indices (B,), seed) to two batches of normalised views (B, C, H, W).

    Each image of each view has its own parameters. The views are a function of the indices and
    the seed alone: the same in this process and in any worker; the caller's random state is
    left alone. With `per_image` an image's views depend on the seed and its place in the batch
    only. Of several `processes` each gets its part of the batch.

    Args:
        images: (N, C, H, W) uint8, or a sequence of (C, H, W) uint8 images of any size.
        mean, std: per channel, of pixels scaled to [0, 1].
        transform: one [0, 1] image (C, H, W) to one random view in [0, 1].
        per_image: a seed for each image instead of one for the batch.
        processes: of the run.
    """

    def __init__(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        transform: Transform,
        *,
        per_image: bool = False,
        processes: Processes | None = None,
    ) -> None:
        processes = processes or Processes()
        self.images = images
        self.transform = transform
        self.per_image = per_image
        self.rank, self.size = processes.rank, processes.size  # without what no worker can have
        self.normalize = v2.Normalize(list(mean), list(std))

    def __getitem__(self, batch: Batch) -> Views:
        indices, seed = batch
        part = Processes(self.rank, self.size).share(len(indices))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # v2 draws from it
            if self.per_image:
                seeds = torch.randint(2**62, (len(indices),))[part].tolist()
                x_i, x_j = self._one_by_one(self._decoded(indices[part]), seeds)
            else:
                images = self._decoded(indices)
                x_i, x_j = (torch.stack([self.transform(x) for x in images]) for _ in range(2))
                x_i, x_j = x_i[part], x_j[part]
        return self.normalize(x_i), self.normalize(x_j)

    def _decoded(self, indices: torch.Tensor) -> list[torch.Tensor]:
        return [self.images[i].float() / 255 for i in indices.tolist()]

    def _one_by_one(self, images: list[torch.Tensor], seeds: list[int]) -> Views:
        pairs = []
        for image, seed in zip(images, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            pairs.append([self.transform(image) for _ in range(2)])
        x_i, x_j = (torch.stack(views) for views in zip(*pairs, strict=True))
        return x_i, x_j


class EpochBatches(Sampler[Batch]):
    """The batches of one epoch: order and view seeds follow from (seed, epoch) alone.

    Args:
        num_images: images in the data set.
        batch_size: images in a batch.
        seed: of the run.
        drop_last: leave out a last batch that is shorter (unless it is the only one).

    `epoch` and `skip`, the number of batches left out at the start, are set between iterations.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, drop_last: bool = False
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.drop_last = drop_last
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole, rest = divmod(self.num_images, self.batch_size)
        return max(1, whole + (rest > 0 and not self.drop_last))

    def size_of(self, step: int) -> int:
        """Images in the batch of that step of an epoch, from 0."""
        return min(self.batch_size, self.num_images - step * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        seeds = torch.randint(2**62, (len(self),), generator=generator).tolist()
        batches = order.split(self.batch_size)[: len(self)]
        yield from list(zip(batches, seeds, strict=True))[self.skip :]


def check_shares(batches: EpochBatches, processes: Processes) -> None:
    """Every process must have an image of every batch.

    Raises:
        ConfigError: naming the batch size.
    """
    smallest = min(batches.size_of(0), batches.size_of(len(batches) - 1))
    if smallest < processes.size:
        raise ConfigError(
            "batch_size",
            batches.batch_size,
            f"one that leaves an image of every batch to each of {processes.size} processes (the "
            f"smallest of {batches.num_images} images has {smallest}), or drop_last",
        )


def _mix(seed: int, epoch: int) -> int:
    """One generator seed for (seed, epoch); neighbours give unrelated streams."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**62, (epoch + 1,), generator=generator)[epoch])


def view_loader(
    views: TwoViews, batches: EpochBatches, workers: int, *, pin_memory: bool = False
) -> DataLoader[Views]:
    """Iterates over one epoch of (x_i, x_j) at a time; workers stay between epochs."""
    return DataLoader(
        views,
        batch_size=None,  # the sampler makes the batches, each with its seed
        sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # else the loader draws from the global one
    )


def _quiet_worker(worker: int) -> None:
    """Ctrl-C and SIGTERM, which go to the whole group, are the main process's to answer; what its
    end breaks in here is no news. A worker ends when the main process does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_the_other_end_went(sys.excepthook)


def _unless_the_other_end_went(
    hook: Callable[[type[BaseException], BaseException, TracebackType | None], object],
) -> Callable[[type[BaseException], BaseException, TracebackType | None], object]:
    def quiet(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            hook(kind, error, where)

    return quiet
