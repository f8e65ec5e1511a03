"""LoRA on quantized layers: what peft and diffusers have to know of them, and what a fused block adds for an adapter.

An adapter is never merged into int4 codes: a step of those codes is larger than what it adds, and all of it would be
lost (docs/design.md). `fuse_lora` makes it a side of the layer instead, 16-bit and exact, that `unfuse_lora` takes off.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from convrot_quant.linear import ConvLinear4bit, Side

# set by register(): peft's LoRA linear as it stands around a ConvLinear4bit
_wrappers: tuple[type[nn.Module], ...] = ()


def register() -> None:
    """Teach peft and diffusers, where they are installed, about ConvLinear4bit. Once; fuse_ calls it for every model.

    peft's LoRA linear merges into codes, and diffusers' FLUX loader takes the packed shape for the layer's.
    """
    global _wrappers
    if _wrappers or find_spec("peft") is None:
        return
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
    from peft.tuners.lora import model

    wrapper = _lora_linear()
    dispatch, shape_of = model.dispatch_default, FluxLoraLoaderMixin._calculate_module_shape

    def dispatch_ours(target: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = dispatch(target, *args, **kwargs)
        if made is not None and type(getattr(made, "base_layer", None)) is ConvLinear4bit:
            made.__class__ = wrapper
        return made

    def logical_shape(model: nn.Module, base_module: Any = None, base_weight_param_name: str | None = None) -> Any:
        layer = base_module
        if layer is None and base_weight_param_name is not None:
            path = base_weight_param_name.removesuffix(".weight").removesuffix(".base_layer")
            layer = model.get_submodule(path) if path else None
        layer = getattr(layer, "base_layer", layer)
        if type(layer) is ConvLinear4bit:
            return torch.Size((layer.out_features, layer.in_features))
        return shape_of(model, base_module, base_weight_param_name)

    model.dispatch_default = dispatch_ours
    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(logical_shape)
    _wrappers = (wrapper,)


def _lora_linear() -> type[nn.Module]:
    """The class, which needs peft for its base."""
    from peft.tuners.lora import layer
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class ConvRotLoraLinear(layer.Linear):
        """peft's LoRA around a ConvLinear4bit: merging makes the adapter a side of the layer, to the last bit."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """fuse_lora: the layer adds these adapters itself, at the scale that they have now."""
            for name in check_adapters_to_merge(self, adapter_names):
                if name not in self.lora_A:
                    continue
                side = _side(self, name)
                if side is None:
                    raise ValueError(
                        f"fuse_lora: adapter {name!r} is more than a low-rank term (DoRA, a bias), which 4-bit weights "
                        "cannot take in; leave it unfused, or merge it into the 16-bit weights before quantizing"
                    )
                if safe_merge and not all(bool(part.isfinite().all()) for part in (side.down, side.up)):
                    raise ValueError(f"NaNs detected in the weights of the adapter {name!r}; it was not fused")
                self.base_layer.add_side(name, side)
                self.merged_adapters.append(name)

        def unmerge(self) -> None:
            """unfuse_lora: exactly as before."""
            while self.merged_adapters:
                self.base_layer.remove_side(self.merged_adapters.pop())

    return ConvRotLoraLinear


def _side(layer: Any, name: str) -> Side | None:
    """One adapter of a LoRA layer as a low-rank term, or None where it is more than that."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    plain = all(type(part) is nn.Linear and not isinstance(part.bias, Tensor) for part in (down, up))
    if not plain or name in getattr(layer, "lora_variant", {}):
        return None
    return Side(down.weight.detach(), up.weight.detach(), float(layer.scaling[name]))


def _is_trained(layer: Any, name: str) -> bool:
    """Whether gradients or dropout are wanted of an adapter: a term has neither."""
    wants_gradients = torch.is_grad_enabled() and layer.lora_A[name].weight.requires_grad
    return bool(wants_gradients) or (layer.training and not isinstance(layer.lora_dropout[name], nn.Identity))


def unwrapped(layer: Any) -> tuple[Any, tuple[Side, ...] | None]:
    """A linear or the LoRA around it -> the linear, and what is added to its product; None where that is unknown.

    Adapters count that are switched on and not fused, and sides that the layer has itself.
    """
    if type(layer) is ConvLinear4bit:
        return layer, layer.sides()
    if type(layer) not in _wrappers or layer._forward_hooks or layer._forward_pre_hooks:
        return layer, None
    own: tuple[Side, ...] = layer.base_layer.sides()
    if layer.merged and not layer.disable_adapters:
        return layer.base_layer, own  # as peft: what is fused counts, and nothing else
    if layer.disable_adapters or layer.merged:
        return layer.base_layer, None if layer.merged else own
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    found = [None if _is_trained(layer, name) else _side(layer, name) for name in names]
    return layer.base_layer, None if None in found else (*own, *(side for side in found if side is not None))
