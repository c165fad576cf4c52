"""A CUDA graph's stand-in on the CPU: the operators of a function, run again in the same memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(function: Callable[[], Tensor], device) -> tuple[Callable[[], None], Tensor]:
    """As `graphed.record`; but recording runs the work once, as there is no other way here, and
    what it wrote in place stays written."""
    with _Recorder() as recorder:
        result = function()

    @torch.no_grad()
    def replay():
        for func, args, kwargs, out in recorder.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay, result
