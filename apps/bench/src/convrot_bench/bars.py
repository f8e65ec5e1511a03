"""What tables of every benchmark are made with: the rows that count, and bars with what was measured."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = dict[str, Any]
Rows = list[Row]

MET, MISSED = "✓", "**missed**"


def current(rows: Rows, bench: str) -> Rows:
    """A bench's rows of the newest machine (GPU and torch); for each case and shape, of the newest commit with it."""
    rows = [r for r in rows if r["bench"] == bench and not r.get("tiny")]
    if not rows:
        return []
    newest = max(rows, key=_when)
    rows = [r for r in rows if (r["gpu"], r["torch"]) == (newest["gpu"], newest["torch"])]
    commits = {_what(r): r["commit"] for r in sorted(rows, key=_when)}
    return [r for r in rows if r["commit"] == commits[_what(r)]]


def _what(row: Row) -> tuple[str, str]:
    return row["case"], json.dumps(row["shape"], sort_keys=True)


def _when(row: Row) -> str:
    return str(row["date"])


def on_gpus(rows: Rows) -> Rows:
    """What no bar asks of a CPU is left out."""
    return [r for r in rows if not r["gpu"].startswith("none")]


def head(rows: Rows) -> str:
    """Where the rows are from."""
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    runs = len({r["run_id"] for r in rows})
    return f"{rows[-1]['gpu']}, torch {rows[-1]['torch']}, commit {commits}, {runs} run(s); medians over runs."


def by_shape(rows: Rows) -> dict[str, Rows]:
    """Rows of one shape and backend together: the same figure, of several runs."""
    groups: dict[str, Rows] = {}
    for r in rows:
        groups.setdefault(f"{r['shape']} {r['backend']}", []).append(r)
    return groups


def named(shape: Row, keys: Sequence[str] | None = None) -> str:
    """The shape, or these of its keys, as a reader takes it in."""
    return ", ".join(f"{key}={value}" for key, value in shape.items() if keys is None or key in keys)


def _always(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """One measurable part of a bar: `case`'s rows that `where` takes, of `shapes` shapes, against `bar(shape)`."""

    case: str
    bar: Callable[[Row], float]
    where: Callable[[Row], bool] = _always
    label: str = ""
    shapes: int = 1
    figure: str = "ratio"
    at_most: bool = False
    text: Callable[[Rows], str] | None = None  # of the one shape, instead of the figure
    missed: str = MISSED

    def measured(self, rows: Rows) -> str:
        """What was measured, lowest to highest over shapes, the worst shape, and whether the bar is met."""
        groups = list(by_shape([r for r in rows if r["case"] == self.case and self.where(r)]).values())
        label = f"{self.label}: " if self.label else ""
        if not groups:
            return f"{label}not measured"
        values = [median(r[self.figure] for r in g) for g in groups]
        margins = [self._margin(v, g[0]["shape"]) for v, g in zip(values, groups, strict=True)]
        if len(groups) < self.shapes:
            verdict = f"**incomplete, {len(groups)} of {self.shapes} shapes**"
        else:
            verdict = MET if min(margins) >= 1 else self.missed
        said = self.text(groups[0]) if self.text else self._range(values)
        worst = groups[margins.index(min(margins))][0]["shape"]
        varied = [k for k in worst if len({str(g[0]["shape"].get(k)) for g in groups}) > 1]
        place = f"(worst at {named(worst, varied)})" if varied else ""
        return label + " ".join(part for part in (said, place, verdict) if part)

    def _margin(self, value: float, shape: Row) -> float:
        return self.bar(shape) / value if self.at_most else value / self.bar(shape)

    def _range(self, values: Sequence[float]) -> str:
        """Rounded to the side that flatters less."""
        toward = math.ceil if self.at_most else math.floor
        low, high = (toward(round(v * 100, 6)) for v in (min(values), max(values)))
        if self.figure == "over_plain":
            return f"+{_span(str(low - 100), str(high - 100))} %"
        if self.case.startswith("rotate_quantize"):
            return f"{_span(str(low), str(high))} %"
        return f"{_span(f'{low / 100:.2f}', f'{high / 100:.2f}')}x"


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low}–{high}"


def constant(value: float) -> Callable[[Row], float]:
    """A bar that is the same for every shape."""
    return lambda shape: value
