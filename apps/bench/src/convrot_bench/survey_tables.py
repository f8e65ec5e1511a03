"""Tables of what `convrot-bench ops` measures beside the bars: survey, steps of a linear, rotations, other projects."""

from collections.abc import Callable
from statistics import median

from convrot_bench.bars import Row, Rows, by_shape, current, head, named

SURVEY, CEILING, BREAKDOWN, ROTATIONS, PEERS = "survey/", "ceiling/", "breakdown", "rotations/", "peers/"
ATTENTION = {"attention_fp8": "attention", "attention_fp8_with_norm": "norm, rotary embedding and attention"}
STEPS = {
    "rotate": "rotate", "scale": "scale", "quantize": "quantize", "pack": "pack (not in the sum)", "gemm": "GEMM",
    "epilogue": "epilogue",
}  # fmt: skip


def is_extra(row: Row) -> bool:
    """Whether a row of ops is none of the bars' cases."""
    return row["case"] in (BREAKDOWN, *ATTENTION) or row["case"].startswith((SURVEY, CEILING, ROTATIONS, PEERS))


def rows_of(rows: Rows, case: str) -> Rows:
    """The rows of one kind that count: of the newest machine and commit."""
    kept = [
        r for r in rows if r["bench"] == "ops" and r["case"].startswith(case) and (r["case"] == case or "/" in case)
    ]
    return current(kept, "ops")


def middle(rows: Rows, key: str) -> float:
    """The median over runs."""
    return median(r[key] for r in rows)


def notes_of(rows: Rows) -> list[str]:
    """What a reader of these rows has to know: the field `note` of those that have one."""
    return list(dict.fromkeys(r["note"] for r in rows if "note" in r))


def _head(rows: Rows) -> str:
    return "\n\n".join([head(rows), *notes_of(rows)])


def _micro(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _optional(rows: Rows, key: str, form: Callable[[float], str]) -> str:
    return form(middle(rows, key)) if key in rows[0] else ""


def _table(columns: tuple[str, ...], lines: list[list[str]]) -> str:
    rule = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))


def survey_table(rows: Rows) -> str:
    """A table a model, a line an op, shape and backend; what the GPU reached in the same run above."""
    some = rows_of(rows, SURVEY)
    if not some:
        return "No survey is committed yet."
    parts = [_head(some), _ceiling(rows_of(rows, CEILING))]
    for model in dict.fromkeys(r["shape"]["model"] for r in some):
        lines = [_survey_line(group) for group in groups_of([r for r in some if r["shape"]["model"] == model])]
        columns = ("op", "shape", "backend", "us", "TOPS", "GB/s", "of the ceiling", "times cuBLAS bf16")
        parts += [f"**{model}**", _table(columns, lines)]
    return "\n\n".join(parts)


def groups_of(rows: Rows) -> list[Rows]:
    """Rows of one case, shape and backend together: the same figure, of several runs."""
    cases = dict.fromkeys(r["case"] for r in rows)
    return [group for case in cases for group in by_shape([r for r in rows if r["case"] == case]).values()]


def _survey_line(rows: Rows) -> list[str]:
    first = rows[0]
    shape = {key: value for key, value in first["shape"].items() if key != "model"}
    of = f"{_share(middle(rows, 'of_ceiling'))} of {first['ceiling']}"
    times = f"{middle(rows, 'ratio'):.2f}" if first["baseline_name"].endswith("bf16") else ""
    speeds = [_optional(rows, key, _micro) for key in ("tops", "gb_s")]
    return [f"`{first['case'].removeprefix(SURVEY)}`", named(shape), first["backend"], _micro(middle(rows, "ours")),
            *speeds, of, times]  # fmt: skip


def _ceiling(rows: Rows) -> str:
    """What shares are of."""
    products = [r for r in rows if r["case"] == "ceiling/int8"]
    copies = [r for r in rows if r["case"] == "ceiling/copy"]
    if not (products and copies):
        return "The ceiling of this run is not among the results."
    best = max(products, key=lambda r: float(r["tops"]))
    wide = max(r["baseline_tops"] for r in products)
    copied = max(r["gb_s"] for r in copies)
    return (
        f"The ceiling, measured in the same run: copy {copied:,.0f} GB/s, int8 products {best['tops']:,.0f} TOPS "
        f"({best['backend']}, {named(best['shape'])}), bf16 products {wide:,.0f} TFLOPS."
    )


def steps_table(rows: Rows) -> str:
    """A line a shape: every step by itself, their sum, the fused kernels."""
    some = rows_of(rows, BREAKDOWN)
    if not some:
        return "No steps of a linear are committed yet."
    columns = ("shape", *STEPS.values(), "sum", "fused rotate_quantize", "fused scaled_mm", "whole linear", "times",
               "cuBLAS bf16")  # fmt: skip
    lines = []
    for group in by_shape(some).values():
        keys = (*STEPS, "baseline", "fused_rotate_quantize", "fused_scaled_mm", "ours")
        cells = [_micro(middle(group, key)) for key in keys]
        cells += [f"{middle(group, 'ratio'):.2f}", _micro(middle(group, "bf16"))]
        lines.append([named(group[0]["shape"]), *cells])
    what = "Steps of a W4A4 linear as kernels of their own, and ours that fuse them, in us; times: the sum over ours."
    return "\n\n".join([_head(some), what, _table(columns, lines)])


def rotations_table(rows: Rows) -> str:
    """A line a shape and way to rotate."""
    some = rows_of(rows, ROTATIONS)
    if not some:
        return "No comparison of rotations is committed yet."
    columns = ("shape", "other way", "theirs, us", "`rotate`, us", "times", "`rotate_quantize`, us", "theirs, GB/s",
               "ours, GB/s")  # fmt: skip
    lines = []
    for group in groups_of(some):
        first = that_ran(group)[0]
        theirs = [_error(first), ""] if "error" in first else [_micro(middle(group, "baseline")), _times(group)]
        cells = [named(first["shape"]), first["baseline_name"], theirs[0], _micro(middle(group, "ours")), theirs[1]]
        cells += [_micro(middle(group, "fused"))]
        lines.append([*cells, *(_optional(group, key, _micro) for key in ("baseline_gb_s", "gb_s"))])
    what = (
        "Blocks of 256 columns, bf16 to bf16; `rotate_quantize` writes 4-bit codes, and is what a quantized layer runs."
    )
    return "\n\n".join([_head(some), what, _table(columns, lines)])


def peers_table(rows: Rows) -> str:
    """A line a shape and peer."""
    some = rows_of(rows, PEERS)
    if not some:
        return "No comparison with other projects' layers is committed yet."
    columns = ("shape", "peer", "version", "theirs, us", "ours, us", "times", "rel. L2: theirs, ours")
    lines = []
    for group in groups_of(some):
        first = that_ran(group)[0]
        theirs = [_error(first), ""] if "error" in first else [_micro(middle(group, "baseline")), _times(group)]
        errors = f"{first['baseline_l2']:.3f}, {first['our_l2']:.3f}" if "baseline_l2" in first else ""
        lines.append([named(first["shape"]), first["baseline_name"], first["peer_version"], theirs[0],
                      _micro(middle(group, "ours")), theirs[1], errors])  # fmt: skip
    what = (
        "Products of PyTorch against `scaled_mm`, layers of other projects against the whole op: rotate, quantize, "
        "multiply, bias."
    )
    return "\n\n".join([_head(some), what, _table(columns, lines)])


def attention_rows(rows: Rows) -> Rows:
    """Those of both ways to measure attention."""
    return [r for case in ATTENTION for r in rows_of(rows, case)]


def attention_ops_table(rows: Rows) -> str:
    """A line a number of tokens, for attention alone and for what makes its operands too."""
    some = attention_rows(rows)
    if not some:
        return "No attention in 8 bits is committed yet."
    columns = ("what", "shape", "8 bits, us", "16 bits, us", "times", "8 bits, TFLOPS", "16 bits, TFLOPS",
               "rel. L2: 8 bits, 16 bits")  # fmt: skip
    lines = []
    for group in groups_of(some):
        first = group[0]
        keys = ("tflops", "baseline_tflops")
        errors = f"{middle(group, 'relative_l2'):.3f}, {middle(group, 'baseline_relative_l2'):.4f}"
        lines.append([ATTENTION[first["case"]], named(first["shape"]), _micro(middle(group, "ours")),
                      _micro(middle(group, "baseline")), _times(group),
                      *(_micro(middle(group, key)) for key in keys), errors])  # fmt: skip
    what = (
        "`attention_fp8` against cuDNN in bf16, alone and behind `norm_rope_fp8`, `norm_rope`, on Gaussian values; "
        "relative L2 against attention in fp32."
    )
    return "\n\n".join([_head(some), what, _table(columns, lines)])


def that_ran(rows: Rows) -> Rows:
    """Rows with a figure of the baseline, or all where there is none."""
    return [r for r in rows if "error" not in r] or rows


def _times(rows: Rows) -> str:
    return f"{middle(rows, 'ratio'):.2f}"


def _error(row: Row) -> str:
    if row["error"].startswith("ModuleNotFoundError"):
        return "not installed there"
    return f"does not run: {row['error'].replace('|', '/')}"
