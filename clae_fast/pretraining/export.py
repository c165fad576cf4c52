"""The plain encoder in a file: safetensors, torch.export or ONNX."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clae_fast import strip_dual_batchnorm

from .checkpoint import separate
from .config import ConfigError
from .encoders import ContrastiveModel
from .files import atomic_path

SUFFIXES = (".safetensors", ".pt2", ".onnx")
WHAT = ("h", "z")


class _Features(nn.Module):
    """h or z as the forward, which is what exporters follow."""

    def __init__(self, model: ContrastiveModel, what: str) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.projector = model.projector if what == "z" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.projector(self.backbone(x))
        return z


def check_export(path: str | Path) -> None:
    """Raises ConfigError for a suffix that is not known or whose packages are missing."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError("export", path, "a name that ends in " + ", ".join(SUFFIXES))
    if path.suffix == ".onnx":
        missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
        if missing:
            raise ConfigError(
                "export", path, f"the packages of ONNX (pip install {' '.join(missing)})"
            )


def export_encoder(
    model: ContrastiveModel,
    path: str | Path,
    *,
    in_channels: int,
    image_size: int,
    what: str = "h",
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write the encoder, main BatchNorm, eval mode; the file appears whole or not at all.

    Args:
        model: left as it is; an auxiliary BatchNorm is stripped from a copy.
        path: `.safetensors`: the state_dict of `model.backbone` (with `what="z"` of the whole
            model); `.pt2`: a `torch.export` program; `.onnx`: an ONNX model. The latter two map
            normalised images (B, C, H, W), any B, to features (B, F) and need no clae_fast.
        in_channels, image_size: of the images.
        what: "h", the representation, or "z", the projection.
        metadata: kept in a `.safetensors` file as JSON.

    Raises:
        ConfigError: a suffix that is not known, or packages that it needs.
    """
    path = Path(path)
    check_export(path)
    if what not in WHAT:
        raise ConfigError("export_what", what, "h or z")
    plain = strip_dual_batchnorm(copy.deepcopy(model)).cpu().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two images: with one, exporters take the batch size for a constant.
    x = torch.zeros(2, in_channels, image_size, image_size)
    features = _Features(plain, what).eval()
    with atomic_path(path) as temporary, torch.no_grad():
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            module = plain if what == "z" else plain.backbone
            facts = {"format": "pt", "run": json.dumps(metadata or {})}
            save_file(separate(module.state_dict()), temporary, facts)
        elif path.suffix == ".pt2":
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(features, (x,), dynamic_shapes={"x": {0: batch}})
            torch.export.save(program, temporary)
        else:
            torch.onnx.export(
                features,
                (x,),
                temporary,
                dynamo=True,
                external_data=False,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
