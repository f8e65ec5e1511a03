"""Models at real size with random weights, drawn where they are used: no file is read and nothing crosses a bus."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from convrot_quant import Plan, apply, fuse_, plan

DTYPE = torch.bfloat16
STD = 0.02
SEED = 0
# how weights are quantized: where only time and memory are measured, and where quantizing is
FAST_RULES, OUR_RULES = "absmax", "mse, balanced"


def build(make: Callable[[], nn.Module], device: str) -> Any:
    """`make()` without values, then bf16 weights from one seed on the device: the same model every time.

    Normal of standard deviation STD; weights of norms, which are the vectors named `weight`, are 1.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # computed buffers keep their values
        model = make()
    generator = torch.Generator(device).manual_seed(SEED)
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.empty(empty.shape, dtype=DTYPE, device=device)
            if name == "weight" and value.dim() == 1:
                value.fill_(1)
            else:
                value.normal_(0, STD, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.to(device)
    for buffer in model.buffers():  # as a checkpoint of bf16 has them
        if buffer.is_floating_point():
            buffer.data = buffer.to(DTYPE)
    return model.eval()


def transformer(name: str, config: Mapping[str, Any], device: str) -> Any:
    """A diffusers transformer of class `name`."""
    import diffusers

    kind = getattr(diffusers, name)
    return build(lambda: kind(**config), device)


def fast_plan(model: nn.Module, preset: str = "ours") -> Plan:
    """The preset without its search: the same kernels and bytes, weights by their largest values."""
    decided = plan(model, preset)
    for name, scheme in decided.items():
        decided[name] = replace(scheme, weight_rule="absmax", weight_rounding="nearest")
    return decided


def quantized_copy(model: nn.Module, preset: str = "ours") -> Any:
    """The preset of a 16-bit model, layer by layer, which stays as it is; its large weights are never held twice."""
    decided = fast_plan(model, preset)
    weights = [model.get_submodule(name).weight for name in decided]
    copied = copy.deepcopy(model, {id(weight): weight for weight in weights})
    apply(copied, decided, fuse=False, progress=False)
    return copied


def fused_copy(model: nn.Module) -> Any:
    """A model quantized layer by layer, copied whole, with fused blocks."""
    copied = copy.deepcopy(model)
    fuse_(copied)
    return copied


def shell(model: nn.Module) -> Any:
    """Another model of the same tensors: what is set, hooked or compiled on the one is not on the other."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def is_fused(model: nn.Module) -> bool:
    """Whether any block has another class than diffusers defined for it."""
    kinds = (type(module) for module in model.modules())
    return any(kind.__module__.startswith("convrot_quant.") and not issubclass(kind, nn.Linear) for kind in kinds)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages of all parameters and buffers; views of one storage count once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
