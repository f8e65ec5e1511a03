"""Decides, layer by layer, between a scheme and 16 bits with a reason. Names and taste come from presets.py.

The generic rule: linears inside a model's repeated blocks, wide enough to matter, with a K that a rotation group
divides. Embedders and final layers lie outside the repeated blocks of every diffusers transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from convrot_quant.config import QuantConfig, Scheme, recommended_clip
from convrot_quant.linear import COMPUTE_DTYPES
from convrot_quant.presets import EIGHT_BIT, KEEP_16BIT

# Below this K a linear holds too few bytes to matter and its rows too few values for a good rotation; FLUX.1's
# smallest block linear has 3072, mini-flux's 512, and embedders of timesteps and latents have 12 to 257.
MIN_IN_FEATURES = 512
IN_MULTIPLE = 64  # the smallest group worth its scale, and what int4 GEMMs and the ComfyUI format ask of K
OUT_MULTIPLE = 16  # tensor-core tiles and packed stores ask this of N
FALLBACK_GROUPS = (256, 64)
BRANCH_BITS = 16
RECOMMENDED_W4A4 = Scheme.parse("W4A4")


@dataclass(frozen=True)
class Linear:
    """One nn.Linear of a model, as the rules see it."""

    name: str
    module: nn.Linear
    alias: str  # the name with `{last}` for the index, where the outermost index is the last one
    in_block: bool
    tied_to: str  # the other name of the same module or weight, or ""


def linears(model: nn.Module) -> Iterator[Linear]:
    """Every nn.Linear of the model in the model's own order, shared modules under their first name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in {id(p) for p in module.parameters(recurse=False)}:
            owners.setdefault(parameter, []).append(name)
    blocks = {*(getattr(model, "_repeated_blocks", None) or ()), *(getattr(model, "_no_split_modules", None) or ())}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name:
            others = [other for other in owners.get(id(module.weight), ()) if other != name]
            alias, in_block = _place(name, modules, blocks)
            yield Linear(name, module, alias, in_block, others[0] if others else "")


def _place(name: str, modules: dict[str, nn.Module], blocks: set[str]) -> tuple[str, bool]:
    """The `{last}` alias, and whether the layer lies inside a repeated block (a child of the outermost ModuleList)."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = modules[".".join(parts[:i])]
        if isinstance(parent, nn.ModuleList):
            last = int(parts[i]) == len(parent) - 1
            alias = ".".join([*parts[:i], "{last}", *parts[i + 1 :]]) if last else name
            classes = {type(modules[".".join(parts[:j])]).__name__ for j in range(i + 1, len(parts))}
            return alias, bool(classes) and (not blocks or bool(classes & blocks))
    return name, False


def matches(layer: Linear, glob: str) -> bool:
    """Whether a glob of a QuantConfig names this layer."""
    return fnmatchcase(layer.name, glob) or fnmatchcase(layer.alias, glob)


def choose(layer: Linear, config: QuantConfig, model_class: str) -> tuple[Scheme | None, str]:
    """The scheme of one layer and a note, or None and the reason why it stays in 16 bits."""
    for glob in config.keep:
        if matches(layer, glob):
            return None, f"kept by {glob!r}"
    scheme, exact = config.scheme, False
    for glob, override in config.overrides.items():
        if matches(layer, glob):
            scheme, exact = override, glob in (layer.name, layer.alias)
    reason = cannot_run(layer) or ("" if exact else _better_not(layer, model_class))
    if reason:
        return None, reason
    scheme, why = _in_8_bits(_for_row_length(scheme, layer.module.in_features), layer)
    scheme, narrow = _with_branch(scheme, layer.module)
    found, note = _with_group(scheme, layer.module.in_features)
    return found, "; ".join(filter(None, (why, narrow, note)))


def _for_row_length(scheme: Scheme, in_features: int) -> Scheme:
    """The recommended W4A4, and nothing else that somebody chose, with the clip for rows of this length."""
    if replace(scheme, group_size=RECOMMENDED_W4A4.group_size, low_rank=0) != RECOMMENDED_W4A4:
        return scheme
    return replace(scheme, activation_clip=recommended_clip(in_features))


def _in_8_bits(scheme: Scheme, layer: Linear) -> tuple[Scheme, str]:
    """The scheme, with 8-bit weights and the reason where packed codes would be misread."""
    for glob, reason in EIGHT_BIT.items():
        if scheme.weight_bits == 4 and matches(layer, glob):
            wide = replace(scheme, weight_rule="absmax", activation_clip=1.0, low_rank=0)  # 4 bits' own
            return replace(wide, weight_bits=8, activation_bits=max(scheme.activation_bits, 8)), reason
    return scheme, ""


def cannot_run(layer: Linear) -> str:
    """Why this layer cannot be a ConvLinear4bit, or ""."""
    module = layer.module
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    if layer.tied_to:
        return f"shares its weight with {layer.tied_to!r}"
    if type(module.weight.data) is not torch.Tensor or module.weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {type(module.weight.data).__name__} {module.weight.dtype}, not fp16, bf16 or fp32"
    if module.in_features % IN_MULTIPLE:
        return f"K={module.in_features} is not a multiple of {IN_MULTIPLE}"
    if module.out_features % OUT_MULTIPLE:
        return f"N={module.out_features} is not a multiple of {OUT_MULTIPLE}"
    return ""


def cannot_hold(module: nn.Linear, scheme: Scheme) -> str:
    """Why a linear of this shape cannot be a ConvLinear4bit of this scheme, or ""."""
    n, k = module.out_features, module.in_features
    if k % scheme.group_size:
        return f"K={k} is not a multiple of group_size={scheme.group_size}"
    if scheme.low_rank >= min(n, k):
        return f"low_rank={scheme.low_rank} is not less than N={n} and K={k}"
    return ""


def _better_not(layer: Linear, model_class: str) -> str:
    """Why this layer should stay in 16 bits unless it is asked for by its full name, or ""."""
    for glob, reason in KEEP_16BIT.get(model_class, {}).items():
        if matches(layer, glob):
            return reason
    if not layer.in_block:
        return "outside the repeated blocks (embedder or output layer)"
    if layer.module.in_features < MIN_IN_FEATURES:
        return f"K={layer.module.in_features} is below {MIN_IN_FEATURES}"
    return ""


def _with_branch(scheme: Scheme, module: nn.Linear) -> tuple[Scheme, str]:
    """The scheme, without its branch where that would take more bytes than the codes of so narrow a layer."""
    n, k = module.out_features, module.in_features
    if scheme.low_rank * (n + k) * BRANCH_BITS <= n * k * scheme.weight_bits:
        return scheme, ""
    return replace(scheme, low_rank=0), f"too narrow for a branch of rank {scheme.low_rank}"


def _with_group(scheme: Scheme, in_features: int) -> tuple[Scheme | None, str]:
    """The scheme with the largest group, from the one asked for down, that divides K."""
    asked = scheme.group_size
    for group in (asked, *(g for g in FALLBACK_GROUPS if g < asked)):
        if in_features % group == 0:
            note = "" if group == asked else f"K={in_features} is not a multiple of {asked}"
            return replace(scheme, group_size=group), note
    return None, f"no group divides K={in_features}"
