"""memeff's CLIP kernels as it would launch them, to be compiled beside ours by `bench/aot.py`.

Its launch code asks a GPU for its capability. So the tiles of memeff 0.3.1 are written out here
(facts of its `_common.py` and `distributed_clip_loss.py`), for two towers of 8,192 unit rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from providers import NotHere, module

ROWS = 8192
Launch = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]


def launches(width: int, capability: int) -> Iterator[Launch]:
    """(kernel, arguments with tensors by their dtype, options); none if memeff is not there."""
    try:
        clip_fa_grad_kernel = module("memeff.clip_loss").clip_fa_grad_kernel
        clip_denom_kernel = module("memeff.distributed_clip_loss").clip_denom_kernel
    except NotHere as reason:
        print(f"memeff is not compiled beside ours: {reason}")
        return
    half, full = torch.bfloat16, torch.float32
    tiles = {"BLOCK_SIZE_I": 128, "BLOCK_SIZE_J": 128, "BLOCK_SIZE_D": 64}
    yield (
        clip_denom_kernel,
        (half, half, full, full, ROWS, ROWS, 20.0, *tiles.values(), width, "tf32"),
        (),
    )
    lanes = max(512, 1 << (width - 1).bit_length())
    if lanes > (512 if capability >= 100 else 1024):
        return  # its kernel with atomics takes over
    rows, columns = {512: (64, 64), 1024: (32, 64 if capability == 90 else 32)}[lanes]
    of_width = 1 << (width - 1).bit_length()
    yield (
        clip_fa_grad_kernel,
        (half, half, full, full, full, 20.0, 1.0, ROWS, ROWS, True, rows, columns, of_width, width,
         "tf32"),
        (("num_stages", 2), ("num_warps", 8)),
    )  # fmt: skip
