"""draw_plot: predicted error against bytes, as the planner spends them, and named plans at their own bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

Point = tuple[int, float]  # bytes of the whole transformer, predicted error
SUFFIXES = (".png", ".svg", ".pdf")
CURVE, OWN = "#1f5fa8", "#2e8b57"
SHAPES = (("o", "#b0562c"), ("s", "#1a1a1a"), ("D", "#b05cc6"), ("^", "#e08a2c"), ("v", "#6b6b6b"))


def check_plot(path: Path) -> None:
    """Errors for a file that cannot be drawn, before any work: its name, or matplotlib that is not there."""
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise ValueError(f"{path}: a plot is written as {', '.join(SUFFIXES)}; give such a name")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install matplotlib, or 'convrot-quant[plot]'") from None


def draw_plot(path: Path, title: str, curve: Sequence[Point], marks: Mapping[str, Point], own: Point) -> None:
    """Write the plot; points without error (everything in 16 bits) have no place on its logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, name = (1e9, "GB") if curve[-1][0] >= 1e9 else (1e6, "MB")
    seen = [(size / unit, error) for size, error in curve if error > 0]
    axes.plot(*zip(*seen, strict=True), color=CURVE, marker=".", markersize=3, label="planner, by bytes")
    for (label, (size, error)), (shape, color) in zip(marks.items(), cycle(SHAPES), strict=False):
        if error > 0:
            axes.plot(size / unit, error, shape, color=color, label=f"{label}, {size / unit:.4g} {name}")
    if own[1] > 0:
        axes.plot(own[0] / unit, own[1], "*", markersize=14, color=OWN, label=f"this plan, {own[0] / unit:.4g} {name}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"{name} of the transformer")
    axes.set_ylabel("predicted error (root mean square over layers)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
