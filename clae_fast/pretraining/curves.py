"""curves.png: loss, learning rate and kNN accuracy over the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import atomic_path

INK, MUTED, GRID = "#222222", "#666666", "#dddddd"
BLUE, ORANGE, GREEN = "#1f6fb4", "#d9722e", "#3b8f4b"


def curves_figure(lines: Sequence[dict[str, Any]], path: str | Path, *, title: str) -> None:
    """Draw the lines of a metrics.jsonl; the file appears whole or not at all.

    Args:
        lines: of `read_metrics`.
        path: of the PNG; its folder exists.
        title: first line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [line for line in lines if line["event"] == "step"]
    # A contrastive loss depends on the size of the batch: a shorter last one is no step down.
    batch = max((s["batch"] for s in steps), default=0)
    steps = [s for s in steps if s["batch"] == batch]
    epochs = [line for line in lines if line["event"] == "epoch"]
    accuracies = [(e["epoch"], e["knn_accuracy"]) for e in epochs if "knn_accuracy" in e]
    # Steps become fractions of an epoch, so that all panels share one axis.
    per_epoch = epochs[0]["step"] if epochs else max((s["step"] for s in steps), default=1)
    panels = 2 + bool(accuracies)
    figure = Figure(figsize=(4.2 * panels, 3.1), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, size=11, weight="bold", color=INK, x=0.01, ha="left")
    axes = figure.subplots(1, panels)
    x = [s["step"] / per_epoch for s in steps]
    parts = [("clean_loss", "clean", BLUE), ("adversarial_loss", "adversarial", ORANGE)]
    if not any("adversarial_loss" in s for s in steps):
        parts = [("loss", "loss", BLUE)]
    for key, label, color in parts:
        axes[0].plot(x, [s.get(key) for s in steps], color=color, lw=0.7, alpha=0.6, label=label)
    axes[0].plot(
        [e["epoch"] for e in epochs],
        [e["loss"] for e in epochs],
        color=INK,
        lw=1.6,
        marker="o",
        ms=3,
        label="epoch mean, total",
    )
    axes[0].set_title("loss", size=10, color=INK)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].plot(x, [s["lr"] for s in steps], color=BLUE, lw=1.4)
    axes[1].set_title("learning rate", size=10, color=INK)
    if accuracies:
        axes[2].plot(*zip(*accuracies, strict=True), color=GREEN, lw=1.6, marker="o", ms=3)
        axes[2].set_title("weighted kNN accuracy (test)", size=10, color=INK)
    for ax in axes:
        ax.set_xlabel("epoch", size=9, color=MUTED)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.tick_params(labelsize=8, colors=MUTED)
        ax.grid(color=GRID, lw=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
