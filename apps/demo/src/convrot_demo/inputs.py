"""Inputs of one comparison: bounded, as JSON, and as a link that restores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

from convrot_demo.errors import UserError

PROMPT_CHARACTERS = 2000
SEEDS = 2**32  # a browser's numbers are exact up to 2**53
GUIDANCE = (0.0, 20.0)
NEGATIVE_STRENGTH = (1.0, 10.0)
LORA_SCALE = (0.0, 2.0)


@dataclass(frozen=True)
class Bounds:
    """What this server's model takes: bounds of the numbers, and the schemes that there are."""

    steps: int
    sizes: tuple[int, int]
    size_multiple: int
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """Everything that decides both images but the model, an image to edit and the LoRA file."""

    prompt: str
    negative_prompt: str = ""
    negative_strength: float = 4.0
    seed: int = 0
    steps: int = 20
    guidance: float = 3.5
    width: int = 1024
    height: int = 1024
    scheme: str = "W4A4"
    lora_scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return asdict(self)

    def query(self, defaults: Inputs) -> str:
        """?prompt=...&seed=...: what differs from the page's defaults, the prompt and the seed always."""
        values, old = self.to_dict(), defaults.to_dict()
        kept = {key: v for key, v in values.items() if v != old[key] or key in ("prompt", "seed")}
        return "?" + urlencode(kept)


def from_query(query: Mapping[str, str], defaults: Inputs, bounds: Bounds) -> Inputs:
    """The inverse of query; keys that are no input are a page's own business (?__theme=dark)."""
    known = {f.name for f in fields(Inputs)}
    return check({**defaults.to_dict(), **{key: value for key, value in query.items() if key in known}}, bounds)


def check(values: Mapping[str, Any], bounds: Bounds) -> Inputs:
    """Values from a form, a link or an API call -> Inputs; the first that is out of bounds is refused by name."""
    low, high = bounds.sizes
    inputs = Inputs(
        prompt=_text("prompt", values["prompt"]).strip(),
        negative_prompt=_text("negative_prompt", values["negative_prompt"]).strip(),
        negative_strength=_number("negative_strength", values["negative_strength"], *NEGATIVE_STRENGTH),
        seed=_whole("seed", values["seed"], 0, SEEDS - 1),
        steps=_whole("steps", values["steps"], 1, bounds.steps),
        guidance=_number("guidance", values["guidance"], *GUIDANCE),
        width=_whole("width", values["width"], low, high, bounds.size_multiple),
        height=_whole("height", values["height"], low, high, bounds.size_multiple),
        scheme=_one_of("scheme", values["scheme"], bounds.schemes),
        lora_scale=_number("lora_scale", values["lora_scale"], *LORA_SCALE),
    )
    if not inputs.prompt:
        raise UserError("prompt is empty: write what to draw, or pick an example")
    return inputs


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {type(value).__name__}; write it in words")
    if len(value) > PROMPT_CHARACTERS:
        raise UserError(
            f"{name} must have at most {PROMPT_CHARACTERS} characters, got {len(value)}; "
            "shorten it: models read a few hundred tokens"
        )
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:  # false for nan as well
        raise UserError(
            f"{name} must be from {low:.12g} to {high:.12g}, got {_shown(value)}; choose a number in between"
        )
    return number


def _whole(name: str, value: Any, low: int, high: int, multiple: int = 1) -> int:
    """A whole number: forms and links give floats and text too."""
    number = _number(name, value, low, high)
    if number % multiple:
        kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        near = min(max(round(number / multiple) * multiple, low), high)
        raise UserError(f"{name} must be {kind}, got {_shown(value)}; use {near}")
    return int(number)


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}; choose one of them")
    return str(value)


def _shown(value: Any) -> str:
    """A value that came from outside, short enough for a sentence."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
