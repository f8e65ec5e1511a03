"""Images from a pipeline: one prompt and one seed at a time, so that two models are compared on the same noise."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL.Image import Image
from tqdm.auto import tqdm

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # the last one that a pipeline has reads the whole prompt


class SettingsError(ValueError):
    """Settings that this pipeline cannot take, in one sentence that says what it can."""


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
    _check_size(pipe, settings)
    if settings.guidance is not None and not math.isfinite(settings.guidance):
        raise SettingsError(f"guidance must be a finite number, got {settings.guidance}; FLUX.1-dev's is 3.5")
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
    if settings.max_sequence_length is not None:
        _check_text_length(pipe, arguments)
    return arguments


def size_multiple(pipe: Any) -> int:
    """What height and width must be multiples of: the VAE's scale, twice where the transformer takes 2 x 2 patches."""
    scale = getattr(pipe, "vae_scale_factor", None)
    if not isinstance(scale, int):
        return 1
    return scale if scale >= 32 else 2 * scale  # VAEs of 32 x and more (Sana's) leave no patches to make


def _check_size(pipe: Any, settings: Settings) -> None:
    """A size that the pipeline would round down without a word is refused."""
    multiple = size_multiple(pipe)
    for name, size in (("height", settings.height), ("width", settings.width)):
        if size is not None and (size % multiple or size <= 0):
            near = max(round(size / multiple), 1) * multiple
            raise SettingsError(
                f"{name} must be a multiple of {multiple} for {type(pipe).__name__}, got {size}; use {near}"
            )


def _check_text_length(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """The pipeline's own check of max_sequence_length, before the work instead of after it."""
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    values = {"prompt": "", **arguments}
    parameters = inspect.signature(check).parameters
    try:
        check(**{name: values.get(name, _default(parameters, name)) for name in parameters})
    except ValueError as error:
        if "max_sequence_length" in str(error):  # other complaints are about what is not known yet
            raise SettingsError(f"{type(pipe).__name__}: {error}") from None


def cut_prompts(pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(number of the prompt, from 1; its tokens; the limit) for each prompt whose end the pipeline cuts off."""
    tokenizers = [t for name in TOKENIZERS if (t := getattr(pipe, name, None)) is not None]
    if not tokenizers:
        return []
    limit = arguments.get("max_sequence_length", tokenizers[-1].model_max_length)
    counts = [len(tokenizers[-1](prompt, truncation=False).input_ids) for prompt in prompts]
    return [(i, count, limit) for i, count in enumerate(counts, 1) if count > limit]


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
    tokenizers = [getattr(pipe, name, None) for name in TOKENIZERS]
    limits = [int(t.model_max_length) for t in tokenizers if t is not None]
    return min(parameter.default, limits[-1]) if limits else parameter.default


def seconds_per_image(pictures: Sequence[Picture]) -> float:
    """The median over a run, which the first image's warm-up does not move."""
    return median(picture.seconds for picture in pictures)
