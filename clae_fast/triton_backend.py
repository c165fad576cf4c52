"""The backend `triton`: whether its kernels load here, and what they can run."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATORS = ("pair_lse", "pair_grad", "pair_mean", "pair_sigmoid", "pair_uel", "contrast")
MAX_WIDTH = 2048
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Triton runs its kernels on the CPU, one program after another: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load(op: str) -> Callable[..., Any] | str:
    """The kernel's host function, or why there is none. Without a GPU triton is not imported."""
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU here (TRITON_INTERPRET=1, set before the import, runs it on the CPU)"
    try:
        module = importlib.import_module(f".kernels.{op}", __package__)
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    # Triton's own functions are made for the one or the other when it is imported.
    if interpreted() and type(module.triton.language.sum).__name__ != "InterpretedFunction":
        return "TRITON_INTERPRET=1 was set after triton had been imported, which is too late"
    kernel: Callable[..., Any] = getattr(module, op)
    return kernel


def refusal(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why these kernels cannot run on q, None if they can."""
    if q.dtype not in _DTYPES:
        return f"it knows float32, bfloat16 and float16, the embeddings are {q.dtype}"
    if q.shape[-1] > MAX_WIDTH:
        return f"it knows at most {MAX_WIDTH} elements a row, the embeddings have {q.shape[-1]}"
    if kwargs.get("wide"):
        return "its log-sum-exps are float32"
    if q.device.type != "cuda" and not interpreted():
        return f"it runs on a GPU, the embeddings are on {q.device}"
    return None
