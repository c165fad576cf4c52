"""SVG plots of time and memory against the rows."""

from __future__ import annotations

import re
from pathlib import Path

from results_file import Result, losses, ours_of

from clae_fast.pretraining.files import atomic_path

COLORS = {"eager": "#8a8a8a", "compiled": "#d9722e"}
OTHER_COLORS = ("#3b8f4b", "#8e5ea2", "#b8860b", "#c0392b", "#2aa198", "#555555")
OUR_COLOR = "#1f6fb4"
SERIES = ("nt_xent", 128, "float32")  # what the plots over N are of
Points = dict[str, list[tuple[int, float]]]


def series(result: Result) -> list[tuple[str, Points, str]]:
    """(file, {provider: [(rows, value)]}, label) of each plot that there is something for."""
    times: Points = {}
    for by_name in losses(result, "forward+backward").values():
        for name, record in by_name.items():
            plain = (record["loss"], record["width"], record["dtype"]) == SERIES
            if plain and "seconds" in record:
                times.setdefault(name, []).append((record["rows"], 1e3 * record["seconds"]))
    memory: Points = {}
    for r in result["records"]:
        if r["kind"] == "memory" and re.fullmatch(r"simclr-\d+", r["shape"]):
            memory.setdefault(r["provider"], []).append((r["rows"], r["bytes"] / 2**20))
    plots = (
        ("bench-time.svg", times, "ms, forward + backward"),
        ("bench-memory.svg", memory, "peak extra memory, MiB"),
    )
    return [plot for plot in plots if plot[1]]


def draw(result: Result, folder: Path) -> None:
    """The plots of `series`, each whole."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    matplotlib.rcParams["svg.hashsalt"] = "clae_fast"  # the same input, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be searched
    mine, p = ours_of(result), result["provenance"]
    for name, points_of, label in series(result):
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        others = iter(OTHER_COLORS)
        for provider, points in points_of.items():
            color = OUR_COLOR if provider == mine else COLORS.get(provider) or next(others)
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, "o-", ms=3, lw=2 if provider == mine else 1, label=provider, c=color)
        ticks = sorted({n for points in points_of.values() for n, _ in points})
        axes.set(xscale="log", yscale="log", xlabel="rows N of NT-Xent, D = 128", ylabel=label)
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{p['machine']}, commit {p['commit']}", size=8)
        axes.grid(color="#dddddd", lw=0.5)
        axes.legend(fontsize=7)
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
