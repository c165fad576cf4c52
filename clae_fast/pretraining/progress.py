"""Loss, images/s and time left: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

MAX_LINES = 10  # of a run whose stderr is a file or a pipe


class Progress(Protocol):
    """Told of every batch and every epoch; epochs count from 0."""

    def update(self, epoch: int, num_images: int, loss: float) -> None: ...
    def end_epoch(self, epoch: int, mean_loss: float) -> None: ...


class Silent:
    def update(self, epoch: int, num_images: int, loss: float) -> None: ...
    def end_epoch(self, epoch: int, mean_loss: float) -> None: ...


class Bar:
    """tqdm over all images of the run; it keeps the rate and the time left."""

    def __init__(self, epochs: int, num_images: int, done: int) -> None:
        from tqdm import tqdm

        self.epochs = epochs
        self.tqdm = tqdm(
            total=epochs * num_images,
            initial=done,
            unit=" images",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {rate_fmt}, {remaining} left{postfix}",
        )

    def update(self, epoch: int, num_images: int, loss: float) -> None:
        self.tqdm.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        if loss == loss:  # NaN: not read from the device yet
            self.tqdm.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.tqdm.update(num_images)

    def end_epoch(self, epoch: int, mean_loss: float) -> None: ...


class Lines:
    """At most MAX_LINES lines over the whole run, the last epoch always among them."""

    def __init__(self, epochs: int, num_images: int, done: int) -> None:
        self.before = done
        self.epochs, self.num_images = epochs, num_images
        self.every = -(-epochs // MAX_LINES)
        self.start = time.perf_counter()

    def update(self, epoch: int, num_images: int, loss: float) -> None: ...

    def end_epoch(self, epoch: int, mean_loss: float) -> None:
        done = epoch + 1
        if (self.epochs - done) % self.every:
            return
        elapsed = time.perf_counter() - self.start
        rate = (done * self.num_images - self.before) / elapsed
        left = (self.epochs - done) * self.num_images / rate
        print(
            f"epoch {done}/{self.epochs}  loss {mean_loss:.4f}  {rate:,.0f} images/s  "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def open_progress(
    epochs: int, num_images: int, *, shown: bool, done: int = 0
) -> Iterator[Progress]:
    """The display that fits stderr; a bar is closed at the end, also on an error or Ctrl-C.

    `done` images of the epochs * num_images were seen before: a resumed run.
    """
    if not shown:
        yield Silent()
    elif sys.stderr.isatty():
        bar = Bar(epochs, num_images, done)
        try:
            yield bar
        finally:
            bar.tqdm.close()
    else:
        yield Lines(epochs, num_images, done)
