"""The figures of a comparison: three headline numbers, and bars for time, memory and bytes of both sides."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from convrot_demo.comparison import Outcome, Side
from convrot_demo.panes import seconds
from convrot_quant.plans import size_text


@dataclass(frozen=True)
class Bar:
    """One measured quantity: how to read it from a side, how to print it, what more and less of it are called."""

    label: str
    value: Callable[[Side], float | None]
    text: Callable[[float], str]
    less: str
    more: str


BARS = (
    Bar("Time per step", lambda side: side.drawn.step_seconds, seconds, "faster", "slower"),
    Bar("Total time", lambda side: side.drawn.seconds, seconds, "faster", "slower"),
    Bar("Peak memory", lambda side: side.drawn.peak_bytes, size_text, "less", "more"),
    Bar("Weights", lambda side: side.transformer_bytes, size_text, "smaller", "larger"),
)


def html(outcome: Outcome, notes: tuple[str, ...]) -> str:
    """Numbers and bars; `notes` are sentences below them."""
    sides = [side for side in (outcome.full, outcome.quantized) if side is not None]
    rows = "".join(_row(bar, sides) for bar in BARS)
    head = "".join(f'<th scope="col" class="cr-side{i}">{escape(side.name)}</th>' for i, side in _numbered(sides))
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        f'<div class="cr-tiles">{_tiles(outcome)}</div><table class="cr-figures"><thead><tr><th></th>{head}<th></th>'
        f'</tr></thead><tbody>{rows}</tbody></table><div class="cr-notes">{below}</div>'
    )


def _numbered(sides: list[Side]) -> list[tuple[int, Side]]:
    """(0 for the 16-bit side or 1 for the quantized one, side): the colours go by that."""
    return list(enumerate(sides, 2 - len(sides)))


def _tiles(outcome: Outcome) -> str:
    tiles = []
    if outcome.full is not None and outcome.psnr_db is not None and outcome.ssim is not None:
        psnr = f"{outcome.psnr_db:.1f} dB" if math.isfinite(outcome.psnr_db) else "equal"
        smaller = outcome.full.transformer_bytes / max(outcome.quantized.transformer_bytes, 1)
        tiles = [("PSNR", psnr), ("SSIM", f"{outcome.ssim:.3f}"), ("Transformer", f"{smaller:.2f}x smaller")]
    return "".join(f"<div><span>{escape(label)}</span><b>{escape(value)}</b></div>" for label, value in tiles)


def _row(bar: Bar, sides: list[Side]) -> str:
    values = [bar.value(side) for side in sides]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    cells = "".join(
        f"<td>{_cell(bar, value, max(known), i)}</td>" for (i, _), value in zip(_numbered(sides), values, strict=True)
    )
    return f'<tr><th scope="row">{bar.label}</th>{cells}<td class="cr-ratio">{_ratio(bar, known)}</td></tr>'


def _cell(bar: Bar, value: float | None, largest: float, side: int) -> str:
    if value is None:
        return "not measured"
    share = 100 * value / largest if largest else 0
    return f'<span>{escape(bar.text(value))}</span><i class="cr-side{side}" style="width:{share:.1f}%"></i>'


def _ratio(bar: Bar, values: list[float]) -> str:
    if len(values) < 2 or min(values) <= 0:
        return ""
    full, quantized = values
    ratio = max(full, quantized) / min(full, quantized)
    if ratio < 1.02:
        return "same"
    return f"{ratio:.2f}x {bar.less if quantized < full else bar.more}"


def settings_link(record: dict[str, Any], query: str) -> str:
    """Links below the figures: settings and figures as a JSON file, and a page with these settings."""
    text = base64.b64encode(json.dumps(record, indent=2).encode()).decode()
    file = f'download="convrot-demo.json" href="data:application/json;base64,{text}"'
    return (
        f'<p class="cr-actions"><a class="cr-link" {file}>Settings (JSON)</a>'
        f'<a class="cr-link" id="settings-link" target="_blank" href="{escape(query)}">Link to these settings</a></p>'
    )
