"""The table of several GPUs (docs/benchmarks.md): every way to share them, BF16 and ours, a line a mode."""

from statistics import median

from convrot_bench.bars import Rows

WAYS = {
    "flux_replicas": "a replica on each",
    "flux_ulysses": "a step shared, Ulysses",
    "flux_ring": "a step shared, ring",
}
BEST, EFFICIENCY, DISTANCE = "", "_efficiency", "_distance"  # what follows a way in the names of cases
MODES = {
    "_eager": "both eager",
    "_compiled": "both compiled",
    "_graph": "both as CUDA graphs of eager steps",
    "_graph_compiled": "both as CUDA graphs of compiled steps",
    BEST: "each its fastest",
}


def is_parallel(case: str) -> bool:
    """Whether a case is of several GPUs."""
    return case.startswith(tuple(WAYS))


def parallel_table(rows: Rows) -> str:
    """A table a size and number of GPUs."""
    shapes = {str(r["shape"]): r["shape"] for r in rows}
    return "\n\n".join(_of([r for r in rows if r["shape"] == shape]) for shape in shapes.values())


def _of(rows: Rows) -> str:
    shape, counts = rows[0]["shape"], sorted({r["runs"] for r in rows if "runs" in r})
    gpus, size = shape["gpus"], f"{shape['height']} x {shape['width']}, batch {shape['batch']}"
    lines = [
        f"FLUX.1-dev on {gpus} GPUs, {size}, in ms a step (replicas: over all of them together); each side the median "
        f"of {' or '.join(map(str, counts))}. Efficiency: the time of one GPU over {gpus} times that of {gpus}.",
        "",
        "| way | mode | ours | p10–p90 | BF16 | p10–p90 | times | efficiency: ours, BF16 |",
        "| --- " * 8 + "|",
    ]
    for way, title in WAYS.items():
        for mode, how in MODES.items():
            if some := [r for r in rows if r["case"] == way + mode]:
                shares = [r for r in rows if r["case"] == way + EFFICIENCY] if mode == BEST else []
                lines.append(f"| {title} | {how}{_hows(some) if mode == BEST else ''} | {_cells(some, shares)} |")
    return "\n".join([*lines, *_distances(rows)])


def _hows(rows: Rows) -> str:
    return f": {rows[0]['how']}, BF16 {rows[0]['baseline_how']}"


def _cells(rows: Rows, shares: Rows) -> str:
    cells = []
    for side, low, high in (("ours", "p10", "p90"), ("baseline", "baseline_p10", "baseline_p90")):
        cells += [f"{_median(rows, side):.1f}", f"{_median(rows, low):.1f}–{_median(rows, high):.1f}"]
    cells.append(f"{_median(rows, 'ratio'):.2f}")
    cells.append(f"{_median(shares, 'ours'):.0%}, {_median(shares, 'baseline'):.0%}" if shares else "")
    return " | ".join(cells)


def _distances(rows: Rows) -> list[str]:
    """How far shared steps are from one GPU's, and what that is to be set against."""
    found, against = [], ""
    for way, title in WAYS.items():
        if some := [r for r in rows if r["case"] == way + DISTANCE]:
            bf16 = [r for r in rows if r["case"] == way and "baseline_relative_l2" in r]
            beside = f" (BF16 {_median(bf16, 'baseline_relative_l2'):.3f})" if bf16 else ""
            found.append(f"{title.removeprefix('a step shared, ')} {_median(some, 'ours'):.3f}{beside}")
            against = f"{some[0]['baseline_name']}: {_median(some, 'baseline'):.3f}"
    if not found:
        return []
    return ["", f"Relative L2 from one GPU's step, with random weights: {', '.join(found)}; {against}."]


def _median(rows: Rows, key: str) -> float:
    return median(r[key] for r in rows)
