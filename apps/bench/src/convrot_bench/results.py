"""One format for every figure: a JSON object a line in docs/results, written here and read by reports."""

import json
import math
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

REQUIRED = (
    "bench", "case", "shape", "ours", "baseline", "unit", "baseline_name", "ratio", "gpu", "driver", "torch", "triton",
    "commit", "date", "command", "run_id",
)  # fmt: skip
BENCHES = ("ops", "model", "quality")
SMALLER_IS_BETTER = ("us", "ms", "s", "s/image", "bytes", "relative_l2", "lpips", "fid")
LARGER_IS_BETTER = ("db", "ssim", "share", "tops", "gb_s", "score")


def ratio(ours: float, baseline: float | None, unit: str) -> float | None:
    """How many times better ours is than the baseline: above 1 is better, for times and bytes as for decibels.

    None where the baseline is 0 or below (an ImageReward) and has no multiple, or does not run.
    """
    if baseline is None or baseline < 0 or ours < 0:
        return None
    if unit in SMALLER_IS_BETTER:
        return baseline / ours if ours else None
    if unit in LARGER_IS_BETTER:
        return ours / baseline if baseline else None
    raise ValueError(f"ratio: unknown unit {unit!r}; use one of {', '.join(SMALLER_IS_BETTER + LARGER_IS_BETTER)}")


def machine_facts() -> dict[str, Any]:
    """GPU or CPU, driver, versions and commit of this process."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    facts = {
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if not torch.cuda.is_available():
        return {
            "gpu": f"none ({platform.machine()}, {os.cpu_count()} cores)",
            "driver": "none",
            "clocks": "none",
        } | facts
    driver = _query("driver_version")
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "clocks": gpu_clocks()} | facts


def gpu_clocks() -> str:
    """SM clock, memory clock and power of the GPU at this moment."""
    return _query("clocks.sm,clocks.mem,power.draw")


def _query(fields: str) -> str:
    lines = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    return lines[0] if lines else "unknown"


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    """The checkout's commit, with + where files differ from it. CONVROT_COMMIT says it where there is no git."""
    if said := os.environ.get("CONVROT_COMMIT"):
        return said
    commit = _run("git", "rev-parse", "--short=12", "HEAD")
    return (
        (commit + ("+" if _run("git", "status", "--porcelain", "--untracked-files=no") else ""))
        if commit
        else "unknown"
    )


@dataclass(frozen=True)
class Figure:
    """What a case measured: the part of a row that the writer does not know.

    `baseline` is None where it does not run: `more` then says why, as `error`.
    """

    case: str
    shape: dict[str, Any]
    ours: float
    baseline: float | None
    unit: str
    baseline_name: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Writer:
    """Appends rows of one run (one process, one `run_id`) to a file, whole lines at a time."""

    path: Path
    bench: str
    facts: dict[str, Any] = field(default_factory=machine_facts)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        if self.bench not in BENCHES:
            raise ValueError(f"Writer: unknown bench {self.bench!r}; use one of {', '.join(BENCHES)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        case: str,
        shape: dict[str, Any],
        ours: float,
        baseline: float | None,
        unit: str,
        baseline_name: str,
        **more: Any,
    ) -> dict[str, Any]:
        """One row; returns it. Values must be finite: a figure that could not be measured is not a row.

        Only a baseline may lack its figure, and then the row says why (`error`) and has no ratio.
        """
        if baseline is None and not more.get("error"):
            raise ValueError(f"{case}: without a figure of {baseline_name} the row has to say why, as `error`")
        for name, value in (("ours", ours), ("baseline", baseline)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{case}: {name} must be finite, got {value}; leave the row out and say why")
        row = {
            "bench": self.bench, "case": case, "shape": shape, "ours": ours, "baseline": baseline, "unit": unit,
            "baseline_name": baseline_name, "ratio": ratio(ours, baseline, unit), "run_id": self.run_id,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": _command(),
        } | self.facts | more  # fmt: skip
        line = json.dumps(row, allow_nan=False)
        with self.path.open("a") as f:
            f.write(line + "\n")
        return row

    def add(self, figure: Figure) -> dict[str, Any]:
        """One row; returns it."""
        f = figure
        return self.write(f.case, f.shape, f.ours, f.baseline, f.unit, f.baseline_name, **f.more)


def _command() -> str:
    """The command line without the folders of the machine it ran on."""
    plain = (a.replace(str(Path.cwd()) + "/", "") for a in sys.argv[1:])
    return " ".join([Path(sys.argv[0]).name, *(Path(a).name if Path(a).is_absolute() else a for a in plain)])


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Every row of the files, checked: a broken line or a missing field names its file and line."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a JSON object ({error}); remove or repair the line") from None
            if missing := [k for k in REQUIRED if k not in row]:
                raise ValueError(f"{path}:{number}: lacks {', '.join(missing)}; every row has {', '.join(REQUIRED)}")
            rows.append(row)
    return rows
