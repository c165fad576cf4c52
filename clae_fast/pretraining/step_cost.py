"""What a training step of each variant costs: seconds, encoder forwards, memory."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from clae_fast import convert_dual_batchnorm

from .augmentation import build_transform, normalization, view_size
from .config import PretrainConfig
from .data import ImageData
from .encoders import build_encoder
from .machine import choose_device, default_threads, num_threads
from .optim import build_optimizer
from .training_step import TrainingStep, make_loss
from .views import EpochBatches, TwoViews

WARM_UP = 2  # rounds not counted


@dataclass(frozen=True)
class StepCost:
    """Of one training step, optimiser included.

    `seconds` is the median over the rounds, `ratio` the median of the rounds' ratios to the first
    variant, `forwards` the floating-point work in units of one encoder forward of the batch,
    `memory_bytes` the peak beyond what the process held before the first step (on a GPU: the peak
    of what PyTorch allocated; None where it cannot be told). `rounds`: seconds of each round.
    """

    seconds: float
    ratio: float
    forwards: float
    memory_bytes: int | None
    rounds: tuple[float, ...] = ()


class _Stepper:
    """A fresh encoder, optimiser and step of one variant."""

    def __init__(
        self,
        config: PretrainConfig,
        image: torch.Size,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.device = choose_device(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = build_encoder(config, image[0], image[1])
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.layout = layout
        self.encoder.to(self.device).to(memory_format=layout)
        if config.clae:
            convert_dual_batchnorm(self.encoder, momentum=config.aux_momentum)
        self.encoder.train()
        self.step = TrainingStep(
            config, self.encoder, make_loss(config, self.device), mean, std, image, self.device
        )
        self.optimizer = build_optimizer(config, self.encoder.parameters())

    def place(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device).contiguous(memory_format=self.layout)

    def __call__(self, x_i: torch.Tensor, x_j: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.step(x_i, x_j)
        self.step.update(self.optimizer)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def step_costs(
    configs: Mapping[str, PretrainConfig],
    data: ImageData,
    *,
    rounds: int = 15,
    memory: bool = True,
    on_round: Callable[[], object] | None = None,
) -> dict[str, StepCost]:
    """Measure one step of each variant side by side, on the same fresh views.

    In each round every variant does one step on the same new batch, in an order that rotates, so
    that what else the machine does meets all of them alike.

    Args:
        configs: name -> settings, which differ in the kind of step only; the first is the one
            that the ratios refer to.
        data: where the views come from.
        rounds: steps of each variant that count.
        memory: measure it too, which takes a process for each variant.
        on_round: called after each round.
    """
    first = next(iter(configs.values()))
    mean, std = normalization(first, data)
    size = view_size(first, data)
    image = torch.Size((len(mean), size, size))
    views = TwoViews(data.train_images, mean, std, build_transform(first, size))
    batch_size = min(first.batch_size, len(data.train_images))
    batches = EpochBatches(len(data.train_images), batch_size, first.seed, drop_last=True)
    names = list(configs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with num_threads(first.threads or default_threads(first)):
        steppers = {name: _Stepper(config, image, mean, std) for name, config in configs.items()}
        epoch, stream = 0, iter(batches)
        for turn in range(WARM_UP + rounds):
            indices = next(stream, None)
            if indices is None:
                epoch += 1
                batches.epoch, stream = epoch, iter(batches)
                indices = next(stream)
            x_i, x_j = views[indices]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                stepper = steppers[name]
                a, b = stepper.place(x_i), stepper.place(x_j)
                start = time.perf_counter()
                stepper(a, b)
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
            if on_round is not None:
                on_round()
        forwards = {name: _forwards(steppers[name], x_i, x_j) for name in names}
    shape = (batch_size, *image)
    peaks = {
        name: _peak_memory(config, shape, mean, std) if memory else None
        for name, config in configs.items()
    }
    base = seconds[names[0]]
    return {
        name: StepCost(
            seconds=statistics.median(seconds[name]),
            ratio=statistics.median(s / b for s, b in zip(seconds[name], base, strict=True)),
            forwards=forwards[name],
            memory_bytes=peaks[name],
            rounds=tuple(seconds[name]),
        )
        for name in names
    }


def _forwards(stepper: _Stepper, x_i: torch.Tensor, x_j: torch.Tensor) -> float:
    a, b = stepper.place(x_i), stepper.place(x_j)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        stepper.encoder(a)
    with FlopCounterMode(display=False) as all_of_it:
        stepper(a, b)
    return all_of_it.get_total_flops() / one.get_total_flops()


def _peak_memory(
    config: PretrainConfig,
    shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> int | None:
    """In a process of its own: what a step needs is not hidden by memory freed before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_in_this_process, config, shape, mean, std).result()
        except BrokenProcessPool:  # killed for want of memory, or no `if __name__ == "__main__"`
            return None


def _peak_in_this_process(
    config: PretrainConfig,
    shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> int | None:
    torch.set_num_threads(config.threads or default_threads(config))
    stepper = _Stepper(config, torch.Size(shape[1:]), mean, std)
    x_i, x_j = (stepper.place(torch.randn(shape)) for _ in range(2))
    if stepper.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(stepper.device)
        before = torch.cuda.memory_allocated(stepper.device)
        for _ in range(3):
            stepper(x_i, x_j)
        return torch.cuda.max_memory_allocated(stepper.device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the imports
    except OSError:
        return None
    before_rss = _status("VmRSS")
    if before_rss is None:
        return None
    for _ in range(3):
        stepper(x_i, x_j)
    peak = _status("VmHWM")
    return None if peak is None else peak - before_rss


def _status(field: str) -> int | None:
    """A memory figure of this process in bytes, from Linux's /proc; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
