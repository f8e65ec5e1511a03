"""PeakMemory: the most bytes in use while something ran, on a GPU or of this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM


class PeakMemory:
    """Use as a context; `bytes` is the peak afterwards, or None on a system that does not tell."""

    def __init__(self, device: str) -> None:
        self.bytes: int | None = None
        self._gpu = torch.device(device) if torch.device(device).type == "cuda" else None

    def __enter__(self) -> PeakMemory:
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        elif _CLEAR.exists():
            with suppress(OSError):  # the peak since the start is then what there is
                _CLEAR.write_text(_RESET_PEAK)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._gpu) if self._gpu is not None else _process_peak()


def _process_peak() -> int | None:
    """VmHWM of Linux, in bytes."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] * 1024 if found else None
