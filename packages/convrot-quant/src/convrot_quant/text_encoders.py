"""ConvRotHfQuantizer: text encoders quantized by transformers' own from_pretrained, through the same ConvRotConfig.

transformers 5 loads by conversion operations: one for each weight that is quantized on load. A model that is quantized
already gets its layers before loading, and transformers fills them like any others.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from convrot_quant.linear import ConvLinear4bit
from convrot_quant.manifest import CheckpointError, read_header, read_plan
from convrot_quant.on_load import (
    QUANTIZED_LEAVES,
    expand,
    finish,
    keeping,
    metadata,
    plan_empty,
    planned_layer,
    quantization_device,
    quantize_into,
    refuse_missing,
    refuse_unplanned,
    to_files,
)
from convrot_quant.patch import dequantize_
from convrot_quant.plans import Plan
from convrot_quant.quantized_class import ordinary_, quantized_


class QuantizeOnLoad(ConversionOps):
    """weight (N, K) as it comes from the file -> a ConvLinear4bit in the model."""

    def __init__(self, quantizer: ConvRotHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Nothing is left for transformers to place."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        self.quantizer.quantize(model, full_layer_name.removesuffix(".weight"), weight)
        missing_keys.discard(full_layer_name)
        return {}


class ConvRotHfQuantizer(HfQuantizer):
    """What transformers' loader calls for a ConvRotConfig."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self.dtype = torch.bfloat16

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("ConvRotConfig: device_map must not put layers on disk; load on the CPU, then offload")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = self.quantization_config.pick_dtype(dtype)
        return self.dtype

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: Sequence[Any] | None = None, **kwargs: Any
    ) -> Any:
        if self.pre_quantized:
            if not checkpoint_files:
                raise CheckpointError("the plan is in the headers of files; load a folder with from_pretrained")
            self.plan = read_plan(checkpoint_files)
            refuse_unplanned(self.plan, (name for file in checkpoint_files for name in read_header(Path(file))[1]))
            expand(model, self.plan, self.dtype)
            return model
        config, fp32_modules = self.quantization_config, _fp32_modules(model, self.dtype)
        config = keeping(config.resolve("text-encoder"), config.modules_to_not_convert, fp32_modules)
        self.plan = plan_empty(model, config, fp32_modules)
        if not self.plan:
            warnings.warn(f"ConvRotConfig: nothing to quantize in {type(model).__name__}", stacklevel=2)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and planned_layer(self._planned, param_name, ("weight",)) is not None

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of one value, for device_map."""
        name = planned_layer(self._planned, param_name, ("weight",))
        if name is None or self.pre_quantized:
            return param.element_size()
        return self._planned[name].weight_bits / 8

    def get_quantize_ops(self) -> QuantizeOnLoad:
        return QuantizeOnLoad(self)

    def quantize(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """One layer; marked as initialized, else transformers would fill it with random values."""
        device = quantization_device(self.quantization_config.quantization_device, weight.device)
        layer = quantize_into(model, self._planned, name, weight, device)
        for leaf in _leaves(layer):
            getattr(layer, leaf)._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        refuse_missing(model, self._planned, _without_values(model))
        finish(model, self._planned, self.dtype)
        return quantized_(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        return to_files(model.state_dict(), self._planned), metadata(self._planned)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        ordinary_(model)
        if self.plan:
            dequantize_(model)
        return model

    @property
    def _planned(self) -> Plan:
        assert self.plan is not None, "made before loading"
        return self.plan

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _fp32_modules(model: Any, dtype: torch.dtype) -> list[str]:
    """As transformers reads the two lists: one counts in fp16 only, the strict one in bf16 as well."""
    loose = getattr(model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or () if dtype != torch.float32 else ()
    return sorted({*loose, *strict})


def _without_values(model: nn.Module) -> list[str]:
    """Names of tensors of quantized layers that were in no file: transformers marks what it has read."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)}
    return [
        f"{name}.{leaf}"
        for name, layer in layers.items()
        for leaf in _leaves(layer)
        if not hasattr(layer, "_hf_hook") and not getattr(getattr(layer, leaf), "_is_hf_initialized", False)
    ]


def _leaves(layer: nn.Module) -> list[str]:
    """The names of what a quantized layer has been given values for, or is to be."""
    return [leaf for leaf in QUANTIZED_LEAVES if hasattr(layer, leaf)]
