"""Where the two transformers are during a comparison: decided from bytes alone, said in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from convrot_quant.offload import KEPT_FREE, LAYERS_AHEAD, Component
from convrot_quant.plans import size_text

Wish = Literal["auto", "both", "4bit", "offload"]
Way = Literal["both", "swap", "offload", "4bit"]
WISHES: tuple[Wish, ...] = ("auto", "both", "4bit", "offload")
TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Placement:
    """both: side by side in memory. swap: the one that runs. offload: BF16 layer by layer. 4bit: no BF16 at all."""

    way: Way
    note: str  # what a visitor should know; empty where there is nothing to say


def read_wish(memory: str) -> Wish:
    """--memory."""
    for wish in WISHES:
        if memory == wish:
            return wish
    raise ValueError(f"--memory must be one of {', '.join(WISHES)}; got {memory!r}")


def place(full: Sequence[Component], quantized: Sequence[Component], vram: int | None, wish: Wish) -> Placement:
    """`full` and `quantized`: the pipeline's components with either transformer; `vram`: bytes, None on a CPU."""
    if wish == "4bit":
        return Placement("4bit", "Started with --memory 4bit: the 4-bit model alone.")
    if vram is None:
        return Placement("both", "")
    usable = vram - vram // KEPT_FREE
    large, small = _transformer(full), _transformer(quantized)
    rest = sum(c.bytes for c in full) - large.bytes + max(c.scratch for c in full)
    needs = {
        "both": rest + large.bytes + small.bytes,
        "swap": rest + large.bytes,
        "offload": rest + max(small.bytes, LAYERS_AHEAD * large.layer_bytes),
    }
    ways: dict[Wish, tuple[Way, ...]] = {"auto": ("both", "swap"), "both": ("both",), "offload": ("offload",)}
    for way in ways[wish]:
        if needs[way] <= usable:
            return Placement(way, _note(way, needs, vram))
    first = ways[wish][0]
    if wish != "auto":
        raise ValueError(
            f"--memory {wish} needs {size_text(needs[first] * KEPT_FREE / (KEPT_FREE - 1))} of GPU memory, "
            f"{size_text(vram)} are free; use --memory {'offload' if wish == 'both' else '4bit'}"
        )
    return Placement("4bit", _too_large(needs, usable, vram))


def _note(way: Way, needs: dict[str, int], vram: int) -> str:
    if way == "swap":
        return f"{size_text(vram)} hold one transformer at a time: each waits in the CPU's memory while the other runs."
    if way == "offload":
        return "The 16-bit transformer is offloaded: its layers come from the CPU one by one, so its times are long."
    return ""


def _too_large(needs: dict[str, int], usable: int, vram: int) -> str:
    text = f"BF16 does not fit: it needs {size_text(needs['swap'])} of GPU memory, {size_text(vram)} are free. "
    text += "The 4-bit model is shown alone."
    return f"{text} Start with --memory offload to see BF16 too, slowly." if needs["offload"] <= usable else text


def _transformer(components: Sequence[Component]) -> Component:
    return next(c for c in components if c.name == TRANSFORMER)
