"""compare: the 16-bit image, then the quantized one, from the same noise; reports what happens on the way."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image

from convrot_demo.drawing import Drawn, Step, Stopped, arguments_of, draw
from convrot_demo.inputs import Inputs
from convrot_demo.lora import Lora, applied
from convrot_demo.models import SAVED, Models
from convrot_quant.compare import psnr_db, ssim
from convrot_quant.generation import cut_prompts
from convrot_quant.plans import Plan
from convrot_quant.probe import LayerProbe

FULL, QUANTIZED = 0, 1  # the two sides, left and right


@dataclass(frozen=True)
class Job:
    """What one press of Generate asks for."""

    inputs: Inputs
    picture: Image | None = None
    lora: Lora | None = None


@dataclass(frozen=True)
class Side:
    """One finished image, with what the figures compare."""

    name: str
    drawn: Drawn
    transformer_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "name": self.name,
            "seconds": self.drawn.seconds,
            "seconds_per_step": self.drawn.step_seconds,
            "peak_memory_bytes": self.drawn.peak_bytes,
            "transformer_bytes": self.transformer_bytes,
        }


@dataclass(frozen=True)
class Event:
    """Something happened to a side: a status line, a step, or its finished image."""

    side: int
    status: str = ""
    step: Step | None = None
    finished: Side | None = None


@dataclass(frozen=True)
class Outcome:
    """Both sides (no 16-bit one where it is not shown), and how far apart they are."""

    job: Job
    plan: Plan
    full: Side | None
    quantized: Side
    psnr_db: float | None  # infinite for equal images
    ssim: float | None
    layer_l2: dict[str, float]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Inputs and figures, ready for JSON (an infinite PSNR is null)."""
        lora, psnr = self.job.lora, self.psnr_db
        return {
            "inputs": self.job.inputs.to_dict(),
            "lora": None if lora is None else {"name": lora.name, "sha256": lora.sha256},
            "sides": [side.to_dict() for side in (self.full, self.quantized) if side is not None],
            "psnr_db": psnr if psnr is not None and math.isfinite(psnr) else None,
            "ssim": self.ssim,
            "layer_l2": self.layer_l2,
        }


def compare(models: Models, job: Job, report: Callable[[Event], None], stop: threading.Event) -> Outcome:
    """Raises Stopped once `stop` is set; the models stay usable after that and after any error."""
    run, plan = _Run(models, job, report, stop), models.plan(job.inputs.scheme)
    full, probe = None, None
    if models.way != "4bit":
        pipe = models.take_16bit()
        calls = 2 if job.inputs.negative_prompt else 1  # a negative prompt is a call of its own in every step
        probe = LayerProbe(pipe.transformer, plan, calls * job.inputs.steps)
        with applied(pipe, job.lora, job.inputs.lora_scale), probe:
            full = run.side(pipe, FULL)
    if stop.is_set():
        raise Stopped
    report(Event(QUANTIZED, _loading(models, job.inputs.scheme)))
    pipe = models.take_quantized(job.inputs.scheme)
    with applied(pipe, job.lora, job.inputs.lora_scale):
        quantized = run.side(pipe, QUANTIZED)
        errors = {} if probe is None else probe.errors(pipe.transformer, plan)
    psnr, similarity = None, None
    if full is not None:
        pair = quantized.drawn.image, full.drawn.image
        psnr, similarity = psnr_db(*pair), ssim(*pair)
    return Outcome(job, plan, full, quantized, psnr, similarity, errors, _cut(pipe, job))


@dataclass(frozen=True)
class _Run:
    """What both sides of a run share."""

    models: Models
    job: Job
    report: Callable[[Event], None]
    stop: threading.Event

    def side(self, pipe: Any, side: int) -> Side:
        """One side's image, reported as it goes."""
        models, inputs, quantized = self.models, self.job.inputs, side == QUANTIZED
        self.report(Event(side, "reading the prompt"))
        drawn = draw(
            pipe,
            arguments_of(pipe, inputs, self.job.picture),
            inputs.seed,
            device=models.options.device,
            report=lambda step: self.report(Event(side, step=step)),
            stop=self.stop,
            previews=models.shows_previews,
        )
        name = inputs.scheme if quantized else models.name_16bit
        alone = _without(drawn, models.other_bytes(quantized=quantized))
        finished = Side(name, alone, models.bytes_quantized if quantized else models.bytes_16bit)
        self.report(Event(side, finished=finished))
        return finished


def _without(drawn: Drawn, waiting: int) -> Drawn:
    """The figures as they were if the other side's transformer were not in memory."""
    peak = None if drawn.peak_bytes is None else max(drawn.peak_bytes - waiting, 0)
    return replace(drawn, peak_bytes=peak)


def _loading(models: Models, scheme: str) -> str:
    if models.scheme == scheme:
        return "reading the prompt"
    return "loading" if scheme == SAVED else f"quantizing ({scheme})"


def _cut(pipe: Any, job: Job) -> tuple[str, ...]:
    arguments = arguments_of(pipe, job.inputs, job.picture)
    return tuple(
        f"The prompt has {tokens} tokens, more than the {limit} that this model reads: its end is cut off."
        for _, tokens, limit in cut_prompts(pipe, [job.inputs.prompt], arguments)
    )
