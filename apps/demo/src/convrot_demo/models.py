"""Models: one pipeline, its 16-bit transformer and one quantized transformer; text encoders and VAE are shared.

One quantized transformer is kept, the last that was asked for: quantizing again is cheaper than memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrot_demo.placement import Placement, Way, Wish, place
from convrot_demo.traits import Limits, Traits, read_bounds, read_traits
from convrot_quant.compare import dtype_name
from convrot_quant.config import QuantConfig
from convrot_quant.generation import Settings
from convrot_quant.manifest import read_manifest
from convrot_quant.offload import Offload, apply, budget, choose, components
from convrot_quant.patch import model_bytes, plan
from convrot_quant.pipeline import (
    ModelFolder,
    fill_pipeline,
    load_transformer,
    meta_transformer,
    open_folder,
    outline_pipeline,
)
from convrot_quant.plans import Plan
from convrot_quant.streaming import load_and_quantize, outline

PRESETS = {"W4A4": "ours", "W4A4-r16": "ours-r16", "W4A8": "w4a8", "W8A8": "w8a8", "paper": "paper"}
SAVED = "saved"  # the scheme of --quantized FOLDER, or of a MODEL that is quantized
TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    model: str
    quantized: str | None = None
    device: str = "cpu"
    memory: Wish = "auto"
    vram: int | None = None
    limits: Limits = field(default_factory=Limits)
    mini_flux: Path | None = None  # the shipped folder, if `model` is that
    dtype: torch.dtype = torch.bfloat16


class Models:
    """The pipeline with either transformer: take_16bit() and take_quantized(scheme) return it ready to run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = open_folder(options.model)
        path = self.folder.transformers.get(TRANSFORMER)
        if path is None:
            raise ValueError(f"{options.model}: a bare transformer draws nothing; give a pipeline's folder")
        self._path = path
        self._saved = self._saved_path()
        self._plans: dict[str, Plan] = {}
        self.schemes = self._schemes()
        self.pipe: Any = outline_pipeline(self.folder, dtype=options.dtype)
        name = _name(options)
        about: Any = {"mini_flux": options.mini_flux, "schemes": self.schemes}
        self.bounds = read_bounds(self.pipe, options.limits, **about)
        self.traits = read_traits(self.pipe, name, **about)
        self.traits = _within(self.traits, options.limits)
        self._vram = budget(options.device, options.vram)
        self._full: nn.Module | None = None
        self._quantized: nn.Module | None = None
        self.scheme: str | None = None  # of self._quantized
        self.bytes_16bit = self.bytes_quantized = 0
        self.offload: Offload | None = None
        self.placement = self._place()
        self.name_16bit = "16-bit"
        if self.placement.way != "4bit":
            self._load_full()

    @property
    def way(self) -> Way:
        """Where the transformers are (placement.py)."""
        return self.placement.way

    @property
    def shows_previews(self) -> bool:
        """Whether the VAE may run between two steps: where components move, that would move them too."""
        return self.way != "4bit" or self.offload is None or self.offload.method == "none"

    def plan(self, scheme: str) -> Plan:
        """Each layer's scheme or reason: stored in a quantized folder, else made from shapes alone."""
        if scheme not in self._plans:
            if scheme == SAVED:
                assert self._saved is not None, "schemes has the saved one only then"
                self._plans[scheme] = read_manifest(self._saved).plan
            else:
                self._plans[scheme] = plan(meta_transformer(self._path, self.options.dtype), self._config(scheme))
        return self._plans[scheme]

    def take_16bit(self) -> Any:
        """The pipeline with the 16-bit transformer."""
        assert self._full is not None, "not asked for where BF16 is not shown"
        return self._take(self._full, self._quantized)

    def take_quantized(self, scheme: str) -> Any:
        """The pipeline with the transformer quantized by this scheme, loaded first if it is not there."""
        if scheme != self.scheme:
            self.scheme = self._quantized = None
            if self.pipe is not None:  # a load that failed has left none
                self.pipe.register_modules(transformer=None)
            if self.way == "4bit":
                self._load_alone(scheme)
            else:
                self._quantized = self._load_quantized(scheme)
                self.bytes_quantized = model_bytes(self._quantized)
            self.scheme = scheme
        if self.way == "4bit":
            return self.pipe
        assert self._quantized is not None, "it was loaded above"
        return self._take(self._quantized, self._full)

    def other_bytes(self, *, quantized: bool) -> int:
        """Bytes of the transformer that only waits, in the memory whose peak is measured."""
        if self.way == "swap" or (self.way == "offload" and quantized):
            return 0
        return self.bytes_16bit if quantized else (self.bytes_quantized if self._quantized is not None else 0)

    def _take(self, model: nn.Module, other: nn.Module | None) -> Any:
        if self.way == "swap":
            if other is not None:
                other.to("cpu")
            model.to(self.options.device)
        self.pipe.register_modules(transformer=model)
        return self.pipe

    def _saved_path(self) -> Path | None:
        """The quantized transformer's folder; a pipeline of convrot quantize or a transformer of save_quantized."""
        if self.options.quantized is None:
            return self._path if self.folder.is_quantized else None
        if self.folder.is_quantized:
            raise ValueError(f"{self.options.model} is quantized itself; with --quantized, --model is the 16-bit one")
        folder = open_folder(self.options.quantized)
        path = folder.transformers.get(TRANSFORMER) or folder.root
        if not folder.is_quantized:
            raise ValueError(f"--quantized {self.options.quantized} is not quantized; `convrot quantize` makes one")
        _check_same(path, self._path, self.options)
        return path

    def _schemes(self) -> tuple[str, ...]:
        saved = () if self._saved is None else (SAVED,)
        return saved if self.folder.is_quantized else (*saved, *PRESETS)

    def _config(self, scheme: str) -> QuantConfig:
        return QuantConfig.preset(PRESETS[scheme])

    def _place(self) -> Placement:
        if self.folder.is_quantized:
            note = f"{self.traits.name} is quantized and has no 16-bit weights: it is shown alone."
            return Placement("4bit", f"{note} Start with --model ORIGINAL --quantized {self.traits.name} to compare.")
        if self._vram is None or self.options.memory == "4bit":
            return place([], [], None, self.options.memory)
        inputs = self.traits.defaults
        settings = Settings(steps=inputs.steps, height=inputs.height, width=inputs.width)
        full = components(self.pipe, settings)
        self.pipe.register_modules(transformer=self._outline(self.schemes[0]))
        quantized = components(self.pipe, settings)
        return place(full, quantized, self._vram, self.options.memory)

    def _outline(self, scheme: str) -> nn.Module:
        if scheme == SAVED:
            assert self._saved is not None, "schemes has the saved one only then"
            found: nn.Module = outline_pipeline(self._with(self._saved), dtype=self.options.dtype).transformer
            return found
        return outline(self._path, self._config(scheme), dtype=self.options.dtype)

    def _load_full(self) -> None:
        """The 16-bit transformer and everything that both sides share."""
        device, dtype = self.options.device, self.options.dtype
        home = device if self.way == "both" else "cpu"
        fill_pipeline(self.pipe, self.folder, None, dtype=dtype, device=device, home=home)
        model: Any = self.pipe.transformer
        self.pipe.register_modules(transformer=None)  # stays where it is while the rest goes to the device
        self.pipe.to(device)
        self._full, self.bytes_16bit, self.name_16bit = model, model_bytes(model), dtype_name(model)
        if self.way == "offload":
            stream = torch.device(device).type == "cuda"
            model.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=stream)

    def _load_quantized(self, scheme: str) -> nn.Module:
        device, dtype = self.options.device, self.options.dtype
        if self.way == "swap" and self._full is not None:
            self._full.to("cpu")
        if scheme == SAVED:
            assert self._saved is not None, "schemes has the saved one only then"
            return load_transformer(self._saved, dtype=dtype, device=device)
        return load_and_quantize(self._path, self._config(scheme), device=device, dtype=dtype, progress=False)

    def _load_alone(self, scheme: str) -> None:
        """The whole pipeline with its one transformer, offloaded as far as it must be: what `convrot generate` does."""
        folder = self.folder if scheme != SAVED or self._saved is None else self._with(self._saved)
        config = None if scheme == SAVED else self._config(scheme)
        device, dtype = self.options.device, self.options.dtype
        self.pipe = None  # the old one goes before the new one comes
        pipe = outline_pipeline(folder, config, dtype=dtype)
        inputs = self.traits.defaults
        settings = Settings(steps=inputs.steps, height=inputs.height, width=inputs.width)
        self.offload = None if self._vram is None else choose(pipe, self._vram, settings)
        home = "cpu" if self.offload is not None and self.offload.method != "none" else device
        fill_pipeline(pipe, folder, config, dtype=dtype, device=device, home=home, progress=False)
        self.bytes_quantized = model_bytes(pipe.transformer)  # before offloading takes it apart
        if self.offload is None:
            pipe.to(device)
        else:
            apply(pipe, self.offload, device)
        self.pipe, self._quantized = pipe, pipe.transformer

    def _with(self, transformer: Path) -> ModelFolder:
        """The model's folder with another transformer's files."""
        return replace(self.folder, transformers={TRANSFORMER: transformer})


def _name(options: Options) -> str:
    """What the page calls the model: a hub id, or a folder's own name."""
    if options.mini_flux is not None:
        return "mini-flux"
    path = Path(options.model)
    return path.resolve().name if path.is_dir() else options.model


def _within(traits: Traits, limits: Limits) -> Traits:
    """Defaults that the server's limits allow."""
    return replace(traits, defaults=replace(traits.defaults, steps=min(traits.defaults.steps, limits.steps)))


def _check_same(saved: Path, base: Path, options: Options) -> None:
    """A quantized transformer of another model would fail somewhere inside, or draw nonsense."""
    stored = read_manifest(saved).plan
    wanted = plan(meta_transformer(base, options.dtype))
    shapes = [{(layer.name, layer.out_features, layer.in_features) for layer in p.planned} for p in (stored, wanted)]
    if stored.model_class != wanted.model_class or shapes[0] != shapes[1]:
        raise ValueError(
            f"--quantized {options.quantized} is not made from {options.model}: its {stored.model_class} has other "
            "layers; give the folder that was quantized as --model"
        )
