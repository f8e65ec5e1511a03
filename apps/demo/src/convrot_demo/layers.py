"""Error of each quantized layer as an SVG plot in the model's order, with the worst layers as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from statistics import median

from convrot_quant.plans import Plan

WIDTH, HEIGHT = 900, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 12, 34  # room for axes
WORST = 8
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # distances of grid lines


def html(errors: Mapping[str, float], plan: Plan) -> str:
    """{layer: relative L2 error on the 16-bit run's own inputs} -> plot and table."""
    if not errors:
        return '<p class="cr-hint">Needs a 16-bit run beside the quantized one.</p>'
    schemes = {name: plan[name].name for name in errors}
    kinds = [kind for kind, _ in Counter(schemes.values()).most_common()]  # the scheme of most layers has its colour
    keys = "".join(f'<span><i class="cr-dot{i}"></i>{escape(kind)}</span>' for i, kind in enumerate(kinds))
    middle = median(errors.values())
    return (
        f'<p class="cr-hint">Relative L2 error of each layer\'s output on inputs of the 16-bit run: '
        f"{len(errors)} layers, median {middle:.3f}.</p>"
        f'<div class="cr-legend">{keys}</div><div class="cr-scroll">{_plot(errors, schemes, kinds)}</div>'
        f"{_table(errors, schemes)}"
    )


def _plot(errors: Mapping[str, float], schemes: Mapping[str, str], kinds: Sequence[str]) -> str:
    top, step = _axis(max(errors.values()))
    room = (WIDTH - LEFT - RIGHT) / len(errors)
    lines = []
    for i in range(round(top / step) + 1):
        y = _y(i * step, top)
        lines.append(f'<line class="cr-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for i, (name, error) in enumerate(errors.items()):
        x, y, kind = LEFT + i * room, _y(error, top), kinds.index(schemes[name])
        size = f'width="{max(room * 0.7, 0.8):.2f}" height="{_y(0, top) - y:.1f}"'
        title = f"<title>{escape(name)}: {error:.4f} ({schemes[name]})</title>"
        lines.append(f'<rect class="cr-dot{kind}" x="{x + room * 0.15:.2f}" y="{y:.1f}" {size} rx="1">{title}</rect>')
    lines += _groups(list(errors), room)
    label = f'role="img" aria-label="error of {len(errors)} layers, at most {max(errors.values()):.3f}"'
    return f'<svg class="cr-plot" viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(lines)}</svg>'


def _axis(largest: float) -> tuple[float, float]:
    """(end of the axis, distance of its lines): at most six lines, and all of the largest value."""
    step = next((step for step in STEPS if largest <= 5 * step), largest / 5)
    return max(math.ceil(largest / step), 1) * step, step


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)


def _groups(names: Sequence[str], room: float) -> list[str]:
    """The block lists' names below the axis, with a line between them."""
    lines, start = [], 0
    for group, members in groupby(name.split(".", 1)[0] for name in names):
        count = len(list(members))
        x, middle = LEFT + start * room, LEFT + (start + count / 2) * room
        if start:
            lines.append(f'<line class="cr-grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - 8}"/>')
        lines.append(f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(group)}</text>')
        start += count
    return lines


def _table(errors: Mapping[str, float], schemes: Mapping[str, str]) -> str:
    worst = sorted(errors, key=lambda name: -errors[name])[:WORST]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(schemes[name])}</td><td class='cr-number'>{errors[name]:.4f}</td></tr>"
        for name in worst
    )
    head = "<tr><th>largest errors</th><th>scheme</th><th class='cr-number'>error</th></tr>"
    return f'<div class="cr-scroll"><table class="cr-table"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
