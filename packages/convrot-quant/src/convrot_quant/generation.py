"""Images from a pipeline: one prompt and one seed at a time, so that two models are compared on the same noise."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL.Image import Image
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Settings:
    """What every image of a run shares; None leaves the choice to the pipeline (see sizes and text_length below)."""

    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Picture:
    """One image, with what made it and how long it took."""

    prompt: str
    seed: int
    image: Image
    seconds: float


def generate(
    pipe: Any, prompts: Sequence[str], settings: Settings, *, progress: bool = True, label: str = "generate"
) -> list[Picture]:
    """num_images pictures per prompt; picture i of the run has the noise of a CPU generator seeded seed + i."""
    arguments = call_arguments(pipe, settings)
    jobs = [prompt for prompt in prompts for _ in range(settings.num_images)]
    pictures = []
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(jobs) * settings.steps, desc=label, unit="step", disable=not progress) as bar:
        for i, prompt in enumerate(jobs):
            bar.set_postfix_str(f"image {i + 1}/{len(jobs)}")
            started, before = time.perf_counter(), bar.n
            image = _one_image(pipe, prompt, settings.seed + i, arguments, bar)
            pictures.append(Picture(prompt, settings.seed + i, image, time.perf_counter() - started))
            bar.update((i + 1) * settings.steps - bar.n if bar.n >= before else 0)
    return pictures


def _one_image(pipe: Any, prompt: str, seed: int, arguments: dict[str, Any], bar: Any) -> Image:
    def count(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        bar.update(1)
        return kwargs

    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.inference_mode():
        output = pipe(prompt=prompt, generator=generator, callback_on_step_end=count, **arguments)
    images = getattr(output, "images", None)
    if not images or not isinstance(images[0], Image):
        raise ValueError(f"{type(pipe).__name__} makes no images; generate and compare work on text-to-image pipelines")
    return images[0]


def call_arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """The pipeline call's keyword arguments; an option that the pipeline does not have is refused, not dropped."""
    known = inspect.signature(pipe.__call__).parameters
    wanted = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance if settings.guidance is not None else _default(known, "guidance_scale"),
        "height": settings.height or image_size(pipe),
        "width": settings.width or image_size(pipe),
        "max_sequence_length": settings.max_sequence_length or text_length(pipe),
    }
    arguments = {name: value for name, value in wanted.items() if value is not None}
    for name in (*arguments, "callback_on_step_end"):
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} has no option {name}; leave it out or use another pipeline")
    return arguments


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    default = parameters[name].default if name in parameters else None
    return None if default is inspect.Parameter.empty else default


def image_size(pipe: Any) -> int | None:
    """The side length that the VAE was made for (1024 for FLUX.1), or None where it does not say."""
    size = getattr(getattr(getattr(pipe, "vae", None), "config", None), "sample_size", None)
    return size if isinstance(size, int) and "height" in inspect.signature(pipe.__call__).parameters else None


def text_length(pipe: Any) -> int | None:
    """The pipeline's own max_sequence_length, or the last tokenizer's limit where that is lower."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if parameter is None or not isinstance(parameter.default, int):
        return None
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    limits = [int(t.model_max_length) for t in tokenizers if t is not None]
    return min(parameter.default, limits[-1]) if limits else parameter.default


def seconds_per_image(pictures: Sequence[Picture]) -> float:
    """The median over a run, which the first image's warm-up does not move."""
    return median(picture.seconds for picture in pictures)
