"""ConvRotQuantizer: what diffusers' loaders call for a ConvRotConfig.

Every import in this package is absolute, so that `import diffusers` means the library, here as well.

The plan lives in the headers of the files, as save_quantized writes it: config.json only says that it is there. So
what save_pretrained writes, load_quantized reads, and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from convrot_quant.convrot_config import ConvRotConfig
from convrot_quant.linear import COMPUTE_DTYPES
from convrot_quant.manifest import CheckpointError, read_plan
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


class ConvRotQuantizer(DiffusersQuantizer):
    """The methods stand in the order in which they are called."""

    use_keep_in_fp32_modules = True
    quantization_config: ConvRotConfig

    def __init__(self, quantization_config: ConvRotConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert = quantization_config.modules_to_not_convert
        self.plan: Plan | None = None
        self.dtype = torch.bfloat16

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ValueError(
                "ConvRotConfig: device_map must not put layers on disk, where scales would be rounded; load on the "
                "CPU, then enable_group_offload(offload_to_disk_path=...)"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self.dtype = self.quantization_config.pick_dtype(torch_dtype)
        return self.dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[Any]) -> list[str]:
        if self.pre_quantized:
            self.plan = read_plan(checkpoint_files)
            refuse_unplanned(self.plan, loaded_keys)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self.plan is None:  # from_single_file, which calls this first and does not say whether it is quantized
            if any(name.endswith(("weight_scale", "scale_weight", "comfy_quant")) for name in state_dict):
                raise CheckpointError(
                    "from_single_file: the file is quantized already, and diffusers passes its header by; load a "
                    "folder with from_pretrained or load_quantized, or convert the file with `convrot convert`"
                )
            self.pre_quantized = False
        return state_dict

    def _process_model_before_weight_loading(
        self, model: nn.Module, *, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            if self.plan is None:
                raise CheckpointError("this diffusers is too old to find the plan; load with load_quantized(folder)")
            return expand(model, self.plan, self.dtype)
        config = keeping(self.quantization_config.resolve("ours"), self.modules_to_not_convert, keep_in_fp32_modules)
        self.plan = plan_empty(model, config, keep_in_fp32_modules)
        if not self.plan:
            warnings.warn(f"ConvRotConfig: nothing to quantize in {type(model).__name__}", stacklevel=2)

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, Any]:
        """Sizes for device_map: a planned weight by its bits; everything else in the loader's own dtype."""
        from accelerate.utils import CustomDtype

        if self.plan is None or self.pre_quantized:  # packed codes are counted right as they are
            return {}
        sizes = {4: CustomDtype.INT4, 8: torch.int8}
        return {f"{name}.weight": sizes[scheme.weight_bits] for name, scheme in self.plan.items()}

    def adjust_max_memory(self, max_memory: dict[Any, int | str]) -> dict[Any, int | str]:
        """The memory that a device map shares out, less what it cannot see of a model that is yet to be quantized."""
        from accelerate.utils.modeling import convert_file_size_to_int

        if self.plan is None or self.pre_quantized:
            return max_memory
        whole = self.plan.bytes_after
        unseen = sum(layer.scale_bytes + layer.branch_bytes for layer in self.plan.layers)
        return {k: convert_file_size_to_int(size) * (whole - unseen) // whole for k, size in max_memory.items()}

    def get_cuda_warm_up_factor(self) -> int:
        """The loader allocates (elements of the model // this) values of 16 bits: no more than the quantized model."""
        return 2 if self.pre_quantized or self.plan is None else -(-self.plan.bytes_before // self.plan.bytes_after)

    @property
    def supports_parallel_loading(self) -> bool:
        """Threads would read 16-bit layers faster than they are quantized, and fill the memory."""
        return False

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.plan is not None:
            refuse_missing(model, self.plan, missing_keys)
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        leaves = QUANTIZED_LEAVES if self.pre_quantized else ("weight",)
        return self.plan is not None and planned_layer(self.plan, param_name, leaves) is not None

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        raise CheckpointError(f"{param_name!r} must be {tuple(current_param.shape)}, got {tuple(loaded_param.shape)}")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        assert self.plan is not None, "made before loading"
        name, _, leaf = param_name.rpartition(".")
        if not self.pre_quantized:
            device = quantization_device(self.quantization_config.quantization_device, target_device)
            quantize_into(model, self.plan, name, param_value.to(target_device), device)
            return
        value, layer = state_dict[param_name], model.get_submodule(name)  # not param_value: the loader rounded scales
        allowed = {"weight": (torch.int8, torch.uint8), "weight_scale": (torch.float32,)}.get(leaf, COMPUTE_DTYPES)
        if value.dtype not in allowed:
            raise CheckpointError(f"{param_name!r} must not be {value.dtype}; save the model again")
        value = value.to(target_device, self.dtype if allowed == COMPUTE_DTYPES else None)
        setattr(layer, leaf, nn.Parameter(value, requires_grad=False) if leaf == "weight" else value)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        assert self.plan is not None, "made before loading"
        finish(model, self.plan, self.dtype)
        model.convrot_loras = self.quantization_config.loras  # type: ignore[assignment]  # a list, not a Module
        # from_single_file leaves both out, and a config.json without them would not be read back
        noted = {"quantization_config": self.quantization_config, "_pre_quantization_dtype": self.dtype}
        model.register_to_config(**noted)  # type: ignore[operator]
        return quantized_(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not safe_serialization:
            raise ValueError("save_pretrained: safe_serialization=False would pickle the model; leave it out")
        assert self.plan is not None, "a loaded model has one"
        return to_files(state_dict, self.plan), metadata(self.plan)

    def _dequantize(self, model: Any) -> Any:
        ordinary_(model)
        if self.plan:
            dequantize_(model)
        written = {"quantization_config", "_pre_quantization_dtype"}
        model._internal_dict = type(model.config)({k: v for k, v in model.config.items() if k not in written})
        del model.quantization_method
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient, and neither do the ops that would pass one on."""
        return False

    @property
    def is_compileable(self) -> bool:
        return True
