"""machine: what a figure was made with, so that the JSON of a run can stand for itself."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from convrot_quant.versions import versions


def machine(device: str) -> dict[str, Any]:
    """The device's name, the CPU cores that may be used, versions of installed packages, and the date (UTC)."""
    is_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **versions(),
        "torch": torch.__version__,  # with its build, such as +cu126
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _cpu_name() -> str:
    """The processor's name as Linux gives it, or what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
