"""load_and_quantize: a 16-bit diffusers folder in, a quantized model out; quantize_to: quantized files out.

The plan is made on the meta device, from shapes alone. Then tensors are read one at a time: at the worst moment there
are the layers quantized so far, what stays in 16 bits, and one 16-bit weight with what its quantization needs. Writing
files, only the last of these. LoRA files are merged into a 16-bit weight when it has been read (lora_files.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from convrot_quant.calibration import Calibration, inputs_of
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.contents import write_shards
from convrot_quant.fuse import fuse_
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.lora_files import LoraFile
from convrot_quant.low_rank import BRANCH_LEAVES
from convrot_quant.manifest import CheckpointError
from convrot_quant.model_card import write_model_card
from convrot_quant.patch import plan, plan_of
from convrot_quant.plans import Plan
from convrot_quant.quantizing import quantize_weight
from convrot_quant.rules import cannot_hold, cannot_run, linears
from convrot_quant.source import Source, empty_16bit
from convrot_quant.tensorfile import NAMES, Stored


def load_and_quantize(
    path: str | Path,
    config: QuantConfig | Plan | str = "ours",
    *,
    device: torch.device | str = "cpu",
    home: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    loras: Sequence[LoraFile] = (),
    calibration: Calibration | None = None,
    progress: bool = True,
) -> nn.Module:
    """A transformer folder of diffusers (safetensors, one file or shards) -> its quantized model, bit for bit as if
    it had been loaded in `dtype` and then quantized by quantize_.

    `device`: where layers are rotated and quantized. `home`: where the model ends up, if that is not `device`.
    `loras`: merged into the 16-bit weights, bit for bit as fuse_lora does on that device. `calibration`: as apply.
    """
    folder, home = Path(path), device if home is None else home
    model = empty_16bit(folder, dtype)
    source = Source.open(folder, model, dtype, loras)
    decided = _decide(folder, model, config, calibration)
    weights = {f"{name}.weight": name for name in decided}
    for name in model.state_dict():
        if name not in weights:
            _load(model, name, source, home)
    quiet = not progress or bool(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
    # in the files' order, which disks read fastest
    in_files = [weights[name] for name in source.headers if name in weights]
    for name in tqdm(in_files, desc="quantize", unit="layer", disable=quiet, leave=False):
        _load(model, f"{name}.weight", source, home)
        inputs = inputs_of(calibration, name, decided[name])
        _quantize_layer(folder, model, name, decided[name], device, inputs)
    model.to(home)  # buffers that are in no file
    _note(model, folder, decided, source)
    fuse_(model)
    return model.eval()


def outline(
    path: str | Path, config: QuantConfig | Plan | str = "ours", *, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """What load_and_quantize will make, on the meta device: every module and size, no values."""
    model = empty_16bit(Path(path), dtype)
    for name, scheme in _decide(Path(path), model, config).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), "_decide has seen it"
        sizes, has_bias = (linear.in_features, linear.out_features, scheme), linear.bias is not None
        layer = ConvLinear4bit(*sizes, bias=has_bias, compute_dtype=linear.weight.dtype, device="meta")
        model.set_submodule(name, layer)
    return model.eval()


def quantize_to(
    path: str | Path,
    building: Path,
    config: QuantConfig | Plan | str = "ours",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    loras: Sequence[LoraFile] = (),
    calibration: Calibration | None = None,
    base_model: str | None = None,
    named: str | None = None,
    progress: bool = True,
) -> Plan:
    """A transformer folder of diffusers -> its quantized files in an existing folder; returns the plan.

    The files are those of load_and_quantize and save_quantized, but no model is in memory, quantized or not: a tensor
    is read, quantized on `device` and written before the next. A model card says what was made of `base_model` (the
    folder's name by default) and how to load it under the name `named`.
    """
    folder = Path(path)
    model = empty_16bit(folder, dtype)
    source = Source.open(folder, model, dtype, loras)
    decided = _decide(folder, model, config, calibration)
    quantized = outline(folder, decided, dtype=dtype)
    _note(quantized, folder, decided, source)
    tensors: dict[str, Stored] = {}
    for name, tensor in quantized.state_dict().items():
        if name in source.headers:
            tensors[name] = _stored(tensor, partial(source.value, name, tensor.dtype, "cpu"))
    for name, scheme in decided.items():
        key = f"{name}.weight"
        layer = _Quantized(source, name, model.state_dict()[key].dtype, scheme, device, calibration)
        for leaf, like in quantized.get_submodule(name).state_dict().items():
            if leaf != "bias":
                tensors[f"{name}.{leaf}"] = _stored(like, partial(layer.part, leaf))
        tensors[key] = replace(tensors[key], dtype="I8")
    write_shards(quantized, tensors, building, max_shard_size=max_shard_size, verb="quantize", progress=progress)
    write_model_card(building, quantized, base_model or str(folder), named=named)
    return plan_of(quantized)


def _stored(like: Tensor, make: Callable[[], Tensor]) -> Stored:
    return Stored(NAMES[like.dtype], tuple(like.shape), (make,))


@dataclass
class _Quantized:
    """A layer's tensors, made when the first of them is written; the others wait for their turn."""

    source: Source
    name: str
    dtype: torch.dtype
    scheme: Scheme
    device: torch.device | str
    calibration: Calibration | None
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def part(self, leaf: str) -> Tensor:
        """A tensor of the layer by the name that it has there, on the CPU."""
        if leaf not in self.waiting:
            self.waiting = self._quantize()
        return self.waiting.pop(leaf)

    def _quantize(self) -> dict[str, Tensor]:
        weight = self.source.value(f"{self.name}.weight", self.dtype, self.device)
        try:
            inputs = inputs_of(self.calibration, self.name, self.scheme)
            made = quantize_weight(weight, self.scheme, inputs=inputs)
        except ValueError as error:
            raise CheckpointError(f"{self.source.folder}: {self.name!r} cannot be quantized: {error}") from None
        parts = {"weight": made.codes, "weight_scale": made.scale}
        if made.branch is not None:
            parts |= dict(zip(BRANCH_LEAVES, made.branch, strict=True))
        return {leaf: tensor.cpu() for leaf, tensor in parts.items()}


def _decide(
    folder: Path, model: nn.Module, config: QuantConfig | Plan | str, calibration: Calibration | None = None
) -> Plan:
    """The plan for a model without values: made now, or a ready one that fits the model."""
    decided = config if isinstance(config, Plan) else plan(model, config)
    if not decided:
        raise ValueError(f"{folder}: nothing to quantize: every linear stays in 16 bits; see `convrot inspect`")
    layers = {layer.name: layer for layer in linears(model)}
    planned = {layer.name: (layer.out_features, layer.in_features) for layer in decided.planned}
    if mismatch := _other_model(decided, type(model).__name__, planned.keys() | decided.keys(), layers.keys()):
        raise ValueError(f"{folder}: {mismatch}; plan this model first")
    for name, scheme in decided.items():
        shape = (layers[name].module.out_features, layers[name].module.in_features)
        reason = cannot_run(layers[name]) or cannot_hold(layers[name].module, scheme)
        if planned.get(name, shape) != shape:
            reason = f"it is {shape} here and {planned[name]} in the plan (N, K)"
        if reason:
            raise ValueError(f"{folder}: {name!r} cannot be quantized: {reason}; plan this model first")
    return decided if calibration is None else calibration.plan(decided)


def _other_model(decided: Plan, model_class: str, planned: Set[str], layers: Set[str]) -> str:
    """What shows that a plan was made for another model, or ""."""
    if decided.model_class != model_class:
        return f"the plan is one of {decided.model_class}, not of {model_class}"
    if unknown := sorted(planned - layers):
        return f"{model_class} has no linear {unknown[0]!r}"
    if missing := sorted(layers - planned):
        return f"the plan says nothing of {missing[0]!r}, not even that it stays in 16 bits"
    return ""


def _load(model: nn.Module, name: str, source: Source, device: torch.device | str) -> None:
    """Give a parameter or buffer its value from a file, cast to the dtype that it has on the meta device."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, leaf)
    value = source.value(name, old.dtype, device)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value)


def _quantize_layer(
    folder: Path, model: nn.Module, name: str, scheme: Scheme, device: torch.device | str, inputs: Tensor | None
) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), "_decide has seen it"
    try:
        model.set_submodule(name, ConvLinear4bit.from_linear(layer, scheme, device=device, inputs=inputs))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name!r} cannot be quantized: {error}") from None


def _note(model: nn.Module, folder: Path, decided: Plan, source: Source) -> None:
    """What saving writes beside the tensors: where the model is from, its plan (notes included), merged files."""
    model.register_to_config(_name_or_path=str(folder))  # type: ignore[operator]  # as from_pretrained does
    model.convrot_plan = decided  # type: ignore[assignment]  # a dict, not a Module
    model.convrot_loras = source.notes  # type: ignore[assignment]  # a list, not a Module
