"""Configurations of what is measured, as released, and tiny ones of the same form for a CPU: data only."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from convrot_bench.model.timing import Rounds

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large everything is, and how often it runs."""

    tiny: bool
    flux: Config
    sd35_large: Config
    qwen_image: Config
    t5: Config
    clip: Config
    vae: Config
    text_tokens: Mapping[str, int]
    side: int  # pixels: height and width of every table but `sizes`
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    pipeline_steps: tuple[int, ...]
    rounds: Rounds
    images: Rounds  # of whole pipelines
    peers: tuple[str, ...] = ()  # () is all


_VAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

# the flow-matching scheduler of FLUX.1-dev
SCHEDULER: Config = MappingProxyType(
    {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}
)

REAL = Scale(
    tiny=False,
    flux={"guidance_embeds": True},  # the rest of FLUX.1-dev are diffusers' defaults
    sd35_large={
        "sample_size": 128, "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38,
        "joint_attention_dim": 4096, "caption_projection_dim": 2432, "pooled_projection_dim": 2048,
        "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    },
    qwen_image={},  # diffusers' defaults
    t5={
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    clip={
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024, **_VAE_BLOCKS},
    # FLUX.1 and Qwen-Image pad or cut to 512; SD3.5 has 77 of CLIP and 256 of T5
    text_tokens={"flux": 512, "sd35_large": 333, "qwen_image": 512, "clip": 77},
    side=1024,
    sizes=(512, 1024, 2048),
    batches=(1, 2, 4, 8),
    pipeline_steps=(28, 50),
    rounds=Rounds(),
    images=Rounds(rounds=5, warmup=0, steps=1),
)  # fmt: skip

_TINY_FLUX = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True,
}  # fmt: skip

TINY = Scale(
    tiny=True,
    flux=_TINY_FLUX,
    sd35_large={
        **REAL.sd35_large, "sample_size": 16, "num_layers": 2, "num_attention_heads": 8, "joint_attention_dim": 64,
        "caption_projection_dim": 512, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
    },
    qwen_image={
        "num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 4, "joint_attention_dim": 64,
    },
    t5={**REAL.t5, "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    clip={
        **REAL.clip, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "projection_dim": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0,
        "eos_token_id": 2,
    },
    vae={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, **_VAE_BLOCKS},
    text_tokens={"flux": 16, "sd35_large": 16, "qwen_image": 16, "clip": 16},
    side=64,
    sizes=(32, 64),
    batches=(2,),
    pipeline_steps=(2, 3),
    rounds=Rounds(rounds=2, warmup=1, steps=2),
    images=Rounds(rounds=1, warmup=0, steps=1),
)  # fmt: skip
