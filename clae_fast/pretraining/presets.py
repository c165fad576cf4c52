"""The published hyperparameters of CLAE, by method and data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import METHOD_NAMES, METHODS, ConfigError, PretrainConfig

PRESET_DATA = ("cifar10", "cifar100", "tiny-imagenet")

_CLAE = {"clae": True, "eps": 0.03, "alpha": 1.0, "aux_momentum": 0.01, "workers": 4}
_INSTANCE = {  # Plain and UEL
    "temperature": 0.1,
    "projector": "linear",
    "projection": 128,
    "augmentation": "instance",
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "milestones": ((120, 0.1), (160, 0.05), (200, 0.01)),
}
_SIMCLR = {
    "temperature": 0.5,
    "projector": "mlp",
    "hidden": 512,
    "projection": 64,
    "augmentation": "simclr",
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
}


def _published(method: str, data: str) -> dict[str, Any]:
    simclr, tiny = method == "simclr", data == "tiny-imagenet"
    own: dict[str, Any] = {
        "method": method,
        "data": data,
        "encoder": "resnet18" if tiny else "resnet18-cifar",
        "image_size": 224 if tiny else 32,
        "normalization": "half" if simclr and not tiny else "data",
        "epochs": 100 if simclr or tiny else 301,
        "drop_last": True,
        "warmup": 0.0,
        "knn_every": 0 if simclr or tiny else 1,
    }
    if simclr:
        own["batch_size"] = 128 if tiny else 256
    return _CLAE | (_SIMCLR if simclr else _INSTANCE) | own


PRESETS: Mapping[str, Mapping[str, Any]] = {
    f"{method}-{data}": _published(method, data) for data in PRESET_DATA for method in METHODS
}


def preset(name: str, **overrides: Any) -> PretrainConfig:
    """The published settings of that name, with any of them overridden.

    Args:
        name: "<method>-<data>": method plain, uel or simclr; data cifar10, cifar100 or
            tiny-imagenet.
        **overrides: fields of PretrainConfig. `eps_pixels` takes the place of the preset's `eps`,
            another `schedule` leaves its milestones out.

    Raises:
        ConfigError: an unknown name or a value out of range.

    Source: the published code of Ho & Vasconcelos, NeurIPS 2020; docs/presets.md sets every
    value beside it.

    Example:
        >>> from clae_fast.pretraining import preset
        >>> config = preset("simclr-cifar10", seed=1, eps_pixels=8 / 255)
        >>> config.epochs, config.batch_size, config.eps
        (100, 256, None)
    """
    if name not in PRESETS:
        raise ConfigError("preset", name, "one of " + ", ".join(PRESETS))
    values = dict(PRESETS[name])
    if overrides.get("eps_pixels") is not None:
        del values["eps"]
    if overrides.get("schedule", values["schedule"]) != "step":
        values.pop("milestones", None)
    return PretrainConfig.from_dict(values | overrides)


_SGD_STEPS = "SGD, lr 0.03, momentum 0.9, weight decay 5e-4"
_STEPS = "x0.1 at 120, x0.05 at 160, x0.01 at 200"
_ADAM = "Adam, lr 3e-4, no weight decay (its options are unused)"


def _facts(method: str, data: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(what, as published, the settings that say it), typed from the authors' code."""
    simclr, tiny = method == "simclr", data == "tiny-imagenet"
    if tiny:
        net, views = "ResNet-18, 7x7 stem", "224 px"
    else:
        net, views = "ResNet-18, 3x3 stem, average pool 4", "32 px"
    crop = "crop 0.08 to 1, flip, jitter (0.8, 0.8, 0.8, 0.2) at 0.8, grey 0.2, no blur"
    if not simclr:
        crop = "crop 0.2 to 1, jitter (0.4, 0.4, 0.4, 0.4), grey 0.2, flip"
    mean = "ImageNet's" if tiny else "0.5 and 0.5" if simclr else "CIFAR-10's"
    schedule = "none" if simclr else _STEPS + (" (never reached)" if tiny else "")
    return [
        ("encoder", net, ("encoder",)),
        (
            "projection",
            "MLP 512-512-64" if simclr else "linear to 128",
            ("projector", "hidden", "projection"),
        ),
        ("views", views, ("image_size",)),
        ("augmentation", crop, ("augmentation",)),
        ("mean and std", mean, ("normalization",)),
        ("temperature", "0.5" if simclr else "0.1", ("temperature",)),
        ("eps", "0.03, normalised units (run scripts)", ("eps",)),
        ("alpha", "1.0", ("alpha",)),
        ("auxiliary BatchNorm momentum", "0.01", ("aux_momentum",)),
        ("epochs", "100" if simclr or tiny else "301", ("epochs",)),
        ("batch", "256" if simclr and not tiny else "128", ("batch_size",)),
        ("last batch", "dropped where shorter", ("drop_last",)),
        (
            "optimiser",
            _ADAM if simclr else _SGD_STEPS,
            ("optimizer", "lr", "weight_decay") + (() if simclr else ("momentum",)),
        ),
        ("schedule", schedule, ("schedule",) + (() if simclr else ("milestones",))),
    ]


_QUIRKS = (
    (
        "reports the best *test* accuracy over all epochs",
        "reports the last epoch's; the best stands beside it, named as chosen on the test images",
    ),
    (
        "evaluates with a dropped last batch (9,984 of 10,000 CIFAR test images)",
        "counts every test image",
    ),
    (
        "SimCLR's kNN writes its last short batch at a wrong place: 160 of 50,000 bank entries "
        "are wrong",
        "every entry is right",
    ),
    (
        "runs the frozen encoder again in each probe epoch (1,000; 200 for Plain and UEL on Tiny "
        "ImageNet)",
        "encodes once: the same features",
    ),
    ("Plain encodes x_i twice and counts it twice in the main running statistics", "once"),
    (
        "the 224-pixel ResNet drops the output of its first BatchNorm",
        "torchvision's ResNet-18 as it is",
    ),
    (
        "the downsampling layers' auxiliary BatchNorm of the 224-pixel net keeps momentum 0.1",
        "0.01 in all of them",
    ),
    (
        "SimCLR accepts `--optimizer` and `--weight_decay` and uses neither",
        "the options do what they say",
    ),
    ("the defaults of `--eps` differ between its scripts; its run scripts pass 0.03", "0.03"),
    ("no seed is set; trials differ by chance", "`--seed` fixes weights, order and views"),
    ("the baseline and CLAE start from other weights", "from the same, with the same batches"),
)


def render_presets() -> str:
    """docs/presets.md: every preset beside the published values."""
    lines = [
        "# Presets",
        "",
        "The hyperparameters of the published code of CLAE (Ho & Vasconcelos, NeurIPS 2020;",
        "github.com/chihhuiho/CLAE) and the settings that stand for them:",
        "`clae-fast pretrain --preset simclr-cifar10`, `clae_fast.pretraining.preset(...)`. Any",
        "option beside `--preset` overrides its value.",
        "",
        "This page is generated by `python -m clae_fast.pretraining.presets`.",
    ]
    for name in PRESETS:
        method, _, data = name.partition("-")
        config = preset(name)
        lines += ["", f"## {name}", "", f"{METHOD_NAMES[method]} on {data}.", ""]
        lines += ["| | as published | setting |", "| --- | --- | --- |"]
        for what, published, settings in _facts(method, data):
            ours = ", ".join(f"`{s}={_show(getattr(config, s))}`" for s in settings)
            lines.append(f"| {what} | {published} | {ours} |")
    lines += ["", "## What the published code does that we do not", ""]
    lines += ["Each of these changes a number, so each is named.", ""]
    lines += ["| published code | here |", "| --- | --- |"]
    lines += [f"| {theirs} | {ours} |" for theirs, ours in _QUIRKS]
    return "\n".join(lines) + "\n"


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{epoch}:{factor:g}" for epoch, factor in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(render_presets(), end="")
