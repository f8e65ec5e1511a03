"""4-bit inference for diffusion transformers: rotate, quantize, save, load, generate. No calibration, no retraining."""

from convrot_quant.checkpoint import load_quantized, save_quantized
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.fuse import fuse_, unfuse_
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.manifest import CheckpointError
from convrot_quant.patch import apply, dequantize_, plan, quantize_
from convrot_quant.plans import LayerPlan, Plan

__all__ = [
    "CheckpointError",
    "ConvLinear4bit",
    "LayerPlan",
    "Plan",
    "QuantConfig",
    "Scheme",
    "apply",
    "dequantize_",
    "fuse_",
    "load_quantized",
    "plan",
    "quantize_",
    "save_quantized",
    "unfuse_",
]
