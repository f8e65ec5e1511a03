"""`convrot quantize` from a full-size 16-bit folder to a 4-bit one: time, memory, a cold disk, two cores, kill -9.

Every conversion is a process of its own, watched from outside: anonymous memory as the kernel counts it, and what is
missing of the GPU's free memory, CUDA's context included. Folders lie where temporary files do (TMPDIR): 24 GB that are
read and 6 GB that are written, synced to disk as the command does it. What a disk has to be read or one core is to
compute is measured on a folder of the first layers, and given as a rate.
"""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convrot_bench.bench import Bench, GateError
from convrot_bench.model.build import DTYPE, OUR_RULES, SEED, STD
from convrot_bench.model.configs import Config, Scale
from convrot_bench.model.flux import MODEL
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import facts
from convrot_bench.model.timing import is_gpu
from convrot_bench.model.watching import GIVEN_UP, SAMPLED, watched
from convrot_bench.results import Figure

NEEDED = 42e9  # bytes on disk at the same time
FIRST_LAYERS = {"num_layers": 1, "num_single_layers": 0}  # 0.8 GB
CORES = 2
READ = 8 * 2**20
# the command itself; on stdout the seconds of quantize_to, which leave out imports, CUDA's start and fsync
CHILD = """
import json, sys, time
import convrot_quant.pipeline as pipeline
from convrot_quant.cli.app import main
quantize = pipeline.quantize_to
def timed(*arguments, **options):
    begin = time.perf_counter()
    made = quantize(*arguments, **options)
    print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
    return made
pipeline.quantize_to = timed
main()
"""


@dataclass(frozen=True)
class Conversion:
    """What one process took. `seconds`: from start to exit. `quantizing`: of that, reading, quantizing and writing."""

    seconds: float
    quantizing: float
    host_peak: int
    gpu_peak: int


def conversion(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """The whole model with warm pages; the first layers from a cold disk, on two cores, and after a kill."""
    with tempfile.TemporaryDirectory(prefix="convrot-") as name:
        place = Path(name)
        if not scale.tiny and (free := shutil.disk_usage(place).free) < NEEDED:
            raise GateError(
                f"conversion: {place} has {free / 1e9:.0f} GB free and needs 42; set TMPDIR to a larger disk"
            )
        phase, where = Phases("conversion"), {"file_system": _file_system(place), "weights": OUR_RULES}
        more = facts(bench, scale, fused=False, timing="wall clock of a process", **where)
        yield from _whole(bench, scale, place, more, phase)
        source = write_folder(place / "first", {**scale.flux, **FIRST_LAYERS})
        yield from _first_layers(bench, source, place, more | {"layers": FIRST_LAYERS}, phase)


def _whole(bench: Bench, scale: Scale, place: Path, more: dict[str, Any], phase: Phases) -> Iterator[Figure]:
    """Time against reading the same files, and memory against the model's own bytes."""
    phase("writing the 16-bit folder")
    source, shape = write_folder(place / "bf16", scale.flux), {"model": MODEL}
    read, size = _read_all(source), _size(source)
    phase("converting it")
    made = convert(source, place / "4bit", bench.device)
    more = more | {"bytes_read": size, "bytes_written": _size(place / "4bit"), "cache": "warm"}
    more |= {"quantizing": made.quantizing, "bytes_a_second": size / made.quantizing}
    yield Figure("flux_convert", shape, made.seconds, read, "s", "reading the files", more)
    yield Figure("flux_convert_host_peak", shape, made.host_peak, size, "bytes", "16-bit model", more)
    if is_gpu(bench.device):
        yield Figure("flux_convert_gpu_peak", shape, made.gpu_peak, size, "bytes", "16-bit model", more)
    shutil.rmtree(source)
    shutil.rmtree(place / "4bit")


def _first_layers(bench: Bench, source: Path, place: Path, more: dict[str, Any], phase: Phases) -> Iterator[Figure]:
    """Rates of a cold disk and of two cores; what a kill leaves."""
    size, shape = _size(source), {"model": f"{MODEL}, first layers"}
    more = more | {"bytes_read": size}
    phase("converting the first layers from a cold disk")
    _forget(source)
    disk = _read_all(source)
    _forget(source)
    whole = convert(source, place / "whole", bench.device)
    cold = more | {"cache": "cold", "seconds": whole.seconds, "bytes_a_second": size / whole.quantizing}
    yield Figure("flux_convert_cold", shape, whole.quantizing, disk, "s", "reading the cold files", cold)
    phase(f"converting them on {CORES} cores")
    slow = convert(source, place / "cores", "cpu", cores=CORES)
    fields = more | {"cores": CORES, "seconds": slow.seconds, "bytes_a_second": size / slow.quantizing}
    fields |= {"host_peak": slow.host_peak}
    yield Figure("flux_convert_2_cores", shape, slow.quantizing, whole.quantizing, "s", f"{bench.device}, cold", fields)
    phase("killing and repeating a conversion")
    left = kill_half_way(source, place / "killed", bench.device, _size(place / "whole") // 2)
    again = convert(source, place / "killed", bench.device)
    if differs := different_files(place / "killed", place / "whole"):
        raise GateError(f"conversion: after a kill the folder differs in {', '.join(differs)}")
    fields = more | {"equal": True, "visible_after_kill": False, "left_behind": left}
    yield Figure("flux_convert_after_kill", shape, again.seconds, whole.seconds, "s", "never killed", fields)


def write_folder(folder: Path, config: Config) -> Path:
    """A FLUX transformer of this config as save_pretrained writes it: BF16, shards of 5 GB.

    One block of random values serves every tensor of its shape: what is timed does not depend on values.
    """
    from diffusers import FluxTransformer2DModel
    from huggingface_hub import split_torch_state_dict_into_shards

    from convrot_quant.manifest import INDEX, WEIGHTS
    from convrot_quant.tensorfile import in_memory, write_tensors

    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).to(DTYPE)
    folder.mkdir()
    model.save_config(folder)
    generator, blocks = torch.Generator().manual_seed(SEED), {}
    for tensor in model.state_dict().values():
        if tensor.shape not in blocks:
            blocks[tensor.shape] = torch.empty(tensor.shape, dtype=DTYPE).normal_(0, STD, generator=generator)
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(model.state_dict(), filename_pattern=pattern, max_shard_size="5GB")
    for file, names in split.filename_to_tensors.items():
        shard = {name: in_memory(blocks[model.state_dict()[name].shape]) for name in names}
        write_tensors(folder / file, shard, {"format": "pt"}, digest=False)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder


def _start(source: Path, out: Path, device: str, cores: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, "quantize", str(source), "-o", str(out), "--device", device, "--quiet"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(cores)} if cores else {})
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:cores])
    return process


def convert(source: Path, out: Path, device: str, *, cores: int | None = None) -> Conversion:
    """Run the command to its end and watch it; an error of the command is one here."""
    found = watched(lambda: _start(source, out, device, cores), device, "conversion: convrot quantize")
    return Conversion(
        found.seconds, json.loads(found.said.splitlines()[-1])["seconds"], found.host_peak, found.gpu_peak
    )


def kill_half_way(source: Path, out: Path, device: str, size: int) -> int:
    """Kill -9 the command once it has written `size` bytes. Nothing may be visible; returns the bytes left behind."""
    process, begin, ended = _start(source, out, device), time.perf_counter(), False
    while (written := sum(_size(path) for path in _unfinished(out))) < size:
        if ended or time.perf_counter() - begin > GIVEN_UP:
            process.kill()
            raise GateError(f"conversion: it was to be killed at {size} bytes and ended at {written}")
        ended = process.poll() is not None  # what it wrote last is counted once more
        time.sleep(SAMPLED / 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if out.exists():
        raise GateError("conversion: a killed run left a folder under the name of its destination")
    left = _unfinished(out)
    total = sum(_size(path) for path in left)
    for path in left:
        shutil.rmtree(path)
    return total


def _unfinished(out: Path) -> list[Path]:
    return sorted(path for kind in ("tmp", "old") for path in out.parent.glob(f".{out.name}.{kind}-*"))


def different_files(one: Path, other: Path) -> list[str]:
    """Names of files that only one of two folders has, or whose bytes differ; the cards name their folders."""
    names = sorted({path.name for folder in (one, other) for path in folder.iterdir()} - {"README.md"})
    _, changed, absent = filecmp.cmpfiles(one, other, names, shallow=False)
    return changed + absent


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except OSError:  # renamed into place meanwhile
        return 0


def _read_all(folder: Path) -> float:
    """Seconds of reading every file once."""
    begin = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(READ):
                pass
    return time.perf_counter() - begin


def _forget(folder: Path) -> None:
    """Write back the files' pages and drop them from the cache; a memory file system keeps them."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _file_system(place: Path) -> str:
    """tmpfs, ext4, overlay, ...: what lies under a path, or unknown where nobody says."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown"
    under = [(len(point), kind) for point, kind in mounts if place.resolve().is_relative_to(point)]
    return max(under)[1] if under else "unknown"
