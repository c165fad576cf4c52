"""Separate BatchNorm statistics for clean and adversarial images.

A DualBatchNorm is an ordinary BatchNorm (branch "main") that carries a second one, `aux`, with its
own affine parameters and running statistics; convolutions and linear layers stay shared (Xie et
al., "Adversarial Examples Improve Image Recognition", CVPR 2020; Ho & Vasconcelos, NeurIPS 2020).
Which of the two runs is an attribute of the modules, set by `batchnorm_branch`.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import branch_memory
from .sync_batchnorm import SYNCHRONIZED, SyncBatchNorm

BRANCHES = ("main", "aux")
M = TypeVar("M", bound=nn.Module)


class DualBatchNorm(_BatchNorm):
    """Base of the dual layers: the BatchNorm itself is `main`, its child is `aux`."""

    aux: _BatchNorm
    branch: str = "main"

    def __init__(self, *args: Any, aux_momentum: float | None = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_module("aux", _twin(self, aux_momentum))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...) with the statistics of the current branch."""
        if branch_memory.branch_of(self) == "aux":
            return self.aux(x)
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, branch={self.branch}"


class DualBatchNorm1d(DualBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with a second set of statistics and affine parameters.

    Arguments as there, and `aux_momentum=0.01`; usually made by `convert_dual_batchnorm`.
    """


class DualBatchNorm2d(DualBatchNorm, nn.BatchNorm2d):
    """As DualBatchNorm1d, of `nn.BatchNorm2d`."""


class DualBatchNorm3d(DualBatchNorm, nn.BatchNorm3d):
    """As DualBatchNorm1d, of `nn.BatchNorm3d`."""


class DualSyncBatchNorm(DualBatchNorm, SyncBatchNorm):
    """As DualBatchNorm1d, of `nn.SyncBatchNorm`; both branches train on the CPU too.

    It is no subclass of `nn.SyncBatchNorm`: DistributedDataParallel refuses those on the CPU.
    """


_DUAL: dict[type[nn.Module], type[DualBatchNorm]] = {
    nn.BatchNorm1d: DualBatchNorm1d,
    nn.BatchNorm2d: DualBatchNorm2d,
    nn.BatchNorm3d: DualBatchNorm3d,
    nn.SyncBatchNorm: DualSyncBatchNorm,
    SyncBatchNorm: DualSyncBatchNorm,
}


def _plain(kind: type[nn.Module]) -> type[_BatchNorm]:
    """The single class behind a class, dual or not."""
    for cls in kind.__mro__:
        if cls in _DUAL:
            return cls  # type: ignore[return-value]
    raise TypeError(f"{kind.__qualname__} has no BatchNorm of a dimension behind it")


def _layers(model: nn.Module) -> tuple[dict[str, DualBatchNorm], dict[str, _BatchNorm]]:
    """The dual layers by name, and the single ones that belong to none."""
    named = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    dual = {n: m for n, m in named.items() if isinstance(m, DualBatchNorm)}
    owned = {id(m.aux) for m in dual.values()}
    single = {
        n: m for n, m in named.items() if not isinstance(m, DualBatchNorm) and id(m) not in owned
    }
    return dual, single


def convert_dual_batchnorm(model: M, *, momentum: float | None = 0.01) -> M:
    """Give every BatchNorm of the model an auxiliary twin, in place.

    Each BatchNorm1d, 2d, 3d and SyncBatchNorm becomes its dual; the module objects, parameters,
    buffers and hooks stay the very same, shared modules stay shared. Convert before you build the
    optimizer: one that is older does not know, and never trains, the parameters of aux. `main`
    keeps its state_dict keys, `aux` adds `<name>.aux.*` and starts as a copy of main. A checkpoint
    without any aux key loads strictly and seeds aux from main.

    Args:
        model: any module; with torch.nn.parallel, convert before wrapping.
        momentum: of the aux running statistics; main keeps its own. None: cumulative average. A
            layer that is dual already keeps the one it has.

    Returns:
        The model.

    Raises:
        TypeError: a BatchNorm subclass that is not known here, by name and class; nothing has been
            converted then.
        ValueError: a momentum outside (0, 1].

    Source: CLAE's code uses momentum 0.01 for aux (main: 0.1).

    Example:
        >>> net = convert_dual_batchnorm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        >>> with batchnorm_branch(net, "aux"):
        ...     z = net(torch.randn(16, 4))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if momentum is not None and not (
        isinstance(momentum, (int, float)) and not isinstance(momentum, bool) and 0 < momentum <= 1
    ):
        raise ValueError(f"momentum must be None or a number in (0, 1], got {momentum!r}")
    _, single = _layers(model)
    for name, layer in single.items():
        if type(layer) not in _DUAL:
            known = ", ".join(dict.fromkeys(c.__name__ for c in _DUAL))
            raise TypeError(
                f"cannot convert {name or 'the model'!r}: {type(layer).__qualname__} is a "
                f"BatchNorm subclass that clae_fast does not know (it knows exactly {known}); "
                "use a model whose layers are of these classes, or one without BatchNorm"
            )
    for layer in single.values():
        aux = _twin(layer, momentum)
        # The same object with another class: identity, parameters, buffers and hooks remain.
        layer.__class__ = _DUAL[type(layer)]
        layer.add_module("aux", aux)
    _hook_loading(model)
    return model


def _twin(layer: _BatchNorm, momentum: float | None) -> _BatchNorm:
    """A BatchNorm of the same kind and state with its own momentum."""
    options: dict[str, Any] = {}
    if isinstance(layer, SYNCHRONIZED):
        options["process_group"] = layer.process_group
    kind = _plain(_DUAL.get(type(layer), type(layer)))  # of SyncBatchNorm: ours
    twin = kind(
        layer.num_features,
        layer.eps,
        momentum,
        layer.affine,
        layer.track_running_stats,
        **options,
    )
    stores: Any = ((twin._parameters, layer._parameters), (twin._buffers, layer._buffers))
    for ours, theirs in stores:
        for name, value in theirs.items():
            if value is None:
                ours[name] = None
            elif isinstance(value, nn.Parameter):
                ours[name] = nn.Parameter(value.detach().clone(), value.requires_grad)
            else:
                ours[name] = value.detach().clone()
    return twin.train(layer.training)


def strip_dual_batchnorm(model: M) -> M:
    """Back to an ordinary model with the main branch, in place: the inverse of the conversion.

    Args:
        model: a converted model; one without dual layers is returned as it is.

    Returns:
        The model; its state_dict has no aux keys.

    Raises:
        TypeError: a dual layer of another class, by name; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    dual, _ = _layers(model)
    for name, layer in dual.items():
        if type(layer) not in _DUAL.values():
            raise TypeError(
                f"cannot strip {name or 'the model'!r}: {type(layer).__qualname__} is a dual "
                "BatchNorm changed by others; undo that first (a parametrization, say)"
            )
    for layer in dual.values():
        del layer.aux
        layer.__dict__.pop("branch", None)
        plain = _plain(type(layer))
        kind = nn.SyncBatchNorm if plain is SyncBatchNorm else plain
        layer.__class__ = kind  # type: ignore[assignment]
    _unhook_loading(model)
    return model


@contextlib.contextmanager
def batchnorm_branch(model: nn.Module, branch: str) -> Iterator[None]:
    """Run the model's dual layers on one branch inside the `with`; nests, and restores on error.

    The branch is an attribute of the modules, not of the thread. Non-reentrant activation
    checkpointing recomputes on the branch of its forward; the reentrant kind is refused.

    Args:
        model: converted by `convert_dual_batchnorm`, possibly wrapped (DDP, torch.compile); a
            model without any BatchNorm is fine.
        branch: "main" or "aux".

    Raises:
        ValueError: an unknown branch; a BatchNorm without a usable aux.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
    dual, single = _layers(model)
    if single:
        name, layer = next(iter(single.items()))
        orphan = isinstance(getattr(layer, "aux", None), _BatchNorm)
        raise ValueError(
            f"{name or 'the model'!r} is a {type(layer).__name__} without a usable aux branch: "
            + (
                "it was converted after the model had been made dual. The order is "
                "SyncBatchNorm.convert_sync_batchnorm first, then convert_dual_batchnorm"
                if orphan
                else "call convert_dual_batchnorm(model) first (after "
                "SyncBatchNorm.convert_sync_batchnorm, if you use it)"
            )
        )
    before = [layer.branch for layer in dual.values()]
    for layer in dual.values():
        layer.branch = branch
    try:
        yield
    finally:
        for layer, old in zip(dual.values(), before, strict=True):
            layer.branch = old


def aux_layers(model: nn.Module) -> list[_BatchNorm]:
    """The auxiliary BatchNorms of a model."""
    return [layer.aux for layer in _layers(model)[0].values()]


# ------------------------------------------------------- loading a checkpoint without aux keys


def _seed_aux(
    always: bool, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Load hook: copy main to aux, if the checkpoint has no aux key at all.

    Partly missing keys are left to be reported. Only the outermost module sees whether it is all.
    """
    if prefix and not always:
        return
    names = [
        f"{prefix}{name}." if name else prefix
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, DualBatchNorm)
    ]
    if any(key.startswith(f"{name}aux.") for name in names for key in state_dict):
        return
    for name in names:
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if name + leaf in state_dict:
                state_dict[f"{name}aux.{leaf}"] = state_dict[name + leaf].clone()


_seed_as_root = functools.partial(_seed_aux, True)
_seed_as_part = functools.partial(_seed_aux, False)


def _hook_loading(model: nn.Module) -> None:
    """Hooks for the model and, if loaded on their own, its parts that hold dual layers."""
    _unhook_loading(model)
    for module in model.modules():
        if any(isinstance(m, DualBatchNorm) for m in module.modules()):
            hook = _seed_as_root if module is model else _seed_as_part
            module.register_load_state_dict_pre_hook(hook)


def _unhook_loading(model: nn.Module) -> None:
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, h in hooks.items() if _is_ours(getattr(h, "hook", h))]:
            del hooks[key]


def _is_ours(hook: Any) -> bool:
    # By function, not identity: a copied or unpickled model has its own partials.
    return isinstance(hook, functools.partial) and hook.func is _seed_aux


def replay_aux(before: list[tuple[Tensor, ...] | None], layers: list[_BatchNorm]) -> None:
    """Advance aux running statistics as if the same forward had run once more.

    One forward maps `r -> (1 - m)^n r + s`, with n updates; so `r2 = r1 + (1 - m)^n (r1 - r0)`.
    With momentum None (cumulative average) the n-th update weighs 1/n, which gives
    `r2 = r1 + c (r1 - r0)` with `c = count_0 / count_2`.
    """
    with torch.no_grad():
        for old, layer in zip(before, layers, strict=True):
            if old is None:
                continue
            mean, var, count = old
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            updates = layer.num_batches_tracked - count
            if layer.momentum is None:
                share = count / (count + 2 * updates).clamp_min(1)
            else:
                share = (1 - layer.momentum) ** updates.to(layer.running_mean.dtype)
            for now, then in ((layer.running_mean, mean), (layer.running_var, var)):
                now.add_(share * (now - then))
            layer.num_batches_tracked.add_(updates)


def running_statistics(layers: list[_BatchNorm]) -> list[tuple[Tensor, ...] | None]:
    """Copies of (running_mean, running_var, num_batches_tracked); None where nothing is tracked."""
    return [
        None
        if m.running_mean is None or m.running_var is None or m.num_batches_tracked is None
        else (m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone())
        for m in layers
    ]
