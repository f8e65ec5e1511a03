"""From a folder to the GPU: quantizing FLUX.1-dev while its shards are read, and loading what was saved in 4 bits.

The folders are written first, to the fastest place there is, and read with their pages in memory: what is timed is the
loader, not a disk. Beside the seconds stands what the process held at the most.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.flux import MODEL, make_flux
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import facts, release
from convrot_bench.model.timing import is_gpu
from convrot_bench.results import Figure

MEMORY_DISK = Path("/dev/shm")
SAMPLED = 0.01  # seconds between two looks at the process's memory


class HostPeak:
    """Bytes of anonymous memory that this process gains at the most while entered; pages of files do not count."""

    def __enter__(self) -> "HostPeak":
        self.start = self.most = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(SAMPLED):
            self.most = max(self.most, _anonymous())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def gained(self) -> int:
        return self.most - self.start


def _anonymous() -> int:
    """RssAnon of this process; 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def loading(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Quantize while reading, then load the saved model; each against loading the 16-bit model."""
    from convrot_quant import load_and_quantize, load_quantized, save_quantized

    device, phase = bench.device, Phases("loading")
    more = facts(bench, scale, fused=True, timing="wall clock, files in memory", weights=build.OUR_RULES)
    with tempfile.TemporaryDirectory(dir=_place(scale), prefix="convrot-") as folder:
        source, saved = Path(folder) / "bf16", Path(folder) / "4bit"
        phase("writing the 16-bit folder")
        model = make_flux(bench, scale)
        model.save_pretrained(source, max_shard_size="5GB")
        bytes_16bit, files_16bit = build.weight_bytes(model), _bytes_of(source)
        del model
        phase("loading it")
        theirs = _timed(lambda: type_of(source).from_pretrained(source, dtype=torch.bfloat16).to(device), device)
        theirs.pop("model")
        phase("quantizing while reading it")
        ours = _timed(lambda: load_and_quantize(source, "ours", device=device, progress=False), device)
        quantized = ours.pop("model")
        fields = more | _prefixed(ours, "") | _prefixed(theirs, "baseline_") | {"bytes_read": bytes_16bit}
        yield Figure(
            "flux_quantize_load", {"model": MODEL}, ours["seconds"], theirs["seconds"], "s", "BF16 load", fields
        )
        phase("saving the 4-bit model")
        save_quantized(quantized, saved)
        yield Figure("flux_checkpoint", {"model": MODEL}, _bytes_of(saved), files_16bit, "bytes", "BF16 files", more)
        shutil.rmtree(source)
        size = build.weight_bytes(quantized)
        del quantized
        phase("loading it")
        ours = _timed(lambda: load_quantized(saved, device=device), device)
        ours.pop("model")
        rate = size / ours["seconds"]
        fields = (
            more | _prefixed(ours, "") | _prefixed(theirs, "baseline_") | {"bytes_read": size, "bytes_a_second": rate}
        )
        yield Figure("flux_load", {"model": MODEL}, ours["seconds"], theirs["seconds"], "s", "BF16 load", fields)


def _bytes_of(folder: Path) -> int:
    """Bytes of the files in a folder of a model."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def type_of(folder: Path) -> Any:
    """The class of the model in a folder."""
    from convrot_quant.manifest import diffusers_class, read_config

    return diffusers_class(folder, read_config(folder))


def _place(scale: Scale) -> Path | None:
    """Memory that looks like a disk, where there is enough of it; else the system's place for temporary files."""
    needed = 40 * 10**9 if not scale.tiny else 0
    return MEMORY_DISK if MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > needed else None


def _timed(load: Callable[[], Any], device: str) -> dict[str, Any]:
    """The model, the seconds of loading it, and the most that it took of the GPU and of the host."""
    release()
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if is_gpu(device) else 0
    with HostPeak() as host:
        start = time.perf_counter()
        model = load()
        if is_gpu(device):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if is_gpu(device) else 0
    return {"model": model, "seconds": seconds, "gpu_peak": peak, "host_peak": host.gained}


def _prefixed(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items() if name != "seconds"}
