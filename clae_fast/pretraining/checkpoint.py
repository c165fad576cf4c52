"""Checkpoints that are there whole or not at all, however the process ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from .files import CHECKPOINTS

KEEP = 2
WEIGHTS, STATE = "model.safetensors", "state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read: which file and why."""


def save_checkpoint(
    run_folder: Path, weights: dict[str, torch.Tensor], state: dict[str, Any], step: int
) -> Path:
    """Write `run_folder/checkpoints/<step>/` and return it; the KEEP newest stay.

    The folder is filled under another name, synced to the disk and renamed: a kill at any moment
    leaves the earlier checkpoints as they were.

    Args:
        run_folder: of the run; exists.
        weights: the model's state_dict.
        state: everything else, of what `torch.load(weights_only=True)` takes.
        step: optimiser steps done: the name.
    """
    from safetensors.torch import save_file

    parent = run_folder / CHECKPOINTS
    parent.mkdir(exist_ok=True)
    target = parent / f"{step:09d}"
    if target.exists():
        return target
    for leftover in [*parent.glob(".new-*"), *parent.glob(".old-*")]:  # of a kill
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
    os.chmod(temporary, 0o755)
    try:
        save_file(separate(weights), temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        for path in (temporary / WEIGHTS, temporary / STATE, temporary):
            _sync(path)
        os.rename(temporary, target)
        _sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run_folder)[:-KEEP]:
        gone = parent / f".old-{old.name}"
        os.rename(old, gone)  # never half a checkpoint under its own name
        shutil.rmtree(gone, ignore_errors=True)
    return target


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    parent = run_folder / CHECKPOINTS
    if not parent.is_dir():
        return []
    return sorted(p for p in parent.iterdir() if p.is_dir() and p.name.isdigit())


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, state) of one checkpoint folder, on the CPU.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    from safetensors.torch import load_file

    name = WEIGHTS
    try:
        weights = load_file(path / WEIGHTS)
        name = STATE
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # unreadable in whatever way; the rest is advice to developers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path / name} cannot be read: {reason}") from error
    return weights, state


def load_newest(found: list[Path]) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """(path, weights, state) of the last one that can be read; a warning names a damaged one.

    Raises:
        CheckpointError: none of them can be read.
    """
    for path in reversed(found):
        try:
            return path, *load_checkpoint(path)
        except CheckpointError as error:
            if path == found[0]:
                raise
            warnings.warn(f"{error}; going on from the one before", stacklevel=2)
    raise CheckpointError("there is no checkpoint")


def remove_checkpoints(run_folder: Path) -> None:
    """All of a run's, and nothing else that may lie beside them."""
    parent = run_folder / CHECKPOINTS
    for path in [*checkpoints(run_folder), *parent.glob(".new-*"), *parent.glob(".old-*")]:
        shutil.rmtree(path, ignore_errors=True)
    if parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()


def separate(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU: safetensors takes no tensors that share memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
