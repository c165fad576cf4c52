"""`clae-fast info`: what this installation can run, and why not the rest."""

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from . import _extension
from ._version import __version__
from .backends import BACKENDS, available_backends, requested


def add_parser(commands: Any) -> None:
    """Register `info`."""
    parser = commands.add_parser(
        "info",
        help="versions, devices, build facts, and every operator on every backend",
        description="Print versions, devices, build facts, and for every operator and backend "
        '"ok" or the reason why it cannot run here.',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(report())
    return 0


def report() -> str:
    """The text of `clae-fast info`."""
    facts = {**_versions(), **_devices(), **_build()}
    width = max(len(name) for name in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", *_operators()])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)  # imports nothing
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    return {
        "clae_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
    }


def _devices() -> dict[str, str]:
    if torch.cuda.is_available():
        cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    elif torch.version.cuda is None:
        cuda = "none (this torch is built without CUDA)"
    else:
        cuda = f"none visible (torch is built for CUDA {torch.version.cuda})"
    isa = "" if _extension.load() else f"; clae_fast uses {torch.ops.clae_fast_C.isa()}"
    return {
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}{isa}",
        "cuda devices": cuda,
        "backend": _backend(),
    }


def _backend() -> str:
    try:
        return requested(None)
    except ValueError as error:
        return f"wrong: {error}"


def _build() -> dict[str, str]:
    facts = _extension.build_facts()
    if not facts:
        return {"build": "none: install with `pip install -e .`"}
    parts = {f"build: {part}": str(state) for part, state in facts["parts"].items()}
    rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "parts")
    return {**parts, "build facts": rest}


def _operators() -> list[str]:
    """A table of "ok" and "-", then each reason once."""
    table = available_backends()
    width = max(len(op) for op in table)
    lines = [f"{'operator':<{width}}  " + "  ".join(f"{b:<9}" for b in BACKENDS)]
    reasons: dict[str, list[str]] = {}
    for op, row in table.items():
        cells = []
        for backend, state in row.items():
            if state != "ok":
                reasons.setdefault(f"{backend}: {state}", []).append(op)
            cells.append(f"{'ok' if state == 'ok' else '-':<9}")
        lines.append(f"{op:<{width}}  " + "  ".join(cells))
    lines.append("")
    lines += [f"- {reason} ({', '.join(ops)})" for reason, ops in reasons.items()]
    return [line.rstrip() for line in lines]
