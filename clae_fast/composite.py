"""The sweeps inside autograd: what a loss is composed of when one fused operator is not enough.

A loss is then plain PyTorch over rows; its N x M parts are the functions below, whose backward is
a sweep as their forward is. `backend="reference"` bypasses them for the plain operators, which may
be differentiated as often as one likes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import Gradients, _once, _records_gradient
from .group_sweeps import sweeps_for
from .numerics import log_sum_exp, wide
from .sweeps import Local, Sweeps, Where, of_rows


class How(NamedTuple):
    """What a sweep is told beside its tensors. `t` is `scale`, times a tensor if there is one."""

    where: Where
    scale: float
    form: str = "one_way"
    skip: str = "none"


def _ids(row_ids: Tensor | None, col_ids: Tensor | None) -> dict[str, Tensor | None]:
    return {"row_ids": row_ids, "col_ids": row_ids if col_ids is None else col_ids}


def _flipped(row_ids: Tensor | None, col_ids: Tensor | None) -> dict[str, Tensor | None]:
    """Where the columns are the rows."""
    return {"row_ids": row_ids if col_ids is None else col_ids, "col_ids": row_ids}


# `torch.compile` takes no tensor twice for a Function.


def _two(row_ids: Tensor | None, col_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids as arguments: once where rows and columns share them."""
    return row_ids, None if col_ids is row_ids else col_ids


def _other(k: Tensor, q: Tensor) -> Tensor:
    """Columns that are another tensor than the rows."""
    return k.view_as(k) if k is q else k


def _by_scale(q: Tensor, dq: Tensor, t: Tensor) -> Tensor:
    """Euler: `t dL/dt = sum_i <q_i, dq_i>`, as `s` is linear in both."""
    return (wide((q * dq).sum(-1)).sum() / t).reshape(t.shape)


def _wanted(x: Tensor, where: Where) -> dict[str, bool]:
    """What to ask of a log-sum-exp; nothing where a kernel need not know of it."""
    return {"wide": True} if of_rows(x, where) == torch.float64 else {}


def _sides(q: Tensor, row: tuple[Tensor, Tensor] | None, col: tuple[Tensor, Tensor] | None) -> Any:
    """Log-sum-exps with their weights, of rows and of columns, as `pair_grad` takes them.

    `w e^(s - lse)` is `w e^(near - lse) e^(s - near)` for any `near`: the lse that fits q's dtype
    stands there, and the weight makes good what was rounded.
    """
    rules = {}
    for side, pair in (("row", row), ("col", col)):
        if pair is None:
            continue
        lse, weight = pair
        near = lse.to(q.dtype)
        rounded = torch.where(lse == -torch.inf, 0.0, near - lse)
        rules[f"{side}_lse"], rules[f"{side}_weight"] = near, (weight * rounded.exp()).to(q.dtype)
    return rules


class _Lse(torch.autograd.Function):
    """Log-sum-exp of each row: "one_way" (N,); "self", where q are the columns too (N,);
    "two_way", of each column as well (B, 2)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        t: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        how: How,
    ) -> Tensor:
        sweeps = sweeps_for(how.where, how.scale, t)
        need = ctx.needs_input_grad[:3]
        columns = q if k is None else k
        o, rules = None, {"skip": how.skip, **_wanted(q, how.where)}
        # Constant keys: loss and gradient in one sweep. What is constant on one rank of a group may
        # not be on another, and all must make the same sweeps.
        if how.form == "one_way" and not need[1] and isinstance(sweeps, Local):
            lse, o = sweeps.mean(q, columns, **rules, **_ids(row_ids, col_ids))
        else:
            lse = sweeps.lse(q, columns, **rules, **_ids(row_ids, col_ids))
            if how.form == "two_way":
                other = sweeps.lse(columns, q, **rules, **_flipped(row_ids, col_ids))
                lse = torch.stack((lse, other), 1)
        ctx.save_for_backward(q, k, t, row_ids, col_ids, lse, o)
        ctx.need, ctx.how = need, how
        return lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (need_q, need_k, need_t), how = ctx.need, ctx.how

        def gradients(g: Tensor, *saved: Any) -> Gradients:
            q, k, t, row_ids, col_ids, lse, o = saved
            sweeps = sweeps_for(how.where, how.scale, t)
            columns = q if k is None else k
            ids, flipped = _ids(row_ids, col_ids), _flipped(row_ids, col_ids)
            if how.form == "two_way":
                row, col = zip(lse.unbind(1), g.unbind(1), strict=True)
                by_row, by_col = _sides(q, row, col), _sides(q, col, row)
            else:
                row = lse, g
                by_row = _sides(q, row, row if how.form == "self" else None)
                by_col = _sides(q, None, row)
            dq = dk = dt = None
            if o is not None:
                dq = (g * (how.scale if t is None else how.scale * t)).to(o.dtype)[:, None] * o
            elif need_q or need_t or how.where.group:
                dq = sweeps.grad(q, columns, skip=how.skip, **by_row, **ids)
            if need_k or (how.where.group and how.form != "self"):
                dk = sweeps.grad(columns, q, skip=how.skip, **by_col, **flipped)
            if need_t and dq is not None:
                # A row of its own columns meets t twice.
                dt = _by_scale(q, dq, t) * (0.5 if how.form == "self" else 1.0)
            return dq if need_q else None, dk if need_k else None, dt

        return *_once(gradients, grad_output, *ctx.saved_tensors), None, None, None


class _Sigmoid(torch.autograd.Function):
    """`sum_i weight_i loss_i` of `pair_sigmoid`, gradients and all from one sweep."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        t: Tensor | None,
        bias: Tensor,
        weight: Tensor,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        how: How,
    ) -> Tensor:
        need = ctx.needs_input_grad[:5]
        rows, slope, dq, dk = sweeps_for(how.where, how.scale, t).sigmoid(
            q, k, bias=0.0, bias_tensor=bias, row_weight=weight, **_ids(row_ids, col_ids),
            need_dq=need[0] or need[2], need_dk=need[1],
        )  # fmt: skip
        dt = _by_scale(q, dq, t) if need[2] and t is not None else None
        kept = (dq, dk, dt, slope.sum(), rows)
        wanted = [x if n else None for n, x in zip(need, kept, strict=True)]
        ctx.save_for_backward(*wanted, q, k, t, bias, weight)  # on which a second backward hangs
        return (rows * weight).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        def gradients(g: Tensor, *saved: Any) -> Gradients:
            return tuple(None if x is None else g * x for x in saved[:5])

        return *_once(gradients, grad_output, *ctx.saved_tensors), None, None, None


class _SigmoidRows(torch.autograd.Function):
    """The rows of `pair_sigmoid`: what comes from upstream must be known before it can sum."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        t: Tensor | None,
        bias: Tensor,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        how: How,
    ) -> Tensor:
        sweeps = sweeps_for(how.where, how.scale, t)
        ctx.save_for_backward(q, k, t, bias, row_ids, col_ids)
        ctx.need, ctx.how = ctx.needs_input_grad[:4], how
        return sweeps.sigmoid(q, k, bias=0.0, bias_tensor=bias, **_ids(row_ids, col_ids))[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        need, how = ctx.need, ctx.how

        def gradients(g: Tensor, *saved: Any) -> Gradients:
            q, k, t, bias, row_ids, col_ids = saved
            _, slope, dq, dk = sweeps_for(how.where, how.scale, t).sigmoid(
                q, k, bias=0.0, bias_tensor=bias, row_weight=g, **_ids(row_ids, col_ids),
                need_dq=need[0] or need[2], need_dk=need[1],
            )  # fmt: skip
            grads = (
                dq,
                dk,
                _by_scale(q, dq, t) if need[2] else None,
                slope.sum().reshape(bias.shape),
            )
            return tuple(x if n else None for n, x in zip(need, grads, strict=True))

        return *_once(gradients, grad_output, *ctx.saved_tensors), None, None, None


class _Total(torch.autograd.Function):
    """A sum over all processes that each of them uses: their gradients add up too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Where) -> Tensor:
        ctx.where = where
        return sweeps_for(where).total(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _once(sweeps_for(ctx.where).total, g), None


class _Gather(torch.autograd.Function):
    """The rows of all processes, each of which may use any of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Where) -> Tensor:
        ctx.where, ctx.rows = where, x.shape[0]
        return sweeps_for(where).gather(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        sweeps = sweeps_for(ctx.where)
        start = sweeps.start(ctx.rows, g)
        return _once(sweeps.total, g)[start : start + ctx.rows], None


class _Objective(torch.autograd.Function):
    """The sum over all processes of what is to be minimised: each holds its share's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Where) -> Tensor:
        ctx.where = where
        return sweeps_for(where).total(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return sweeps_for(ctx.where).upstream(g), None


class _Plain(Local):
    """The specification itself, in sight of autograd."""

    def lse(self, q: Tensor, k: Tensor, **rules: Any) -> Tensor:
        return reference.pair_lse(q, k, self.scale, self.scale_tensor, **rules)

    def sigmoid(self, q: Tensor, k: Tensor, **rules: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return reference.pair_sigmoid(q, k, self.scale, scale_tensor=self.scale_tensor, **rules)


class Pairs(NamedTuple):
    """The sweeps of one loss, differentiable: `s_ij = t <q_i, k_j>`."""

    where: Where
    t: Tensor | float

    @property
    def here(self) -> "Pairs":
        """The same over this process's keys alone."""
        return Pairs(self.where.here, self.t)

    def _how(self, factor: float, form: str, skip: str) -> tuple[Tensor | None, How]:
        if isinstance(self.t, Tensor):
            return self.t, How(self.where, factor, form, skip)
        return None, How(self.where, factor * self.t, form, skip)

    def _unrecorded(self, how: How, t: Tensor | None) -> Sweeps:
        """Sweeps that need no node of ours."""
        if self.plain:
            return _Plain(how.scale, t, False, "reference")
        return sweeps_for(self.where, how.scale, t)

    @property
    def sweeps(self) -> Sweeps:
        """What needs no scale and no gradient."""
        return sweeps_for(self.where)

    @property
    def plain(self) -> bool:
        """The operators' own PyTorch, differentiable as often as one likes."""
        return self.where.backend == "reference" and self.alone

    @property
    def alone(self) -> bool:
        """There are no other processes."""
        return isinstance(self.sweeps, Local)

    def lse(
        self,
        q: Tensor,
        k: Tensor,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        *,
        form: str = "one_way",
        skip: str = "none",
        factor: float = 1.0,
    ) -> Tensor:
        """`log sum_j e^(factor s_ij)` (N,) over the columns that `skip` and equal ids allow, in
        the dtype that `of_rows` says.

        "self": q are the columns too (and k is q). "two_way": of each column as well, (B, 2).
        """
        t, how = self._how(factor, form, skip)
        if self.plain or not _records_gradient(q, k, t):
            sweeps, rules = self._unrecorded(how, t), {"skip": skip, **_wanted(q, self.where)}
            lse = sweeps.lse(q, k, **rules, **_ids(row_ids, col_ids))
            if form != "two_way":
                return lse
            columns = sweeps.lse(k, q, **rules, **_flipped(row_ids, col_ids))
            return torch.stack((lse, columns), 1)
        out: Tensor = _Lse.apply(
            q, None if form == "self" else _other(k, q), t, *_two(row_ids, col_ids), how
        )
        return out

    def sigmoid(
        self,
        q: Tensor,
        k: Tensor,
        bias: Tensor,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The rows of `reference.pair_sigmoid` (N,), or their sum with these weights, ()."""
        t, how = self._how(1.0, "one_way", "none")
        ids = _ids(row_ids, col_ids)
        out: Tensor
        if self.plain or not _records_gradient(q, k, t, bias, weight):
            sweeps = self._unrecorded(how, t)
            out = sweeps.sigmoid(q, k, bias=0.0, bias_tensor=bias, **ids)[0]
            return out if weight is None else (out * weight).sum()
        if weight is None:
            out = _SigmoidRows.apply(q, _other(k, q), t, bias, *_two(row_ids, col_ids), how)
        else:
            out = _Sigmoid.apply(q, _other(k, q), t, bias, weight, *_two(row_ids, col_ids), how)
        return out

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, differentiable."""
        out: Tensor = x if self.alone else _Total.apply(x, self.where)
        return out

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, differentiable."""
        out: Tensor = x if self.alone else _Gather.apply(x, self.where)
        return out

    def mean_weights(self, rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor | None:
        """What each row counts in the loss; None: 1."""
        if reduction != "mean":
            return weight
        weight = torch.ones_like(rows) if weight is None else weight
        whole = self.total(weight.sum(0, keepdim=True))
        return weight / torch.where(whole == 0, 1.0, whole)

    def objective(self, share: Tensor) -> Tensor:
        """The loss, of which `share` is this process's part."""
        out: Tensor = share if self.alone else _Objective.apply(share, self.where)
        return out

    def reduce(self, rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        """Rows (N,) or (B, 2) to the loss. "mean" is `sum(w loss) / sum(w)`; two directions count
        one half each."""
        if rows.dim() == 2 and weight is not None:
            weight = weight[:, None].expand_as(rows)
        if reduction == "none":
            return rows if weight is None else rows * weight
        if reduction == "mean" and weight is None and self.alone:
            return rows.mean()
        flat = rows.flatten()
        w = self.mean_weights(flat, None if weight is None else weight.flatten(), reduction)
        return self.objective(flat.sum() if w is None else (flat * w).sum())


def combined(*lse: Tensor) -> Tensor:
    """The log-sum-exp over all of what each is over; -inf, with gradient 0, where all are."""
    return lse[0] if len(lse) == 1 else log_sum_exp(torch.stack(lse, -1))
