"""The one endpoint that gradio_client and MCP see; its docstring is what they show."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr
from PIL import Image

from convrot_demo.comparison import Event, Job, Outcome
from convrot_demo.errors import UserError, sentence
from convrot_demo.jobs import make_job, record
from convrot_demo.worker import Failed, Worker

Answer = tuple[Image.Image | None, Image.Image | None, dict[str, Any]]


class Api:
    """generate over one Worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def generate(
        self, prompt: str, negative_prompt: str, negative_strength: float, seed: int, steps: int, guidance: float,
        width: int, height: int, scheme: str, lora_scale: float, random_seed: bool,
        picture: Image.Image | None = None, lora: str | None = None,
    ) -> Iterator[Answer]:  # fmt: skip
        """Draw one prompt with the 16-bit model and with the 4-bit model, from the same noise, and compare them.

        Args:
            prompt: What to draw.
            negative_prompt: What to keep out of the image; models without one ignore it.
            negative_strength: How strongly the negative prompt counts.
            seed: Of the noise that both images start from.
            steps: Denoising steps.
            guidance: Guidance scale.
            width: Pixels.
            height: Pixels.
            scheme: How the 4-bit side is quantized: W4A4, W4A4-r16 (a low-rank branch beside it), W4A8, W8A8 or paper.
            lora_scale: Strength of the LoRA.
            random_seed: Draw a new seed instead of `seed`.
            picture: The image to edit, for models that edit images.
            lora: A LoRA of this model, as a safetensors file.

        Returns:
            The 16-bit image (none where it is not shown), the 4-bit image, settings and figures.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        try:
            job = make_job(self.worker.models, given)
        except UserError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        yield from self._answers(job)

    def _answers(self, job: Job) -> Iterator[Answer]:
        """Progress without images, then the images: gradio can cancel a job from its first answer on."""
        yield None, None, {}
        with closing(self.worker.stream(job, threading.Event())) as events:
            for event in events:
                if isinstance(event, Outcome):
                    full = None if event.full is None else event.full.drawn.image
                    yield full, event.quantized.drawn.image, record(self.worker.models, event)
                elif isinstance(event, Failed):
                    size = (job.inputs.width, job.inputs.height)
                    raise gr.Error(sentence(event.error, size), print_exception=False)
                else:
                    yield None, None, _progress(event)


def _progress(event: Event | None) -> dict[str, Any]:
    """A step; the rest is of no use to a client."""
    if event is None or event.step is None:
        return {}
    return {"side": ("16-bit", "4-bit")[event.side], "step": event.step.done, "steps": event.step.total}
