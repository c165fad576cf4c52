"""The options that the softmax losses share: their checks, and what they become."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import validation as check
from ..classes import Ids, dense_ids
from ..composite import Pairs
from ..group_autograd import shared
from ..numerics import (
    Unit,
    alarm,
    as_given,
    compute_dtype,
    cosine,
    effective_scale,
    promoted,
    unit_rows,
)
from ..softmax_rows import Block
from ..sweeps import Where, of_rows
from .plan import Scale


class RowOptions(NamedTuple):
    """Checked options; None or 0: not asked for."""

    sample_weight: Tensor | None = None
    label_smoothing: float = 0.0
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    extra_negatives: Tensor | None = None
    extra_ids: Tensor | None = None
    targets: Tensor | None = None


def row_options(
    name: str,
    x: Tensor,
    samples: int,
    *,
    sample_weight: Any = None,
    label_smoothing: Any = 0.0,
    ids: Any = None,
    query_ids: Any = None,
    key_ids: Any = None,
    columns: int | None = None,
    extra_negatives: Any = None,
    extra_ids: Any = None,
    targets: Any = None,
    target_columns: int | None = None,
) -> RowOptions:
    """Check them against the embeddings `x`, which the user knows as `name`.

    `target_columns` None: those of all ranks, known when they meet.
    """
    if sample_weight is not None:
        _vector("sample_weight", sample_weight, samples, x)
    check.share("label_smoothing", label_smoothing)
    if ids is not None:
        check.integers("ids", ids, samples, x)
        query_ids = key_ids = ids
    elif query_ids is not None or key_ids is not None:
        for one, other in (("query_ids", "key_ids"), ("key_ids", "query_ids")):
            if {"query_ids": query_ids, "key_ids": key_ids}[one] is None:
                raise ValueError(f"{one} must be given where {other} is, got None")
        check.integers("query_ids", query_ids, samples, x)
        check.integers("key_ids", key_ids, samples if columns is None else columns, x)
    if extra_negatives is not None:
        check.embeddings(
            name, x, "extra_negatives", extra_negatives, same_rows=False, empty=True, any_float=True
        )
    if extra_ids is not None:
        if extra_negatives is None or query_ids is None:
            missing = "extra_negatives" if extra_negatives is None else "ids of the rows"
            raise ValueError(f"extra_ids needs {missing}, got None")
        check.integers("extra_ids", extra_ids, extra_negatives.shape[0], x)
    if targets is not None:
        _targets(targets, samples, target_columns, x)
        if query_ids is not None:
            raise ValueError(
                "targets and ids exclude each other (a column that ids leave out may have a "
                "target): give a duplicate its share in targets instead, got both"
            )
    return RowOptions(
        sample_weight, float(label_smoothing), query_ids, key_ids, extra_negatives, extra_ids,
        targets,
    )  # fmt: skip


def _vector(name: str, value: Any, length: int, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    check.placed(name, value, (length,), like)


def _targets(value: Any, rows: int, columns: int | None, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(value).__name__}")
    known = (torch.strided, torch.sparse_coo, torch.sparse_csr)
    if value.layout not in known or not value.is_floating_point():
        raise TypeError(
            "targets must be a float tensor, dense, sparse COO or sparse CSR, got "
            f"{value.dtype}, {value.layout}"
        )
    if value.requires_grad:
        raise ValueError("targets are constants: detach them, got one that requires grad")
    if columns is None:
        columns = value.shape[-1] if value.dim() else 0
    check.placed("targets", value, (rows, columns), like)


class Rows(NamedTuple):
    """The embeddings of a loss as it computes with them."""

    pairs: Pairs
    t: Tensor | float
    units: tuple[Unit, ...]
    extra: Unit | None
    alarm: Tensor  # 0, or NaN: a row with nothing to contrast would hide it

    def positives(self, a: Unit, b: Unit) -> Tensor:
        """`t <a_i, b_i>` (N,), in the dtype of a log-sum-exp."""
        return cosine(a, b, of_rows(a.z, self.pairs.where)) * self.t


def prepare(
    scale: Scale, normalize: bool, where: Where, extra: Tensor | None, *embeddings: Tensor
) -> Rows:
    """Rows in the dtype of the arithmetic, normalised or as they are."""
    number, tensor, reciprocal = scale
    given = promoted(*(x for x in (*embeddings, extra) if x is not None))
    dtype = compute_dtype(given[0].dtype)
    if where.group:
        tensor = shared(tensor, where.group, where.call)
    raw = [x.to(dtype) for x in given]
    # What reaches t is the difference of sums too, and adds up in the dtype it has here.
    exact = of_rows(raw[0], where)
    t = effective_scale(number, None if tensor is None else tensor.to(exact), reciprocal, exact)
    t = _as_kernels_have_it(t, dtype)
    units = [unit_rows(x) if normalize else as_given(x) for x in raw]
    last = None if extra is None else units.pop()
    return Rows(Pairs(where, t), t, tuple(units), last, alarm(*raw))


def _as_kernels_have_it(t: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """t as a number of `dtype`: a positive and its negatives must meet the same one."""
    if isinstance(t, Tensor):
        return t + (t.detach().to(dtype).to(t.dtype) - t.detach())
    return torch.tensor(t, dtype=dtype, device="cpu").item() if dtype == torch.float32 else t


class Numbered(NamedTuple):
    """Ids of rows, columns and extra negatives, numbered together."""

    rows: Ids | None = None
    columns: Ids | None = None
    extra: Ids | None = None


def numbered(pairs: Pairs, options: RowOptions, repeat: int = 1) -> Numbered:
    """`repeat`: how often the batch stands on top of itself in rows and columns."""
    if options.row_ids is None or options.col_ids is None:
        return Numbered()
    stacks = [options.row_ids.repeat(repeat), options.col_ids.repeat(repeat)]
    if options.extra_ids is not None:
        stacks.append(options.extra_ids)
    return Numbered(*dense_ids(pairs, *stacks))


def extra_blocks(rows: Rows, q: Tensor, ids: Numbered) -> list[Block]:
    """The extra negatives, which are this process's own: all its rows meet them."""
    if rows.extra is None:
        return []
    both = None if ids.rows is None or ids.extra is None else (ids.rows, ids.extra)
    return [Block(rows.pairs.here, q, rows.extra.z, ids=both)]


def weights(options: RowOptions, like: Tensor, repeat: int = 1) -> Tensor | None:
    """Sample weights, one per row of a batch that stands on top of itself `repeat` times."""
    w = options.sample_weight
    return None if w is None else w.to(like.dtype).repeat(repeat)
