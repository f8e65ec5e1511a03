"""Charts as SVG that takes its colours from the page around it, so that they follow its light or dark theme.

Drawn by matplotlib with fixed stand-ins for colours, which become CSS variables; text stays text. The same values give
the same bytes with one version of matplotlib; across versions `Chart.digest` says whether the values are the same.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

# stand-in -> CSS variable of the page
COLORS = {
    "#010203": "--ink", "#707172": "--muted", "#d0d1d2": "--line", "#f0f1f2": "--paper", "#a0a1a2": "--base",
    "#1a5fb4": "--ours", "#e66101": "--second", "#2a8c5a": "--third", "#8f4fb0": "--fourth", "#c79a14": "--fifth",
    "#4aa3a3": "--sixth", "#b5495b": "--seventh",
}  # fmt: skip
INK, MUTED, LINE, PAPER, BASE, *SERIES = COLORS
WIDTH, ROW, AROUND = 5.4, 0.2, 1.0  # inches: of a chart, of a bar, of title, legend and axis
SMALLEST = 0.045  # of the longest bar: what a number has room in

Values = Mapping[str, Mapping[str, float]]  # label of a line -> series -> value


@dataclass(frozen=True)
class Chart:
    """A title, what was drawn, and the drawing."""

    title: str
    digest: str
    svg: Markup


def bars(
    title: str, values: Values, axis: str, *, form: str = "{:.2f}", at: float | None = None, base: str = ""
) -> Chart:
    """Lines of horizontal bars, one a series; `at` draws a line there, the series `base` is grey."""
    series = list(dict.fromkeys(name for line in values.values() for name in line))
    colors = dict(zip([s for s in series if s != base], SERIES, strict=False)) | {base: BASE}
    longest = max(value for line in values.values() for value in line.values())

    def draw(axes: Any) -> None:
        at_y = 0.0
        ticks = []
        for line in values.values():
            ticks.append(at_y + (len(line) - 1) / 2)
            for name, value in line.items():
                axes.barh(at_y, value, height=0.84, color=colors[name], label=name)
                axes.text(value + 0.012 * longest, at_y, form.format(value), va="center", color=INK, fontsize=9)
                at_y += 1
            at_y += 0.6
        axes.set_yticks(ticks, list(values))
        axes.set_xlim(0, 1.15 * longest)
        if at is not None:
            axes.axvline(at, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)

    rows = sum(len(line) for line in values.values()) + 0.6 * len(values)
    return _chart(title, values, axis, rows, draw, legend=len(series) > 1)


def stacks(title: str, values: Values, axis: str, *, form: str = "{:.0f}", colors: Sequence[str] = ()) -> Chart:
    """Lines of one horizontal bar each, made of parts."""
    names = list(dict.fromkeys(name for line in values.values() for name in line))
    chosen = dict(zip(names, colors or SERIES, strict=False))
    longest = max(sum(line.values()) for line in values.values())

    def draw(axes: Any) -> None:
        for at_y, line in enumerate(values.values()):
            left = 0.0
            for name in names:
                width = line.get(name, 0.0)
                axes.barh(at_y, width, left=left, height=0.72, color=chosen[name], label=name)
                if width > SMALLEST * longest:
                    color = "#ffffff" if _is_dark(chosen[name]) else "#000000"
                    axes.text(
                        left + width / 2, at_y, form.format(width), ha="center", va="center", color=color, fontsize=9
                    )
                left += width
        axes.set_yticks(range(len(values)), list(values))

    return _chart(title, values, axis, 1.5 * len(values), draw, legend=True)


def dots(title: str, values: Values, axis: str, *, most: float) -> Chart:
    """Lines of one dot a series, from 0 to `most`."""
    series = list(dict.fromkeys(name for line in values.values() for name in line))

    def draw(axes: Any) -> None:
        for name, color in zip(series, SERIES, strict=False):
            points = [(line[name], y) for y, line in enumerate(values.values()) if name in line]
            axes.scatter(*zip(*points, strict=True), s=34, color=color, label=name, zorder=3)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_xlim(0, most)
        axes.grid(axis="y", color=LINE, linewidth=0.6)

    return _chart(title, values, axis, 1.25 * len(values), draw, legend=True)


def _chart(title: str, values: Values, axis: str, rows: float, draw: Callable[[Any], None], *, legend: bool) -> Chart:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "convrot", "svg.fonttype": "none", "font.size": 9.5, "text.color": INK}):
        figure = Figure(figsize=(WIDTH, ROW * rows + AROUND), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.invert_yaxis()
        axes.margins(y=0.02)
        axes.set_xlabel(axis, color=MUTED)
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.tick_params(axis="x", colors=MUTED)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        if legend:
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            columns = 3 if max(map(len, handles)) < 18 else 2
            figure.legend(
                handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False, fontsize=9,
                handlelength=1.1, columnspacing=1.2,
            )  # fmt: skip
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    shown = {"title": title, "axis": axis, "values": {line: dict(parts) for line, parts in values.items()}}
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    return Chart(title, digest, _themed(stream.getvalue(), title))


def _is_dark(color: str) -> bool:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140


def _themed(svg: str, title: str) -> Markup:
    """The drawing alone, its colours the page's, its text in the page's font; ids of one chart meet no other's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:[a-zA-Z]+_|[a-zA-Z]+2d_|matplotlib\.axis_)\w*"', "", svg)
    svg = re.sub(r"font-family: [^;\"]+; ?", "", svg)
    for stand_in, name in COLORS.items():
        svg = svg.replace(stand_in, f"var({name})")
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None, "matplotlib gives every SVG a viewBox"
    label = title.replace('"', "'").replace("<", "").replace("&", "and")
    return Markup(re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" aria-label="{label}">', svg, count=1).strip())
