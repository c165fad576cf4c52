"""What a run goes on from: its last checkpoint, compared with the settings and images of now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, checkpoints, load_newest
from .config import RESUME_MAY_CHANGE, ConfigError, PretrainConfig

STATE_VERSION = 2
Saved = tuple[dict[str, torch.Tensor], dict[str, Any]]  # weights and everything else


def load_saved(folder: Path, config: PretrainConfig) -> Saved | None:
    """The last checkpoint that can be read, or None for a run that was stopped before its first.

    Raises:
        CheckpointError: none can be read, or it is of another version.
        ConfigError: a setting that the run was not started with.
    """
    found = checkpoints(folder)
    if not found:
        return None
    path, weights, state = load_newest(found)
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{path} is of another version of clae_fast")
    before, now = state["config"], config.to_dict()
    for name, value in now.items():
        if name not in RESUME_MAY_CHANGE and before.get(name) != value:
            raise ConfigError(name, value, f"{before.get(name)!r}, as the run was started")
    return weights, state


def check_images(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a CheckpointError unless the images are, as far as one can tell, those of before."""
    for name, value in now.items():
        if state[name] != value:
            raise CheckpointError(
                f"the run was started on images with {name} {state[name]}, these have {value}"
            )
