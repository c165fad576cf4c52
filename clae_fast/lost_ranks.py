"""Who is missing when an exchange between ranks fails: signs of life in the group's store.

A rank that waits for more than a second leaves a sign; so does one that saw a failure. Whoever has
left none when the time is over is named: it ended, is stuck, or still at other work.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

NOTICE = 1.0  # seconds of waiting before a rank leaves a sign
GRACE = 5.0  # seconds in which the others can leave theirs, once one of them saw a failure
_PREFIX = "clae_fast/waits/"


class LostRankError(RuntimeError):
    """An exchange that not every rank of a group took part in."""


class Signs:
    """The signs of a group's ranks for their meetings, which all of them count alike."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.count = 0
        self.left = False

    def leave(self) -> None:
        """Leave a sign; does not wait, as the store may be a rank that is stopped."""
        self.left, count = True, self.count
        threading.Thread(target=self._set, args=(count,), daemon=True).start()

    def _set(self, count: int) -> None:
        with contextlib.suppress(RuntimeError):
            self._store().set(f"{_PREFIX}{self.rank}", str(count))

    def take_back(self) -> None:
        """What this rank waited for came: an old sign must not stand for a later meeting."""
        if self.left:
            self.left = False
            threading.Thread(target=self._delete, daemon=True).start()

    def _delete(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store().delete_key(f"{_PREFIX}{self.rank}")

    def missing(self, grace: float) -> list[int] | None:
        """Ranks without a sign for this meeting within `grace` seconds; None: nobody can tell."""
        self.leave()
        deadline = time.monotonic() + grace
        answer: list[int] | None = None
        while True:
            left = deadline - time.monotonic()
            asked = _within(max(left, 0.5), self._ask)
            if asked is None:
                return answer
            answer = asked
            if not answer or time.monotonic() >= deadline:
                return answer
            time.sleep(0.1)

    def _ask(self) -> list[int]:
        store = self._store()
        found = []
        for rank in range(self.size):
            key = f"{_PREFIX}{rank}"
            if rank != self.rank and not (store.check([key]) and int(store.get(key)) >= self.count):
                found.append(rank)
        return found

    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self.group)


def _within(seconds: float, ask: Callable[[], list[int]]) -> list[int] | None:
    """What `ask` returns, None where it fails or is not back in time."""
    answers: list[list[int]] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
