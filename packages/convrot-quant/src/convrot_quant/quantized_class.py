"""The class of a model that was quantized on load: its own, with four methods that know about packed codes.

A class made for each model class, as fused blocks have theirs: nothing of diffusers' own is patched, a model that
quantize_ made keeps its class, and a copy or a pickle of the model finds its class again.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from convrot_quant.linear import ConvLinear4bit
from convrot_quant.model_card import write_model_card
from convrot_quant.patch import plan_of


class QuantizedOnLoad:
    """Stands before the model's own class in the bases."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_again, (type(self).__bases__[-1],), self.__dict__

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The logical number, where the library would count bytes of packed codes."""
        counted: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        layers = [module for module in self.modules() if isinstance(module, ConvLinear4bit)]  # type: ignore[attr-defined]
        hidden = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers)
        return counted if only_trainable else counted + hidden

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """push_to_hub ends here, with a card that knows nothing of quantization where the repository has none."""
        base_model = self.hf_quantizer.quantization_config.base_model  # type: ignore[attr-defined]
        write_model_card(working_dir, self, base_model, named=repo_id, subfolder=kwargs.get("subfolder"))
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise ValueError(
            "enable_layerwise_casting: the weights are 4- or 8-bit codes already, and casting the rest would round "
            "scales and biases; use enable_group_offload to save more memory"
        )


def quantized_(model: Any) -> Any:
    """Give a model the class above, in place."""
    own: Any = type(model)
    if not isinstance(model, QuantizedOnLoad):
        model.__class__ = _class_of(own)
    return model


def ordinary_(model: Any) -> None:
    """Give a model its own class back."""
    if isinstance(model, QuantizedOnLoad):
        model.__class__ = type(model).__bases__[-1]


@functools.cache
def _class_of(own: Any) -> Any:
    @functools.wraps(own.save_pretrained)  # pipelines ask the signature what they may pass
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        _prepare_saving(self)
        result = own.save_pretrained(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_model_card(save_directory, self, self.hf_quantizer.quantization_config.base_model)
        return result

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (QuantizedOnLoad, own), {**names, "save_pretrained": save_pretrained})


def _made_again(own: Any) -> Any:
    made = _class_of(own)
    return made.__new__(made)


def _prepare_saving(model: Any) -> None:
    """The quantizer's plan as the model is now, and the name of its base model; refusals come before any file."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            raise ValueError(f"save_pretrained: {name!r} is a LoRA layer; unload the LoRA first, it is saved apart")
        if isinstance(module, ConvLinear4bit) and module.has_added_sides:
            raise ValueError(f"save_pretrained: {name!r} has a fused LoRA; unfuse_lora() first, it is saved apart")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"save_pretrained: {name!r} is offloaded and has no values here; save before offloading")
    quantizer = model.hf_quantizer
    quantizer.plan = plan_of(model)
    if not quantizer.pre_quantized and quantizer.quantization_config.base_model is None:
        name = str(getattr(model.config, "_name_or_path", None) or "")  # may be a Path
        quantizer.quantization_config.base_model = name or None
