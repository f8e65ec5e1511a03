"""Released diffusion transformers: {class of diffusers: {model: what its config says beyond the class's defaults}}.

Data only. From diffusers' conversion scripts: Wan 2.1, HunyuanVideo 1.5, LTX-2, Cosmos. From the original
repositories' parameters, as ports of them quote them: FLUX.2, Kandinsky 5. The rest is general knowledge of the
published config.json files, none of which could be read here; the totals agree with the sizes that the models are
published under. What is not certain says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FLUX = {"guidance_embeds": True}
_SD3 = {"pos_embed_max_size": 192}
_SD35 = {"qk_norm": "rms_norm"}
_WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_HUNYUAN = {"target_size": 640}
_SIGMA = {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}
_SANA_06B = {"num_attention_heads": 36, "attention_head_dim": 32, "num_layers": 28}
_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_K5_PRO = {"time_dim": 1024, "model_dim": 4096, "ff_dim": 16384, "num_text_blocks": 4, "num_visual_blocks": 60}
_K5_IMAGE = {"model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50, "axes_dims": (32, 48, 48)}
_K5 = {"in_visual_dim": 16, "out_visual_dim": 16}
_COSMOS_2B = {"num_attention_heads": 16, "extra_pos_embed_type": None}
_COSMOS_14B = {"num_attention_heads": 40, "num_layers": 36}

RELEASED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "FluxTransformer2DModel": {
        "FLUX.1-dev": _FLUX,
        "FLUX.1-schnell": {},
        "FLUX.1-Kontext-dev": _FLUX,
        "FLUX.1-Fill-dev": {**_FLUX, "in_channels": 384, "out_channels": 64},
    },
    "Flux2Transformer2DModel": {
        "FLUX.2-dev": {},
        "FLUX.2-klein-4B": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "FLUX.2-klein-9B": {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    },
    "ChromaTransformer2DModel": {"Chroma1-HD": {}},
    "SD3Transformer2DModel": {
        "SD3-medium": {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        "SD3.5-medium": {
            **_SD35,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        "SD3.5-large": {
            **_SD3,
            **_SD35,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
        },
    },
    "QwenImageTransformer2DModel": {
        "Qwen-Image": {},
        "Qwen-Image-Edit": {},
        "Qwen-Image-Edit-2511": {"zero_cond_t": True},  # not certain; it changes no layer
    },
    "ZImageTransformer2DModel": {"Z-Image-Turbo": {}},  # the class's defaults are this model
    "HiDreamImageTransformer2DModel": {
        "HiDream-I1": {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "caption_channels": (4096, 4096),
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": (*range(32), *(31,) * 16),
        },
    },
    "PixArtTransformer2DModel": {
        "PixArt-Alpha-XL-2-1024-MS": {**_SIGMA, "use_additional_conditions": True},
        "PixArt-Sigma-XL-2-1024-MS": _SIGMA,
    },
    "SanaTransformer2DModel": {
        "Sana-600M": {
            **_SANA_06B,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
        "Sana-1600M": {},
        "SANA1.5-4.8B": {"num_layers": 60, "qk_norm": "rms_norm_across_heads"},
    },
    "Lumina2Transformer2DModel": {"Lumina-Image-2.0": {"cap_feat_dim": 2304}},
    "AuraFlowTransformer2DModel": {"AuraFlow-v0.3": {"pos_embed_max_size": 9216}},
    "WanTransformer3DModel": {
        "Wan2.1-T2V-1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        "Wan2.1-T2V-14B": _WAN_14B,
        "Wan2.1-I2V-14B": {**_WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "Wan2.2-TI2V-5B": {
            "num_attention_heads": 24,
            "num_layers": 30,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
        # a pipeline of the A14B models has two of these: transformer and transformer_2
        "Wan2.2-T2V-A14B": _WAN_14B,
        "Wan2.2-I2V-A14B": {**_WAN_14B, "in_channels": 36},
    },
    "HunyuanVideo15Transformer3DModel": {
        "HunyuanVideo-1.5-480p-t2v": {**_HUNYUAN, "task_type": "t2v"},
        "HunyuanVideo-1.5-480p-i2v": _HUNYUAN,
    },
    "LTXVideoTransformer3DModel": {
        "LTX-Video-2B": {},
        "LTX-Video-13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    },
    # not certain: the released config may name another rope_type, which changes no layer
    "LTX2VideoTransformer3DModel": {"LTX-2": {}},
    "CogVideoXTransformer3DModel": {
        "CogVideoX-2b": {},
        "CogVideoX-5b": _COGVIDEOX_5B,
        # not certain: its sizes in pixels and frames, which change no layer, are left at the class's defaults
        "CogVideoX1.5-5B": {**_COGVIDEOX_5B, "patch_size_t": 2, "patch_bias": False},
    },
    "Kandinsky5Transformer3DModel": {
        "Kandinsky-5.0-T2I-Lite": {**_K5, **_K5_IMAGE},
        "Kandinsky-5.0-T2V-Lite": {**_K5, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
        "Kandinsky-5.0-T2V-Pro": {**_K5, **_K5_PRO, "axes_dims": (32, 48, 48), "visual_cond": True},
    },
    "CosmosTransformer3DModel": {
        "Cosmos-1.0-Diffusion-7B-Text2World": {},
        "Cosmos-1.0-Diffusion-14B-Text2World": {**_COSMOS_14B, "rope_scale": (2.0, 2.0, 2.0)},
        "Cosmos-Predict2-2B-Text2Image": {**_COSMOS_2B, "rope_scale": (1.0, 4.0, 4.0)},
        "Cosmos-Predict2-14B-Text2Image": {
            **_COSMOS_14B,
            "extra_pos_embed_type": None,
            "rope_scale": (1.0, 4.0, 4.0),
        },
        "Cosmos-Predict2.5-2B": {
            **_COSMOS_2B,
            "in_channels": 17,
            "rope_scale": (1.0, 3.0, 3.0),
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 100352,
        },
    },
}
