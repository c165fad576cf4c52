"""BatchNorm over the images of several processes, on the CPU too.

PyTorch's SyncBatchNorm refuses CPU tensors in training; this one takes them, and runs PyTorch's
code everywhere else. Two small collectives a layer: the statistics in the forward, two sums in
the backward.
"""

from __future__ import annotations  # not every PyTorch has torch.distributed's classes

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .numerics import compute_dtype


class SyncBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` that also trains on the CPU.

        mean = sum_r n_r mean_r / n                            over the processes r, n = sum_r n_r
        var  = sum_r (n_r var_r + n_r (mean_r - mean)^2) / n
        y    = (x - mean) / sqrt(var + eps) * weight + bias

    with n_r the values per channel in process r: any numbers, 0 too. Outputs, input gradients and
    running statistics (variance times n / (n - 1)) are those of one BatchNorm over all images.
    Weight and bias gradients are the sums over the process's own images, as in PyTorch's: DDP
    averages them. In eval mode, without a process group or in a group of one it is a BatchNorm.
    Under torch.compile the layer is a graph break on the CPU.

    Arguments and state as `nn.SyncBatchNorm`, of which it is no subclass: DistributedDataParallel
    refuses those on the CPU. Shape: (B, C, ...) -> the same; B may differ between the processes.

    Raises:
        ValueError: fewer than two values per channel in all processes together.

    Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, for merging the variances.
    """

    _check_input_dim: Any = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (B, C, ...)."""
        if self.training and input.device.type == "cpu":
            return _train_on_cpu(self, input)
        return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]


SYNCHRONIZED = (nn.SyncBatchNorm, SyncBatchNorm)


# Collectives and counts are never traced into a graph of one process. torch.compiler.disable would
# import the compiler here, this one does at the first call.
@_disable_dynamo
def _train_on_cpu(layer: SyncBatchNorm, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    layer._check_non_zero_input_channels(x)
    factor = 0.0 if layer.momentum is None else layer.momentum
    tracked = layer.track_running_stats
    if tracked:
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            factor = 1.0 / float(layer.num_batches_tracked)
    running = (layer.running_mean, layer.running_var) if tracked else (None, None)
    group = synchronizing_group(layer)
    if group is None:
        return F.batch_norm(x, *running, layer.weight, layer.bias, True, factor, layer.eps)
    mean, var, count = _statistics(x.detach(), group)
    if count < 2:
        raise ValueError(
            "input must have at least 2 values per channel in all processes together when "
            f"training, got {count} (here: {tuple(x.shape)})"
        )
    for old, new in zip(running, (mean, var * (count / (count - 1))), strict=True):
        if old is not None:
            old.copy_(old.to(new.dtype) * (1 - factor) + new * factor)
    out: Tensor = _Normalize.apply(x, layer.weight, layer.bias, mean, var, count, layer.eps, group)
    return out


def synchronizing_group(layer: Any) -> dist.ProcessGroup | None:
    """The processes whose images the layer would normalise together; None: this one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = layer.process_group or dist.group.WORLD
    return None if dist.get_world_size(group) < 2 else group


def synchronizing_groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """The groups over which gradients of several processes mix in a backward, smallest first."""
    layers = [m for m in model.modules() if isinstance(m, SYNCHRONIZED) and m.training]
    groups = {group for m in layers if (group := synchronizing_group(m)) is not None}
    # By size, and by name among equals: the same order in all processes.
    return sorted(groups, key=lambda group: (dist.get_world_size(group), group.group_name))


def _statistics(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """Mean (C,), biased variance (C,), both float64, and count of all processes' values."""
    channels = x.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=torch.float64)
    if x.numel():
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.to(compute_dtype(x.dtype)), dims, correction=0)
        # float64 also because float32 cannot count beyond 2^24
        own = torch.cat([mean.double(), var.double(), own.new_tensor([x.numel() // channels])])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    table = torch.stack(parts)
    means, variances, counts = table.split([channels, channels, 1], dim=1)
    # A process without images counts nothing, whatever its zeros are.
    share = counts / counts.sum().clamp_min(1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, int(counts.sum())


class _Normalize(torch.autograd.Function):
    """x normalised by given statistics, which depend on the x of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        dtype = compute_dtype(x.dtype)
        mean, var = mean.to(dtype), var.to(dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        if x.numel() == 0:
            return torch.empty_like(x)
        scale, shift = (None if p is None else p.to(dtype) for p in (weight, bias))
        return F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        shape = (1, -1) + (1,) * (x.dim() - 2)
        dtype = mean.dtype
        dy, wide = dy.to(dtype), x.to(dtype)
        scale = None if weight is None else weight.to(dtype)
        if x.numel():
            # As in eval mode: the gradient past the statistics, and the sums of dy xhat and dy.
            dx, dy_xhat, dy_sum = torch.ops.aten.native_batch_norm_backward(
                dy, wide, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            dx, dy_xhat, dy_sum = wide, torch.zeros_like(mean), torch.zeros_like(mean)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        own = (dy_xhat, dy_sum)
        if need_x:
            # float64 as the statistics are: no order of the processes shows in the sum
            sums = torch.stack(own).double()
            dist.all_reduce(sums, group=ctx.group)
            through_var, through_mean = (sums / ctx.count).to(dtype)
            inverse = (var + ctx.eps).rsqrt()
            factor = inverse if scale is None else inverse * scale
            dx = dx - (factor * through_mean).reshape(shape)
            dx = dx.addcmul(
                wide - mean.reshape(shape),
                (factor * inverse * through_var).reshape(shape),
                value=-1,
            ).to(x.dtype)
        return (
            dx if need_x else None,
            own[0].to(ctx.dtypes[0]) if need_weight else None,
            own[1].to(ctx.dtypes[1]) if need_bias else None,
            *(None,) * 5,
        )
