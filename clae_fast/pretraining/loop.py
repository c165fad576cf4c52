"""The training loop: views, steps, optimiser, kNN before and after, checkpoints between."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clae_fast import convert_dual_batchnorm, strip_dual_batchnorm

from .augmentation import Transform, build_transform, normalization, view_size
from .checkpoint import checkpoints, save_checkpoint
from .config import ConfigError, PretrainConfig
from .data import ImageData, load_data
from .encoders import ContrastiveModel, build_encoder
from .files import holds_run
from .interrupts import Interrupted, deferred_interrupts
from .machine import choose_device, default_threads, num_threads
from .metrics import Metrics
from .monitor import LossMonitor, NonFiniteLossError, cause
from .optim import build_optimizer, learning_rate_factor, set_learning_rate
from .processes import Processes, run_processes
from .progress import open_progress
from .result import Examples, PretrainResult
from .resume import (
    Saved,
    check_images,
    check_same_images,
    image_facts,
    load_saved,
    restore,
    run_state,
    seed_apart,
    view_seeds,
)
from .runs import start_run
from .scores import encoder_accuracy, pixel_accuracy
from .training_step import StepResult, TrainingStep, make_loss
from .views import EpochBatches, TwoViews, check_shares, view_loader
from .wrapping import synchronized_batchnorm

NUM_EXAMPLES = 10  # images kept for the figure


def pretrain(
    config: PretrainConfig | None = None,
    *,
    data: ImageData | None = None,
    encoder: ContrastiveModel | None = None,
    transform: Transform | None = None,
    progress: bool = False,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> PretrainResult:
    """Train an encoder by contrast, with or without CLAE, and evaluate it by weighted kNN.

        loss = L(f(x_i), f(x_j)) + alpha * L(f(x_i), f_aux(x_adv))    without CLAE the first term

    The global random state is left alone. One seed gives one result on one machine with one
    number of threads; weights, order and views are the same with and without CLAE. Under torchrun
    each process takes its share of every batch; the result, which all of them return, is that of
    one process but for rounding (and for views and dropout: see `view_seeds`).

    Args:
        config: the settings; None takes the defaults.
        data: images to use instead of `config.data`.
        encoder: a model with `encode` and `forward` to train in place; None makes the one that
            the settings name from the seed.
        transform: one image (C, H, W) in [0, 1] to one view; None takes that of the settings.
        progress: show loss, images/s and time left on stderr.
        folder: where metrics.jsonl and checkpoints go while training; None keeps neither. Ctrl-C
            and SIGTERM then wait for the step to end and write a checkpoint.
        resume: go on from the folder's last checkpoint, to the same numbers as without the break
            (with the run's own number of threads, unless `config.threads` says another).
        overwrite: replace a run that the folder holds.

    Raises:
        ConfigError: a setting that cannot work here, naming it; a folder that holds a run.
        CheckpointError: the checkpoint cannot be read.
        ImportError: the data set's package is missing.
        NonFiniteLossError: the loss became NaN or Inf, or float16 gradients overflowed in every
            step; the last checkpoint stays.
        Interrupted: a KeyboardInterrupt, after the checkpoint was written.

    Example:
        >>> result = pretrain(PretrainConfig(epochs=2, clae=False))   # doctest: +SKIP
        >>> result.knn_trained > result.knn_untrained                 # doctest: +SKIP
    """
    config = PretrainConfig() if config is None else config
    for name, value, kind in (
        ("config", config, PretrainConfig),
        ("data", data, ImageData),
        ("encoder", encoder, nn.Module),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if encoder is not None and not hasattr(encoder, "encode"):
        raise TypeError(f"encoder must have a method encode, {type(encoder).__name__} has none")
    if resume and folder is None:
        raise ConfigError("resume", True, "a folder to resume from")
    where = None if folder is None else Path(folder)
    with run_processes(config) as processes:
        return _pretrain(
            config, data, encoder, transform, progress, where, resume, overwrite, processes
        )


def _pretrain(
    config: PretrainConfig,
    data: ImageData | None,
    encoder: ContrastiveModel | None,
    transform: Transform | None,
    progress: bool,
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    processes: Processes,
) -> PretrainResult:
    def first_look() -> Saved | None:
        if folder is not None and not (resume or overwrite) and holds_run(folder):
            raise ConfigError(
                "folder", folder, "a folder without a run (overwrite=True replaces it)"
            )
        return load_saved(folder, config) if resume and folder is not None else None

    def load() -> ImageData:
        return data or load_data(
            config.data, config.data_dir, download=config.download, memory_gib=config.memory_gib
        )

    saved = processes.first_alone(first_look)
    if config.download:  # once, not by all at a time
        processes.together(lambda: load() if processes.first else None)
    images = processes.together(load)
    device = choose_device(config)
    processes.together(lambda: make_loss(config, device))
    cuda = [device] if device.type == "cuda" else []
    threads = config.threads or default_threads(config)
    if saved is not None and config.threads is None and len(saved[1]["rng"]) == processes.size:
        threads = int(saved[1]["threads"])  # another number would change the last bits
    with torch.random.fork_rng(devices=cuda), num_threads(threads):
        seeds = view_seeds(config, saved, processes)
        run = processes.together(
            lambda: _Run(config, images, encoder, transform, device, seeds, processes)
        )
        return run.go(folder, saved, progress and processes.first)


class _Run:
    """One run and its state: what a checkpoint holds is what `state` returns."""

    def __init__(
        self,
        config: PretrainConfig,
        data: ImageData,
        encoder: ContrastiveModel | None,
        transform: Transform | None,
        device: torch.device,
        seeds: str,
        processes: Processes,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.view_seeds, self.processes = seeds, processes
        self.mean, self.std = normalization(config, data)
        self.size = view_size(config, data)
        self.channels = len(data.mean)
        torch.manual_seed(config.seed)
        self.encoder = encoder or build_encoder(config, self.channels, self.size)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.encoder.to(device).to(memory_format=layout)
        seed_apart(config, processes, 0)
        views = TwoViews(
            data.train_images,
            self.mean,
            self.std,
            transform or build_transform(config, self.size),
            per_image=seeds == "image",
            processes=processes,
        )
        self.batches = EpochBatches(
            len(data.train_images), config.batch_size, config.seed, config.drop_last
        )
        check_shares(self.batches, processes)
        pin = device.type == "cuda"
        self.loader = view_loader(views, self.batches, config.workers, pin_memory=pin)
        self.epoch = self.step = 0  # the step to do next, of the epoch
        self.epoch_losses: list[float] = []
        self.knn_history: list[tuple[int, float]] = []
        self.knn_untrained: float | None = None
        self.seconds, self.images = 0.0, 0
        self.examples: tuple[torch.Tensor, ...] | None = None

    def go(self, folder: Path | None, saved: Saved | None, progress: bool) -> PretrainResult:
        with synchronized_batchnorm(self.encoder, self.config, self.processes):
            self._go(folder, saved, progress)
        return self._result()

    def _go(self, folder: Path | None, saved: Saved | None, progress: bool) -> None:
        config, encoder, processes = self.config, self.encoder, self.processes
        check_same_images(self)
        if saved is not None:
            check_images(saved[1], image_facts(self))
        if saved is None:
            self.knn_untrained = self._knn()
        try:
            if config.clae:
                convert_dual_batchnorm(encoder, momentum=config.aux_momentum)
            encoder.train()
            self._prepare(saved)
            if progress:
                print(f"{self.data.summary()}, views of {self.size} x {self.size}", file=sys.stderr)
            if folder is not None and saved is None:
                start = folder
                processes.first_alone(lambda: start_run(start, config))
            length = 0 if saved is None else int(saved[1]["metrics_length"])
            with (
                Metrics(
                    folder if processes.first else None,
                    length,
                    tensorboard=config.tensorboard,
                    first_step=None if saved is None else self.global_step(),
                ) as self.metrics,
                deferred_interrupts(folder is not None, patient=processes.size > 1) as asked,
            ):
                # Without a folder a signal ends its process: there is nothing to agree on.
                interrupted = asked if folder is None else lambda: processes.any(asked())
                self._train(folder, progress, interrupted)
        except NonFiniteLossError as error:
            found = [] if folder is None else checkpoints(folder)
            if not found:
                raise
            raise NonFiniteLossError(f"{error}; the last good checkpoint: {found[-1]}") from error
        finally:  # an encoder of the caller's is an ordinary one again, whatever happened
            strip_dual_batchnorm(encoder)
            encoder.eval()

    def _prepare(self, saved: Saved | None) -> None:
        config = self.config
        image = torch.Size((self.channels, self.size, self.size))
        self.training_step = TrainingStep(
            config,
            self.encoder,
            make_loss(config, self.device, self.processes),
            self.mean,
            self.std,
            image,
            self.device,
            self.processes,
        )
        self.optimizer = build_optimizer(config, self.encoder.parameters())
        every = 1 if self.device.type == "cpu" else config.log_every
        self.monitor = LossMonitor(config, self.encoder, every)
        if saved is not None:
            restore(self, saved)

    def global_step(self) -> int:
        return self.epoch * len(self.batches) + self.step

    def _save(self, folder: Path) -> None:
        state = run_state(self)

        def write() -> None:
            self.metrics.sync()  # a checkpoint never knows of lines that a power cut took
            save_checkpoint(folder, self.encoder.state_dict(), state, self.global_step())

        self.processes.first_alone(write)

    def _train(self, folder: Path | None, progress: bool, interrupted: Callable[[], bool]) -> None:
        config, data = self.config, self.data
        per_epoch = len(data.train_images)
        if config.drop_last:
            per_epoch = min(per_epoch, len(self.batches) * config.batch_size)
        with open_progress(config.epochs, per_epoch, shown=progress, done=self.images) as self.bar:
            while self.epoch < config.epochs:
                self._epoch(folder, interrupted)
                last = self.epoch == config.epochs
                due = config.checkpoint_every and self.epoch % config.checkpoint_every == 0
                if folder is not None and (due or (last and config.checkpoint_every)):
                    self._save(folder)

    def _epoch(self, folder: Path | None, interrupted: Callable[[], bool]) -> None:
        config, num_steps = self.config, len(self.batches)
        self.batches.epoch, self.batches.skip = self.epoch, self.step
        start = time.perf_counter()
        for x_i, x_j in self.loader:
            x_i, x_j = self._to_device(x_i), self._to_device(x_j)
            factor = learning_rate_factor(config, self.global_step(), num_steps)
            set_learning_rate(self.optimizer, config.lr * factor)
            self.optimizer.zero_grad(set_to_none=True)
            images = self.batches.size_of(self.step)  # of all processes
            out = self._one_step(x_i, x_j, images)
            self.monitor.add(self.epoch, self.step, num_steps, out.loss, images)
            if not self.training_step.update(self.optimizer):
                raise NonFiniteLossError(
                    f"gradients overflowed in every one of the last steps, up to step "
                    f"{self.step + 1} of {num_steps} in epoch {self.epoch + 1}: "
                    f"{cause(self.encoder, config)}, or use another precision"
                )
            if out.x_adv is not None and self.epoch == config.epochs - 1 and self.step == 0:
                self._keep_examples(x_i, x_j, out.x_adv)
            self.images += images
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            self.step += 1
            self.bar.update(self.epoch, images, self.monitor.last)
            if self.global_step() % config.log_every == 0:
                self._log_step(out.clean_loss, out.adversarial_loss, images, num_steps)
            if self.step < num_steps and interrupted():
                self._stop(folder, num_steps)
        self.monitor.check_weights(self.epoch)
        self._end_epoch()
        if interrupted():
            self._stop(folder, num_steps)

    def _end_epoch(self) -> None:
        config, monitor = self.config, self.monitor
        loss = monitor.total / monitor.images
        self.epoch_losses.append(loss)
        monitor.total, monitor.images = 0.0, 0
        self.bar.end_epoch(self.epoch, loss)
        self.epoch, self.step = self.epoch + 1, 0
        values: dict[str, Any] = {"epoch": self.epoch, "loss": loss}
        if config.knn_every and self.epoch % config.knn_every == 0:
            accuracy = self._knn()
            if accuracy is not None:
                self.knn_history.append((self.epoch, accuracy))
                values["knn_accuracy"] = accuracy
        values["seconds"] = round(self.seconds, 3)
        self.metrics.write("epoch", self.global_step(), **values)

    def _log_step(
        self, clean: torch.Tensor, adversarial: torch.Tensor | None, batch: int, num_steps: int
    ) -> None:
        self.monitor.read(self.epoch, num_steps)
        values = {"epoch": self.epoch + 1, "batch": batch, "loss": self.monitor.last}
        if adversarial is not None:
            values |= {"clean_loss": float(clean), "adversarial_loss": float(adversarial)}
        lr = self.optimizer.param_groups[0]["lr"]
        rate = self.images / max(self.seconds, 1e-9)
        self.metrics.write(
            "step", self.global_step(), **values, lr=lr, images_per_second=round(rate, 1)
        )

    def _stop(self, folder: Path | None, num_steps: int) -> None:
        assert folder is not None
        self.monitor.read(self.epoch, num_steps)
        self.monitor.check_weights(self.epoch)
        self._save(folder)
        where = f"at step {self.step} of {num_steps} in epoch {self.epoch + 1}"
        if self.epoch == self.config.epochs:
            where = "after the last epoch"
        raise Interrupted(
            f"interrupted {where} of {self.config.epochs}; to go on: {self.processes.command} "
            f"pretrain --resume {folder}"
        )

    def _keep_examples(self, *images: torch.Tensor) -> None:
        own = [x[:NUM_EXAMPLES].detach().float().cpu().contiguous() for x in images]
        parts = self.processes.gather(own)
        self.examples = tuple(torch.cat(x)[:NUM_EXAMPLES].clone() for x in zip(*parts, strict=True))

    def _one_step(self, x_i: torch.Tensor, x_j: torch.Tensor, images: int) -> StepResult:
        try:
            return self.training_step(x_i, x_j)
        except ValueError as error:
            if images > 1:
                raise
            raise ConfigError(  # a BatchNorm over features needs two
                "batch_size",
                self.config.batch_size,
                f"one that leaves no last batch of a single image with this encoder ({error}), or "
                "drop_last",
            ) from error

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return x.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    def _knn(self) -> float | None:
        return self.processes.first_alone(
            lambda: encoder_accuracy(
                self.encoder, self.config, self.data, self.mean, self.std, self.size, self.device
            )
        )

    def _result(self) -> PretrainResult:
        data, config = self.data, self.config
        trained = self._knn()
        pixels = self.processes.first_alone(lambda: pixel_accuracy(data))
        examples = None
        if self.examples is not None:
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
            examples = Examples(*(x * std + mean for x in self.examples))
        return PretrainResult(
            config=config,
            data=data.name,
            encoder=self.encoder.cpu(),
            in_channels=self.channels,
            image_size=self.size,
            mean=self.mean,
            std=self.std,
            epoch_losses=tuple(self.epoch_losses),
            knn_pixels=pixels,
            knn_untrained=self.knn_untrained,
            knn_trained=trained,
            knn_history=tuple(self.knn_history),
            train_seconds=self.seconds,
            images_per_second=self.images / max(self.seconds, 1e-9),
            examples=examples,
        )
