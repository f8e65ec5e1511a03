"""Tables of whole models: every figure (docs/benchmarks.md), and the bars with what was measured (README)."""

import math
from collections.abc import Callable
from statistics import median
from textwrap import shorten

from convrot_bench.attention_table import PREFIX, attention_table, is_attention
from convrot_bench.bars import MET, MISSED, Check, Row, Rows, by_shape, constant, current, head, named, on_gpus
from convrot_bench.model.kernels import MODULATION, ROTATE, TITLES
from convrot_bench.model.peers import PEERS
from convrot_bench.parallel_table import is_parallel, parallel_table

NOTHING = "No runs of whole models are committed yet."
BREAKDOWN, PEER = "breakdown/", "peer_"
TARGET = 1.3  # times a peer
PAPER = 2.26  # times BF16, as the paper has it
LETTERS = 80  # of an error in a cell


def _head(rows: Rows) -> str:
    bits = ", ".join(dict.fromkeys(r["multiplied"] for r in rows))
    return f"{head(rows)} Random weights. W4A4 is multiplied as {bits}."


# every figure


def model_table(rows: Rows) -> str:
    """A table a case; of attention in 8 bits, of several GPUs, of all peers and of the breakdown one each."""
    rows = current(on_gpus(rows), "model")
    if not rows:
        return NOTHING
    parts = [_head(rows)]
    for case in dict.fromkeys(r["case"] for r in rows):
        if not (case.startswith((BREAKDOWN, PEER)) or is_parallel(case) or is_attention(case)):
            parts.append(_case_table([r for r in rows if r["case"] == case]))
    for is_of, table in ((is_attention, attention_table), (is_parallel, parallel_table)):
        if some := [r for r in rows if is_of(r["case"])]:
            parts.append(table(some))
    for prefix, table in ((PEER, _peer_table), (BREAKDOWN, _breakdown_table)):
        if some := [r for r in rows if r["case"].startswith(prefix)]:
            parts.append(table(some))
    return "\n\n".join(parts)


def _case_table(rows: Rows) -> str:
    unit = "GB" if rows[0]["unit"] == "bytes" else rows[0]["unit"]
    lines = [
        f"`{rows[0]['case']}`, in {unit}; baseline: {rows[0]['baseline_name']}{_samples(rows)}",
        "",
        "| shape | ours | p10–p90 | baseline | p10–p90 | times | ours, how | baseline, how | fused blocks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for some in by_shape(rows).values():
        first = some[0]
        ours, baseline = (_value(some, key) for key in ("ours", "baseline"))
        spreads = _spread(some, "p10", "p90"), _spread(some, "baseline_p10", "baseline_p90")
        cells = [named(first["shape"]), ours, spreads[0], baseline, spreads[1], f"{_median(some, 'ratio'):.2f}"]
        cells += [first.get("how", ""), first.get("baseline_how", ""), "yes" if first.get("fused") else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _samples(rows: Rows) -> str:
    counts = sorted({r["runs"] for r in rows if "runs" in r})
    return f"; each side the median of {' or '.join(map(str, counts))}" if counts else ""


def _peer_table(rows: Rows) -> str:
    """What does not run stands here with its error."""
    lines = [
        "Other projects from the same weights, in ms a step at 1024 x 1024, both the faster of eager and compiled; "
        "GB of weights and relative errors against BF16: theirs, ours",
        "",
        "| peer | version | theirs | ours | times | theirs, how | ours, how | GB | rel. L2 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in dict.fromkeys(r["case"] for r in rows):
        some = _that_ran([r for r in rows if r["case"] == case])
        first = some[0]
        cells = [first["baseline_name"], first["peer_version"]]
        if "error" in first:
            cells += [_error(first), _value(some, "ours"), "", "", first["how"], "", ""]
        else:
            cells += [_value(some, "baseline"), _value(some, "ours"), f"{_median(some, 'ratio'):.2f}"]
            cells += [first["baseline_how"], first["how"], _gigabytes_of(some), _errors_of(first)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _that_ran(rows: Rows) -> Rows:
    """Rows with a figure of the baseline, or all where there is none."""
    return [r for r in rows if "error" not in r] or rows


def _error(row: Row) -> str:
    """Its beginning: all of it stands in the row."""
    error = row["error"].replace("|", "/").replace("`", "'")
    return f"does not run: {shorten(error, LETTERS, placeholder=' …')}"


def _gigabytes_of(rows: Rows) -> str:
    if "our_bytes" not in rows[0]:
        return ""
    return f"{_median(rows, 'baseline_bytes') / 1e9:.2f}, {_median(rows, 'our_bytes') / 1e9:.2f}"


def _errors_of(row: Row) -> str:
    rule = " (absmax)" if row.get("weights") == "absmax" else ""  # not the error of our default's search
    return f"{row['baseline_l2']:.3f}, {row['our_l2']:.3f}{rule}"


def _breakdown_table(rows: Rows) -> str:
    """A line a side: its step and where it goes."""
    titles = " | ".join(TITLES.values())
    lines = [
        "Where a step at 1024 x 1024 goes, in ms (profiler). BF16's products of one row are counted as "
        f"{TITLES[MODULATION]} only where cuBLAS has a kernel of that name for them.",
        "",
        f"| side | step | {titles} | kernels |",
        "| --- " * (len(TITLES) + 3) + "|",
    ]
    for case in dict.fromkeys(r["case"] for r in rows):
        some = [r for r in rows if r["case"] == case]
        kinds = [f"{_median(some, kind):.1f}" for kind in TITLES]
        side = case.removeprefix(BREAKDOWN).replace("_", " ")
        lines.append(f"| {side} | {_value(some, 'ours')} | {' | '.join(kinds)} | {_median(some, 'kernels'):,.0f} |")
    return "\n".join(lines)


def breakdown_of(rows: Rows) -> dict[str, dict[str, float]]:
    """{side: {kind: milliseconds}}, medians over the newest machine's runs: what the picture shows."""
    rows = [r for r in current(on_gpus(rows), "model") if r["case"].startswith(BREAKDOWN)]
    return {
        case.removeprefix(BREAKDOWN): {kind: _median([r for r in rows if r["case"] == case], kind) for kind in TITLES}
        for case in dict.fromkeys(r["case"] for r in rows)
    }


def _median(rows: Rows, key: str) -> float:
    return median(r[key] for r in rows)


def _value(rows: Rows, key: str) -> str:
    return _number(_median(rows, key), rows[0]["unit"])


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e9:.2f}"
    return f"{value:.1f}" if unit == "ms" else f"{value:.2f}"


def _spread(rows: Rows, low: str, high: str) -> str:
    if low not in rows[0]:
        return ""
    return f"{_value(rows, low)}–{_value(rows, high)}"


# bars


def _at(size: int) -> Callable[[Row], bool]:
    return lambda row: (row["shape"]["height"], row["shape"]["width"], row["shape"]["batch"]) == (size, size, 1)


def _milliseconds(rows: Rows) -> str:
    """The ratio is rounded to the side that flatters less."""
    ratio = math.floor(round(_median(rows, "ratio") * 100, 6)) / 100
    return f"{_value(rows, 'ours')} ms against {_value(rows, 'baseline')} ms, {ratio:.2f}x"


def _against_paper(rows: Rows) -> str:
    """Beyond the bar: the paper's own figure, against its kind of baseline."""
    reached = "reached" if _median(rows, "ratio") >= PAPER else "not reached"
    return f"{_milliseconds(rows)} ({PAPER}x {reached})"


def _gigabytes(rows: Rows) -> str:
    return f"{math.ceil(_median(rows, 'ours') / 1e7) / 100:.2f} GB against {_value(rows, 'baseline')} GB"


def _rotate(rows: Rows) -> str:
    return f"{math.ceil(_median(rows, ROTATE) * 100) / 100:.2f} ms"


def _more(rows: Rows) -> str:
    more = math.ceil((_median(rows, "ours") / _median(rows, "baseline") - 1) * 1000) / 10
    return f"{_value(rows, 'ours')} ms against {_value(rows, 'baseline')} ms, {more:.1f} % more"


def _seconds(rows: Rows) -> str:
    return f"{math.ceil(_median(rows, 'ours') * 10) / 10:.1f} s"


def _step(case: str, bar: float, size: int = 1024) -> Check:
    return Check(case, constant(bar), _at(size), text=_milliseconds)


BARS: tuple[tuple[str, str, Check], ...] = (
    ("step at 1024 x 1024, both compiled", ">= 1.6x BF16", _step("flux_step_compiled", 1.6)),
    (
        "the same, compiled against BF16 eager",
        f">= 2.1x, then {PAPER}x",
        Check("flux_step_compiled_vs_eager", constant(2.1), _at(1024), text=_against_paper),
    ),
    ("the same, both eager", ">= 1.4x", _step("flux_step_eager", 1.4)),
    ("the same, both as CUDA graphs", ">= 1.6x", _step("flux_step_graph", 1.6)),
    ("step at 512 x 512, the best of both", ">= 1.55x", _step("flux_step_best", 1.55, 512)),
    (
        "rotate + quantize in a step at 1024 x 1024",
        "<= 6 ms",
        Check("breakdown/ours_compiled", constant(6), _at(1024), figure=ROTATE, at_most=True, text=_rotate),
    ),
    ("step at 2048 x 2048, both compiled", ">= 1.25x", _step("flux_step_compiled", 1.25, 2048)),
    (
        "attention in 8 bits (an option), compiled against BF16 eager",
        f">= {PAPER}x; moonshot 2.6x",
        _step(f"{PREFIX}_compiled_vs_bf16_eager", PAPER),
    ),
    ("the same, both compiled", ">= 1.6x; moonshot 2x", _step(f"{PREFIX}_compiled_vs_bf16", 1.6)),
    ("the same, both as CUDA graphs", ">= 1.6x; moonshot 2x", _step(f"{PREFIX}_graph_vs_bf16", 1.6)),
    ("the same at 2048 x 2048, both compiled", ">= 1.25x", _step(f"{PREFIX}_compiled_vs_bf16", 1.25, 2048)),
    (
        "weights in GPU memory",
        "<= 6.1 GB",
        Check("flux_weights", constant(6.1e9), figure="ours", at_most=True, text=_gigabytes),
    ),
    (
        "peak in a step at 1024 x 1024",
        "<= 6.6 GB",
        Check("flux_peak", constant(6.6e9), _at(1024), figure="ours", at_most=True, text=_gigabytes),
    ),
    *(
        (
            f"a LoRA of rank 16 on all attention layers, {how}",
            "<= 10 % of a step; target 6 %",
            Check(f"lora_rank16{case}", constant(1 / 1.1), _at(1024), text=_more),
        )
        for how, case in (("eager", ""), ("CUDA graph", "_graph"))
    ),
    (
        "`convrot quantize` of the 24 GB folder, in page cache",
        "<= 60 s",
        Check("flux_convert", constant(60), figure="ours", at_most=True, text=_seconds),
    ),
    *(
        (
            f"its memory, {where}",
            "<= 3 GB",
            Check(f"flux_convert_{key}_peak", constant(3e9), figure="ours", at_most=True, text=_gigabytes),
        )
        for where, key in (("host, anonymous", "host"), ("GPU", "gpu"))
    ),
)


def model_bars_table(rows: Rows) -> str:
    """What, its bar, and what the newest GPU's runs measured."""
    rows = current(on_gpus(rows), "model")
    if not rows:
        return NOTHING
    lines = ["| FLUX.1-dev, batch 1 | bar | measured |", "| --- | --- | --- |"]
    lines += [f"| {what} | {bar} | {check.measured(rows)} |" for what, bar, check in BARS]
    for peer in PEERS:
        what = f"step at 1024 x 1024 against {peer.title}"
        lines.append(f"| {what} | faster; target {TARGET}x | {_peer(rows, peer.name)} |")
    return "\n".join([_head(rows), "", *lines])


def _peer(rows: Rows, name: str) -> str:
    """Faster is the bar; the target is only said."""
    rows = _that_ran([r for r in rows if r["case"] == PEER + name])
    if not rows:
        return "not measured yet"
    if "error" in rows[0]:
        return _error(rows[0])
    ratio = _median(rows, "ratio")
    target = f"target {'✓' if ratio >= TARGET else 'not reached'}"
    return f"{_milliseconds(rows)} {MET if ratio > 1 else MISSED}; {target}"
