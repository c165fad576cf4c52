"""The settings of one pre-training run, checked once. No torch: the command line imports it."""

from __future__ import annotations

import math
from dataclasses import dataclass

METHODS = ("plain", "uel", "simclr")
METHOD_NAMES = {"plain": "Plain", "uel": "UEL", "simclr": "SimCLR"}
DATA = ("mnist5k",)
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
TEMPERATURE = {"plain": 0.1, "uel": 0.1, "simclr": 0.5}  # as published, by method


class ConfigError(ValueError):
    """A setting outside its range: which one, its value, and what was expected."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}={value!r}: expected {expected}")
        self.field, self.value, self.expected = field, value, expected


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one run; the defaults are those of `clae-fast pretrain`.

    Args:
        method: "simclr" (NT-Xent), "plain" (InfoNCE over the batch) or "uel".
        clae: train on adversarial examples too (one FGSM step, auxiliary BatchNorm).
        data: "mnist5k".
        epochs: passes over the training images.
        batch_size: pairs in a batch; the last, shorter batch is used too.
        lr: peak learning rate of AdamW (linear warm-up, then cosine to 0).
        weight_decay: of AdamW.
        temperature: None takes the published one: 0.5 for simclr, 0.1 for plain and uel.
        eps: size of the attack in the units of the normalised images. The published 0.03 is for
            photographs; on digits, with their flat background, it hardly changes the result.
        alpha: weight of the adversarial loss.
        aux_momentum: running-statistics momentum of the auxiliary BatchNorm.
        seed: fixes initial weights, order and views.
        threads: of PyTorch while training; None: what the workers leave of its threads, 1 to 4.
        workers: processes that make views; 0 makes them between the steps. The views do not
            depend on it.
        backend: of the losses; "auto" takes the fastest that can run.

    Raises:
        ConfigError: a ValueError that names field, value and what was expected.
    """

    method: str = "simclr"
    clae: bool = True
    data: str = "mnist5k"
    epochs: int = 12
    batch_size: int = 64
    lr: float = 6e-3
    weight_decay: float = 1e-4
    temperature: float | None = None
    eps: float = 0.3
    alpha: float = 1.0
    aux_momentum: float = 0.01
    seed: int = 0
    threads: int | None = None
    workers: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.clae, bool):
            raise ConfigError("clae", self.clae, "True or False")
        self._one_of("method", METHODS)
        self._one_of("data", DATA)
        self._one_of("backend", BACKENDS)
        self._whole("epochs", 1)
        self._whole("batch_size", 2, " (one pair alone has nothing to contrast with)")
        self._whole("seed", 0, f" and below {2**63}", below=2**63)
        self._whole("workers", 0)
        if self.threads is not None:
            self._whole("threads", 1)
        self._number("lr", above=0.0)
        self._number("weight_decay", at_least=0.0)
        if self.temperature is not None:
            self._number("temperature", above=0.0)
        self._number("eps", at_least=0.0)
        self._number("alpha", at_least=0.0)
        self._number("aux_momentum", above=0.0)
        if self.aux_momentum > 1:
            raise ConfigError("aux_momentum", self.aux_momentum, "a number above 0, at most 1")
        if self.lr > 1e30:
            raise ConfigError("lr", self.lr, "a number of at most 1e30")

    @property
    def loss_temperature(self) -> float:
        """The temperature in force: the one given, or the published one of the method."""
        return TEMPERATURE[self.method] if self.temperature is None else self.temperature

    def _one_of(self, field: str, words: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in words:
            raise ConfigError(field, value, "one of " + ", ".join(words))

    def _whole(self, field: str, low: int, note: str = "", below: float = math.inf) -> None:
        value = getattr(self, field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value < below:
            raise ConfigError(field, value, f"a whole number of at least {low}{note}")

    def _number(
        self, field: str, above: float | None = None, at_least: float | None = None
    ) -> None:
        value = getattr(self, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        bound = f"above {above:g}" if above is not None else f"of at least {at_least:g}"
        if (
            not number
            or not math.isfinite(value)
            or (above is not None and value <= above)
            or (at_least is not None and value < at_least)
        ):
            raise ConfigError(field, value, f"a finite number {bound}")
