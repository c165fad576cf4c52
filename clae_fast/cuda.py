"""Host side of the CUDA kernels: what they can run, allocation, the stream."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension
from .cpp import layout_refusal, memory_format
from .cpp_pairs import dense_rows

OPERATORS = ("contrast", "sign_step")
MAX_WIDTH = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMS = {"nt_xent": 0, "one_way": 1, "two_way": 2}


def load(op: str) -> Callable[..., Any] | str:
    """The kernel's host function, or why there is none."""
    if reason := _extension.load():
        return reason
    built = _extension.build_facts().get("parts", {}).get("cuda", "no reason recorded")
    if built != "ok":
        return f"not built: {built}"
    if not torch.cuda.is_available():
        return "no GPU here"
    kernels: dict[str, Callable[..., Any]] = {"contrast": contrast, "sign_step": sign_step}
    return kernels[op]


@contextlib.contextmanager
def _on(x: Tensor) -> Any:
    """The GPU of x as the current one; its stream as a number."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream


@functools.cache
def _unusable(device: int) -> str | None:
    """Why nothing can run on that GPU: nothing was built, not for that GPU, or its driver is too
    old."""
    if reason := _extension.load():
        return reason
    said: str = torch.ops.clae_fast_C.cuda_unusable(device)
    return f"on cuda:{device} CUDA says: {said}" if said else None


def _index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


@functools.lru_cache(1024)
def _workspace(
    device: int, dtype: int, B: int, D: int, form: int, fold: bool, needs: tuple[bool, ...]
) -> int:
    """Floats of workspace; depends on nothing but these.

    Raises:
        _TooLarge: no tile fits the GPU, or it could not be asked.
    """
    floats: int = torch.ops.clae_fast_C.contrast_cuda_workspace(
        dtype, B, D, form, fold, *needs, device
    )
    if floats < 0:
        raise _TooLarge
    return floats


class _TooLarge(Exception):
    """Not remembered: what failed in asking may pass."""


def _same(q: Tensor, k: Tensor) -> bool:
    """Two equal sets take a fourth of the work."""
    return q.data_ptr() == k.data_ptr() and q.shape == k.shape and q.stride() == k.stride()


def _floats(q: Tensor, form: str, same: bool, needs: tuple[bool, ...]) -> int:
    B, D = q.shape
    fold = form == "nt_xent" and same
    return _workspace(_index(q), _DTYPES.index(q.dtype), B, D, _FORMS[form], fold, needs)


def contrast_refusal(
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
) -> str | None:
    """Why `contrast` cannot run these, None if it can."""
    if q.device.type != "cuda":
        return f"it runs on an NVIDIA GPU, the embeddings are on {q.device}"
    if q.dtype not in _DTYPES:
        return f"it knows float32, bfloat16 and float16, the embeddings are {q.dtype}"
    if q.shape[1] > MAX_WIDTH:
        return f"it knows at most {MAX_WIDTH} elements a row, the embeddings have {q.shape[1]}"
    if negatives is not None:
        return "it knows the batch's own negatives only, negative_keys are given"
    if reason := _unusable(_index(q)):
        return reason
    try:
        _floats(q, form, _same(q, k), (need_dq, need_dk, need_dscale))
    except _TooLarge:
        return f"{q.shape[0]:,} pairs are more than this GPU can hold in one launch"
    return None


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
    """`reference.contrast`, one launch."""
    if form not in _FORMS:
        raise ValueError(f"form must be 'nt_xent', 'one_way' or 'two_way', got {form!r}")
    B, D = q.shape
    same = _same(q, k)
    q = dense_rows(q)
    k = q if same else dense_rows(k)
    rows = 2 * B if form == "nt_xent" else B

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    loss = (new(B, 2) if form == "two_way" else new(rows)) if reduction == "none" else new(0)
    total = new(0) if reduction == "none" else new()
    lse, lse_col = new(rows), new(B if form == "two_way" else 0)
    dq, dk = new(*((B, D) if need_dq else (0,))), new(*((B, D) if need_dk else (0,)))
    dscale = new(1 if need_dscale else 0)
    anchors = B if form == "one_way" else 2 * B
    workspace = new(_floats(q, form, same, (need_dq, need_dk, need_dscale)))
    with _on(q) as stream:
        torch.ops.clae_fast_C.contrast_cuda.default(
            q, k, scale, scale_tensor, reciprocal, _FORMS[form], normalize,
            1 / anchors if reduction == "mean" else 1.0, loss, total, lse, lse_col, dq, dk, dscale,
            workspace, stream,
        )  # fmt: skip
    return (loss if reduction == "none" else total, lse, lse_col, dq, dk, new(0), dscale)


def sign_step_refusal(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step: float,
    eps: float,
    low: float | None = None,
    high: float | None = None,
    *tensors: Tensor | None,
) -> str | None:
    """Why `sign_step` cannot run these, None if it can."""
    if x.device.type != "cuda":
        return f"it runs on an NVIDIA GPU, x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it knows float32, bfloat16 and float16, x is {x.dtype}"
    if reason := _unusable(_index(x)):
        return reason
    if any(t.device != x.device for t in (grad, x0, *(t for t in tensors if t is not None))):
        return f"everything must be on {x.device} as x is"
    return layout_refusal(x, tensors)


def sign_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step: float,
    eps: float,
    low: float | None = None,
    high: float | None = None,
    *tensors: Tensor | None,
) -> Tensor:
    """`reference.sign_step`, one pass over memory; tensors are read on the GPU."""
    order = memory_format(x)
    assert order is not None
    grad, x0 = (t.to(x.dtype).contiguous(memory_format=order) for t in (grad, x0))
    out = torch.empty_like(x)
    numbers = [step, eps, -math.inf if low is None else low, math.inf if high is None else high]
    sizes = [
        None if t is None else t.reshape(-1).to(device=x.device, dtype=torch.float32).contiguous()
        for _, t in itertools.zip_longest(numbers, tensors)
    ]
    varies = any(t is not None and t.numel() > 1 for t in sizes)
    channels = x.shape[1] if varies else 1
    inner = 0
    if varies and x.numel():
        spatial = x.numel() // (x.shape[0] * channels)
        inner = spatial if order == torch.contiguous_format else 1
    with _on(x) as stream:
        torch.ops.clae_fast_C.sign_step_cuda.default(
            x, grad, x0, out, *numbers, *sizes, inner, channels, stream
        )
    return out
