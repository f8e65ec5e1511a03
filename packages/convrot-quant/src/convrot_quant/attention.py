"""fp8_attention_(model): attention of fused blocks with 8-bit operands, off by default.

Attention is 30 % of a 4-bit FLUX step and stays in 16 bits unless asked. Here RMSNorm, rotary embedding and rounding to
e4m3 are one op behind the projection, and cuDNN multiplies: on Hopper, with nvidia-cudnn-frontend (newer GPUs were not
tried). What it costs in accuracy and what it gains: docs/quality.md, docs/benchmarks.md.
"""

from __future__ import annotations

from torch import nn

from convrot_kernels.backends import cudnn
from convrot_quant.families.blocks import FusedBlock


def fp8_attention_(model: nn.Module, enabled: bool = True) -> int:
    """From now on fused blocks attend with e4m3 operands, in place; `enabled=False` undoes it. Returns how many do.

    A block that runs diffusers' own forward (an adapter that is no LoRA, a hook, a 16-bit layer) attends in 16 bits, by
    the backend that set_attention_backend chose. A model without fused blocks is refused, and context parallelism when
    the block runs. On a CPU the reference computes the same numbers, slowly.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fp8_attention_: expected a model such as pipe.transformer; got {type(model).__name__}")
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    if not enabled:
        for block in blocks:
            vars(block).pop("fp8_attention", None)
        return 0
    blocks = [block for block in blocks if block.quantizes()]
    if not blocks:
        raise ValueError(
            f"fp8_attention_: only fused blocks attend in 8 bits, and {type(model).__name__} has none whose layers "
            "quantize their activations; quantize a FLUX.1 transformer first: quantize_(model)"
        )
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    for why_not in filter(None, map(cudnn.why_not, gpus)):
        raise ValueError(f"fp8_attention_: attention in 8 bits does not run here: {why_not}")
    for block in blocks:
        block.fp8_attention = True
    return len(blocks)
