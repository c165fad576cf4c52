"""kNN and linear probes of a frozen encoder, from features that are encoded once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .augmentation import normalization, view_size
from .config import ConfigError, PretrainConfig
from .data import ImageData
from .encoders import ContrastiveModel
from .linear_probe import ProbeResult, adam_probe, logistic_probe
from .machine import choose_device
from .probe import encode_both, pixel_features, weighted_knn

PROBES = ("knn", "logistic", "adam")
FEATURES = ("h", "z")


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies; None where a probe was not asked for.

    `features` ("h" or "z") is what the linear probes saw; kNN is given for both. `k`, `sigma` (of
    raw pixels and h), `sigma_z` and `probe_epochs` are those in force. `encode_seconds` is the
    time of the only encoding.
    """

    features: str
    k: int
    sigma: float
    sigma_z: float
    probe_epochs: int
    knn_pixels: float | None
    knn_h: float | None
    knn_z: float | None
    logistic: ProbeResult | None
    adam: ProbeResult | None
    num_train: int
    num_test: int
    encode_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps."""
        return asdict(self)


def evaluate(
    model: ContrastiveModel,
    data: ImageData,
    config: PretrainConfig,
    *,
    probes: Sequence[str] = PROBES,
    features: str | None = None,
    k: int = 200,
    sigma: float | None = None,
    probe_epochs: int | None = None,
    probe_batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Encode the training and the test images once and measure what a simple rule makes of them.

    Args:
        model: ordinary (main BatchNorm), on the CPU.
        data: with labels.
        config: of the run: method, normalisation, view size, device.
        probes: of "knn", "logistic", "adam".
        features: what the linear probes see, "h" or "z"; None as published: h for SimCLR, the
            128-d output z for Plain and UEL. z is brought to unit length.
        k: neighbours.
        sigma: temperature of the kNN vote; None: 0.1, and for z as published, 0.5 with SimCLR.
        probe_epochs: of the Adam probe; None as published: 1,000, and 200 for Plain and UEL on
            Tiny ImageNet.
        probe_batch_size: of the Adam probe; None: 256 for SimCLR, else 128.
        seed: of the Adam probe.
        progress: show the Adam probe's epochs on stderr.

    Raises:
        ConfigError: naming the setting.
        ValueError: features that are not finite.

    Source: the published evaluation of CLAE; docs/presets.md names where this departs from it.
    """
    simclr = config.method == "simclr"
    features = features or ("h" if simclr else "z")
    sigma_z = (0.5 if simclr else 0.1) if sigma is None else sigma
    sigma = 0.1 if sigma is None else sigma
    if features not in FEATURES:
        raise ConfigError("features", features, "h or z")
    for name in probes:
        if name not in PROBES:
            raise ConfigError("probes", name, "one of " + ", ".join(PROBES))
    if k < 1:
        raise ConfigError("k", k, "a whole number of at least 1")
    if not 0 < sigma < float("inf"):
        raise ConfigError("sigma", sigma, "a finite number above 0")
    for name, value in (("probe_epochs", probe_epochs), ("probe_batch_size", probe_batch_size)):
        if value is not None and value < 1:
            raise ConfigError(name, value, "a whole number of at least 1")
    if probe_epochs is None:
        probe_epochs = 200 if config.data == "tiny-imagenet" and not simclr else 1000
    if data.train_labels is None or data.test_labels is None:
        raise ConfigError("data", data.name, "images with labels: without them nothing is measured")
    train_labels, test_labels = data.train_labels, data.test_labels
    device = choose_device(config)
    mean, std = normalization(config, data)
    size = view_size(config, data)
    model.to(device)
    start = time.perf_counter()
    try:
        (train_h, train_z), (test_h, test_z) = (
            encode_both(model, images, mean, std, image_size=size, device=device)
            for images in (data.train_images, data.test_images)
        )
    finally:
        model.cpu()
    seconds = time.perf_counter() - start

    def knn(train: torch.Tensor, test: torch.Tensor, sigma: float) -> float | None:
        if "knn" not in probes:
            return None
        return weighted_knn(train, train_labels, test, test_labels, k=k, sigma=sigma)

    knn_pixels = None
    if "knn" in probes:
        knn_pixels = knn(pixel_features(data.train_images), pixel_features(data.test_images), sigma)
    train, test = (train_h, test_h)
    if features == "z":
        train, test = F.normalize(train_z, dim=1), F.normalize(test_z, dim=1)
    logistic = adam = None
    if "logistic" in probes:
        logistic = logistic_probe(train, train_labels, test, test_labels)
    if "adam" in probes:
        with _bar(probe_epochs, progress) as bar:
            adam = adam_probe(
                train,
                train_labels,
                test,
                test_labels,
                epochs=probe_epochs,
                batch_size=probe_batch_size or (256 if simclr else 128),
                seed=seed,
                device=device,
                progress=bar.update,
            )
    return Evaluation(
        features=features,
        k=min(k, len(train_labels)),
        sigma=sigma,
        sigma_z=sigma_z,
        probe_epochs=probe_epochs,
        knn_pixels=knn_pixels,
        knn_h=knn(train_h, test_h, sigma),
        knn_z=knn(train_z, test_z, sigma_z),
        logistic=logistic,
        adam=adam,
        num_train=len(train_labels),
        num_test=len(test_labels),
        encode_seconds=seconds,
    )


def _bar(epochs: int, shown: bool) -> Any:
    from tqdm import tqdm

    hidden = not (shown and sys.stderr.isatty())
    return tqdm(total=epochs, desc="Adam probe", unit=" epochs", file=sys.stderr, disable=hidden)
