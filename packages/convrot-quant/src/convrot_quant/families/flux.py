"""FLUX.1: the double and single blocks of FluxTransformer2DModel (dev, schnell, Kontext, Fill, ControlNet's too).

Fused are: q, k, v (and the single block's proj_mlp) as one product of one quantized input; LayerNorm and modulation,
GELU and the concatenation before proj_out in the quantizer; gate and residual in the product after them; RMSNorm and
rotary embedding of q and k; the modulations of all blocks of a step. Attention goes through diffusers' dispatcher.

A class here is diffusers' own with another forward, and bears its name: configs, compile_repeated_blocks and caches
know blocks by their names. A LoRA adds its low-rank terms to the fused products. Wherever another adapter, a hook,
another attention processor or a 16-bit layer is in a block, its forward is diffusers' own. Per op the results are those
of the separate layers with fewer roundings to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux as diffusers_flux
from torch import Tensor, nn

from convrot_kernels import (
    attention_fp8,
    norm_rope,
    norm_rope_fp8,
    norm_rope_joint,
    norm_rope_joint_fp8,
    rotate_quantize,
    rotate_quantize_cat_gelu,
    rotate_quantize_gelu,
    rotate_quantize_modulate,
    scaled_mm_gate_residual,
)
from convrot_kernels.checks import HEAD_SIZES
from convrot_quant.config import Scheme
from convrot_quant.families.blocks import FusedBlock, Opened, opened
from convrot_quant.linear import ConvLinear4bit, quantizer_options
from convrot_quant.stack import Operand, Stack

EPS = 1e-6  # of the blocks' LayerNorms; checked in `fits`
FLOAT16_MAX = 65504


def _norms_fit(*norms: nn.Module) -> bool:
    """RMSNorms with a weight and eps over heads that norm_rope takes."""
    return all(
        isinstance(norm, nn.RMSNorm) and norm.weight is not None and norm.eps == EPS and len(norm.normalized_shape) == 1
        for norm in norms
    )


def _layer_norms_fit(*norms: nn.Module) -> bool:
    return all(isinstance(norm, nn.LayerNorm) and not norm.elementwise_affine and norm.eps == EPS for norm in norms)


def _head_fits(attn: Any) -> bool:
    return attn.head_dim in HEAD_SIZES


def _is_stock(attn: Any) -> bool:
    return type(attn.processor) is diffusers_flux.FluxAttnProcessor and not attn.fused_projections


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Callable[[Scheme], Operand]:
    return lambda scheme: rotate_quantize_modulate(x, scale, shift, EPS, **quantizer_options(scheme, x.device))


def _gated(layer: ConvLinear4bit, codes: Operand, gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate * layer(codes)."""
    a, a_scale = codes
    return scaled_mm_gate_residual(
        a, layer.weight, a_scale, layer.weight_scale, layer.bias, gate, residual, b_layout=layer.weight_layout
    )


def _attention(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H, D) -> (B, S, H D), with the backend and the sharding that were set for this model."""
    processor = attn.processor
    out = dispatch_attention_fn(
        q, k, v, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2, 3).to(q.dtype)


def _attention_fp8(attn: Any, operands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """q, k, v e4m3 (B, S, H, D) and v's scale -> (B, S, H * D)."""
    if attn.processor._parallel_config is not None:
        raise ValueError(
            "fp8_attention_: attention in 8 bits runs on one GPU, and this model shares its tokens among several "
            "(enable_parallelism); switch it off: fp8_attention_(model, False)"
        )
    q, k, v, v_scale = operands
    return attention_fp8(q, k, v, v_scale, dtype).flatten(2, 3)


def _in_a_row(text: Tensor, image: Tensor) -> Tensor:
    """(B, T, C), (B, I, C) -> (B, T + I, C): what both are slices of, as a single block leaves them, or a copy."""
    shape = (image.shape[0], text.shape[1] + image.shape[1], image.shape[2])
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.cat((text, image), dim=1)
    strides = (shape[1] * shape[2], shape[2], 1)
    lie_so = all(x.stride()[1:] == strides[1:] and (shape[0] == 1 or x.stride(0) == strides[0]) for x in (text, image))
    follows = image.data_ptr() - text.data_ptr() == text.shape[1] * text.shape[2] * text.element_size()
    if not (lie_so and follows and text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()):
        return torch.cat((text, image), dim=1)
    return text.as_strided(shape, strides)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x


class FluxSingleTransformerBlock(FusedBlock, diffusers_flux.FluxSingleTransformerBlock):
    """diffusers' single block with a fused forward."""

    attn: Any
    norm: Any
    proj_mlp: Any
    proj_out: Any
    mlp_hidden_dim: int
    _vectors_of_each = 3

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether the fused forward computes what this block's does."""
        attn = block.attn
        return _norms_fit(attn.norm_q, attn.norm_k) and _layer_norms_fit(block.norm.norm) and _head_fits(attn)

    @staticmethod
    def modulators(block: Any) -> tuple[Any, ...]:
        """AdaLayerNorm's."""
        return (block.norm.linear,)

    def stacked(self) -> dict[str, tuple[Any, ...]]:
        attn = self.attn
        return {
            "projection": (attn.to_q, attn.to_k, attn.to_v, self.proj_mlp),
            "modulation": FluxSingleTransformerBlock.modulators(self),
        }

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        vectors: Tensor | None = None,
        row: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """image (B, I, C), text (B, T, C), temb (B, C) -> text, image.

        If they are made: temb's modulation (3, B, C), text and image in a row (B, T + I, C).
        """
        members, stacks = self.stacked(), self._stacks
        layers, last = opened(*members["projection"]), opened(self.proj_out)
        stock = image_rotary_emb is not None and not joint_attention_kwargs and _is_stock(self.attn)
        if layers is None or last is None or not stock or self.has_hooks():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x = _in_a_row(encoder_hidden_states, hidden_states) if row is None else row
        shift, scale, gate = self.vectors(temb, vectors)
        projection = stacks["projection"](layers.bases, _modulated(x, scale, shift), x.dtype)
        layers.terms(x, scale=scale, shift=shift, eps=EPS).add_to(projection)
        attended, hidden = self._attended(projection, image_rotary_emb)
        del projection  # what is not needed any more makes room: the peak of a step is here
        out = last.bases[0]
        codes = rotate_quantize_cat_gelu(attended, hidden, **quantizer_options(out.scheme, x.device))
        added = last.terms(attended, y=hidden)
        del attended, hidden
        x = _clipped(added.add_to(_gated(out, codes, gate, x), gate))
        text = encoder_hidden_states.shape[1]
        return x[:, :text], x[:, text:]

    def handed(self, **arguments: Any) -> dict[str, Tensor | None]:
        """Also the row, which is there after another single block."""
        row = _in_a_row(arguments["encoder_hidden_states"], arguments["hidden_states"])
        return super().handed(**arguments) | {"row": row}

    def _attended(self, projection: Tensor, image_rotary_emb: Any) -> tuple[Tensor, Tensor]:
        """q, k, v and the MLP's hidden values (B, S, 3 C + 4 C) -> attention's output (B, S, C), hidden (B, S, 4 C)."""
        attn, width = self.attn, self.attn.inner_dim
        qkv, hidden = projection.split((3 * width, self.mlp_hidden_dim), dim=-1)
        norms, (cos, sin) = (attn.norm_q.weight, attn.norm_k.weight), image_rotary_emb
        if self.fp8_attention:
            return _attention_fp8(attn, norm_rope_fp8(qkv, *norms, cos, sin, EPS), qkv.dtype), hidden
        qk, v = qkv.split((2 * width, width), dim=-1)
        qk = norm_rope(qk, *norms, cos, sin, EPS)
        return _attention(attn, *qk, v.unflatten(-1, (-1, attn.head_dim))), hidden


class FluxTransformerBlock(FusedBlock, diffusers_flux.FluxTransformerBlock):
    """diffusers' double block with a fused forward."""

    attn: Any
    norm1: Any
    norm1_context: Any
    ff: Any
    ff_context: Any
    _vectors_of_each = 6

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether the fused forward computes what this block's does."""
        attn, forwards = block.attn, (block.ff, block.ff_context)
        layer_norms = (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context)
        return (
            _norms_fit(attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
            and _layer_norms_fit(*layer_norms)
            and _head_fits(attn)
            and all(getattr(ff.net[0], "approximate", None) == "tanh" and ff.net[1].p == 0 for ff in forwards)
            and attn.to_out[1].p == 0
        )

    @staticmethod
    def modulators(block: Any) -> tuple[Any, ...]:
        """AdaLayerNorm's."""
        return block.norm1.linear, block.norm1_context.linear

    def stacked(self) -> dict[str, tuple[Any, ...]]:
        attn = self.attn
        return {
            "image": (attn.to_q, attn.to_k, attn.to_v),
            "text": (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            "modulation": FluxTransformerBlock.modulators(self),
        }

    def _after(self, out: nn.Module, ff: Any) -> Opened | None:
        return opened(out, ff.net[0].proj, ff.net[2])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        vectors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """image (B, I, C), text (B, T, C), temb (B, C) and, if made, its modulation (12, B, C) -> text, image."""
        attn, members, stacks = self.attn, self.stacked(), self._stacks
        image_in, text_in = opened(*members["image"]), opened(*members["text"])
        image_out, text_out = self._after(attn.to_out[0], self.ff), self._after(attn.to_add_out, self.ff_context)
        stock = image_rotary_emb is not None and not joint_attention_kwargs and _is_stock(attn)
        quantized = image_in is not None and text_in is not None and image_out is not None and text_out is not None
        if not quantized or not stock or self.has_hooks():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        image, text = hidden_states, encoder_hidden_states
        both = self.vectors(temb, vectors)
        of_image, of_text = both[:6], both[6:]
        image_qkv = _projected(stacks["image"], image_in, image, of_image)
        text_qkv = _projected(stacks["text"], text_in, text, of_text)
        attended = self._attended(text_qkv, image_qkv, image_rotary_emb).split((text.shape[1], image.shape[1]), dim=1)
        del text_qkv, image_qkv
        image = _after_attention(image, attended[1], image_out, of_image)
        text = _after_attention(text, attended[0], text_out, of_text)
        return _clipped(text), image

    def _attended(self, text_qkv: Tensor, image_qkv: Tensor, image_rotary_emb: Any) -> Tensor:
        """q, k, v of both streams (B, T, 3 C), (B, I, 3 C) -> attention's output (B, T + I, C), text first."""
        attn, (cos, sin) = self.attn, image_rotary_emb
        added, own = (attn.norm_added_q.weight, attn.norm_added_k.weight), (attn.norm_q.weight, attn.norm_k.weight)
        norm_and_turn = norm_rope_joint_fp8 if self.fp8_attention else norm_rope_joint
        operands = norm_and_turn(text_qkv, image_qkv, *added, *own, cos, sin, EPS)
        return _attention_fp8(attn, operands, image_qkv.dtype) if self.fp8_attention else _attention(attn, *operands)


def _projected(stack: Stack, layers: Any, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """q, k and v of one stream of a double block."""
    shift, scale = vectors[:2]
    out = stack(layers.bases, _modulated(x, scale, shift), x.dtype)
    return layers.terms(x, scale=scale, shift=shift, eps=EPS).add_to(out)


def _after_attention(x: Tensor, attended: Tensor, layers: Any, vectors: Sequence[Tensor]) -> Tensor:
    """One stream of a double block from attention's output on: projection and feed-forward, both gated and added."""
    out, up, down = layers.each()
    _, _, gate, ff_shift, ff_scale, ff_gate = vectors
    codes = rotate_quantize(attended, **quantizer_options(out.bases[0].scheme, x.device))
    x = out.terms(attended).add_to(_gated(out.bases[0], codes, gate, x), gate)
    hidden = up.bases[0].multiply(*_modulated(x, ff_scale, ff_shift)(up.bases[0].scheme), x.dtype)
    up.terms(x, scale=ff_scale, shift=ff_shift, eps=EPS).add_to(hidden)
    codes = rotate_quantize_gelu(hidden, **quantizer_options(down.bases[0].scheme, x.device))
    return down.terms(hidden, gelu=True).add_to(_gated(down.bases[0], codes, ff_gate, x), ff_gate)


for _block in (FluxSingleTransformerBlock, FluxTransformerBlock):
    _metadata = TransformerBlockRegistry.get(_block.__bases__[-1])
    TransformerBlockRegistry._registry[_block] = _metadata  # diffusers' caches ask by class
