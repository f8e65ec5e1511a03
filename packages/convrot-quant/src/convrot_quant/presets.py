"""Which layers get which scheme, by name: data only. How a name is matched to a layer is in rules.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from convrot_quant.config import Scheme

# A modulation linear turns the timestep embedding into scales, shifts and gates: one row per image. It is 27 % of
# FLUX.1-dev's parameters and 0.01 % of its work, and the most sensitive layer of all to 4-bit activations.
MODULATION_GLOBS = ("*.norm*.linear", "*.norm*.linear_?", "*_mod.*", "*adaLN*", "*modulation*")

# What a GELU makes has a heavier tail than other rows, and attention's output beside it half as much: less is clipped
# than RECOMMENDED says (tuned as that: docs/quality.md).
GELU_CLIPS = {"*.net.2": 0.8, "single_transformer_blocks.*.proj_out": 0.775}


@dataclass(frozen=True)
class Preset:
    """Scheme names for the block linears and for the modulation linears, then overrides and layers kept in 16 bits."""

    about: str
    scheme: str
    modulation: str
    overrides: Mapping[str, str | Scheme] = field(default_factory=dict)
    keep: tuple[str, ...] = ()


PRESETS: Mapping[str, Preset] = {
    "ours": Preset(
        about="block linears W4A4; modulation W4A16, which costs no time (one row an image) and keeps the image",
        scheme="W4A4",
        modulation="W4A16",
        overrides={glob: replace(Scheme.parse("W4A4"), activation_clip=clip) for glob, clip in GELU_CLIPS.items()},
    ),
    "paper": Preset(
        about="the paper's W4A4 model: every block linear, modulation included (its 5.6 GiB of FLUX.1-dev)",
        scheme="W4A4-absmax",
        modulation="W4A4-absmax",
    ),
    "paper-mixed": Preset(
        about="the paper's mixed model: about 20 % of the layers W8A8, the last blocks' output layers in 16 bits",
        scheme="W4A4-absmax",
        modulation="W4A4-absmax",
        overrides={
            "transformer_blocks.*.attn.to_out.0": "W8A8-absmax",
            "single_transformer_blocks.*.attn.to_v": "W8A8-absmax",
            # A hypothesis: the paper's list above is 11.5 % of the layers and 6.05 GiB, but it reports about 20 % and
            # 7.0 GiB. With the modulation of the double blocks at 8 bits both figures fit (19.8 %, 7.05 GiB).
            "transformer_blocks.*.norm1.linear": "W8A8-absmax",
            "transformer_blocks.*.norm1_context.linear": "W8A8-absmax",
        },
        # The paper names 37.proj_out, 18.ff.net.2 and 18.ff_context.net.2: FLUX.1-dev's last single and double blocks.
        keep=(
            "single_transformer_blocks.{last}.proj_out",
            "transformer_blocks.{last}.ff.net.2",
            "transformer_blocks.{last}.ff_context.net.2",
        ),
    ),
    "w4a8": Preset(about="as ours with 8-bit activations", scheme="W4A8", modulation="W4A16"),
    "w4a16": Preset(
        about="as ours, weight-only: 4-bit weights, 16-bit activations", scheme="W4A16", modulation="W4A16"
    ),
    "w8a8": Preset(about="as ours with 8-bit weights and activations", scheme="W8A8", modulation="W8A16"),
    "w8a16": Preset(
        about="as ours, weight-only: 8-bit weights, 16-bit activations", scheme="W8A16", modulation="W8A16"
    ),
    "text-encoder": Preset(
        about="for T5, CLIP and other text encoders: 8-bit weights and activations, half of their memory",
        scheme="W8A8",
        modulation="W8A16",
    ),
}

_FLUX = {
    "x_embedder": "image embedder",
    "context_embedder": "text embedder",
    "time_text_embed.*": "time and text embedder",
    "norm_out.linear": "output layer",
    "proj_out": "output layer",
}

# Per diffusers transformer class: layers that stay in 16 bits, and why. A class that is not here follows the generic
# rule alone (rules.py), which finds the same layers: these entries give reasons and cover what structure cannot tell.
KEEP_16BIT: Mapping[str, Mapping[str, str]] = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": {"distilled_guidance_layer.*": "makes the modulation of every block", **_FLUX},
    "BriaFiboTransformer2DModel": {"caption_projection.*": "text embedder", **_FLUX},
    "HiDreamImageTransformer2DModel": {"caption_projection.*": "text embedder"},
    "GlmImageTransformer2DModel": {"glyph_projector.*": "glyph embedder", "prior_projector.*": "prior embedder"},
    # LTX-2.3: one number a head and token, from 32 outputs in all: no bytes to win, and a head's whole output to lose
    "LTX2VideoTransformer3DModel": {"*.to_gate_logits": "gate of attention heads"},
    "WanAnimateTransformer3DModel": {"condition_embedder.*": "condition embedder"},
}

# Layers whose codes must be int8: T5 casts its activations to the dtype of this weight, unless that is int8, so that
# packed codes (uint8) would turn the activations into integers.
EIGHT_BIT: Mapping[str, str] = {"*.DenseReluDense.wo": "T5 reads the dtype of this weight"}
