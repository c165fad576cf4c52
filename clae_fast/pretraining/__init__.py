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
    from .augmentation import TwoViews, digit_transform
    from .config import ConfigError, PretrainConfig
    from .data import ImageData, load_data, mnist5k
    from .encoders import ResidualEncoder
    from .figures import adversarial_figure
    from .loop import NonFiniteLossError, PretrainResult, pretrain
    from .probe import encode_images, pixel_features, weighted_knn

_HOME = {
    "ConfigError": "config",
    "ImageData": "data",
    "NonFiniteLossError": "loop",
    "PretrainConfig": "config",
    "PretrainResult": "loop",
    "ResidualEncoder": "encoders",
    "TwoViews": "augmentation",
    "adversarial_figure": "figures",
    "digit_transform": "augmentation",
    "encode_images": "probe",
    "load_data": "data",
    "mnist5k": "data",
    "pixel_features": "probe",
    "pretrain": "loop",
    "weighted_knn": "probe",
}

__all__ = [
    "ConfigError",
    "ImageData",
    "NonFiniteLossError",
    "PretrainConfig",
    "PretrainResult",
    "ResidualEncoder",
    "TwoViews",
    "adversarial_figure",
    "digit_transform",
    "encode_images",
    "load_data",
    "mnist5k",
    "pixel_features",
    "pretrain",
    "weighted_knn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
