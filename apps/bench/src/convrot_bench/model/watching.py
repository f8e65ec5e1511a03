"""A command in a process of its own, watched from outside.

Its anonymous memory as the kernel counts it, and what is missing of the GPU's free memory, CUDA's context included.
"""

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from convrot_bench.bench import GateError
from convrot_bench.model.timing import is_gpu

SAMPLED = 0.01  # seconds between two looks at a process
GIVEN_UP = 400  # seconds


@dataclass(frozen=True)
class Watched:
    """Seconds from start to exit, peaks in bytes, and what it printed."""

    seconds: float
    host_peak: int
    gpu_peak: int
    said: str


def watched(start: Callable[[], "subprocess.Popen[str]"], device: str, name: str) -> Watched:
    """Start a process, both of whose outputs are pipes, and watch it to its end; an error of it is one here."""
    free, begin = gpu_free(device), time.perf_counter()
    process, over = start(), threading.Event()
    peaks = {"host": 0, "gpu": 0}

    def watch() -> None:
        while not over.wait(SAMPLED):
            peaks["host"] = max(peaks["host"], anonymous(process.pid))
            peaks["gpu"] = max(peaks["gpu"], free - gpu_free(device))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        said, errors = process.communicate(timeout=GIVEN_UP)
    finally:
        over.set()
        watcher.join()
        process.kill()
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise GateError(f"{name} failed with {process.returncode}: {errors.strip()[-500:]}")
    return Watched(seconds, peaks["host"], peaks["gpu"], said)


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that no file backs; 0 where it has ended or there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def gpu_free(device: str) -> int:
    """Bytes of the GPU that nobody holds; 0 without one."""
    return int(torch.cuda.mem_get_info()[0]) if is_gpu(device) else 0
