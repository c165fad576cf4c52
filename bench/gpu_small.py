"""Every Triton operator once on small, awkward shapes, for compute-sanitizer: no comparison, no
pytest. `python bench/gpu_small.py` on a machine with a GPU."""

from __future__ import annotations

import torch

from clae_fast.ops import raw


def run(device: str = "cuda") -> int:
    """How many operators were called."""
    calls = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for N, M, D in ((1, 3, 5), (70, 133, 40), (300, 260, 128), (40, 50, 300)):
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
                raw.contrast(q, q + 1, None, 5.0, t, form=form, need_dscale=True, **both, **options)
            raw.contrast(q, q + 1, k, 5.0, form="one_way", need_dnegatives=True, **both, **options)
            calls += 9
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    print(f"{run()} operators were called")
