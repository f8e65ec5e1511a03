"""What a loaded pipeline takes and what suits it: which controls there are, their defaults and bounds, examples."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convrot_demo.inputs import Bounds, Inputs
from convrot_quant.generation import image_size, size_multiple

MINI_FLUX_STEPS, SCHNELL_STEPS = 20, 4  # apps/mini-flux/README.md; the model card of FLUX.1-schnell
USUAL_SIZE = 1024
SCENES = (
    "a red fox curled up asleep in fresh snow, soft morning light",
    "a small bookshop on a rainy street at night, warm windows, a sign that says OPEN",
    "an astronaut watering tomatoes in a greenhouse on Mars, photograph",
    "a watercolour of a lighthouse on a cliff, gulls, wide sky",
)
EDITS = ("make it a watercolour", "turn day into night, with lit windows", "add snow on every surface")


@dataclass(frozen=True)
class Limits:
    """The server's own bounds, whatever the model could do."""

    steps: int = 50
    size: int = 2048


@dataclass(frozen=True)
class Traits:
    """A pipeline for the page: its names, which optional controls it has, defaults, examples."""

    name: str
    pipeline: str
    transformer: str
    has_negative: bool
    has_strength: bool  # of the negative prompt, apart from guidance
    has_guidance: bool
    has_image: bool
    has_lora: bool
    defaults: Inputs
    examples: tuple[str, ...]


def read_traits(pipe: Any, name: str, *, mini_flux: Path | None, schemes: tuple[str, ...]) -> Traits:
    """`mini_flux`: the shipped folder if that is the model. Reads signatures and configs: a meta pipeline will do."""
    call = inspect.signature(pipe.__call__).parameters
    distilled = getattr(pipe.transformer.config, "guidance_embeds", True) is False  # schnell: guidance has no effect
    has_image = "image" in call
    size = image_size(pipe) or USUAL_SIZE
    prompts: tuple[str, ...] = EDITS if has_image else SCENES
    steps = SCHNELL_STEPS if distilled else _default(call, "num_inference_steps", MINI_FLUX_STEPS)
    if mini_flux is not None:
        prompts, steps = _prompts_of(mini_flux), MINI_FLUX_STEPS
    guidance = _default(call, "guidance_scale", 0.0)
    defaults = Inputs(prompts[0], seed=0, steps=steps, guidance=guidance, width=size, height=size, scheme=schemes[0])
    return Traits(
        name=name,
        pipeline=type(pipe).__name__,
        transformer=type(pipe.transformer).__name__,
        has_negative="negative_prompt" in call and not distilled,
        has_strength="true_cfg_scale" in call,
        has_guidance="guidance_scale" in call and not distilled,
        has_image=has_image,
        has_lora=hasattr(pipe, "load_lora_weights") and hasattr(pipe.transformer, "load_lora_adapter"),
        defaults=defaults,
        examples=prompts,
    )


def read_bounds(pipe: Any, limits: Limits, *, mini_flux: Path | None, schemes: tuple[str, ...]) -> Bounds:
    """Sizes from a quarter of the model's own to twice as much, within the server's limits."""
    size, multiple = image_size(pipe) or USUAL_SIZE, size_multiple(pipe)
    largest = size if mini_flux is not None else 2 * size  # beyond its own size mini-flux draws its scene twice
    low, high = _up(min(size // 4, limits.size), multiple), min(largest, limits.size) // multiple * multiple
    if low > high or size > limits.size:
        raise ValueError(f"--max-size {limits.size} is below the {size} x {size} of this model; give at least {size}")
    return Bounds(limits.steps, (low, high), multiple, schemes)


def _up(size: int, multiple: int) -> int:
    return max(-(-size // multiple), 1) * multiple


def _default(call: Any, name: str, otherwise: Any) -> Any:
    default = call[name].default if name in call else inspect.Parameter.empty
    return default if isinstance(default, (int, float)) else otherwise


def _prompts_of(weights: Path) -> tuple[str, ...]:
    """The captions that ship beside mini-flux: it knows two things on a floor and nothing else."""
    lines = (weights.parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
