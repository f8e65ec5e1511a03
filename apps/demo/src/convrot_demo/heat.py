"""Heat map of the difference of two images, on one fixed scale, so that schemes can be compared with each other."""

from __future__ import annotations

from html import escape

import numpy
from PIL import Image

from convrot_demo.panes import data_uri

FULL_SCALE = 64  # of 255: brightest from there on
# from dark to bright through violet and orange, ever lighter: readable in grey and to colour-blind eyes
ANCHORS = ((0, 0, 4), (61, 9, 101), (139, 34, 106), (210, 68, 69), (248, 131, 26), (247, 209, 61), (252, 255, 220))


def difference(image: Image.Image, reference: Image.Image) -> numpy.ndarray:
    """RGB images of one size -> (H, W) largest difference of a pixel's three channels, 0 to 255."""
    a, b = (numpy.asarray(i.convert("RGB"), dtype=numpy.int16) for i in (image, reference))
    found: numpy.ndarray = numpy.abs(a - b).max(axis=2)
    return found


def heat_map(values: numpy.ndarray) -> Image.Image:
    """(H, W) differences -> an image in the colours of ANCHORS."""
    share = numpy.clip(values / FULL_SCALE, 0, 1) * (len(ANCHORS) - 1)
    channels = [numpy.interp(share, range(len(ANCHORS)), channel) for channel in zip(*ANCHORS, strict=True)]
    return Image.fromarray(numpy.stack(channels, axis=2).round().astype(numpy.uint8), "RGB")


def html(image: Image.Image, reference: Image.Image) -> str:
    """The heat map with its scale and two numbers."""
    values = difference(image, reference)
    colours = ", ".join(f"rgb{anchor}" for anchor in ANCHORS)
    text = f"Largest difference of a pixel's channels, mean {values.mean():.1f}, maximum {values.max()} of 255"
    return (
        f'<figure class="cr-heat"><div class="cr-frame" style="aspect-ratio:{image.width}/{image.height}">'
        f'<img alt="{escape(text)}" src="{data_uri(heat_map(values), "png")}"></div>'
        f'<div class="cr-scale"><span>0</span><i style="background:linear-gradient(90deg, {colours})"></i>'
        f"<span>{FULL_SCALE} and more</span></div><figcaption>{escape(text)}.</figcaption></figure>"
    )
