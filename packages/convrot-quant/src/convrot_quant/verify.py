"""verify: whether a quantized file or folder is what it claims to be: names and shapes, codes, scales, checksums.

Names, shapes and dtypes are refused with a CheckpointError, as in loading; what only the values can tell is a Check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm

from convrot_kernels import rotate_quantize
from convrot_quant.comfy import with_diffusers_keys
from convrot_quant.config import Scheme
from convrot_quant.contents import Contents, UnknownModelError, build, schemes_text
from convrot_quant.convert import read_quantized
from convrot_quant.low_rank import BRANCH_LEAVES
from convrot_quant.tensorfile import DIGEST_KEY, Stored, digest_of, read_tensors

# ComfyUI's own quantizer on a fixed weight (8, 256): exact in fp32, so every correct quantizer has these bytes
GOLDEN_CODES = "c87b90d509532acec7d4d1d8adb9642c34f462d6560d0f133b0c2eda94a5106c"
GOLDEN_SCALES = "05af679fd4a5600d3d68b64bd2c388afc04230fdcc35ae3676ee882c271b475c"
# the lower of a byte's two codes, as a byte: (code ^ 8) - 8 is a nibble's value
_LOWER = bytes(min((b & 15 ^ 8) - 8, (b >> 4 ^ 8) - 8) & 255 for b in range(256))


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `passed` is None where there was nothing to compare with."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """What verify found. `tensors`: the SHA-256 of each one's bytes, to compare two files by."""

    schemes: Mapping[str, Scheme]
    checks: tuple[Check, ...]
    tensors: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)


def verify(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    group_size: int | None = None,
    progress: bool = False,
) -> Report:
    """Read all of a quantized file or folder, one chunk at a time, and check it. The arguments are convert's."""
    contents = read_quantized(source, group_size=group_size)
    contents = contents if config is None else contents.with_config(config)
    checks = [_names(contents), _digest(Path(source))]
    low, wrong, hashes = [], [], {}
    for name, stored in tqdm(contents.tensors.items(), desc="verify", unit="tensor", disable=not progress):
        layer, _, leaf = name.rpartition(".")
        scheme = contents.schemes.get(layer)
        least, hashes[name] = _scan(stored, scheme if leaf == "weight" else None)
        if scheme is not None and leaf == "weight" and least < (-7 if scheme.weight_bits == 4 else -127):
            low.append(name)
        if scheme is not None and leaf == "weight_scale" and not _are_scales(stored.value()):
            wrong.append(name)
        if scheme is not None and leaf in BRANCH_LEAVES and not stored.value().isfinite().all():
            wrong.append(name)
    checks += [_codes(contents, low), _scales(contents, wrong), golden()]
    return Report(contents.schemes, tuple(checks), hashes)


def golden() -> Check:
    """Whether this machine's quantizer reproduces ComfyUI's published codes and scales."""
    index = torch.arange(8 * 256, dtype=torch.int64)
    weight = (((index * 2654435761) % 65536).double() / 65536 - 0.5).float().view(8, 256)
    codes, scale = rotate_quantize(weight, packed=True)
    found = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (codes, scale)]
    passed = found == [GOLDEN_CODES, GOLDEN_SCALES]
    return Check("golden codes", passed, f"the quantizer here {'makes' if passed else 'does not make'} ComfyUI's bytes")


def _names(contents: Contents) -> Check:
    text = f"{len(contents.tensors)} tensors, {schemes_text(contents.schemes)}"
    try:
        plan, _ = build(with_diffusers_keys(contents))
    except UnknownModelError as error:
        return Check("names and shapes", None, f"{text}; {error}")
    return Check("names and shapes", True, f"{text}; all of {plan.model_class}")


def _digest(source: Path) -> Check:
    claimed = read_tensors(source)[0].get(DIGEST_KEY) if source.is_file() else None
    if claimed is None:
        return Check("checksum", None, "none in the file" if source.is_file() else "folders have none")
    found = digest_of(source, claimed)
    detail = f"SHA-256 {found}" if found == claimed else f"{found} is not the {claimed[:64]} that the file claims"
    return Check("checksum", found == claimed, detail)


def _scan(stored: Stored, scheme: Scheme | None) -> tuple[int, str]:
    """The least code of a weight (0 of anything else), and the SHA-256 of the bytes."""
    total, least = hashlib.sha256(), 0
    for chunk in stored.chunks():
        total.update(chunk)
        if scheme is not None and len(chunk):
            codes = bytes(chunk).translate(_LOWER) if scheme.weight_bits == 4 else chunk
            least = min(least, int(numpy.frombuffer(codes, numpy.int8).min()))
    return least, total.hexdigest()


def _are_scales(scale: torch.Tensor) -> bool:
    return bool((torch.isfinite(scale) & (scale > 0)).all())


def _codes(contents: Contents, low: list[str]) -> Check:
    layers = f"{len(contents.schemes)} layers"
    if low:
        return Check("codes", False, f"{low[0]} and {len(low) - 1} more hold -8 or -128, which no quantizer writes")
    return Check("codes", True, f"-7 to 7 (4 bits), -127 to 127 (8 bits) in {layers}")


def _scales(contents: Contents, wrong: list[str]) -> Check:
    if wrong:
        return Check("scales", False, f"{wrong[0]} and {len(wrong) - 1} more hold NaN, inf, zero or less")
    return Check("scales", True, f"finite and above zero in {len(contents.schemes)} layers")
