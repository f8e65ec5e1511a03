"""The Markdown tables of README and docs as HTML: the page shows the text that they show."""

import re
from functools import cache
from itertools import pairwise
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from convrot_bench.bars import MET, MISSED

NUMBER = re.compile(r"^[+\-–<>=~]*[\d.,]+( ?(%|x|us|ms|s|GB|MB|TOPS|GB/s|dB))?(–[\d.,]+ ?%?)?( \([\d.]+\))?$")
SHORT, LONG = 28, 50  # letters of a cell that stays on one line; of one that needs room
FEW = 3  # columns: a phone shows such a table row by row, one cell under the other


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def to_html(text: str) -> str:
    """Paragraphs and tables; wide tables scroll by themselves, columns of numbers stand right."""
    parser = _parser()
    tokens = parser.parse(text)
    if tokens:
        _align(tokens)
    html = str(parser.renderer.render(tokens, parser.options, {}))
    html = html.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")
    html = html.replace(MET, f'<span class="met">{MET}</span>')
    return html.replace(f"<strong>{MISSED.strip('*')}", f'<strong class="missed">{MISSED.strip("*")}')


def _align(tokens: list[Token]) -> None:
    """Classes for cells: of numbers, short, long. A heading follows its column."""
    heads: list[Token] = []
    cells: list[list[tuple[Token, str]]] = []
    table, column = tokens[0], 0
    for token, following in pairwise(tokens):
        if token.type == "table_open":
            table, heads, cells = token, [], []
        elif token.type == "th_open":
            heads.append(token)
            cells.append([])
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            cells[column].append((token, _plain(following)))
            column += 1
        elif token.type == "tbody_close":
            if len(heads) <= FEW:
                table.attrSet("class", "few")
            for head, column_cells in zip(heads, cells, strict=True):
                _classify(head, column_cells)


def _classify(head: Token, cells: list[tuple[Token, str]]) -> None:
    texts = [text for _, text in cells if text]
    if texts and sum(bool(NUMBER.match(text)) for text in texts) > len(texts) / 2:
        head.attrSet("class", "number")
    for cell, text in cells:
        if NUMBER.match(text):
            cell.attrSet("class", "number")
        elif len(text) <= SHORT:
            cell.attrSet("class", "short")
        elif len(text) >= LONG:
            cell.attrSet("class", "long")


def _plain(inline: Any) -> str:
    """The text of a cell without its marks."""
    return "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
