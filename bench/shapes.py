"""Named shapes, by what they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """`pairs` embeddings of `width` on each side; `queue` shared negatives (info_nce only).

    A key is its query plus `noise` times as much noise: at a high scale the pairs must be hard, or
    the gradient is 0 to every digit and nothing can be compared.
    """

    name: str
    loss: str  # nt_xent, info_nce, uel or clip
    pairs: int
    width: int
    temperature: float = 0.1
    queue: int = 0
    noise: float = 1.0
    quick: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        """Rows of the similarity matrix."""
        return 2 * self.pairs if self.stacked else self.pairs

    @property
    def stacked(self) -> bool:
        """Whether the rows are both views, one above the other."""
        return self.loss in ("nt_xent", "uel")

    @property
    def columns(self) -> int:
        return self.queue or self.rows

    @property
    def gemm_flops(self) -> float:
        """Of one product of all pairs, S = Q K^T."""
        return 2.0 * self.rows * self.columns * self.width


# The goals are stated for the rows of NT-Xent at D = 128.
SHAPES = (
    Shape("simclr-64", "nt_xent", 32, 128),
    Shape("simclr-128", "nt_xent", 64, 128, quick=True),
    Shape("simclr-256", "nt_xent", 128, 128),
    Shape("cifar-simclr-512", "nt_xent", 256, 128, quick=True),
    Shape("simclr-2048", "nt_xent", 1024, 128),
    Shape("simclr-8192", "nt_xent", 4096, 128),
    Shape("simclr-2048-d32", "nt_xent", 1024, 32),
    Shape("simclr-2048-d64", "nt_xent", 1024, 64),
    Shape("simclr-2048-d512", "nt_xent", 1024, 512),
    Shape("simclr-2048-d768", "nt_xent", 1024, 768),
    Shape("simclr-2048-bf16", "nt_xent", 1024, 128, dtype=torch.bfloat16),
    Shape("clae-plain-128", "info_nce", 128, 128, quick=True),
    Shape("clae-uel-256", "uel", 128, 128, quick=True),
    Shape("queue-65536", "info_nce", 256, 128, temperature=0.07, queue=65536),
    Shape("clip-256-d512", "clip", 256, 512, temperature=0.07, quick=True),
    Shape("clip-2048-d512", "clip", 2048, 512, temperature=0.07),
    Shape("clip-4096-d768", "clip", 4096, 768, temperature=0.07),
    Shape("clip-1024-d512-scale100", "clip", 1024, 512, 0.01, noise=5.0),  # CLIP's clamp
)
BY_NAME = {shape.name: shape for shape in SHAPES}
GPU_SHAPES = tuple(
    shape._replace(dtype=torch.bfloat16)
    for shape in (
        # Those with a goal first: a run that is cut short has them.
        *(BY_NAME[name] for name in ("cifar-simclr-512", "simclr-2048", "simclr-8192")),
        Shape("clip-32768-d128", "clip", 32768, 128, temperature=0.07),
        Shape("clip-65536-d768", "clip", 65536, 768, temperature=0.07),
        Shape("simclr-32768", "nt_xent", 16384, 128),
        *(BY_NAME[name] for name in ("simclr-128", "clae-plain-128")),
        Shape("clae-uel-2048", "uel", 1024, 128),
        *(BY_NAME[name] for name in ("queue-65536", "clip-4096-d768")),
        BY_NAME["clip-1024-d512-scale100"],
    )
)


GRAPH = "graph replay"  # a mode: loss and gradients as a CUDA graph, where launches are the cost


def replays(shape: Shape, device: str) -> bool:
    return device == "cuda" and shape.rows <= 2048 and not shape.queue


def shapes_for(device: str) -> tuple[Shape, ...]:
    return GPU_SHAPES if device == "cuda" else SHAPES


MEMORY_SHAPES = ("simclr-2048", "simclr-8192", "clip-4096-d768", "queue-65536")
MEMORY_PROVIDERS = ("clae_fast-cpp", "eager", "compiled")
STEP_METHODS = ("simclr", "plain")
SIGN_STEPS = tuple(
    (dtype, layout)
    for dtype in ("float32", "bfloat16")
    for layout in ("contiguous_format", "channels_last")
)
