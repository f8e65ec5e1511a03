"""load_and_quantize: a 16-bit diffusers folder in, a quantized model out; quantize_to: quantized files out.

The plan is made on the meta device, from shapes alone. Then tensors are read one at a time: at the worst moment there
are the layers quantized so far, what stays in 16 bits, and one 16-bit weight with what its quantization needs. Writing
files, only the last of these. LoRA files are merged into a 16-bit weight when it has been read (lora_files.py).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.contents import write_shards
from convrot_quant.fuse import fuse_
from convrot_quant.linear import ConvLinear4bit, quantize_weight
from convrot_quant.lora_files import LoraFile, Merge, note
from convrot_quant.manifest import (
    INDEX,
    MARK_KEY,
    WEIGHTS,
    CheckpointError,
    TensorHeader,
    read_config,
    read_header,
    read_index,
    refuse_names,
)
from convrot_quant.model_card import write_model_card
from convrot_quant.patch import plan, plan_of
from convrot_quant.plans import Plan
from convrot_quant.rules import cannot_run, linears
from convrot_quant.skeleton import as_loaded, empty_model
from convrot_quant.tensorfile import NAMES, Stored

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "copy or download the folder again"


def load_and_quantize(
    path: str | Path,
    config: QuantConfig | Plan | str = "ours",
    *,
    device: torch.device | str = "cpu",
    home: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    loras: Sequence[LoraFile] = (),
    progress: bool = True,
) -> nn.Module:
    """A transformer folder of diffusers (safetensors, one file or shards) -> its quantized model, bit for bit as if
    it had been loaded in `dtype` and then quantized by quantize_.

    `device`: where layers are rotated and quantized. `home`: where the model ends up, if that is not `device`.
    `loras`: merged into the 16-bit weights, bit for bit as fuse_lora does on that device.
    """
    folder, home = Path(path), device if home is None else home
    model = empty_16bit(folder, dtype)
    source = _Source.open(folder, model, dtype, loras)
    decided = _decide(folder, model, config)
    weights = {f"{name}.weight": name for name in decided}
    for name in model.state_dict():
        if name not in weights:
            _load(model, name, source, home)
    quiet = not progress or bool(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
    # in the files' order, which disks read fastest
    in_files = [weights[name] for name in source.headers if name in weights]
    for name in tqdm(in_files, desc="quantize", unit="layer", disable=quiet, leave=False):
        _load(model, f"{name}.weight", source, home)
        _quantize_layer(folder, model, name, decided[name], device)
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
    source = _Source.open(folder, model, dtype, loras)
    decided = _decide(folder, model, config)
    quantized = outline(folder, decided, dtype=dtype)
    _note(quantized, folder, decided, source)
    tensors: dict[str, Stored] = {}
    for name, tensor in quantized.state_dict().items():
        if name in source.headers:
            tensors[name] = _stored(tensor, partial(source.value, name, tensor.dtype, "cpu"))
    for name, scheme in decided.items():
        key = f"{name}.weight"
        layer = _Quantized(source, name, model.state_dict()[key].dtype, scheme, device)
        for leaf, like in quantized.get_submodule(name).state_dict().items():
            if leaf != "bias":
                tensors[f"{name}.{leaf}"] = _stored(like, partial(layer.part, leaf))
        tensors[key] = replace(tensors[key], dtype="I8")
    write_shards(quantized, tensors, building, max_shard_size=max_shard_size, verb="quantize", progress=progress)
    write_model_card(building, quantized, base_model or str(folder), named=named)
    return plan_of(quantized)


@dataclass(frozen=True)
class _Source:
    """A 16-bit folder's tensors, with LoRA files merged into what is read."""

    folder: Path
    headers: dict[str, TensorHeader]
    merge: Merge | None
    notes: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, model: nn.Module, dtype: torch.dtype, loras: Sequence[LoraFile]) -> _Source:
        """Headers and LoRA files, checked against the model on the meta device."""
        headers = read_headers(folder)
        _check_tensors(folder, model, headers)
        merge = Merge(empty_16bit(folder, dtype), loras) if loras else None
        for file, names in (merge.ignored if merge else {}).items():
            warnings.warn(f"{file}: left out {len(names)} tensors of other models, such as {names[0]!r}", stacklevel=3)
        return cls(folder, headers, merge, [note(file) for file in loras])

    def value(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A tensor; floating-point values are cast."""
        # opened for each tensor: the pages of a mapped file count as this process's memory until the mapping ends
        with safe_open(str(self.headers[name].file), framework="pt", device=str(device)) as file:
            tensor: Tensor = file.get_tensor(name)
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensor if self.merge is None else self.merge(name, tensor)


def _stored(like: Tensor, make: Callable[[], Tensor]) -> Stored:
    return Stored(NAMES[like.dtype], tuple(like.shape), (make,))


@dataclass
class _Quantized:
    """A layer's tensors, made when the first of them is written; the others wait for their turn."""

    source: _Source
    name: str
    dtype: torch.dtype
    scheme: Scheme
    device: torch.device | str
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def part(self, leaf: str) -> Tensor:
        """A tensor of the layer by the name that it has there, on the CPU."""
        if leaf not in self.waiting:
            self.waiting = self._quantize()
        return self.waiting.pop(leaf)

    def _quantize(self) -> dict[str, Tensor]:
        weight = self.source.value(f"{self.name}.weight", self.dtype, self.device)
        try:
            made = quantize_weight(weight, self.scheme)
        except ValueError as error:
            raise CheckpointError(f"{self.source.folder}: {self.name!r} cannot be quantized: {error}") from None
        parts = {"weight": made.codes, "weight_scale": made.scale}
        if made.branch is not None:
            parts |= {"low_rank_down": made.branch.down, "low_rank_up": made.branch.up}
        return {leaf: tensor.cpu() for leaf, tensor in parts.items()}


def empty_16bit(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The modules of a 16-bit folder on the meta device, with the dtypes that diffusers' loader gives them."""
    return as_loaded(empty_model(folder, read_config(folder), dtype=dtype), dtype)


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """{tensor: its header} of a 16-bit folder, file by file; pickled and quantized weights are refused."""
    mark = read_config(folder).get(MARK_KEY)
    if mark:
        method = mark.get("quant_method", "an unknown method") if isinstance(mark, dict) else "an unknown method"
        raise CheckpointError(f"{folder}: its config.json says that {method} has quantized it; give the 16-bit folder")
    files = sorted(set(read_index(folder).values())) or [WEIGHTS]
    if files == [WEIGHTS] and not (folder / WEIGHTS).is_file():
        raise CheckpointError(_without_weights(folder))
    headers: dict[str, TensorHeader] = {}
    for name in files:
        headers |= read_header(folder / name)[1]
    return headers


def _without_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return f"{folder}: neither {WEIGHTS} nor {INDEX}; {_AGAIN}"
    return (
        f"{folder}: its weights are pickled ({pickled[0]}), which can run code when read; "
        "write them as safetensors first: from_pretrained(folder), then save_pretrained(folder)"
    )


def _check_tensors(folder: Path, model: nn.Module, headers: dict[str, TensorHeader]) -> None:
    """Every tensor of the model is in the files with its shape, and no other but those that its class ignores."""
    expected = model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = {name for name in headers.keys() - expected.keys() if not any(re.search(p, name) for p in ignored)}
    refuse_names(folder, expected.keys() - headers.keys(), unknown, _AGAIN)
    for name, tensor in expected.items():
        header = headers[name]
        if header.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name!r} must be {tuple(tensor.shape)}, got {header.shape}; "
                "take config.json and weights from the same model"
            )
        if tensor.is_floating_point() != header.dtype.startswith(("F", "BF")):
            raise CheckpointError(f"{folder}: {name!r} must not be {header.dtype}; give the 16-bit folder")


def _decide(folder: Path, model: nn.Module, config: QuantConfig | Plan | str) -> Plan:
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
        reason = cannot_run(layers[name])
        if planned.get(name, shape) != shape:
            reason = f"it is {shape} here and {planned[name]} in the plan (N, K)"
        elif shape[1] % scheme.group_size:
            reason = f"K={shape[1]} is not a multiple of group_size={scheme.group_size}"
        if reason:
            raise ValueError(f"{folder}: {name!r} cannot be quantized: {reason}; plan this model first")
    return decided


def _other_model(decided: Plan, model_class: str, planned: Set[str], layers: Set[str]) -> str:
    """What shows that a plan was made for another model, or ""."""
    if decided.model_class != model_class:
        return f"the plan is one of {decided.model_class}, not of {model_class}"
    if unknown := sorted(planned - layers):
        return f"{model_class} has no linear {unknown[0]!r}"
    if missing := sorted(layers - planned):
        return f"the plan says nothing of {missing[0]!r}, not even that it stays in 16 bits"
    return ""


def _load(model: nn.Module, name: str, source: _Source, device: torch.device | str) -> None:
    """Give a parameter or buffer its value from a file, cast to the dtype that it has on the meta device."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, leaf)
    value = source.value(name, old.dtype, device)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value)


def _quantize_layer(folder: Path, model: nn.Module, name: str, scheme: Scheme, device: torch.device | str) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), "_decide has seen it"
    try:
        model.set_submodule(name, ConvLinear4bit.from_linear(layer, scheme, device=device))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name!r} cannot be quantized: {error}") from None


def _note(model: nn.Module, folder: Path, decided: Plan, source: _Source) -> None:
    """What saving writes beside the tensors: where the model is from, its plan (notes included), merged files."""
    model.register_to_config(_name_or_path=str(folder))  # type: ignore[operator]  # as from_pretrained does
    model.convrot_plan = decided  # type: ignore[assignment]  # a dict, not a Module
    model.convrot_loras = source.notes  # type: ignore[assignment]  # a list, not a Module
