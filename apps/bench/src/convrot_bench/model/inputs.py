"""What one denoising step is called with: random latents and text, shapes and ids as the pipelines make them."""

from collections.abc import Callable
from typing import Any

import torch

from convrot_bench.model.build import DTYPE
from convrot_bench.model.configs import Scale
from convrot_bench.ops.problems import Source

PATCH = 16  # pixels of a token's side: 8 by the VAE, 2 by the transformer
Inputs = dict[str, Any]


def flux_inputs(model: Any, scale: Scale, device: str, height: int, width: int, batch: int) -> Inputs:
    """FluxTransformer2DModel: packed latents (B, HW/256, 64), T5 text (B, T, 4096), pooled CLIP text (B, 768)."""
    source, config = Source(device), model.config
    rows, columns, text = height // PATCH, width // PATCH, scale.text_tokens["flux"]
    image_ids = torch.zeros(rows, columns, 3, device=device, dtype=DTYPE)
    image_ids[..., 1] = torch.arange(rows, device=device)[:, None]
    image_ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return {
        "hidden_states": source.normal(batch, rows * columns, config.in_channels).to(DTYPE),
        "encoder_hidden_states": source.normal(batch, text, config.joint_attention_dim).to(DTYPE),
        "pooled_projections": source.normal(batch, config.pooled_projection_dim).to(DTYPE),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=DTYPE),
        "guidance": torch.full((batch,), 3.5, device=device),
        "img_ids": image_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=DTYPE),
        "joint_attention_kwargs": {},  # what FluxPipeline passes
    }


def sd3_inputs(model: Any, scale: Scale, device: str, height: int, width: int, batch: int) -> Inputs:
    """SD3Transformer2DModel: latents (B, 16, H/8, W/8), CLIP and T5 text (B, T, 4096), pooled text (B, 2048)."""
    source, config, text = Source(device), model.config, scale.text_tokens["sd35_large"]
    return {
        "hidden_states": source.normal(batch, config.in_channels, height // 8, width // 8).to(DTYPE),
        "encoder_hidden_states": source.normal(batch, text, config.joint_attention_dim).to(DTYPE),
        "pooled_projections": source.normal(batch, config.pooled_projection_dim).to(DTYPE),
        "timestep": torch.full((batch,), 500.0, device=device),
    }


def qwen_inputs(model: Any, scale: Scale, device: str, height: int, width: int, batch: int) -> Inputs:
    """QwenImageTransformer2DModel: packed latents (B, HW/256, 64), text of Qwen2.5-VL (B, T, 3584), no padding."""
    source, config = Source(device), model.config
    rows, columns, text = height // PATCH, width // PATCH, scale.text_tokens["qwen_image"]
    return {
        "hidden_states": source.normal(batch, rows * columns, config.in_channels).to(DTYPE),
        "encoder_hidden_states": source.normal(batch, text, config.joint_attention_dim).to(DTYPE),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=DTYPE),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


MakeInputs = Callable[[Any, Scale, str, int, int, int], Inputs]
