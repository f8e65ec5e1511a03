"""Source: a 16-bit diffusers folder, read one tensor at a time; headers are checked first, and LoRA files merged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

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
from convrot_quant.skeleton import as_loaded, empty_model

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "copy or download the folder again"


@dataclass(frozen=True)
class Source:
    """A 16-bit folder's tensors, with LoRA files merged into what is read."""

    folder: Path
    headers: dict[str, TensorHeader]
    merge: Merge | None
    notes: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, model: nn.Module, dtype: torch.dtype, loras: Sequence[LoraFile]) -> Source:
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
