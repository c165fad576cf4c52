"""The BatchNorm branch of a recomputed forward.

Activation checkpointing runs a forward again inside the backward, when the `batchnorm_branch`
around the first one is long over. The non-reentrant kind keeps a frame that holds the function to
be run again: the branch is tied to that function. Where no frame can be found, recomputing is
refused, so that the wrong branch is never computed.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch


class HasBranch(Protocol):
    branch: str


def branch_of(layer: HasBranch) -> str:
    """The layer's branch; remembers it for a recomputation, or raises where that cannot be."""
    if torch.compiler.is_compiling():
        return layer.branch  # recomputed inside the compiled graph, on the branch it traced
    frame = _checkpoint_frame()
    if frame is not None:
        _remember(frame, layer)
    elif torch._C._current_graph_task_id() != -1 and not _depth():
        raise RuntimeError(
            "a DualBatchNorm runs inside a backward and cannot know its branch: use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which is remembered, or "
            "strip_dual_batchnorm"
        )
    return layer.branch


_recomputing = threading.local()
"""`depth`: how many remembered functions this thread is running again."""


def _depth() -> int:
    return getattr(_recomputing, "depth", 0)


def _checkpoint_frame() -> Any:
    """The frame of the non-reentrant checkpoint that records us now, if any."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook."):
        return None
    pack = hooks[0]
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    return cells["frame"].cell_contents if "frame" in cells else None


def _remember(frame: Any, layer: HasBranch) -> None:
    """Tie the layer's branch to the frame's function."""
    branches = getattr(frame.recompute_fn, "branches", None)
    if branches is None:
        branches = {}
        frame.recompute_fn = _on_branches(frame.recompute_fn, branches)
    _, first = branches.setdefault(id(layer), (layer, layer.branch))
    if first != layer.branch:
        raise RuntimeError(
            "batchnorm_branch was entered inside a checkpointed function that had already run the "
            "same layer on another branch: put the checkpoint inside the `with`"
        )


def _on_branches(
    recompute: Callable[..., Any], branches: dict[int, tuple[HasBranch, str]]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = [(layer, layer.branch) for layer, _ in branches.values()]
        for layer, branch in branches.values():
            layer.branch = branch
        _recomputing.depth = _depth() + 1
        try:
            return recompute(*args, **kwargs)
        finally:
            _recomputing.depth -= 1
            for layer, branch in before:
                layer.branch = branch

    run.branches = branches  # type: ignore[attr-defined]
    return run
