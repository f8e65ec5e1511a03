"""The controls: one component for each input, with the model's defaults and bounds; what it lacks is not shown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from convrot_demo.inputs import GUIDANCE, LORA_SCALE, NEGATIVE_STRENGTH, PROMPT_CHARACTERS, Bounds, Inputs
from convrot_demo.lora import MAX_BYTES
from convrot_demo.traits import Traits


@dataclass(frozen=True)
class Controls:
    """The fields of Inputs by name, then what is no part of them."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    negative_strength: gr.Slider
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    width: gr.Slider
    height: gr.Slider
    scheme: gr.Radio
    lora_scale: gr.Slider
    random_seed: gr.Checkbox
    picture: gr.Image
    lora: gr.File

    def all(self) -> list[Any]:
        """Every component, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def of_inputs(self) -> dict[str, Any]:
        """{field of Inputs: its component}."""
        return {field.name: getattr(self, field.name) for field in fields(Inputs)}


def prompt_box(traits: Traits) -> gr.Textbox:
    """The first thing on the page."""
    return gr.Textbox(
        traits.defaults.prompt,
        label="Prompt",
        lines=3,
        max_lines=6,
        max_length=PROMPT_CHARACTERS,
        elem_id="prompt",
    )


def picture_box(traits: Traits) -> gr.Image:
    """For models that edit an image."""
    return gr.Image(type="pil", label="Image to edit", sources=["upload"], visible=traits.has_image, height=220)


def settings(prompt: gr.Textbox, picture: gr.Image, traits: Traits, bounds: Bounds) -> Controls:
    """The panel of settings, laid out where it is called."""
    defaults = traits.defaults
    label = "Scheme of the quantized side"
    scheme = gr.Radio(list(bounds.schemes), value=defaults.scheme, label=label, elem_id="scheme")
    with gr.Row():
        seed = gr.Number(defaults.seed, label="Seed", precision=0, min_width=120)
        random_seed = gr.Checkbox(False, label="Random seed", min_width=110, elem_id="random-seed")
    steps = gr.Slider(1, bounds.steps, defaults.steps, step=1, label="Steps", elem_id="steps")
    guidance = gr.Slider(*GUIDANCE, defaults.guidance, step=0.1, label="Guidance", visible=traits.has_guidance)
    width, height = _size("Width", defaults.width, bounds), _size("Height", defaults.height, bounds)
    negative, strength = _negative(traits)
    lora, scale = _lora(traits)
    return Controls(
        prompt, negative, strength, seed, steps, guidance, width, height, scheme, scale, random_seed, picture, lora
    )


def _size(label: str, value: int, bounds: Bounds) -> gr.Slider:
    return gr.Slider(*bounds.sizes, value, step=bounds.size_multiple, label=label)


def _negative(traits: Traits) -> tuple[gr.Textbox, gr.Slider]:
    with gr.Accordion("Negative prompt", open=False, visible=traits.has_negative):
        info = "What to keep out of the image. Each step then takes twice as long."
        text = gr.Textbox("", label="Negative prompt", info=info, lines=2, max_length=PROMPT_CHARACTERS)
        default = traits.defaults.negative_strength
        strength = gr.Slider(
            *NEGATIVE_STRENGTH, default, step=0.5, label="Strength (true CFG)", visible=traits.has_strength
        )
    return text, strength


def _lora(traits: Traits) -> tuple[gr.File, gr.Slider]:
    with gr.Accordion("LoRA", open=False, visible=traits.has_lora):
        label = f"LoRA of this model (.safetensors, up to {MAX_BYTES / 2**30:g} GiB)"
        file = gr.File(label=label, file_types=[".safetensors"], height=120, elem_id="lora")
        scale = gr.Slider(*LORA_SCALE, traits.defaults.lora_scale, step=0.05, label="Scale")
    return file, scale
