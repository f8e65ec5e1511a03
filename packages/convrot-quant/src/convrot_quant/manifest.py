"""Reads what a quantized folder says about itself, from headers alone, and refuses what cannot be trusted.

A folder is `config.json`, and either one safetensors file or shards with an index. Every file's metadata holds
`convrot_format_version`, `convrot_plan` (layers, schemes, notes, configuration) and `convrot_versions`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from convrot_quant.plans import Plan

FORMAT_VERSION = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' own names, so that its tools find the files
INDEX = f"{WEIGHTS}.index.json"
MOST_HEADER = 10 * 2**20  # bytes, 50 times FLUX.1's: safetensors takes 100 MB, whose tensors take a minute to list
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
    """Whether a model folder was written by save_quantized (of any format version); reads config.json or one header.

    Also true of a quantized model that save_pretrained wrote: read_manifest says how to write it instead.
    """
    mark = read_config(Path(folder)).get(MARK_KEY)
    if isinstance(mark, dict) and mark.get("quant_method") == MARK["quant_method"]:
        return True
    for path in sorted(Path(folder).glob("*.safetensors")):
        metadata, tensors = read_header(path)
        return any(key.startswith("convrot_") for key in metadata) or _lacks_plan(metadata, tensors)
    return False


def _lacks_plan(metadata: dict[str, str], tensors: dict[str, TensorHeader]) -> bool:
    """Whether a file holds codes with their fp32 scales, but not the plan to read them by."""
    scales = (name for name, header in tensors.items() if name.endswith(".weight_scale") and header.dtype == "F32")
    weights = (tensors.get(name.removesuffix("_scale")) for name in scales)
    return VERSION_KEY not in metadata and any(w is not None and w.dtype in ("U8", "I8") for w in weights)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a quantized folder's headers, without its tensors."""
    folder = Path(folder)
    config = {key: value for key, value in read_config(folder).items() if key != MARK_KEY}
    index = read_index(folder)
    files = sorted({folder / name for name in index.values()}) if index else [folder / WEIGHTS]
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorHeader] = {}
    for path in files:
        own, found = read_header(path)
        if _lacks_plan(own, found):
            raise CheckpointError(
                f"{path}: a quantized model written by save_pretrained(), which leaves out the plan; write it with "
                "save_quantized(model, folder)"
            )
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
    plan, versions = _plan_and_versions(files[0], metadata)
    return Manifest(folder, plan, versions, config, tensors, sum(path.stat().st_size for path in files))


def read_plan(files: Sequence[str | Path]) -> Plan:
    """The plan in the headers of a quantized model's files, whatever their names; they must all be of one save."""
    metadata: dict[str, str] = {}
    for path in map(Path, files):
        own, _ = read_header(path)
        _check_metadata(path, own, metadata or own)
        metadata = metadata or own
    return _plan_and_versions(Path(files[0]), metadata)[0]


def _plan_and_versions(path: Path, metadata: dict[str, str]) -> tuple[Plan, dict[str, str]]:
    """What a file's metadata says beyond its format version."""
    try:
        for key in (PLAN_KEY, VERSIONS_KEY):
            if key not in metadata:
                raise ValueError(f"no {key}")
        plan, versions = Plan.from_json(metadata[PLAN_KEY]), json.loads(metadata[VERSIONS_KEY])
        if not isinstance(versions, dict):
            raise ValueError(f"{VERSIONS_KEY} is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its convrot metadata is damaged ({error}); save the model again") from None
    return plan, {str(key): str(value) for key, value in versions.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with its class name in it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder}: no config.json; give a model folder of diffusers") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy or download it again") from None
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


def read_index(folder: Path) -> dict[str, str]:
    """{tensor: file} of a sharded folder, {} of a folder with one file; a name that leaves the folder is refused."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a shard index ({error}); copy the folder again") from None
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: not a shard index (no weight_map of files); copy the folder again")
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


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorHeader]]:
    """Metadata and tensors' headers of one file."""
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no {path.name}; give a folder written by save_quantized or `convrot quantize`"
        )
    try:
        with path.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MOST_HEADER < length <= path.stat().st_size:
            raise CheckpointError(
                f"{path}: its header has {length} bytes, more than {MOST_HEADER}; do not trust this file"
            )
        with safe_open(str(path), framework="pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                view = file.get_slice(name)
                tensors[name] = TensorHeader(path, view.get_dtype(), tuple(view.get_shape()))
            return dict(file.metadata() or {}), tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); copy or save it again") from None


def refuse_names(folder: Path, lacking: Set[str], unknown: Set[str], remedy: str) -> None:
    """The error for tensors that a model has and its files lack, or the other way round."""
    for names, what in ((lacking, "lacks"), (unknown, "has an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{folder}: {what} tensor {min(names)!r}{more}; {remedy}")


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
