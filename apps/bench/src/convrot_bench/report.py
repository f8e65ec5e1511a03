"""Tables of README and docs, made from the committed lines of docs/results, and of plans of released models."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from convrot_bench.family_table import families_table
from convrot_bench.methods import METHODS
from convrot_bench.model_speed import model_bars_table, model_table
from convrot_bench.results import load
from convrot_bench.speed import bars_table, ops_table

Rows = list[dict[str, Any]]


def _figure(rows: Rows, method: str, case: str) -> float | None:
    """Median over the committed runs."""
    values = [r["ours"] for r in rows if r["case"] == f"{method}/{case}"]
    return median(values) if values else None


def quality_table(rows: Rows) -> str:
    """One line a method, of the runs over the most captions; the shape and the machine above."""
    rows = [r for r in rows if r["bench"] == "quality"]
    if not rows:
        return "No quality runs are committed yet."
    most = max(r["shape"]["prompts"] for r in rows)
    rows = [r for r in rows if r["shape"]["prompts"] == most]
    parts = []
    for shape in dict.fromkeys(str(r["shape"]) for r in rows):
        parts.append(_quality_of([r for r in rows if str(r["shape"]) == shape]))
    return "\n\n".join(parts)


def layers_table(rows: Rows) -> str:
    """One line a layer, one column a method: relative L2 errors of the newest run that has them."""
    rows = [r for r in rows if r.get("layer_l2")]
    if not rows:
        return "No run with errors of every layer is committed yet."
    run = max(rows, key=lambda r: r["date"])["run_id"]
    rows = [r for r in rows if r["run_id"] == run]
    last = rows[-1]
    head = (
        f"Run {run}: {last['shape']['prompts']} captions, {last['shape']['steps']} steps, {last['gpu']}, "
        f"torch {last['torch']}, commit {last['commit']}."
    )
    names = list(dict.fromkeys(name for r in rows for name in r["layer_l2"]))
    lines = ["| layer | " + " | ".join(r["title"] for r in rows) + " |", "| --- |" + " --- |" * len(rows)]
    for name in names:
        cells = [f"{r['layer_l2'][name]:.3f}" if name in r["layer_l2"] else "16-bit" for r in rows]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([head, "", *lines])


def _quality_of(rows: Rows) -> str:
    shape, last = rows[0]["shape"], rows[-1]
    head = (
        f"mini-flux, {shape['prompts']} held-out captions, {shape['steps']} steps, bf16, {last['gpu']}, "
        f"torch {last['torch']}, {len({r['run_id'] for r in rows})} run(s). "
        "Errors are against the BF16 pictures of the same noise."
    )
    columns = (
        "| method | layers quantized | layer rel. L2, median (p95) | PSNR dB | SSIM "
        "| object | colour | relation | all three | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    titles = {"bf16": "BF16", **{m.name: m.title + (" *" if m.emulated else "") for m in METHODS}, "chance": "chance"}
    lines = [
        _quality_line(rows, name, title) for name, title in titles.items() if _figure(rows, name, "object") is not None
    ]
    note = "\\* emulated in fp32, the paper's layers and scales; chance: BF16 pictures against the captions of others."
    return "\n".join([head, "", *columns, *lines, "", note])


def _quality_line(rows: Rows, name: str, title: str) -> str:
    def text(case: str, form: Callable[[float], str]) -> str:
        value = _figure(rows, name, case)
        return "" if value is None else form(value)

    errors = text("layer_l2_median", "{:.3f}".format)
    if errors:
        errors += text("layer_l2_p95", " ({:.3f})".format)
    first = next(r for r in rows if r["case"].startswith(f"{name}/"))
    layers = f"{first['layers']} of {first['layers_planned']}" if "layers" in first else ""
    accuracy = [text(c, "{:.1%}".format) for c in ("object", "color", "relation", "caption_accuracy")]
    figures = [
        text("psnr_db", "{:.2f}".format),
        text("ssim", "{:.3f}".format),
        *accuracy,
        text("bytes", lambda b: f"{b / 1e6:.1f}"),
    ]
    return "| " + " | ".join([title, layers, errors, *figures]) + " |"


TABLES: dict[str, Callable[[Rows], str]] = {
    "quality": quality_table,
    "layers": layers_table,
    "ops": ops_table,
    "bars": bars_table,
    "model": model_table,
    "model_bars": model_bars_table,
}
_FAMILIES = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)
_BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def fill(text: str, rows: Rows) -> str:
    """Replace what stands between `<!-- results:NAME -->` and `<!-- /results -->` by the table NAME.

    Likewise between `<!-- families -->` and `<!-- /families -->` by the table of released models.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"report: unknown table {match[2]!r}; use one of {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](rows)}\n\n{match[3]}"

    text = _BLOCK.sub(table, text)
    return _FAMILIES.sub(lambda match: f"{match[1]}\n{families_table()}\n\n{match[2]}", text)


def update(results: Iterable[Path], pages: Iterable[Path], *, check: bool) -> list[Path]:
    """Fill the pages from the result files; returns those that changed (or with `check`, would change)."""
    rows = load(results)
    changed = []
    for page in pages:
        old = page.read_text()
        new = fill(old, rows)
        if new != old:
            changed.append(page)
            if not check:
                page.write_text(new)
    return changed
