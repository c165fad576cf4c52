"""From tensors to a launch: tile sizes, the split of the columns, fake tensors."""

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor

from ..triton_backend import MAX_WIDTH
from ._tile import INTERPRETED, KNOWN, ONLINE, SKIPS

MANY = (
    4096  # rows: below, a launch more costs more than what it saves, and tiles do not fill a card
)


MOST = 1 << 18  # rows: beyond, roots of float32 miss by more than a step
PASS = 256  # elements of the width that the widest pass over it takes


class Config(NamedTuple):
    """BM rows, BN columns and BD of the width in one tile, and how a GPU runs it."""

    BM: int
    BN: int
    BD: int
    num_warps: int
    num_stages: int

    def run(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Wider rows leave the sums and gradients to wide.py: BM x BD of the result no longer fit in
# registers beside whole tiles. Weights of float16 rows are multiplied as tf32, as float16 has no
# range for them: twice the registers. Three tf32 products for a float32 one take three times.
FUSED_WIDTH = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 64}
# "sums" keep nothing D wide and take the width in chunks, "two-sided" in square tiles, "uel" with
# more numbers a row; "gradient" keeps BM x BD of the result, and wider rows (of operators that
# have no other way) are written in several passes. By kind and dtype, then width: the largest tiles
# that compile without a spill (bench/aot.py), where it can be with two blocks on a multiprocessor,
# so that one exponentiates while the other multiplies. GENERATIONS: where a GPU needs others; those
# of generation 9 at a width of 128 are the fastest of bench/tune.py on an H200.
Table = dict[int, Config]
HALF = (torch.bfloat16, torch.float16)
_SUMS: Table = {
    64: Config(128, 128, 64, 8, 2),
    128: Config(128, 128, 128, 8, 2),
    MAX_WIDTH: Config(128, 128, 64, 8, 3),
}
_GRADIENT: Table = {
    64: Config(128, 128, 64, 8, 2),
    128: Config(128, 64, 128, 8, 2),
    MAX_WIDTH: Config(64, 64, 256, 8, 2),
}
_FLOAT_SUMS: Table = {MAX_WIDTH: Config(64, 64, 32, 4, 3)}
CONFIGS: dict[tuple[str, torch.dtype], Table] = {
    **{("sums", dtype): _SUMS for dtype in HALF},
    **{("two-sided", dtype): _SUMS for dtype in HALF},
    **{
        ("uel", dtype): {128: Config(64, 128, 128, 8, 2), MAX_WIDTH: Config(64, 64, 128, 8, 2)}
        for dtype in HALF
    },
    ("sums", torch.float32): _FLOAT_SUMS,
    ("two-sided", torch.float32): _FLOAT_SUMS,
    ("uel", torch.float32): {MAX_WIDTH: Config(64, 64, 32, 8, 3)},
    ("gradient", torch.bfloat16): _GRADIENT,
    ("elementwise", torch.bfloat16): _GRADIENT | {64: Config(128, 64, 64, 8, 2)},
    ("gradient", torch.float16): {MAX_WIDTH: Config(64, 64, 128, 8, 2)},
    ("gradient", torch.float32): {
        64: Config(64, 32, 64, 8, 2),
        MAX_WIDTH: Config(32, 16, 64, 4, 2),
    },
}
GENERATIONS: dict[tuple[int, str, torch.dtype], Table] = {
    **{
        (9, kind, dtype): _SUMS | {128: Config(128, 128, 128, 4, 2)}
        for kind in ("sums", "two-sided")
        for dtype in HALF
    },
    **{
        (9, kind, torch.bfloat16): _GRADIENT | {128: Config(64, 128, 128, 4, 2)}
        for kind in ("gradient", "mean")
    },
    **{(8, "two-sided", dtype): _SUMS | {MAX_WIDTH: Config(128, 128, 64, 16, 2)} for dtype in HALF},
    **{(8, "sums", dtype): _SUMS | {MAX_WIDTH: Config(128, 128, 64, 16, 2)} for dtype in HALF},
    **{(8, "uel", dtype): {MAX_WIDTH: Config(64, 64, 128, 8, 2)} for dtype in HALF},
    (8, "gradient", torch.bfloat16): {
        64: Config(128, 128, 64, 8, 2),
        MAX_WIDTH: Config(64, 64, 256, 8, 2),
    },
    (8, "elementwise", torch.bfloat16): {
        64: Config(128, 64, 64, 8, 2),
        MAX_WIDTH: Config(64, 64, 128, 8, 2),
    },
    (8, "gradient", torch.float16): {MAX_WIDTH: Config(64, 32, 128, 8, 2)},
    **{
        (8, kind, torch.float32): {MAX_WIDTH: Config(64, 64, 32, 8, 3)}
        for kind in ("sums", "two-sided")
    },
    (8, "gradient", torch.float32): {MAX_WIDTH: Config(32, 32, 64, 8, 2)},
    **{
        (10, "two-sided", dtype): {128: Config(64, 64, 128, 8, 2)}  # wider rows: a sweep for each
        for dtype in HALF
    },
    **{(10, "sums", dtype): _SUMS | {MAX_WIDTH: Config(128, 64, 64, 8, 3)} for dtype in HALF},
    **{
        (10, kind, torch.float32): {MAX_WIDTH: Config(64, 64, 32, 8, 3)}
        for kind in ("sums", "two-sided")
    },
    **{(10, "uel", dtype): {MAX_WIDTH: Config(64, 64, 128, 8, 2)} for dtype in HALF},
    **{
        (10, kind, torch.bfloat16): {
            128: Config(64, 64, 128, 8, 2),
            MAX_WIDTH: Config(64, 32, 256, 8, 2),
        }
        for kind in ("gradient", "elementwise")
    },
    (10, "gradient", torch.float16): {MAX_WIDTH: Config(64, 32, 128, 8, 2)},
    (10, "mean", torch.float16): {
        64: Config(64, 32, 64, 8, 2),
        128: Config(64, 64, 128, 8, 2),
        MAX_WIDTH: Config(64, 32, 128, 8, 2),
    },
}
_INTERPRETED = Config(32, 32, 32, 4, 1)  # small sizes still meet several tiles


absent_capability = 90
"""Of the GPU that fake CUDA tensors stand for where there is none."""


def capability(device: torch.device) -> int:
    """10 x major + minor; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    if not torch.cuda.is_available():
        return absent_capability
    return _facts(device)[0]


@functools.cache
def _facts(device: torch.device) -> tuple[int, int]:
    """Capability and multiprocessors: to ask takes as long as a launch."""
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def tiles(kind: str, dtype: torch.dtype, capability: int) -> Table:
    """The tiles for one kind of sweep on a generation of GPUs, by width."""
    generation = capability // 10
    for known in (kind, "gradient"):  # others that make a gradient have their own where they must
        table = GENERATIONS.get((generation, known, dtype)) or CONFIGS.get((known, dtype))
        if table is not None:
            return table
    raise KeyError(kind)


def config(kind: str, width: int, dtype: torch.dtype, capability: int) -> Config:
    """The tile for one kind of sweep, no wider than it must be."""
    table = tiles(kind, dtype, capability)
    chosen = _INTERPRETED if INTERPRETED else table[min(w for w in table if w >= width)]
    return chosen._replace(BD=min(chosen.BD, max(16, triton.next_power_of_2(width))))


def precision(dtype: torch.dtype) -> str:
    """Of a product: float32 means float32, unless PyTorch's own switch allows tf32."""
    if dtype != torch.float32 or INTERPRETED or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def ways(
    scale: float, scale_tensor: Tensor | None, rows: int, n: int, unit: bool
) -> tuple[tuple[int, bool], ...]:
    """(MAXIMUM, ASKED) of each launch of a sweep whose rows have sums of n exponentials."""
    online, known = int(ONLINE.value), int(KNOWN.value)
    if not unit:
        return ((online, False),)
    if scale_tensor is not None:
        # With few rows a launch costs more than an exponential a pair.
        return ((known, True), (online, True)) if rows >= MANY else ((online, False),)
    # Well inside what the device allows: both must agree.
    serves = scale > 0 and 2 * 1.008 * scale + math.log(max(n, 1)) <= 139
    return ((known if serves else online, False),)


def padded(width: int) -> int:
    """The width that rows of `width` are given zeros up to: a multiple of every tile's BD, so that
    no kernel masks along it (registers for masks are what makes a sweep spill)."""
    if width <= PASS:
        return max(16, triton.next_power_of_2(width))
    return triton.cdiv(width, PASS) * PASS


def dense(x: Tensor, width: int) -> Tensor:
    """Rows whose elements lie side by side, with zeros up to that width."""
    if x.shape[1] == width:
        return x if x.stride(1) == 1 else x.contiguous()
    out = x.new_zeros((len(x), width))
    out[:, : x.shape[1]] = x
    return out


def vector(x: Tensor | None) -> Tensor | None:
    """One number a row or column, as the kernels read them: side by side."""
    return None if x is None else x.contiguous()


class Pairs:
    """The arguments that the sweeps share, as their kernels take them.

    `unit`: what the kernels make of q and k are rows of length 1, or 0, and no others. `inverse`:
    by how much they multiply the rows of q and of k for that; None: they are so already. `among`:
    of how many rows those of q are a part; the columns are split as for all.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        scale_tensor: Tensor | None,
        reciprocal: bool,
        skip: str = "none",
        offset: int = 0,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        *,
        unit: bool = False,
        inverse: tuple[Tensor | None, Tensor | None] = (None, None),
        among: int | None = None,
    ) -> None:
        if skip not in SKIPS:
            raise ValueError(f"skip must be 'none', 'diagonal' or 'twins', got {skip!r}")
        self.N, self.width = q.shape
        self.M, self.D = len(k), padded(self.width)
        self.among = among or self.N
        self.q, self.k = (dense(x, self.D) for x in (q, k))
        self.scale = (float(scale), scale_tensor)
        self.ways = ways(*self.scale, self.N, max(self.N, self.M), unit)
        self.wide = FUSED_WIDTH[q.dtype] < self.D
        # Whether rows and columns may share a sweep of the sums (two_sided.py), which counts strips
        # of rows by a root in float32.
        shared = max(tiles("two-sided", q.dtype, capability(q.device))) >= self.D
        known = self.ways[0][0] == KNOWN.value
        self.large = MANY <= self.N <= MOST and self.M <= MOST and known and shared
        both = row_ids is not None and col_ids is not None
        self.ids = (vector(row_ids), vector(col_ids)) if both else (None, None)
        self.inverse = inverse
        self.offset = offset
        self.extents = (self.N, self.M, offset, self.q.stride(0), self.k.stride(0))
        self.rules = {"SKIP": SKIPS[skip], "RECIPROCAL": reciprocal}
        self.flags = {"PRECISION": precision(q.dtype), **self.rules}

    def turned(self) -> "Pairs":
        """The same with rows and columns exchanged."""
        other = copy.copy(self)
        other.q, other.k, other.N, other.M = self.k, self.q, self.M, self.N
        other.ids, other.inverse = self.ids[::-1], self.inverse[::-1]
        other.offset, other.among = 0, self.M
        other.extents = (self.M, self.N, 0, self.k.stride(0), self.q.stride(0))
        return other

    def new(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def config(self, kind: str) -> Config:
        return config(kind, self.D, self.q.dtype, capability(self.q.device))

    def split(self, config: Config, passes: int = 1) -> tuple[int, int]:
        """Parts of the columns, so that few rows fill the card too, and the columns of one."""
        tiles, wanted = triton.cdiv(self.M, config.BN), 2 * multiprocessors(self.q.device)
        parts = wanted // max(1, triton.cdiv(self.among, config.BM) * passes)
        parts = max(1, min(parts, tiles // 2, 64))
        columns = triton.cdiv(tiles, parts) * config.BN
        return triton.cdiv(self.M, columns) if columns else 1, columns


def add_parts(x: Tensor, width: int | None = None) -> Tensor:
    """The sum of (parts, ...), in their order; of padded rows the first `width` elements."""
    total = x[0] if len(x) == 1 else x.sum(0)
    return total if width is None else total[:, :width].contiguous()


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    if not torch.cuda.is_available():  # a fake tensor's
        return 132
    return _facts(device)[1]


observers: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], object]] = []
"""Told of each launch with fake tensors: kernel, arguments, options (see bench/aot.py)."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](...)`, on the tensors' device; of fake tensors the arguments are checked."""
    first = next(x for x in args if isinstance(x, Tensor))
    if isinstance(first, FakeTensor) or first.is_meta:
        named = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
        inspect.signature(kernel.fn).bind(*args, **named)
        for observer in observers:
            observer(kernel, args, options)
        return
    if 0 in grid:
        return
    if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
