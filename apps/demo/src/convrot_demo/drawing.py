"""draw: one image with progress after every step, a way to stop, and its time and memory."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image

from convrot_demo.errors import UserError
from convrot_demo.inputs import Inputs
from convrot_demo.memory import PeakMemory
from convrot_demo.preview import Preview
from convrot_quant.generation import Settings, call_arguments


class Stopped(Exception):
    """The visitor pressed Stop, or left."""


@dataclass(frozen=True)
class Step:
    """Progress of the side that runs; `preview` only where there is a new one."""

    done: int
    total: int
    step_seconds: float
    preview: Image.Image | None


@dataclass(frozen=True)
class Drawn:
    """One image with its figures; step_seconds is a median without the first step, which waits for the text."""

    image: Image.Image
    seconds: float
    step_seconds: float
    peak_bytes: int | None


class Watch:
    """The pipeline's callback: counts and times steps, makes previews, and raises Stopped once `stop` is set."""

    def __init__(
        self, device: str, total: int, report: Callable[[Step], None], stop: threading.Event, preview: Preview | None
    ) -> None:
        self._gpu = torch.device(device) if torch.device(device).type == "cuda" else None
        self._total, self._report, self._stop, self._preview = total, report, stop, preview
        self._steps: list[float] = []
        self._last = time.perf_counter()

    def __call__(self, _pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        self._steps.append(time.perf_counter() - self._last)
        if self._stop.is_set():
            raise Stopped
        latents, picture = values.get("latents"), None
        if self._preview is not None and isinstance(latents, torch.Tensor) and step + 1 < self._total:
            picture = self._preview.picture(latents, step)
        self._report(Step(len(self._steps), self._total, self.step_seconds, picture))
        self._last = time.perf_counter()  # a preview is not the model's time
        return {}

    @property
    def step_seconds(self) -> float:
        """Median so far."""
        return median(self._steps[1:] or self._steps or [0.0])


def arguments_of(pipe: Any, inputs: Inputs, picture: Image.Image | None) -> dict[str, Any]:
    """The pipeline call's arguments but for noise and callback; what it does not take is left out."""
    known = inspect.signature(pipe.__call__).parameters
    guidance = inputs.guidance if "guidance_scale" in known else None
    settings = Settings(inputs.seed, inputs.steps, guidance, inputs.height, inputs.width)
    arguments = {"prompt": inputs.prompt, **call_arguments(pipe, settings)}
    if inputs.negative_prompt and "negative_prompt" in known:
        arguments["negative_prompt"] = inputs.negative_prompt
        if "true_cfg_scale" in known:
            arguments["true_cfg_scale"] = inputs.negative_strength
    if "image" in known:
        if picture is None and known["image"].default is inspect.Parameter.empty:
            raise UserError(f"{type(pipe).__name__} edits an image: upload one first.")
        arguments["image"] = picture
    if "max_area" in known:  # else Kontext makes every size one megapixel
        arguments["max_area"] = inputs.width * inputs.height
    return arguments


def draw(
    pipe: Any,
    arguments: dict[str, Any],
    seed: int,
    *,
    device: str,
    report: Callable[[Step], None],
    stop: threading.Event,
    previews: bool,
) -> Drawn:
    """One image from the noise of a CPU generator with this seed, as convrot_quant.generation makes it."""
    if stop.is_set():
        raise Stopped
    size = arguments.get("height", 0), arguments.get("width", 0)
    preview = Preview(pipe, *size) if previews and all(size) else None
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    started = time.perf_counter()
    watch = Watch(device, arguments["num_inference_steps"], report, stop, preview)
    with PeakMemory(device) as memory, torch.inference_mode():
        output = pipe(**arguments, generator=generator, callback_on_step_end=watch)
    seconds = time.perf_counter() - started - (preview.seconds if preview is not None else 0)
    images = getattr(output, "images", None)
    if not images or not isinstance(images[0], Image.Image):
        raise UserError(f"{type(pipe).__name__} makes no images; the demo works on text-to-image pipelines.")
    return Drawn(images[0], seconds, watch.step_seconds, memory.bytes)
