"""save_quantized and load_quantized: safetensors shards, the plan in every header, strict and bit-equal loading.

On disk, 4-bit codes are I8 (N, K/2), row-major, low nibble = even column; scales are F32 (N,): as in ComfyUI's files.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from convrot_quant.folders import replace_folder
from convrot_quant.fuse import fuse_
from convrot_quant.leftovers import FULL
from convrot_quant.linear import COMPUTE_DTYPES, ConvLinear4bit
from convrot_quant.lora_files import merged, noted
from convrot_quant.manifest import (
    FORMAT_VERSION,
    INDEX,
    MARK,
    MARK_KEY,
    PLAN_KEY,
    VERSION_KEY,
    VERSIONS_KEY,
    WEIGHTS,
    CheckpointError,
    Manifest,
    read_config,
    read_manifest,
    refuse_names,
)
from convrot_quant.patch import plan_of
from convrot_quant.plans import Plan
from convrot_quant.rules import cannot_hold, linears
from convrot_quant.skeleton import empty_model, keeps_fp32
from convrot_quant.tensorfile import DTYPES
from convrot_quant.versions import versions


def save_quantized(
    model: nn.Module,
    folder: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write a quantized model as a folder: config.json and safetensors. The folder appears whole or not at all."""
    check_saveable(model)
    check_shard_size(max_shard_size)
    with replace_folder(folder, overwrite=overwrite) as building:
        write_quantized(model, building, max_shard_size=max_shard_size, progress=progress)


def check_saveable(model: nn.Module) -> None:
    """Errors for a model that save_quantized cannot write."""
    if not hasattr(model, "save_config"):
        raise ValueError(f"save_quantized: expected a diffusers model with save_config; got {type(model).__name__}")
    if not any(isinstance(module, ConvLinear4bit) for module in model.modules()):
        raise ValueError(f"save_quantized: {type(model).__name__} is not quantized; quantize_ it first")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            raise ValueError(f"save_quantized: {name!r} is a LoRA layer; unload the LoRA first, it is saved apart")
        if isinstance(module, ConvLinear4bit) and module.has_added_sides:
            raise ValueError(f"save_quantized: {name!r} has a fused LoRA; unfuse_lora() first, it is saved apart")


def check_shard_size(size: int | str) -> None:
    """Errors for a size of shards that is none: only the hub's own reader knows them all."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        reason = str(error)
    else:
        zero_or_less = size <= 0 if isinstance(size, int) else size.strip().startswith("-")
        reason = "it must be more than 0" if zero_or_less else ""
    if reason:
        raise ValueError(f"max_shard_size must be a size such as 5GB or 500MB, got {size!r}: {reason}")


def write_quantized(model: nn.Module, folder: Path, *, max_shard_size: int | str, progress: bool = False) -> None:
    """Write into an existing folder; one shard at a time is on the CPU. save_quantized adds the atomic rename."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"save_quantized: {name!r} is on the meta device and has no values; load or onload it first"
            )
    write_config(model, folder)
    metadata, pattern = metadata_of(model), WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    tied, packed = _tied(state), _packed_names(model)
    # tied tensors are written once per name, each with its own storage, as safetensors asks
    state = {name: tensor.clone() if name in tied else tensor for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    for filename, names in tqdm(split.filename_to_tensors.items(), desc="save", unit="shard", disable=not progress):
        shard = {name: _to_disk(state[name], packed=name in packed) for name in names}
        try:
            save_file(shard, str(folder / filename), metadata)
        except SafetensorError as error:  # no OSError, by whose number replace_folder knows a full disk
            for code in FULL:
                if os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_quantized(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fuse: bool = True,
    progress: bool = False,
) -> nn.Module:
    """Read a folder of save_quantized: built on the meta device, then every tensor assigned, strictly, bit for bit.

    `dtype` casts what is in 16 bits (and biases) after loading; codes and scales are never cast. `fuse`: as in apply.
    """
    manifest = read_manifest(folder)
    model = build_quantized(manifest)
    check_tensors(manifest, model)
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, header in manifest.tensors.items():
        by_file[header.file].append(name)
    state: dict[str, Tensor] = {}
    packed = _packed_names(model)
    for path, names in tqdm(by_file.items(), desc="load", unit="shard", disable=not progress):
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            for name in names:
                tensor = file.get_tensor(name)
                state[name] = tensor.view(torch.uint8) if name in packed else tensor
    model.convrot_loras = noted(read_config(manifest.folder).get(MARK_KEY))  # type: ignore[assignment]  # a list, no Module
    return assign(model, manifest.plan, state, device=device, dtype=dtype, fuse=fuse)


def assign(
    model: nn.Module,
    plan: Plan,
    state: dict[str, Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    fuse: bool,
) -> nn.Module:
    """Give a model of build_quantized its tensors and make it ready to run; `state` is emptied."""
    model.load_state_dict(state, strict=True, assign=True)
    state.clear()  # layers that take another order below would otherwise leave their codes in it
    model.to(device)  # buffers that are not in the state_dict
    if dtype is not None:
        _cast(model, dtype)
    model.convrot_plan = plan  # type: ignore[assignment]  # a dict, not a Module: for saving again
    if fuse:
        fuse_(model)
    return model.eval()


def build_quantized(manifest: Manifest) -> nn.Module:
    """The model of a manifest with its parameters on the meta device, planned layers already ConvLinear4bit."""
    _check_dtypes(manifest)
    most = 2 * len(manifest.tensors)
    model = empty_model(manifest.folder, manifest.config, dtype=_most_common_dtype(manifest), most_parameters=most)
    _check_shapes(manifest, model)
    dtypes = {layer.name: getattr(torch, layer.dtype) for layer in manifest.plan.layers}
    for name, scheme in manifest.plan.items():
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear or cannot_hold(linear, scheme):
            raise CheckpointError(
                f"{manifest.folder}: the plan's {scheme.name} g{scheme.group_size} does not fit {name!r}"
            )
        layer = ConvLinear4bit(
            linear.in_features, linear.out_features, scheme, bias=linear.bias is not None, device="meta"
        )
        layer.compute_dtype = dtypes[name]
        model.set_submodule(name, layer)
    return model


def _check_dtypes(manifest: Manifest) -> None:
    """The plan's dtypes are those of 16-bit values, and of a 16-bit layer the one that its file has."""
    for layer in manifest.plan.layers:
        header = manifest.tensors.get(f"{layer.name}.weight")
        dtype = getattr(torch, layer.dtype)
        if not dtype.is_floating_point or (layer.scheme is not None and dtype not in COMPUTE_DTYPES):
            raise CheckpointError(
                f"{manifest.folder}: the plan's dtype {layer.dtype} of {layer.name!r} is not float16, bfloat16 or "
                "float32; save the model again"
            )
        if layer.scheme is None and header is not None and DTYPES.get(header.dtype, dtype) != dtype:
            raise CheckpointError(
                f"{manifest.folder}: {layer.name!r} is {layer.dtype} in the plan and {header.dtype} in its file; "
                "save the model again"
            )


def _check_shapes(manifest: Manifest, model: nn.Module) -> None:
    """Every linear that the plan names is in the model with the plan's shape (N, K)."""
    layers = {layer.name: layer.module for layer in linears(model)}
    for layer in manifest.plan.layers:
        if layer.name not in layers:
            class_name = type(model).__name__
            raise CheckpointError(f"{manifest.folder}: the plan names {layer.name!r}, which {class_name} lacks")
        is_ = (layers[layer.name].out_features, layers[layer.name].in_features)
        was = (layer.out_features, layer.in_features)
        if is_ != was:
            raise CheckpointError(
                f"{manifest.folder}: {layer.name!r} is {is_} in the model and {was} in the plan (N, K); "
                "save the model again"
            )


def check_tensors(manifest: Manifest, model: nn.Module) -> None:
    """Every tensor of the model is in the files with its shape and, where the format fixes it, dtype; and no other."""
    expected = model.state_dict()
    lacking, unknown = expected.keys() - manifest.tensors.keys(), manifest.tensors.keys() - expected.keys()
    refuse_names(manifest.folder, lacking, unknown, "save the model again")
    for name, tensor in expected.items():
        header = manifest.tensors[name]
        if header.shape != tuple(tensor.shape):
            raise CheckpointError(f"{manifest.folder}: {name!r} must be {tuple(tensor.shape)}, got {header.shape}")
        if header.dtype not in _fitting_dtypes(name, tensor, manifest):
            raise CheckpointError(f"{manifest.folder}: {name!r} must not be {header.dtype}; save the model again")


def _fitting_dtypes(name: str, tensor: Tensor, manifest: Manifest) -> tuple[str, ...]:
    layer, _, leaf = name.rpartition(".")
    if layer in manifest.plan and leaf in ("weight", "weight_scale"):
        return ("I8",) if leaf == "weight" else ("F32",)
    if tensor.is_floating_point():
        return ("BF16", "F16", "F32", "F64")
    return tuple(key for key, dtype in DTYPES.items() if dtype == tensor.dtype)


def write_config(model: nn.Module, folder: Path) -> None:
    """diffusers' config.json plus the mark by which from_pretrained knows the folder, and refuses it without us.

    The mark also says which LoRA files were merged into the weights.
    """
    model.save_config(folder)  # type: ignore[operator]
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {MARK_KEY: MARK | merged(model)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def metadata_of(model: nn.Module) -> dict[str, str]:
    """What every file of a quantized folder says of the model: format, plan, versions."""
    plan = json.dumps(plan_of(model).to_dict(), separators=(",", ":"))
    written_with = json.dumps(versions(), separators=(",", ":"))
    return {"format": "pt", VERSION_KEY: str(FORMAT_VERSION), PLAN_KEY: plan, VERSIONS_KEY: written_with}


def _packed_names(model: nn.Module) -> set[str]:
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, ConvLinear4bit))
    return {f"{name}.weight" for name, module in layers if module.scheme.weight_bits == 4}


def _most_common_dtype(manifest: Manifest) -> torch.dtype | None:
    """The layers' dtype, or None where there are none."""
    dtypes = Counter(layer.dtype for layer in manifest.plan.layers).most_common(1)
    return getattr(torch, dtypes[0][0]) if dtypes else None


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast 16-bit values; scales, codes and what the model wants in fp32 keep their dtype."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not keeps_fp32(model, name) and not name.endswith(".weight_scale"):
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if isinstance(module, ConvLinear4bit):
            module.compute_dtype = dtype


def _tied(state: dict[str, Tensor]) -> set[str]:
    """The names whose storage an earlier name of the state_dict has too."""
    seen: set[int] = set()
    names = set()
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer and pointer in seen:
            names.add(name)
        seen.add(pointer)
    return names


def _to_disk(tensor: Tensor, *, packed: bool) -> Tensor:
    """Contiguous, on the CPU, packed codes viewed as I8 as the format asks."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor.view(torch.int8) if packed else tensor
