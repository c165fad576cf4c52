"""CLAE pre-training end to end: data, views, encoder, loop, kNN probe and figure.

    from clae_fast.pretraining import PretrainConfig, pretrain

    result = pretrain(PretrainConfig(method="simclr", clae=True, epochs=2))
    print(result.knn_trained, result.knn_untrained, result.knn_pixels)

Names load on first use, so that building the command line does not import torchvision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augmentation import digit_transform, instance_transform, simclr_transform
    from .checkpoint import CheckpointError
    from .config import ConfigError, PretrainConfig
    from .data import ImageData, load_data, mnist5k
    from .encoders import ContrastiveModel, ResidualEncoder, build_encoder, resnet18_cifar
    from .figures import adversarial_figure
    from .interrupts import Interrupted
    from .loop import pretrain
    from .monitor import NonFiniteLossError
    from .output import write_result
    from .presets import preset
    from .probe import encode_images, pixel_features, weighted_knn
    from .published import published_step
    from .result import PretrainResult
    from .runs import load_run
    from .views import TwoViews

_HOME = {
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "ContrastiveModel": "encoders",
    "ImageData": "data",
    "Interrupted": "interrupts",
    "NonFiniteLossError": "monitor",
    "PretrainConfig": "config",
    "PretrainResult": "result",
    "ResidualEncoder": "encoders",
    "TwoViews": "views",
    "adversarial_figure": "figures",
    "build_encoder": "encoders",
    "digit_transform": "augmentation",
    "encode_images": "probe",
    "instance_transform": "augmentation",
    "load_data": "data",
    "load_run": "runs",
    "mnist5k": "data",
    "pixel_features": "probe",
    "preset": "presets",
    "pretrain": "loop",
    "published_step": "published",
    "resnet18_cifar": "encoders",
    "simclr_transform": "augmentation",
    "weighted_knn": "probe",
    "write_result": "output",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContrastiveModel",
    "ImageData",
    "Interrupted",
    "NonFiniteLossError",
    "PretrainConfig",
    "PretrainResult",
    "ResidualEncoder",
    "TwoViews",
    "adversarial_figure",
    "build_encoder",
    "digit_transform",
    "encode_images",
    "instance_transform",
    "load_data",
    "load_run",
    "mnist5k",
    "pixel_features",
    "preset",
    "pretrain",
    "published_step",
    "resnet18_cifar",
    "simclr_transform",
    "weighted_knn",
    "write_result",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
