"""4-bit inference for diffusion transformers: rotate, quantize, save, load, generate. No retraining, no calibration."""

from convrot_quant.attention import fp8_attention_
from convrot_quant.calibration import Calibration
from convrot_quant.checkpoint import load_quantized, save_quantized
from convrot_quant.comfy import load_comfy, save_comfy
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.convrot_config import ConvRotConfig
from convrot_quant.fuse import fuse_, unfuse_
from convrot_quant.graphs import cuda_graphs_
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.lora_files import LoraFile
from convrot_quant.manifest import CheckpointError
from convrot_quant.patch import apply, dequantize_, plan, quantize_
from convrot_quant.planner import plan_within
from convrot_quant.plans import LayerPlan, Plan
from convrot_quant.streaming import load_and_quantize

__all__ = [
    "Calibration",
    "CheckpointError",
    "ConvLinear4bit",
    "ConvRotConfig",
    "LayerPlan",
    "LoraFile",
    "Plan",
    "QuantConfig",
    "Scheme",
    "apply",
    "cuda_graphs_",
    "dequantize_",
    "fp8_attention_",
    "fuse_",
    "load_and_quantize",
    "load_comfy",
    "load_quantized",
    "plan",
    "plan_within",
    "quantize_",
    "save_comfy",
    "save_quantized",
    "unfuse_",
]
