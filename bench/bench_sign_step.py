"""The attack's update, `sign_step`, against PyTorch written out, and both against a plain copy."""

from __future__ import annotations

import functools
import statistics

import pytest
import torch
from replay import REPLAY
from shapes import SIGN_STEPS
from timing import interleaved, ratios

from clae_fast.adversarial import sign_step

BATCH = {"cpu": 32, "cuda": 256}  # images of 3 x 224 x 224: past every cache
EPS, BOUNDS = 8 / 255, (0.0, 1.0)


def eager(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    step = torch.clamp(x + EPS * grad.sign(), x - EPS, x + EPS)
    return step.clamp(*BOUNDS)


def measure(bench, dtype, layout):
    """Seconds of each round, by name, and the bytes that an FGSM step must move: two reads and a
    write; the copy moves two thirds of them."""
    if (dtype, layout) in bench.measured:
        return bench.measured[dtype, layout]
    size = (8, 3, 32, 32) if bench.quick else (BATCH[bench.device], 3, 224, 224)
    x, grad = (torch.empty(size, dtype=dtype, device=bench.device) for _ in range(2))
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    out = torch.empty_like(x)

    def prepare(seed):
        torch.manual_seed(seed)
        x.uniform_()
        grad.normal_()

    calls = {
        "clae_fast": functools.partial(ours, x, grad),
        "eager": functools.partial(eager, x, grad),
        "copy": functools.partial(out.copy_, x),
    }
    prepare(0)
    torch.testing.assert_close(calls["clae_fast"](), eager(x.double(), grad.double()).to(dtype))
    times = interleaved(
        calls, prepare, device=bench.device, seconds=2.0, rounds=3 if bench.quick else None
    )
    bench.measured[dtype, layout] = times, 3 * x.numel() * x.element_size()
    return bench.measured[dtype, layout]


def ours(x, grad):
    return sign_step(x, grad, x, EPS, EPS, BOUNDS)


@pytest.mark.quick
@pytest.mark.parametrize(("dtype", "layout"), SIGN_STEPS)
@pytest.mark.benchmark(timer=REPLAY.timer, warmup=False)
def test_sign_step(dtype, layout, bench, benchmark):
    times, moved = measure(bench, getattr(torch, dtype), getattr(torch, layout))
    seconds = {name: statistics.median(t) for name, t in times.items()}
    rate, copied = moved / seconds["clae_fast"], moved * 2 / 3 / seconds["copy"]
    record = {
        "kind": "sign_step", "dtype": dtype, "layout": layout, "seconds": seconds["clae_fast"],
        "rounds": len(times["copy"]), "gbytes_per_second": rate / 1e9,
        "copy_gbytes_per_second": copied / 1e9, "share_of_copy": rate / copied,
        "times_as_fast_as": {"eager": ratios(times["clae_fast"], times["eager"])},
    }  # fmt: skip
    bench.records.append(record)
    bench.notes.append(
        f"sign_step, {dtype}, {layout}: {100 * rate / copied:.0f} % of a copy's bandwidth, "
        f"{record['times_as_fast_as']['eager'][1]:.2f} times as fast as eager"
    )
    benchmark.group = f"sign_step, {dtype}, {layout}"
    benchmark.extra_info.update(bench.facts | record)
    REPLAY.play(benchmark, times["clae_fast"])
