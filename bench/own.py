"""Our loss of a shape: what `providers` measures, and, in float64, the truth of some."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from shapes import BETA, BIAS, FUSED_KINDS, SIGMA, TAU_PLUS, Shape
from torch import Tensor

import clae_fast

Loss = Callable[..., Tensor]


def operator(shape: Shape) -> str:
    """The one that sweeps the pairs forward; whoever has it has the loss."""
    others = {"uel": "pair_uel", "siglip": "pair_sigmoid"}
    return others.get(shape.kind, "contrast" if shape.kind in FUSED_KINDS else "pair_lse")


def own(shape: Shape, backend: str, device: str = "cpu") -> Loss:
    """A `functools.partial` where it can be: `value_and_grad` then makes the fused call."""
    options: dict[str, Any] = {"backend": backend}
    if shape.loss in ("clip", "siglip"):
        options |= {"logit_scale": 1 / shape.temperature, "normalize": True}
        if shape.loss == "clip":
            return functools.partial(clae_fast.clip_loss, **options)
        return functools.partial(clae_fast.siglip_loss, logit_bias=BIAS, **options)
    options["temperature"] = shape.temperature
    ids = shape.ids(device) if shape.classes else None
    if shape.loss == "sup_con":
        assert ids is not None
        labels = ids.repeat(2)
        sup_con = functools.partial(clae_fast.sup_con_loss, labels=labels, **options)
        return lambda z_i, z_j: sup_con(torch.cat((z_i, z_j)))
    if shape.loss == "dcl":
        weights = clae_fast.negative_mises_fisher_weights(SIGMA) if shape.weighted else None
        return functools.partial(clae_fast.dcl_loss, weight_fn=weights, **options)
    if shape.loss == "hard_negative":
        options |= {"beta": BETA, "tau_plus": TAU_PLUS}
        return functools.partial(clae_fast.hard_negative_loss, **options)
    if shape.loss == "nt_xent" and ids is not None:
        options["ids"] = ids
    functions: dict[str, Loss] = {
        "nt_xent": clae_fast.nt_xent_loss,
        "info_nce": clae_fast.info_nce_loss,
        "uel": clae_fast.uel_loss,
    }
    loss = functools.partial(functions[shape.loss], **options)
    return (lambda q, k, extra: loss(q, k, extra_negatives=extra)) if shape.extra else loss
