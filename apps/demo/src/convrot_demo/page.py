"""The page: header, controls on the left, results on the right; on a phone prompt, results, settings."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from convrot_demo import controls as boxes
from convrot_demo import plan_table
from convrot_demo.api import Api
from convrot_demo.controls import Controls
from convrot_demo.events import NOTHING, Events, Outputs, message
from convrot_demo.models import Models
from convrot_demo.worker import Worker
from convrot_quant.cli.machine import machine

CSS = Path(__file__).with_name("page.css")
# system fonts: a page that opens asks nobody but this server
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
CACHE = (3600, 3600)  # seconds: how often the slider's images and uploads are looked through, and how old they get
JOBS = {"concurrency_id": "models", "concurrency_limit": 1}
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}


def theme() -> gr.themes.Base:
    """Neutral greys with one accent, in both modes."""
    base = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", font=list(FONTS), font_mono=list(MONO)
    )
    # white on the hue's own 500 is too pale to read
    fills = {"background_fill": "*primary_600", "background_fill_hover": "*primary_700"}
    return base.set(**{f"button_primary_{name}": value for name, value in fills.items()})


def build(worker: Worker, queue_size: int) -> gr.Blocks:
    """The page over a Worker; `queue_size` jobs may wait."""
    models = worker.models
    with gr.Blocks(title="ConvRot demo", analytics_enabled=False, delete_cache=CACHE) as page:
        _html(_header(models))
        _html(message(models.placement.note, "note"))
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="ask"):
                prompt, picture = boxes.prompt_box(models.traits), boxes.picture_box(models.traits)
                with gr.Row(elem_id="buttons"):
                    generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100)
                    stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=80)
                _html(f'<p class="cr-hint">One job at a time; up to {queue_size} wait in line, more are refused.</p>')
                _examples(models, prompt)
            with gr.Column(elem_id="show"):
                outputs = _results(models)
            with gr.Column(elem_id="settings"):
                controls = boxes.settings(prompt, picture, models.traits, models.bounds)
        events = Events(worker, controls, outputs)
        outputs.panes.value = events.start_panes()
        _connect(page, events, generate, stop)
        _api(worker, controls)
    page.queue(max_size=queue_size, default_concurrency_limit=1)
    return page


def _examples(models: Models, prompt: gr.Textbox) -> None:
    """Prompts that this model can draw; one that is chosen goes into the box. gr.Examples would cut them short."""
    examples = gr.Dropdown(list(models.traits.examples), label="Examples", elem_id="examples")
    examples.input(None, examples, prompt, js="(text) => text", queue=False, **HIDDEN)


def _html(value: str = "", elem_id: str | None = None) -> gr.HTML:
    """HTML in the page's own style instead of gradio's for prose."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False)


def _results(models: Models) -> Outputs:
    """The right side: panes and figures together, the rest in tabs."""
    shows_both = models.way != "4bit"
    shown = _html(message(""), elem_id="message")
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab("Side by side" if shows_both else "Image", elem_id="tab-panes"):
            panes = _html(elem_id="panes")
        with gr.Tab("Slider", elem_id="tab-slider", visible=shows_both):
            slider = gr.ImageSlider(
                show_label=False, format="png", max_height=640, interactive=False,
                buttons=["fullscreen"], elem_id="slider",
            )  # fmt: skip
            sides = f"{models.name_16bit} is left of the line, the quantized image right of it."
            _html(f'<p class="cr-hint">{escape(sides)}</p>')
        with gr.Tab("Difference", elem_id="tab-heat", visible=shows_both):
            heat = _html(NOTHING, elem_id="heat")
        with gr.Tab("Error per layer", elem_id="tab-layers", visible=shows_both):
            layers = _html(NOTHING, elem_id="layers")
        with gr.Tab("Plan", elem_id="tab-plan"):
            plan = _html(plan_table.html(models.plan(models.schemes[0])), elem_id="plan")
    figures = _html(elem_id="figures")
    links = _html(elem_id="links")
    return Outputs(shown, panes, figures, links, slider, heat, layers, plan)


def _connect(page: gr.Blocks, events: Events, generate: gr.Button, stop: gr.Button) -> None:
    controls, out = events.controls, events.out
    everything = {*controls.all()}
    filled = [controls.seed, *vars(out).values()]
    cleared = [out.message, out.panes, out.figures, out.links, out.slider, out.heat, out.layers]
    first = gr.on(
        [generate.click, controls.prompt.submit], events.begin, [controls.width, controls.height],
        [generate, stop, *cleared], queue=False, trigger_mode="once", **HIDDEN,
    )  # fmt: skip
    job = first.then(events.run, everything, filled, **JOBS, **HIDDEN)
    job.failure(events.refused, None, [generate, stop, out.message, out.panes], queue=False, **HIDDEN)
    job.then(events.end, None, [generate, stop], queue=False, **HIDDEN)
    stop.click(events.stop, None, None, queue=False, **HIDDEN)
    page.unload(events.leave)
    restored = [out.message, *controls.of_inputs().values()]
    page.load(events.restore, None, restored, queue=False, **HIDDEN)
    controls.scheme.change(events.plan, controls.scheme, out.plan, queue=False, **HIDDEN)


def _api(worker: Worker, controls: Controls) -> None:
    """The endpoint, on a button that is never shown: gradio has inputs and outputs only as components."""
    results: list[Any] = [gr.Image(visible=False, format="png"), gr.Image(visible=False, format="png")]
    results.append(gr.JSON(visible=False))
    gr.Button(visible=False).click(Api(worker).generate, controls.all(), results, api_name="generate", **JOBS)


def _header(models: Models) -> str:
    traits, here = models.traits, machine(models.options.device)
    cores = f", {here['cpu_cores']} cores" if models.options.device == "cpu" else ""
    facts = (traits.name, traits.pipeline, f"{here['device']}{cores}")
    chips = "".join(f"<span>{escape(str(fact))}</span>" for fact in facts)
    about = "One prompt, one seed: 16 bits and 4 bits."
    return f'<header class="cr-header"><h1>ConvRot</h1><p>{about}</p><div>{chips}</div></header>'
