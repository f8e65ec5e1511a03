"""One forward pass of each family's real class, shrunken to width 512, in 4 bits against 16 bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import QuantConfig, Scheme, quantize_
from convrot_quant.presets import MODULATION_GLOBS
from convrot_quant.released import RELEASED
from convrot_quant.skeleton import as_loaded

HEADS = {"num_attention_heads": 8, "attention_head_dim": 64}  # width 512: the least that a plan takes
# One W4A4 layer of normal values is off by 17 %, a block in series by 25 to 45 % of what it adds; what that is of a
# model's output was 5 % (Qwen-Image) to 31 % (Chroma, whose blocks make nearly all of it). In 8 bits: 0.5 to 2 %.
BOUND = 0.35
Inputs = Mapping[str, Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def flux() -> tuple[dict[str, Any], Inputs]:
    sizes = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64}
    ids = {"img_ids": grid_ids(3), "txt_ids": torch.zeros(6, 3)}
    config = HEADS | sizes | {"pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (16, 24, 24)}
    inputs = {"hidden_states": randn(1, 16, 64), "encoder_hidden_states": randn(1, 6, 64), **ids}
    return config, inputs | {"pooled_projections": randn(1, 64), "timestep": at(0.5), "guidance": at(3.5)}


def flux2() -> tuple[dict[str, Any], Inputs]:
    config = HEADS | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64, "in_channels": 64}
    inputs = {"hidden_states": randn(1, 16, 64), "encoder_hidden_states": randn(1, 6, 64), "timestep": at(0.5)}
    ids = {"img_ids": grid_ids(4), "txt_ids": torch.zeros(6, 4)}
    return config | {"axes_dims_rope": (16, 16, 16, 16)}, inputs | ids | {"guidance": at(3.5)}


def chroma() -> tuple[dict[str, Any], Inputs]:
    config, inputs = flux()
    for name in ("pooled_projection_dim", "guidance_embeds"):
        del config[name]
    narrow = {"approximator_num_channels": 64, "approximator_hidden_dim": 64, "approximator_layers": 1}
    return config | narrow, {k: v for k, v in inputs.items() if k not in ("pooled_projections", "guidance")}


def sd3() -> tuple[dict[str, Any], Inputs]:
    sizes = {"sample_size": 8, "num_layers": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    config = HEADS | sizes | {"caption_projection_dim": 512, "pos_embed_max_size": 8, "dual_attention_layers": (0,)}
    inputs = {"hidden_states": randn(1, 16, 8, 8), "encoder_hidden_states": randn(1, 6, 64), "timestep": at(500.0)}
    return config | {"qk_norm": "rms_norm"}, inputs | {"pooled_projections": randn(1, 64)}


def qwen() -> tuple[dict[str, Any], Inputs]:
    config = HEADS | {"num_layers": 1, "joint_attention_dim": 64, "axes_dims_rope": (16, 24, 24)}
    text = {"encoder_hidden_states": randn(1, 6, 64), "encoder_hidden_states_mask": torch.ones(1, 6).long()}
    return config, text | {"hidden_states": randn(1, 16, 64), "timestep": at(0.5), "img_shapes": [[(1, 4, 4)]]}


def z_image() -> tuple[dict[str, Any], Inputs]:
    config = {"dim": 512, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 64}
    inputs = {"x": [randn(16, 1, 8, 8)], "cap_feats": [randn(6, 64)], "t": at(0.5)}
    return config | {"axes_dims": [16, 24, 24], "axes_lens": [256, 32, 32]}, inputs


def hidream() -> tuple[dict[str, Any], Inputs]:
    sizes = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1}
    text = {"caption_channels": (64, 64), "text_emb_dim": 64, "llama_layers": (0, 1)}
    config = HEADS | sizes | text | {"axes_dims_rope": (32, 16, 16), "max_resolution": (8, 8)}
    inputs = {"hidden_states": randn(1, 16, 16, 16), "timesteps": torch.tensor([500]), "pooled_embeds": randn(1, 64)}
    states = {"encoder_hidden_states_t5": randn(1, 6, 64), "encoder_hidden_states_llama3": randn(2, 1, 6, 64)}
    return config | {
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "force_inference_output": True,
    }, inputs | states


def pixart() -> tuple[dict[str, Any], Inputs]:
    sizes = {"num_layers": 2, "sample_size": 8, "caption_channels": 64, "cross_attention_dim": 512}
    inputs = {"hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 6, 64)}
    added = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return HEADS | sizes | {"use_additional_conditions": False}, inputs | added | {"timestep": at(500.0)}


def sana() -> tuple[dict[str, Any], Inputs]:
    cross = {"num_cross_attention_heads": 8, "cross_attention_head_dim": 64, "cross_attention_dim": 512}
    config = HEADS | cross | {"num_layers": 2, "caption_channels": 64, "sample_size": 8}
    inputs = {"hidden_states": randn(1, 32, 8, 8), "encoder_hidden_states": randn(1, 6, 64), "timestep": at(500.0)}
    return config, inputs


def lumina2() -> tuple[dict[str, Any], Inputs]:
    config = {"hidden_size": 512, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 8}
    config |= {"num_kv_heads": 2, "axes_dim_rope": (16, 24, 24), "axes_lens": (64, 32, 32), "cap_feat_dim": 64}
    text = {"encoder_hidden_states": randn(1, 6, 64), "encoder_attention_mask": torch.ones(1, 6).bool()}
    return config, text | {"hidden_states": randn(1, 16, 8, 8), "timestep": at(0.5)}


def aura_flow() -> tuple[dict[str, Any], Inputs]:
    config = HEADS | {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 64}
    inputs = {"hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 6, 64), "timestep": at(0.5)}
    return config | {"caption_projection_dim": 512, "pos_embed_max_size": 16}, inputs


def wan() -> tuple[dict[str, Any], Inputs]:
    config = HEADS | {"text_dim": 64, "ffn_dim": 1024, "num_layers": 2, "rope_max_seq_len": 32}
    inputs = {"hidden_states": randn(1, 16, 2, 8, 8), "encoder_hidden_states": randn(1, 6, 64)}
    return config, inputs | {"timestep": torch.tensor([500])}


def hunyuan_video() -> tuple[dict[str, Any], Inputs]:
    text = {"text_embed_dim": 64, "text_embed_2_dim": 64, "image_embed_dim": 64}
    config = HEADS | text | {"num_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (16, 24, 24), "in_channels": 16}
    inputs = {"hidden_states": randn(1, 16, 1, 4, 4), "timestep": at(500.0), "image_embeds": randn(1, 3, 64)}
    states = {"encoder_hidden_states": randn(1, 6, 64), "encoder_hidden_states_2": randn(1, 4, 64)}
    masks = {"encoder_attention_mask": torch.ones(1, 6), "encoder_attention_mask_2": torch.ones(1, 4)}
    return config | {"out_channels": 16}, inputs | states | masks


def ltx() -> tuple[dict[str, Any], Inputs]:
    config = HEADS | {"cross_attention_dim": 512, "num_layers": 2, "caption_channels": 64, "in_channels": 64}
    text = {"encoder_hidden_states": randn(1, 6, 64), "encoder_attention_mask": torch.ones(1, 6)}
    place = {"num_frames": 1, "height": 4, "width": 4, "timestep": at(500.0)}
    return config | {"out_channels": 64}, text | place | {"hidden_states": randn(1, 16, 64)}


def ltx2() -> tuple[dict[str, Any], Inputs]:
    config, inputs = ltx()
    audio = {"audio_num_attention_heads": 8, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 512}
    config |= audio | {"num_layers": 1, "audio_in_channels": 64, "audio_out_channels": 64}
    states = {"audio_hidden_states": randn(1, 5, 64), "audio_encoder_hidden_states": randn(1, 6, 64)}
    return config, {**inputs, **states, "audio_num_frames": 5, "fps": 25.0}


def cogvideox() -> tuple[dict[str, Any], Inputs]:
    sizes = {"num_layers": 2, "text_embed_dim": 64, "sample_width": 8, "sample_height": 8, "sample_frames": 5}
    inputs = {"hidden_states": randn(1, 2, 16, 8, 8), "encoder_hidden_states": randn(1, 6, 64)}
    return HEADS | sizes | {"max_text_seq_length": 6}, inputs | {"timestep": torch.tensor([500])}


def kandinsky5() -> tuple[dict[str, Any], Inputs]:
    config = {"model_dim": 512, "ff_dim": 1024, "time_dim": 512, "num_text_blocks": 1, "num_visual_blocks": 1}
    inputs = {"hidden_states": randn(1, 1, 8, 8, 4), "encoder_hidden_states": randn(1, 6, 64), "timestep": at(500.0)}
    rope = {"visual_rope_pos": tuple(map(torch.arange, (1, 4, 4))), "text_rope_pos": torch.arange(6)}
    return config | {"in_text_dim": 64, "in_text_dim2": 64}, inputs | rope | {"pooled_projections": randn(1, 64)}


def cosmos() -> tuple[dict[str, Any], Inputs]:
    config = HEADS | {"num_layers": 2, "text_embed_dim": 512, "max_size": (8, 16, 16), "adaln_lora_dim": 64}
    inputs = {"hidden_states": randn(1, 16, 2, 8, 8), "encoder_hidden_states": randn(1, 6, 512), "fps": 24}
    return config | {"concat_padding_mask": False}, inputs | {"timestep": at(0.5)}  # the mask needs torchvision


FAMILIES: Mapping[str, Callable[[], tuple[dict[str, Any], Inputs]]] = {
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "ChromaTransformer2DModel": chroma,
    "SD3Transformer2DModel": sd3,
    "QwenImageTransformer2DModel": qwen,
    "ZImageTransformer2DModel": z_image,
    "HiDreamImageTransformer2DModel": hidream,
    "PixArtTransformer2DModel": pixart,
    "SanaTransformer2DModel": sana,
    "Lumina2Transformer2DModel": lumina2,
    "AuraFlowTransformer2DModel": aura_flow,
    "WanTransformer3DModel": wan,
    "HunyuanVideo15Transformer3DModel": hunyuan_video,
    "LTXVideoTransformer3DModel": ltx,
    "LTX2VideoTransformer3DModel": ltx2,
    "CogVideoXTransformer3DModel": cogvideox,
    "Kandinsky5Transformer3DModel": kandinsky5,
    "CosmosTransformer3DModel": cosmos,
}


def at(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.bfloat16)


def grid_ids(axes: int) -> Tensor:
    """(16, axes): positions of a 4 x 4 picture."""
    ids = torch.zeros(16, axes)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return ids


def build(model_class: str) -> tuple[nn.Module, Inputs]:
    """A shrunken model with block weights of a trained model's size: torch's own are too small to matter."""
    import diffusers

    torch.manual_seed(0)
    sizes, inputs = FAMILIES[model_class]()
    model = as_loaded(getattr(diffusers, model_class)(**sizes), torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    return model, inputs


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """All that the model gives, as one fp32 vector."""
    torch.manual_seed(1)
    out = model(**inputs, return_dict=False)
    parts = [part for item in out for part in (item if isinstance(item, (list, tuple)) else [item])]
    return torch.cat([part.float().flatten() for part in parts if isinstance(part, Tensor)])


def distance(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def config(bits: int) -> QuantConfig:
    """As the preset `ours`, in groups of 64 and in 4 or 8 bits."""
    modulation = Scheme(bits, 16, group_size=64)
    return QuantConfig(Scheme(bits, bits, group_size=64), overrides=dict.fromkeys(MODULATION_GLOBS, modulation))


def test_every_released_class_has_a_shrunken_one() -> None:
    assert set(FAMILIES) == set(RELEASED)


@pytest.mark.parametrize("model_class", FAMILIES)
def test_four_bits_stay_close_to_sixteen(model_class: str) -> None:
    """And eight bits so close that nothing but rounding can tell them apart; without the layers all is different."""
    model, inputs = build(model_class)
    expected = run(model, inputs)
    assert torch.isfinite(expected).all()
    in_four, in_eight, without = (copy.deepcopy(model) for _ in range(3))
    decided = quantize_(in_four, config(4), progress=False)
    assert {scheme.group_size for scheme in decided.values()} == {64}
    assert "W4A4" in {scheme.name for scheme in decided.values()}
    assert list(quantize_(in_eight, config(8), progress=False)) == list(decided)
    for name in decided:
        nn.init.zeros_(without.get_submodule(name).weight)
    four, eight, lost = (distance(run(other, inputs), expected) for other in (in_four, in_eight, without))
    assert 0 < eight < lost / 20
    assert eight < four < lost / 2
    assert four < BOUND
