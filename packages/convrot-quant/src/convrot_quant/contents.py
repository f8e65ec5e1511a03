"""Contents: a quantized model as names, schemes and stored tensors, whatever its file format; and our own folders.

Canonical tensors: `<layer>.weight` I8 (N, K/2) or (N, K), `<layer>.weight_scale` F32 (N,); everything else as it is.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convrot_quant.checkpoint import build_quantized, check_saveable, check_tensors, metadata_of, write_config
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.linear import COMPUTE_DTYPES, ConvLinear4bit
from convrot_quant.manifest import INDEX, WEIGHTS, CheckpointError, Manifest, TensorHeader, read_manifest
from convrot_quant.plans import LayerPlan, Plan
from convrot_quant.rules import linears
from convrot_quant.skeleton import empty_model
from convrot_quant.tensorfile import DTYPES, NAMES, Stored, in_memory, read_tensors, write_tensors
from convrot_quant.versions import versions

_COMPUTE = tuple(NAMES[dtype] for dtype in COMPUTE_DTYPES)


class UnknownModelError(CheckpointError):
    """A sound file that does not say which model it is: its config.json is needed."""


@dataclass(frozen=True)
class Contents:
    """A quantized model in a file or in memory. `config`: diffusers' config.json, or None where nobody knows it."""

    source: Path
    schemes: Mapping[str, Scheme]
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] | None
    plan: Plan | None = None

    def with_config(self, config: Mapping[str, Any]) -> Contents:
        """The same tensors as those of a model with this config.json; paths of another machine are left out."""
        kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
        return replace(self, config=kept)


def read_folder(folder: Path) -> Contents:
    """A folder of save_quantized, checked as load_quantized does."""
    manifest = read_manifest(folder)
    check_tensors(manifest, build_quantized(manifest))
    tensors: dict[str, Stored] = {}
    for path in sorted({header.file for header in manifest.tensors.values()}):
        tensors |= read_tensors(path)[1]
    in_order = {name: tensors[name] for name in manifest.tensors}
    return Contents(folder, dict(manifest.plan), in_order, None, manifest.plan).with_config(manifest.config)


def of_model(model: nn.Module) -> Contents:
    """A quantized model in memory, row-major; a tensor is moved to the CPU when it is written."""
    check_saveable(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)}
    state = model.state_dict()
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"{empty[0]!r} is on the meta device and has no values; load or onload it first")
    tensors = {name: in_memory(tensor) for name, tensor in state.items()}
    for name in layers:
        tensors[f"{name}.weight"] = replace(tensors[f"{name}.weight"], dtype="I8")
    schemes = {name: layer.scheme for name, layer in layers.items()}
    config = json.loads(model.to_json_string())  # type: ignore[operator]
    return Contents(Path(type(model).__name__), schemes, tensors, None).with_config(config)


def build(contents: Contents) -> tuple[Plan, nn.Module]:
    """The model of contents with diffusers' names, on the meta device; every name, shape and dtype is checked."""
    source = contents.source
    if contents.config is None:
        raise UnknownModelError(f"{source}: it does not say which model it is; give its config.json (--config)")
    plan = contents.plan or _plan(contents, contents.config)
    headers = {name: TensorHeader(t.file or source, t.dtype, t.shape) for name, t in contents.tensors.items()}
    size = sum(tensor.nbytes for tensor in contents.tensors.values())
    manifest = Manifest(source, plan, versions(), dict(contents.config), headers, size)
    model = build_quantized(manifest)
    check_tensors(manifest, model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(DTYPES[headers[name].dtype]) if tensor.is_floating_point() else tensor.data
    model.convrot_plan = plan  # type: ignore[assignment]  # a dict, not a Module: for the metadata
    return plan, model


def values(contents: Contents) -> dict[str, Tensor]:
    """Every tensor in memory, 4-bit codes as uint8: the state_dict of the model that `build` makes."""
    packed = {f"{name}.weight" for name, scheme in contents.schemes.items() if scheme.weight_bits == 4}
    state = {name: stored.value() for name, stored in contents.tensors.items()}
    return {name: tensor.view(DTYPES["U8"]) if name in packed else tensor for name, tensor in state.items()}


def write_folder(contents: Contents, folder: Path, *, max_shard_size: int | str, progress: bool = False) -> None:
    """Write into an existing folder what save_quantized would, tensors copied through one at a time."""
    write_shards(build(contents)[1], contents.tensors, folder, max_shard_size=max_shard_size, progress=progress)


def write_shards(
    model: nn.Module,
    tensors: Mapping[str, Stored],
    folder: Path,
    *,
    max_shard_size: int | str,
    verb: str = "write",
    progress: bool = False,
) -> None:
    """config.json, files and index of a model on the meta device, whose values `tensors` has or makes."""
    from huggingface_hub import split_torch_state_dict_into_shards

    write_config(model, folder)
    metadata, state = metadata_of(model), model.state_dict()
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    for i, (filename, names) in enumerate(split.filename_to_tensors.items(), 1):
        shard = {name: tensors[name] for name in names}
        count = f" {i}/{len(split.filename_to_tensors)}" if split.is_sharded else ""
        write_tensors(folder / filename, shard, metadata, digest=False, verb=verb + count, progress=progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plan(contents: Contents, config: Mapping[str, Any]) -> Plan:
    """The plan that the schemes embody, for the linears of the model that the config describes."""
    common = _common_dtype(contents)
    model = empty_model(contents.source, config, dtype=DTYPES[common], most_parameters=2 * len(contents.tensors) + 1)
    layers = []
    for layer in linears(model):
        scheme, bias = contents.schemes.get(layer.name), contents.tensors.get(f"{layer.name}.bias")
        weight = contents.tensors.get(f"{layer.name}.weight") if scheme is None else bias
        dtype = weight.dtype if weight is not None and weight.dtype in _COMPUTE else common
        sizes = (layer.module.out_features, layer.module.in_features, str(DTYPES[dtype]).split(".")[1])
        note = "" if scheme else "not quantized"
        layers.append(LayerPlan(layer.name, *sizes, bias.nbytes if bias else 0, scheme, note))
    unknown = contents.schemes.keys() - {layer.name for layer in layers}
    if unknown:
        raise CheckpointError(
            f"{contents.source}: {min(unknown)!r} is quantized, and {type(model).__name__} has no such linear; "
            "take file and config from the same model"
        )
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    other = max(total - sum(layer.bytes_after for layer in layers), 0)
    return Plan(layers, QuantConfig(), type(model).__name__, other)


def _common_dtype(contents: Contents) -> str:
    """Of the values that are no scales, the dtype of most tensors."""
    found: Counter[str] = Counter()
    for name, tensor in contents.tensors.items():
        if tensor.dtype in _COMPUTE and not name.endswith(".weight_scale"):
            found[tensor.dtype] += 1
    return found.most_common(1)[0][0] if found else "BF16"


def schemes_text(schemes: Mapping[str, Scheme]) -> str:
    """ "3 layers W4A4 g256, 1 layer W4A16 g256"."""
    counts: dict[str, int] = defaultdict(int)
    for scheme in schemes.values():
        counts[f"{scheme.name} g{scheme.group_size}"] += 1
    return ", ".join(f"{n} layer{'s' * (n > 1)} {name}" for name, n in sorted(counts.items())) or "no quantized layer"
