"""State dicts of the official ConvRot code, which publishes no files: its modules' tensors, saved as safetensors.

A layer is `weight` U8 (N, K/2), the codes of ComfyUI's files, and `weight_scales` and `scale`, twice the same F16
(N, 1). Neither the rotation's size nor whether a layer is rotated at all (`rot_need`) is written down: the one is an
argument here, and layers without a rotation cannot be told apart, nor run by the kernels: quantize those models anew.
"""

from __future__ import annotations

from pathlib import Path

import torch

from convrot_quant.config import GROUP_SIZES, Scheme
from convrot_quant.contents import Contents
from convrot_quant.manifest import CheckpointError
from convrot_quant.markers import DEFAULT_GROUP
from convrot_quant.tensorfile import Stored, read_tensors

SCALES = ("weight_scales", "scale")


def is_official(tensors: dict[str, Stored]) -> bool:
    """Whether any layer has packed codes with the official code's scales."""
    return any(tensor.dtype == "U8" and _scale(tensors, name) for name, tensor in tensors.items())


def _scale(tensors: dict[str, Stored], weight: str) -> list[Stored]:
    layer, _, leaf = weight.rpartition(".")
    found = [tensors.get(f"{layer}.{name}") for name in SCALES] if leaf == "weight" else []
    return [scale for scale in found if scale is not None]


def read_official(path: Path, *, group_size: int | None = None) -> Contents:
    """W4A4 layers with one rotation size, under the names of the file; scales F16 (N, 1) -> F32 (N,), exactly."""
    group_size = DEFAULT_GROUP if group_size is None else group_size
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}; got {group_size}")
    tensors = read_tensors(path)[1]
    schemes, kept = {}, dict(tensors)
    for name, weight in tensors.items():
        scales = _scale(tensors, name) if weight.dtype == "U8" else []
        if scales:
            layer = name.removesuffix(".weight")
            _check(path, layer, weight, scales, group_size)
            for leaf in SCALES:
                kept.pop(f"{layer}.{leaf}", None)
            content = scales[0].value().reshape(-1).to(torch.float32).numpy().tobytes()
            kept[name] = Stored("I8", weight.shape, weight.parts)
            kept[f"{layer}.weight_scale"] = Stored("F32", weight.shape[:1], (content,))
            schemes[layer] = Scheme(4, 4, group_size)
    return Contents(path, schemes, kept, None)


def _check(path: Path, layer: str, weight: Stored, scales: list[Stored], group_size: int) -> None:
    if len(weight.shape) != 2 or (2 * weight.shape[1]) % group_size:
        raise CheckpointError(
            f"{path}: {layer}.weight {weight.shape} is not packed codes (N, K/2) with K a multiple of the rotation's "
            f"{group_size}; give the right --group-size"
        )
    for scale in scales:
        if scale.dtype not in ("F16", "F32") or scale.shape not in ((weight.shape[0], 1), (weight.shape[0],)):
            raise CheckpointError(
                f"{path}: the scales of {layer!r} must be F16 ({weight.shape[0]}, 1), got {scale.dtype} {scale.shape}"
            )
    if len(scales) == 2 and not torch.equal(scales[0].value().reshape(-1), scales[1].value().reshape(-1)):
        raise CheckpointError(f"{path}: {layer!r} has two scales that differ; do not trust this file")
