"""Where a measurement was made: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import clae_fast


def provenance(device: torch.device | str = "cpu") -> dict[str, str]:
    """Facts that make a figure readable later; every value is a short text."""
    return {
        "machine": _gpu(torch.device(device)) or f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "clae_fast": clae_fast.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _cpu() -> str:
    """The model's name and the widest vectors that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str:
    """Short hash of the checkout that this package lies in, with + where files were changed; of a
    copy without its history what CLAE_FAST_COMMIT says."""
    root = Path(clae_fast.__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CLAE_FAST_COMMIT", "unknown")
    return found.stdout.strip()
