"""Losses of the named shapes: forward, forward+backward, value_and_grad; ours and everyone's."""

from __future__ import annotations

import functools
import math
import statistics

import pytest
import torch
from gate import Truth, gradients, inputs, tolerance
from providers import available
from replay import REPLAY
from shapes import SHAPES
from timing import interleaved, peak_extra_memory, ratio

import clae_fast

MODES = ("forward", "forward+backward", "value_and_grad")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    session = metafunc.config.bench
    cases = []
    for shape in SHAPES:
        names = list(available(shape, session.device))
        for mode in MODES:
            for name in names:
                if mode == "value_and_grad" and not name.startswith("clae_fast"):
                    continue
                marks = [pytest.mark.quick] if shape.quick else []
                case = (shape, mode, name)
                cases.append(pytest.param(case, id=f"{shape.name}-{mode}-{name}", marks=marks))
    metafunc.parametrize("case", cases)


def measure(bench, shape):
    """{"wrong": {name: error}, "errors": {name: error}, "times": {mode: {name: [s]}}}, once."""
    if shape in bench.measured:
        return bench.measured[shape]
    losses = available(shape, bench.device)
    truth = Truth(shape)
    errors = {name: truth.error(loss) for name, loss in losses.items()}
    right = [name for name, error in errors.items() if error <= tolerance(torch.float32)]
    held = {}

    def prepare(seed):
        held["xs"] = inputs(shape, seed, bench.device)

    def forward(loss):
        with torch.no_grad():
            return loss(*held["xs"])

    def both(loss):
        return gradients(loss, held["xs"])

    def fused(loss):
        return loss(*held["xs"])

    calls = {}
    for name in right:
        calls["forward", name] = functools.partial(forward, losses[name])
        calls["forward+backward", name] = functools.partial(both, losses[name])
        if name.startswith("clae_fast"):
            calls["value_and_grad", name] = functools.partial(
                fused, clae_fast.value_and_grad(losses[name], argnums=(0, 1))
            )
    seconds, rounds = (0.5, 3) if bench.quick else (6.0, None)
    times = interleaved(calls, prepare, device=bench.device, seconds=seconds, rounds=rounds)
    found = {
        "errors": errors,
        "times": {mode: {name: times[m, name] for m, name in times if m == mode} for mode in MODES},
    }
    bench.measured[shape] = found
    return found


@pytest.mark.benchmark(timer=REPLAY.timer, warmup=False)
def test_loss(case, bench, benchmark):
    shape, mode, name = case
    found = measure(bench, shape)
    benchmark.group = f"{shape.name} ({shape.loss}), {mode}"
    error, limit = found["errors"][name], tolerance(torch.float32)
    record = {
        "kind": "loss", "shape": shape.name, "loss": shape.loss, "rows": shape.rows,
        "columns": shape.columns, "width": shape.width, "mode": mode, "provider": name,
        "error": error,
    }  # fmt: skip
    bench.records.append(record)
    if not error <= limit:
        record["wrong"] = True
        text = f"{name} is wrong on {shape.name}: gradient error {error:.1e}, allowed {limit:.0e}"
        if name.startswith("clae_fast"):
            pytest.fail(text)
        pytest.xfail(text)
    times = found["times"][mode]
    REPLAY.play(benchmark, times[name])
    seconds = statistics.median(times[name])
    # Work that no plan can do without: S and G Z (two sides of S for a loss over two sets).
    gemms = 1 if mode == "forward" else 2 if shape.loss == "nt_xent" or shape.queue else 3
    rate = gemms * shape.gemm_flops / seconds
    record |= {"seconds": seconds, "rounds": len(times[name]), "gflops": rate / 1e9}
    if "eager" in times:
        record["times_as_fast_as_eager"] = ratio(times[name], times["eager"])
    others = {n: t for n, t in times.items() if not n.startswith("clae_fast")}
    if name.startswith("clae_fast") and others:
        best = min(others, key=lambda n: statistics.median(others[n]))
        record |= {"best_other": best, "times_as_fast": ratio(times[name], others[best])}
    if mode == "value_and_grad":
        both = found["times"]["forward+backward"][name]
        record["share_of_forward_backward"] = 1 / ratio(times[name], both)
    benchmark.extra_info.update(
        {"share_of_gemm_ceiling": rate / bench.gemm()}
        | {key: record[key] for key in record if key not in ("kind", "shape", "mode")}
    )


MEMORY = ("simclr-2048", "simclr-8192", "clip-4096-d768", "queue-65536")


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("provider", ["clae_fast-cpp", "eager", "compiled"])
def test_peak_extra_memory(name, provider, bench, benchmark):
    shape = next(s for s in SHAPES if s.name == name)
    if bench.device != "cpu" or provider not in available(shape, bench.device):
        pytest.skip(f"{provider} is measured on the CPU where it runs")
    peak = peak_extra_memory(provider, shape, bench.threads)
    assert peak is not None
    bench.records.append(
        {"kind": "memory", "shape": name, "rows": shape.rows, "columns": shape.columns,
         "width": shape.width, "provider": provider, "bytes": peak}
    )  # fmt: skip
    benchmark.extra_info["peak_extra_mib"] = peak / 2**20
    benchmark.group = "peak extra memory (see extra_info)"
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.benchmark(timer=REPLAY.timer, warmup=False)
def test_65536_rows(bench, benchmark):
    """N = 65,536 in less than 300 MB beyond the inputs, and time that grows as N^2."""
    if bench.device != "cpu":
        pytest.skip("the CPU's goal")
    big = SHAPES[0]._replace(name="simclr-65536", pairs=32768)
    peak = peak_extra_memory("clae_fast-cpp", big, bench.threads)
    sizes, medians = (8192, 16384, 32768), []
    for rows in sizes:
        z = [torch.randn(rows // 2, 128) for _ in range(2)]
        call = functools.partial(clae_fast.value_and_grad(clae_fast.nt_xent_loss), *z)
        times = interleaved({"ours": call}, lambda seed: None, rounds=3)["ours"]
        medians.append(statistics.median(times))
    exponent = math.log(medians[-1] / medians[0]) / math.log(sizes[-1] / sizes[0])
    bench.records.append(
        {"kind": "growth", "rows": list(sizes), "seconds": medians, "exponent": exponent,
         "peak_bytes_65536": peak}
    )  # fmt: skip
    benchmark.group = "32,768 rows, value_and_grad"
    benchmark.extra_info.update(exponent=exponent, peak_mib_65536=peak / 2**20)
    REPLAY.play(benchmark, times)
    print(
        f"\n65,536 rows: {peak / 2**20:.0f} MiB beyond the inputs; time grows as N^{exponent:.2f}"
    )
    assert peak < 300e6
    assert 1.7 < exponent < 2.3
