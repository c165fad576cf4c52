"""Who is measured: ours per backend, PyTorch written out, and the libraries people use today.

A provider makes, for a shape, a function of the embeddings that returns the mean loss. One that
is not installed or cannot run here drops out with one line that says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor

import clae_fast
from clae_fast import cuda

Loss = Callable[..., Tensor]


class NotHere(Exception):
    """Why a provider cannot run here."""


class Provider(NamedTuple):
    """`make(shape, device)` returns the loss or raises NotHere; None: not for that loss."""

    name: str
    make: Callable[[Shape, str], Loss | None]
    package: str | None = None  # of PyPI, for the line that says what is missing

    @property
    def ours(self) -> bool:
        return self.name.startswith("clae_fast")


# ------------------------------------------------------------------------------- written out


def dense(shape: Shape, widen: bool = True) -> Loss:
    """The formula in plain PyTorch, as one would write it today; half precision in float32, but for
    the products if they are not to be widened."""
    t, half = 1 / shape.temperature, shape.dtype in (torch.float16, torch.bfloat16)

    def wide(s: Tensor) -> Tensor:
        return s.float() if half else s

    def nt_xent(z_i: Tensor, z_j: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z_i, z_j)), dim=1)
        s = wide(z @ z.T) * t
        s = s.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z) // 2))

    def info_nce(q: Tensor, k: Tensor) -> Tensor:
        s = wide(F.normalize(q, dim=1) @ F.normalize(k, dim=1).T) * t
        return F.cross_entropy(s, torch.arange(len(q), device=q.device))

    def queue(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
        q, k, n = (F.normalize(x, dim=1) for x in (q, k, negatives))
        s = wide(torch.cat(((q * k).sum(1, keepdim=True), q @ n.T), 1)) * t
        return F.cross_entropy(s, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def clip(x: Tensor, y: Tensor) -> Tensor:
        s = wide(F.normalize(x, dim=1) @ F.normalize(y, dim=1).T) * t
        target = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2

    def uel(z_i: Tensor, z_j: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z_i, z_j)), dim=1)
        s = wide(z @ z.detach().T) * t
        s = s.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        log_p, rows = F.log_softmax(s, dim=1), torch.arange(len(z), device=z.device)
        twins = rows.roll(len(z) // 2)
        others = torch.log1p(-log_p.exp()).index_put((rows, twins), log_p.new_zeros(()))
        return -(log_p[rows, twins] + others.sum(1)).mean()

    losses: dict[str, Loss] = {"nt_xent": nt_xent, "info_nce": info_nce, "uel": uel, "clip": clip}
    loss = queue if shape.queue else losses[shape.loss]
    return (lambda *xs: loss(*(x.float() for x in xs))) if half and widen else loss


def _eager(shape: Shape, device: str) -> Loss:
    return dense(shape)


def _compiled(shape: Shape, device: str) -> Loss:
    compiled: Loss = torch.compile(dense(shape), dynamic=False)
    return compiled


def _reduce_overhead(shape: Shape, device: str) -> Loss | None:
    """Compiled, and replayed as CUDA graphs by PyTorch itself."""
    if device == "cpu":
        return None
    compiled: Loss = torch.compile(dense(shape), dynamic=False, mode="reduce-overhead")
    return compiled


def _sixteen_bits(shape: Shape, device: str) -> Loss | None:
    """Compiled, with products of 16 bits that are rounded to 16 bits; the gate says what that is
    worth."""
    if device == "cpu" or shape.dtype == torch.float32:
        return None
    compiled: Loss = torch.compile(dense(shape, widen=False), dynamic=False)
    return compiled


def _linear_cross_entropy(shape: Shape, device: str) -> Loss | None:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise NotHere(f"torch {torch.__version__} has no F.linear_cross_entropy")
    if shape.loss != "info_nce" or shape.queue:
        return None  # it cannot leave a row's own column out, nor add a column of its own

    def loss(q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1) / shape.temperature, F.normalize(k, dim=1)
        out: Tensor = function(q, k, torch.arange(len(q), device=q.device))
        return out

    return loss


# --------------------------------------------------------------------------------------- ours


def _ours(backend: str, shape: Shape, device: str) -> Loss | None:
    operator = "pair_uel" if shape.loss == "uel" else "contrast"
    state = clae_fast.available_backends()[operator][backend]
    if state != "ok":
        raise NotHere(state)
    if (backend == "cpp") != (device == "cpu") and backend != "reference":
        raise NotHere(f"it does not run on {device}")
    if backend == "reference" and shape.rows * shape.columns > 2**24:
        return None  # the specification, chunk by chunk; its time says nothing more
    if backend == "cuda":
        forms = {"nt_xent": "nt_xent", "clip": "two_way", "info_nce": "one_way"}
        q, k = (torch.empty(shape.pairs, shape.width, dtype=shape.dtype, device=device)
                for _ in range(2))  # fmt: skip
        needs = {"need_dq": True, "need_dk": True, "form": forms[shape.loss]}
        if shape.queue or cuda.contrast_refusal(q, k, None, 1.0, **needs) is not None:
            return None  # larger than one launch can hold
    options: dict[str, Any] = {"backend": backend}
    if shape.loss == "clip":
        return functools.partial(
            clae_fast.clip_loss, logit_scale=1 / shape.temperature, normalize=True, **options
        )
    functions: dict[str, Loss] = {
        "nt_xent": clae_fast.nt_xent_loss,
        "info_nce": clae_fast.info_nce_loss,
        "uel": clae_fast.uel_loss,
    }
    function = functions[shape.loss]
    return functools.partial(function, temperature=shape.temperature, **options)


# --------------------------------------------------------------------------------------- peers


def module(name: str) -> Any:
    """A package of someone else's; NotHere, with the reason, whatever its import raises."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken or GPU-only package raises
        raise NotHere(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _lightly(shape: Shape, device: str) -> Loss | None:
    if shape.loss != "nt_xent":
        return None
    if shape.rows > 4096:  # several copies of S at once
        return None
    loss: Loss = module("lightly.loss").NTXentLoss(temperature=shape.temperature)
    return loss


def _metric_learning(shape: Shape, device: str) -> Loss | None:
    losses = module("pytorch_metric_learning.losses")
    if shape.loss != "nt_xent" or shape.rows > 2048:  # a mask of pairs x pairs
        return None
    loss: Loss = losses.SelfSupervisedLoss(losses.SupConLoss(temperature=shape.temperature))
    return loss


def _info_nce_pytorch(shape: Shape, device: str) -> Loss | None:
    if shape.loss != "info_nce":
        return None
    loss: Loss = module("info_nce").InfoNCE(temperature=shape.temperature)
    return loss


def _infonce(shape: Shape, device: str) -> Loss | None:
    if shape.loss != "nt_xent":
        return None
    if shape.rows > 4096:
        return None
    loss = module("infonce").InfoNCE(temperature=shape.temperature)
    return lambda z_i, z_j: loss(torch.cat((z_i, z_j)))


def _open_clip(shape: Shape, device: str) -> Loss | None:
    if shape.loss != "clip":
        return None
    loss = module("open_clip.loss").ClipLoss()
    scale = torch.tensor(1 / shape.temperature, device=device)
    return lambda x, y: loss(F.normalize(x, dim=1), F.normalize(y, dim=1), scale)


def _gpu_only(name: str, make: Callable[[Any, Shape], Loss | None]) -> Callable[..., Any]:
    def provider(shape: Shape, device: str) -> Loss | None:
        if device == "cpu":
            raise NotHere("it runs on NVIDIA GPUs only")
        return make(module(name), shape)

    return provider


def _memeff(module: Any, shape: Shape) -> Loss | None:
    if shape.loss != "clip":
        return None
    loss: Loss = module.MemoryEfficientCLIPLoss(temperature=shape.temperature, stable=False)
    return loss


def _inf_cl(module: Any, shape: Shape) -> Loss | None:
    if shape.loss != "clip" or shape.width % 128:
        return None
    flash = functools.partial(module.cal_flash_loss, head_dim=128)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        t = torch.tensor(1 / shape.temperature, device=x.device)
        return (flash(x, y, scale=t).mean() + flash(y, x, scale=t).mean()) / 2

    return loss


def _cut_cross_entropy(module: Any, shape: Shape) -> Loss | None:
    if shape.loss != "info_nce" or shape.queue:
        return None

    def loss(q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1) / shape.temperature, F.normalize(k, dim=1)
        out: Tensor = module.linear_cross_entropy(q, k, torch.arange(len(q), device=q.device))
        return out

    return loss


def _liger(module: Any, shape: Shape) -> Loss | None:
    if shape.loss != "info_nce" or shape.queue:
        return None
    fused = module.LigerFusedLinearCrossEntropyLoss()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1) / shape.temperature, F.normalize(k, dim=1)
        out: Tensor = fused(k, q, torch.arange(len(q), device=q.device))
        return out

    return loss


def _sigmoid_only(module: Any, shape: Shape) -> Loss | None:
    raise NotHere("its loss is SigLIP's, and no shape asks for that")


PROVIDERS = (
    *(
        Provider(f"clae_fast-{backend}", functools.partial(_ours, backend))
        for backend in ("cpp", "triton", "cuda", "reference")
    ),
    Provider("eager", _eager),
    Provider("compiled", _compiled),
    Provider("compiled-reduce-overhead", _reduce_overhead),
    Provider("compiled-16-bit", _sixteen_bits),
    Provider("linear_cross_entropy", _linear_cross_entropy),
    Provider("lightly", _lightly, "lightly"),
    Provider("pytorch-metric-learning", _metric_learning, "pytorch-metric-learning"),
    Provider("info-nce-pytorch", _info_nce_pytorch, "info-nce-pytorch"),
    Provider("infonce", _infonce, "infonce"),
    Provider("open_clip", _open_clip, "open-clip-torch"),
    Provider("memeff", _gpu_only("memeff", _memeff), "memeff"),
    Provider("inf-cl", _gpu_only("inf_cl", _inf_cl), "inf-cl"),
    Provider("siglip-kernel", _gpu_only("siglip_kernel", _sigmoid_only), "siglip-kernel"),
    Provider(
        "cut-cross-entropy",
        _gpu_only("cut_cross_entropy", _cut_cross_entropy),
        "cut-cross-entropy",
    ),
    Provider("liger-kernel", _gpu_only("liger_kernel.transformers", _liger), "liger-kernel"),
)
PROBES = (
    Shape("probe-nt_xent", "nt_xent", 4, 128),
    Shape("probe-info_nce", "info_nce", 4, 128),
    Shape("probe-uel", "uel", 4, 128),
    Shape("probe-clip", "clip", 4, 128),
)


def missing(device: str) -> dict[str, str]:
    """{name: why} of those that drop out here."""
    reasons = {}
    for provider in PROVIDERS:
        try:
            for probe in PROBES:
                provider.make(probe, device)
        except NotHere as reason:
            how = f" (pip install {provider.package})" if "No module" in str(reason) else ""
            reasons[provider.name] = f"{reason}{how}"
    return reasons


def available(shape: Shape, device: str) -> dict[str, Loss]:
    """{name: loss} of those that have this loss and can run here."""
    found: dict[str, Loss] = {}
    for provider in PROVIDERS:
        try:
            loss = provider.make(shape, device)
        except NotHere:
            continue
        if loss is not None:
            found[provider.name] = loss
    return found


def versions() -> dict[str, str]:
    """Of the packages that were measured."""
    found = {}
    for provider in PROVIDERS:
        if provider.package is not None:
            try:
                found[provider.package] = importlib.metadata.version(provider.package)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
