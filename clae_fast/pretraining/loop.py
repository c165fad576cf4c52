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
from .probe import encode_images, pixel_features, weighted_knn
from .progress import open_progress
from .result import Examples, PretrainResult
from .resume import STATE_VERSION, Saved, check_images, load_saved
from .runs import start_run
from .training_step import StepResult, TrainingStep, make_loss
from .views import EpochBatches, TwoViews, view_loader

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
    number of threads; weights, order and views are the same with and without CLAE.

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
    if where is not None and not (resume or overwrite) and holds_run(where):
        raise ConfigError("folder", where, "a folder without a run (overwrite=True replaces it)")
    if data is None:
        data = load_data(
            config.data, config.data_dir, download=config.download, memory_gib=config.memory_gib
        )
    device = choose_device(config)
    make_loss(config, device)
    cuda = [device] if device.type == "cuda" else []
    saved = load_saved(where, config) if resume and where is not None else None
    threads = config.threads or default_threads(config)
    if saved is not None and config.threads is None:
        threads = int(saved[1]["threads"])  # another number would change the last bits
    with torch.random.fork_rng(devices=cuda), num_threads(threads):
        run = _Run(config, data, encoder, transform, device)
        return run.go(where, saved, progress)


class _Run:
    """One run and its state: what a checkpoint holds is what `state` returns."""

    def __init__(
        self,
        config: PretrainConfig,
        data: ImageData,
        encoder: ContrastiveModel | None,
        transform: Transform | None,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.mean, self.std = normalization(config, data)
        self.size = view_size(config, data)
        self.channels = len(data.mean)
        torch.manual_seed(config.seed)
        self.encoder = encoder or build_encoder(config, self.channels, self.size)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.encoder.to(device).to(memory_format=layout)
        views = TwoViews(
            data.train_images, self.mean, self.std, transform or build_transform(config, self.size)
        )
        self.batches = EpochBatches(
            len(data.train_images), config.batch_size, config.seed, config.drop_last
        )
        pin = device.type == "cuda"
        self.loader = view_loader(views, self.batches, config.workers, pin_memory=pin)
        self.epoch = self.step = 0  # the step to do next, of the epoch
        self.epoch_losses: list[float] = []
        self.knn_history: list[tuple[int, float]] = []
        self.knn_untrained: float | None = None
        self.seconds, self.images = 0.0, 0
        self.examples: tuple[torch.Tensor, ...] | None = None

    def go(self, folder: Path | None, saved: Saved | None, progress: bool) -> PretrainResult:
        config, encoder = self.config, self.encoder
        if saved is not None:
            check_images(saved[1], self._image_facts())
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
                start_run(folder, config)
            length = 0 if saved is None else int(saved[1]["metrics_length"])
            with (
                Metrics(
                    folder,
                    length,
                    tensorboard=config.tensorboard,
                    first_step=None if saved is None else self._global_step(),
                ) as self.metrics,
                deferred_interrupts(folder is not None) as interrupted,
            ):
                self._train(folder, progress, interrupted)
        except NonFiniteLossError as error:
            found = [] if folder is None else checkpoints(folder)
            if not found:
                raise
            raise NonFiniteLossError(f"{error}; the last good checkpoint: {found[-1]}") from error
        finally:  # an encoder of the caller's is an ordinary one again, whatever happened
            strip_dual_batchnorm(encoder)
            encoder.eval()
        return self._result()

    def _prepare(self, saved: Saved | None) -> None:
        config = self.config
        image = torch.Size((self.channels, self.size, self.size))
        self.training_step = TrainingStep(
            config,
            self.encoder,
            make_loss(config, self.device),
            self.mean,
            self.std,
            image,
            self.device,
        )
        self.optimizer = build_optimizer(config, self.encoder.parameters())
        every = 1 if self.device.type == "cpu" else config.log_every
        self.monitor = LossMonitor(config, self.encoder, every)
        if saved is None:
            return
        weights, state = saved
        self.encoder.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.training_step.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "step", "epoch_losses", "seconds", "images", "knn_untrained"):
            setattr(self, name, state[name])
        self.knn_history = [(int(e), float(a)) for e, a in state["knn_history"]]
        self.examples = None if state["examples"] is None else tuple(state["examples"])
        self.monitor.total, self.monitor.images = state["loss_total"], state["loss_images"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _image_facts(self) -> dict[str, Any]:
        return {
            "data": self.data.name,
            "num_images": len(self.data.train_images),
            "in_channels": self.channels,
            "image_size": self.size,
            "mean": tuple(self.mean),
            "std": tuple(self.std),
        }

    def _state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "version": STATE_VERSION,
            "config": self.config.to_dict(),
            **self._image_facts(),
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.training_step.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "loss_total": self.monitor.total,
            "loss_images": self.monitor.images,
            "epoch_losses": self.epoch_losses,
            "knn_history": self.knn_history,
            "knn_untrained": self.knn_untrained,
            "seconds": self.seconds,
            "images": self.images,
            "metrics_length": self.metrics.length,
            "examples": self.examples,
        }

    def _global_step(self) -> int:
        return self.epoch * len(self.batches) + self.step

    def _save(self, folder: Path) -> Path:
        self.metrics.sync()  # a checkpoint never knows of lines that a power cut took
        return save_checkpoint(
            folder, self.encoder.state_dict(), self._state(), self._global_step()
        )

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
            factor = learning_rate_factor(config, self._global_step(), num_steps)
            set_learning_rate(self.optimizer, config.lr * factor)
            self.optimizer.zero_grad(set_to_none=True)
            out = self._one_step(x_i, x_j)
            self.monitor.add(self.epoch, self.step, num_steps, out.loss, len(x_i))
            if not self.training_step.update(self.optimizer):
                raise NonFiniteLossError(
                    f"gradients overflowed in every one of the last steps, up to step "
                    f"{self.step + 1} of {num_steps} in epoch {self.epoch + 1}: "
                    f"{cause(self.encoder, config)}, or use another precision"
                )
            if out.x_adv is not None and self.epoch == config.epochs - 1 and self.step == 0:
                self.examples = tuple(
                    x[:NUM_EXAMPLES].detach().float().cpu().contiguous()
                    for x in (x_i, x_j, out.x_adv)
                )
            self.images += len(x_i)
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            self.step += 1
            self.bar.update(self.epoch, len(x_i), self.monitor.last)
            if self._global_step() % config.log_every == 0:
                self._log_step(out.clean_loss, out.adversarial_loss, len(x_i), num_steps)
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
        self.metrics.write("epoch", self._global_step(), **values)

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
            "step", self._global_step(), **values, lr=lr, images_per_second=round(rate, 1)
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
            f"interrupted {where} of {self.config.epochs}; to go on: clae-fast pretrain --resume "
            f"{folder}"
        )

    def _one_step(self, x_i: torch.Tensor, x_j: torch.Tensor) -> StepResult:
        try:
            return self.training_step(x_i, x_j)
        except ValueError as error:
            if len(x_i) > 1:
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
        data = self.data
        if data.train_labels is None or data.test_labels is None:
            return None
        train, test = (
            encode_images(
                self.encoder,
                images,
                self.mean,
                self.std,
                image_size=self.size,
                device=self.device,
            )
            for images in (data.train_images, data.test_images)
        )
        try:
            return weighted_knn(train, data.train_labels, test, data.test_labels)
        except ValueError as error:  # weights so large that the features overflow
            raise NonFiniteLossError(
                f"the trained encoder's {error}: {cause(self.encoder, self.config)}"
            ) from error

    def _result(self) -> PretrainResult:
        data, config = self.data, self.config
        trained = self._knn()
        pixels = None
        if data.train_labels is not None and data.test_labels is not None:
            pixels = weighted_knn(
                pixel_features(data.train_images),
                data.train_labels,
                pixel_features(data.test_images),
                data.test_labels,
            )
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
