"""Quality tables of README and docs/quality.md, from committed rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from convrot_bench.bars import Rows, current, on_gpus
from convrot_bench.quality.methods import BASELINE, METHODS
from convrot_bench.quality.synthetic_suite import MODEL as SYNTHETIC

LEVER = "lever_"
MINI_FLUX = "weights"  # rows name a model by its folder
# README: the paper, its rivals, and what a user of this project gets
SHORT = ("bf16", "rtn", "sylvester256", "paper_w4a4", "svdquant_style", "ours_w4a4", "ours_w4a8", "ours_w8a8")
KINDS = {  # of the generated layers' inputs, as columns of their table
    "gaussian": "Gaussian", "channel_outliers": "channel outliers", "token_outliers": "token outliers",
    "adaln_shifted": "AdaLN shift", "gelu_inputs": "GELU", "heavy_tails": "heavy tails", "proj_out": "proj_out",
}  # fmt: skip
FACTS = (  # of a method, from its newest row
    "title", "emulated", "layers", "layers_planned", "worst_layer", "worst_layer_l2", "multiplied",
    "layer_l2",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of figures: its title, the case it shows, how a value is written."""

    title: str
    case: str
    form: Callable[[float], str]


_SHARE = "{:.1%}".format
ERROR = Column("layer rel. L2, median", "layer_l2_median", "{:.3f}".format)
P95 = Column("p95", "layer_l2_p95", "{:.3f}".format)
PSNR, SSIM = Column("PSNR dB", "psnr_db", "{:.2f}".format), Column("SSIM", "ssim", "{:.3f}".format)
LPIPS, FID = Column("LPIPS", "lpips", "{:.3f}".format), Column("FID", "fid", "{:.3f}".format)
READ = (
    Column("object", "object", _SHARE), Column("colour", "color", _SHARE), Column("relation", "relation", _SHARE),
    Column("all three", "caption_accuracy", _SHARE),
)  # fmt: skip
SCORES = (Column("CLIP", "clip_score", "{:.2f}".format), Column("ImageReward", "image_reward", "{:.3f}".format))
BYTES = Column("MB", "bytes", lambda b: f"{b / 1e6:.1f}")
BRIEF = (ERROR, PSNR, SSIM, FID, READ[-1], BYTES)
FULL = (ERROR, P95, PSNR, SSIM, LPIPS, FID, *READ, *SCORES, BYTES)


def reported(rows: Rows) -> Rows:
    """Rows of pipelines that tables show: a GPU's if there are any, of the report's captions, the most of them.

    Rows of earlier versions name no split: their captions are the report's, and newer rows come before them.
    """
    rows = [r for r in rows if r["bench"] == "quality" and r["shape"]["model"] != SYNTHETIC]
    rows = [r for r in rows if r["shape"].get("split", "report") == "report"]
    rows = on_gpus(rows) or rows
    rows = [r for r in rows if "split" in r["shape"]] or rows
    most: dict[str, int] = {}
    for row in rows:
        shape = row["shape"]
        most[shape["model"]] = max(shape["prompts"], most.get(shape["model"], 0))
    return current([r for r in rows if r["shape"]["prompts"] == most[r["shape"]["model"]]], "quality")


def mini_flux(rows: Rows) -> Rows:
    """The reported rows of the shipped pipeline, which has the judge and the bars."""
    return [r for r in reported(rows) if r["shape"]["model"] == MINI_FLUX]


def synthetic(rows: Rows) -> Rows:
    """Rows of generated layers, of the report's seeds and all outputs."""
    rows = [r for r in rows if r["bench"] == "quality" and r["shape"]["model"] == SYNTHETIC]
    return current([r for r in rows if r["shape"]["split"] == "report" and not r["shape"]["outputs"]], "quality")


def all_seeds(rows: Rows) -> Rows:
    """Of rows of generated layers those with the most seeds: bars and pictures are about these."""
    most = max((r["shape"]["seeds"] for r in rows), default=0)
    return [r for r in rows if r["shape"]["seeds"] == most]


def by_shape(rows: Rows) -> dict[str, Rows]:
    """{shape as text: its rows}, in the order of the rows."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["shape"], sort_keys=True), []).append(row)
    return groups


def figures(rows: Rows) -> dict[str, dict[str, Any]]:
    """Rows of one shape -> {method: {case: median over runs}} with title, emulated and other fields of the newest."""
    values: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        method, case = row["case"].split("/")
        values.setdefault(method, {}).setdefault(case, []).append(row["ours"])
        found.setdefault(method, {}).update({key: row[key] for key in FACTS if key in row})
    for method, cases in values.items():
        found[method] |= {case: median(measured) for case, measured in cases.items()}
    return {method: found[method] | {"title": title_of(method, found[method])} for method in ordered(found)}


def ordered(found: Mapping[str, Any]) -> list[str]:
    """BF16 first, methods in the order of METHODS, chance last."""
    order = {name: i for i, name in enumerate(["bf16", *(m.name for m in METHODS)])}
    return sorted(found, key=lambda name: order.get(name, len(order) + (name == "chance")))


def title_of(method: str, facts: Mapping[str, Any]) -> str:
    """A method as tables name it, * where it is emulated."""
    titles = {"bf16": "BF16"} | {m.name: m.title for m in METHODS}
    return str(titles.get(method) or facts.get("title") or method)


def most_steps(rows: Rows) -> Rows:
    """The reported rows of mini-flux at the most steps."""
    return max(by_shape(mini_flux(rows)).values(), key=lambda group: group[0]["shape"]["steps"], default=[])


def quality_table(rows: Rows) -> str:
    """README: a line for each method of SHORT, at the most steps that were measured."""
    rows = most_steps(rows)
    if not rows:
        return "No quality runs are committed yet."
    return _table(rows, BRIEF, [name for name in SHORT if name in figures(rows)])


def quality_full_table(rows: Rows) -> str:
    """docs/quality.md: every figure of rotations, rivals and ours, a table a step count."""
    return _tables(rows, lambda name: not name.startswith(LEVER))


def quality_levers_table(rows: Rows) -> str:
    """docs/quality.md: every lever, alone and together, between the paper's scheme and ours."""
    return _tables(rows, lambda name: name.startswith((LEVER, BASELINE, "ours_w4a4")))


def _tables(rows: Rows, wanted: Callable[[str], bool]) -> str:
    tables = []
    for group in by_shape(reported(rows)).values():
        if names := [name for name in figures(group) if wanted(name)]:
            tables.append(_table(group, FULL, names, full=True))
    return "\n\n".join(tables) or "No quality runs are committed yet."


def quality_synthetic_table(rows: Rows) -> str:
    """docs/quality.md: errors on generated layers, by the kind of their inputs; a table a number of seeds."""
    groups = sorted(by_shape(synthetic(rows)).values(), key=lambda group: -group[0]["shape"]["seeds"])
    return "\n\n".join(map(_generated, groups)) or "No runs on generated layers are committed yet."


def _generated(rows: Rows) -> str:
    titles = ["method", "multiplied", "MB", "median", "worst", *KINDS.values()]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for facts in figures(rows).values():
        mark = " *" if facts.get("emulated") else ""
        kinds = [_kind(facts["layer_l2"], kind) for kind in KINDS]
        cells = [facts["title"] + mark, facts["multiplied"], BYTES.form(facts["bytes"])]
        errors = [f"{facts[case]:.3f}" for case in ("layer_l2_median", "layer_l2_worst")]
        lines.append("| " + " | ".join([*cells, *errors, *kinds]) + " |")
    last, shape = rows[-1], rows[-1]["shape"]
    seeds = "1 seed" if shape["seeds"] == 1 else f"{shape['seeds']} seeds"
    head = (
        f"{shape['layers']} generated layers, {seeds} each, {shape['tokens']} tokens, {last['gpu']}, "
        f"torch {last['torch']}, commit {last['commit']}: relative L2 of a layer's output; median over the layers, and "
        "the mean of each kind of inputs."
    )
    return "\n".join([head, "", *lines, "", *_notes(rows, list(figures(rows).values()))])


def _kind(cases: Mapping[str, float], kind: str) -> str:
    """The mean over variants of the weight; empty where the method does not fit."""
    values = [error for name, error in cases.items() if name.split("/")[0] == kind]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _table(rows: Rows, columns: Sequence[Column], methods: Sequence[str], *, full: bool = False) -> str:
    found = figures(rows)
    columns = [c for c in columns if any(c.case in found[m] for m in methods)]
    titles = ["method", *(("layers", "multiplied") if full else ()), *(c.title for c in columns)]
    titles += ["worst layer"] if full else []
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for method in methods:
        facts = found[method]
        cells = [facts["title"] + (" *" if facts.get("emulated") else "")]
        if full:
            cells += [_layers(facts), facts.get("multiplied", "")]
        cells += [c.form(facts[c.case]) if c.case in facts else "" for c in columns]
        if full:
            cells.append(f"`{facts['worst_layer']}` {facts['worst_layer_l2']:.3f}" if "worst_layer" in facts else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([_head(rows), "", *lines, "", *_notes(rows, [found[m] for m in methods])])


def _layers(facts: Mapping[str, Any]) -> str:
    return f"{facts['layers']} of {facts['layers_planned']}" if "layers" in facts else ""


def _head(rows: Rows) -> str:
    shape, last = rows[0]["shape"], rows[-1]
    name, prompts = ("mini-flux", "held-out captions") if shape["model"] == MINI_FLUX else (shape["model"], "prompts")
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    return (
        f"{name}, {shape['prompts']} {prompts}, {shape['steps']} steps, bf16, {last['gpu']}, "
        f"torch {last['torch']}, commit {commits}, {len({r['run_id'] for r in rows})} run(s). "
        "Errors are against the BF16 pictures of the same noise."
    )


def _notes(rows: Rows, shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the marks mean, and which columns are missing for which reason."""
    notes = ["\\* emulated in fp32: no kernel runs it."] if any(facts.get("emulated") for facts in shown) else []
    missing = {case: why for r in rows for case, why in r.get("unmeasured", {}).items()}
    notes += [f"{case} is not measured here: {why}" for case, why in missing.items()]
    return ["\n\n".join(notes)] if notes else []


def layers_table(rows: Rows) -> str:
    """One line a layer, one column for each method of SHORT: relative L2 errors at the most steps."""
    rows = [r for r in rows if r.get("layer_l2") and r["case"].split("/")[0] in SHORT]
    kept = {r["case"].split("/")[0]: r for r in most_steps(rows)}
    if not kept:
        return "No run with errors of every layer is committed yet."
    errors = {title_of(name, kept[name]): kept[name]["layer_l2"] for name in ordered(kept)}
    names = list(dict.fromkeys(layer for found in errors.values() for layer in found))
    lines = ["| layer | " + " | ".join(errors) + " |", "| --- |" + " --- |" * len(errors)]
    for name in names:
        cells = [f"{found[name]:.3f}" if name in found else "16-bit" for found in errors.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([_head(list(kept.values())), "", *lines])
