"""Transformers by name, with shapes and no values: a released model (released.py) or a class of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrot_quant.manifest import diffusers_class
from convrot_quant.released import RELEASED
from convrot_quant.skeleton import as_loaded

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    model: (model_class, settings) for model_class, models in RELEASED.items() for model, settings in models.items()
}


def find(name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The class and settings that a name stands for, or None: "flux.1-dev", or "FluxTransformer2DModel" (defaults)."""
    for model, found in MODELS.items():
        if model.lower() == name.lower():
            return found
    return (name, {}) if name.isidentifier() and "Transformer" in name else None


def alike(name: str) -> list[str]:
    """Released models and classes whose names are close to a name that is none."""
    known = {known.lower(): known for known in (*MODELS, *RELEASED)}
    return [known[match] for match in get_close_matches(name.lower(), known, cutoff=0.5)]


def named_model(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A transformer by its name, on the meta device, in the dtypes that diffusers' loader would give it."""
    found = find(name)
    if found is None:
        raise ValueError(f"named_model: {name!r} is no released model and no transformer class of diffusers")
    model_class, settings = found
    cls = diffusers_class(Path(name), {"_class_name": model_class})
    try:
        with torch.device("meta"):
            model: nn.Module = cls(**settings)
    except (TypeError, ValueError) as error:  # some classes have no defaults that make a model
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        models = ", ".join(RELEASED.get(model_class, ())) or "a folder with its config.json"
        raise ValueError(f"{name} cannot be built from its defaults ({text}); give {models}") from error
    return as_loaded(model, dtype)
