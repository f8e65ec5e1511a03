"""fuse_(model): give every block of a known family its fused forward. quantize_, apply and load_quantized call it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from convrot_quant.lora import register

# where diffusers defines a family's blocks -> our file, whose classes bear the names of those that they replace
FAMILIES = {"diffusers.models.transformers.transformer_flux": "convrot_quant.families.flux"}


def fuse_(model: nn.Module) -> int:
    """Fuse the blocks of a model in place and join the weights that are multiplied as one; returns how many blocks.

    Layers keep their names, and files their contents. A block runs diffusers' own forward as long as it holds an
    adapter, a hook or a layer that is not quantized: fusing never changes what is computed beyond fewer roundings.
    """
    register()  # adapters are to find the layers that this model has now
    blocks = [(block, fused) for block in model.modules() if (fused := _fused(type(block))) and fused.fits(block)]
    for block, fused in blocks:
        block.__class__ = fused
        block.prepare()  # type: ignore[operator]
    return len(blocks)


def unfuse_(model: nn.Module) -> None:
    """Give every fused block diffusers' own forward back."""
    for block in model.modules():
        if is_fused(block):
            block.__class__ = type(block).__bases__[-1]


def is_fused(block: nn.Module) -> bool:
    """Whether fuse_ has been here."""
    return type(block).__module__ in FAMILIES.values()


def _fused(block: type[nn.Module]) -> Any:
    """The fused class of a block of diffusers', or None."""
    family = FAMILIES.get(block.__module__)
    fused = None if family is None else getattr(import_module(family), block.__name__, None)
    return fused if isinstance(fused, type) and fused.__bases__[-1] is block else None
