"""What a run leaves: adversarial.png, encoder.safetensors, metrics.json, each written whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from clae_fast._version import __version__

from .config import METHOD_NAMES
from .figures import adversarial_figure
from .files import atomic_path
from .loop import PretrainResult, default_threads


def write_result(result: PretrainResult, folder: str | Path) -> list[Path]:
    """Write the files into `folder` (made if need be) and return their paths.

    adversarial.png is only there with CLAE. encoder.safetensors holds the state_dict of the
    plain encoder (main BatchNorm); its metadata holds the settings as JSON.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(result.config) | {
        "temperature": result.config.loss_temperature,
        "data": result.data,
        "threads": result.config.threads or default_threads(result.config),
    }
    figure, weights_file, metrics_file = (
        folder / name for name in ("adversarial.png", "encoder.safetensors", "metrics.json")
    )
    if result.examples is None:
        figure.unlink(missing_ok=True)  # of an earlier run: it would not belong to this encoder
    else:
        c = result.config
        adversarial_figure(
            result.examples,
            figure,
            title=f"{METHOD_NAMES[c.method]} with CLAE on {result.data}: views and their attack",
            subtitle=f"one FGSM step on the contrastive loss, \u03b5 = {c.eps:g} in units of the "
            f"normalised image; epoch {c.epochs} of {c.epochs}, seed {c.seed}",
        )
    weights = {name: value.contiguous() for name, value in result.encoder.state_dict().items()}
    _write(weights_file, save(weights, {"format": "pt", "config": json.dumps(config)}))
    metrics = {
        "config": config,
        "epoch_losses": result.epoch_losses,
        "knn_accuracy": {
            "raw_pixels": result.knn_pixels,
            "untrained_encoder": result.knn_untrained,
            "trained_encoder": result.knn_trained,
        },
        "train_seconds": round(result.train_seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "torch": str(torch.__version__),
        "clae_fast": __version__,
    }
    _write(metrics_file, (json.dumps(metrics, indent=2) + "\n").encode())  # last: all is there
    return [figure] * (result.examples is not None) + [weights_file, metrics_file]


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
