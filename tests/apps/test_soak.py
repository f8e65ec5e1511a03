"""Many generations in one process: the same pictures every time, and memory that does not grow."""

import os
from pathlib import Path

import pytest
import torch

from convrot_quant import quantize_
from mini_flux.evaluate import draw_captions
from mini_flux.parts import load_pipeline
from mini_flux.scenes import caption, held_out_scenes

pytestmark = pytest.mark.slow

WEIGHTS = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights"


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
def test_fifty_generations_repeat_and_do_not_grow():
    pipe = load_pipeline(WEIGHTS)
    quantize_(pipe.transformer, progress=False)
    text = [caption(s) for s in held_out_scenes(2)]
    first = draw_captions(pipe, text, steps=2)
    for _ in range(5):
        draw_captions(pipe, text, steps=2)
    before = resident_mib()
    for _ in range(50):
        assert torch.equal(draw_captions(pipe, text, steps=2), first)
    assert resident_mib() - before < 30
