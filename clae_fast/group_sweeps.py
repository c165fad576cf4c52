"""Sweeps over the columns of all ranks as operators: `torch.compile` sees one node for each.

What `distributed.py` is to the fused losses, this is to those that `composite.py` puts together.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .distributed import meet, step_of
from .exchange import Exchange
from .numerics import compute_dtype
from .ops import call as run
from .ops import define
from .process_group import Group, resolve
from .sweeps import Local, Sweeps, Where


class GroupSweeps(NamedTuple):
    """`Sweeps` over the columns of all ranks of a group."""

    scale: float
    scale_tensor: Tensor | None
    where: Where

    @property
    def place(self) -> tuple[str, str, str]:
        return self.where[1:]

    def _run(self, op: str, q: Tensor, k: Tensor, rules: dict[str, Any], *names: str) -> Any:
        told = [rules.get(name) for name in names]
        scale = (self.scale, self.scale_tensor)
        return run(op, q, k, *scale, *told, *self.place, backend=self.where.backend)

    def lse(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        rules = {"wide": False, **rules}
        return self._run("group_lse", q, k, rules, "skip", "row_ids", "col_ids", "wide")

    def grad(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        names = ("row_lse", "row_weight", "col_lse", "col_weight")
        return self._run("group_grad", q, k, rules, "skip", "row_ids", "col_ids", *names)

    def sigmoid(self, q: Tensor, k: Tensor, **rules: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rules = {"need_dq": False, "need_dk": False, **rules}
        names = ("bias", "bias_tensor", "row_weight", "row_ids", "col_ids", "need_dq", "need_dk")
        return self._run("group_sigmoid", q, k, rules, *names)

    def total(self, x: Tensor) -> Tensor:
        return run("group_total", x, self.where.group, self.where.call)

    # How many rows the others have is known when they are asked.

    @_disable_dynamo
    def gather(self, x: Tensor) -> Tensor:
        return self._met("rows of all ranks", len(x), x.device).all_rows(x)

    @_disable_dynamo
    def start(self, rows: int, like: Tensor) -> int:
        met = self._met("numbers of rows", rows, like.device)
        return sum(met.sizes[: met.rank])

    def _met(self, step: str, rows: int, device: torch.device) -> Exchange:
        return Exchange(
            self.where.group, step_of(step, self.where.call), rows, "gather", 0, 0, device
        )

    def upstream(self, g: Tensor) -> Tensor:
        return run("group_times_ranks", g, self.where.group)


def sweeps_for(where: Where, scale: float = 1.0, scale_tensor: Tensor | None = None) -> Sweeps:
    """The sweeps of a loss."""
    if where.group:
        return GroupSweeps(scale, scale_tensor, where)
    return Local(scale, scale_tensor, False, where.backend)


# ------------------------------------------------------------------------------------ operators


def _ids(row_ids: Tensor | None, col_ids: Tensor | None) -> dict[str, Tensor | None]:
    return {} if row_ids is None or col_ids is None else {"row_ids": row_ids, "col_ids": col_ids}


@torch.no_grad()
def _lse(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    skip: str,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    wide: bool,
    group: str,
    exchange: str,
    call: str,
    *,
    backend: str = "auto",
) -> Tensor:
    rules: dict[str, Any] = _ids(row_ids, col_ids)
    rules |= {"wide": True} if wide else {}
    local = Local(scale, scale_tensor, False, backend)
    over, _ = meet("log-sum-exps", k, local, group, exchange, call)
    return over.lse(q, k, skip=skip, **rules)


@torch.no_grad()
def _grad(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    skip: str,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_lse: Tensor | None,
    row_weight: Tensor | None,
    col_lse: Tensor | None,
    col_weight: Tensor | None,
    group: str,
    exchange: str,
    call: str,
    *,
    backend: str = "auto",
) -> Tensor:
    rules: dict[str, Any] = _ids(row_ids, col_ids)
    local = Local(scale, scale_tensor, False, backend)
    sides = "rows" if col_lse is None else "columns" if row_lse is None else "rows and columns"
    over, _ = meet(f"gradients by {sides}", k, local, group, exchange, call)
    if row_lse is not None:
        rules |= {"row_lse": row_lse, "row_weight": row_weight}
    if col_lse is not None:
        rules |= {"col_lse": col_lse, "col_weight": col_weight}
    return over.grad(q, k, skip=skip, **rules)


@torch.no_grad()
def _sigmoid(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    bias: float,
    bias_tensor: Tensor | None,
    row_weight: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    need_dq: bool,
    need_dk: bool,
    group: str,
    exchange: str,
    call: str,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = _ids(row_ids, col_ids)
    local = Local(scale, scale_tensor, False, backend)
    over, (any_dk,) = meet("sigmoids", k, local, group, exchange, call, (need_dk,))
    told = {"bias": bias, "bias_tensor": bias_tensor}
    others = over.exchange.others(k, *(x for x in (col_ids,) if ids and x is not None))
    loss, slope, dq, dk = local.sigmoid(
        q, k, **told, row_weight=row_weight, **ids, need_dq=need_dq, need_dk=need_dk
    )
    for block, *block_ids in others:  # all of them negatives
        there = {"row_ids": row_ids, "col_ids": block_ids[0]} if ids else {}
        more = local.sigmoid(
            q, block, **told, row_weight=row_weight, **there, need_dq=need_dq, offset=len(block)
        )
        loss, slope, dq = (x + y for x, y in zip((loss, slope, dq), more[:3], strict=True))
    if any_dk:
        known = {"row_weight": row_weight, "row_ids": row_ids if ids else None}
        travel = {name: x for name, x in known.items() if x is not None}
        for block, *rest in over.exchange.others(q, *travel.values()):
            there = dict(zip(travel, rest, strict=True))
            there |= {"col_ids": col_ids} if ids else {}
            dk_there = local.sigmoid(block, k, **told, **there, need_dk=need_dk, offset=len(k))[3]
            dk = dk + dk_there
    return loss, slope, dq, dk


@torch.no_grad()
def _total(x: Tensor, group: str, call: str) -> Tensor:
    ranks = Group(group, step_of("a sum over the ranks", call, shape=tuple(x.shape)))
    ranks.meet(x.device)
    return ranks.total(x)


@torch.no_grad()
def _times_ranks(x: Tensor, group: str) -> Tensor:
    return x * resolve(group).size()


# ------------------------------------------------------------------------------------ registration

_ROWS = "Tensor q, Tensor k, float scale, Tensor? scale_tensor"
_IDS = "Tensor? row_ids, Tensor? col_ids"
_GROUP = "str group, str exchange, str call, *, str backend='auto'"
_WEIGHTS = "Tensor? row_lse, Tensor? row_weight, Tensor? col_lse, Tensor? col_weight"


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=compute_dtype(x.dtype))


def _fake_lse(*args: Any, **kwargs: Any) -> Tensor:
    a = inspect.signature(_lse).bind(*args, **kwargs).arguments
    x = _like(a["q"], len(a["q"]))
    return x.double() if a["wide"] else x


def _fake_sigmoid(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    a = inspect.signature(_sigmoid).bind(*args, **kwargs).arguments
    q, k = a["q"], a["k"]
    return (
        _like(q, len(q)),
        _like(q, len(q)),
        _like(q, *(q.shape if a["need_dq"] else (0,))),
        _like(k, *(k.shape if a["need_dk"] else (0,))),
    )


_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "group_lse": (
        f"({_ROWS}, str skip, {_IDS}, bool wide, {_GROUP}) -> Tensor",
        _lse,
        _fake_lse,
    ),
    "group_grad": (
        f"({_ROWS}, str skip, {_IDS}, {_WEIGHTS}, {_GROUP}) -> Tensor",
        _grad,
        lambda q, *args, **kwargs: _like(q, *q.shape),
    ),
    "group_sigmoid": (
        f"({_ROWS}, float bias, Tensor? bias_tensor, Tensor? row_weight, {_IDS}, bool need_dq, "
        f"bool need_dk, {_GROUP}) -> (Tensor, Tensor, Tensor, Tensor)",
        _sigmoid,
        _fake_sigmoid,
    ),
    "group_total": (
        "(Tensor x, str group, str call) -> Tensor",
        _total,
        lambda x, group, call: x.new_empty(x.shape),
    ),
    "group_times_ranks": (
        "(Tensor x, str group) -> Tensor",
        _times_ranks,
        lambda x, group: x.new_empty(x.shape),
    ),
}
for _name, _parts in _OPERATORS.items():
    define(_name, *_parts)
