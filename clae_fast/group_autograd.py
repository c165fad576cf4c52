"""What a process group adds to the gradients of losses whose rows are this rank's own business."""

from typing import Any, overload

import torch
from torch import Tensor

from . import distributed  # noqa: F401  (registers the operators)
from .ops import call


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, reduction: str, group: str, told: str) -> Tensor:
        loss, factor = call("group_reduce", rows, reduction, group, told)
        ctx.save_for_backward(factor)
        ctx.shape = rows.shape
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        return (grad_output * factor).expand(ctx.shape), None, None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, told: str) -> Tensor:
        ctx.place = group, told
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return call("group_average", grad_output, *ctx.place), None, None


def reduce_over_group(rows: Tensor, reduction: str, group: str, told: str) -> Tensor:
    """Mean or sum of all ranks' rows; a row's gradient is that of W times it. "none": the rows."""
    if reduction == "none":
        return rows
    loss: Tensor = _Reduce.apply(rows, reduction, group, told)
    return loss


@overload
def shared(x: Tensor, group: str, told: str) -> Tensor: ...


@overload
def shared(x: None, group: str, told: str) -> None: ...


def shared(x: Tensor | None, group: str, told: str) -> Tensor | None:
    """x, which every rank holds; its gradient is the average of theirs."""
    return None if x is None else _Shared.apply(x, group, told)
