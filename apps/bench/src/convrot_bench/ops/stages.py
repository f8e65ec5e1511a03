"""The steps of a W4A4 linear as kernels of their own, each of which reads its input from memory and writes its result.

Scale, codes, packed codes, and the epilogue of a product; rotation and product are ops that exist. All are bound by
memory, so that a plain kernel of one row a program is as fast as any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends.triton.device_functions import rounded

BLOCK = 2048
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds half to even
FLOOR = tl.constexpr(1e-10)
QMAX = tl.constexpr(7.0)


@triton.jit
def _scale(x_ptr, out_ptr, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
    tl.store(out_ptr + row, tl.maximum(tl.div_rn(tl.max(most, 0), QMAX), FLOOR))


@triton.jit
def _quantize(x_ptr, scale_ptr, out_ptr, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    steps = (tl.div_rn(x, tl.zeros_like(x) + tl.load(scale_ptr + row)) + MAGIC) - MAGIC
    tl.store(out_ptr + row * K + columns, tl.minimum(tl.maximum(steps, -QMAX), QMAX).to(tl.int8), mask=columns < K)


@triton.jit
def _pack(pairs_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(pairs_ptr + at, mask=at < size, other=0)  # two codes, the even column below
    tl.store(out_ptr + at, ((pair & 15) | ((pair >> 4) & 240)).to(tl.uint8), mask=at < size)


@triton.jit
def _epilogue(acc_ptr, a_ptr, b_ptr, bias_ptr, out_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    acc = tl.load(acc_ptr + row * N + columns, mask=inside, other=0).to(tl.float32)
    b_scale = tl.load(b_ptr + columns, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = acc * tl.load(a_ptr + row) * b_scale + bias
    tl.store(out_ptr + row * N + columns, rounded(y, tl.bfloat16), mask=inside)


def scale(x: Tensor) -> Tensor:
    """(M, K) bf16 -> fp32 (M,): max |row| / 7."""
    out = torch.empty(len(x), device=x.device)
    _scale[(len(x),)](x, out, x.shape[1], BLOCK=BLOCK)
    return out


def quantize(x: Tensor, a_scale: Tensor) -> Tensor:
    """(M, K) bf16, fp32 (M,) -> int8 (M, K)."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    _quantize[(len(x), triton.cdiv(x.shape[1], BLOCK))](x, a_scale, out, x.shape[1], BLOCK=BLOCK)
    return out


def pack(codes: Tensor) -> Tensor:
    """int8 (M, K) -> uint8 (M, K/2), low nibble = even column."""
    pairs = codes.view(torch.int16)
    out = torch.empty(pairs.shape, dtype=torch.uint8, device=codes.device)
    _pack[(triton.cdiv(out.numel(), BLOCK),)](pairs, out, out.numel(), BLOCK=BLOCK)
    return out


def epilogue(acc: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    """int32 (M, N), fp32 (M,) and (N,), bf16 (N,) -> bf16 (M, N): (acc * a_scale) * b_scale + bias, rounded once."""
    m, n = acc.shape
    out = torch.empty(m, n, dtype=torch.bfloat16, device=acc.device)
    grid = m, triton.cdiv(n, BLOCK)
    _epilogue[grid](acc, a_scale, b_scale, bias, out, n, BLOCK=BLOCK, enable_fp_fusion=False)
    return out
