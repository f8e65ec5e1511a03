"""FLUX.1-dev's transformer as the sides that every table of it compares."""

import gc
from typing import Any

import torch

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.inputs import flux_inputs
from convrot_bench.model.sides import Side, built, quantized

BF16, OURS, UNFUSED = "bf16", "ours", "ours, layer by layer"
MODEL = "FLUX.1-dev"


def make_flux(bench: Bench, scale: Scale) -> Any:
    """The 16-bit transformer."""
    return build.transformer("FluxTransformer2DModel", scale.flux, bench.device)


def flux_side(bench: Bench, scale: Scale, name: str) -> Side:
    """One of BF16, OURS, UNFUSED; all from the same weights."""

    def make() -> Any:
        return make_flux(bench, scale)

    makers = {BF16: make, OURS: quantized(make, fuse=True), UNFUSED: quantized(make, fuse=False)}
    side = built(
        name, makers[name], lambda m: flux_inputs(m, scale, bench.device, scale.side, scale.side, 1), bench.device
    )
    release()
    return side


def shape_of(side: int, batch: int = 1, width: int | None = None) -> dict[str, Any]:
    """The shape of a step's row."""
    return {"height": side, "width": width or side, "batch": batch}


def release() -> None:
    """Give memory of the GPU back that nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
