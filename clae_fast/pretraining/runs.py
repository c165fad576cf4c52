"""The folder of a run: what is in it, and its model back in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clae_fast import convert_dual_batchnorm, strip_dual_batchnorm

from .checkpoint import CheckpointError, checkpoints, load_newest, remove_checkpoints
from .config import ConfigError, PretrainConfig
from .encoders import ContrastiveModel, build_encoder
from .files import CONFIG, ENCODER, RESULT, holds_run, write_whole

FIGURES = ("adversarial.png", "curves.png")
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LoadedRun:
    """A run's model: ordinary (main BatchNorm), in eval mode, on the CPU.

    `epoch` counts the epochs that were finished; `finished` tells whether the run was. The rest
    tells what images it was trained on.
    """

    model: ContrastiveModel
    config: PretrainConfig
    epoch: int
    finished: bool
    in_channels: int
    image_size: int
    data: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def start_run(folder: Path, config: PretrainConfig) -> None:
    """Take away what an earlier run left in `folder` (made if need be) and write the settings.

    Raises:
        ConfigError: the folder holds files with those names that no run wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if holds_run(folder):
        read_config(folder)
    for name in (RESULT, ENCODER, *FIGURES, METRICS, "evaluation.json"):
        (folder / name).unlink(missing_ok=True)
    remove_checkpoints(folder)
    write_whole(folder / CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())


def read_config(folder: Path) -> PretrainConfig:
    """The settings that a run in `folder` was started with.

    Raises:
        ConfigError: there is no run, or its settings cannot be read.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        what = "this is a file" if folder.exists() else "there is no such folder"
        raise ConfigError("run", folder, f"the folder of a run, and {what}")
    if not path.exists():
        raise ConfigError("run", folder, f"the folder of a run, and it holds no {CONFIG}")
    try:
        return PretrainConfig.from_dict(json.loads(path.read_text()))
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            "run", folder, f"settings in {CONFIG} that can be read ({error})"
        ) from error


def load_run(path: str | Path) -> LoadedRun:
    """The model of a run: the finished one, else that of its last checkpoint.

    Args:
        path: the folder of a run.

    Raises:
        ConfigError: nothing to load, or weights that do not belong to the settings.
        CheckpointError: a checkpoint that cannot be read.
    """
    folder = Path(path)
    config = read_config(folder)
    if (folder / ENCODER).exists():
        weights, facts = _finished(folder / ENCODER)
        epoch, finished = config.epochs, True
    else:
        found = checkpoints(folder)
        if not found:
            raise ConfigError("run", folder, "a run with a checkpoint, and it has none yet")
        _, weights, facts = load_newest(found)
        epoch, finished = int(facts["epoch"]), False
    channels, size = int(facts["in_channels"]), int(facts["image_size"])
    with torch.random.fork_rng(devices=[]):
        model = build_encoder(config, channels, size)
    if any(".aux." in name for name in weights):
        convert_dual_batchnorm(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            "run", folder, f"weights of the encoder {config.encoder} ({error})"
        ) from error
    strip_dual_batchnorm(model)
    mean, std = (tuple(map(float, facts[name])) for name in ("mean", "std"))
    return LoadedRun(
        model.eval(), config, epoch, finished, channels, size, str(facts["data"]), mean, std
    )


def _finished(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return weights, json.loads(metadata["run"])
    except Exception as error:  # unreadable in whatever way
        raise CheckpointError(f"{path} cannot be read: {error}") from error
