"""Host side of the C++ operators over all pairs: what they can run, allocation, pauses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .numerics import compute_dtype

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What was not asked for: made once, as five of them cost more than a small loss, and one for each
# place, as no two results of one call may share memory.
with torch.inference_mode(False):  # whatever mode and default device the import meets
    _NOTHING = {
        dtype: tuple(torch.empty(0, dtype=dtype, device="cpu") for _ in range(5))
        for dtype in (torch.float32, torch.float64)
    }
PAUSE_MS = 100  # how long a kernel may run before Python looks for Ctrl-C
_OPS = {"pair_lse": 0, "pair_grad": 1, "pair_mean": 2, "pair_sigmoid": 3, "pair_uel": 4}
_SKIPS = {"none": 0, "diagonal": 1, "twins": 2}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_FORMS = {"nt_xent": 0, "one_way": 1, "two_way": 2}


def refusal(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why an operator over pairs cannot run these, None if it can."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, the embeddings are on {q.device}"
    if q.dtype not in _DTYPES:
        return f"it knows float32, float64, bfloat16 and float16, the embeddings are {q.dtype}"
    return None


def dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _scale(scale: float, scale_tensor: Tensor | None, reciprocal: bool) -> float:
    """`t`; reading a tensor on the CPU waits for nothing."""
    if scale_tensor is None:
        return scale
    value = float(scale_tensor)
    if not reciprocal:
        return scale * value
    return scale / value if value else scale * float("inf")


def _run(op: Callable[..., int], *args: Any) -> None:
    """An operator to its end; between the calls of a long one Python answers Ctrl-C."""
    token = op(*args, None, 0, PAUSE_MS)
    if token == 0:
        return
    memory, token = torch.empty(-token, dtype=torch.uint8, device="cpu"), 0
    while token := op(*args, memory, token, PAUSE_MS):
        pass


def contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    form: str = "nt_xent",
    normalize: bool = True,
    need_dq: bool = False,
    need_dk: bool = False,
    need_dnegatives: bool = False,
    need_dscale: bool = False,
    reduction: str = "none",
) -> tuple[Tensor, ...]:
    """`reference.contrast`, fused."""
    if form not in _FORMS:
        raise ValueError(f"form must be 'nt_xent', 'one_way' or 'two_way', got {form!r}")
    B = q.shape[0]
    two_way, rows = form == "two_way", 2 * B if form == "nt_xent" else B
    dtype = compute_dtype(q.dtype)
    new, nothing = torch.empty, _NOTHING[dtype]
    out = (
        new(() if reduction != "none" else (B, 2) if two_way else rows, dtype=dtype),
        new(rows, dtype=dtype),
        new(B, dtype=dtype) if two_way else nothing[0],
        new(q.shape, dtype=dtype) if need_dq else nothing[1],
        new(k.shape, dtype=dtype) if need_dk else nothing[2],
        nothing[3]
        if negatives is None or not need_dnegatives
        else new(negatives.shape, dtype=dtype),
        new(1, dtype=dtype) if need_dscale else nothing[4],
    )
    _run(
        torch.ops.clae_fast_C.contrast.default,
        dense_rows(q),
        dense_rows(k),
        None if negatives is None else dense_rows(negatives),
        _scale(scale, scale_tensor, reciprocal),
        _FORMS[form],
        normalize,
        _REDUCTIONS[reduction],
        *out,
    )
    return out


def _int32(row_ids: Tensor | None, col_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids as the kernel compares them; (None, None) unless both are there."""
    if row_ids is None or col_ids is None:
        return None, None
    if row_ids.dtype != torch.int32 or col_ids.dtype != torch.int32:
        both = torch.cat((row_ids, col_ids)).unique(return_inverse=True)[1].to(torch.int32)
        return both[: len(row_ids)], both[len(row_ids) :]
    return row_ids.contiguous(), col_ids.contiguous()


def _pairs(
    op: str,
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    reciprocal: bool,
    skip: str,
    offset: int,
    ids: tuple[Tensor | None, Tensor | None],
    *,
    bias: float = 0.0,
    negative_weight: float = 1.0,
    by_row: tuple[Tensor | None, Tensor | None] = (None, None),
    by_col: tuple[Tensor | None, Tensor | None] = (None, None),
    rows: bool = True,
    wide: bool = False,
    slope: bool = False,
    dq: bool = False,
    dk: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sweep; results that were not asked for have no elements."""
    if skip not in _SKIPS:
        raise ValueError(f"skip must be 'none', 'diagonal' or 'twins', got {skip!r}")
    dtype = compute_dtype(q.dtype)

    def numbers(pair: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
        if pair[0] is None and op == "pair_grad":
            return [None, None]
        return [None if x is None else x.to(dtype).contiguous() for x in pair]

    remapped = _int32(*ids)
    new, nothing = torch.empty, _NOTHING[dtype]
    N = q.shape[0]
    out = (
        new(N, dtype=torch.float64 if wide else dtype) if rows else nothing[0],
        new(N, dtype=dtype) if slope else nothing[1],
        new(q.shape, dtype=dtype) if dq else nothing[2],
        new(k.shape, dtype=dtype) if dk else nothing[3],
    )
    _run(
        torch.ops.clae_fast_C.pairs.default,
        _OPS[op],
        dense_rows(q),
        dense_rows(k),
        _scale(scale, scale_tensor, reciprocal),
        bias,
        negative_weight,
        _SKIPS[skip],
        offset,
        *remapped,
        *numbers(by_row),
        *numbers(by_col),
        *out,
    )
    return out


def pair_lse(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    skip: str = "none",
    offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """`reference.pair_lse`, one GEMM."""
    lse, *_ = _pairs(
        "pair_lse", q, k, scale, scale_tensor, reciprocal, skip, offset, (row_ids, col_ids),
        wide=wide,
    )  # fmt: skip
    return lse


def pair_grad(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    skip: str = "none",
    offset: int = 0,
    row_lse: Tensor | None = None,
    row_weight: Tensor | None = None,
    col_lse: Tensor | None = None,
    col_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> Tensor:
    """`reference.pair_grad`, two GEMMs."""
    by_row = (row_lse, row_weight) if row_weight is not None else (None, None)
    by_col = (col_lse, col_weight) if col_weight is not None else (None, None)
    return _pairs(
        "pair_grad", q, k, scale, scale_tensor, reciprocal, skip, offset, (row_ids, col_ids),
        by_row=by_row, by_col=by_col, rows=False, dq=True,
    )[2]  # fmt: skip


def pair_mean(
    q: Tensor,
    k: Tensor,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    skip: str = "none",
    offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.pair_mean`, two GEMMs."""
    lse, _, o, _ = _pairs(
        "pair_mean", q, k, scale, scale_tensor, reciprocal, skip, offset, (row_ids, col_ids),
        wide=wide, dq=True,
    )  # fmt: skip
    return lse, o


def pair_sigmoid(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    bias_tensor: Tensor | None = None,
    row_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    need_dq: bool = False,
    need_dk: bool = False,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.pair_sigmoid`, one to three GEMMs."""
    if bias_tensor is not None:
        bias += float(bias_tensor)
    loss, slope, dq, dk = _pairs(
        "pair_sigmoid", q, k, scale, scale_tensor, reciprocal, "none", offset, (row_ids, col_ids),
        bias=bias, by_row=(None, row_weight), slope=True, dq=need_dq, dk=need_dk,
    )  # fmt: skip
    return loss, slope, dq, dk


def pair_uel(
    q: Tensor,
    k: Tensor,
    scale: float,
    negative_weight: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    row_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    need_dq: bool = False,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference.pair_uel`, two GEMMs."""
    loss, _, dq, _ = _pairs(
        "pair_uel", q, k, scale, scale_tensor, reciprocal, "none", offset, (row_ids, col_ids),
        negative_weight=negative_weight, by_row=(None, row_weight), dq=need_dq,
    )  # fmt: skip
    return loss, dq
