"""draw_sheet: one PNG with the 16-bit and quantized images of each prompt side by side, titles, captions, figures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from convrot_quant.compare import Result
from convrot_quant.plans import size_text

MIN_SIDE = 224  # smaller images are enlarged by a whole factor, so that pixels stay what they are
MARGIN, GAP, CARD_GAP = 36, 10, 40
MAX_WIDTH, ASPECT = 2600, 1.6  # of the whole sheet, in pixels and as width over height
INK, FAINT, PAPER, RULE = "#1a1a1a", "#6b6b6b", "#ffffff", "#dcdcdc"
TITLE, HEAD, TEXT, SMALL = 34, 22, 18, 16


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Layout:
    """Sizes of the sheet's parts: cards (one per picture, a column per model) in a grid."""

    def __init__(self, results: Sequence[Result]) -> None:
        pictures = results[0].pictures
        width, height = pictures[0].image.size
        self.factor = max(1, math.ceil(MIN_SIDE / min(width, height)))
        self.image = (width * self.factor, height * self.factor)
        self.card_width = len(results) * self.image[0] + (len(results) - 1) * GAP
        self.captions = [_wrap(picture.prompt, TEXT, self.card_width) for picture in pictures]
        lines = max(len(caption) for caption in self.captions)
        self.caption_height = SMALL + 18 + lines * (TEXT + 6)
        self.card_height = self.image[1] + self.caption_height
        self.per_row = self._cards_per_row(len(pictures))
        self.rows = math.ceil(len(pictures) / self.per_row)
        self.head = MARGIN + TITLE + 14 + SMALL + 28
        self.column_head = HEAD + 8 + SMALL + 12
        width = 2 * MARGIN + self.per_row * (self.card_width + CARD_GAP) - CARD_GAP
        height = self.head + self.column_head + self.rows * (self.card_height + CARD_GAP // 2) + MARGIN // 2
        self.size = (width, height)

    def _cards_per_row(self, count: int) -> int:
        def distance(n: int) -> float:
            shape = n * (self.card_width + CARD_GAP) / (math.ceil(count / n) * (self.card_height + CARD_GAP) + 150)
            empty = math.ceil(count / n) * n - count
            return abs(math.log(shape / ASPECT)) + 6 * empty / count

        most = max(1, (MAX_WIDTH - 2 * MARGIN + CARD_GAP) // (self.card_width + CARD_GAP))
        return min(range(1, min(count, most) + 1), key=distance)

    def card(self, i: int) -> tuple[int, int]:
        """The left upper corner of card i."""
        row, column = divmod(i, self.per_row)
        x = MARGIN + column * (self.card_width + CARD_GAP)
        return x, self.head + self.column_head + row * (self.card_height + CARD_GAP // 2)


def draw_sheet(results: Sequence[Result], *, title: str, subtitle: str) -> Image.Image:
    """results[0] is the 16-bit run; every other one adds a column. Pictures go left to right, then down."""
    layout = _Layout(results)
    sheet = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(sheet)
    inner = layout.size[0] - 2 * MARGIN
    draw.text((MARGIN, MARGIN), _fit(title, TITLE, inner), INK, _font(TITLE))
    draw.text((MARGIN, MARGIN + TITLE + 14), _fit(subtitle, SMALL, inner), FAINT, _font(SMALL))
    draw.line((MARGIN, layout.head - 14, layout.size[0] - MARGIN, layout.head - 14), RULE, 1)
    for i in range(len(results[0].pictures)):
        x, y = layout.card(i)
        for column, result in enumerate(results):
            left = x + column * (layout.image[0] + GAP)
            if i < layout.per_row:
                _column_title(draw, result, (left, layout.head), layout.image[0])
            image = result.pictures[i].image.convert("RGB")
            sheet.paste(image.resize(layout.image, Image.Resampling.NEAREST), (left, y))
            figures = _figures(result, i)
            draw.text((left, y + layout.image[1] + 6), _fit(figures, SMALL, layout.image[0]), FAINT, _font(SMALL))
        for line, text in enumerate(layout.captions[i]):
            below = y + layout.image[1] + SMALL + 16 + line * (TEXT + 6)
            draw.text((x, below), text, INK, _font(TEXT))
    return sheet


def _column_title(draw: ImageDraw.ImageDraw, result: Result, at: tuple[int, int], width: int) -> None:
    draw.text(at, _fit(result.name, HEAD, width), INK, _font(HEAD))
    text = f"{size_text(result.transformer_bytes)}, {result.seconds:.2f} s an image"
    draw.text((at[0], at[1] + HEAD + 8), _fit(text, SMALL, width), FAINT, _font(SMALL))


def _figures(result: Result, i: int) -> str:
    """What is written right below a picture."""
    if not result.psnr_db:
        return f"seed {result.pictures[i].seed}"
    if math.isinf(result.psnr_db[i]):
        return "identical"
    return f"PSNR {result.psnr_db[i]:.1f} dB, SSIM {result.ssim[i]:.3f}"


def _fit(text: str, size: int, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if _font(size).getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda n: int(_font(size).getlength(text[:n] + "...")))
    return text[: max(fitting - 1, 0)].rstrip() + "..."


def _wrap(text: str, size: int, width: int, most: int = 3) -> list[str]:
    """The text in at most `most` lines of `width` pixels."""
    words, lines = text.split() or [""], [""]
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if _font(size).getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] = _fit(" ".join([lines[-1], *words[i:]]), size, width)
            break
        else:
            lines.append(word)
    return [_fit(line, size, width) for line in lines]
