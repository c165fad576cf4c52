"""What the processes of test_group_failures.py do: the wrong thing on one rank."""

import os
import time
from unittest import mock

import torch

from clae_fast import info_nce_loss, nt_xent_loss, uel_loss
from clae_fast.process_group import Group


def embeddings(D=16, dtype=torch.float32):
    return [torch.randn(4, D).to(dtype).requires_grad_() for _ in range(2)]


def differ(rank, kind):
    """Rank 1 calls something else than the others."""
    other = rank == 1
    if kind == "width":
        return nt_xent_loss(*embeddings(24 if other else 16), group="world")
    if kind == "dtype":
        dtype = torch.float64 if other else torch.float32
        return nt_xent_loss(*embeddings(dtype=dtype), group="world")
    if kind == "temperature":
        return nt_xent_loss(*embeddings(), temperature=0.2 if other else 0.1, group="world")
    if kind == "reduction":
        return nt_xent_loss(*embeddings(), reduction="sum" if other else "mean", group="world")
    if kind == "normalize":
        return nt_xent_loss(*embeddings(), normalize=not other, group="world")
    if kind == "exchange":
        return nt_xent_loss(*embeddings(), exchange="ring" if other else "gather", group="world")
    if kind == "loss":
        return info_nce_loss(*embeddings(), symmetric=other, group="world")
    if kind == "weight":
        return uel_loss(*embeddings(), negative_weight=2.0 if other else 1.0, group="world")
    assert kind == "queue"
    queue = torch.randn(7 if other else 5, 16)
    return info_nce_loss(*embeddings(), queue, group="world")


def ends_before(rank, victim):
    """The victim's process is gone when the others call."""
    nt_xent_loss(*embeddings(), group="world").backward()
    if rank == victim:
        os._exit(1)
    start = time.monotonic()
    try:
        nt_xent_loss(*embeddings(), group="world")
    except RuntimeError as error:
        time.sleep(1)  # the others still wait for this process's sign
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0


def ends_within(rank, victim):
    """The victim's process ends between two hops of the ring."""
    pass_on, hops = Group.pass_on, []

    def dying(self, *args):
        hops.append(1)
        if rank == victim and len(hops) == 2:
            os._exit(1)
        return pass_on(self, *args)

    with mock.patch.object(Group, "pass_on", dying):
        try:
            nt_xent_loss(*embeddings(), group="world", exchange="ring")
        except RuntimeError as error:
            time.sleep(1)
            return str(error)
    return "nothing was raised"


def is_stuck(rank, victim, seconds):
    """The victim does something else for longer than the group's timeout."""
    if rank == victim:
        time.sleep(seconds)
        return "was away", 0.0
    start = time.monotonic()
    try:
        nt_xent_loss(*embeddings(), group="world")
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0


def raises_alone(rank, victim):
    """The victim's own input is wrong; the others must not wait for ever."""
    z = embeddings()
    if rank == victim:
        z[1] = z[1][:3]
    start = time.monotonic()
    try:
        nt_xent_loss(*z, group="world")
    except (RuntimeError, ValueError) as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0
