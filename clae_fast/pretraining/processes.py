"""The processes of a run: who they are, what they agree on, and which of them speaks.

Every process runs the same code on its share of each batch. What the hosts must agree on (a
signal, a score, an error) goes over groups of their own on the CPU: a prompt one after each step,
and a patient one where the first process may work alone for hours.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clae_fast.lost_ranks import LostRankError

from .config import PretrainConfig
from .launch import launch
from .machine import choose_device

T = TypeVar("T")
PATIENCE = timedelta(days=1)


class OtherProcessError(RuntimeError):
    """Another process of the run failed: which one, and its own message."""


@dataclass(frozen=True)
class Processes:
    """This process has rank `rank` of `size`; one alone agrees with itself."""

    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = None
    prompt: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @property
    def group(self) -> str | None:
        """The `group` of the losses."""
        return "world" if self.size > 1 else None

    @property
    def command(self) -> str:
        """How as many are started again."""
        if self.size == 1:
            return "clae-fast"
        return f"torchrun --nproc-per-node {self.size} -m clae_fast"

    def share(self, count: int) -> slice:
        """This process's part of `count` images; the parts differ by one at most, in order."""
        start, stop = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; none may be far behind."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.prompt)
        return bool(found)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.patient)
        return values

    def together(self, job: Callable[[], T]) -> T:
        """`job()` in every process; where it fails in one, it fails in all.

        Raises:
            OtherProcessError: in the processes where it did not.
        """
        if self.size == 1:
            return job()
        value, failure = _attempt(job)
        self._raise(failure, self.gather(_text(failure)))
        return value  # type: ignore[return-value]

    def first_alone(self, job: Callable[[], T]) -> T:
        """`job()` in the first process, its result (or failure) in all.

        Raises:
            OtherProcessError: in the others, if it failed.
        """
        if self.size == 1:
            return job()
        value, failure = _attempt(job) if self.first else (None, None)
        sent: list[Any] = [_text(failure), value]
        dist.broadcast_object_list(sent, src=0, group=self.patient)
        self._raise(failure, sent[:1])
        return sent[1]

    def _raise(self, own: Exception | None, texts: list[str | None]) -> None:
        """The process's own failure, or the first of the others'."""
        for rank, text in enumerate(texts):
            if text is not None:
                error = own or OtherProcessError(f"process {rank} of {self.size} failed: {text}")
                error.shared = True  # type: ignore[attr-defined]
                raise error


def _attempt(job: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return job(), None
    except Exception as error:  # of whatever kind: the others wait to hear of it
        return None, error


def _text(failure: Exception | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def is_known_to_all(error: BaseException) -> bool:
    """Whether every process raised it or a word of it, so that one may print it."""
    return bool(getattr(error, "shared", False))


def is_loss_of_another(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another process has ended."""
    text = str(error).lower()
    return (
        isinstance(error, (dist.DistError, LostRankError))
        or "gloo" in text
        or "connection closed" in text
    )


@contextlib.contextmanager
def run_processes(config: PretrainConfig) -> Iterator[Processes]:
    """The processes that torchrun started, in a group of gloo (on the CPU) or NCCL.

    A process group that is there already is used as it is; without one and without torchrun the
    run is of this process alone.

    Raises:
        ConfigError: a device that this process cannot have.
    """
    here = launch()
    if not dist.is_available():
        yield Processes()
        return
    ours = here.size > 1 and not dist.is_initialized()
    if ours:
        device = choose_device(config)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Processes()
        return
    patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    prompt: Any = dist.new_group(backend="gloo")
    yield Processes(dist.get_rank(), dist.get_world_size(), patient, prompt)
    # Not after an error: the others may be gone, and NCCL would wait for them.
    dist.barrier(patient)
    gc.collect()  # DDP holds the group as long as it lives
    for group in (None,) if ours else (patient, prompt):
        dist.destroy_process_group(group)
