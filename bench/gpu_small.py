"""Every Triton and CUDA operator once on small, awkward shapes, for compute-sanitizer: no
comparison, no pytest. `python bench/gpu_small.py [racecheck] [bfloat16 ...]` on a machine with a
GPU; with dtypes only those."""

from __future__ import annotations

import sys

import torch

from clae_fast import available_backends
from clae_fast.kernels import _launch
from clae_fast.ops import raw

SHAPES = ((1, 3, 5), (70, 133, 40), (300, 260, 128), (40, 50, 300))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(
    device: str = "cuda",
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> int:
    """How many operators were called."""
    calls = 0
    _launch.MANY = 0  # sweeps that share rows and columns are for many rows: here for all
    cuda = available_backends()["contrast"]["cuda"]
    one_launch = cuda == "ok"
    if not one_launch:
        print(f"without the CUDA kernels: {cuda}")
    for dtype in dtypes:
        for N, M, D in shapes:
            q, k = (torch.randn(n, D, device=device).to(dtype) for n in (N, M))
            both = {"need_dq": True, "need_dk": True}
            options = {"backend": "triton"}
            ids = {
                "row_ids": torch.arange(N, device=device, dtype=torch.int32) % 3,
                "col_ids": torch.arange(M, device=device, dtype=torch.int32) % 4,
            }
            weights = {
                f"{side}_{what}": torch.ones(n, device=device)
                for side, n in (("row", N), ("col", M))
                for what in ("lse", "weight")
            }
            raw.pair_lse(q, k, 0.5, **ids, **options)
            raw.pair_mean(q, k, 0.5, **ids, **options)
            raw.pair_grad(q, k, 0.5, **weights, **ids, **options)
            raw.pair_sigmoid(q, k, 0.5, -1.0, **both, **ids, **options)
            z = torch.cat((q, q))
            raw.pair_uel(z, z, 0.5, 1.5, need_dq=True, **options)
            t = torch.ones((), device=device)
            for form in ("nt_xent", "one_way", "two_way"):
                for scale in (5.0, 200.0):  # the maximum is known, or not
                    given = {"form": form, "need_dscale": True, **both}
                    raw.contrast(q, q + 1, None, scale, t, **given, **options)
                    if one_launch and D <= 256:
                        raw.contrast(q, q + 1, None, scale, t, **given, backend="cuda")
                        raw.contrast(q, q, None, scale, t, **given, backend="cuda")
            raw.contrast(q, q + 1, k, 5.0, form="one_way", need_dnegatives=True, **both, **options)
            if one_launch:
                x = torch.randn(3, D, 5, 7, device=device).to(dtype)
                per_channel = torch.rand(D, 1, 1, device=device)
                raw.sign_step(x, x, x, 0.1, 0.0, 0.0, 1.0, None, per_channel, backend="cuda")
            calls += 12 + (14 if one_launch and D <= 256 else one_launch)
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("gpu_small.py: error: expected a GPU, and PyTorch sees none")
    some = SHAPES[1:2] if "racecheck" in sys.argv else SHAPES  # it takes 100 times as long
    named = tuple(d for d in DTYPES if str(d).removeprefix("torch.") in sys.argv)
    print(f"{run(shapes=some, dtypes=named or DTYPES)} operators were called")
