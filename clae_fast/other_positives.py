"""The sigmoid loss of pairs of equal ids, in plain PyTorch, a block of rows at a time.

In the order of ids these pairs lie in blocks on the diagonal: rows, a few at a time, meet the
columns of their own ids alone.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint

from .autograd import Gradients, _once, _records_gradient
from .classes import Ids
from .composite import Pairs
from .numerics import softplus, wide
from .reference import sweep

CHUNK_ELEMENTS = 1 << 21
"""Similarities held at once, in one buffer for all blocks."""


class _Block(NamedTuple):
    """Rows a..b meet columns c..d."""

    a: int
    b: int
    c: int
    d: int

    @property
    def size(self) -> int:
        return (self.b - self.a) * (self.d - self.c)


class _Sorted(NamedTuple):
    """Ids and places of rows and columns, in the order of ids."""

    row_ids: Tensor
    col_ids: Tensor
    row_places: Tensor
    col_places: Tensor

    def blocks(self, room: int) -> list[_Block]:
        """All rows, in blocks of at most `room` pairs, or of one row."""
        first = torch.searchsorted(self.col_ids, self.row_ids).tolist()
        last = torch.searchsorted(self.col_ids, self.row_ids, right=True).tolist()
        blocks: list[_Block] = []
        a = 0
        while a < len(first):
            b = min(len(first), a + max(1, room // max(last[-1] - first[a], 1)))
            blocks.append(_Block(a, b, first[a], last[b - 1]))
            a = b
        return blocks

    def left_out(self, block: _Block) -> Tensor:
        """(b - a, d - c), True for other ids, and for the positive at one's own place."""
        a, b, c, d = block
        other = self.row_ids[a:b, None] != self.col_ids[c:d]
        return other.logical_or_(self.row_places[a:b, None] == self.col_places[c:d])


@_disable_dynamo
def other_positives(pairs: Pairs, q: Tensor, k: Tensor, ids: Ids, bias: Tensor) -> Tensor:
    """`sum_j log(1 + e^(-s_ij))` over j != i with the id of row i, (N,)."""
    k = pairs.gather(k)
    row_ids, row_order = ids.here.sort(stable=True)
    col_ids, col_order = ids.everywhere.sort(stable=True)
    order = _Sorted(row_ids, col_ids, row_order + pairs.sweeps.start(len(q), q), col_order)
    q, k, t = q[row_order], k[col_order], pairs.t
    t = t if isinstance(t, Tensor) else q.new_tensor(t)
    if pairs.plain:
        rows = _plain(q, k, t, bias, order)
    elif _records_gradient(q, k, t, bias):
        rows = _Sums.apply(q, k, t, bias, order)
    else:
        rows = _sums(q, k, t, bias, order)
    return rows[row_order.argsort()]


def _plain(q: Tensor, k: Tensor, t: Tensor, bias: Tensor, order: _Sorted) -> Tensor:
    """In sight of autograd, which recomputes instead of keeping."""

    def rows(q: Tensor, k: Tensor, block: _Block) -> Tensor:
        s = (q @ k.mT) * t + bias
        return softplus((-s).masked_fill(order.left_out(block), -math.inf)).sum(-1)

    parts = []
    for block in order.blocks(sweep.CHUNK_ELEMENTS):
        args = (q[block.a : block.b], k[block.c : block.d], block)
        if torch.is_grad_enabled():
            parts.append(checkpoint(rows, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(rows(*args))
    return torch.cat(parts)


class _Negated:
    """`-s`, -inf where a pair is left out: each block in the place of the last one."""

    def __init__(self, q: Tensor, k: Tensor, t: Tensor, bias: Tensor, order: _Sorted) -> None:
        self.q, self.k, self.t, self.bias, self.order = q, k, t, bias, order
        self.blocks = order.blocks(CHUNK_ELEMENTS)
        self.room = q.new_empty(max((block.size for block in self.blocks), default=0))

    def __call__(self, block: _Block) -> Tensor:
        a, b, c, d = block
        s = self.room[: block.size].view(b - a, d - c)
        torch.mm(self.q[a:b], self.k[c:d].mT, out=s)
        s.mul_(-self.t).sub_(self.bias)
        return s.masked_fill_(self.order.left_out(block), -math.inf)


@torch.no_grad()
def _sums(q: Tensor, k: Tensor, t: Tensor, bias: Tensor, order: _Sorted) -> Tensor:
    negated, zero, out = _Negated(q, k, t, bias, order), q.new_zeros(()), q.new_empty(len(q))
    for block in negated.blocks:
        x = negated(block)
        torch.sum(torch.logaddexp(x, zero, out=x), -1, out=out[block.a : block.b])
    return out


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, t: Tensor, bias: Tensor, order: _Sorted) -> Tensor:
        ctx.save_for_backward(q, k, t, bias, *order)
        ctx.need = ctx.needs_input_grad[:4]
        return _sums(q, k, t, bias, order)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        need_q, need_k, need_t, need_bias = ctx.need

        @torch.no_grad()
        def gradients(g: Tensor, *saved: Any) -> Gradients:
            q, k, t, bias, *order = saved
            negated = _Negated(q, k, t, bias, _Sorted(*order))
            # New ones from g: under vmap it is more than it seems.
            dq, dk = g.new_zeros(q.shape), g.new_zeros(k.shape if need_k else (0,))
            slope = g.new_zeros(len(q))
            for block in negated.blocks:
                a, b, c, d = block
                x = negated(block).sigmoid_()
                weight = -g[a:b]
                if need_bias:
                    slope[a:b] = weight * x.sum(-1)
                if need_q or need_t:
                    dq[a:b] = (x @ k[c:d]) * (weight * t)[:, None]
                if need_k:
                    dk[c:d] += x.mT @ (q[a:b] * (weight * t)[:, None])
            return (
                dq if need_q else None,
                dk if need_k else None,
                (wide(q * dq).sum() / t).to(t.dtype).reshape(t.shape) if need_t else None,  # Euler
                slope.sum().reshape(bias.shape) if need_bias else None,
            )

        return *_once(gradients, grad_output, *ctx.saved_tensors), None
