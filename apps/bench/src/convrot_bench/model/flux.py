"""FLUX.1-dev's transformer as the sides that every table of it compares."""

from typing import Any

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.inputs import Inputs, flux_inputs
from convrot_bench.model.phases import Tell
from convrot_bench.model.sides import Side, sides_from

MODEL = "FLUX.1-dev"


def make_flux(bench: Bench, scale: Scale) -> Any:
    """The 16-bit transformer."""
    return build.transformer("FluxTransformer2DModel", scale.flux, bench.device)


def step_inputs(bench: Bench, scale: Scale, model: Any) -> Inputs:
    """Of one step at the scale's size."""
    return flux_inputs(model, scale, bench.device, scale.side, scale.side, 1)


def flux_sides(bench: Bench, scale: Scale, phase: Tell, *names: str) -> dict[str, Side]:
    """Some of BF16, OURS and UNFUSED, from the same weights."""

    def make() -> Any:
        return make_flux(bench, scale)

    return sides_from(make, lambda model: step_inputs(bench, scale, model), names, bench.device, phase)


def shape_of(side: int, batch: int = 1, width: int | None = None) -> dict[str, Any]:
    """The shape of a step's row."""
    return {"height": side, "width": width or side, "batch": batch}
