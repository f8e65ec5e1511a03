"""Chapters of the HTML report on what `convrot-bench ops` measures by name: all that is none of the bars."""

from statistics import median

from convrot_bench import survey_tables
from convrot_bench.bars import Row, Rows, by_shape
from convrot_bench.charts import bars, dots, stacks
from convrot_bench.html import Section, Source, markdown
from convrot_bench.survey_tables import groups_of, middle, notes_of, rows_of

BACKENDS = {"cutlass": "compiled kernels", "triton": "Triton kernels", "reference": "PyTorch reference"}
# of the steps of a linear and the two fused kernels; stand-ins of charts.py
STEPS = ("#2a8c5a", "#c79a14", "#e66101", "#1a5fb4", "#8f4fb0", "#4aa3a3", "#b5495b")


def _noted(intro: str, rows: Rows) -> str:
    """Charts stand before the tables: what they cannot show is said above them."""
    return " ".join(filter(None, [intro, *notes_of(rows)]))


def survey(source: Source) -> Section | None:
    """One chart a model."""
    rows = rows_of(source.rows, survey_tables.SURVEY)
    if not rows:
        return None
    charts = []
    most = max(105.0, 105 * max(r["of_ceiling"] for r in rows))
    for model in dict.fromkeys(r["shape"]["model"] for r in rows):
        values: dict[str, dict[str, float]] = {}
        for group in groups_of([r for r in rows if r["shape"]["model"] == model and r["backend"] != "reference"]):
            share = 100 * median(r["of_ceiling"] for r in group)
            for r in group:
                values.setdefault(_survey_label(r), {})[BACKENDS[r["backend"]]] = share
        if values:
            charts.append(dots(f"{model}: rates as a share of this run's ceiling", values, "per cent", most=most))
    intro = (
        "Every op at the shapes of five models. Products are given as a share of the best of three large int8 products "
        "of this run, which others can exceed, all other ops as a share of its fastest copy."
    )
    parts = [markdown(survey_tables.survey_table(source.rows), "Every figure of the survey")]
    return Section("survey", "Every op, five models", _noted(intro, rows), charts=charts, parts=parts)


def _survey_label(row: Row) -> str:
    shape = row["shape"]
    size = " x ".join(str(shape[key]) for key in ("M", "N", "K") if key in shape)
    scheme = f", {shape['scheme']}" if "scheme" in shape else ""
    return f"{row['case'].removeprefix(survey_tables.SURVEY)} {size}{scheme}"


def steps(source: Source) -> Section | None:
    """What fusing is worth."""
    rows = rows_of(source.rows, survey_tables.BREAKDOWN)
    if not rows:
        return None
    values: dict[str, dict[str, float]] = {}
    for group in by_shape(rows).values():
        shape = f"{group[0]['shape']['N']} x {group[0]['shape']['K']}"
        values[f"{shape}, steps"] = {s: middle(group, s) for s in survey_tables.STEPS if s != "pack"}
        fused = {s: middle(group, f"fused_{s}") for s in ("rotate_quantize", "scaled_mm")}
        values[f"{shape}, fused"] = fused
    chart = stacks(
        "A W4A4 linear, M=4608: its steps as kernels of their own, and fused (N x K)", values, "us", colors=STEPS
    )
    intro = (
        "Each step reads what the one before it has written; fused, rotation and quantizer are one kernel, product and "
        "epilogue another."
    )
    parts = [markdown(survey_tables.steps_table(source.rows), "Every step's time")]
    return Section("steps", "Where a linear goes", _noted(intro, rows), charts=[chart], parts=parts)


def rotations(source: Source) -> Section | None:
    """Ours against dense products and butterflies."""
    rows = rows_of(source.rows, survey_tables.ROTATIONS)
    if not rows:
        return None
    values: dict[str, dict[str, float]] = {}
    for group in by_shape(rows).values():
        line = values.setdefault(f"{group[0]['shape']['M']} x {group[0]['shape']['K']}", {})
        for r in group:
            line["rotate (ours)"], line["rotate_quantize (ours)"] = r["ours"], r["fused"]
        line |= {r["baseline_name"]: r["baseline"] for r in group if r["baseline"] is not None}
    chart = bars("Rotating blocks of 256 columns, bf16 (M x K)", values, "us", form="{:.1f}")
    parts = [markdown(survey_tables.rotations_table(source.rows), "Every way to rotate")]
    return Section("rotations", "Ways to rotate", _noted("", rows), charts=[chart], parts=parts)


def peers(source: Source) -> Section | None:
    """int8 and fp8 of PyTorch, layers of other projects."""
    rows = rows_of(source.rows, survey_tables.PEERS)
    if not rows:
        return None
    values: dict[str, dict[str, float]] = {}
    for r in rows:
        if r["ratio"] is not None:
            shape = f"N={r['shape']['N']}, K={r['shape']['K']}"
            values.setdefault(r["baseline_name"], {})[shape] = r["ratio"]
    chart = [bars("Ours against each, M=4608: how many times faster", values, "times faster", at=1)] if values else []
    parts = [markdown(survey_tables.peers_table(source.rows), "Every figure of the others")]
    intro = (
        "Products of PyTorch against our product alone, layers of other projects against the whole op. Ours has 4 bits "
        "on both sides and the largest error, which the table has too."
    )
    return Section("peers", "Other products and layers", _noted(intro, rows), charts=chart, parts=parts)


def attention(source: Source) -> Section | None:
    """8-bit operands against 16-bit ones."""
    rows = survey_tables.attention_rows(source.rows)
    if not rows:
        return None
    values: dict[str, dict[str, float]] = {}
    for group in groups_of(rows):
        line = values.setdefault(f"{group[0]['shape']['tokens']} tokens", {})
        line[survey_tables.ATTENTION[group[0]["case"]]] = middle(group, "ratio")
    chart = bars("Attention in 8 bits against 16: how many times faster", values, "times faster", at=1)
    parts = [markdown(survey_tables.attention_ops_table(source.rows), "Every figure of attention")]
    return Section("attention", "Attention in 8 bits", _noted("", rows), charts=[chart], parts=parts)
