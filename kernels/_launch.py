"""From tensors to a launch: tile sizes, the split of the columns, fake tensors."""

import inspect
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor

from ..triton_backend import MAX_WIDTH
from ._tile import INTERPRETED, SKIPS


class Config(NamedTuple):
    """BM rows, BN columns and BD of the width in one tile, and how a GPU runs it."""

    BM: int
    BN: int
    BD: int
    num_warps: int
    num_stages: int

    def run(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# "sums" keep nothing D wide and take the width in chunks; "gradient" keeps BM x BD of the result,
# and wider rows are written in several passes. By bytes of an element, then width.
CONFIGS = {
    "sums": {
        2: {64: Config(128, 128, 64, 8, 3), MAX_WIDTH: Config(128, 128, 128, 8, 3)},
        4: {MAX_WIDTH: Config(64, 64, 32, 4, 3)},
    },
    "gradient": {
        2: {
            64: Config(128, 128, 64, 8, 3),
            128: Config(128, 64, 128, 8, 3),
            MAX_WIDTH: Config(64, 64, 256, 8, 2),
        },
        4: {64: Config(64, 64, 64, 4, 2), MAX_WIDTH: Config(64, 32, 128, 8, 2)},
    },
}
_INTERPRETED = Config(32, 32, 32, 4, 1)  # small sizes still meet several tiles


def config(kind: str, width: int, itemsize: int) -> Config:
    """The tile for one kind of sweep, no wider than it must be."""
    table = CONFIGS[kind][itemsize]
    chosen = _INTERPRETED if INTERPRETED else table[min(w for w in table if w >= width)]
    return chosen._replace(BD=min(chosen.BD, max(16, triton.next_power_of_2(width))))


def precision(dtype: torch.dtype) -> str:
    """Of a product: float32 means float32, unless PyTorch's own switch allows tf32."""
    if dtype != torch.float32 or INTERPRETED or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


class Pairs:
    """The arguments that the sweeps share, as their kernels take them."""

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
    ) -> None:
        if skip not in SKIPS:
            raise ValueError(f"skip must be 'none', 'diagonal' or 'twins', got {skip!r}")
        self.q, self.k = (x if x.stride(1) == 1 else x.contiguous() for x in (q, k))
        self.N, self.D = q.shape
        self.M = len(k)
        self.scale = (float(scale), scale_tensor)
        both = row_ids is not None and col_ids is not None
        self.ids = (row_ids, col_ids) if both else (None, None)
        self.extents = (self.N, self.M, offset, self.q.stride(0), self.k.stride(0))
        self.flags = {
            "PRECISION": precision(q.dtype),
            "SKIP": SKIPS[skip],
            "RECIPROCAL": reciprocal,
        }

    def new(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def config(self, kind: str) -> Config:
        return config(kind, self.D, self.q.element_size())

    def split(self, config: Config, passes: int = 1) -> tuple[int, int]:
        """Parts of the columns, so that few rows fill the card too, and the columns of one."""
        tiles, wanted = triton.cdiv(self.M, config.BN), 2 * multiprocessors(self.q.device)
        parts = wanted // (triton.cdiv(self.N, config.BM) * passes)
        parts = max(1, min(parts, tiles // 2, 64))
        columns = triton.cdiv(tiles, parts) * config.BN
        return triton.cdiv(self.M, columns) if columns else 1, columns


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](...)`, on the tensors' device; of fake tensors the arguments are checked."""
    first = next(x for x in args if isinstance(x, Tensor))
    if isinstance(first, FakeTensor) or first.is_meta:
        named = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
        inspect.signature(kernel.fn).bind(*args, **named)
        return
    if 0 in grid:
        return
    if first.device.type == "cuda":
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
