"""Losses of the named shapes: forward, forward+backward, value_and_grad; ours and everyone's."""

from __future__ import annotations

import functools
import math
import statistics
from typing import NamedTuple

import pytest
import torch
from gate import Errors, Truth, gradients, inputs
from providers import available
from replay import REPLAY
from shapes import (
    BY_NAME,
    GRAPH,
    MEMORY_PROVIDERS,
    MEMORY_SHAPES,
    SHAPES,
    Shape,
    replays,
    shapes_for,
)
from timing import (
    PRODUCTS,
    bare_products,
    gemm_ceiling,
    interleaved,
    peak_extra_memory,
    ratios,
    replayed,
)

import clae_fast

MODES = ("forward", "forward+backward", "value_and_grad")
GRAPH_PROVIDERS = ("eager", "compiled")  # beside ours; a peer that cannot be captured breaks others
PRODUCTS_ON = ("cuda",)  # where a goal asks for them


class Measured(NamedTuple):
    """Of one shape: by (mode, provider) what is wrong, the errors, and seconds of each round."""

    wrong: dict[tuple[str, str], str]
    errors: dict[tuple[str, str], Errors]
    times: dict[tuple[str, str], list[float]]
    ceiling: float  # FLOP/s of a square product, measured beside it


def pytest_generate_tests(metafunc):
    session = metafunc.config.bench
    if "case" in metafunc.fixturenames:
        cases = []
        for shape in shapes_for(session.device):
            for mode in MODES:
                for name in available(shape, session.device):
                    if mode == "value_and_grad" and not is_ours(name):
                        continue
                    cases.append((shape, mode, name))
            if replays(shape, session.device):
                names = available(shape, session.device)
                cases += [(shape, GRAPH, name) for name in names if graphed(name)]
        cases = [
            pytest.param(
                case, id="-".join((case[0].name, *case[1:])),
                marks=[pytest.mark.quick] if case[0].quick else [],
            )
            for case in cases
        ]  # fmt: skip
        metafunc.parametrize("case", cases)
    if "memory_case" in metafunc.fixturenames:  # of a process's pages: the CPU's question
        pairs = [(s, p) for s in MEMORY_SHAPES for p in MEMORY_PROVIDERS if session.device == "cpu"]
        pairs = [(s, p) for s, p in pairs if p in available(BY_NAME[s], session.device)]
        metafunc.parametrize("memory_case", pairs, ids=["-".join(pair) for pair in pairs])


def is_ours(name: str) -> bool:
    return name.startswith("clae_fast")


def graphed(name: str) -> bool:
    return is_ours(name) or name in GRAPH_PROVIDERS


def ways(losses, held, shape, graphs=False):
    """{(mode, provider): call}; a call returns the loss, and the gradients if it has any."""

    def forward(loss):
        with torch.no_grad():
            return loss(*held["xs"]), None

    calls = {}
    for name, loss in losses.items():
        calls["forward", name] = functools.partial(forward, loss)
        calls["forward+backward", name] = lambda loss=loss: gradients(
            loss, held["xs"], shape.learned
        )
        if is_ours(name):
            fused = clae_fast.value_and_grad(loss, argnums=range(shape.learned))
            calls["value_and_grad", name] = lambda fused=fused: fused(*held["xs"])
        if graphs and graphed(name):
            whole = "value_and_grad" if is_ours(name) else "forward+backward"
            calls[GRAPH, name] = replayed(calls[whole, name])
    return calls


def gate(shape: Shape, calls, held, device):
    """(wrong, errors) of every call: what is wrong or raises is named and not timed."""
    truth = Truth(shape, device)
    held["xs"] = truth.inputs
    wrong, errors = {}, {}
    for key, call in calls.items():
        try:
            value, grads = call()
        except Exception as error:  # a peer's own: it drops out, the others are measured
            wrong[key] = f"raises {type(error).__name__}: {error}".splitlines()[0]
            if device == "cuda":  # what a loss too large for the card has left there
                torch.cuda.empty_cache()
            continue
        errors[key] = (
            truth.of_loss(value) if grads is None else truth.of(value, grads[: shape.learned])
        )
        if reason := errors[key].wrong(shape):
            wrong[key] = reason
    return wrong, errors


def measure(bench, shape: Shape) -> Measured:
    """Gate and times of a shape, once for all its tests."""
    if shape not in bench.measured:
        held = {}
        # PyTorch compiles one function 8 times at most, then runs it as it is: begin anew.
        torch.compiler.reset()
        graphs = replays(shape, bench.device)
        calls = ways(available(shape, bench.device), held, shape, graphs)
        wrong, errors = gate(shape, calls, held, bench.device)

        def prepare(seed):
            fresh = inputs(shape, seed, bench.device)
            if bench.device == "cpu":
                held["xs"] = fresh
            else:  # where graphs read them
                for x, new in zip(held["xs"], fresh, strict=True):
                    x.copy_(new)

        right = {key: call for key, call in calls.items() if key not in wrong}
        if bench.device in PRODUCTS_ON:
            right["forward+backward", PRODUCTS] = lambda: bare_products(shape, held["xs"])
        seconds, rounds = (0.5, 3) if bench.quick else (bench.seconds, None)
        times = interleaved(right, prepare, device=bench.device, seconds=seconds, rounds=rounds)
        ceiling = gemm_ceiling(bench.device, bench.gemm_n, shape.dtype)
        bench.measured[shape] = Measured(wrong, errors, times, ceiling)
    return bench.measured[shape]


@pytest.mark.benchmark(timer=REPLAY.timer, warmup=False)
def test_loss(case, bench, benchmark):
    shape, mode, name = case
    found = measure(bench, shape)
    benchmark.group = f"{shape.name} ({shape.kind}), {mode}"
    record = {
        "kind": "loss", "shape": shape.name, "loss": shape.kind, "rows": shape.rows,
        "columns": shape.columns, "width": shape.width,
        "dtype": str(shape.dtype).removeprefix("torch."), "mode": mode, "provider": name,
    }  # fmt: skip
    bench.records.append(record)
    key = (mode, name)
    if key in found.errors:
        record |= {
            "loss_error": found.errors[key].loss, "gradient_error": found.errors[key].gradient
        }  # fmt: skip
    if reason := found.wrong.get(key):
        record["wrong"] = reason
        bench.notes.append(f"{name} is wrong on {shape.name}, {mode}: {reason}")
        if is_ours(name):
            pytest.fail(bench.notes[-1])
        pytest.xfail(bench.notes[-1])  # measured as wrong: a result, and no fault of this suite
    times = found.times[key]
    REPLAY.play(benchmark, times)
    seconds = statistics.median(times)
    gemms = 1 if mode == "forward" else shape.gemms
    rate = gemms * shape.gemm_flops / seconds
    record |= {
        "seconds": seconds, "rounds": len(times), "gflops": rate / 1e9,
        "gemm_gflops": found.ceiling / 1e9, "share_of_gemm_ceiling": rate / found.ceiling,
    }  # fmt: skip
    # Round by round, against each other provider: low quartile, median, high quartile.
    record["times_as_fast_as"] = {
        other: ratios(times, found.times[m, other])
        for m, other in found.times
        if m == mode and other != name
    }
    if mode == "value_and_grad" and ("forward+backward", name) in found.times:
        _, middle, _ = ratios(times, found.times["forward+backward", name])
        record["share_of_forward_backward"] = 1 / middle
    benchmark.extra_info.update(bench.facts | record)


def test_peak_extra_memory(memory_case, bench, benchmark):
    """In processes of their own; the table times those, the figures come in the summary."""
    name, provider = memory_case
    shape = BY_NAME[name]
    benchmark.group = "processes that find the peak extra memory (figures below)"
    peak = benchmark.pedantic(peak_extra_memory, (provider, shape, bench.threads), rounds=1)
    assert peak is not None
    record = {
        "kind": "memory", "shape": name, "rows": shape.rows, "columns": shape.columns,
        "width": shape.width, "provider": provider, "bytes": peak,
    }  # fmt: skip
    bench.records.append(record)
    bench.notes.append(f"peak extra memory, {name}, {provider}: {peak / 2**20:,.1f} MiB")
    benchmark.extra_info.update(bench.facts | record)


@pytest.mark.cpu
@pytest.mark.benchmark(timer=REPLAY.timer, warmup=False)
def test_65536_rows(bench, benchmark):
    """N = 65,536 in less than 300 MB beyond the inputs, and time that grows as N^2."""
    big = SHAPES[0]._replace(name="simclr-65536", pairs=32768)
    peak = peak_extra_memory("clae_fast-cpp", big, bench.threads)
    assert peak is not None
    sizes, medians = (8192, 16384, 32768), []
    for rows in sizes:
        z = [torch.randn(rows // 2, 128) for _ in range(2)]
        call = functools.partial(clae_fast.value_and_grad(clae_fast.nt_xent_loss), *z)
        times = interleaved({"ours": call}, lambda seed: None, rounds=3)["ours"]
        medians.append(statistics.median(times))
    exponent = math.log(medians[-1] / medians[0]) / math.log(sizes[-1] / sizes[0])
    record = {
        "kind": "growth", "rows": list(sizes), "seconds": medians, "exponent": exponent,
        "peak_bytes_65536": peak,
    }  # fmt: skip
    bench.records.append(record)
    bench.notes.append(
        f"65,536 rows: {peak / 2**20:.0f} MiB beyond the inputs; time grows as N^{exponent:.2f}"
    )
    benchmark.group = "32,768 rows, value_and_grad"
    benchmark.extra_info.update(bench.facts | record)
    REPLAY.play(benchmark, times)
    assert peak < 300e6
    assert 1.7 < exponent < 2.3
