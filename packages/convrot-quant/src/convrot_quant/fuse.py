"""fuse_(model): give every block of a known family its fused forward. quantize_, apply and load_quantized call it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from convrot_quant.config import Scheme
from convrot_quant.families.modulation import Modulations
from convrot_quant.lora import register

# where diffusers defines a family's blocks -> our file, whose classes bear the names of those that they replace
FAMILIES = {"diffusers.models.transformers.transformer_flux": "convrot_quant.families.flux"}


def fuse_(model: nn.Module) -> int:
    """Fuse the blocks of a model in place and join the weights that are multiplied as one; returns how many blocks.

    Layers keep their names, and files their contents. A block runs diffusers' own forward as long as it holds an
    adapter, a hook or a layer that is not quantized: fusing never changes what is computed beyond fewer roundings.
    """
    register()  # adapters are to find the layers that this model has now
    blocks = [(block, fused) for _, block, fused in _fusible(model) if not is_fused(block)]
    modulations = Modulations()
    for block, fused in blocks:
        block.__class__ = fused
        block.prepare(modulations)  # type: ignore[operator]
    return len(blocks)


def unfuse_(model: nn.Module) -> None:
    """Give every fused block diffusers' own forward back."""
    for block in model.modules():
        if is_fused(block):
            vars(block).pop("fp8_attention", None)
            block.__class__ = type(block).__bases__[-1]


def stacked_layers(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of the layers that a fused block multiplies as one, since they read one input; fused already or not yet."""
    names = {module: name for name, module in model.named_modules()}
    stacks = (members for _, block, fused in _fusible(model) for members in fused.stacked(block).values())
    return [tuple(names[member] for member in members) for members in stacks]


def unfused_blocks(model: nn.Module, plan: Mapping[str, Scheme]) -> list[str]:
    """Names of the blocks that a plan takes the fused forward from: a layer in 16 bits, or its activations.

    Only modulation layers may be anything, for they are multiplied apart.
    """
    found = []
    for name, block, fused in _fusible(model):
        apart = fused.stacked(block).get("modulation", ())
        layers = [n for n, module in block.named_modules() if isinstance(module, nn.Linear) and module not in apart]
        schemes = [plan.get(f"{name}.{layer}") for layer in layers]
        if any(scheme is None or scheme.activation_bits == 16 for scheme in schemes):
            found.append(name)
    return found


def _fusible(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, block, its fused class) of each block that fuse_ fuses, or has fused."""
    for name, block in model.named_modules():
        fused: Any = type(block) if is_fused(block) else _fused(type(block))
        if fused is not None and fused.fits(block):
            yield name, block, fused


def is_fused(block: nn.Module) -> bool:
    """Whether fuse_ has been here."""
    return type(block).__module__ in FAMILIES.values()


def _fused(block: type[nn.Module]) -> Any:
    """The fused class of a block of diffusers', or None."""
    family = FAMILIES.get(block.__module__)
    fused = None if family is None else getattr(import_module(family), block.__name__, None)
    return fused if isinstance(fused, type) and fused.__bases__[-1] is block else None
