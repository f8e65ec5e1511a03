"""Tables of the op benchmarks: every figure (docs/benchmarks.md), and the bars with what was measured (README)."""

from collections.abc import Callable
from statistics import median

from convrot_bench.bars import Check, Row, Rows, by_shape, constant, current, head, named, on_gpus
from convrot_bench.survey_tables import is_extra

NOTHING = "No op runs are committed yet."


# every figure


def ops_table(rows: Rows) -> str:
    """A table a case, a line a shape and backend."""
    rows = [r for r in rows if r["bench"] == "ops" and not is_extra(r)]
    if not rows:
        return NOTHING
    parts = []
    for gpu in dict.fromkeys(r["gpu"] for r in rows):
        some = current([r for r in rows if r["gpu"] == gpu], "ops")
        parts.append(head(some))
        parts += [
            _case_table([r for r in some if r["case"] == case]) for case in dict.fromkeys(r["case"] for r in some)
        ]
    return "\n\n".join(parts)


def _case_table(rows: Rows) -> str:
    first = rows[0]
    lines = [
        f"`{first['case']}`, in {first['unit']}; baseline: {first['baseline_name']}",
        "",
        "| shape | backend | ours | baseline | times | speed | more |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for some in by_shape(rows).values():
        ours, baseline, times = (median(r[key] for r in some) for key in ("ours", "baseline", "ratio"))
        cells = (_number(ours), _number(baseline), f"{times:.2f}", _speed(some), _more(some))
        lines.append(f"| {named(some[0]['shape'])} | {some[0]['backend']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _speed(rows: Rows) -> str:
    for field, unit in (("tops", "TOPS"), ("gb_s", "GB/s")):
        if field in rows[0]:
            speed = median(r[field] for r in rows)
            return f"{speed:,.0f} {unit}" if speed >= 10 else f"{speed:.3g} {unit}"
    return ""


def _more(rows: Rows) -> str:
    """What else a reader of this row has to know."""
    first, more = rows[0], []
    if "over_plain" in first:
        more.append(f"{median(r['over_plain'] for r in rows):.2f} times the plain op")
    if "apart_us" in first:
        more.append(f"{median(r['apart_us'] for r in rows):.0f} us apart")
    if "our_l2" in first:
        more.append(f"relative error {first['our_l2']:.3f}, theirs {first['baseline_l2']:.3f}")
    if "bits_per_weight" in first:
        more.append(f"{first['bits_per_weight']:g} bits a weight, {first['scale_bytes']:,} bytes of scales")
    if any(str(r.get("timing")).startswith("cuda events") for r in rows):
        more.append("timed by events")
    return "; ".join(more)


# bars


def _square(square: float, others: float) -> Callable[[Row], float]:
    return lambda shape: square if (shape["N"], shape["K"]) == (3072, 3072) else others


def _product(m: int, triton: bool = False, least: int = 0) -> Callable[[Row], bool]:
    """Rows of M tokens and N or K of at least `least`, of Triton or of the compiled backend."""

    def where(row: Row) -> bool:
        shape = row["shape"]
        return shape["M"] == m and (row["backend"] == "triton") == triton and max(shape["N"], shape["K"]) >= least

    return where


def _prologue(name: str, k: int | None = None) -> Callable[[Row], bool]:
    """Rows of at least 4096 tokens, and codes in the default form."""

    def where(row: Row) -> bool:
        shape = row["shape"]
        plain = shape["M"] >= 4096 and "bits" not in shape and "packed" not in shape
        return plain and shape["prologue"] == name and k in (None, shape["K"])

    return where


def _op(name: str) -> Callable[[Row], bool]:
    return lambda row: row["shape"]["op"] == name


def _widest_gemv(row: Row) -> bool:
    return (row["shape"]["M"], row["shape"]["N"]) == (1, 18432)


def _microseconds(rows: Rows) -> str:
    return f"{median(r['ours'] for r in rows):.1f} us against {median(r['baseline'] for r in rows):.1f} us"


def _nothing(rows: Rows) -> str:
    return ""


def _bits(rows: Rows) -> str:
    row = rows[0]
    return f"{row['bits_per_weight']:g} bits, {row['scale_bytes']:,} bytes of scales for {named(row['shape'])}"


_PEER = "linear_w4a4_vs_comfy_kitchen"
BARS: tuple[tuple[str, str, tuple[Check, ...]], ...] = (
    (
        "GEMM alone at M=4608, FLUX's six (N, K)",
        ">= 1.75x torch.matmul bf16 (1.70x at 3072x3072); all 304 GEMMs of a step as one graph >= 1.8x (moonshot 1.9x)",
        (
            Check("gemm_w4a4", _square(1.70, 1.75), _product(4608), shapes=6),
            Check("gemm_step", constant(1.8), label="step"),
            Check("gemm_step", constant(1.9), label="moonshot 1.9x", text=_nothing, missed="not reached"),
        ),
    ),
    (
        "whole op: rotate + quantize + GEMM + bias at M=4608",
        ">= 1.5x F.linear bf16 (1.4x at 3072x3072), and >= 1.9x comfy-kitchen (2.6x at 3072x3072)",
        (
            Check("linear_w4a4", _square(1.4, 1.5), _product(4608), shapes=6),
            Check(_PEER, _square(2.6, 1.9), _product(4608), label="comfy-kitchen", shapes=6),
        ),
    ),
    (
        "M=512, same shapes",
        ">= 1.1x whole op where N or K >= 9216, and never below 0.85x",
        (
            Check("linear_w4a4", constant(1.1), _product(512, least=9216), label="N or K >= 9216", shapes=5),
            Check("linear_w4a4", constant(0.85), _product(512), label="all", shapes=6),
        ),
    ),
    (
        "M=1, N=18432, W4A16 GEMV",
        ">= 3x bf16",
        (Check("gemv_w4a16", constant(3), _widest_gemv),),
    ),
    (
        "rotate_quantize, compiled",
        "at M >= 4096 >= 85 % of the speed of a copy of the same bytes (no prologue); Triton >= 45 %; "
        "at K=3072 with GELU at most 35 %, with LayerNorm + modulate at most 60 % more time",
        (
            Check("rotate_quantize", constant(0.85), _prologue("none"), shapes=6),
            Check("rotate_quantize_triton", constant(0.45), _prologue("none"), label="Triton", shapes=6),
            Check(
                "rotate_quantize", constant(1.35), _prologue("gelu", 3072), "GELU", 2, "over_plain", at_most=True
            ),
            Check(
                "rotate_quantize", constant(1.60), _prologue("modulate", 3072), "LayerNorm + modulate", 2,
                "over_plain", at_most=True,
            ),
        ),
    ),
    (
        "Triton scaled_mm at M=4608",
        ">= 1.2x torch.matmul bf16",
        (Check("gemm_w4a4", constant(1.2), _product(4608, triton=True), shapes=6),),
    ),
    (
        "weights in GPU memory",
        "4.0 bits a weight plus scales",
        (Check("weight_bits", constant(4.0), figure="bits_per_weight", at_most=True, text=_bits),),
    ),
    (
        "host cost of an op, M=64",
        "at most F.linear bf16's",
        tuple(
            Check("host_cost", constant(1), _op(op), label=op, text=_microseconds)
            for op in ("rotate_quantize", "scaled_mm")
        ),
    ),
)  # fmt: skip


def bars_table(rows: Rows) -> str:
    """What, its bar, and what the newest GPU's runs measured."""
    rows = current([r for r in on_gpus(rows) if not is_extra(r)], "ops")
    if not rows:
        return NOTHING
    lines = ["| what | bar | measured |", "| --- | --- | --- |"]
    for what, bar, checks in BARS:
        lines.append(f"| {what} | {bar} | {'; '.join(check.measured(rows) for check in checks)} |")
    return "\n".join([head(rows), "", *lines])
