"""Which tiles are the fastest on this GPU: every sweep of the Triton kernels with many of them.

    python bench/tune.py [--results FILE] [--only WORD ...]

The kernels are compiled by all processors first, then timed alone, interleaved, on fresh inputs.
Each answer is compared with that of the tiles in kernels/_launch.py; the table is what those are
chosen from.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import interleaved, replayed
from torch import Tensor

from clae_fast.kernels import _launch, wide
from clae_fast.kernels._launch import Config, Pairs
from clae_fast.kernels.pair_grad import Weights, row_gradient
from clae_fast.kernels.pair_lse import row_sums
from clae_fast.kernels.pair_mean import row_means
from clae_fast.kernels.pair_sigmoid import pair_sigmoid
from clae_fast.kernels.pair_uel import pair_uel
from clae_fast.kernels.two_sided import both_sums
from clae_fast.pretraining.files import write_whole
from clae_fast.pretraining.provenance import provenance

BF16, F32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A sweep over N x M pairs of width D."""

    sweep: str
    dtype: torch.dtype
    D: int
    N: int = 8192
    M: int = 8192

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.sweep} {dtype} D {self.D}, {self.N} x {self.M}"


# Which entry of CONFIGS each sweep reads.
KINDS = {
    "sums": "sums", "triangle": "two-sided", "both": "two-sided",
    "gradient": "gradient", "mean": "mean", "sigmoid": "elementwise",
    "uel": "uel", "wide": "wide",
}  # fmt: skip
CASES = (
    *(Case(sweep, BF16, 128) for sweep in KINDS),
    *(Case(sweep, BF16, 768) for sweep in ("sums", "triangle", "both", "wide")),
    *(Case(sweep, BF16, 256) for sweep in ("gradient", "sigmoid", "wide")),
    Case("sigmoid", BF16, 512),
    *(Case(sweep, F32, 128) for sweep in ("sums", "triangle", "sigmoid", "wide")),
)
# BM, BN, warps, stages: what is worth a try, after a first sweep of 36 for each.
HALF_SUMS = (
    (128, 128, 4, 2), (128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 8, 3), (128, 64, 4, 4),
    (128, 256, 8, 3), (64, 256, 8, 3), (64, 64, 4, 3),
)  # fmt: skip
HALF_RESULTS = (
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3),
    (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 4, 3),
)  # fmt: skip
UEL = ((64, 128, 4, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2))
FLOAT_SUMS = ((64, 64, 4, 2), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
              (64, 64, 8, 3))  # fmt: skip
FLOAT_RESULTS = ((32, 32, 4, 2), (32, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2))


def candidates(case: Case) -> Iterator[Any]:
    """Tiles worth a try; what does not fit drops out when it is compiled."""
    kind, D = KINDS[case.sweep], case.D
    if kind == "wide":
        yield from itertools.product((1024, 2048, 4096), (12 << 20, 24 << 20, 48 << 20))
        return
    floats = case.dtype == F32
    if kind in ("sums", "two-sided"):
        shapes, BDs = (FLOAT_SUMS, (32,)) if floats else (HALF_SUMS, (min(D, 128), 64))
    elif kind == "uel":
        shapes, BDs = UEL, (D,)
    else:
        shapes = FLOAT_RESULTS if floats else HALF_RESULTS
        BDs = (64, 128) if floats else (min(D, 256), min(D, 128)) if D > 256 else (D,)
    for (BM, BN, warps, stages), BD in itertools.product(shapes, dict.fromkeys(BDs)):
        if (kind != "two-sided" or BM == BN) and (D > 128 or floats or BD == D):
            yield Config(BM, BN, BD, warps, stages)


def known(case: Case) -> Any:
    """What the library takes now."""
    if case.sweep == "wide":
        return wide.ROWS, wide.BLOCK_BYTES
    capability = _launch.capability(torch.device("cuda"))
    return _launch.config(KINDS[case.sweep], _launch.padded(case.D), case.dtype, capability)


@contextmanager
def chosen(case: Case, config: Any) -> Iterator[None]:
    """The library with those tiles for that sweep."""
    tiles, blocks, fused = _launch.tiles, (wide.ROWS, wide.BLOCK_BYTES), _launch.FUSED_WIDTH
    kind = KINDS[case.sweep]
    if kind == "wide":
        wide.ROWS, wide.BLOCK_BYTES = config
        _launch.FUSED_WIDTH = dict.fromkeys(fused, 1)
    else:
        _launch.FUSED_WIDTH = dict.fromkeys(fused, 4096)
        _launch.tiles = lambda k, *args: (
            {_launch.MAX_WIDTH: config} if k == kind else tiles(k, *args)
        )
    try:
        yield
    finally:
        _launch.tiles, _launch.FUSED_WIDTH = tiles, fused
        wide.ROWS, wide.BLOCK_BYTES = blocks


class Operands:
    """Random unit rows, as `contrast` hands them on, and a call on them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.q, self.k = (
            torch.empty(n, case.D, device="cuda", dtype=case.dtype) for n in (case.N, case.M)
        )
        self.fill(0)

    def fill(self, seed: int) -> None:
        g = torch.Generator("cuda").manual_seed(seed)
        for x in (self.q, self.k):
            rows = torch.randn(x.shape, generator=g, device="cuda")
            x.copy_(torch.nn.functional.normalize(rows, dim=1))
        same = self.case.sweep == "triangle" or self.case.sweep.startswith("uel")
        if same:
            self.k.copy_(self.q)

    def call(self) -> tuple[Tensor, ...]:
        sweep, q, k = self.case.sweep, self.q, self.k
        half = self.case.dtype != F32
        inverse = tuple(torch.ones(len(x), device="cuda") if half else None for x in (q, k))
        if sweep == "sigmoid":
            return pair_sigmoid(q, k, 10.0, -10.0, need_dq=True, need_dk=True)
        if sweep.startswith("uel"):
            return pair_uel(q, q, 10.0, 1.0, need_dq=True)
        skip = "twins" if sweep in ("triangle", "gradient") else "diagonal"
        other = q if sweep == "triangle" else k
        pairs = Pairs(q, other, 10.0, None, False, skip, unit=True, inverse=inverse)
        if sweep.startswith("sums"):
            lse = pairs.new(pairs.N)
            row_sums(pairs, lse, pairs.ways)
            return (lse,)
        if sweep in ("triangle", "both"):
            return both_sums(pairs, symmetric=sweep == "triangle")
        if sweep == "mean":
            return row_means(pairs)
        # e^(zero - lse) of the maximum that is known at t = 10.
        numbers = (9.0, 1.0, math.exp(10.08 - 9.0))
        weights = [Weights(*(torch.full((n,), x, device="cuda") for x in numbers))
                   for n in (pairs.N, pairs.M)]  # fmt: skip
        return (row_gradient(pairs, *weights, scaled=False).sum(0),)


def attempt(
    case: Case, config: Any, operands: Operands, expected: tuple[Tensor, ...]
) -> str | None:
    """Compiles the sweep with these tiles and calls it once; what is wrong, or None.

    Raises:
        torch.AcceleratorError: this process can do nothing more with the GPU.
    """
    try:
        with chosen(case, config):
            got = operands.call()
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        raise
    except Exception as error:  # tiles that do not fit
        return f"{type(error).__name__}: {error}".splitlines()[0][:90]
    for a, b in zip(got, expected, strict=True):
        if a.numel() and not float((a - b).norm() / b.norm()) <= 4e-3:
            return "another result"
    return None


def attempts(case: Case, configs: list[Any]) -> list[str | None]:
    """Of each what is wrong; fewer than given if the last of them broke this process."""
    operands = Operands(case)
    expected = operands.call()
    found: list[str | None] = []
    for config in configs:
        try:
            found.append(attempt(case, config, operands, expected))
        except torch.AcceleratorError as error:
            return [*found, f"BROKEN {error}".splitlines()[0]]
    return found


def all_attempts(
    found: list[tuple[Case, list[Any]]], jobs: int
) -> dict[tuple[Case, Any], str | None]:
    """By many processes, each for one case: what breaks the GPU's context ends one alone."""
    wrong: dict[tuple[Case, Any], str | None] = {}
    left = [(case, list(configs)) for case, configs in found]
    context = multiprocessing.get_context("spawn")
    while left:
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            answers = list(pool.map(attempts, *zip(*left, strict=True)))
        for (case, configs), answer in zip(left, answers, strict=True):
            wrong |= {(case, c): a for c, a in zip(configs, answer, strict=False)}
        left = [(c, cs[len(a) :]) for (c, cs), a in zip(left, answers, strict=True) if cs[len(a) :]]
    return wrong


def timed(case: Case, configs: list[Any]) -> dict[Any, float]:
    """Median microseconds of each on the GPU: graphs, as the host takes longer than some sweeps."""
    operands = Operands(case)

    def run(config: Any) -> None:
        with chosen(case, config):
            operands.call()

    calls = {str(i): replayed(functools.partial(run, config)) for i, config in enumerate(configs)}
    times = interleaved(calls, operands.fill, device="cuda", rounds=11)
    return {c: 1e6 * statistics.median(times[str(i)]) for i, c in enumerate(configs)}


def ceilings() -> dict[str, float]:
    """What this card does at best: a copy, and a product of 16 bits."""
    x = torch.empty(1 << 31, dtype=torch.int8, device="cuda").random_()
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    calls = {"copy": lambda: y.copy_(x), "product": lambda: torch.mm(a, b)}
    times = interleaved(calls, lambda seed: None, device="cuda", rounds=9)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "copy_bytes_per_s": 2.0 * x.numel() / middle["copy"],
        "product_flops": 2.0 * 8192**3 / middle["product"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="write all times as JSON")
    parser.add_argument("--only", nargs="+", default=[], help="cases with one of these words")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--now", action="store_true", help="call what the library takes, no more")
    parser.add_argument("--one", nargs=2, type=int, metavar=("CASE", "TILE"), help="call that one")
    parser.add_argument("--without", type=Path, help="JSON of [case, tiles] to leave out")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, and PyTorch sees none")
    cases = [c for c in CASES if not args.only or any(w in str(c) for w in args.only)]
    bad = json.loads(args.without.read_text()) if args.without else []
    found = [
        (c, [known(c), *(x for x in candidates(c) if x != known(c) and [str(c), [*x]] not in bad)])
        for c in cases
    ]
    if args.one is not None:
        case, configs = found[args.one[0]]
        print(case, configs[args.one[1]], attempts(case, [configs[args.one[1]]]))
        return
    if args.now:
        for case, configs in found:
            print(case, configs[0], attempts(case, configs[:1]), flush=True)
        return
    wrong = all_attempts(found, args.jobs)
    for i, (case, configs) in enumerate(found):
        for j, config in enumerate(configs):
            if (wrong[case, config] or "").startswith("BROKEN"):
                print(f"--one {i} {j}: {case} {tuple(config)}: {wrong[case, config]}", flush=True)
    misfits = sum(w is not None for w in wrong.values())
    print(f"{len(wrong)} tiles, {misfits} do not fit", flush=True)
    rows = []
    for case, configs in found:
        fits = [config for config in configs if wrong[case, config] is None]
        times = timed(case, fits)
        best = sorted(times, key=lambda config: times[config])
        now = known(case)
        print(f"{case}: now {tuple(now)} {times.get(now, float('nan')):.1f} us; " + "; ".join(
            f"{tuple(c)} {times[c]:.1f}" for c in best[:4]), flush=True)  # fmt: skip
        rows.append({"case": str(case), "now": list(now), "microseconds": [
            [list(c), round(times[c], 2)] for c in best
        ], "wrong": [[list(c), wrong[case, c]] for c in configs if wrong[case, c]]})  # fmt: skip
    limits = ceilings()
    print(limits, flush=True)
    if args.results is not None:
        text = json.dumps({"provenance": provenance("cuda"), **limits, "cases": rows}, indent=1)
        write_whole(args.results, (text + "\n").encode())


if __name__ == "__main__":
    main()
