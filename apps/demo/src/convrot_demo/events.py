"""Events: what the page does when something is pressed. Nothing here knows how the page is laid out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from convrot_demo import figures, heat, layers, panes, plan_table
from convrot_demo.comparison import QUANTIZED, Event, Outcome
from convrot_demo.controls import Controls
from convrot_demo.drawing import Stopped
from convrot_demo.errors import UserError, sentence
from convrot_demo.inputs import from_query
from convrot_demo.jobs import make_job, record
from convrot_demo.panes import Pane
from convrot_demo.worker import Failed, Tickets, Worker

SHOWN_EVERY = 0.15  # seconds between updates of the page that show nothing new but a number
NOTHING = '<p class="cr-hint">Nothing drawn yet.</p>'
Update = dict[Any, Any]


@dataclass(frozen=True)
class Outputs:
    """The components that a run fills."""

    message: gr.HTML
    panes: gr.HTML
    figures: gr.HTML
    links: gr.HTML
    slider: gr.ImageSlider
    heat: gr.HTML
    layers: gr.HTML
    plan: gr.HTML


def message(text: str, kind: str = "error") -> str:
    """A sentence above the results; an empty one takes no room."""
    role = "alert" if kind == "error" else "note"
    return f'<p class="cr-message cr-{kind}" role="{role}">{escape(text)}</p>' if text else ""


class Events:
    """The page's callbacks over one Worker."""

    def __init__(self, worker: Worker, controls: Controls, outputs: Outputs) -> None:
        self.worker, self.controls, self.out = worker, controls, outputs
        self.models, self.tickets = worker.models, Tickets()

    def begin(self, width: float | None, height: float | None, request: gr.Request) -> list[Any]:
        """Generate was pressed: at once, before the job's turn. -> both buttons, then every output but the plan."""
        self.tickets.open(request.session_hash or "")
        defaults = self.models.traits.defaults
        size = int(width or 0) or defaults.width, int(height or 0) or defaults.height  # checked when its turn comes
        shown = panes.html(self._visible(self.empty_panes("waiting for its turn")), size)
        buttons = [gr.Button(interactive=False), gr.Button(interactive=True)]
        # an older run's figures beside a new picture would be taken for this one's
        return [*buttons, message(""), shown, "", "", None, NOTHING, NOTHING]

    def end(self, request: gr.Request) -> tuple[Any, Any]:
        """The job is over, however it ended. -> both buttons."""
        self.tickets.close(request.session_hash or "")
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def refused(self, request: gr.Request) -> tuple[Any, Any, str, str]:
        """Gradio did not run the job: a full queue, or its own checks. -> both buttons, message, panes."""
        text = "This job was refused: the line is full, or a setting is out of bounds. Look at them and try again."
        return *self.end(request), message(text), self.start_panes()

    def stop(self, request: gr.Request) -> None:
        """Stop was pressed."""
        self.tickets.stop(request.session_hash or "")

    def leave(self, request: gr.Request) -> None:
        """The page was closed: gradio takes its job out of the line, and closes one that runs."""
        self.stop(request)
        self.tickets.close(request.session_hash or "")

    def run(self, values: Update, request: gr.Request) -> Iterator[Update]:
        """The job's turn: the page follows it step by step."""
        try:
            job = make_job(self.models, {name: values[box] for name, box in self._boxes().items()})
        except UserError as error:
            yield {self.out.message: message(sentence(error)), self.out.panes: self.start_panes()}
            return
        yield {self.controls.seed: job.inputs.seed}
        size, shown = (job.inputs.width, job.inputs.height), 0.0
        sides = [Pane(self.models.name_16bit), Pane(job.inputs.scheme, f"comes after {self.models.name_16bit}")]
        with closing(self.worker.stream(job, self.tickets.take(request.session_hash or ""))) as events:
            for event in events:
                if event is None:
                    yield {self.out.message: gr.skip()}
                elif isinstance(event, Outcome):
                    yield self._results(event, tuple(sides))
                elif isinstance(event, Failed):
                    yield self._failure(event.error, tuple(sides), size)
                else:
                    sides[event.side] = sides[event.side].after(event)
                    if _is_news(event) or time.monotonic() - shown > SHOWN_EVERY:
                        shown = time.monotonic()
                        yield {self.out.panes: panes.html(self._visible(sides), size)}

    def restore(self, request: gr.Request) -> list[Any]:
        """A page was opened: its link's settings -> message, then the controls of Inputs."""
        boxes = self.controls.of_inputs()
        query = dict(request.query_params or {})
        if not boxes.keys() & query.keys():
            return [gr.skip()] * (1 + len(boxes))
        try:
            inputs = from_query(query, self.models.traits.defaults, self.models.bounds)
        except UserError as error:
            text = f"This link's settings are not used: {sentence(error)}."
            return [message(text), *[gr.skip()] * len(boxes)]
        return [gr.skip(), *inputs.to_dict().values()]

    def plan(self, scheme: str) -> str:
        """Another scheme was chosen -> its plan."""
        return plan_table.html(self.models.plan(scheme))

    def empty_panes(self, status: str) -> tuple[Pane, Pane]:
        """Both panes before anything has happened."""
        return Pane(self.models.name_16bit, status), Pane(self.models.traits.defaults.scheme, status)

    def start_panes(self) -> str:
        """What the page shows before the first run."""
        defaults = self.models.traits.defaults
        return panes.html(self._visible(self.empty_panes("")), (defaults.width, defaults.height))

    def _boxes(self) -> dict[str, Any]:
        own = {name: getattr(self.controls, name) for name in ("random_seed", "picture", "lora")}
        return self.controls.of_inputs() | own

    def _visible(self, sides: Sequence[Pane]) -> tuple[Pane, ...]:
        return tuple(sides[QUANTIZED:]) if self.models.way == "4bit" else tuple(sides)

    def _results(self, outcome: Outcome, sides: tuple[Pane, ...]) -> Update:
        full, quantized = outcome.full, outcome.quantized.drawn.image
        image = None if full is None else full.drawn.image
        query = outcome.job.inputs.query(self.models.traits.defaults)
        return {
            self.out.panes: panes.html(self._visible(sides), quantized.size),
            self.out.figures: figures.html(outcome, (*outcome.warnings, *self._notes())),
            self.out.links: figures.settings_link(record(self.models, outcome), query),
            self.out.slider: gr.skip() if image is None else (image, quantized),
            self.out.heat: gr.skip() if image is None else heat.html(quantized, image),
            self.out.layers: layers.html(outcome.layer_l2, outcome.plan),
            self.out.plan: plan_table.html(outcome.plan),
        }

    def _failure(self, error: BaseException, sides: tuple[Pane, ...], size: tuple[int, int]) -> Update:
        ended = [pane.stopped() for pane in sides]
        if isinstance(error, Stopped):
            return {self.out.panes: panes.html(self._visible(ended), size)}
        ended = [pane if pane.finished is not None else Pane(pane.title, "failed") for pane in sides]
        shown = panes.html(self._visible(ended), size)
        return {self.out.message: message(sentence(error, size)), self.out.panes: shown}

    def _notes(self) -> tuple[str, ...]:
        if self.models.options.device != "cpu":
            return ()
        return (
            "On a CPU the 4-bit side runs on the reference backend: it shows the numbers and the size, not the speed "
            "of a GPU. Peak memory is the whole process's, less the transformer that waits.",
        )


def _is_news(event: Event) -> bool:
    return event.step is None or event.step.preview is not None
