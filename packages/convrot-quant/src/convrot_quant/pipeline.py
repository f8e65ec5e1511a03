"""Model folders: find one (local or on the hub), load its pipeline or transformer, write the whole folder quantized."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrot_quant.checkpoint import load_quantized, write_quantized
from convrot_quant.config import QuantConfig
from convrot_quant.folders import replace_folder
from convrot_quant.manifest import CheckpointError, diffusers_class, is_quantized, read_config
from convrot_quant.patch import apply, plan
from convrot_quant.plans import Plan

TRANSFORMERS = ("transformer", "transformer_2")  # Wan 2.2 has two
_ROOT_FILES = ("model_index.json", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
_CONFIGS = ("model_index.json", "config.json", "*/config.json")
_TRANSFORMERS = (*_CONFIGS, "transformer*/*.safetensors*", "diffusion_pytorch_model*.safetensors*")
_EVERYTHING = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "diffusion_pytorch_model*.safetensors")


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder: a pipeline (model_index.json) with its transformers' folders, or one bare transformer."""

    root: Path
    is_pipeline: bool
    transformers: Mapping[str, Path]  # {"transformer": root / "transformer"}; {"": root} for a bare one

    @property
    def is_quantized(self) -> bool:
        """Whether any transformer in it was written by save_quantized."""
        return any(is_quantized(path) for path in self.transformers.values())


def open_folder(model: str | Path, *, weights: bool = True) -> ModelFolder:
    """A local folder or a hub id such as black-forest-labs/FLUX.1-dev -> its folder, downloaded if need be.

    `weights=False` is for looking inside: it fetches configs, and of a quantized model its transformer's files.
    """
    root = Path(model)
    if root.is_dir():
        return _folder(root)
    folder = _folder(_download(str(model), _EVERYTHING if weights else _CONFIGS))
    return _folder(_download(str(model), _TRANSFORMERS)) if not weights and folder.is_quantized else folder


def _folder(root: Path) -> ModelFolder:
    """What kind of model folder this is."""
    if (root / "model_index.json").is_file():
        found = {name: root / name for name in TRANSFORMERS if (root / name / "config.json").is_file()}
        if not found:
            raise CheckpointError(
                f"{root}: a pipeline without a transformer folder; only diffusion transformers are quantized"
            )
        return ModelFolder(root, True, found)
    if (root / "config.json").is_file():
        return ModelFolder(root, False, {"": root})
    raise CheckpointError(
        f"{root}: neither model_index.json nor config.json; give a folder of a diffusers pipeline or transformer"
    )


def _download(model: str, patterns: tuple[str, ...]) -> Path:
    """A hub id -> the folder of its cached snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise FileNotFoundError(f"{model}: no such folder")
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=["*.fp16.*", "*.bin"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{model}: no such folder, and the hub did not give it: {reason}") from None


def _dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """from_pretrained's keyword: `dtype` where diffusers has renamed it, else `torch_dtype`."""
    from diffusers.utils import deprecation_utils

    return {"dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype": dtype}


def meta_transformer(path: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A transformer's modules with shapes and no values, from its config.json alone."""
    from accelerate import init_empty_weights

    config = read_config(path)
    with init_empty_weights():
        model: nn.Module = diffusers_class(path, config).from_config(config)
    return model.to(dtype)


def load_transformer(path: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Module:
    """A transformer folder, 16-bit or quantized, as a model."""
    if is_quantized(path):
        return load_quantized(path, device=device, dtype=dtype)
    model: nn.Module = diffusers_class(path, read_config(path)).from_pretrained(
        path, local_files_only=True, **_dtype(dtype)
    )
    return model.to(device).eval()


def load_pipeline(folder: ModelFolder, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """The pipeline of a folder, 16-bit or quantized, ready to call."""
    from diffusers import DiffusionPipeline

    if not folder.is_pipeline:
        raise CheckpointError(
            f"{folder.root}: a bare transformer cannot generate; give a pipeline folder (model_index.json)"
        )
    quantized = {
        name: load_quantized(path, dtype=dtype) for name, path in folder.transformers.items() if is_quantized(path)
    }
    pipe = DiffusionPipeline.from_pretrained(folder.root, local_files_only=True, **_dtype(dtype), **quantized)
    return pipe.to(device)


def quantize_folder(
    folder: ModelFolder,
    destination: str | Path,
    config: QuantConfig | Plan,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Plan]:
    """Write a folder like `folder` with its transformers quantized; returns {component: plan}.

    A pipeline folder gives a whole pipeline folder, everything else copied; a bare transformer a bare transformer.
    """
    if folder.is_quantized:
        raise ValueError(f"{folder.root} is already quantized; start from the 16-bit folder")
    source, target = folder.root.resolve(), Path(destination).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"the destination {destination} must lie outside of the model's own folder {folder.root}")
    plans: dict[str, Plan] = {}
    with replace_folder(destination, overwrite=overwrite) as building:
        if folder.is_pipeline:
            _copy_components(folder, building)
        for name, path in folder.transformers.items():
            model = load_transformer(path, dtype=dtype)
            decided = config if isinstance(config, Plan) else plan(model, config)
            if not decided:
                raise ValueError(f"{path}: nothing to quantize: every linear stays in 16 bits; see `convrot inspect`")
            apply(model, decided, device=device, progress=progress)
            (building / name).mkdir(exist_ok=True)
            write_quantized(model, building / name, max_shard_size=max_shard_size, progress=progress)
            plans[name or "transformer"] = decided
            del model
    return plans


def _copy_components(folder: ModelFolder, building: Path) -> None:
    """Every component folder that model_index.json names, and the root's cards; links are followed."""
    index = json.loads((folder.root / "model_index.json").read_text(encoding="utf-8"))
    for name in index:
        source = folder.root / name
        if name not in folder.transformers and not name.startswith("_") and source.is_dir():
            shutil.copytree(source, building / name)
    for name in _ROOT_FILES:
        if (folder.root / name).is_file():
            shutil.copyfile(folder.root / name, building / name)
