"""Model folders: find one (local or on the hub), load its pipeline or transformer, write the whole folder quantized."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from convrot_kernels import preferred_layout
from convrot_quant.calibration import Calibration
from convrot_quant.checkpoint import build_quantized, load_quantized
from convrot_quant.config import QuantConfig
from convrot_quant.folders import replace_folder
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.lora_files import LoraFile
from convrot_quant.manifest import CheckpointError, diffusers_class, is_quantized, read_config, read_manifest
from convrot_quant.plans import Plan
from convrot_quant.source import empty_16bit
from convrot_quant.streaming import load_and_quantize, outline, quantize_to

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


def open_16bit(model: str | Path) -> ModelFolder:
    """open_folder for what others are compared with."""
    folder = open_folder(model)
    if folder.is_quantized:
        raise ValueError(f"{folder.root} is quantized; compare with the 16-bit model")
    return folder


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
    return empty_16bit(path, dtype)


def load_transformer(path: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Module:
    """A transformer folder, 16-bit or quantized, as a model."""
    if is_quantized(path):
        return load_quantized(path, device=device, dtype=dtype)
    model_class = diffusers_class(path, read_config(path))
    with _loading(path):
        model: nn.Module = model_class.from_pretrained(path, local_files_only=True, **_dtype(dtype))
    return model.to(device).eval()


def load_pipeline(folder: ModelFolder, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """The pipeline of a folder, 16-bit or quantized, ready to call."""
    _check_pipeline(folder)
    paths = {name: path for name, path in folder.transformers.items() if is_quantized(path)}
    quantized = {name: load_quantized(path, dtype=dtype, device=device) for name, path in paths.items()}
    return _assemble(folder, quantized, dtype).to(device)


def outline_pipeline(
    folder: ModelFolder, config: QuantConfig | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The pipeline of a folder on the CPU, its transformers on the meta device: sizes and settings, no values yet.

    `config`: how fill_pipeline will quantize 16-bit transformers; None leaves them.
    """
    _check_pipeline(folder)
    models = {name: _outline_transformer(path, config, dtype) for name, path in folder.transformers.items()}
    return _assemble(folder, models, dtype)


def _outline_transformer(path: Path, config: QuantConfig | None, dtype: torch.dtype) -> nn.Module:
    if is_quantized(path):
        return build_quantized(read_manifest(path))
    return meta_transformer(path, dtype) if config is None else outline(path, config, dtype=dtype)


def fill_pipeline(
    pipe: Any,
    folder: ModelFolder,
    config: QuantConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    home: str | None = None,
    progress: bool = True,
) -> None:
    """Load the transformers of an outlined pipeline, in place; a 16-bit one is quantized while it is read.

    `device`: where they will run. `home`: where they wait, if that is not `device`.
    """
    for name, path in folder.transformers.items():
        if config is None or is_quantized(path):
            model = load_transformer(path, dtype=dtype, device=home or device)
        else:
            model = load_and_quantize(path, config, device=device, home=home, dtype=dtype, progress=progress)
        for layer in model.modules():
            if isinstance(layer, ConvLinear4bit):  # there, one at a time: offloading moves values and keeps their order
                layer.to(device).relayout(preferred_layout(device))
                layer.to(home or device)
        pipe.register_modules(**{name: model})


def _check_pipeline(folder: ModelFolder) -> None:
    if not folder.is_pipeline:
        raise CheckpointError(
            f"{folder.root}: a bare transformer cannot generate; give a pipeline folder (model_index.json)"
        )
    _read_index(folder.root)


def _assemble(folder: ModelFolder, models: Mapping[str, nn.Module], dtype: torch.dtype) -> Any:
    """Every component of a pipeline from its folder but those in `models`."""
    from diffusers import DiffusionPipeline

    with _loading(folder.root):
        return DiffusionPipeline.from_pretrained(folder.root, local_files_only=True, **_dtype(dtype), **models)


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Whatever diffusers raises on damaged files, as one sentence that names the folder."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError, SafetensorError) as error:
        lines, plain = str(error).strip().splitlines() or ["no reason given"], (ValueError, OSError, SafetensorError)
        reason = lines[0] if isinstance(error, plain) else f"{lines[0]} ({type(error).__name__})"
        raise CheckpointError(f"{path}: diffusers cannot load it: {reason}; copy or download it again") from error


def quantize_folder(
    folder: ModelFolder,
    destination: str | Path,
    config: QuantConfig | Plan,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    max_shard_size: int | str = "5GB",
    loras: Sequence[LoraFile] = (),
    calibration: Calibration | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Plan]:
    """Write a folder like `folder` with its transformers quantized; returns {component: plan}.

    A pipeline folder gives a whole pipeline folder, everything else copied; a bare transformer a bare transformer.
    `loras` are merged into the 16-bit weights first. `calibration`: as apply. `base_model`: the hub id that model cards
    name.
    """
    if folder.is_quantized:
        raise ValueError(f"{folder.root} is already quantized; start from the 16-bit folder")
    source, target = folder.root.resolve(), Path(destination).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"the destination {destination} must lie outside of the model's own folder {folder.root}")
    if loras and len(folder.transformers) > 1:
        names = " and ".join(folder.transformers)
        raise ValueError(f"{folder.root} has {names}: quantize each of the two folders with its own --lora")
    if calibration is not None and len(folder.transformers) > 1:
        raise ValueError(f"{folder.root} has {' and '.join(folder.transformers)}: a calibration is of one transformer")
    plans: dict[str, Plan] = {}
    with replace_folder(destination, overwrite=overwrite) as building:
        if folder.is_pipeline:
            _copy_components(folder, building)
        for name, path in folder.transformers.items():
            (building / name).mkdir(exist_ok=True)
            plans[name or "transformer"] = quantize_to(
                path,
                building / name,
                config,
                device=device or "cpu",
                dtype=dtype,
                max_shard_size=max_shard_size,
                loras=loras,
                calibration=calibration,
                base_model=base_model,
                named="/".join(filter(None, (target.name, name))),
                progress=progress,
            )
    return plans


def _read_index(root: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder."""
    path = root / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{path}: no _class_name; it is not the index of a diffusers pipeline")
    return index


def _copy_folder(source: Path, copy: Path) -> None:
    try:
        shutil.copytree(source, copy)
    except shutil.Error as error:  # it goes on after a failure, and lists them all
        file, _, reason = error.args[0][0]
        raise OSError(
            f"{file} cannot be copied ({reason.partition(': ')[0]}); copy or download the model again, or make room"
        ) from None


def _copy_components(folder: ModelFolder, building: Path) -> None:
    """Every component folder that model_index.json names, and the root's cards; links are followed."""
    for name in _read_index(folder.root):
        source = folder.root / name
        if name not in folder.transformers and not name.startswith("_") and source.is_dir():
            _copy_folder(source, building / name)
    for name in _ROOT_FILES:
        if (folder.root / name).is_file():
            shutil.copyfile(folder.root / name, building / name)
