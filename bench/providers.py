"""Who is measured: ours per backend, PyTorch written out, and the libraries people use today.

A provider makes, for a shape, a function of the embeddings that returns the mean loss. One that
is not installed or cannot run here drops out with one line that says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from own import operator, own
from shapes import BIAS, FUSED_KINDS, SIGMA, Shape
from torch import Tensor
from written_out import Loss, dense

import clae_fast
from clae_fast import cuda


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

    def loss(self, shape: Shape, device: str) -> Loss | None:
        """What `make` gives; NotHere too where a package of another version raises anything."""
        try:
            return self.make(shape, device)
        except NotHere:
            raise
        except Exception as error:
            if self.package is None:
                raise
            raise NotHere(f"{type(error).__name__}: {error}".splitlines()[0]) from error


# ------------------------------------------------------------------------------- written out


def _eager(shape: Shape, device: str) -> Loss:
    return dense(shape, device=device)


def _compiled(shape: Shape, device: str) -> Loss:
    compiled: Loss = torch.compile(dense(shape, device=device), dynamic=False)
    return compiled


def _reduce_overhead(shape: Shape, device: str) -> Loss | None:
    """Compiled, and replayed as CUDA graphs by PyTorch itself."""
    if device == "cpu":
        return None
    compiled: Loss = torch.compile(
        dense(shape, device=device), dynamic=False, mode="reduce-overhead"
    )
    return compiled


def _sixteen_bits(shape: Shape, device: str) -> Loss | None:
    """Compiled, with products of 16 bits that are rounded to 16 bits; the gate says what that is
    worth."""
    if device == "cpu" or shape.dtype == torch.float32:
        return None
    compiled: Loss = torch.compile(dense(shape, widen=False, device=device), dynamic=False)
    return compiled


def _linear_cross_entropy(shape: Shape, device: str) -> Loss | None:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise NotHere(f"torch {torch.__version__} has no F.linear_cross_entropy")
    # It cannot leave a row's own column out, nor add a column of its own.
    return _by_linear(shape, function)


def _by_linear(shape: Shape, function: Callable[[Tensor, Tensor, Tensor], Any]) -> Loss | None:
    """InfoNCE by the fused last layer of a language model, (hidden, weight, target) to the mean
    loss: the keys are its weight."""
    if shape.kind not in ("info_nce", "info_nce, extra negatives"):
        return None

    def loss(q: Tensor, *keys: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1) / shape.temperature, F.normalize(torch.cat(keys), dim=1)
        out: Tensor = function(q, k, torch.arange(len(q), device=q.device))
        return out

    return loss


# --------------------------------------------------------------------------------------- ours


def _ours(backend: str, shape: Shape, device: str) -> Loss | None:
    state = clae_fast.available_backends()[operator(shape)][backend]
    if backend == "cuda" and operator(shape) != "contrast":
        return None  # no other operator has such a kernel
    if state != "ok":
        raise NotHere(state)
    if (backend == "cpp") != (device == "cpu") and backend != "reference":
        raise NotHere(f"it does not run on {device}")
    # The specification, chunk by chunk: its time says nothing more, and of the family it is the
    # gate's truth besides.
    most = 2**24 if shape.kind in FUSED_KINDS else 2**20
    if backend == "reference" and shape.rows * shape.columns > most:
        return None
    if backend == "cuda":
        forms = {"nt_xent": "nt_xent", "clip": "two_way", "info_nce": "one_way"}
        q, k = (torch.empty(shape.pairs, shape.width, dtype=shape.dtype, device=device)
                for _ in range(2))  # fmt: skip
        needs = {"need_dq": True, "need_dk": True, "form": forms[shape.loss]}
        if shape.queue or cuda.contrast_refusal(q, k, None, 1.0, **needs) is not None:
            return None  # larger than one launch can hold
    return own(shape, backend, device)


# --------------------------------------------------------------------------------------- peers


def module(name: str) -> Any:
    """A package of someone else's; NotHere, with the reason, whatever its import raises."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken or GPU-only package raises
        raise NotHere(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _lightly(shape: Shape, device: str) -> Loss | None:
    classes = {"nt_xent": "NTXentLoss", "dcl": "DCLLoss", "dcl, weighted": "DCLWLoss"}
    if shape.kind not in classes or shape.rows > 4096:  # several copies of S at once
        return None
    options = {"temperature": shape.temperature} | ({"sigma": SIGMA} if shape.weighted else {})
    loss: Loss = getattr(module("lightly.loss"), classes[shape.kind])(**options)
    return loss


def _metric_learning(shape: Shape, device: str) -> Loss | None:
    losses = module("pytorch_metric_learning.losses")
    if shape.kind not in ("nt_xent", "sup_con") or shape.rows > 2048:  # a mask of pairs x pairs
        return None
    # Its mean leaves out rows whose loss is 0, ours only counts them: with two views of each sample
    # there are none.
    loss: Loss = losses.SupConLoss(temperature=shape.temperature)
    if shape.kind == "nt_xent":
        views: Loss = losses.SelfSupervisedLoss(loss)
        return views
    labels = shape.ids(device).repeat(2)
    return lambda z_i, z_j: loss(torch.cat((z_i, z_j)), labels)


def _info_nce_pytorch(shape: Shape, device: str) -> Loss | None:
    if shape.kind not in ("info_nce", "info_nce, queue"):
        return None
    loss: Loss = module("info_nce").InfoNCE(temperature=shape.temperature)
    return loss


def _infonce(shape: Shape, device: str) -> Loss | None:
    if shape.kind != "nt_xent" or shape.rows > 4096:
        return None
    loss = module("infonce").InfoNCE(temperature=shape.temperature)
    return lambda z_i, z_j: loss(torch.cat((z_i, z_j)))


def _open_clip(shape: Shape, device: str) -> Loss | None:
    if shape.kind not in ("clip", "siglip"):
        return None
    losses = module("open_clip.loss")
    scale = [torch.tensor(1 / shape.temperature, device=device)]
    if shape.kind == "siglip":
        scale.append(torch.tensor(BIAS, device=device))
    loss = losses.SigLipLoss() if shape.kind == "siglip" else losses.ClipLoss()
    return lambda x, y: loss(F.normalize(x, dim=1), F.normalize(y, dim=1), *scale)


def _sentence_transformers(shape: Shape, device: str) -> Loss | None:
    if shape.kind not in ("info_nce", "info_nce, extra negatives"):
        return None
    losses = module("sentence_transformers.sentence_transformer.losses")
    # Of embeddings: the model before them is not called.
    loss = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / shape.temperature)
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def _gpu_only(name: str, make: Callable[..., Loss | None]) -> Callable[..., Any]:
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
    return _by_linear(shape, module.linear_cross_entropy)


def _liger(module: Any, shape: Shape) -> Loss | None:
    fused = module.LigerFusedLinearCrossEntropyLoss()
    return _by_linear(shape, lambda q, k, target: fused(k, q, target))


def _siglip_kernel(module: Any, shape: Shape, device: str = "cuda") -> Loss | None:
    if shape.kind != "siglip":
        return None
    # It asks for tensors, and finds their gradients whether or not they are wanted.
    scale, bias = (torch.tensor(x, device=device) for x in (-math.log(shape.temperature), BIAS))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        out: Tensor = module.fused_siglip_loss(x, y, scale, bias)
        return out

    return loss


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
    Provider("sentence-transformers", _sentence_transformers, "sentence-transformers"),
    Provider("memeff", _gpu_only("memeff", _memeff), "memeff"),
    Provider("inf-cl", _gpu_only("inf_cl", _inf_cl), "inf-cl"),
    Provider("siglip-kernel", _gpu_only("siglip_kernel", _siglip_kernel), "siglip-kernel"),
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
    Shape("probe-siglip", "siglip", 4, 128),
    Shape("probe-sup_con", "sup_con", 4, 128, classes=2),
    Shape("probe-dcl", "dcl", 4, 128),
    Shape("probe-hard_negative", "hard_negative", 4, 128),
)


def missing(device: str) -> dict[str, str]:
    """{name: why} of those that drop out here."""
    reasons = {}
    for provider in PROVIDERS:
        try:
            for probe in PROBES:
                provider.loss(probe, device)
        except NotHere as reason:
            how = f" (pip install {provider.package})" if "No module" in str(reason) else ""
            reasons[provider.name] = f"{reason}{how}"
    return reasons


def available(shape: Shape, device: str) -> dict[str, Loss]:
    """{name: loss} of those that have this loss and can run here."""
    found: dict[str, Loss] = {}
    for provider in PROVIDERS:
        try:
            loss = provider.loss(shape, device)
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
