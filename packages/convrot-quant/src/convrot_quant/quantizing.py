"""quantize_weight: a 16-bit weight -> what a layer holds of it, by the rules of its scheme. Once, and offline."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import convrot_kernels as kernels
from convrot_kernels import pack_int4, rotate
from convrot_quant.config import Scheme
from convrot_quant.gptq import gptq_codes
from convrot_quant.low_rank import Branch, branch_of


class Quantized(NamedTuple):
    """A weight (N, K): codes uint8 (N, K/2) or int8 (N, K), scale fp32 (N,), the branch where the scheme has one."""

    codes: Tensor
    scale: Tensor
    branch: Branch | None


def quantize_weight(
    weight: Tensor, scheme: Scheme, branch: Branch | None = None, inputs: Tensor | None = None
) -> Quantized:
    """(N, K) fp16, bf16 or fp32 -> what a layer of this scheme holds of it.

    `branch`: of this weight, where it is known already (or of more rows, whose branch is to count for these).
    `inputs`: rows (C, K) that the layer reads, for weight_rounding="gptq" and for nothing else.
    """
    bits, gptq = scheme.weight_bits, scheme.weight_rounding == "gptq"
    if gptq and (inputs is None or inputs.dim() != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs)):
        got = None if inputs is None else tuple(inputs.shape)
        raise ValueError(
            f"ConvLinear4bit: weight_rounding='gptq' needs inputs (C, {weight.shape[1]}), got {got}; quantize with a "
            "Calibration (--calibrate PROMPTS), or use weight_rounding='balanced'"
        )
    rules = {"rule": scheme.weight_rule, "rounding": "nearest" if gptq else scheme.weight_rounding}
    if scheme.low_rank:
        _refuse(~torch.isfinite(weight).all(dim=1), len(weight), "be finite")
        branch = branch or branch_of(weight, scheme.low_rank)
        weight = branch.rest_of(weight)
    codes, scale = kernels.quantize_weight(weight, scheme.group_size, bits, packed=bits == 4, **rules)
    _refuse(~torch.isfinite(scale), len(scale), "be finite after rotation in fp32")
    if gptq:
        assert inputs is not None, "refused above"
        rotated = rotate(inputs.to(weight.device).float(), scheme.group_size)
        weight = rotate(weight.float(), scheme.group_size)
        codes = pack_int4(gptq_codes(weight, scale.unsqueeze(1), rotated, 2 ** (bits - 1) - 1))
    return Quantized(codes, scale, branch if scheme.low_rank else None)


def _refuse(bad: Tensor, rows: int, rule: str) -> None:
    found = torch.nonzero(bad)
    if len(found):
        row = found[0].item()
        raise ValueError(
            f"ConvLinear4bit: the weight must {rule}; row {row} of {rows} is not; repair or reload the weight"
        )
