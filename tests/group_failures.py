"""What the processes of test_group_failures.py do: the wrong thing on one rank."""

import os
import signal
import time
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist

from clae_fast import (
    clip_loss,
    dcl_loss,
    hard_negative_loss,
    info_nce_loss,
    negative_mises_fisher_weights,
    nt_xent_loss,
    siglip_loss,
    uel_loss,
)
from clae_fast.process_group import Group


def embeddings(D=16, dtype=torch.float32):
    return [torch.randn(4, D).to(dtype).requires_grad_() for _ in range(2)]


def differ(rank, kind):
    """Rank 1 calls something else than the others."""
    other = rank == 1
    z = embeddings()
    if kind == "width":
        return nt_xent_loss(*embeddings(24 if other else 16), group="world")
    if kind == "dtype":
        dtype = torch.float64 if other else torch.float32
        return nt_xent_loss(*embeddings(dtype=dtype), group="world")
    if kind == "number or tensor":
        t = torch.tensor(0.1) if other else 0.1
        return nt_xent_loss(*z, temperature=t, group="world")
    if kind == "loss":
        return (uel_loss if other else nt_xent_loss)(*z, group="world")
    if kind == "composed loss":
        return (dcl_loss if other else nt_xent_loss)(*z, group="world")
    if kind == "label_smoothing":  # another way through the code on one rank
        smooth = 0.1 if other else 0.0
        return nt_xent_loss(*z, label_smoothing=smooth, group="world")
    if kind == "ids":
        ids = torch.arange(4) if other else None
        return nt_xent_loss(*z, ids=ids, group="world")
    if kind == "weight_fn":
        weight_fn = negative_mises_fisher_weights(1.5 if other else 0.5)
        return dcl_loss(*z, weight_fn=weight_fn, group="world")
    if kind == "bias":
        return siglip_loss(*z, 10.0, -9.0 if other else -10.0, group="world")
    if kind == "queue":
        queue = torch.randn(7 if other else 5, 16)
        return info_nce_loss(*z, queue, group="world")
    if kind == "backward":  # rank 1 leaves it out and calls again
        loss = nt_xent_loss(*z, reduction="none", group="world").sum()
        if not other:
            return loss.backward()
        return nt_xent_loss(*z, reduction="none", group="world")
    function, name, mine, theirs = OPTIONS[kind]
    return function(*z, **{name: theirs if other else mine}, group="world")


OPTIONS = {
    "temperature": (nt_xent_loss, "temperature", 0.1, 0.2),
    "reduction": (nt_xent_loss, "reduction", "mean", "sum"),
    "normalize": (nt_xent_loss, "normalize", True, False),
    "exchange": (nt_xent_loss, "exchange", "gather", "ring"),
    "symmetric": (info_nce_loss, "symmetric", False, True),
    "negative_weight": (uel_loss, "negative_weight", 1.0, 2.0),
    "uel's reduction": (uel_loss, "reduction", "mean", "sum"),
    "uel's normalize": (uel_loss, "normalize", True, False),
    "dcl's reduction": (dcl_loss, "reduction", "sum", "mean"),
    "dcl's normalize": (dcl_loss, "normalize", True, False),
    "tau_plus": (hard_negative_loss, "tau_plus", 0.1, 0.2),
    "beta": (hard_negative_loss, "beta", 1.0, 0.0),
}


def works_on(rank):
    """After a disagreement the group is whole."""
    return float(nt_xent_loss(*(torch.ones(2, 4) for _ in range(2)), group="world"))


def nobody_has_rows(rank, name):
    loss = {"nt_xent": nt_xent_loss, "uel": uel_loss, "dcl": dcl_loss}[name]
    return loss(torch.zeros(0, 4), torch.zeros(0, 4), group="world")


def needs_differ(rank, with_ids):
    """Rank 1 wants the gradient of its texts alone, the others that of their images."""
    g = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(3, 8, generator=g, dtype=torch.float64) for _ in "xy")
    (y if rank == 1 else x).requires_grad_()
    ids = 10 * rank + torch.arange(3) if with_ids else None
    clip_loss(x, y, 3.0, normalize=True, ids=ids, group="world").backward()
    return y.grad if rank == 1 else x.grad


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


def is_stopped(rank, victim):
    """The victim's whole process stands still, the store with it if it is rank 0."""
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    try:
        nt_xent_loss(*embeddings(), group="world")
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", 0.0


def arrives_late(rank):
    """Rank 2 never comes; rank 1 comes shortly before rank 0 gives up."""
    if rank == 2:
        time.sleep(8)
        return "was away"
    if rank == 1:
        time.sleep(2.2)
    try:
        nt_xent_loss(*embeddings(), group="world")
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def reinitialised(rank, port):
    """A second group of the same name, in which rank 2 stays away."""
    if rank == 1:  # more meetings than the others know of
        Group("world", "a call").signs.count += 5
    dist.destroy_process_group()
    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 3}
    dist.init_process_group("gloo", timeout=timedelta(seconds=4), **where)
    if rank == 2:
        time.sleep(7)
        return "was away"
    try:
        nt_xent_loss(*embeddings(), group="world")
    except RuntimeError as error:
        return str(error).partition(": ")[2].partition(":")[0]
    return "nothing was raised"
