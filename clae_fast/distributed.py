"""The losses over a process group: every rank computes the rows that are its own, exactly.

A rank has b rows and, of each operator's columns, its share. It sweeps over its own columns with
the rule that says which to leave out, then over the others' (`exchange.py`) with none, and adds:
log-sum-exps by `logaddexp`, gradients by +. The gradient of a row is put together where the row
lives, from the log-sum-exps and weights of the other ranks' rows, which travel with them: a
number or two a row, where partial gradients of the keys would be D numbers sent back.

What is differentiated is the average over the ranks of what each of them computes from what it is
given, as DistributedDataParallel averages. "mean" and "sum" give every rank the loss L of the whole
batch: that average is L, and rank r's rows get `W dL/dz_r`. "none" gives a rank its own rows, so
they get the gradient of the sum over the ranks. A scale gets the average's own gradient on every
rank: averaged once more, it stays what it is.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .contrast_grad import Operands, contrast_grad
from .exchange import Exchange
from .numerics import compute_dtype, effective_scale, full_precision
from .ops import call as run
from .ops import define, fake_contrast
from .process_group import Group, described
from .reference.contrast import contrast_rows
from .reference.sweep import Skip
from .sweeps import Local
from .uel_blocks import uel_over_blocks


class OverGroup:
    """`Sweeps` over the columns of all ranks.

    Args:
        local: the sweeps over one block.
        exchange: between the ranks.
        twins: how many rows a stack of two views has for each that the exchange counts.
    """

    def __init__(self, local: Local, exchange: Exchange, twins: int = 1) -> None:
        self.local, self.exchange, self.twins = local, exchange, twins

    def _others(
        self, k: Tensor, rules: dict[str, Any], *names: str
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each block of the others' columns, and the rules that apply there; sets out at once."""
        travel = [n for n in ("col_ids", *names) if rules.get(n) is not None]
        stay = {n: v for n, v in rules.items() if n not in (*travel, "skip", "offset")}
        copies = self.twins if rules.get("skip") == "twins" else 1
        blocks = self.exchange.others(k, *(rules[n] for n in travel), copies=copies)
        return ((b[0], {**stay, **dict(zip(travel, b[1:], strict=True))}) for b in blocks)

    def lse(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        others = self._others(k, rules)
        lse = self.local.lse(q, k, **rules)
        for block, there in others:
            lse = torch.logaddexp(lse, self.local.lse(q, block, **there))
        return lse

    def mean(self, q: Tensor, k: Tensor, **rules: Any) -> tuple[Tensor, Tensor]:
        others = self._others(k, rules)
        lse, o = self.local.mean(q, k, **rules)
        for block, there in others:
            lse_there, o_there = self.local.mean(q, block, **there)
            both = torch.logaddexp(lse, lse_there)
            o = o * _share(lse, both) + o_there * _share(lse_there, both)
            lse = both
        return lse, o

    def grad(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        others = self._others(k, rules, "col_lse", "col_weight")
        dq = self.local.grad(q, k, **rules)
        for block, there in others:
            dq += self.local.grad(q, block, **there)
        return dq

    def total(self, x: Tensor) -> Tensor:
        return self.exchange.group.total(x)

    def gather(self, x: Tensor) -> Tensor:
        return self.exchange.all_rows(x)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """`e^(part - whole)` (N, 1), 0 where there is nothing at all."""
    return (part - torch.where(whole == -torch.inf, 0.0, whole)).exp()[:, None]


# ------------------------------------------------------------------------------------- the losses


def meet(
    step: str,
    x: Tensor,
    local: Local,
    group: str,
    exchange: str,
    call: str,
    flags: Sequence[bool] = (),
    pairs: int | None = None,
) -> tuple[OverGroup, list[bool]]:
    """The ranks meet for a step of a call; the sweeps, and the flags that any rank has set.

    x has this rank's columns; `pairs`: it counts so many pairs instead, two rows in a stack.
    """
    told = step_of(step, call, width=x.shape[1], dtype=x.dtype, exchange=exchange)
    bits = sum(flag << i for i, flag in enumerate(flags))
    row_bytes = x.shape[1] * torch.finfo(compute_dtype(x.dtype)).bits // 8
    rows, twins = (len(x), 1) if pairs is None else (pairs, 2)
    met = Exchange(group, told, rows, exchange, 2 * row_bytes, bits, x.device)
    return OverGroup(local, met, twins), [bool(met.flags >> i & 1) for i in range(len(flags))]


def step_of(step: str, call: str, **facts: Any) -> str:
    """A step of a call in one line, for ranks to compare."""
    name, _, rest = call.partition(": ")
    return described(f"{step} of {name}" if step else name, **facts) + f"; {rest}"


@torch.no_grad()
@full_precision
def group_contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    form: str,
    normalize: bool,
    need_dq: bool,
    need_dk: bool,
    need_dnegatives: bool,
    need_dscale: bool,
    reduction: str,
    group: str,
    exchange: str,
    call: str,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """`reference.contrast` of this rank's rows among all ranks'; "mean" and "sum" are of all rows.

    The gradients are of W times that, `dscale` is its own.
    """
    local = Local(scale, scale_tensor, reciprocal, backend)
    flags = (need_dq, need_dk, need_dscale)
    place = (group, exchange, call)
    over, (need_q, need_k, need_scale) = meet("", q, local, *place, flags, len(q))
    # A queue is the same on every rank: its columns need no exchange.
    sweeps: OverGroup | Local = over if negatives is None else local
    dtype = compute_dtype(q.dtype)
    rows = Operands.of(q, k, negatives, form, normalize)
    mean: Tensor | None = None
    with_mean = form == "one_way" and reduction != "none" and (need_q or need_scale)

    def lse(x: Tensor, y: Tensor, **rules: Any) -> Tensor:
        nonlocal mean
        if not with_mean:
            return sweeps.lse(x, y, **rules)
        found, mean = sweeps.mean(x, y, **rules)
        return found

    t = effective_scale(scale, scale_tensor, reciprocal, dtype)
    loss, lse_row, lse_col = contrast_rows(rows, t, form, lse)
    grads = [q.new_empty(0, dtype=dtype) for _ in range(4)]
    if reduction == "none":
        return loss, lse_row, lse_col, *grads
    count = over.exchange.rows * (1 if form == "one_way" else 2)
    total = over.total(loss.sum(dtype=torch.float64))
    reduced = (total / count if reduction == "mean" else total).to(dtype)
    need = (need_q, need_k, need_dnegatives and negatives is not None, need_scale)
    if any(need):
        W = over.exchange.ranks
        weight = torch.full_like(loss, W / count if reduction == "mean" else W)
        found = contrast_grad(
            q, k, negatives, scale, scale_tensor, reciprocal, form, normalize, lse_row, lse_col,
            weight, need, _unscaled(sweeps), rows, mean, halves=False,
        )  # fmt: skip
        grads = _asked(over, found, (need_dq, need_dk, need_dnegatives, need_dscale), need_scale)
    return reduced, lse_row, lse_col, *grads


@torch.no_grad()
@full_precision
def group_contrast_grad(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    form: str,
    normalize: bool,
    lse_row: Tensor,
    lse_col: Tensor,
    weight: Tensor,
    need_dq: bool,
    need_dk: bool,
    need_dnegatives: bool,
    need_dscale: bool,
    group: str,
    exchange: str,
    call: str,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The gradients of all ranks' `sum(weight * loss)`, for "none"; `dscale` of their average."""
    local = Local(scale, scale_tensor, reciprocal, backend)
    flags = (need_dq, need_dk, need_dscale)
    place = (group, exchange, call)
    over, (need_q, need_k, need_scale) = meet("the backward", q, local, *place, flags, len(q))
    sweeps: OverGroup | Local = over if negatives is None else local
    need = (need_q, need_k, need_dnegatives and negatives is not None, need_scale)
    found = contrast_grad(
        q, k, negatives, scale, scale_tensor, reciprocal, form, normalize, lse_row, lse_col,
        weight, need, _unscaled(sweeps), halves=False,
    )  # fmt: skip
    return tuple(_asked(over, found, (need_dq, need_dk, need_dnegatives, need_dscale), need_scale))


def _unscaled(sweeps: OverGroup | Local) -> Callable[..., Tensor]:
    """`pair_grad` for `contrast_grad`, which would tell it the scale that the sweeps know."""

    def grad(q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        known = ("scale", "scale_tensor", "reciprocal")
        return sweeps.grad(q, k, **{n: v for n, v in rules.items() if n not in known})

    return grad


def _asked(
    over: OverGroup, found: Sequence[Tensor], need: Sequence[bool], any_needs_scale: bool
) -> list[Tensor]:
    """The gradients that this rank asked for; the scale's is the average of the ranks'."""
    *rows, dscale = found
    if any_needs_scale:
        dscale = over.total(dscale) / over.exchange.ranks
    return [g if n else g.new_empty(0) for g, n in zip((*rows, dscale), need, strict=True)]


@torch.no_grad()
@full_precision
def group_uel(
    z: Tensor,
    scale: float,
    negative_weight: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    ids: Tensor | None,
    need_dq: bool,
    group: str,
    exchange: str,
    call: str,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.pair_uel` of this rank's rows (2b, D) among all ranks': keys get no gradient.

    `ids` (2b,): int32, numbered alike on all ranks.
    """
    local = Local(scale, scale_tensor, reciprocal, backend)
    B = len(z) // 2
    over, (need,) = meet("", z, local, group, exchange, call, (need_dq,), B)
    ranks = over.exchange
    if ranks.ring:
        loss, dq = _uel_round(over, z, ids, negative_weight, need)
    else:
        keys, col_ids = (
            None if x is None else torch.cat([ranks.all_rows(half) for half in (x[:B], x[B:])])
            for x in (z, ids)
        )
        assert keys is not None
        first = sum(ranks.sizes[: ranks.rank])
        told = (scale, negative_weight, scale_tensor, reciprocal)
        parts = [
            run(
                "pair_uel", z[half], keys, *told, row_ids=None if ids is None else ids[half],
                col_ids=col_ids, need_dq=need_dq, offset=at, backend=backend,
            )
            for half, at in ((slice(B), first), (slice(B, None), first + len(keys) // 2))
        ]  # fmt: skip
        loss, dq = (torch.cat(x) for x in zip(*parts, strict=True))
    return loss, dq if need_dq else z.new_empty(0)


def _uel_round(
    over: OverGroup, z: Tensor, ids: Tensor | None, negative_weight: float, need_dq: bool
) -> tuple[Tensor, Tensor]:
    """UEL with one rank's keys at a time."""
    local = over.local
    t = effective_scale(local.scale, local.scale_tensor, local.reciprocal, z.dtype)
    s_pos = (z * z.roll(len(z) // 2, 0)).sum(-1) * t
    both = {} if ids is None else {"row_ids": ids, "col_ids": ids}
    lse = over.lse(z, z, skip="twins", **both)

    def blocks() -> Iterable[tuple[Tensor, Skip]]:
        others = over.exchange.others(z, *(x for x in (ids,) if x is not None), copies=2)
        yield z, Skip("twins", 0, ids, ids)
        for k, *there in others:
            yield k, Skip("none", 0, ids, there[0] if there else None)

    return uel_over_blocks(z, s_pos, lse, t, negative_weight, blocks, need_dq)


@torch.no_grad()
def group_reduce(rows: Tensor, reduction: str, group: str, call: str) -> tuple[Tensor, Tensor]:
    """The mean or sum of all ranks' rows, and what a row's gradient is multiplied by."""
    ranks = Group(group, step_of("the mean or sum", call))
    if not sum(told.rows for told in ranks.meet(rows.device, len(rows))):
        raise ValueError(f"{call.partition(': ')[0]}: no rank of the group has a row")
    mine = torch.stack((rows.sum(dtype=torch.float64), rows.new_full((), rows.numel()).double()))
    total, count = ranks.total(mine).unbind()
    if reduction == "sum":
        return total.to(rows.dtype), torch.full_like(total, ranks.size).to(rows.dtype)
    return (total / count).to(rows.dtype), (ranks.size / count).to(rows.dtype)


@torch.no_grad()
def group_average(x: Tensor, group: str, call: str) -> Tensor:
    """The average of x over the ranks."""
    ranks = Group(group, step_of("the gradient of the scale", call))
    ranks.meet(x.device)
    return ranks.total(x) / ranks.size


# ------------------------------------------------------------------------------------ registration

_SCALE = "float scale, Tensor? scale_tensor, bool reciprocal"
_ROWS = f"Tensor q, Tensor k, Tensor? negatives, {_SCALE}, str form, bool normalize"
_NEED = "bool need_dq, bool need_dk, bool need_dnegatives, bool need_dscale"
_GROUP = "str group, str exchange, str call, *, str backend='auto'"


def _by_name(function: Callable[..., Any], *args: Any, **kwargs: Any) -> SimpleNamespace:
    return SimpleNamespace(**inspect.signature(function).bind(*args, **kwargs).arguments)


def _fake_contrast(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    a = _by_name(group_contrast, *args, **kwargs)
    if a.reduction == "none":  # the gradients wait for the upstream weights
        a.need_dq = a.need_dk = a.need_dnegatives = a.need_dscale = False
    return fake_contrast(a)


def _fake_contrast_grad(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    a = _by_name(group_contrast_grad, *args, **kwargs)
    a.reduction = "none"
    return fake_contrast(a)[3:]


def _fake_uel(z: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    need_dq = _by_name(group_uel, z, *args, **kwargs).need_dq
    return z.new_empty(len(z)), z.new_empty(z.shape if need_dq else 0)


define(
    "group_contrast",
    f"({_ROWS}, {_NEED}, str reduction, {_GROUP})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    group_contrast,
    _fake_contrast,
)
define(
    "group_contrast_grad",
    f"({_ROWS}, Tensor lse_row, Tensor lse_col, Tensor weight, {_NEED}, {_GROUP})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    group_contrast_grad,
    _fake_contrast_grad,
)
define(
    "group_uel",
    "(Tensor z, float scale, float negative_weight, Tensor? scale_tensor, bool reciprocal, "
    f"Tensor? ids, bool need_dq, {_GROUP}) -> (Tensor, Tensor)",
    group_uel,
    _fake_uel,
)
define(
    "group_reduce",
    "(Tensor rows, str reduction, str group, str call) -> (Tensor, Tensor)",
    group_reduce,
    lambda rows, reduction, group, call: (rows.new_empty(()), rows.new_empty(())),
)
define(
    "group_average",
    "(Tensor x, str group, str call) -> Tensor",
    group_average,
    lambda x, group, call: x.new_empty(x.shape),
)
