"""Two runs against each other: what became slower, larger or worse by more than a threshold."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from convrot_bench.bars import Row, Rows, named
from convrot_bench.results import LARGER_IS_BETTER, load

THRESHOLD = 5.0  # per cent: a card at its power limit is 2 to 3 % faster or slower from one run to the next
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One figure in both runs, medians. `worse`: per cent by which the new one is worse; below 0 it is better."""

    case: str
    shape: str
    backend: str
    gpu: str
    unit: str
    old: float
    new: float
    worse: float

    def regressed(self, threshold: float) -> bool:
        return self.worse > threshold


@dataclass(frozen=True)
class Comparison:
    """What changed from one set of rows to another, and what only one of them has."""

    old: str
    new: str
    threshold: float
    changes: tuple[Change, ...]
    only_old: int
    only_new: int

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.regressed(self.threshold))


def compare(old: Rows, new: Rows, threshold: float, names: tuple[str, str]) -> Comparison:
    """Every figure that both have of one case, shape, backend and GPU; the worst first."""
    groups = [_by_key(rows) for rows in (old, new)]
    common = [key for key in groups[0] if key in groups[1]]
    if not common:
        gpus = " and ".join(", ".join(sorted({r["gpu"] for r in rows})) or "no rows" for rows in (old, new))
        raise ValueError(
            f"report: {names[0]} and {names[1]} have no case, shape, backend and GPU in common ({gpus}); "
            "compare runs of the same command on the same kind of GPU"
        )
    changes = sorted((_change(groups[0][key], groups[1][key]) for key in common), key=lambda change: -change.worse)
    only = [len(groups[i].keys() - groups[1 - i].keys()) for i in (0, 1)]
    return Comparison(*names, threshold, tuple(changes), *only)


def compare_files(old: Path, new: Path, threshold: float) -> Comparison:
    """Two files of JSON lines; of several commits in one the newest with each figure counts."""
    return compare(_newest(load([old])), _newest(load([new])), threshold, (old.name, new.name))


def compare_commits(rows: Rows, commit: str, threshold: float) -> Comparison:
    """The rows of a commit, by the beginning of its name, against the newest that others have of the same figures."""
    old = [r for r in rows if r["commit"].startswith(commit)]
    if not old:
        known = ", ".join(sorted({r["commit"] for r in rows})) or "none"
        raise ValueError(f"report: no rows of commit {commit!r}; the results have {known}")
    return compare(old, _newest([r for r in rows if r not in old]), threshold, (f"commit {commit}", "the newest rows"))


def changes_table(found: Comparison, *, only_flagged: bool = False) -> str:
    """Markdown: a line a figure, what is beyond the threshold in bold."""
    flagged = len(found.regressions)
    head = (
        f"{found.new} against {found.old}: {len(found.changes)} figures in both, {flagged} worse by more than "
        f"{found.threshold:g} %; {found.only_old} only in the old, {found.only_new} only in the new."
    )
    shown = found.regressions if only_flagged else found.changes
    if not shown:
        return head
    lines = ["| case | shape | backend | old | new | change |", "| --- | --- | --- | --- | --- | --- |"]
    for change in shown:
        verdict = _verdict(change, found.threshold)
        values = [f"{value:.4g} {change.unit}" for value in (change.old, change.new)]
        lines.append(f"| `{change.case}` | {change.shape} | {change.backend} | {' | '.join(values)} | {verdict} |")
    return "\n".join([head, "", *lines])


def _verdict(change: Change, threshold: float) -> str:
    if change.regressed(threshold):
        return f"**{change.worse:.1f} % worse**"
    if change.worse < -threshold:
        return f"{-change.worse:.1f} % better"
    return f"{-change.worse:+.1f} %"


def _by_key(rows: Rows) -> dict[Key, Rows]:
    groups: dict[Key, Rows] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def _key(row: Row) -> Key:
    """What has to agree for two figures to be the same thing measured twice."""
    shape = json.dumps(row["shape"], sort_keys=True)
    return row["bench"], row["case"], shape, _backend(row), row["gpu"]


def _backend(row: Row) -> str:
    """Rows of quality name a device instead."""
    return str(row.get("backend", row.get("device", "")))


def _newest(rows: Rows) -> Rows:
    """Of each figure the rows of the newest commit that has it."""
    commits = {_key(r): r["commit"] for r in sorted(rows, key=_date)}
    return [r for r in rows if r["commit"] == commits[_key(r)]]


def _date(row: Row) -> str:
    return str(row["date"])


def _change(old: Rows, new: Rows) -> Change:
    first = new[0]
    before, after = (median(r["ours"] for r in rows) for rows in (old, new))
    better: Callable[[float, float], float] = (
        (lambda a, b: a - b) if first["unit"] in LARGER_IS_BETTER else (lambda a, b: b - a)
    )
    worse = 100 * better(before, after) / abs(before) if before else 0.0
    return Change(
        first["case"], named(first["shape"]), _backend(first), first["gpu"], first["unit"], before, after, worse
    )
