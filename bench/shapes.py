"""Named shapes, by what they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """`pairs` embeddings of `width` on each side; `queue` shared negatives in the place of the
    batch's, `extra` beside them (info_nce only), which get their gradient.

    A key is its query plus `noise` times as much noise: at a high scale the pairs must be hard, or
    the gradient is 0 to every digit and nothing can be compared.
    """

    name: str
    loss: str  # nt_xent, info_nce, uel, clip, siglip, sup_con, dcl or hard_negative
    pairs: int
    width: int
    temperature: float = 0.1
    queue: int = 0
    noise: float = 1.0
    quick: bool = False
    dtype: torch.dtype = torch.float32
    extra: int = 0
    classes: int = 0  # so many ids: sup_con's labels; of nt_xent's pairs that are no negatives
    weighted: bool = False  # dcl as DCLW

    @property
    def kind(self) -> str:
        """The function: the loss and what it is asked for."""
        asked = {
            "queue": self.queue,
            "extra negatives": self.extra,
            "ids": self.classes and self.loss != "sup_con",
            "weighted": self.weighted,
        }
        return ", ".join((self.loss, *(name for name, there in asked.items() if there)))

    def ids(self, device: str) -> Tensor:
        """(pairs,): the same for all rounds, as how many are equal decides about the work."""
        g = torch.Generator().manual_seed(0)
        return torch.randint(self.classes, (self.pairs,), generator=g).to(device)

    @property
    def learned(self) -> int:
        """How many of the inputs get a gradient: a queue needs none."""
        return 3 if self.extra else 2

    @property
    def rows(self) -> int:
        """Rows of the similarity matrix."""
        return 2 * self.pairs if self.stacked else self.pairs

    @property
    def stacked(self) -> bool:
        """Whether the rows are both views, one above the other."""
        return self.loss in ("nt_xent", "uel", "sup_con", "dcl", "hard_negative")

    @property
    def columns(self) -> int:
        return self.queue or self.rows + self.extra

    @property
    def gemms(self) -> int:
        """Products of all pairs that no plan for loss and gradients can do without: S, and one for
        each set of rows that gets a gradient. One set is both sides of S: its gradient is
        (G + G^T) Z, whatever the loss makes of S, and what rows of equal ids add is O(N D)."""
        return 2 if self.stacked or self.queue else 3

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
    # The family: losses put together from sweeps, and the fused ones with options.
    Shape("siglip-256-d512", "siglip", 256, 512, quick=True),
    Shape("siglip-2048-d512", "siglip", 2048, 512),
    Shape("supcon-256", "sup_con", 128, 128, quick=True, classes=10),
    Shape("supcon-2048", "sup_con", 1024, 128, classes=10),
    Shape("dcl-256", "dcl", 128, 128, quick=True),
    Shape("dcl-2048", "dcl", 1024, 128),
    Shape("dclw-2048", "dcl", 1024, 128, weighted=True),
    Shape("hcl-512", "hard_negative", 256, 128, temperature=0.5, quick=True),
    Shape("hcl-2048", "hard_negative", 1024, 128, temperature=0.5),
    Shape("ids-2048", "nt_xent", 1024, 128, classes=512),
    # MultipleNegativesRankingLoss at its scale of 20, each query with a hard negative.
    Shape("mnrl-512-d768", "info_nce", 512, 768, 0.05, noise=5.0, extra=512, quick=True),
)
BY_NAME = {shape.name: shape for shape in SHAPES}
GPU_SHAPES = tuple(
    shape._replace(dtype=torch.bfloat16)
    for shape in (
        # Those with a goal first: a run that is cut short has them.
        *(BY_NAME[name] for name in ("cifar-simclr-512", "simclr-2048", "simclr-8192")),
        Shape("clip-32768-d128", "clip", 32768, 128, temperature=0.07),
        Shape("simclr-32768", "nt_xent", 16384, 128),
        *(BY_NAME[name] for name in ("simclr-128", "clae-plain-128")),
        Shape("clae-uel-2048", "uel", 1024, 128),
        *(BY_NAME[name] for name in ("queue-65536", "clip-4096-d768")),
        BY_NAME["clip-1024-d512-scale100"],
        Shape("siglip-4096-d512", "siglip", 4096, 512),
        Shape("supcon-4096", "sup_con", 2048, 128, classes=10),
        *(BY_NAME[name] for name in ("dcl-2048", "hcl-2048")),
        Shape("siglip-32768-d512", "siglip", 32768, 512),
        # A goal too, but 4 billion pairs take their time.
        Shape("clip-65536-d768", "clip", 65536, 768, temperature=0.07),
    )
)

FUSED_KINDS = ("nt_xent", "info_nce", "info_nce, queue", "uel", "clip")  # one operator each
# What the shapes do not vary: SigLIP's bias at the start of training, DCLW's sigma and HCL's beta
# and tau_plus as published.
BIAS, SIGMA, BETA, TAU_PLUS = -10.0, 0.5, 1.0, 0.1
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
