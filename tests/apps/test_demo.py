"""The demo without a model: bounds, links, errors, placements, tickets, what the page shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

import pytest

pytest.importorskip("convrot_demo", reason="apps/demo is not installed")
pytest.importorskip("gradio", reason="needs gradio")

import numpy
import torch
from PIL import Image

from convrot_demo import heat, panes
from convrot_demo.comparison import FULL, Event, Side
from convrot_demo.drawing import Drawn, Step
from convrot_demo.errors import UserError, sentence
from convrot_demo.inputs import PROMPT_CHARACTERS, Bounds, Inputs, check, from_query
from convrot_demo.placement import place, read_wish
from convrot_demo.worker import Tickets
from convrot_quant import CheckpointError
from convrot_quant.generation import SettingsError
from convrot_quant.offload import Component

BOUNDS = Bounds(50, (32, 256), 16, ("W4A4", "W8A8"))
DEFAULTS = Inputs("a red cube", steps=2, width=64, height=64)
MIB = 2**20


def values(**changes: Any) -> dict[str, Any]:
    return {**DEFAULTS.to_dict(), **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "  "}, "prompt is empty: write what to draw"),
        ({"prompt": "x" * (PROMPT_CHARACTERS + 1)}, "at most 2000 characters, got 2001; shorten it"),
        ({"prompt": ["a"]}, "prompt must be text, got list"),
        ({"negative_prompt": "x" * 9999}, "negative_prompt must have at most"),
        ({"steps": 51}, "steps must be from 1 to 50, got 51; choose"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5; use 2"),
        ({"steps": math.nan}, "steps must be from 1 to 50, got nan"),
        ({"steps": None}, "steps must be from 1 to 50, got None"),
        ({"steps": True}, "steps must be from 1 to 50, got True"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
        ({"guidance": "lots"}, "guidance must be from 0 to 20, got 'lots'"),
        ({"width": 100}, "width must be a multiple of 16, got 100; use 96"),
        ({"height": 4096}, "height must be from 32 to 256, got 4096"),
        ({"scheme": "../../etc"}, "scheme must be one of W4A4, W8A8, got '../../etc'"),
        ({"scheme": "W" * 99}, "got 'WWWWWW"),
        ({"lora_scale": math.inf}, "lora_scale must be from 0 to 2, got inf"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_rule_value_and_remedy(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check(values(**changes), BOUNDS)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_forms_and_links_may_give_numbers_as_text_or_floats() -> None:
    found = check(values(steps="7", width=64.0, seed="12", guidance="1.5"), BOUNDS)
    assert (found.steps, found.width, found.seed, found.guidance) == (7, 64, 12, 1.5)


def test_a_link_restores_every_setting_and_ignores_what_is_not_its_own() -> None:
    odd = replace(
        DEFAULTS, prompt='50% "été" & <b>🦊</b>\n#2', negative_prompt="a=b&c", negative_strength=2.5, seed=2**32 - 1,
        steps=9, guidance=0.1, width=96, height=128, scheme="W8A8", lora_scale=0.35,
    )  # fmt: skip
    query = dict(parse_qsl(odd.query(DEFAULTS).removeprefix("?")))
    assert from_query({**query, "__theme": "dark", "lora": "/etc/passwd"}, DEFAULTS, BOUNDS) == odd
    assert DEFAULTS.query(DEFAULTS) == "?prompt=a+red+cube&seed=0"


def test_a_link_out_of_bounds_is_refused() -> None:
    with pytest.raises(UserError, match="steps must be from 1 to 50, got '5000'"):
        from_query({"prompt": "x", "steps": "5000"}, DEFAULTS, BOUNDS)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "The GPU ran out of memory: choose a smaller size than 64",
        ),
        (
            RuntimeError("CUDA error: out of memory\nSearch for"),
            "The GPU ran out of memory",
        ),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "The GPU ran out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "The GPU ran out of memory"),
        (MemoryError(), "The machine ran out of memory: choose a smaller size"),
        (UserError("steps must be"), "steps must be"),
        (CheckpointError("folder: broken"), "folder: broken"),
        (SettingsError("height must"), "height must"),
        (ValueError("`height` must be divisible\nby 16"), "`height` must be divisible"),
        (KeyError("x"), "The run failed (KeyError: 'x'). The server's log has the details."),
    ],
)
def test_every_error_reaches_the_user_as_one_sentence(error: BaseException, said: str) -> None:
    text = sentence(error, (64, 64))
    assert text.startswith(said)
    assert "\n" not in text


def test_a_ticket_stops_a_job_before_its_turn() -> None:
    tickets = Tickets()
    tickets.open("a")
    tickets.stop("a")
    assert tickets.take("a").is_set()
    tickets.close("a")
    assert not tickets.take("a").is_set()
    tickets.stop("unknown")


def component(name: str, size: int, *, scratch: int = 0) -> Component:
    return Component(name, size * MIB, size * MIB // 50, scratch * MIB, scratch * MIB, True, True)


REST = [component("text_encoder", 900), component("vae", 100, scratch=500)]
FULL_PARTS, SMALL_PARTS = [component("transformer", 2400), *REST], [component("transformer", 600), *REST]


@pytest.mark.parametrize(
    ("vram", "wish", "way", "note"),
    [
        (None, "auto", "both", ""),
        (5000, "auto", "both", ""),
        (4300, "auto", "swap", "one transformer at a time"),
        (3000, "auto", "4bit", "BF16 does not fit: it needs 3.81 GiB of GPU memory, 2.93 GiB are free. The 4-bit"),
        (3000, "offload", "offload", "layers come from the CPU one by one"),
        (5000, "4bit", "4bit", "--memory 4bit"),
        (None, "4bit", "4bit", "--memory 4bit"),
    ],
)
def test_the_placement_follows_from_bytes_and_says_what_a_visitor_should_know(
    vram: int | None, wish: Any, way: str, note: str
) -> None:
    found = place(FULL_PARTS, SMALL_PARTS, None if vram is None else vram * MIB, wish)
    assert found.way == way
    assert note in found.note
    assert bool(found.note) == bool(note)


def test_a_placement_that_was_asked_for_and_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--memory both needs 4\.\d+ GiB of GPU memory, .* use --memory offload"):
        place(FULL_PARTS, SMALL_PARTS, 4300 * MIB, "both")
    with pytest.raises(ValueError, match="--memory must be one of auto, both, 4bit, offload; got 'gpu'"):
        read_wish("gpu")


def side(name: str, size: int, seconds: float, peak: int | None = 5 * MIB) -> Side:
    return Side(name, Drawn(Image.new("RGB", (8, 8)), seconds, seconds / 10, peak), size)


def test_panes_show_progress_then_the_image_and_escape_what_they_print() -> None:
    pane = panes.Pane("<b>")
    step = Step(3, 4, 0.5, Image.new("RGB", (4, 4)))
    running = pane.after(Event(FULL, step=step))
    text = panes.html((running,), (64, 32))
    assert "step 3 of 4, 500 ms each" in text
    assert 'aria-valuenow="75"' in text
    assert "data:image/jpeg" in text
    assert "aspect-ratio:64/32" in text
    assert "<b></b>" not in text
    assert "&lt;b&gt;" in text
    done = running.after(Event(FULL, finished=side("BF16", 100, 2.0)))
    assert "data:image/png" in panes.html((done,), (64, 32))
    assert done.stopped() is done
    assert "stopped" in panes.html((running.stopped(),), (64, 32))


def test_the_heat_map_is_dark_where_images_agree_and_bright_where_they_do_not() -> None:
    image = numpy.zeros((4, 4, 3), dtype=numpy.uint8)
    image[0, 0] = (0, 200, 0)
    values = heat.difference(Image.fromarray(image), Image.new("RGB", (4, 4)))
    assert (values[0, 0], values[1, 1]) == (200, 0)
    coloured = numpy.asarray(heat.heat_map(values))
    assert coloured[0, 0].tolist() == [252, 255, 220]
    assert coloured[1, 1].tolist() == [0, 0, 4]
    assert "maximum 200 of 255" in heat.html(Image.fromarray(image), Image.new("RGB", (4, 4)))
