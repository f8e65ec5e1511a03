"""The picture of where a step goes: a stacked bar a side, from the committed rows. The file holds its figures."""

import json
from pathlib import Path

from convrot_bench.bars import Rows
from convrot_bench.model.kernels import TITLES
from convrot_bench.model_speed import breakdown_of

NAME = "step_breakdown.png"
TEXT = "Description"  # of a PNG: what is drawn, by which a stale picture is known
# GEMMs blue, what is ours green, attention orange, gaps grey
COLORS = ("#1f5fa8", "#8db4dd", "#2e8b57", "#e08a2c", "#b05cc6", "#7fc6a4", "#e6c95c", "#b0a8a0", "#d9d9d9")
DARK = COLORS[:1] + COLORS[2:3]  # a number on these is white
SMALLEST = 0.03  # of the longest bar: what a number has room in


def draw(rows: Rows, folder: Path, *, check: bool) -> list[Path]:
    """Draw the picture in the folder if its figures have changed (with `check`, only say so); returns those changed."""
    sides = breakdown_of(rows)
    if not sides:
        return []
    path, figures = folder / NAME, json.dumps(sides, sort_keys=True)
    if _drawn(path) == figures:
        return []
    if not check:
        folder.mkdir(parents=True, exist_ok=True)
        _plot(sides, path, figures)
    return [path]


def _drawn(path: Path) -> str | None:
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(TEXT)


def _plot(sides: dict[str, dict[str, float]], path: Path, figures: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(sum(kinds.values()) for kinds in sides.values())
    figure = Figure(figsize=(10, 0.7 * len(sides) + 1.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [side.replace("_", ", ").replace("bf16", "BF16") for side in sides]
    starts = [0.0] * len(sides)
    for (kind, title), color in zip(TITLES.items(), COLORS, strict=True):
        widths = [kinds[kind] for kinds in sides.values()]
        bars = axes.barh(names, widths, left=starts, label=title, color=color)
        labels = [f"{width:.0f}" if width > SMALLEST * longest else "" for width in widths]
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color="white" if color in DARK else "black")
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of one FLUX.1-dev step, 1024 x 1024, batch 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, metadata={TEXT: figures, "Software": None})
