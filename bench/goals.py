"""What the kernels were to reach, beside what a run measured: met, or missed by how much."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from shapes import GRAPH
from timing import PRODUCTS

Records = list[dict[str, Any]]
AGAINST_PYTORCH = {  # times as fast as the better of eager and compiled, forward + backward
    "simclr-128": 2.5,
    "simclr-256": 2.5,
    "cifar-simclr-512": 2.5,
    "simclr-2048": 2.5,
    "simclr-8192": 3.0,
}
WHOLE = "forward+backward"
ON_A_GPU = (  # H100 or H200, bfloat16; shape, how, against whom, times as fast
    ("cifar-simclr-512", GRAPH, "compiled", 2.0),
    ("simclr-8192", WHOLE, "compiled", 3.0),
    ("simclr-8192", WHOLE, PRODUCTS, 1.0),
    ("clip-32768-d128", WHOLE, "memeff", 1.2),
    ("clip-65536-d768", WHOLE, "memeff", 1.0),
)
IN_ONE_LAUNCH = (  # the kernel for small batches: microseconds at most, and against compiled
    ("cifar-simclr-512", 8.0, 4.0),
    ("simclr-2048", 12.0, 4.0),
)
OF_A_COPY = 0.85  # sign_step's bandwidth, on a GPU
OF_THE_STEP = {"simclr": 1.3, "plain": 1.5}  # exact against published
MEMORY = 300e6  # bytes beyond the inputs, 65,536 rows
FUSED = ("simclr-64", 0.8)  # value_and_grad against our own forward + backward


class Goal(NamedTuple):
    """`asked` and `measured` in the same unit; `more` if more is better."""

    what: str
    asked: float
    measured: float
    more: bool
    unit: str = "x"

    def __str__(self) -> str:
        words = f"{self.measured:.{2 if self.unit == 'x' else 0}f}{self.unit}"
        if (self.measured >= self.asked) if self.more else (self.measured <= self.asked):
            return f"{words}, met"
        off = 100 * abs(1 - self.measured / self.asked)
        return f"**{words}, missed by {off:.{0 if off >= 1 else 1}f} %**"

    def wish(self) -> str:
        """The goal in words."""
        return f"at {'least' if self.more else 'most'} {self.asked:g}{self.unit}"


def goals(records: Records, mine: str) -> list[Goal]:
    """Every goal that there are figures for."""
    on_a_gpu = mine != "clae_fast-cpp"
    found = [*_on_a_gpu(records), *_of_a_copy(records)] if on_a_gpu else []
    timed = {
        (r["shape"], r["mode"], r["provider"]): r
        for r in records
        if r["kind"] == "loss" and "seconds" in r
    }

    def seconds(shape: str, provider: str) -> float | None:
        record = timed.get((shape, "forward+backward", provider))
        return None if record is None else float(record["seconds"])

    for shape, asked in ({} if on_a_gpu else AGAINST_PYTORCH).items():
        ours = seconds(shape, mine)
        others = [s for name in ("eager", "compiled") if (s := seconds(shape, name)) is not None]
        if ours is not None and others:
            what = f"{shape}, against the better of eager and compiled"
            found.append(Goal(what, asked, min(others) / ours, more=True))
    ratios = {
        f"{shape}, {other}": quartiles[1]
        for (shape, mode, provider), r in timed.items()
        if mode == "forward+backward" and provider == mine
        for other, quartiles in r["times_as_fast_as"].items()
        if not other.startswith("clae_fast") and other != PRODUCTS
    }
    if ratios:
        least = min(ratios, key=lambda name: ratios[name])
        what = f"never slower than another; least: {least}"
        found.append(Goal(what + _more(ratios, least, below=1), 1.0, ratios[least], more=True))
    shares = {
        shape: r["share_of_forward_backward"]
        for (shape, mode, provider), r in timed.items()
        if mode == "value_and_grad" and provider == mine and "share_of_forward_backward" in r
    }
    own = "`value_and_grad` against our own forward + backward"
    if FUSED[0] in shares:
        found.append(Goal(f"{own}, {FUSED[0]}", FUSED[1], shares[FUSED[0]], more=False))
    if shares:
        most = max(shares, key=lambda name: shares[name])
        what = f"{own}; most: {most}"
        found.append(Goal(what + _more(shares, most, above=1), 1.0, shares[most], more=False))
    for r in records:
        if r["kind"] == "growth":
            what, peak = "65,536 rows, memory beyond the inputs", r["peak_bytes_65536"] / 1e6
            found.append(Goal(what, MEMORY / 1e6, peak, more=False, unit=" MB"))
        if r["kind"] == "step" and r["variant"] == "exact" and r["method"] in OF_THE_STEP:
            what = f"exact training step against the published one, {r['method']}"
            fast = r["times_as_fast_as_published"]
            found.append(Goal(what, OF_THE_STEP[r["method"]], fast, more=True))
    return found


def _on_a_gpu(records: Records) -> list[Goal]:
    own: dict[tuple[str, str], dict[str, Any]] = {}
    for backend in ("cuda", "triton"):  # in the order in which they are chosen
        for r in records:
            if r["kind"] == "loss" and r["provider"] == f"clae_fast-{backend}" and "seconds" in r:
                own.setdefault((r["shape"], r["mode"]), r)
    found = []

    def against(shape: str, mode: str, other: str, asked: float) -> None:
        times = own.get((shape, mode), {}).get("times_as_fast_as", {})
        if other in times:
            found.append(Goal(f"{shape}, {mode}, against {other}", asked, times[other][1], True))

    for shape, mode, other, asked in ON_A_GPU:
        against(shape, mode, other, asked)
    for shape, most, asked in IN_ONE_LAUNCH:
        r = own.get((shape, GRAPH), {})
        if r.get("provider") == "clae_fast-cuda":
            taken = 1e6 * r["seconds"]
            found.append(Goal(f"{shape}, one launch", most, taken, more=False, unit=" us"))
            against(shape, GRAPH, "compiled", asked)
    return found


def _of_a_copy(records: Records) -> list[Goal]:
    return [
        Goal(f"sign_step, {r['dtype']}, {r['layout']}, bandwidth of a copy", 100 * OF_A_COPY,
             100 * r["share_of_copy"], more=True, unit=" %")
        for r in records if r["kind"] == "sign_step"
    ]  # fmt: skip


def _more(
    values: dict[str, float], worst: str, below: float = -math.inf, above: float = math.inf
) -> str:
    """What else misses."""
    others = [
        f"{name} {value:.2f}x"
        for name, value in values.items()
        if name != worst and (value < below or value > above)
    ]
    return f" (also {'; '.join(others)})" if others else ""
