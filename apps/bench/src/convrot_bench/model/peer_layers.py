"""Other projects' quantized linears: how each replaces the layers that ours replaces. Imported where they are used."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 256
BF16_CODE = 2  # comfy-kitchen's number of the dtype


@torch.library.custom_op("convrot_bench::kitchen_w4a4", mutates_args=())
def _kitchen_w4a4(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """comfy-kitchen's W4A4 linear: it is no op of torch, and without one it would break every compiled block."""
    out: Tensor = import_module("comfy_kitchen").convrot_w4a4_linear(x, codes, scale, bias, group_size)
    return out


@_kitchen_w4a4.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(codes)))


class KitchenLinear(nn.Module):
    """y = linear(x) by comfy-kitchen: called directly, and as an op where it is compiled."""

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.kitchen, self.bits = import_module("comfy_kitchen"), bits
        kernels = self.kitchen.list_backends()["cuda"]
        if linear.weight.is_cuda and not kernels["available"]:  # it would run its eager code, and say nothing
            raise RuntimeError(f"comfy-kitchen has no CUDA kernels here: {kernels['unavailable_reason']}")
        self.group_size = GROUP if linear.in_features % GROUP == 0 else 64
        if bits == 4:
            codes, scale = self.kitchen.quantize_convrot_w4a4_weight(linear.weight, self.group_size)
        else:
            codes, scale = torch.ops.comfy_kitchen.quantize_int8_convrot_weight(linear.weight, self.group_size)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), bf16."""
        out: Tensor
        if self.bits == 8 and torch.compiler.is_compiling():
            arguments = x, self.codes, self.scale, self.bias, BF16_CODE, True, self.group_size
            out = torch.ops.comfy_kitchen.int8_linear(*arguments)
        elif self.bits == 8:
            out = self.kitchen.int8_linear(x, self.codes, self.scale, self.bias, x.dtype, True, self.group_size)
        elif torch.compiler.is_compiling():
            out = _kitchen_w4a4(x, self.codes, self.scale, self.bias, self.group_size)
        else:
            out = self.kitchen.convrot_w4a4_linear(x, self.codes, self.scale, self.bias, self.group_size)
        return out


def swapper(replace: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module, Sequence[str]], None]:
    """-> a function that replaces a model's named linears one at a time."""

    def swap(model: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            model.set_submodule(name, replace(linear_of(model, name)))

    return swap


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """A layer that a plan names."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), "a plan names linears"
    return linear


def kitchen(linear: nn.Linear) -> nn.Module:
    """comfy-kitchen's W4A4, with 8-bit activations where a GPU has no int4 tensor cores."""
    return KitchenLinear(linear, bits=4)


def kitchen_int8(linear: nn.Linear) -> nn.Module:
    """comfy-kitchen's INT8 ConvRot: 8-bit weights and activations."""
    return KitchenLinear(linear, bits=8)


def torchao_fp8(model: nn.Module, names: Sequence[str]) -> None:
    """fp8 weights, dynamic fp8 activations, a scale a row on both sides."""
    quantization = import_module("torchao.quantization")
    granularity = quantization.PerRow()
    _torchao(model, names, quantization.Float8DynamicActivationFloat8WeightConfig(granularity=granularity))


def torchao_fp8_tensor(model: nn.Module, names: Sequence[str]) -> None:
    """The same with a scale a tensor, which older cuBLAS kernels take as well."""
    quantization = import_module("torchao.quantization")
    granularity = quantization.PerTensor()
    _torchao(model, names, quantization.Float8DynamicActivationFloat8WeightConfig(granularity=granularity))


def torchao_int8(model: nn.Module, names: Sequence[str]) -> None:
    """int8 weights with a scale a row, dynamic int8 activations with a scale a token.

    Without the search that torchao switches on for every Triton kernel (coordinate descent): with it, compiling a step
    had not finished after 360 s on an H200, nor within 200 s on another.
    """
    _torchao(model, names, import_module("torchao.quantization").Int8DynamicActivationInt8WeightConfig())
    torch._inductor.config.coordinate_descent_tuning = False


def _torchao(model: nn.Module, names: Sequence[str], config: Any) -> None:
    chosen = frozenset(names)
    import_module("torchao.quantization").quantize_(model, config, filter_fn=lambda module, name: name in chosen)


def bitsandbytes_nf4(linear: nn.Linear) -> nn.Module:
    """NF4 weights with 16-bit activations: widened to bf16 for each product."""
    modules = import_module("bitsandbytes.nn")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    dtype, device = linear.weight.dtype, linear.weight.device
    layer: nn.Module = modules.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
    weight = modules.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(device)  # which is when it is quantized
    layer.bias = linear.bias
    return layer


@contextmanager
def own_settings() -> Iterator[None]:
    """A peer may set up the compiler to its liking (torchao does); afterwards it is as it was."""
    from torch._inductor import config

    saved, precision = config.get_config_copy(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        config.load_config(saved)
        torch.set_float32_matmul_precision(precision)
