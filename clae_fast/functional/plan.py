"""What the losses share: a loss is data, an operator and its arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor

from .. import autograd
from .. import validation as check
from ..backends import requested
from ..exchange import MODES
from ..process_group import described, name_of

Scale = tuple[float, Tensor | None, bool]


class Plan(NamedTuple):
    """A loss as data: which operator, on what, and where the positional inputs went."""

    loss: Callable[..., Tensor]
    args: tuple[Any, ...]
    reduction: str
    value_and_grad: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]] | None = None
    gradients: int = 0  # how many of them value_and_grad knows
    slots: tuple[int | None, ...] = ()  # which belongs to each positional input; None: it is 0
    bias: Tensor | None = None  # cancels in the softmax, and yet is part of the graph


def add_bias(loss: Tensor, bias: Tensor | None) -> Tensor:
    """The loss with its bias, whose gradient is 0 and whose NaN is seen."""
    return loss if bias is None else loss + 0.0 * bias.to(loss.dtype).reshape(())


P = ParamSpec("P")
PLANS: dict[Callable[..., Tensor], Callable[..., Plan]] = {}
"""How `value_and_grad` finds the fused call behind a loss."""


def fused(plan: Callable[P, Plan]) -> Callable[P, Tensor]:
    """Make a loss of a plan: same signature, the loss as its result."""

    @functools.wraps(plan)
    def loss(*inputs: P.args, **options: P.kwargs) -> Tensor:
        data = plan(*inputs, **options)
        return add_bias(data.loss(*data.args), data.bias)

    signature = inspect.signature(plan).replace(return_annotation=Tensor)
    loss.__signature__ = signature  # type: ignore[attr-defined]
    loss.__annotations__ = {**plan.__annotations__, "return": Tensor}
    PLANS[loss] = plan
    return loss


def contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: Scale,
    *options: Any,
    slots: tuple[int | None, ...],
    bias: Tensor | None = None,
) -> Plan:
    """A plan for `contrast`, whose gradients are (q, k, negatives, scale_tensor).

    `options` are form, normalize, reduction and backend.
    """
    number, tensor, reciprocal = scale
    told = autograd.ContrastOptions(number, reciprocal, *options)
    args = (q, k, negatives, tensor, told)
    with_grad = autograd.contrast_value_and_grad
    return Plan(autograd.contrast_loss, args, told.reduction, with_grad, 4, slots, bias)


def reciprocal_scale(temperature: float | Tensor) -> Scale:
    """`t = 1 / temperature` as (scale, scale_tensor, reciprocal)."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature, True
    return 1.0 / float(temperature), None, False


Place = tuple[str, str, str, str]


def common(
    reduction: str,
    normalize: bool,
    backend: str | None,
    group: Any,
    exchange: str,
    name: str,
    **facts: Any,
) -> Place:
    """Checks the keywords that every loss has; (backend, group's name, exchange, the call).

    `name` and `facts`: the loss and what all ranks must give alike.
    """
    if reduction not in check.REDUCTIONS:
        check.word("reduction", reduction, check.REDUCTIONS)
    check.flag("normalize", normalize)
    if exchange != "auto":
        check.word("exchange", exchange, MODES)
        if group is None:
            raise ValueError(f"exchange is between the ranks of a group, got {exchange!r} without")
    backend = requested(backend)
    if group is None:
        return backend, "", exchange, ""
    facts |= {"reduction": reduction, "normalize": normalize}
    return backend, name_of(group), exchange, described(name, **facts)
