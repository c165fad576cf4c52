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
    if torch._C._current_graph_task_id() != -1 and not any(id(layer) in b for b in _running()):
        raise RuntimeError(
            "a DualBatchNorm runs inside a backward and cannot know its branch: use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which is remembered, or "
            "strip_dual_batchnorm"
        )
    for frame in _checkpoint_frames():
        _remember(frame, layer)
    return layer.branch


Branches = dict[int, tuple[HasBranch, str]]
_thread = threading.local()


def _running() -> list[Branches]:
    """The remembered branches of the functions that this thread is running again."""
    if not hasattr(_thread, "running"):
        _thread.running = []
    running: list[Branches] = _thread.running
    return running


def _checkpoint_frames() -> list[Any]:
    """The frames of the non-reentrant checkpoints that record us now, nested ones too."""
    autograd = torch._C._autograd
    hooks = []
    # Only the top of the stack can be read: take it apart, and put it together again.
    while _is_checkpoint(top := autograd._top_saved_tensors_default_hooks(True)):
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    for hook in reversed(hooks):
        autograd._push_saved_tensors_default_hooks(*hook)
    cells = [
        dict(zip(h[0].__code__.co_freevars, h[0].__closure__ or (), strict=True)) for h in hooks
    ]
    return [cell["frame"].cell_contents for cell in cells if "frame" in cell]


def _is_checkpoint(hooks: Any) -> bool:
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith(
        "_checkpoint_hook."
    )


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


def _on_branches(recompute: Callable[..., Any], branches: Branches) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = [(layer, layer.branch) for layer, _ in branches.values()]
        for layer, branch in branches.values():
            layer.branch = branch
        _running().append(branches)
        try:
            return recompute(*args, **kwargs)
        finally:
            _running().pop()
            for layer, branch in before:
                layer.branch = branch

    run.branches = branches  # type: ignore[attr-defined]
    return run
