"""What a finished run leaves: figures, weights, and result.json last, each written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from clae_fast._version import __version__

from .checkpoint import separate
from .config import METHOD_NAMES
from .curves import curves_figure
from .figures import adversarial_figure
from .files import CONFIG, ENCODER, RESULT, write_whole
from .machine import default_threads
from .metrics import read_metrics
from .result import PretrainResult


def write_result(result: PretrainResult, folder: str | Path) -> list[Path]:
    """Write the files into `folder` (made if need be) and return their paths.

    adversarial.png is only there with CLAE. encoder.safetensors holds the state_dict of the
    plain encoder (main BatchNorm); its metadata holds the settings as JSON. curves.png draws
    metrics.jsonl. result.json comes last: where it is, all is.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    c = result.config
    config = c.to_dict()
    title = METHOD_NAMES[c.method] + (" with CLAE" if c.clae else "") + f" on {result.data}"
    paths = []
    adversarial, curves = folder / "adversarial.png", folder / "curves.png"
    if result.examples is None:
        adversarial.unlink(missing_ok=True)  # of an earlier run, with another encoder
    else:
        adversarial_figure(
            result.examples,
            adversarial,
            title=f"{title}: views and their attack",
            subtitle=f"one FGSM step on the contrastive loss, \u03b5 = {c.eps_text}; "
            f"epoch {c.epochs} of {c.epochs}, seed {c.seed}",
        )
        paths.append(adversarial)
    if lines := read_metrics(folder):
        curves_figure(lines, curves, title=f"{title}, seed {c.seed}")
        paths.append(curves)
    run = {
        "in_channels": result.in_channels,
        "image_size": result.image_size,
        "mean": result.mean,
        "std": result.std,
        "data": result.data,
        "epochs": c.epochs,
    }
    metadata = {"format": "pt", "config": json.dumps(config), "run": json.dumps(run)}
    write_whole(folder / ENCODER, save(separate(result.encoder.state_dict()), metadata))
    if not (folder / CONFIG).exists():
        write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    text = json.dumps(summary(result), indent=2) + "\n"
    write_whole(folder / RESULT, text.encode())
    return [*paths, folder / ENCODER, folder / RESULT]


def summary(result: PretrainResult) -> dict[str, Any]:
    """result.json: settings in force, losses, accuracies, time, versions."""
    c = result.config
    best = result.best_knn
    return {
        "config": c.to_dict()
        | {
            "temperature": c.loss_temperature,
            "eps": c.eps_normalized,
            "data": result.data,
            "image_size": result.image_size,
            "threads": c.threads or default_threads(c),
        },
        "epoch_losses": result.epoch_losses,
        "knn_accuracy": {
            "raw_pixels": result.knn_pixels,
            "untrained_encoder": result.knn_untrained,
            "trained_encoder": result.knn_trained,
            "best_epoch_on_test": None if best is None else {"epoch": best[0], "accuracy": best[1]},
        },
        "knn_history": result.knn_history,
        "train_seconds": round(result.train_seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "torch": str(torch.__version__),
        "clae_fast": __version__,
    }
