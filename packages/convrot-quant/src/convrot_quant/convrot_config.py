"""ConvRotConfig, which diffusers and transformers know as "convrot" once this is imported.

Both choose a quantizer by name from a dict. They are large, so importing this does not import them: their dicts are
filled when their modules are imported, by whoever does that, or now if that has happened. For the same reason
ConvRotConfig is no subclass of their mixins, of which they use the methods below alone.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

from convrot_quant.config import QuantConfig
from convrot_quant.linear import COMPUTE_DTYPES
from convrot_quant.manifest import FORMAT_VERSION, CheckpointError

METHOD = "convrot"
_NOTED = ("dtype", "base_model", "loras")  # what a saved config.json adds


class ConvRotMethod(str, enum.Enum):
    """diffusers reads `quant_method.value`, which a plain string does not have."""

    CONVROT = METHOD


class ConvRotConfig:
    """How from_pretrained quantizes: a preset's name or a QuantConfig, for models of diffusers and of transformers.

    `config`: None means "ours" for a diffusion model and "text-encoder" for a text encoder.
    `modules_to_not_convert`: names as bitsandbytes and torchao read them (what ends in one, and all inside), or globs.
    `quantization_device`: where layers are rotated and quantized; by default a GPU if there is one.
    """

    def __init__(
        self,
        config: QuantConfig | Mapping[str, Any] | str | None = None,
        *,
        modules_to_not_convert: Sequence[str] | None = None,
        quantization_device: torch.device | str | None = None,
    ) -> None:
        modules = () if modules_to_not_convert is None else modules_to_not_convert
        if isinstance(modules, str) or not all(isinstance(name, str) and name for name in modules):
            raise ValueError(f"ConvRotConfig: modules_to_not_convert must be a list of names; got {modules!r}")
        self.quant_method = ConvRotMethod.CONVROT
        self.config = QuantConfig.from_dict(config) if isinstance(config, Mapping) else config
        self.modules_to_not_convert = list(modules)
        self.quantization_device = None if quantization_device is None else str(torch.device(quantization_device))
        self.dtype: str | None = None
        self.base_model: str | None = None
        self.loras: list[dict[str, Any]] | None = None  # the files that `convrot quantize --lora` merged
        self.resolve("ours")  # so that an unknown preset is refused here

    def resolve(self, default: str) -> QuantConfig:
        """The QuantConfig; `default` is the preset of a model for which none was asked."""
        config = default if self.config is None else self.config
        config = QuantConfig.preset(config) if isinstance(config, str) else config
        if not isinstance(config, QuantConfig):
            raise ValueError(f"ConvRotConfig: config must be a QuantConfig or the name of a preset; got {config!r}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; the device is this machine's and stays out."""
        config = self.config.to_dict() if isinstance(self.config, QuantConfig) else self.config
        written = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "config": config}
        written["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return written | {name: getattr(self, name) for name in _NOTED if getattr(self, name) is not None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """to_dict as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"ConvRotConfig {self.to_json_string()}"

    def to_diff_dict(self) -> dict[str, Any]:
        """As to_dict: every field is short."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of to_dict; also reads the mark of save_quantized. Unknown keys are refused by name."""
        values = dict(config_dict)
        version, noted = values.pop("format_version", FORMAT_VERSION), {key: values.pop(key, None) for key in _NOTED}
        if values.pop("quant_method", METHOD) != METHOD:
            raise CheckpointError(f"ConvRotConfig: quant_method must be {METHOD!r}")
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"ConvRotConfig: format_version must be 1 to {FORMAT_VERSION}, got {version!r}; upgrade convrot-quant"
            )
        unknown = values.keys() - {"config", "modules_to_not_convert", "quantization_device"}
        kinds = {key: list if key == "loras" else str for key in _NOTED}
        if unknown or not all(value is None or isinstance(value, kinds[key]) for key, value in noted.items()):
            raise CheckpointError(f"ConvRotConfig: unknown or malformed keys in {dict(config_dict)!r}")
        made = cls(**values)
        made.dtype, made.base_model, made.loras = (noted[key] for key in _NOTED)
        return (made, kwargs) if return_unused_kwargs else made

    def pick_dtype(self, asked: torch.dtype | None) -> torch.dtype:
        """The dtype asked for, else the one that the model was saved with, else bfloat16; noted for saving."""
        named = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}
        dtype = named.get(self.dtype or "", torch.bfloat16) if asked is None else asked
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"ConvRotConfig: dtype must be one of {', '.join(named)}; got {dtype}")
        self.dtype = str(dtype).removeprefix("torch.")
        return dtype


def _diffusers_quantizer(config: ConvRotConfig, **kwargs: Any) -> Any:
    from convrot_quant.diffusers import ConvRotQuantizer

    return ConvRotQuantizer(config, **kwargs)


def _transformers_quantizer(config: ConvRotConfig, **kwargs: Any) -> Any:
    try:
        from convrot_quant.text_encoders import ConvRotHfQuantizer
    except ImportError as error:
        raise ImportError(
            f"ConvRotConfig: text encoders need transformers 5 ({error}); upgrade transformers"
        ) from error
    return ConvRotHfQuantizer(config, **kwargs)


# modules that hold AUTO_QUANTIZER_MAPPING and AUTO_QUANTIZATION_CONFIG_MAPPING -> what makes a quantizer
_LIBRARIES: Mapping[str, Callable[..., Any]] = {
    "diffusers.quantizers.auto": _diffusers_quantizer,
    "transformers.quantizers.auto": _transformers_quantizer,
}


def register() -> None:
    """Make both libraries know ConvRotConfig, now or when they are imported; again does nothing."""
    for name in _LIBRARIES:
        if name in sys.modules:
            _fill(sys.modules[name])
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _fill(module: Any) -> None:
    if hasattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING"):  # not while another thread is importing it
        module.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _LIBRARIES[module.__name__])
        module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, ConvRotConfig)


class _Watcher(MetaPathFinder):
    """Finds the two modules as Python does, and fills their dicts once they have run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _LIBRARIES else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_fill(module: Any) -> None:
            run(module)
            _fill(module)

        spec.loader.exec_module = run_and_fill  # type: ignore[method-assign]  # this spec's own loader
        return spec


register()
