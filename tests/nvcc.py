"""Finding a CUDA toolkit and its tools."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def cuda_root():
    """The toolkit's folder, from CUDA_HOME or from the nvcc on PATH, perhaps a wrapper of it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True
    )
    for line in said.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.partition("=")[2]).resolve()
    return None


def cuobjdump():
    """The disassembler: of the toolkit, on PATH, or in Triton's wheel; None without any."""
    root = cuda_root()
    candidates = [root and root / "bin" / "cuobjdump", shutil.which("cuobjdump")]
    try:
        import triton

        candidates.append(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    except ImportError:
        pass
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


def compile_cubin(source, output, arch, *flags):
    """A cubin for one architecture, such as sm_90a; any warning is an error, spills included."""
    root = cuda_root()
    if root is None:
        pytest.skip("there is no nvcc")
    command = [
        root / "bin" / "nvcc", "-std=c++17", f"-arch={arch}", "-cubin", "-Werror", "all-warnings",
        "-Xptxas", "--warn-on-spills", "-Xptxas", "-Werror", *flags, source, "-o", output,
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return built.stdout + built.stderr
