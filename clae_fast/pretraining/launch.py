"""Which of the processes of a run this one is, as its launcher says. Imports no torch."""

from __future__ import annotations

import os
from typing import NamedTuple

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """One of `size` processes, the first has rank 0; the `local` ones are of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launch() -> Launch:
    """What torchrun (or what sets the variables that it sets) put into the environment."""
    if any(name not in os.environ for name in _NEEDED) or int(os.environ["WORLD_SIZE"]) < 2:
        return Launch()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Launch(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
