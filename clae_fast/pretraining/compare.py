"""Baseline, published-cost, exact and shared CLAE from the same seeds, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import VARIANTS, ConfigError, PretrainConfig
from .data import ImageData, load_data
from .files import holds_run, write_whole
from .linear_probe import logistic_probe
from .loop import pretrain
from .machine import choose_device
from .output import write_result
from .probe import encode_images
from .provenance import provenance
from .result import PretrainResult
from .runs import read_config
from .step_cost import step_costs

ACCURACIES = "accuracies.json"


def compare(
    config: PretrainConfig,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    folder: str | Path,
    data: ImageData | None = None,
    rounds: int = 15,
    progress: bool = False,
) -> dict[str, Any]:
    """Train every variant with every seed, measure a step of each, and return all figures.

    One seed means the same initial weights and the same batches for all variants. Every run has
    its own folder `<variant>-seed<seed>` below `folder`; runs that are finished there with the
    same settings are taken as they are, so an interrupted comparison goes on where it stopped.

    Args:
        config: the settings; `seed`, `clae` and `attack` are replaced.
        seeds: at least one; accuracies are given as mean and spread over them.
        variants: of VARIANTS, in the order of the table; time ratios refer to the first.
        folder: for the runs.
        data: images to use instead of `config.data`; they need labels.
        rounds: steps of each variant that are timed.
        progress: show each run's progress on stderr.

    Returns:
        {"settings", "seeds", "rounds", "variants": {name: {"knn", "linear_probe",
        "train_seconds", "commits" (a value a seed), "seconds_per_step", "ratio",
        "forwards_per_step", "memory_bytes"}}, "provenance" (of the steps that were timed)}, of
        plain numbers and texts.

    Raises:
        ConfigError: an unknown variant, no seed, images without labels, or a run in the folder
            that was made with other settings.
    """
    seeds, variants, folder = tuple(seeds), tuple(variants), Path(folder)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError("seeds", seeds, "at least one seed, each once")
    for name in variants:
        if name not in VARIANTS:
            raise ConfigError("variants", name, "one of " + ", ".join(VARIANTS))
    if not variants or len(set(variants)) != len(variants):
        raise ConfigError("variants", variants, "at least one variant, each once")
    if data is None:
        data = load_data(
            config.data, config.data_dir, download=config.download, memory_gib=config.memory_gib
        )
    if data.train_labels is None or data.test_labels is None:
        raise ConfigError("data", data.name, "images with labels: the comparison needs accuracies")
    configs = {name: _variant(config, name) for name in variants}
    for c in configs.values():
        for seed in seeds:
            replace(c, seed=seed)  # a wrong seed is found before the first run
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in seeds:
        for name in variants:
            where = folder / f"{name}-seed{seed}"
            if progress:
                print(f"{name}, seed {seed}: {where}", file=sys.stderr, flush=True)
            runs[name].append(_run(replace(configs[name], seed=seed), data, where, progress))
    costs = step_costs(configs, data, rounds=rounds)
    figures = {
        name: {
            "knn": [run["knn"] for run in runs[name]],
            "linear_probe": [run["linear_probe"] for run in runs[name]],
            "train_seconds": [run["train_seconds"] for run in runs[name]],
            "commits": [run["commit"] for run in runs[name]],
            "seconds_per_step": costs[name].seconds,
            "ratio": costs[name].ratio,
            "forwards_per_step": costs[name].forwards,
            "memory_bytes": costs[name].memory_bytes,
        }
        for name in variants
    }
    return {
        "settings": config.to_dict() | {"eps": config.eps_normalized, "data": data.name},
        "seeds": list(seeds),
        "rounds": rounds,
        "variants": figures,
        "provenance": provenance(choose_device(config)),
    }


def _variant(config: PretrainConfig, name: str) -> PretrainConfig:
    try:
        return replace(config, **VARIANTS[name])
    except ConfigError as error:
        raise ConfigError("variants", name, f"others with these settings ({error})") from error


def _run(config: PretrainConfig, data: ImageData, folder: Path, progress: bool) -> dict[str, Any]:
    """Accuracies, seconds and commit of one run, trained now or found finished."""
    wanted = json.loads(json.dumps(config.to_dict()))
    path = folder / ACCURACIES
    if path.exists():
        found = json.loads(path.read_text())
        if found["config"] != wanted:
            raise ConfigError("output", folder, "runs made with these settings, or an empty folder")
        return {"commit": "unknown", **found["accuracies"]}
    stopped = holds_run(folder)
    if stopped and read_config(folder) != config:
        raise ConfigError("output", folder, "runs made with these settings, or an empty folder")
    result = pretrain(config, data=data, progress=progress, folder=folder, resume=stopped)
    write_result(result, folder)
    accuracies = _accuracies(result, data) | {"commit": provenance()["commit"]}
    text = json.dumps({"config": wanted, "accuracies": accuracies}, indent=2) + "\n"
    write_whole(path, text.encode())
    return accuracies


def _accuracies(result: PretrainResult, data: ImageData) -> dict[str, Any]:
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert result.knn_trained is not None
    train, test = (
        encode_images(result.encoder, images, result.mean, result.std, image_size=result.image_size)
        for images in (data.train_images, data.test_images)
    )
    probe = logistic_probe(train, data.train_labels, test, data.test_labels)
    return {
        "knn": result.knn_trained,
        "linear_probe": probe.accuracy,
        "train_seconds": result.train_seconds,
    }
