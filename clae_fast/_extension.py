"""The compiled extension: loads it once, and knows why where there is none."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
_HOW = "install with `pip install -e .`"


@functools.cache
def build_facts() -> dict[str, Any]:
    """What the installation built (`requested`, `parts`, `compiler`, `torch`, `version`), or {}."""
    try:
        facts = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@functools.cache
def load() -> str | None:
    """Register the operators of `torch.ops.clae_fast_C`.

    Returns:
        None when they are there, else the reason why not.
    """
    if not build_facts():
        return f"not built: {_HOW}"
    # An extension of an earlier build may still lie here: the facts decide, not the file.
    built = build_facts().get("parts", {}).get("cpp", "no reason recorded")
    if built != "ok":
        return f"not built: {built}"
    library = next(_PACKAGE.glob("_C.*so"), None)
    if library is None:
        return f"built, but {_PACKAGE.name}/_C.abi3.so is missing: {_HOW}"
    import torch

    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"cannot be loaded: {error.__cause__ or error}"
    return None
