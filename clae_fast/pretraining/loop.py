"""The training loop: views, CLAE step, optimiser, kNN before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from clae_fast import (
    InfoNCELoss,
    NTXentLoss,
    UELLoss,
    clae_step,
    convert_dual_batchnorm,
    strip_dual_batchnorm,
)

from .augmentation import Transform, TwoViews, digit_transform, view_loader
from .config import ConfigError, PretrainConfig
from .data import ImageData, load_data
from .encoders import ResidualEncoder
from .probe import encode_images, pixel_features, weighted_knn
from .progress import open_progress

NUM_EXAMPLES = 10  # images kept for the figure


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or Inf: at which step and epoch, and the likely cause."""


@dataclass(frozen=True)
class Examples:
    """A few images of the last epoch's first step, each (n, C, H, W), pixels scaled to [0, 1]."""

    x_i: torch.Tensor
    x_j: torch.Tensor
    x_adv: torch.Tensor


@dataclass(frozen=True)
class PretrainResult:
    """What a run gives.

    `data` is the data set's name. `encoder` is an ordinary model (main BatchNorm) in eval mode.
    `epoch_losses` are means over the images. `examples` is None without CLAE. The three kNN
    accuracies are on the test split.
    """

    config: PretrainConfig
    data: str
    encoder: ResidualEncoder
    epoch_losses: tuple[float, ...]
    knn_pixels: float
    knn_untrained: float
    knn_trained: float
    train_seconds: float
    images_per_second: float
    examples: Examples | None


def make_loss(config: PretrainConfig) -> nn.Module:
    """The loss of the method, tried once so that a backend that cannot run is named at the start.

    Raises:
        ConfigError: the backend cannot run the loss here.
    """
    kinds: dict[str, type[nn.Module]] = {
        "simclr": NTXentLoss,
        "plain": InfoNCELoss,
        "uel": UELLoss,
    }
    backend = None if config.backend == "auto" else config.backend
    try:
        loss = kinds[config.method](temperature=config.loss_temperature, backend=backend)
        loss(torch.eye(4), torch.eye(4))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("backend", config.backend, f"one that can run here ({reason})") from error
    return loss


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then the half cosine to 0."""
    warm_up = max(1, num_steps // 10)
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def pretrain(
    config: PretrainConfig | None = None,
    *,
    data: ImageData | None = None,
    encoder: ResidualEncoder | None = None,
    transform: Transform | None = None,
    progress: bool = False,
) -> PretrainResult:
    """Train an encoder by contrast, with or without CLAE, and evaluate it by weighted kNN.

        loss = L(f(x_i), f(x_j)) + alpha * L(f(x_i), f_aux(x_adv))    without CLAE the first term

    The global random state is left alone, and one seed gives one result on one machine with
    one number of threads.

    Args:
        config: the settings; None takes the defaults.
        data: images to use instead of `config.data`.
        encoder: a model with `encode` and `forward` to train in place; None makes the default
            ResidualEncoder from the seed.
        transform: one image (C, H, W) in [0, 1] to one view; None takes `digit_transform`.
        progress: show loss, images/s and time left on stderr.

    Raises:
        ConfigError: the backend asked for cannot run here.
        ImportError: the data set's package is missing.
        NonFiniteLossError: the loss became NaN or Inf.

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
    data = load_data(config.data) if data is None else data
    loss = make_loss(config)
    with torch.random.fork_rng(devices=[]), num_threads(config.threads or default_threads(config)):
        torch.manual_seed(config.seed)
        encoder = encoder or ResidualEncoder(data.train_images.shape[1])
        # The layout that the CPU's convolutions are fastest in.
        encoder.to(memory_format=torch.channels_last)
        knn_untrained = _knn(encoder, data)
        transform = transform or digit_transform(data.train_images.shape[-1])
        views = TwoViews(data.train_images, data.mean, data.std, transform)
        try:
            if config.clae:
                convert_dual_batchnorm(encoder, momentum=config.aux_momentum)
            start = time.perf_counter()
            epoch_losses, normalized = _train(encoder, views, loss, config, progress)
            seconds = time.perf_counter() - start
        finally:  # an encoder of the caller's is an ordinary one again, whatever happened
            strip_dual_batchnorm(encoder)
            encoder.eval()
        try:
            knn_trained = _knn(encoder, data)
        except ValueError as error:  # weights so large that the features overflow
            raise NonFiniteLossError(
                f"the trained encoder's {error}: {_cause(encoder, config)}"
            ) from error
        return PretrainResult(
            config=config,
            data=data.name,
            encoder=encoder,
            epoch_losses=tuple(epoch_losses),
            knn_pixels=weighted_knn(
                pixel_features(data.train_images),
                data.train_labels,
                pixel_features(data.test_images),
                data.test_labels,
            ),
            knn_untrained=knn_untrained,
            knn_trained=knn_trained,
            train_seconds=seconds,
            images_per_second=config.epochs * len(data.train_images) / seconds,
            examples=_denormalize(normalized, data) if normalized else None,
        )


def default_threads(config: PretrainConfig) -> int:
    """What the workers leave of PyTorch's threads, 1 to 4.

    With more threads than free cores, OpenMP's threads spin while they wait for one another: on
    two cores a step then takes several times as long. Past 4 the small encoder gains nothing.
    """
    return max(1, min(torch.get_num_threads() - config.workers, 4))


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """PyTorch's intra-op threads inside the block; as before afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    encoder: ResidualEncoder,
    views: TwoViews,
    loss: nn.Module,
    config: PretrainConfig,
    progress: bool,
) -> tuple[list[float], Examples | None]:
    generator = torch.Generator().manual_seed(config.seed)
    loader = view_loader(views, config.batch_size, generator, config.workers)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    num_steps = config.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps)
    )
    num_images = len(views.images)
    epoch_losses: list[float] = []
    examples = None
    encoder.train()
    with open_progress(config.epochs, num_images, shown=progress) as bar:
        for epoch in range(config.epochs):
            total = 0.0
            for step, (x_i, x_j) in enumerate(loader):
                if config.clae:
                    out = clae_step(
                        encoder, x_i, x_j, loss=loss, eps=config.eps, alpha=config.alpha
                    )
                    batch_loss = out.loss
                    if step == 0:
                        examples = Examples(
                            *(x[:NUM_EXAMPLES].detach() for x in (x_i, x_j, out.x_adv))
                        )
                else:
                    batch_loss = loss(encoder(x_i), encoder(x_j))
                value = float(batch_loss.detach())
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"the loss is {value} at step {step + 1} of {len(loader)} in epoch "
                        f"{epoch + 1} of {config.epochs}: {_cause(encoder, config)}"
                    )
                optimizer.zero_grad(set_to_none=True)
                batch_loss.backward()
                optimizer.step()
                schedule.step()
                total += value * len(x_i)
                bar.update(epoch, len(x_i), value)
            if not all(bool(torch.isfinite(p).all()) for p in encoder.state_dict().values()):
                raise NonFiniteLossError(
                    f"the weights or statistics are not finite after epoch {epoch + 1} of "
                    f"{config.epochs}: {_cause(encoder, config)}"
                )
            epoch_losses.append(total / num_images)
            bar.end_epoch(epoch, epoch_losses[-1])
    return epoch_losses, examples


def _cause(encoder: nn.Module, config: PretrainConfig) -> str:
    largest = max(float(p.detach().abs().max()) for p in encoder.parameters())
    if not largest < 1e4:  # also NaN
        return f"the weights grew to {largest:.3g}; lower lr (now {config.lr:g})"
    return (
        f"the weights are in order (largest {largest:.3g}), so the embeddings or the loss "
        f"overflowed; raise temperature (now {config.loss_temperature:g}) or lower "
        f"lr (now {config.lr:g})"
    )


def _knn(encoder: ResidualEncoder, data: ImageData) -> float:
    train, test = (
        encode_images(encoder, images, data.mean, data.std)
        for images in (data.train_images, data.test_images)
    )
    return weighted_knn(train, data.train_labels, test, data.test_labels)


def _denormalize(examples: Examples, data: ImageData) -> Examples:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return Examples(*(x * std + mean for x in (examples.x_i, examples.x_j, examples.x_adv)))
