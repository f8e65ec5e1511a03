"""The two panes: picture, progress and status of each side, as HTML that a running generation replaces.

Pictures are data URIs: nothing is written to disk, and a visitor's images are in nobody else's reach.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from html import escape

from PIL.Image import Image

from convrot_demo.comparison import Event, Side
from convrot_demo.drawing import Step

# the link's target is the picture beside it, so that it is not in the page twice
_SAVE = "this.href=this.closest('figure').querySelector('img').src"


@dataclass(frozen=True)
class Pane:
    """One side as it is seen: `source` is its picture, a preview until `finished`."""

    title: str
    status: str = ""
    source: str = ""
    step: Step | None = None
    finished: Side | None = None

    def after(self, event: Event) -> Pane:
        """The pane once an event of its side has happened."""
        if event.finished is not None:
            drawn = event.finished.drawn
            status = f"{seconds(drawn.seconds)}, {seconds(drawn.step_seconds)} a step"
            return Pane(event.finished.name, status, data_uri(drawn.image, "png"), self.step, event.finished)
        if event.step is not None:
            preview = event.step.preview
            source = self.source if preview is None else data_uri(preview, "jpeg")
            return replace(self, step=replace(event.step, preview=None), source=source, status="")
        return replace(self, status=event.status)

    def stopped(self) -> Pane:
        """The pane after Stop: what is finished stays, a preview goes."""
        return self if self.finished is not None else Pane(self.title, "stopped")


def html(panes: tuple[Pane, ...], size: tuple[int, int]) -> str:
    """Panes side by side; `size` is the (width, height) that their pictures have or will have."""
    return f'<div class="cr-panes">{"".join(_figure(pane, size) for pane in panes)}</div>'


def _figure(pane: Pane, size: tuple[int, int]) -> str:
    title = escape(pane.title)
    state = " cr-preview" if pane.finished is None else ""
    return (
        f'<figure class="cr-pane{state}"><figcaption><b>{title}</b>{_save(pane)}</figcaption>'
        f'<div class="cr-frame" style="aspect-ratio:{size[0]}/{size[1]}">{_picture(pane)}</div>'
        f'{_bar(pane)}<p class="cr-status">{escape(_status(pane))}&nbsp;</p></figure>'
    )


def _picture(pane: Pane) -> str:
    if pane.source:
        return f'<img alt="image, {escape(pane.title)}" src="{pane.source}">'
    waiting = "" if pane.step is not None else "nothing drawn yet"
    return f'<span class="cr-empty">{escape(pane.status or waiting)}</span>'


def _save(pane: Pane) -> str:
    if pane.finished is None:
        return ""
    name = f"{pane.title.lower()}.png"
    return f'<a class="cr-link" download="{escape(name)}" href="#" onclick="{_SAVE}">Save PNG</a>'


def _bar(pane: Pane) -> str:
    done, total = (0, 1) if pane.step is None else (pane.step.done, pane.step.total)
    share = 100 if pane.finished is not None else round(100 * done / max(total, 1))
    label = f'role="progressbar" aria-label="{escape(pane.title)}" aria-valuenow="{share}"'
    return f'<div class="cr-bar" {label} aria-valuemin="0" aria-valuemax="100"><i style="width:{share}%"></i></div>'


def _status(pane: Pane) -> str:
    """Below the picture; where there is none yet, the status is in its place."""
    if pane.step is None or pane.finished is not None:
        return pane.status if pane.source else ""
    return f"step {pane.step.done} of {pane.step.total}, {seconds(pane.step.step_seconds)} each"


def data_uri(image: Image, kind: str) -> str:
    """An image as a URI that holds it: png for results, jpeg for previews."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def seconds(value: float) -> str:
    """A time for people: 34 ms, 1.24 s, 75 s."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 60 else f"{value:.0f} s"
