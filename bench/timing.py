"""Times that can be compared: interleaved, on fresh inputs, with the device's own clock."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from shapes import Shape

T = TypeVar("T")
Call = Callable[[], object]
FLUSH_BYTES = 256 << 20  # more than any L2
PRODUCTS = "bare products"  # no loss: what its products alone take


def interleaved(
    calls: Mapping[str, Call],
    prepare: Callable[[int], object],
    *,
    device: str = "cpu",
    seconds: float = 2.0,
    rounds: int | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    In a round `prepare(round)` makes fresh inputs, then every call runs once, in an order drawn
    anew: what else the machine does meets all of them alike, and none finds its caches warmed by
    always the same one.

    Args:
        calls: name -> what to time; each uses what `prepare` made.
        prepare: called once before every round, not timed.
        device: "cpu" or a CUDA device.
        seconds: about how long all rounds may take.
        rounds: their number; None: as `seconds` allow, 7 to 200.
    """
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    prepare(0)
    for call in calls.values():
        call()  # compiles, allocates, wakes the threads
    prepare(1)
    once = sum(clock(call) for call in calls.values())
    if rounds is None:
        rounds = int(min(200, max(7, seconds / max(once, 1e-9))))
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        prepare(turn + 2)
        for name in order.sample(list(calls), len(calls)):
            found[name].append(clock(calls[name]))
    return found


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Call) -> float:
    """By events, right behind what clears L2: while the GPU does that, the host can run ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def replayed(call: Callable[[], T]) -> Callable[[], T]:
    """The call as a CUDA graph, captured when it is first called: its inputs must stay where they
    are, its results are filled anew each time."""
    held: list[tuple[torch.cuda.CUDAGraph, T]] = []

    def run() -> T:
        if not held:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, and chooses algorithms
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            held.append((graph, result))
        graph, result = held[0]
        graph.replay()
        return result

    return run


def ratios(ours: list[float], others: list[float]) -> tuple[float, float, float]:
    """How many times as fast ours is: lower quartile, median, upper quartile of the rounds."""
    found = [b / a for a, b in zip(ours, others, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, middle, high


def gemm_ceiling(device: str = "cpu", n: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square product of that dtype on this machine, now: the best of ten."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    torch.mm(a, b, out=out)
    return 2.0 * n**3 / min(clock(lambda: torch.mm(a, b, out=out)) for _ in range(10))


def bare_products(shape: Shape, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The products that a loss with gradients has when S is kept, alone, by the vendor's library in
    the dtype of the inputs: S, G K, and G^T Q for a loss over two sets (NT-Xent's autograd too). S
    stands for G."""
    q, k, *negatives = inputs
    if shape.stacked:
        q = k = torch.cat((q, k))
    if negatives:
        k = negatives[0] if shape.queue else torch.cat((k, *negatives))
    s = q @ k.T
    return [s @ k, s.T @ q]


PEAK = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import torch
from gate import gradients, inputs
from providers import available
from shapes import Shape
torch.set_num_threads({threads})
shape = Shape{shape!r}
loss = available(shape, "cpu")[{name!r}]
small = shape._replace(pairs=8, queue=min(shape.queue, 8))
gradients(loss, inputs(small))
xs = inputs(shape)
if {name!r} == "compiled":  # what compiling takes is not what the loss takes
    gradients(loss, xs)
    ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
def used(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
before = used("VmRSS")
gradients(loss, xs)
print(used("VmHWM") - before)
"""


def peak_extra_memory(name: str, shape: tuple[object, ...], threads: int) -> int | None:
    """Bytes a provider's forward+backward needs beyond its inputs, in a process of its own."""
    folder = str(Path(__file__).parent)
    code = PEAK.format(folder=folder, threads=threads, shape=tuple(shape), name=name)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(ran.stdout.split()[-1]) if ran.returncode == 0 and ran.stdout.split() else None
