"""Tables of README and docs, made from the committed lines of docs/results, and of plans of released models."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from convrot_bench.family_table import families_table
from convrot_bench.model_speed import model_bars_table, model_table
from convrot_bench.quality.bars import quality_bars_table
from convrot_bench.quality.tables import (
    layers_table,
    quality_full_table,
    quality_levers_table,
    quality_synthetic_table,
    quality_table,
)
from convrot_bench.results import load
from convrot_bench.speed import bars_table, ops_table
from convrot_bench.survey_tables import attention_ops_table, peers_table, rotations_table, steps_table, survey_table

Rows = list[dict[str, Any]]


TABLES: dict[str, Callable[[Rows], str]] = {
    "quality": quality_table,
    "layers": layers_table,
    "ops": ops_table,
    "bars": bars_table,
    "model": model_table,
    "model_bars": model_bars_table,
    "quality_full": quality_full_table,
    "quality_bars": quality_bars_table,
    "quality_levers": quality_levers_table,
    "quality_synthetic": quality_synthetic_table,
    "survey": survey_table,
    "steps": steps_table,
    "rotations": rotations_table,
    "op_peers": peers_table,
    "op_attention": attention_ops_table,
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
