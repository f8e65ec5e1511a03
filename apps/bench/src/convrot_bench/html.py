"""The report as one page that holds everything: figures, charts, tables. Made from rows alone, the same every time."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from convrot_bench.bars import Rows
from convrot_bench.charts import Chart
from convrot_bench.compare import Comparison, changes_table
from convrot_bench.markdown import to_html
from convrot_bench.results import load

LEAD = (
    "4-bit (W4A4) inference for diffusion transformers with regular-Hadamard rotations: what was measured, "
    "against what, on which machine. Every number on this page comes from a raw row that is linked at its end."
)
_DRAWING = re.compile(r"(<!-- drawing -->).*?(<!-- /drawing -->)", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """One number for a reader in a hurry."""

    value: str
    what: str
    how: str


@dataclass(frozen=True)
class Part:
    """Prose and tables; under `fold`, closed until they are asked for."""

    html: Markup
    fold: str = ""


@dataclass(frozen=True)
class Section:
    """A chapter of the page and its line in the contents."""

    slug: str
    title: str
    intro: str = ""
    cards: Sequence[Card] = ()
    charts: Sequence[Chart] = ()
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class Source:
    """What a page is made of: rows, the same by file as the page links to them, pictures, and changes if asked for."""

    rows: Rows
    files: dict[str, Rows] = field(default_factory=dict)
    images: Path | None = None
    changes: Comparison | None = None


MakeSection = Callable[[Source], Section | None]


def markdown(text: str, fold: str = "") -> Part:
    """A part of Markdown."""
    return Part(Markup(to_html(text)), fold)


def render(source: Source, makers: Sequence[MakeSection]) -> str:
    """The page; a section without rows is not there."""
    environment = Environment(loader=PackageLoader("convrot_bench"), autoescape=True, keep_trailing_newline=True)
    sections = [section for make in makers if (section := make(source))]
    return environment.get_template("report.html.j2").render(sections=sections, lead=LEAD)


def changes(source: Source) -> Section | None:
    """What became worse since another run."""
    if source.changes is None:
        return None
    found = source.changes
    parts = [markdown(changes_table(found, only_flagged=True)), markdown(changes_table(found), "Every figure of both")]
    return Section("changes", "Changes", f"Medians of {found.new} against {found.old}, the worst first.", parts=parts)


def gather(page: Path, files: Sequence[Path], *, images: Path | None, changes: Comparison | None = None) -> Source:
    """The rows of the files, with links from where the page lies."""
    by_file = {os.path.relpath(file, page.parent).replace(os.sep, "/"): load([file]) for file in files}
    return Source([row for rows in by_file.values() for row in rows], by_file, images, changes)


def update(page: Path, source: Source, makers: Sequence[MakeSection], *, check: bool) -> list[Path]:
    """Write the page if it has changed (with `check`, only say so). Drawings count by their figures, not by bytes."""
    new, old = render(source, makers), page.read_text() if page.exists() else ""
    if _without_drawings(new) == _without_drawings(old):
        return []
    if not check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(new)
    return [page]


def _without_drawings(html: str) -> str:
    return _DRAWING.sub(r"\1\2", html)
