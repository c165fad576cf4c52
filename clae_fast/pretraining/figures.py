"""adversarial.png: what the attack does to the views."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .files import atomic_path

if TYPE_CHECKING:
    from .result import Examples

INK, MUTED = "#222222", "#666666"


def amplification(delta: torch.Tensor) -> float:
    """A round factor (1, 2 or 5 times a power of ten) that fills at most the half range 0.5."""
    largest = float(delta.abs().max())
    if not largest > 0:
        return 1.0
    room = 0.5 / largest
    factor = 1.0
    while factor * 10 <= room:
        factor *= 10
    return factor * max(step for step in (1, 2, 5) if factor * step <= max(room, 1.0))


def adversarial_figure(
    examples: Examples, path: str | Path, *, title: str, subtitle: str = ""
) -> None:
    """Write a grid of images, one column an example; the file appears whole or not at all.

    Rows: view i, view j, the adversarial image made from view i, and its difference from view i
    around mid-grey, amplified by the factor in the label.

    Args:
        examples: (n, C, H, W) each, pixels scaled to [0, 1]; C is 1 or 3.
        path: of the PNG; its folder exists.
        title: first line.
        subtitle: second line, in smaller type.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    delta = examples.x_adv - examples.x_i
    factor = amplification(delta)
    rows = (
        ("view i", "the image attacked", examples.x_i),
        ("view j", "the other view", examples.x_j),
        ("adversarial", "clipped to black and white", examples.x_adv),
        ("perturbation", f"amplified \u00d7 {factor:g}", 0.5 + factor * delta),
    )
    count = len(examples.x_i)
    label_width, cell, top = 1.75, 0.86, 0.74  # inches
    width, height = label_width + cell * count + 0.15, top + cell * len(rows) + 0.15
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.15 / width, 1 - 0.3 / height, title, size=12, weight="bold", color=INK)
    figure.text(0.15 / width, 1 - 0.54 / height, subtitle, size=8.5, color=MUTED)
    for r, (name, note, images) in enumerate(rows):
        bottom = height - top - cell * (r + 1)
        middle = (bottom + cell / 2) / height
        figure.text(0.15 / width, middle + 0.06 / height, name, size=10, color=INK)
        figure.text(0.15 / width, middle - 0.14 / height, note, size=8, color=MUTED)
        for c, image in enumerate(images):
            gap = 0.04
            axes = figure.add_axes(
                (
                    (label_width + cell * c + gap / 2) / width,
                    (bottom + gap / 2) / height,
                    (cell - gap) / width,
                    (cell - gap) / height,
                )
            )
            axes.set_axis_off()
            pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
            if pixels.shape[2] == 1:
                axes.imshow(pixels[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                axes.imshow(pixels, interpolation="nearest")
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
