"""ConvLinear4bit: nn.Linear on rotated low-bit codes, y = (scale_x * q(x H)) @ (scale_w * q(W H))^T + bias.

It subclasses nn.Linear and keeps the codes in a Parameter named `weight`, because peft, diffusers' LoRA loaders,
offloading and saving all look for exactly that; a plain nn.Module, a dequantizing property or a tensor subclass each
break one of them. Codes are a frozen Parameter, scales an fp32 buffer that `.to(dtype)` must not round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from convrot_kernels import (
    low_rank_up,
    preferred_codes,
    preferred_layout,
    prepare_weight,
    restore_weight,
    rotate,
    rotate_quantize,
    scaled_mm,
    unpack_int4,
)
from convrot_quant.config import Scheme
from convrot_quant.low_rank import Branch
from convrot_quant.quantizing import quantize_weight

ROW_MAJOR = "row_major"
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what the ops take; float8 storage is not one


class Side(NamedTuple):
    """A low-rank term beside a layer, in 16 bits: scale * up (down x); down (r, K), up (N, r)."""

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), the dtype of the weights; to the bits that peft's LoRA adds."""
        return functional.linear(functional.linear(x.to(self.down.dtype), self.down), self.up) * self.scale


class Terms(NamedTuple):
    """What the sides of layers over one input make of it: low (B, ..., R), and where each up (n, r) is to be added."""

    low: Tensor | None  # None: there is no side
    ups: list[Tensor]
    columns: list[int]
    scales: list[float]

    def add_to(self, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """out (B, ..., N), to which the terms are added in place, times gate (B, N)."""
        if self.low is not None:
            # `out` comes of a product whose backward refuses, also for what is added behind autograd's back
            low_rank_up(out.detach(), self.low.detach(), self.ups, self.columns, self.scales, gate)
        return out


def terms(layers: Sequence[tuple[int, Sequence[Side]]], project: Callable[[list[Tensor]], Tensor]) -> Terms:
    """layers: (N, sides) in the order of their columns. `project`: the down (r, K) of every side -> low (B, ..., R).

    Where there is no side, `project` is not called.
    """
    found, column = [], 0
    for n, sides in layers:
        found += [(side, column) for side in sides]
        column += n
    if not found:
        return Terms(None, [], [], [])
    low = project([side.down for side, _ in found])
    return Terms(
        low, [side.up for side, _ in found], [column for _, column in found], [side.scale for side, _ in found]
    )


class ConvLinear4bit(nn.Linear):
    """nn.Linear with 4-bit (or 8-bit) rotated weights and 4-, 8- or 16-bit activations.

    `weight`: codes, a frozen Parameter; uint8 (N, K/2) for 4 bits (low nibble = even column), int8 (N, K) for 8.
    `weight_scale`: fp32 buffer (N,). `bias`: Parameter (N,) or None, in the dtype that it had.
    `low_rank_down` (r, K) and `low_rank_up` (N, r): buffers in compute_dtype, where the scheme has a low-rank branch.
    `scheme`, `weight_layout` (the order of the resident codes), `compute_dtype` (what peft gives its adapters).
    The state_dict is always row-major. `in_features` and `out_features` stay the logical sizes.
    """

    weight_scale: Tensor
    low_rank_down: Tensor
    low_rank_up: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a 16-bit weight
        if in_features % scheme.group_size:
            groups = "group_size=64" if in_features % 64 == 0 else "a layer whose K a group divides"
            raise ValueError(
                f"ConvLinear4bit: in_features must be a multiple of group_size, "
                f"got in_features={in_features}, group_size={scheme.group_size}; use {groups}"
            )
        if scheme.low_rank >= min(in_features, out_features):
            raise ValueError(
                f"ConvLinear4bit: low_rank must be less than in_features and out_features, got "
                f"low_rank={scheme.low_rank} for {out_features} x {in_features} (N, K); use low_rank=0 for this layer"
            )
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight_layout, self.compute_dtype = ROW_MAJOR, compute_dtype
        self._side_scales: dict[str, float] = {}
        packed = scheme.weight_bits == 4
        shape = (out_features, in_features // 2 if packed else in_features)
        codes = torch.empty(shape, dtype=torch.uint8 if packed else torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        if scheme.low_rank:
            for name, size in (("down", (scheme.low_rank, in_features)), ("up", (out_features, scheme.low_rank))):
                self.register_buffer(f"low_rank_{name}", torch.empty(size, dtype=compute_dtype, device=device))
        empty = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        *,
        device: torch.device | str | None = None,
        branch: Branch | None = None,
        inputs: Tensor | None = None,
    ) -> ConvLinear4bit:
        """nn.Linear (N, K) fp16, bf16 or fp32 -> its quantized layer on the same device; the bias keeps its storage.

        `device`: where to rotate and quantize, when that should not be where the weight is. `branch`, `inputs`: see
        quantize_weight.
        """
        weight, home = linear.weight, linear.weight.device
        if home.type == "meta":
            raise ValueError(
                "ConvLinear4bit: the weight is on the meta device and has no values; load the weights first"
            )
        codes, scale, branch = quantize_weight(weight.to(device or home), scheme, branch, inputs)
        sizes = (linear.in_features, linear.out_features, scheme)
        layer = cls(*sizes, bias=False, compute_dtype=weight.dtype, device="meta")
        layer.weight = nn.Parameter(codes.to(home), requires_grad=False)
        layer.weight_scale = scale.to(home)
        if branch is not None:
            layer.low_rank_down, layer.low_rank_up = branch.down.to(home), branch.up.to(home)
        layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        layer.relayout(preferred_layout(home))
        return layer.train(linear.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """-> nn.Linear (N, K) in compute_dtype, weight = (codes * scale) H plus sides: what it multiplies with."""
        codes = restore_weight(self.weight.detach(), self.weight_layout)
        codes = unpack_int4(codes) if self.scheme.weight_bits == 4 else codes
        values = rotate(codes.float() * self.weight_scale[:, None], self.scheme.group_size)
        for side in self.sides():
            values += side.scale * (side.up.float() @ side.down.float())
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(values.to(self.compute_dtype), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), the dtype of x."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"ConvLinear4bit: the last dimension of x must be in_features={self.in_features}, got K={x.shape[-1]}; "
                "pass the input that the 16-bit layer takes"
            )
        out = self.multiply(*operand(x, self.scheme), x.dtype)
        for side in self.sides():
            out = out + side(x).to(x.dtype)
        return out

    def multiply(self, a: Tensor, a_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What `operand` made of (..., K) -> (..., N)."""
        return scaled_mm(a, self.weight, a_scale, self.weight_scale, self.bias, dtype, b_layout=self.weight_layout)

    def add_side(self, name: str, side: Side) -> None:
        """Add a low-rank term to every product from now on; it moves with the layer and is not in its state_dict."""
        if name in self._side_scales:
            raise ValueError(f"ConvLinear4bit: there is a side {name!r} already; remove_side({name!r}) takes it off")
        for part, tensor in (("down", side.down), ("up", side.up)):
            self.register_buffer(_side_name(name, part), tensor.detach().clone(), persistent=False)
        self._side_scales[name] = side.scale

    def remove_side(self, name: str) -> None:
        """Take a side off: the layer computes exactly what it did before."""
        del self._side_scales[name]
        for part in ("down", "up"):
            delattr(self, _side_name(name, part))

    def sides(self) -> tuple[Side, ...]:
        """The low-rank terms: the layer's own branch, then what was added, in the order in which it came."""
        own = (Side(self.low_rank_down, self.low_rank_up, 1.0),) if self.scheme.low_rank else ()
        if not self._side_scales:
            return own
        return own + tuple(
            Side(getattr(self, _side_name(name, "down")), getattr(self, _side_name(name, "up")), scale)
            for name, scale in self._side_scales.items()
        )

    @property
    def has_added_sides(self) -> bool:
        """Whether add_side has added a term that remove_side has not taken off: no file holds it."""
        return bool(self._side_scales)

    def relayout(self, layout: str) -> None:
        """Put the resident codes into another order (a backend's own, or "row_major"); the numbers stay the same."""
        if layout != self.weight_layout:
            row_major = restore_weight(self.weight.detach(), self.weight_layout)
            self.weight = nn.Parameter(prepare_weight(row_major, layout), requires_grad=False)
            self.weight_layout = layout

    def extra_repr(self) -> str:
        scheme = self.scheme
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        layout = "" if self.weight_layout == ROW_MAJOR else f", weight_layout={self.weight_layout!r}"
        return f"{text}, {scheme.name}, group_size={scheme.group_size}{layout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvLinear4bit:
        """Every .to(), .cuda(), .half() ends here: devices move, but codes and fp32 scales keep dtype and values."""
        codes, scale = self.weight.data, self.weight_scale
        super()._apply(fn, recurse)
        if self.weight.dtype != codes.dtype:
            self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=scale.device))
        if probe.dtype in COMPUTE_DTYPES:
            self.compute_dtype = probe.dtype
        if self.weight_layout == ROW_MAJOR and self.weight.is_cuda:  # once: a later move takes the order along
            self.relayout(preferred_layout(self.weight.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_layout != ROW_MAJOR:
            destination[prefix + "weight"] = restore_weight(self.weight.detach(), self.weight_layout)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + "weight"
        if self.weight_layout != ROW_MAJOR and key in state_dict:
            state_dict = {**state_dict, key: prepare_weight(state_dict[key], self.weight_layout)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _side_name(name: str, part: str) -> str:
    return f"side_{name.replace('.', '_')}_{part}"


def operand(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """(..., K) -> what a layer of this scheme multiplies: codes and their scale, or rotated values and None."""
    if scheme.activation_bits == 16:
        return rotate(x, scheme.group_size), None
    return rotate_quantize(x, **quantizer_options(scheme, x.device))


def quantizer_options(scheme: Scheme, device: torch.device) -> dict[str, Any]:
    """The options that rotate_quantize and its prologues take for a layer's activations, of 4 or 8 bits."""
    return {
        "group_size": scheme.group_size,
        "bits": scheme.activation_bits,
        "packed": scheme.activation_bits == scheme.weight_bits == 4 and _wants_packed(device),
        "rule": scheme.activation_rule,
        "clip": scheme.activation_clip,
    }


@torch.compiler.assume_constant_result  # a backend's taste: fixed while tracing, and the numbers do not depend on it
def _wants_packed(device: torch.device) -> bool:
    return _asked(device)


@cache  # asking takes longer than an op
def _asked(device: torch.device) -> bool:
    return preferred_codes(device) == "packed"
