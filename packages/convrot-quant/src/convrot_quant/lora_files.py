"""LoRA files merged into 16-bit weights while those are read: `convrot quantize --lora`.

diffusers' loaders read a file and translate its names (diffusers', kohya's, the original FLUX ones); peft's layers
around a model without values hold what is to be added, and say what that is for one weight at a time. So the result is
that of load_lora_weights and fuse_lora on the 16-bit model, bit for bit, and no model is in memory.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convrot_quant.manifest import CheckpointError, read_header

PREFIX = "transformer."
# transformer class -> diffusers' loader, which its pipelines have among their bases
LOADERS = {
    "AuraFlowTransformer2DModel": "AuraFlow",
    "ChromaTransformer2DModel": "Flux",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CogView4Transformer2DModel": "CogView4",
    "CosmosTransformer3DModel": "Cosmos",
    "Flux2Transformer2DModel": "Flux2",
    "FluxTransformer2DModel": "Flux",
    "HiDreamImageTransformer2DModel": "HiDreamImage",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "Kandinsky5Transformer3DModel": "Kandinsky",
    "LTX2VideoTransformer3DModel": "LTX2",
    "LTXVideoTransformer3DModel": "LTXVideo",
    "Lumina2Transformer2DModel": "Lumina2",
    "MochiTransformer3DModel": "Mochi1",
    "QwenImageTransformer2DModel": "QwenImage",
    "SD3Transformer2DModel": "SD3",
    "SanaTransformer2DModel": "Sana",
    "WanTransformer3DModel": "Wan",
    "ZImageTransformer2DModel": "ZImage",
}
# what a file's names betray that is no plain low-rank term, which diffusers' loaders would drop or cannot merge
_OTHERS = {
    "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", ".lokr_": "a LoKr", ".hada_": "a LoHa",
    "query_norm.scale": "a Control LoRA", ".norm_q.": "a Control LoRA",
}  # fmt: skip
_ELSEWHERE = "merge it with the tool that made it, then quantize the merged model"


@dataclass(frozen=True)
class LoraFile:
    """A safetensors file and the strength with which it is merged."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """FILE or FILE:SCALE."""
        file, colon, scale = text.rpartition(":")
        if colon and not Path(text).exists():
            try:
                return cls(Path(file), float(scale))
            except ValueError:
                pass  # a colon in a name
        return cls(Path(text))


def note(file: LoraFile) -> dict[str, Any]:
    """What config.json and the model card say of a merged file."""
    digest = hashlib.sha256()
    with file.path.open("rb") as content:
        while chunk := content.read(1 << 24):
            digest.update(chunk)
    return {"file": file.path.name, "scale": file.scale, "sha256": digest.hexdigest()}


def merged(model: nn.Module) -> dict[str, Any]:
    """What the mark in a model's config.json says beyond the format: the files that were merged, if any."""
    loras = getattr(model, "convrot_loras", None)
    return {"loras": loras} if loras else {}


def noted(mark: object) -> list[dict[str, Any]]:
    """The inverse: the files that such a mark names."""
    loras = mark.get("loras") if isinstance(mark, Mapping) else None
    return [lora for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else []


class Merge:
    """Called with a tensor's name and its 16-bit value, gives the value with every LoRA in it.

    `model`: the 16-bit model on the meta device; it becomes this object's own.
    `ignored`: {file: names of what was left out, text encoders' layers and layers that the model lacks}.
    """

    def __init__(self, model: nn.Module, files: Sequence[LoraFile]) -> None:
        if find_spec("peft") is None:
            raise ImportError("merging LoRA files needs peft: pip install peft")
        self._adapters = [f"file_{i}" for i in range(len(files))]
        self.ignored: dict[str, list[str]] = {}
        _hold_places(model)
        known = {name for name, _ in model.named_modules() if name}
        for name, file in zip(self._adapters, files, strict=True):
            if not math.isfinite(file.scale):
                raise ValueError(f"{file.path}: its scale must be a finite number, got {file.scale}")
            state, alphas, metadata = _read(model, file.path)
            fitting = self._fitting(model, file.path, state, known)
            options = {"network_alphas": alphas or None, "metadata": metadata, "low_cpu_mem_usage": True}
            model.load_lora_adapter(fitting, prefix="transformer", adapter_name=name, **options)  # type: ignore[operator]
        self._layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        for name, file in zip(self._adapters, files, strict=True):
            for layer in self._of(name):
                layer.set_scale(name, file.scale)
            self._refuse_more_than_low_rank(file.path, name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """The tensor `name` of the state_dict -> its merged value, of the same shape, dtype and device."""
        parent, _, leaf = name.rpartition(".")
        layer: Any = self._layers.get(parent)
        if layer is None or leaf != "weight":
            return value
        for adapter in self._adapters:
            if adapter in layer.lora_A:
                for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                    part.to(value.device)
                value = value + layer.get_delta_weight(adapter).to(value.dtype)
        return value

    @property
    def layers(self) -> int:
        """How many layers are changed."""
        return len(self._layers)

    def _of(self, adapter: str) -> list[Any]:
        return [layer for layer in self._layers.values() if adapter in layer.scaling]

    def _fitting(self, model: nn.Module, path: Path, state: Mapping[str, Tensor], known: set[str]) -> dict[str, Tensor]:
        """The part of a file that belongs to layers of this model; their sizes are checked."""
        fitting = {key: value for key, value in state.items() if _layer(key) in known}
        if not fitting:
            raise CheckpointError(
                f"{path}: none of its {len(state)} tensors belongs to a layer of {type(model).__name__}"
                + (f" (the first is {min(state)!r})" if state else "")
                + "; take a LoRA made for this model"
            )
        widen = getattr(_loader(model), "_maybe_expand_lora_state_dict", None)
        for key, value in fitting.items():
            _check_size(model, path, key, value, widened=widen is not None)
        if left := sorted(state.keys() - fitting.keys()):
            self.ignored[str(path)] = left
        return fitting if widen is None else dict(widen(transformer=model, lora_state_dict=fitting))

    def _refuse_more_than_low_rank(self, path: Path, adapter: str) -> None:
        for layer in self._of(adapter):
            if layer.lora_variant or layer.lora_bias.get(adapter):
                raise CheckpointError(
                    f"{path}: it is more than low-rank terms (DoRA, a bias), which merging would lose; {_ELSEWHERE}"
                )


def _hold_places(model: nn.Module) -> None:
    """Give a model on the meta device weights that have size, dtype and a device, but one element of memory each.

    peft moves an adapter to where its layer is, and on the meta device it would lose its values.
    """
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            place = torch.zeros((), dtype=empty.dtype).expand(empty.shape)
            setattr(module, name, nn.Parameter(place, requires_grad=False))


def _loader(model: nn.Module) -> Any:
    import diffusers.loaders.lora_pipeline as loaders

    kind = type(model).__name__
    found = getattr(loaders, f"{LOADERS.get(kind, '')}LoraLoaderMixin", None) if kind in LOADERS else None
    if found is None:
        raise ValueError(f"--lora: diffusers has no LoRA loader for {kind}; {_ELSEWHERE}")
    return found


def _read(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], Any, Any]:
    """A file's low-rank terms under diffusers' names, their alphas and the metadata of who saved them."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    loader = _loader(model)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a LoRA (.safetensors), with its scale as FILE:0.8")
    for name in read_header(path)[1]:
        for mark, what in _OTHERS.items():
            if mark in name:
                raise CheckpointError(f"{path}: it is {what} ({name!r}), which cannot be merged here; {_ELSEWHERE}")
    options: dict[str, Any] = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
    has_alphas = "return_alphas" in inspect.signature(loader.lora_state_dict).parameters
    options |= {"return_lora_metadata": True} | ({"return_alphas": True} if has_alphas else {})
    state, *rest = _translated(path, lambda: loader.lora_state_dict(str(path.parent), **options))
    if state and not any("lora_A" in key for key in state):
        state = convert_unet_state_dict_to_peft(state)
    return state, rest[0] if has_alphas else None, rest[-1]


def _translated(path: Path, translate: Callable[[], Any]) -> Any:
    """Whatever diffusers' conversion of names raises on a file that it did not expect, as one sentence."""
    try:
        return translate()
    except (LookupError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: diffusers cannot read it as a LoRA of this model: {reason}") from error


def _layer(key: str) -> str:
    """ "transformer.x.lora_A.weight" -> "x"; "" for what is no layer of the transformer."""
    name, lora, _ = key.partition(".lora_")
    return name.removeprefix(PREFIX) if lora and name.startswith(PREFIX) else ""


def _check_size(model: nn.Module, path: Path, key: str, value: Tensor, *, widened: bool) -> None:
    """`widened`: fewer inputs than the layer has are none's fault: FLUX's Fill and Control read more channels."""
    weight: Any = getattr(model.get_submodule(_layer(key)), "weight", None)
    place = {"lora_A.weight": 1, "lora_B.weight": 0}.get(key.partition(f"{_layer(key)}.")[2])
    if weight is None or place is None or weight.dim() != value.dim():
        raise CheckpointError(f"{path}: {key!r} is no low-rank term of {type(model).__name__}; {_ELSEWHERE}")
    narrower = widened and place == 1 and value.shape[1] < weight.shape[1]
    if value.shape[place] != weight.shape[place] and not narrower:
        raise CheckpointError(
            f"{path}: {key!r} is {tuple(value.shape)}, and its layer in {type(model).__name__} has "
            f"{weight.shape[place]} {'inputs' if place else 'outputs'}; take a LoRA made for this model"
        )
