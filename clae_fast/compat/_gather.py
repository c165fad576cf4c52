"""Rows of all processes, as the libraries gather them: equal numbers, in the order of ranks."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def needs_processes(world_size: int) -> None:
    """A loss of several processes is not that of one: the group must be there, and of this size."""
    there = world()[1] if dist.is_available() and dist.is_initialized() else None
    if world_size > 1 and there != world_size:
        found = "there is none" if there is None else f"it has {there}"
        raise ValueError(f"world_size={world_size} needs a process group of that size, {found}")


def all_rows(x: Tensor) -> Tensor:
    """(W N, ...) from (N, ...) of each process, as constants."""
    x = x.detach().contiguous()
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x)
    return torch.cat(out)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """`all_rows`, whose gradient is the sum of what every process's loss has to say about x.

    With one loss per process, DDP's average of the weight gradients is then that of the mean loss.
    """
    if world()[1] == 1:
        return x
    out: Tensor = _Gather.apply(x)
    return out
