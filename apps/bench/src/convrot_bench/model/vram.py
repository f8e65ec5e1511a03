"""`convrot generate --vram`: a whole 4-bit FLUX.1-dev pipeline from its folder, in less GPU memory than it takes.

Real sizes, random weights. Every run is the command in a process of its own: it loads, chooses what waits where, limits
itself to that memory (torch.cuda.set_per_process_memory_fraction) and draws; the first image warms up and counts too.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import SCHEDULER, Scale
from convrot_bench.model.flux import flux_sides
from convrot_bench.model.phases import Phases
from convrot_bench.model.pipeline import shared_parts
from convrot_bench.model.sides import OURS, facts
from convrot_bench.model.timing import is_gpu
from convrot_bench.model.watching import Watched, watched
from convrot_bench.results import Figure
from convrot_quant import save_quantized

LIMITS = ("16GB", "12GB", "8GB")
PROMPTS = ("a red cube in front of a blue sphere", "a green cone", "a white cylinder")
STEPS = 4
WAYS = (
    "method",
    "resident",
    "swapped",
    "streamed",
    "vae_tiles",
    "moving_seconds",
)  # of what generate says of its offloading
CHILD = "from convrot_quant.cli.app import main; main()"


def vram(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Seconds of an image of STEPS steps, against the run that keeps everything on the GPU."""
    phase = Phases("vram")
    with tempfile.TemporaryDirectory(prefix="convrot-") as name:
        phase("writing the 4-bit pipeline")
        folder, fused = _write(bench, scale, Path(name) / "pipeline", phase)
        shape: dict[str, Any] = {"height": scale.side, "width": scale.side, "batch": 1, "steps": STEPS}
        more = facts(bench, scale, fused=fused, timing="wall clock of a process, median of its images")
        phase("drawing without a limit")
        whole, all_of_it = _draw(bench, scale, folder, None)
        yield _figure("all", shape, whole, whole, all_of_it, more)
        for limit in LIMITS if is_gpu(bench.device) else ():
            phase(f"drawing in {limit}")
            result, process = _draw(bench, scale, folder, limit)
            yield _figure(limit, shape, result, whole, process, more)


def _figure(
    limit: str, shape: dict[str, Any], result: dict[str, Any], whole: dict[str, Any], process: Watched, more: Any
) -> Figure:
    offload = result["offload"] or {}
    fields = {"gpu_peak": process.gpu_peak, "host_peak": process.host_peak, "process_seconds": process.seconds}
    fields |= {key: offload[key] for key in WAYS if key in offload}
    fields |= {"planned_peak": offload["peak_bytes"]} if offload else {}
    ours, baseline = (one["results"][0]["seconds_per_image"] for one in (result, whole))
    return Figure("flux_vram", shape | {"vram": limit}, ours, baseline, "s", "all of the GPU", more | fields)


def _write(bench: Bench, scale: Scale, folder: Path, phase: Phases) -> tuple[Path, bool]:
    """-> a pipeline folder as save_pretrained writes it, and whether its blocks run fused."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from mini_flux.parts import make_clip_tokenizer, make_t5_tokenizer

    clip, t5 = make_clip_tokenizer(PROMPTS), make_t5_tokenizer(PROMPTS)
    clip.model_max_length = scale.text_tokens["clip"]
    scale = replace(scale, clip=_holding(scale.clip, clip), t5=_holding(scale.t5, t5))
    model = flux_sides(bench, scale, phase, OURS)[OURS].model
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    shared = shared_parts(scale, bench.device)
    pipe = FluxPipeline(scheduler=scheduler, transformer=None, tokenizer=clip, tokenizer_2=t5, **shared)
    pipe.save_pretrained(folder)
    save_quantized(model, folder / "transformer")
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8"))
    parts["transformer"] = ["diffusers", type(model).__name__]
    parts["tokenizer_2"] = ["transformers", "T5TokenizerFast"]  # transformers 5 writes a class that 4 does not have
    index.write_text(json.dumps(parts), encoding="utf-8")
    return folder, build.is_fused(model)


def _holding(config: Any, tokenizer: Any) -> dict[str, Any]:
    """The configuration of a text encoder, with a row for each of the tokenizer's tokens."""
    return {**config, "vocab_size": max(config["vocab_size"], len(tokenizer))}


def _draw(bench: Bench, scale: Scale, folder: Path, limit: str | None) -> tuple[dict[str, Any], Watched]:
    command = [sys.executable, "-c", CHILD, "generate", str(folder), "--steps", str(STEPS), "--json", "--quiet"]
    command += ["-o", str(folder.parent / "images"), "--device", bench.device]
    command += ["--max-sequence-length", str(scale.text_tokens["flux"])]
    command += ["--height", str(scale.side), "--width", str(scale.side)] + (["--vram", limit] if limit else [])
    command += [part for prompt in PROMPTS for part in ("--prompt", prompt)]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process = watched(start, bench.device, f"vram: convrot generate, {limit or 'no limit'},")
    return json.loads(process.said), process
