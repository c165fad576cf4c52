"""What a run goes on from: its last checkpoint, compared with the settings and images of now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import CheckpointError, checkpoints, load_newest
from .config import RESUME_MAY_CHANGE, ConfigError, PretrainConfig
from .processes import Processes

if TYPE_CHECKING:
    from .loop import _Run

STATE_VERSION = 3
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
        if not _alike(state[name], value):
            raise CheckpointError(
                f"the run was started on images with {name} {state[name]}, these have {value}"
            )


def _alike(before: Any, now: Any) -> bool:
    """Equal; means and deviations up to their last digits, which the number of threads moves."""
    if isinstance(now, tuple) and len(now) == len(before):
        return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(before, now, strict=True))
    return bool(before == now)


def view_seeds(config: PretrainConfig, saved: Saved | None, processes: Processes) -> str:
    """ "batch" or "image": as the run was started, whatever the number of processes is now."""
    if saved is not None:
        return str(saved[1]["view_seeds"])
    if config.view_seeds != "auto":
        return config.view_seeds
    return "batch" if processes.size == 1 else "image"


def seed_apart(config: PretrainConfig, processes: Processes, step: int) -> None:
    """What draws from the global random state (dropout) draws other numbers in every process.

    The first goes on with the stream of a run of one.
    """
    if not processes.first:
        generator = torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (processes.rank + 1,), generator=generator)
        torch.manual_seed((int(seeds[-1]) + step) % 2**62)


def image_facts(run: _Run) -> dict[str, Any]:
    """What a run must find again when it goes on."""
    return {
        "data": run.data.name,
        "num_images": len(run.data.train_images),
        "in_channels": run.channels,
        "image_size": run.size,
        "mean": tuple(run.mean),
        "std": tuple(run.std),
    }


def check_same_images(run: _Run) -> None:
    """Raises a ConfigError unless all processes see the images of the first, as far as one can
    tell."""
    first, *others = run.processes.gather(image_facts(run))
    for rank, facts in enumerate(others, 1):
        for name, value in facts.items():
            if not _alike(first[name], value):
                raise ConfigError(
                    "data_dir",
                    run.config.data_dir,
                    f"the same images in all processes, and {name} is {first[name]} in the first "
                    f"and {value} in process {rank}",
                )


def run_state(run: _Run) -> dict[str, Any]:
    """All that a checkpoint holds beside the weights; every process must ask for it."""
    cuda = torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None
    states = run.processes.gather((torch.get_rng_state(), cuda))
    return {
        "version": STATE_VERSION,
        "config": run.config.to_dict(),
        **image_facts(run),
        "threads": torch.get_num_threads(),
        "epoch": run.epoch,
        "step": run.step,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.training_step.scaler.state_dict(),
        "view_seeds": run.view_seeds,
        "rng": [cpu for cpu, _ in states],  # of every process
        "cuda_rng": [gpu for _, gpu in states],
        "loss_total": run.monitor.total,
        "loss_images": run.monitor.images,
        "epoch_losses": run.epoch_losses,
        "knn_history": run.knn_history,
        "knn_untrained": run.knn_untrained,
        "seconds": run.seconds,
        "images": run.images,
        "metrics_length": run.metrics.length,
        "examples": run.examples,
    }


def restore(run: _Run, saved: Saved) -> None:
    """Put weights and state back. A process that the run did not have before draws anew."""
    weights, state = saved
    run.encoder.load_state_dict(weights)
    run.optimizer.load_state_dict(state["optimizer"])
    run.training_step.scaler.load_state_dict(state["scaler"])
    for name in ("epoch", "step", "epoch_losses", "seconds", "images", "knn_untrained"):
        setattr(run, name, state[name])
    run.knn_history = [(int(e), float(a)) for e, a in state["knn_history"]]
    run.examples = None if state["examples"] is None else tuple(state["examples"])
    run.monitor.total, run.monitor.images = state["loss_total"], state["loss_images"]
    rank = run.processes.rank
    if rank >= len(state["rng"]):
        seed_apart(run.config, run.processes, run.global_step())
        return
    torch.set_rng_state(state["rng"][rank])
    if run.device.type == "cuda" and state["cuda_rng"][rank] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"][rank], run.device)
