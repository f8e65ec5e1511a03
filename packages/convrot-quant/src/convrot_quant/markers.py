"""ComfyUI's word for how one layer is quantized (its `comfy_quant` JSON), to and from a Scheme.

W4A4, W4A8 (`linear_dtype` int8) and W8A8; with `full_precision_matrix_mult` the activations stay in 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convrot_quant.config import GROUP_SIZES, Scheme
from convrot_quant.manifest import CheckpointError

INT4, INT8 = "convrot_w4a4", "int8_tensorwise"
WRITTEN_GROUPS = (16, 64, 256)  # what ComfyUI's and SGLang's kernels take
DEFAULT_GROUP = 256
RULES = ("weight_rule", "weight_rounding", "activation_clip")  # of a scheme
FULL_PRECISION = "full_precision_matrix_mult"


def make_marker(layer: str, scheme: Scheme) -> dict[str, Any]:
    """The JSON object of a layer; what ComfyUI cannot express is refused."""
    remedy = "quantize the layer with another scheme, or convert to a diffusers folder"
    if scheme.group_size not in WRITTEN_GROUPS:
        raise ValueError(
            f"{layer!r}: ComfyUI's kernels take groups of 16, 64 or 256, not {scheme.group_size}; {remedy}"
        )
    if scheme.low_rank or (scheme.weight_bits, scheme.activation_bits) == (8, 4):
        raise ValueError(f"{layer!r}: ComfyUI's formats have no place for {scheme}; {remedy}")
    if scheme.weight_bits == 4:
        marker: dict[str, Any] = {"format": INT4, "convrot_groupsize": scheme.group_size}
        if scheme.activation_bits == 8:
            marker["linear_dtype"] = "int8"
    else:
        marker = {"format": INT8, "convrot": True, "convrot_groupsize": scheme.group_size, "per_row": True}
    # beside ComfyUI's own keys, which it looks up by name: how the scales came about is in the scales, and a clip is
    # what our quantizer of activations does and theirs does not
    marker |= {
        f"convrot_{name}": value for name in RULES if (value := getattr(scheme, name)) != getattr(Scheme(), name)
    }
    return marker | ({FULL_PRECISION: True} if scheme.activation_bits == 16 else {})


def read_marker(path: Path, layer: str, marker: object) -> Scheme:
    """The inverse of make_marker; legacy markers without `format`, and options nested in `params`, are read too."""
    if not isinstance(marker, Mapping):
        raise CheckpointError(f"{path}: the marker of {layer!r} is not a JSON object; do not trust this file")
    nested = marker.get("params")
    found = {**marker, **(nested if isinstance(nested, Mapping) else {})}
    rotated = found.get("convrot") is True
    name = found.get("format", INT8 if rotated else None)
    _refuse_format(path, layer, name, rotated)
    group = found.get("convrot_groupsize", DEFAULT_GROUP)
    if isinstance(group, bool) or group not in GROUP_SIZES:
        groups = ", ".join(map(str, GROUP_SIZES))
        raise CheckpointError(f"{path}: {layer!r} has convrot_groupsize {group!r}; this program has {groups}")
    linear_dtype = found.get("linear_dtype", "int4" if name == INT4 else "int8")
    if linear_dtype not in (("int4", "int8") if name == INT4 else ("int8",)):
        raise CheckpointError(f"{path}: {layer!r} has linear_dtype {linear_dtype!r}; it is int4 or int8")
    bits = 8 if linear_dtype == "int8" else 4
    weight_bits = 4 if name == INT4 else 8
    try:
        return Scheme(
            weight_bits,
            16 if found.get(FULL_PRECISION) is True else bits,
            group,
            **{name: found[f"convrot_{name}"] for name in RULES if f"convrot_{name}" in found},
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: the marker of {layer!r} does not fit: {error}") from None


def _refuse_format(path: Path, layer: str, name: object, rotated: bool) -> None:
    if name == INT4 or (name == INT8 and rotated):
        return
    if name == "asym_w4a8_int8":
        reason = "codebook indices with FP8 group scales, which no kernel here multiplies"
    elif name == INT8:
        reason = "INT8 without ConvRot; layers here are always rotated"
    else:
        reason = f"not one of {INT4} and {INT8} with convrot"
    raise CheckpointError(
        f"{path}: {layer!r} is in the format {str(name)[:80]!r}: {reason}; quantize the 16-bit model with convrot"
    )


def parse(path: Path, what: str, text: str | bytes) -> Any:
    """JSON out of a file that nobody vouches for."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}); copy it again") from None
