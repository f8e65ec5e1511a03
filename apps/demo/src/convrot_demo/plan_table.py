"""The plan of a scheme as a table: which layers get what, which stay in 16 bits and why."""

from __future__ import annotations

from html import escape

from convrot_quant.plans import COLUMNS, Plan, size_text

NUMBERS = ("count", "shape (N, K)", "before", "after", "layers")


def html(plan: Plan) -> str:
    """The summary by scheme, then every kind of layer."""
    totals: list[tuple[str, ...]] = [
        (name, str(count) if count else "", size_text(before), size_text(after))
        for name, count, before, after in plan.summary()
    ]
    ratio = plan.bytes_before / max(plan.bytes_after, 1)
    return (
        f'<p class="cr-hint">{escape(plan.model_class)}: {size_text(plan.bytes_before)} become '
        f"{size_text(plan.bytes_after)}, {ratio:.2f}x smaller.</p>"
        f"{_table(('scheme', 'layers', 'before', 'after'), totals)}{_table(COLUMNS, plan.rows())}"
    )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th{_aligned(column)}>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_aligned(c)}>{escape(v)}</td>" for c, v in zip(columns, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="cr-scroll"><table class="cr-table"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _aligned(column: str) -> str:
    return ' class="cr-number"' if column in NUMBERS else ""
