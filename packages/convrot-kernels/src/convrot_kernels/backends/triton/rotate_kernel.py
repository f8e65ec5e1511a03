"""rotate: out = x H, group by group; sums in fp32, one rounding to the dtype of x.

x (M, K) fp16, bf16 or fp32, any row stride; out (M, K) contiguous. One program: COLUMNS columns of one row.
Inputs are widened to fp32 and take three bf16 terms for either factor (device_functions.py): the error is below 2^-21
of the largest result, and 16-bit inputs give what fp32 inputs of the same values give, rounded.
A group that holds inf gives NaN where reference gives inf or NaN; a group never touches another one.
Inputs below 2^-100 lose accuracy: their last terms leave the range of bf16.
Not tried: several rows a program (rows of K < 256 waste most of a tile), fewer terms for 16-bit inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends.triton.device_functions import (
    LEAST_COLUMNS,
    SHRINK,
    loaded_tables,
    rotated,
    rounded,
    tables,
)
from convrot_kernels.backends.triton.rows import as_rows

MOST_COLUMNS = 4096  # of one program: 32 values a thread at 4 warps


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    right_ptr,
    left_ptr,
    K,
    stride_x,
    GROUP: tl.constexpr,
    SHRUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * stride_x + columns, mask=columns < K, other=0.0).to(tl.float32)
    right, left = loaded_tables(right_ptr, left_ptr, GROUP)
    y = tl.reshape(rotated(x, right, left, COLUMNS, GROUP, 3) * SHRUNK, (COLUMNS,))
    tl.store(out_ptr + row * K + columns, rounded(y, out_ptr.dtype.element_ty), mask=columns < K)


def rotate(x: Tensor, group_size: int = 256) -> Tensor:
    """(..., K) -> (..., K), same dtype."""
    rows, out = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    m, k = rows.shape
    if m == 0:
        return out
    columns = max(LEAST_COLUMNS[group_size], min(MOST_COLUMNS, triton.next_power_of_2(k)))
    with torch.cuda.device_of(x):
        _rotate[(m, triton.cdiv(k, columns))](
            rows, out, *tables(group_size, torch.float32, x.device), k, rows.stride(0),
            group_size, SHRINK[group_size], columns, num_warps=max(1, columns // 1024), enable_fp_fusion=False,
        )  # fmt: skip
    return out
