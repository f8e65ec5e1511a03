"""What is measured: a pipeline, its prompts and seeds, and for mini-flux the scenes and the judge behind them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convrot_quant.generation import Settings, call_arguments
from convrot_quant.pipeline import load_pipeline, load_transformer, open_folder
from mini_flux.evaluate import SEED
from mini_flux.judge import Judge, load_judge
from mini_flux.scenes import Scene, caption, held_out_scenes

SPLITS = ("report", "tuning")
REPORT_MOST = 2000  # captions that reports may use; those of tuning come after them, so that no scene is in both
TUNING_SEEDS = 10  # tuning keeps to generator seeds 0-9; reports start at SEED


@dataclass
class Subject:
    """`fresh()`: a 16-bit transformer of its own on the device. Picture i: prompts[i], noise of seeds[i].

    `calibration`: prompts and seeds of the tuning split, for methods that need inputs of the layers.
    """

    name: str
    split: str
    pipe: Any
    fresh: Callable[[], nn.Module]
    prompts: Sequence[str]
    seeds: Sequence[int]
    calibration: Sequence[str] = ()
    scenes: Sequence[Scene] = ()
    judge: Judge | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where its pictures are drawn and compared."""
        return torch.device(self.pipe.device)

    @property
    def shape(self) -> dict[str, Any]:
        """What every row says of it, beside the steps."""
        return {"model": self.name, "prompts": len(self.prompts), "split": self.split}

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
        """uint8 (B, 3, H, W); each picture has its own generator, so that its noise is the same in any batch."""
        self.pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        arguments = call_arguments(self.pipe, Settings(steps=steps, **self.options))
        out = self.pipe(prompt=list(prompts), generator=generators, output_type="pt", **arguments)
        return (out.images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def scenes_of(split: str, count: int) -> list[Scene]:
    """Held-out scenes of a split; no scene is in both."""
    if split not in SPLITS:
        raise ValueError(f"quality: unknown split {split!r}; use one of {', '.join(SPLITS)}")
    if split == "tuning":
        return held_out_scenes(REPORT_MOST + count)[REPORT_MOST:]
    if count > REPORT_MOST:
        raise ValueError(f"quality: reports use at most {REPORT_MOST} captions, got {count}; the next are for tuning")
    return held_out_scenes(count)


def seeds_of(split: str, count: int) -> list[int]:
    """Generator seeds of a split's pictures."""
    return [i % TUNING_SEEDS for i in range(count)] if split == "tuning" else [SEED + i for i in range(count)]


def mini_flux(folder: Path, judge_file: Path, captions: int, split: str, device: str, calibration: int) -> Subject:
    """The shipped pipeline over held-out captions, with its judge. The transformer is read once and copied."""
    pipe = load_pipeline(open_folder(folder), device=device)
    base, scenes = pipe.transformer, scenes_of(split, captions)
    return Subject(
        folder.name, split, pipe, lambda: copy.deepcopy(base), [caption(s) for s in scenes], seeds_of(split, captions),
        [caption(s) for s in scenes_of("tuning", calibration)], scenes, load_judge(judge_file).to(device),
    )  # fmt: skip


def any_model(
    model: str, prompts: Sequence[str], seed: int, split: str, device: str, calibration: Sequence[str],
    options: dict[str, Any],
) -> Subject:  # fmt: skip
    """A diffusers folder or hub id over given prompts. Its transformer is read from disk for every method.

    So one 16-bit model at a time is in GPU memory.
    """
    folder = open_folder(model)
    if folder.is_quantized:
        raise ValueError(f"quality: {model} is quantized; every method starts from the 16-bit model")
    path = folder.transformers.get("transformer")
    if path is None:
        raise ValueError(f"quality: {model} is a bare transformer; give the folder of its whole pipeline")
    pipe = load_pipeline(folder, device=device)
    name = str(model).rstrip("/").rsplit("/", maxsplit=1)[-1]
    seeds = [seed + i for i in range(len(prompts))]
    return Subject(
        name, split, pipe, lambda: load_transformer(path, device=device), prompts, seeds, calibration, options=options
    )


def read_prompts(path: Path, count: int | None = None) -> list[str]:
    """One prompt a line, or MJHQ-30K's meta_data.json ({name: {"prompt": ...}}); the first `count`."""
    import json

    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        data = json.loads(text)
        entries = list(data.values()) if isinstance(data, dict) else list(data)
        prompts = [e["prompt"] if isinstance(e, dict) else str(e) for e in entries]
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if count is not None and len(prompts) < count:
        raise ValueError(f"quality: {path} has {len(prompts)} prompts, fewer than the {count} asked for")
    if not prompts:
        raise ValueError(f"quality: {path} holds no prompts; one a line, or a JSON file of objects with 'prompt'")
    return prompts[:count]
