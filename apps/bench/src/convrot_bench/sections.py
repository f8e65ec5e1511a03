"""The chapters of the HTML report, in order: each a function of the rows, which leaves itself out where it has none."""

import math
from collections.abc import Callable

from convrot_bench import html
from convrot_bench.bars import Rows, by_shape, current, on_gpus
from convrot_bench.breakdown_plot import COLORS
from convrot_bench.charts import Chart, bars, stacks
from convrot_bench.html import Card, Section, Source, markdown
from convrot_bench.model.kernels import TITLES
from convrot_bench.model_speed import PEER, breakdown_of, model_bars_table, model_table
from convrot_bench.quality import section
from convrot_bench.quality.bars import quality_bars_table
from convrot_bench.quality.images import most_steps
from convrot_bench.quality.tables import (
    layers_table,
    quality_full_table,
    quality_levers_table,
    quality_synthetic_table,
)
from convrot_bench.speed import bars_table, ops_table
from convrot_bench.survey_sections import BACKENDS, attention, peers, rotations, steps, survey
from convrot_bench.survey_tables import is_extra, middle, that_ran


def _of(source: Source, bench: str) -> Rows:
    """What counts of a bench; of ops the cases of the bars."""
    return current([r for r in on_gpus(source.rows) if not is_extra(r)], bench)


def _at(rows: Rows, case: str, **shape: object) -> Rows:
    """Rows of a case whose shape has these values."""
    return [r for r in rows if r["case"] == case and shape.items() <= r["shape"].items()]


# at a glance


def summary(source: Source) -> Section | None:
    """The bars, and one number each of speed, memory and loading."""
    model, ops = _of(source, "model"), _of(source, "ops")
    if not (model or ops):
        return None
    square = {"height": 1024, "width": 1024, "batch": 1}
    wanted = (
        (_at(model, "flux_step_compiled", **square), "faster step of FLUX.1-dev", "1024 x 1024, both compiled", _ms),
        (_at(model, "flux_weights"), "less memory for weights", "FLUX.1-dev's transformer", _gigabytes),
        (_at(model, "flux_peak", **square), "lower peak in a step", "1024 x 1024, weights included", _gigabytes),
        (_at(ops, "gemm_step"), "faster products", "the 304 of a FLUX.1-dev step, cuBLAS bf16", _ms),
        (_at(model, "flux_load"), "faster loading", "a saved model, files in memory", _seconds),
    )
    cards = [_card(*one) for one in wanted if one[0]]
    cards += _captions(most_steps(source.rows))
    parts = []
    if model:
        parts += [markdown("### Whole models"), markdown(model_bars_table(source.rows))]
    if ops:
        parts += [markdown("### Kernels"), markdown(bars_table(source.rows))]
    intro = "BF16 on the same card in the same process is the baseline; bars were set before the runs."
    return Section("summary", "At a glance", intro, cards, parts=parts)


def _captions(rows: Rows) -> list[Card]:
    """How many captions a judge reads in the pictures, of the rows that the quality tables show."""
    found = [_at(rows, f"{name}/caption_accuracy") for name in ("ours_w4a4", "bf16")]
    if not all(found):
        return []
    ours, wide = (100 * middle(some, "ours") for some in found)
    how = f"{wide:.1f} % in BF16; {rows[0]['shape']['prompts']} captions, mini-flux"
    return [Card(f"{ours:.1f} %", "of captions drawn right", how)]


def _card(rows: Rows, what: str, where: str, figures: Callable[[Rows], str]) -> Card:
    times = math.floor(round(100 * middle(rows, "ratio"), 6)) / 100  # to the side that flatters less, as bars are
    return Card(f"{times:.2f}x", what, f"{figures(rows)}; {where}")


def _both(rows: Rows, factor: float, digits: int, unit: str) -> str:
    ours, theirs = (f"{middle(rows, key) * factor:.{digits}f} {unit}" for key in ("ours", "baseline"))
    return f"{ours} against {theirs}"


def _ms(rows: Rows) -> str:
    return _both(rows, 1, 1, "ms")


def _seconds(rows: Rows) -> str:
    return _both(rows, 1, 1, "s")


def _gigabytes(rows: Rows) -> str:
    return _both(rows, 1e-9, 2, "GB")


# whole models


def models(source: Source) -> Section | None:
    """Steps by size and batch, where a step goes, other projects."""
    rows = _of(source, "model")
    if not rows:
        return None
    charts = [chart for make in (_by_size, _where, _peer_steps) if (chart := make(source, rows))]
    intro = "Real configurations with random weights: honest time and memory, no quality."
    parts = [markdown(model_table(source.rows), "Every figure of whole models")]
    return Section("models", "Whole models", intro, charts=charts, parts=parts)


def _by_size(source: Source, rows: Rows) -> Chart | None:
    names = {"flux_step_compiled": "both compiled", "flux_step_best": "the best of both"}
    values: dict[str, dict[str, float]] = {}
    some = [r for r in rows if r["case"] in names]
    order = list(names)
    for r in sorted(some, key=lambda r: (r["shape"]["height"], r["shape"]["batch"], order.index(r["case"]))):
        label = f"{r['shape']['height']} x {r['shape']['width']}, batch {r['shape']['batch']}"
        group = _at(rows, r["case"], **r["shape"])
        values.setdefault(label, {})[names[r["case"]]] = middle(group, "ratio")
    title = "A FLUX.1-dev step against BF16, by size and batch: how many times faster"
    return bars(title, values, "times faster than BF16", at=1) if values else None


def _where(source: Source, rows: Rows) -> Chart | None:
    sides = {
        side.replace("_", ", ").replace("bf16", "BF16"): {TITLES[kind]: ms for kind, ms in kinds.items()}
        for side, kinds in breakdown_of(source.rows).items()
    }
    title = "Where one FLUX.1-dev step at 1024 x 1024 goes"
    return stacks(title, sides, "ms", colors=COLORS) if sides else None


def _peer_steps(source: Source, rows: Rows) -> Chart | None:
    values: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys(r["case"] for r in rows if r["case"].startswith(PEER)):
        some = that_ran([r for r in rows if r["case"] == case])
        if "error" not in some[0]:
            values[some[0]["baseline_name"]] = {"theirs": middle(some, "baseline"), "ours": middle(some, "ours")}
    title = "Other projects from the same weights: a step at 1024 x 1024"
    return bars(title, values, "ms a step", form="{:.1f}", base="theirs") if values else None


# ops


def ops(source: Source) -> Section | None:
    """The cases of the bars."""
    rows = _of(source, "ops")
    if not rows:
        return None
    charts = []
    for case, title in (
        ("gemm_w4a4", "The product alone against torch.matmul bf16, M=4608"),
        ("linear_w4a4", "The whole op (rotate, quantize, multiply, bias) against F.linear bf16, M=4608"),
    ):
        if some := _at(rows, case, M=4608):
            charts.append(bars(title, _ratios(some, ("N", "K")), "times faster", at=1))
    copied = [
        r
        for r in rows
        if r["case"].startswith("rotate_quantize") and r["shape"].get("M") == 4608
        and not {"bits", "packed"} & r["shape"].keys()
    ]  # fmt: skip
    if copied:
        title = "Rotate and quantize, M=4608: speed as a share of a copy of the same bytes"
        charts.append(bars(title, _ratios(copied, ("K", "prologue")), "share of the copy", at=1))
    parts = [markdown(ops_table(source.rows), "Every figure of the kernels")]
    return Section("kernels", "Kernels", charts=charts, parts=parts)


def _ratios(rows: Rows, keys: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Label of a shape -> backend -> median ratio."""
    values: dict[str, dict[str, float]] = {}
    for group in by_shape(rows).values():
        shape = group[0]["shape"]
        label = ", ".join(str(shape[key]) if key == "prologue" else f"{key}={shape[key]}" for key in keys)
        values.setdefault(label, {})[BACKENDS[group[0]["backend"]]] = middle(group, "ratio")
    return values


# quality, sources


def quality(source: Source) -> Section | None:
    """The tables of docs/quality.md, and the charts that the quality suite has."""
    rows = [r for r in source.rows if r["bench"] == "quality"]
    if not rows:
        return None
    parts = [markdown(quality_bars_table(source.rows)), markdown(quality_full_table(source.rows))]
    parts += section.pictures(source.images) if source.images else []
    parts += [
        markdown(quality_levers_table(source.rows), "What each lever brings"),
        markdown(quality_synthetic_table(source.rows), "Generated layers of FLUX's shapes"),
        markdown(layers_table(source.rows), "Every layer's error"),
    ]
    return Section("quality", "Quality", charts=section.charts(source.rows), parts=parts)


def sources(source: Source) -> Section | None:
    """Machines, runs and the files with the raw rows."""
    lines = ["| machine | driver | torch | triton | benches | commits | dates |", "| --- " * 7 + "|"]
    machines: dict[tuple[str, ...], Rows] = {}
    for r in source.rows:
        machines.setdefault((r["gpu"], r["driver"], r["torch"], r["triton"]), []).append(r)
    for facts, rows in machines.items():
        benches, commits = (", ".join(dict.fromkeys(r[key] for r in rows)) for key in ("bench", "commit"))
        days = sorted({r["date"][:10] for r in rows})
        lines.append(
            f"| {' | '.join((*facts, benches, commits))} | {' to '.join(dict.fromkeys((days[0], days[-1])))} |"
        )
    runs = ["| file | rows | run | date | commit | command |", "| --- " * 6 + "|"]
    for file, rows in source.files.items():
        for run in dict.fromkeys(r["run_id"] for r in rows):
            some = [r for r in rows if r["run_id"] == run]
            first = some[0]
            day = first["date"].replace("T", " ")[:16]
            cells = [f"[{file}]({file})", str(len(some)), f"`{run}`", day, first["commit"], f"`{first['command']}`"]
            runs.append(f"| {' | '.join(cells)} |")
    parts = [markdown("\n".join(lines)), markdown("### Raw rows"), markdown("\n".join(runs))]
    intro = "One JSON object a line: the figure, its baseline, its shape, and the facts of the machine."
    return Section("sources", "Machines and raw rows", intro, parts=parts)


SECTIONS: tuple[html.MakeSection, ...] = (
    summary, html.changes, models, ops, survey, steps, rotations, peers, attention, quality, sources,
)  # fmt: skip
