"""ComfyUI's single files: `convrot_w4a4` and INT8 ConvRot, mixed per layer, read and written.

A quantized layer is `weight` (I8), `weight_scale` (F32) and a marker: JSON bytes in `<layer>.comfy_quant`, or an entry
of the header's `_quantization_metadata`. Some programs read only the one, some only the other: both are written, under
the tensors' own names, and either is read. docs/formats.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from convrot_quant.checkpoint import assign, versions
from convrot_quant.config import Scheme
from convrot_quant.contents import Contents, build, of_model, values
from convrot_quant.folders import replace_file
from convrot_quant.keys import PREFIX, is_original, to_diffusers, to_original
from convrot_quant.manifest import VERSIONS_KEY, CheckpointError
from convrot_quant.markers import make_marker, parse, read_marker
from convrot_quant.tensorfile import Stored, read_tensors, write_tensors

HEADER_KEY, CONFIG_KEY = "_quantization_metadata", "convrot_config"
MARKER, SCALE = ".comfy_quant", ".weight_scale"
MOST_MARKER = 4096  # bytes; those in use have below 200
SUFFIX = ".safetensors"
_FOREIGN = {".weight_s_rel": "asym_w4a8_int8", ".weight_codebook": "asym_w4a8_int8", ".wscales": "nunchaku's SVDQuant"}
_FOREIGN |= {".qweight": "nunchaku's SVDQuant", ".weight_scale_2": "nvfp4"}
Keys = Literal["original", "diffusers"]


def save_comfy(
    model: nn.Module,
    file: str | Path,
    *,
    keys: Keys = "original",
    prefix: str = "",
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write a quantized model as one file for ComfyUI, the same codes and scales; it appears whole or not at all.

    `keys`: "original" is what ComfyUI knows, with q, k, v fused; "diffusers" keeps every layer's own scheme.
    """
    write_comfy(of_model(model), file, keys=keys, prefix=prefix, overwrite=overwrite, progress=progress)


def load_comfy(
    file: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fuse: bool = True,
) -> nn.Module:
    """A file for ComfyUI -> the diffusers model with the same codes and scales; the other options as in load_quantized.

    `config`: the model's config.json. Files that convrot wrote have it, and FLUX.1 is known by its shapes.
    """
    contents = read_comfy(Path(file))
    contents = contents if config is None else contents.with_config(config)
    contents = with_diffusers_keys(contents)
    plan, model = build(contents)
    return assign(model, plan, values(contents), device=device, dtype=dtype, fuse=fuse)


def with_diffusers_keys(contents: Contents) -> Contents:
    """The same contents under diffusers' names."""
    return to_diffusers(contents) if is_original(contents.tensors) else contents


def write_comfy(
    contents: Contents,
    file: str | Path,
    *,
    keys: Keys = "original",
    prefix: str = "",
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write contents with diffusers' names as one file, tensors copied through one at a time."""
    for layer, scheme in contents.schemes.items():
        make_marker(layer, scheme)  # what the format has no place for is named as the model names it
    named = to_original(contents) if keys == "original" else contents
    markers = {prefix + layer: make_marker(layer, scheme) for layer, scheme in named.schemes.items()}
    tensors = {prefix + name: _shaped(name, tensor, named.schemes) for name, tensor in named.tensors.items()}
    for layer, marker in markers.items():
        text = json.dumps(marker).encode()
        tensors[layer + MARKER] = Stored("U8", (len(text),), (text,))
    metadata = {
        "format": "pt",
        HEADER_KEY: json.dumps({"format_version": "1.0", "layers": markers}),
        VERSIONS_KEY: json.dumps(versions()),
    }
    if contents.config is not None:
        metadata[CONFIG_KEY] = json.dumps(contents.config)
    with replace_file(file, overwrite=overwrite) as building:
        write_tensors(building, tensors, metadata, progress=progress)


def _shaped(name: str, tensor: Stored, schemes: Mapping[str, Scheme]) -> Stored:
    """Scales of 8-bit weights are (N, 1) in ComfyUI's files, those of 4-bit weights (N,)."""
    scheme = schemes.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    eight = scheme is not None and scheme.weight_bits == 8
    return replace(tensor, shape=(*tensor.shape, 1)) if eight else tensor


def read_comfy(path: Path) -> Contents:
    """Markers and headers of a file, checked; no weight is read. Names stay as they are, without the usual prefix."""
    metadata, stored = read_tensors(path)
    prefix = _prefix(path, stored)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    _refuse_foreign(path, tensors)
    schemes = _schemes(path, metadata, {n: t for n, t in tensors.items() if n.endswith(MARKER)}, prefix)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(MARKER)}
    _refuse_unmarked(path, kept, schemes)
    for layer, scheme in schemes.items():
        for name, tensor in _canonical(path, layer, scheme, kept).items():
            kept[name] = tensor
    contents = Contents(path, schemes, kept, None)
    if CONFIG_KEY not in metadata:
        return contents
    config = parse(path, f"its {CONFIG_KEY}", metadata[CONFIG_KEY])
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise CheckpointError(f"{path}: its {CONFIG_KEY} is no config of a diffusers model; do not trust this file")
    return contents.with_config(config)


def _prefix(path: Path, names: Mapping[str, object]) -> str:
    inside = [name for name in names if name.startswith(PREFIX)]
    if inside and len(inside) < len(names):
        other = min(name for name in names if not name.startswith(PREFIX))
        raise CheckpointError(
            f"{path}: it holds more than a diffusion model ({other!r}); save the diffusion model as a file of its own"
        )
    return PREFIX if inside else ""


def _schemes(path: Path, metadata: Mapping[str, str], markers: Mapping[str, Stored], prefix: str) -> dict[str, Scheme]:
    """{layer: scheme} of both kinds of markers, which must not contradict each other."""
    found: dict[str, Scheme] = {}
    for name, tensor in markers.items():
        layer = name.removesuffix(MARKER)
        if tensor.dtype not in ("U8", "I8") or len(tensor.shape) != 1 or tensor.nbytes > MOST_MARKER:
            raise CheckpointError(f"{path}: {name!r} is not a marker ({tensor.dtype}, {tensor.shape})")
        found[layer] = read_marker(path, layer, parse(path, f"{name!r}", b"".join(map(bytes, tensor.chunks()))))
    header = parse(path, f"its {HEADER_KEY}", metadata.get(HEADER_KEY, "{}"))
    layers = header.get("layers", {}) if isinstance(header, dict) else None
    if not isinstance(layers, dict):
        raise CheckpointError(f"{path}: its {HEADER_KEY} has no layers; copy it again")
    for full, marker in layers.items():
        layer = full.removeprefix(prefix or PREFIX)
        scheme = read_marker(path, layer, marker)
        if found.setdefault(layer, scheme) != scheme:
            raise CheckpointError(f"{path}: header and marker tensor differ about {layer!r}; do not trust this file")
    if not found:
        raise CheckpointError(
            f"{path}: no layer is marked as quantized for ComfyUI; quantize a 16-bit model with `convrot quantize`"
        )
    return found


def _refuse_foreign(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Other formats, by the names of their tensors."""
    for name in tensors:
        for suffix, what in _FOREIGN.items():
            if name.endswith(suffix):
                raise CheckpointError(
                    f"{path}: {name!r} belongs to {what}, which this program does not read; quantize the 16-bit model"
                )


def _refuse_unmarked(path: Path, tensors: Mapping[str, Stored], schemes: Mapping[str, Scheme]) -> None:
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in schemes and (leaf == "weight_scale" or (leaf == "weight" and tensor.dtype in ("I8", "U8"))):
            raise CheckpointError(f"{path}: {name!r} is quantized and has no marker that says how; do not guess")


def _canonical(path: Path, layer: str, scheme: Scheme, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Weight and scale of a marked layer, checked: I8 (N, K/2) or (N, K), F32 (N,)."""
    weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}{SCALE}")
    if weight is None or scale is None:
        raise CheckpointError(f"{path}: {layer!r} is marked, and has no weight or no weight_scale; copy it again")
    if weight.dtype not in ("I8", "U8") or len(weight.shape) != 2 or not weight.nbytes:
        raise CheckpointError(f"{path}: {layer}.weight must be I8 (N, K), got {weight.dtype} {weight.shape}")
    n, columns = weight.shape
    k = columns * 2 if scheme.weight_bits == 4 else columns
    if k % scheme.group_size or (scheme.weight_bits == 4 and k % 64):
        raise CheckpointError(f"{path}: {layer!r} has K={k}, not a multiple of 64 and of group {scheme.group_size}")
    if (
        scale.dtype != "F32"
        or scale.shape not in ((n,), (n, 1), (), (1,))
        or (scheme.weight_bits == 4 and not _full(scale, n))
    ):
        raise CheckpointError(f"{path}: {layer}{SCALE} must be F32 ({n},), got {scale.dtype} {scale.shape}")
    parts = scale.parts if _full(scale, n) else (b"".join(map(bytes, scale.chunks())) * n,)
    return {f"{layer}.weight": replace(weight, dtype="I8"), f"{layer}{SCALE}": Stored("F32", (n,), parts)}


def _full(scale: Stored, n: int) -> bool:
    return scale.shape in ((n,), (n, 1))
