"""Hands times that were taken elsewhere to pytest-benchmark's table.

Its fixture times one function after the other; ours are timed interleaved, so that drift cancels.
A clock that a fake function moves on by the next measured time says the same to its statistics.
"""

from __future__ import annotations


class Replay:
    """`timer` for the marker, `play(times)` what to benchmark."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times: list[float] = []

    def timer(self) -> float:
        return self.now

    def play(self, benchmark, times: list[float]) -> None:
        waiting = iter(times)

        def step() -> None:
            self.now += next(waiting)

        benchmark.pedantic(step, rounds=len(times), iterations=1)


REPLAY = Replay()
