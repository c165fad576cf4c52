"""Runs that are stopped on purpose."""

import signal

from clae_fast.pretraining import loop


def stop_after(monkeypatch, steps):
    """Ctrl-C arrives while the step of that number (from 1, over the whole run) is computed."""
    real, count = loop.TrainingStep.__call__, 0

    def step(self, x_i, x_j):
        nonlocal count
        count += 1
        if count == steps:
            signal.raise_signal(signal.SIGINT)
        return real(self, x_i, x_j)

    monkeypatch.setattr(loop.TrainingStep, "__call__", step)
