"""The Triton kernels compiled for GPUs that are not here, and what the machine code says of them.

    python bench/aot.py --quick                     one configuration of each kernel
    python bench/aot.py --results bench/results/triton-compiled.json

The launches are the operators' own: they run on fake CUDA tensors, and each launch is compiled as
the just-in-time compiler would, for each target. A spill, too much shared memory or a missing
matrix instruction is an error. Needs TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import peer_kernels
import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from clae_fast.kernels import _launch, _tile
from clae_fast.kernels.contrast import contrast
from clae_fast.kernels.pair_grad import pair_grad
from clae_fast.kernels.pair_lse import pair_lse
from clae_fast.kernels.pair_mean import pair_mean
from clae_fast.kernels.pair_sigmoid import pair_sigmoid
from clae_fast.kernels.pair_uel import pair_uel
from clae_fast.pretraining.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "clae_fast" / "kernels"


class Target(NamedTuple):
    """A GPU: what a block may have, and what a multiprocessor has and does in a clock."""

    capability: int
    shared: int  # bytes that a block may have
    matrix: str  # of its instructions for 16-bit products
    multiprocessors: int
    clock: float  # GHz
    flops: int  # of dense 16-bit products, a multiprocessor and clock


# A100 SXM, H100 SXM, B200: vendor's data sheets and programming guide (compute capabilities).
TARGETS = {
    "sm_80": Target(80, 163 << 10, "HMMA", 108, 1.41, 2048),
    "sm_90": Target(90, 227 << 10, "HGMMA", 132, 1.83, 4096),
    "sm_100": Target(100, 227 << 10, "UTC.*MMA", 148, 1.85, 8192),
}
REGISTERS, THREADS, EXPONENTIALS = 65536, 2048, 16  # of a multiprocessor; the last a clock


class Launch(NamedTuple):
    """One launch of a kernel, tensors by their dtype."""

    kernel: Any
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    def named(self) -> dict[str, Any]:
        """The compile-time arguments by name."""
        names = [p.name for p in self.kernel.params]
        found = dict(zip(names, self.args, strict=False)) | dict(self.options)
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        return {k: v for k, v in found.items() if k in constants or k.startswith("num_")}


# --------------------------------------------------------------------------- which launches


def _calls(width: int, dtype: torch.dtype, rows: int) -> Iterator[Callable[[], Any]]:
    def new(n: int, *more: int) -> torch.Tensor:
        return torch.empty(n, *more, dtype=dtype, device="cuda")

    B = rows // 2
    q, k, negatives = new(B, width), new(B, width), new(65536, width)
    t = torch.empty((), device="cuda")
    number = torch.empty(rows, device="cuda")
    needs = (True, True, False, True)
    for scale in ((10.0,), (1.0, t, True), (100.0,)):
        for form in ("nt_xent", "two_way"):
            yield functools.partial(contrast, q, k, None, *scale, form=form, need_dq=True,
                                    need_dk=True, need_dscale=True)  # fmt: skip
        yield functools.partial(contrast, q, k, negatives, *scale, form="one_way", need_dq=True,
                                need_dnegatives=True)  # fmt: skip
    yield functools.partial(contrast, q, k, None, 10.0, None, False, "one_way", True, *needs)
    yield functools.partial(contrast, q, k, None, 10.0, form="two_way", normalize=False)
    z = new(rows, width)
    yield functools.partial(pair_lse, z, z, 10.0, skip="twins")
    yield functools.partial(pair_mean, q, z, 10.0)
    yield functools.partial(pair_grad, z, z, 10.0, row_lse=number, row_weight=number,
                            col_lse=number, col_weight=number)  # fmt: skip
    both = {"need_dq": True, "need_dk": True}
    yield functools.partial(pair_sigmoid, q, k, 10.0, -10.0, **both)
    yield functools.partial(pair_uel, z, z, 10.0, 1.0, need_dq=True)
    some = torch.empty(rows, device="cuda", dtype=torch.int32)
    ids = {"row_ids": some, "col_ids": some}
    yield functools.partial(pair_lse, z, z, 10.0, **ids)
    yield functools.partial(pair_mean, z, z, 10.0, **ids)
    yield functools.partial(pair_grad, z, z, 10.0, row_lse=number, row_weight=number,
                            col_lse=number, col_weight=number, **ids)  # fmt: skip
    yield functools.partial(pair_sigmoid, z, z, 10.0, -10.0, row_weight=number, **both, **ids)
    yield functools.partial(pair_uel, z, z, 10.0, 2.0, row_weight=number, need_dq=True, **ids)


def launches(width: int, dtype: torch.dtype, rows: int = 8192) -> list[Launch]:
    """Every different launch that the operators make at that width, in the order they come."""
    found: dict[tuple[Any, ...], Launch] = {}

    def observe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        plain = tuple(x.dtype if isinstance(x, torch.Tensor) else x for x in args)
        launch = Launch(kernel, plain, tuple(sorted(options.items())))
        # Numbers that the compiler does not see do not make another kernel.
        types = tuple(x if isinstance(x, torch.dtype) or x is None else type(x) for x in plain)
        key = (launch.name, tuple(launch.named().items()), types)
        found.setdefault(key, launch)

    _launch.observers.append(observe)
    try:
        with FakeTensorMode():
            for call in _calls(width, dtype, rows):
                call()
    finally:
        _launch.observers.remove(observe)
    return list(found.values())


# ----------------------------------------------------------------------------------- compiling


class _Absent:
    """Stands for the driver of a GPU that is not here: the compiler asks only for its target."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget("cuda", target.capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # each target has its own cache of kernels

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch, target: Target) -> Any:
    """The kernel as the just-in-time compiler makes it for these arguments; not loaded."""
    driver.set_active(_Absent(target))
    return launch.kernel.warmup(*launch.args, grid=(1,), **dict(launch.options))


class Machine(NamedTuple):
    """What the machine code of a kernel takes and holds."""

    registers: int
    spills: int  # instructions that read or write local memory
    shared: int
    warps: int
    matrix: dict[str, int]  # matrix instructions by shape
    exponentials: int  # instructions

    def blocks(self) -> int:
        """How many blocks fit on a multiprocessor at once."""
        threads = 32 * self.warps
        granules = -(-self.registers // 8) * 8 * threads
        return min(REGISTERS // granules, THREADS // threads, (228 << 10) // (self.shared + 1024))


def machine_code(kernel: Any) -> Machine:
    """Of a compiled kernel, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix: dict[str, int] = {}
    for word in re.findall(r"\b((?:HMMA|HGMMA|UTC\w*MMA)\S*)", code):
        matrix[word] = matrix.get(word, 0) + 1
    return Machine(
        numbers["REG"],
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        matrix,
        len(re.findall(r"\bMUFU\.EX2\b", code)),
    )


def _cuobjdump(*args: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


# -------------------------------------------------------------------------------------- the table


def row(launch: Launch, name: str, who: str = "clae_fast") -> dict[str, Any]:
    """A kernel on a target: what it takes, and what is wrong with that."""
    target, named = TARGETS[name], launch.named()
    code = machine_code(compiled(launch, target))
    wrong = []
    if code.spills:
        wrong.append(f"{code.spills} spills")
    if code.shared > target.shared:
        wrong.append(f"{code.shared} bytes of shared memory, there are {target.shared}")
    half = any(x in (torch.float16, torch.bfloat16) for x in launch.args[:2])
    multiplies = any("PRECISION" in key for key in named)
    if multiplies and half and not any(re.match(target.matrix, word) for word in code.matrix):
        wrong.append(f"no {target.matrix} instruction, but {code.matrix or 'none'}")
    found = {
        "who": who,
        "kernel": launch.name,
        "target": name,
        "dtype": str(launch.args[0]).removeprefix("torch."),
        "constants": {k: v for k, v in named.items() if not isinstance(v, float)},
        **code._asdict(),
        "blocks": code.blocks(),
        "wrong": wrong,
    }
    if multiplies:
        found |= predicted(found, target)
    return found


def predicted(found: dict[str, Any], target: Target) -> dict[str, float]:
    """Microseconds at 8,192 x 8,192 by the roofline: of the products, and of the exponentials.

    Products count what the plan needs (chunks of the result that make S again included), at the
    rate of 16-bit ones: tf32 takes twice, in three products six times as long. Exponentials are
    those of the machine code, spread over the pairs of a tile.
    """
    c, n = found["constants"], 8192
    D = c.get("D", c.get("D_MODEL"))
    BM, BN = (c.get(a, c.get(b)) for a, b in (("BM", "BLOCK_SIZE_I"), ("BN", "BLOCK_SIZE_J")))
    if BM is None:
        BM = BN = c["B"]
    width = c.get("BD", c.get("D_POW2", D))
    result = any(word in found["kernel"] for word in ("grad", "mean", "sigmoid"))
    passes = -(-D // width) if result else 1
    products = passes * (D + min(width, D)) if result else D
    slow = {"float32": 6.0, "float16": 1.0, "bfloat16": 1.0}[found["dtype"]]
    rate = target.multiprocessors * target.clock * 1e3  # of clocks a microsecond
    pairs = n * n * (0.5 if c.get("SYMMETRIC") else 1.0)
    a_pair = found["exponentials"] * 32 * found["warps"] / (BM * BN)
    return {
        "products_us": round(pairs * 2 * products * slow / (rate * target.flops), 1),
        "exponentials_us": round(pairs * passes * a_pair / (rate * EXPONENTIALS), 1),
    }


def sources() -> dict[str, str]:
    """Of every file that the table depends on, what its text hashes to."""
    files = sorted(KERNELS.glob("*.py"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


WIDTHS = {
    torch.bfloat16: (64, 128, 256, 768),
    torch.float16: (64, 128, 768),
    torch.float32: (64, 768),
}


def rows(target: str, quick: bool) -> Iterator[dict[str, Any]]:
    """All kinds of width and dtype, memeff's kernels beside them; or each kernel once."""
    _launch.absent_capability = TARGETS[target].capability
    seen = set()
    for dtype, widths in {torch.bfloat16: (128, 512)}.items() if quick else WIDTHS.items():
        for width in widths:
            found = launches(width, dtype)
            if not quick and width == 128:  # numbers that 16 does not divide are other kernels
                found += launches(width - 5, dtype, 8190)
            for launch in found:
                kind = (launch.name, launch.named().get("MAXIMUM"))
                if not quick or kind not in seen:
                    seen.add(kind)
                    yield row(launch, target)
    for width in () if quick else (128, 768):
        for kernel, args, options in peer_kernels.launches(width, TARGETS[target].capability):
            yield row(Launch(kernel, args, options), target, "memeff")


def worst(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in flags alone, the one that takes the most."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in table:
        c = r["constants"]
        size = [c.get(k) for k in ("D", "D_MODEL", "BM", "B", "BN", "BD", "MAXIMUM", "SYMMETRIC")]
        what = (r["who"], r["kernel"], r["target"], r["dtype"], *size)
        rank = (len(r["wrong"]), r["spills"], r["registers"])
        known = found.get(what)
        if known is None or rank > (len(known["wrong"]), known["spills"], known["registers"]):
            found[what] = r
    return list(found.values())


def table_of(target: str, quick: bool) -> list[dict[str, Any]]:
    """The rows of a target, each printed when it is known."""
    table = []
    for found in rows(target, quick):
        table.append(found)
        print(line(found), flush=True)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each kernel once, in bfloat16")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--results", type=Path, help="write the table as JSON")
    parser.add_argument("--sources", action="store_true", help="print what the sources hash to")
    args = parser.parse_args(argv)
    if args.sources:
        print(json.dumps(sources()))
        return 0
    if _tile.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: expected a Triton that compiles")
    if args.results is not None and (
        args.results.is_dir() or not args.results.absolute().parent.is_dir()
    ):
        parser.error(f"--results {args.results}: expected a file in a folder that exists")
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        tables = list(pool.map(table_of, args.targets, itertools.repeat(args.quick)))
    table = list(itertools.chain.from_iterable(tables))
    if args.results is not None:
        head = {"triton": triton.__version__, "sources": sources()}
        lines = ",\n".join(json.dumps(r) for r in worst(table))
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n'
        write_whole(args.results, text.encode())
    return 1 if any(r["wrong"] for r in table if r["who"] == "clae_fast") else 0


def line(r: dict[str, Any]) -> str:
    c = r["constants"]
    names = ("BM", "B", "BN", "BD", "BLOCK_SIZE_I", "BLOCK_SIZE_J", "BLOCK_SIZE_D", "D_POW2")
    tile = " x ".join(str(c[k]) for k in names if k in c)
    flags = "".join(f", {k} {c[k]}" for k in ("MAXIMUM", "SYMMETRIC", "SKIP") if k in c)
    matrix = ", ".join(f"{n} {word}" for word, n in r["matrix"].items())
    roof = ""
    if "products_us" in r:
        roof = f"; at 8,192 rows {r['products_us']} us of products, {r['exponentials_us']} of EX2"
    wrong = "".join(f"; WRONG: {reason}" for reason in r["wrong"])
    return (
        f"{r['target']} {r['who']} {r['kernel']} {r['dtype']} D {c.get('D', c.get('D_MODEL'))}, "
        f"{tile}{flags}: {r['registers']} registers, {r['shared'] >> 10} KiB, {r['blocks']} "
        f"blocks; {r['exponentials']} EX2; {matrix}{roof}{wrong}"
    )


if __name__ == "__main__":
    sys.exit(main())
