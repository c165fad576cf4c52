"""Optimiser and learning-rate schedule by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import PretrainConfig


def build_optimizer(
    config: PretrainConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser that the settings name; all parameters decay alike, as published."""
    parameters = list(parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


def learning_rate_factor(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """What the peak learning rate is multiplied by at that step of the run, both from 0.

        cosine    0.5 (1 + cos(pi step / steps))
        step      the factor of the last milestone whose epoch has come, 1 before
        constant  1

    each at most (step + 1) / w in the first w = warmup * steps steps.
    """
    num_steps = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    else:
        epoch = step // steps_per_epoch
        factor = 1.0
        for milestone, value in config.milestones:
            if epoch >= milestone:
                factor = value
    if config.warmup == 0:
        return factor
    return min((step + 1) / max(1, int(num_steps * config.warmup)), factor)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
