"""plan(model, config) -> Plan; apply(model, plan); quantize_ = plan + apply; dequantize_ undoes it.

Layers are replaced one at a time, each 16-bit weight freed before the next is read: peak memory is the model plus one
layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from convrot_quant.calibration import NOT_CALIBRATED, Calibration, inputs_of
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.fuse import fuse_, unfuse_
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.plans import LayerPlan, Plan
from convrot_quant.quantizing import quantize_weight
from convrot_quant.rules import Linear, cannot_hold, cannot_run, choose, linears


def plan(model: nn.Module, config: QuantConfig | str = "ours") -> Plan:
    """Decide each linear's scheme, or the reason why it stays in 16 bits; reads shapes only, so meta models do too.

    `config`: a QuantConfig or the name of a preset. The model is not changed.
    """
    _refuse_unplannable(model)
    config = QuantConfig.preset(config) if isinstance(config, str) else config
    if not isinstance(config, QuantConfig):
        raise ValueError(f"plan: config must be a QuantConfig or the name of a preset; got {config!r}")
    model_class = type(model).__name__
    layers = [_layer_plan(layer, *choose(layer, config, model_class)) for layer in linears(model)]
    return Plan(layers, config, model_class, model_bytes(model) - sum(layer.bytes_before for layer in layers))


def apply(
    model: nn.Module,
    plan: Mapping[str, Scheme],
    *,
    device: torch.device | str | None = None,
    calibration: Calibration | None = None,
    fuse: bool = True,
    progress: bool = True,
) -> None:
    """Replace the planned layers of a model by ConvLinear4bit, in place.

    `device`: where each layer is rotated and quantized (a GPU is much faster); results go back to the layer's own.
    `calibration`: rows that the layers read, by which 4-bit weights are rounded: less error, the same bytes and speed.
    `fuse`: give blocks of a known family their fused forward (fuse.py); without it every layer runs on its own.
    All weights are checked before the first layer changes, so a refusal leaves the model as it was.
    """
    _refuse_unplannable(model)
    if calibration is not None:
        plan = calibration.plan(plan) if isinstance(plan, Plan) else calibration.rounded(plan)
    _check_plan(model, plan, device, calibration)
    quiet = not progress or bool(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
    for name in tqdm(plan, desc="quantize", unit="layer", disable=quiet, leave=False):
        _quantize_layer(model, name, plan[name], device, inputs_of(calibration, name, plan[name]))
    if isinstance(plan, Plan):
        model.convrot_plan = plan  # type: ignore[assignment]  # a dict, not a Module: kept for saving, reasons included
    if fuse:
        fuse_(model)


def quantize_(
    model: nn.Module,
    config: QuantConfig | str = "ours",
    *,
    device: torch.device | str | None = None,
    calibration: Calibration | None = None,
    fuse: bool = True,
    progress: bool = True,
) -> Plan:
    """Quantize a model in place: plan, then apply. Returns the plan, which prints as a table.

    `device`, `calibration`, `fuse`: see apply.
    """
    decided = plan(model, config)
    if not decided:
        reasons = "; ".join(sorted(set(decided.reasons.values()))) or "it has no nn.Linear"
        raise ValueError(f"quantize_: nothing to quantize in {type(model).__name__}: {reasons}")
    decided = decided if calibration is None else calibration.plan(decided)
    apply(model, decided, device=device, calibration=calibration, fuse=fuse, progress=progress)
    return decided


def dequantize_(model: nn.Module) -> None:
    """Replace every ConvLinear4bit by the nn.Linear that its codes stand for, in place."""
    names = [name for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)]
    if not names:
        raise ValueError(f"dequantize_: {type(model).__name__} has no ConvLinear4bit; quantize_ it first")
    unfuse_(model)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, ConvLinear4bit), "the list above holds nothing else"
        model.set_submodule(name, layer.dequantize())
    if hasattr(model, "convrot_plan"):
        del model.convrot_plan


def plan_of(model: nn.Module) -> Plan:
    """The plan that a quantized model embodies, read from its layers; notes come from the plan applied to it."""
    applied = getattr(model, "convrot_plan", None)
    known = {layer.name: layer for layer in applied.layers} if isinstance(applied, Plan) else {}
    layers = []
    for layer in linears(model):
        scheme = layer.module.scheme if isinstance(layer.module, ConvLinear4bit) else None
        old = known.get(layer.name)
        note = old.note if old is not None and old.scheme == scheme else ("" if scheme else "not quantized")
        layers.append(_layer_plan(layer, scheme, note))
    config = applied.config if isinstance(applied, Plan) else QuantConfig()
    other_bytes = model_bytes(model) - sum(layer.bytes_after for layer in layers)
    return Plan(layers, config, type(model).__name__, other_bytes)


def model_bytes(model: nn.Module) -> int:
    """Bytes of the state_dict, which are the bytes of the saved tensors (a tied weight counts once per name)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _layer_plan(layer: Linear, scheme: Scheme | None, note: str) -> LayerPlan:
    module = layer.module
    dtype = module.compute_dtype if isinstance(module, ConvLinear4bit) else module.weight.dtype
    bias_bytes = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
    return LayerPlan(
        layer.name, module.out_features, module.in_features, str(dtype).split(".")[1], bias_bytes, scheme, note
    )


def _refuse_unplannable(model: nn.Module) -> None:
    """Errors for what is no 16-bit model: a pipeline, a quantized model, a model with LoRA adapters or hooks."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"plan: expected a model such as pipe.transformer; got {type(model).__name__}")
    count = sum(isinstance(module, ConvLinear4bit) for module in model.modules())
    if count:
        raise ValueError(
            f"plan: {type(model).__name__} is already quantized ({count} ConvLinear4bit layers); "
            "start from 16-bit weights, since quantizing twice loses accuracy"
        )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            raise ValueError(
                f"plan: {name!r} is a LoRA layer ({type(module).__name__}); load the LoRA after quantizing, "
                "or merge it first: pipe.fuse_lora(), then pipe.unload_lora_weights()"
            )
        if isinstance(module, nn.Linear) and hasattr(module, "_hf_hook"):
            raise ValueError(f"plan: {name!r} has an offloading hook; quantize first, then enable offloading")


def _check_plan(
    model: nn.Module, plan: Mapping[str, Scheme], device: torch.device | str | None, calibration: Calibration | None
) -> None:
    """Every planned layer against the model: it is there, has the planned shape, and can be quantized."""
    layers = {layer.name: layer for layer in linears(model)}
    planned = {layer.name: layer for layer in plan.planned} if isinstance(plan, Plan) else {}
    for name, scheme in plan.items():
        if name not in layers:
            raise ValueError(f"apply: {type(model).__name__} has no linear {name!r}; plan this model first")
        module = layers[name].module
        shape = (module.out_features, module.in_features)
        old = planned.get(name)
        if old is not None and (old.out_features, old.in_features) != shape:
            was = (old.out_features, old.in_features)
            raise ValueError(f"apply: {name!r} is {shape} here and {was} in the plan (N, K); plan this model first")
        reason = cannot_run(layers[name]) or _unfit(module, scheme, device)
        if scheme.weight_rounding == "gptq":
            unseen = NOT_CALIBRATED if calibration is None else calibration.cannot_round(name, module.in_features)
            reason = reason or unseen
        if reason:
            raise ValueError(f"apply: {name!r} cannot be quantized: {reason}")


def _unfit(module: nn.Linear, scheme: Scheme, device: torch.device | str | None) -> str:
    """Why this weight (N, K) cannot be quantized by this scheme, or "". Values too large to rotate are rotated to see.

    No sum of a rotation, nor a partial one, exceeds group_size * absmax: smaller weights need no try.
    """
    if reason := cannot_hold(module, scheme):
        return reason
    if module.weight.is_meta:
        return "its weight is on the meta device; load the weights first"
    low, high = (float(extreme) for extreme in module.weight.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "its weight holds NaN or inf; repair it or keep this layer in 16 bits"
    if max(-low, high) * scheme.group_size > torch.finfo(torch.float32).max:
        try:
            nearest = replace(scheme, weight_rounding="nearest")
            quantize_weight(module.weight.to(device or module.weight.device), nearest)
        except ValueError as error:
            return str(error)
    return ""


def _quantize_layer(
    model: nn.Module, name: str, scheme: Scheme, device: torch.device | str | None, inputs: Tensor | None
) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), "_check_plan has seen it"
    model.set_submodule(name, ConvLinear4bit.from_linear(layer, scheme, device=device, inputs=inputs))
