"""The CUDA kernels compiled for GPUs that are not here, and what the machine code says of them.

    python bench/cuda_table.py --results bench/results/cuda-compiled.json
    python bench/cuda_table.py --targets sm_90

A spill, local memory, or a missing tensor-core instruction is an error. Needs nvcc; shared memory
and tiles come from the host emulator's build of the same source.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from clae_fast.pretraining.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"


def _toolkit() -> Any:
    """tests/nvcc.py, which finds the toolkit for the tests too."""
    spec = importlib.util.spec_from_file_location("nvcc", ROOT / "tests" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc_tools = _toolkit()
ROWS, THREADS = 64, 256  # of a block


class Target(NamedTuple):
    """A GPU: multiprocessors, and shared memory that a block and a multiprocessor may have."""

    gpu: str
    multiprocessors: int
    block_shared: int
    shared: int


# Vendor's data sheets; programming guide, compute capabilities.
TARGETS = {
    "sm_80": Target("A100", 108, 163 << 10, 164 << 10),
    "sm_90": Target("H100 SXM", 132, 227 << 10, 228 << 10),
    "sm_100": Target("B200", 148, 227 << 10, 228 << 10),
    "sm_120": Target("RTX 5090", 170, 99 << 10, 100 << 10),
}
FORMATS = {"F32": (0, "float32"), "Bf16": (1, "bfloat16"), "F16": (2, "float16")}
# The products of each format: S, then G Y.
MATRIX = {
    "F32": ("HMMA.1688.F32.TF32",),
    "Bf16": ("HMMA.16816.F32.BF16",),
    "F16": ("HMMA.16816.F32", "HMMA.1688.F32.TF32"),
}


def sources() -> dict[str, str]:
    """Of every file that the table depends on, what its text hashes to."""
    files = sorted(f for f in CUDA.iterdir() if f.suffix in (".h", ".cu", ".cuh"))
    files.append(ROOT / "csrc" / "linf_move.h")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def tile_bytes(folder: Path) -> Any:
    """(format, BN) -> shared memory of a block, as the source has it."""
    path = folder / "libtile.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = ROOT / "csrc" / "tests" / "contrast_cuda.cpp"
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, source, "-o", path], check=True)
    return ctypes.CDLL(str(path)).tile_bytes


def most_rows(target: Target, blocks: int, columns: int) -> int:
    """The largest N of nt_xent whose blocks are all resident at once."""
    resident, n = blocks * target.multiprocessors, 0
    while -(-(n + 1) // ROWS) * -(-(n + 1) // columns) <= resident:
        n += 1
    return n


def rows(source: Path, name: str, folder: Path, shared_of: Any) -> list[dict[str, Any]]:
    """The kernels of one file on one target."""
    target, cubin = TARGETS[name], folder / f"{source.stem}-{name}.cubin"
    root = nvcc_tools.cuda_root()
    assert root is not None
    nvcc = [root / "bin" / "nvcc", "-std=c++17", "-O3", f"-arch={name}", "-cubin", "-Xptxas", "-v"]
    said = subprocess.run([*nvcc, source, "-o", cubin], capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"cuda_table.py: error: {said.stderr.strip()}")
    code = subprocess.run(
        [str(nvcc_tools.cuobjdump()), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", code, re.S))
    found = []
    for mangled, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said.stderr, re.S
    ):
        numbers = [int(n) for n in re.findall(r"(\d+) bytes (?:stack|spill)", text)]
        registers = int(re.findall(r"Used (\d+) registers", text)[0])
        sass = functions[mangled]
        matrix: dict[str, int] = {}
        for word in re.findall(r"\bHMMA\.\S+", sass):
            matrix[word] = matrix.get(word, 0) + 1
        row: dict[str, Any] = {
            "kernel": "sign_step" if "sign_step" in mangled else "contrast",
            "target": name,
            "registers": registers,
            "stack": numbers[0],
            "spills": sum(numbers[1:]),
            "matrix": matrix,
            "exponentials": len(re.findall(r"\bMUFU\.EX2\b", sass)),
            "wide_loads": len(re.findall(r"\bLDG\.E\.128", sass)),
        }
        tag = re.findall(r"gpu\d+(F32|Bf16|F16)E|NS0_\d(F32|F16)E|NS0_4(Bf16)E", mangled)[0]
        tag = next(filter(None, tag))
        row["dtype"] = FORMATS[tag][1]
        wrong = [f"{row[what]} bytes of {what}" for what in ("stack", "spills") if row[what]]
        if row["kernel"] == "contrast":
            columns = int(re.findall(r"Li(\d+)E", mangled)[0])
            shared = shared_of(FORMATS[tag][0], columns)
            fits = shared <= target.block_shared
            by_registers = 65536 // (-(-registers // 8) * 8 * THREADS)
            blocks = min(by_registers, target.shared // (shared + 1024)) if fits else 0
            row |= {
                "columns": columns,
                "shared": shared,
                "blocks": blocks,
                "most_rows": most_rows(target, blocks, columns) if blocks else 0,
            }
            for word in MATRIX[tag]:
                if word not in matrix:
                    wrong.append(f"no {word}")
        elif not row["wide_loads"]:
            wrong.append("no loads of 16 bytes")
        row["wrong"] = wrong
        found.append(row)
    return sorted(found, key=lambda r: (r["kernel"], r.get("columns", 0)))


def line(r: dict[str, Any]) -> str:
    words = f"{r['target']} {r['kernel']} {r['dtype']}"
    if r["kernel"] == "contrast":
        words += f", 64 x {r['columns']}"
    words += f": {r['registers']} registers"
    if r["kernel"] == "contrast":
        words += f", {r['shared'] >> 10} KiB, {r['blocks']} blocks, N up to {r['most_rows']:,}"
    words += f"; {r['exponentials']} EX2; " + ", ".join(f"{n} {w}" for w, n in r["matrix"].items())
    return words + "".join(f"; WRONG: {reason}" for reason in r["wrong"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--results", type=Path, help="write the table as JSON")
    args = parser.parse_args(argv)
    if nvcc_tools.cuda_root() is None:
        print("cuda_table.py: error: expected nvcc on PATH or CUDA_HOME", file=sys.stderr)
        return 2
    if args.results is not None and (
        args.results.is_dir() or not args.results.absolute().parent.is_dir()
    ):
        parser.error(f"--results {args.results}: expected a file in a folder that exists")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        shared_of = tile_bytes(folder)
        jobs = [(f, t) for t in args.targets for f in sorted(CUDA.glob("launch_*.cu"))]
        table = []
        for found in pool.map(lambda job: rows(*job, folder, shared_of), jobs):
            table += found
            print(*map(line, found), sep="\n", flush=True)
    if args.results is not None:
        root = nvcc_tools.cuda_root()
        version = subprocess.run(
            [f"{root}/bin/nvcc", "--version"], capture_output=True, text=True
        ).stdout
        release = re.findall(r"release ([\d.]+)", version)[0]
        head = {"nvcc": release, "sources": sources()}
        lines = ",\n".join(json.dumps(r) for r in table)
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n'
        write_whole(args.results, text.encode())
    return 1 if any(r["wrong"] for r in table) else 0


if __name__ == "__main__":
    sys.exit(main())
