"""The block FWHT of 256 columns as a butterfly, as fast-hadamard-transform has it: one warp a block.

A lane holds 8 neighbouring columns, 16 bytes: three steps of the butterfly stay in its registers, five go between lanes
by shuffles. Reads once, writes once. The matrix is Sylvester's over 16, in natural order; sums in fp32.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

WARPS = 8  # blocks of 256 columns a thread block
SOURCE = r"""
__device__ float wide(unsigned int bits) { return __uint_as_float(bits << 16); }

__device__ unsigned int rounded(float value) {  // to bf16, half to even; finite values
  unsigned int bits = __float_as_uint(value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

extern "C" __global__ void fwht256(const uint4* x, uint4* out, int groups) {
  int group = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (group >= groups) return;
  long long at = (long long)group * 32 + lane;
  uint4 words = x[at];
  unsigned int* word = &words.x;
  float v[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = wide(word[i] & 0xffffu);
    v[2 * i + 1] = wide(word[i] >> 16);
  }
#pragma unroll
  for (int h = 1; h < 8; h *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & h) continue;
      float a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
#pragma unroll
  for (int h = 1; h < 32; h *= 2) {
    float sign = lane & h ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float other = __shfl_xor_sync(0xffffffffu, v[i], h);
      v[i] = sign * v[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word[i] = rounded(v[2 * i] * 0.0625f) | rounded(v[2 * i + 1] * 0.0625f) << 16;
  }
  out[at] = words;
}
"""


@cache
def _kernel() -> Any:
    """Compiled by the NVRTC that comes with PyTorch; no toolkit is needed."""
    return torch.cuda._compile_kernel(SOURCE, "fwht256")


def fwht256(x: Tensor) -> Tensor:
    """(M, K) bf16, K a multiple of 256, contiguous -> (M, K)."""
    if x.dtype != torch.bfloat16 or x.shape[-1] % 256 or not x.is_contiguous():
        raise ValueError(f"fwht256: x must be contiguous bf16, K a multiple of 256, got {x.dtype} {tuple(x.shape)}")
    out, groups = torch.empty_like(x), x.numel() // 256
    _kernel()(grid=(-(-groups // WARPS), 1, 1), block=(32 * WARPS, 1, 1), args=[x, out, groups])
    return out
