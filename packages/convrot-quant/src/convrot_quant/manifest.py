"""Reads what a quantized folder says about itself, from headers alone, and refuses what cannot be trusted.

A folder is `config.json`, and either one safetensors file or shards with an index. Every file's metadata holds
`convrot_format_version`, `convrot_plan` (layers, schemes, notes, configuration) and `convrot_versions`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from convrot_quant.plans import Plan

FORMAT_VERSION = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' own names, so that its tools find the files
INDEX = f"{WEIGHTS}.index.json"
MARK_KEY, MARK = "quantization_config", {"quant_method": "convrot", "format_version": FORMAT_VERSION}
VERSION_KEY, PLAN_KEY, VERSIONS_KEY = "convrot_format_version", "convrot_plan", "convrot_versions"


class CheckpointError(ValueError):
    """A quantized folder that cannot be read, in one sentence: which file, what is wrong, what to do."""


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor is and what it looks like on disk."""

    file: Path
    dtype: str  # safetensors' names: I8, F32, BF16, ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A quantized folder's headers: plan, versions, model config, and every tensor's place, dtype and shape."""

    folder: Path
    plan: Plan
    versions: dict[str, str]
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    file_bytes: int


def is_quantized(folder: str | Path) -> bool:
    """Whether a model folder was written by save_quantized (of any format version); reads config.json or one header."""
    mark = read_config(Path(folder)).get(MARK_KEY)
    if isinstance(mark, dict) and mark.get("quant_method") == MARK["quant_method"]:
        return True
    for path in sorted(Path(folder).glob("*.safetensors")):
        return any(key.startswith("convrot_") for key in _read_header(path)[0])
    return False


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a quantized folder's headers, without its tensors."""
    folder = Path(folder)
    config = {key: value for key, value in read_config(folder).items() if key != MARK_KEY}
    index = _read_index(folder)
    files = sorted({folder / name for name in index.values()}) if index else [folder / WEIGHTS]
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorHeader] = {}
    for path in files:
        own, found = _read_header(path)
        _check_metadata(path, own, metadata or own)
        metadata = metadata or own
        for name, header in found.items():
            if index and index.get(name) != path.name:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is not listed for this file in {INDEX}; save the model again"
                )
            tensors[name] = header
    missing = sorted(set(index) - set(tensors))
    if missing:
        raise CheckpointError(f"{folder}: {INDEX} lists {missing[0]!r}, but its file lacks it; copy the folder again")
    try:
        plan = Plan.from_json(metadata[PLAN_KEY])
        versions = {str(key): str(value) for key, value in json.loads(metadata[VERSIONS_KEY]).items()}
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{files[0]}: its convrot metadata is damaged ({error}); save the model again") from None
    return Manifest(folder, plan, versions, config, tensors, sum(path.stat().st_size for path in files))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with its class name in it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder}: no config.json; give a model folder of diffusers") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise CheckpointError(f"{path}: no _class_name; it is not the config of a diffusers model")
    return config


def diffusers_class(folder: Path, config: dict[str, Any]) -> Any:
    """The diffusers model class that a config names."""
    import diffusers

    name = config["_class_name"]
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise CheckpointError(f"{folder}: diffusers {diffusers.__version__} has no model {name}; upgrade diffusers")
    return found


def _read_index(folder: Path) -> dict[str, str]:
    """{tensor: file} of a sharded folder, {} of a folder with one file; a name that leaves the folder is refused."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a shard index ({error}); copy the folder again") from None
    if not entries:
        raise CheckpointError(f"{path}: the shard index is empty; copy the folder again")
    for name in set(map(str, entries.values())):
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {name!r} is not the plain name of a .safetensors file; do not trust this folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing; copy the folder again")
    return {str(tensor): str(name) for tensor, name in entries.items()}


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorHeader]]:
    """Metadata and tensors' headers of one file."""
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no {path.name}; give a folder written by save_quantized or `convrot quantize`"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                view = file.get_slice(name)
                tensors[name] = TensorHeader(path, view.get_dtype(), tuple(view.get_shape()))
            return dict(file.metadata() or {}), tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); copy or save it again") from None


def _check_metadata(path: Path, own: dict[str, str], first: dict[str, str]) -> None:
    version = own.get(VERSION_KEY)
    if version is None:
        raise CheckpointError(
            f"{path}: not written by convrot (no {VERSION_KEY}); quantize the model with `convrot quantize`"
        )
    if not version.isdecimal():
        raise CheckpointError(f"{path}: {VERSION_KEY} must be a whole number, got {version!r}; save the model again")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version} is newer than the {FORMAT_VERSION} that this convrot-quant reads; "
            "upgrade convrot-quant"
        )
    if int(version) < 1:
        raise CheckpointError(f"{path}: format_version must be 1, got {version}; save the model again")
    if own != first:
        raise CheckpointError(
            f"{path}: its metadata differs from the first shard's: shards of two saves; save the model again"
        )
