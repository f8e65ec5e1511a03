"""What both loaders' quantizers share: the plan of a model without values, its layers one by one, the end of loading.

diffusers.py and text_encoders.py adapt this to the two libraries, whose loaders call quantizers differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from convrot_kernels import preferred_layout
from convrot_quant.config import QuantConfig
from convrot_quant.fuse import fuse_
from convrot_quant.linear import COMPUTE_DTYPES, ConvLinear4bit
from convrot_quant.low_rank import BRANCH_LEAVES
from convrot_quant.manifest import FORMAT_VERSION, PLAN_KEY, VERSION_KEY, VERSIONS_KEY, CheckpointError
from convrot_quant.patch import plan
from convrot_quant.plans import Plan
from convrot_quant.rules import cannot_hold, linears
from convrot_quant.versions import versions

QUANTIZED_LEAVES = ("weight", "weight_scale", *BRANCH_LEAVES)


def keeping(config: QuantConfig, modules: Iterable[str], fp32_modules: Iterable[str]) -> QuantConfig:
    """The configuration that also keeps `modules` (as bitsandbytes reads them, or globs) and components of names."""
    keep = [glob for name in modules for glob in ([name] if _is_glob(name) else [f"*{name}", f"*{name}.*"])]
    for name in fp32_modules:
        keep += [name, f"{name}.*", f"*.{name}", f"*.{name}.*"]
    return replace(config, keep=(*config.keep, *keep))


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def plan_empty(model: nn.Module, config: QuantConfig, fp32_modules: Iterable[str]) -> Plan:
    """The plan of a model on the meta device; what its class wants in fp32 is planned as fp32."""
    fp32 = set(fp32_modules)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not fp32.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(torch.float32)
    return plan(model, config)


def quantization_device(asked: torch.device | str | None, home: torch.device | str | int) -> torch.device:
    """Where to rotate and quantize a layer that will live on `home`: there, or on the GPU if there is one."""
    place = torch.device(home)
    if asked is not None:
        return torch.device(asked)
    return torch.device("cuda") if place.type == "cpu" and torch.cuda.is_available() else place


def quantize_into(model: nn.Module, decided: Plan, name: str, weight: Tensor, device: torch.device) -> ConvLinear4bit:
    """Put the quantized layer in the place of the linear `name`, whose weight (N, K) has just been read."""
    linear = model.get_submodule(name)
    assert type(linear) is nn.Linear, "the plan holds nothing else"
    if weight.dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"ConvRotConfig: the weight of {name!r} is {weight.dtype}, not 16-bit values; give the 16-bit model"
        )
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    try:
        layer = ConvLinear4bit.from_linear(linear, decided[name], device=device)
    except ValueError as error:
        raise ValueError(f"ConvRotConfig: {name!r} cannot be quantized: {error}") from None
    model.set_submodule(name, layer)
    return layer


def expand(model: nn.Module, decided: Plan, dtype: torch.dtype) -> None:
    """Empty quantized layers, on the meta device, in a model that will be filled from a quantized folder."""
    layers = {layer.name: layer.module for layer in linears(model)}
    planned = {layer.name: (layer.out_features, layer.in_features) for layer in decided.planned}
    for name, scheme in decided.items():
        linear = layers.get(name)
        if linear is None:
            raise CheckpointError(f"the plan names {name!r}, which {type(model).__name__} lacks; save the model again")
        shape = (linear.out_features, linear.in_features)
        if type(linear) is not nn.Linear or shape != planned[name] or cannot_hold(linear, scheme):
            raise CheckpointError(
                f"the plan's {scheme.name} g{scheme.group_size} of {planned[name]} (N, K) does not fit {name!r}, which "
                f"is {shape}; save the model again"
            )
        has_bias = linear.bias is not None
        sizes = (linear.in_features, linear.out_features, scheme)
        layer = ConvLinear4bit(*sizes, bias=has_bias, compute_dtype=dtype, device="meta")
        model.set_submodule(name, layer)


def planned_layer(decided: Plan, parameter: str, leaves: tuple[str, ...]) -> str | None:
    """The planned layer that the state_dict's name belongs to as one of `leaves`, or None."""
    name, _, leaf = parameter.rpartition(".")
    return name if leaf in leaves and name in decided else None


def refuse_unplanned(decided: Plan, names: Iterable[str]) -> None:
    """The error for a branch in the files that the plan leaves out: the codes beside it hold the rest alone."""
    for name in names:
        layer = planned_layer(decided, name, BRANCH_LEAVES)
        if layer and not decided[layer].low_rank:
            raise CheckpointError(
                f"the files hold {name!r}, and the plan no low_rank of {layer!r}; save the model again"
            )


def refuse_missing(model: nn.Module, decided: Plan, missing: Iterable[str]) -> None:
    """The error for a planned layer without its values: it could only be made up."""
    lacking = sorted(name for name in missing if planned_layer(decided, name, QUANTIZED_LEAVES))
    if lacking:
        raise CheckpointError(
            f"{type(model).__name__}: the files lack {lacking[0]!r}; copy or download the folder again"
        )


def finish(model: nn.Module, decided: Plan, dtype: torch.dtype) -> None:
    """Once every tensor is there: codes in their own dtype and order, blocks fused."""
    for name, scheme in decided.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, ConvLinear4bit), f"{name} was loaded past the quantizer"
        layer.compute_dtype = dtype
        for leaf, tensor in layer.named_buffers():
            if not tensor.is_floating_point():
                raise CheckpointError(f"'{name}.{leaf}' must not be {tensor.dtype}; save the model again")
        if scheme.weight_bits == 4 and layer.weight.dtype == torch.int8:  # files hold packed codes as I8
            layer.weight = nn.Parameter(layer.weight.detach().view(torch.uint8), requires_grad=False)
        if layer.weight.is_cuda:
            layer.relayout(preferred_layout(layer.weight.device))
    model.convrot_plan = decided  # type: ignore[assignment]  # a dict, not a Module: kept for saving, reasons included
    fuse_(model)


def to_files(state: Mapping[str, Tensor], decided: Plan) -> dict[str, Tensor]:
    """A state_dict as the format wants it: packed codes viewed as I8, each tensor with a storage of its own."""
    packed = {f"{name}.weight" for name, scheme in decided.items() if scheme.weight_bits == 4}
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach()
        if pointer in seen:  # one of a stack: shards are cut by storages, and on the CPU there is room for a copy
            tensor = tensor.cpu() if tensor.is_cuda else tensor.clone()
        seen.add(pointer)
        written[name] = tensor.contiguous().view(torch.int8) if name in packed else tensor
    return written


def metadata(decided: Plan) -> dict[str, str]:
    """What every file's header says, as save_quantized writes it."""
    text = json.dumps(decided.to_dict(), separators=(",", ":"))
    written_with = json.dumps(versions(), separators=(",", ":"))
    return {VERSION_KEY: str(FORMAT_VERSION), PLAN_KEY: text, VERSIONS_KEY: written_with}
