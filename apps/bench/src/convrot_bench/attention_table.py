"""The table of steps whose attention has 8-bit operands (docs/benchmarks.md): a line a size and way to run."""

from statistics import median

from convrot_bench.bars import Rows, by_shape

PREFIX = "fp8_attention"


def is_attention(case: str) -> bool:
    """Whether a case is of fp8_attention_."""
    return case.startswith(PREFIX)


def attention_table(rows: Rows) -> str:
    """Against ours without it first, then against BF16."""
    counts = " or ".join(map(str, sorted({r["runs"] for r in rows})))
    lines = [
        "FLUX.1-dev with attention in 8 bits (`fp8_attention_`), batch 1, in ms a step; each side the median of "
        f"{counts}. Relative L2 of one step against BF16's, with random weights.",
        "",
        "| size | how | ours, 8 bits | p10–p90 | against | how | its ms | p10–p90 | times | rel. L2: 8 bits, 16 bits |",
        "| --- " * 10 + "|",
    ]
    cases = dict.fromkeys(r["case"] for r in rows)
    for case in sorted(cases, key=lambda case: "_vs_bf16" in case):
        lines += [_line(some) for some in by_shape([r for r in rows if r["case"] == case]).values()]
    return "\n".join(lines)


def _line(rows: Rows) -> str:
    first = rows[0]
    cells = [f"{first['shape']['height']} x {first['shape']['width']}", *_side(rows, "ours", "")]
    cells += [first["baseline_name"], *_side(rows, "baseline", "baseline_"), f"{_median(rows, 'ratio'):.2f}"]
    cells.append(f"{_median(rows, 'relative_l2'):.3f}, {_median(rows, 'baseline_relative_l2'):.3f}")
    return f"| {' | '.join(cells)} |"


def _side(rows: Rows, side: str, prefix: str) -> list[str]:
    """How it runs, its median, its spread."""
    low, high = (f"{_median(rows, f'{prefix}{key}'):.1f}" for key in ("p10", "p90"))
    return [rows[0][f"{prefix}how"], f"{_median(rows, side):.1f}", f"{low}–{high}"]


def _median(rows: Rows, key: str) -> float:
    return median(r[key] for r in rows)
