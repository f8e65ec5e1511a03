"""The norm_rope ops: RMSNorm of every head, then the rotary embedding, into q and k that attention reads.

x (B, S, parts * H * D): q, k and for the joint op v, each of H heads of D columns, at any strides of B and S. cos and
sin fp32 (S, D). Results (B, S, H, D), contiguous; a joint result takes text from one input and image from another.
One program: one token, its heads HEADS at a time, so cos and sin are read once for all of them. Everything is fp32,
rounded to the dtype of x after the norm and at the end, as diffusers does in eager mode. To e4m3, for attention_fp8,
PyTorch rounds: Triton has it from compute capability 8.9 on, and the compiled library is there to be fast.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrot_kernels.backends import cudnn
from convrot_kernels.backends.triton.device_functions import rounded
from convrot_kernels.reference import fp8_of, to_fp8

HEADS = 8  # of a tile: 8 values a thread at D = 128 and 4 warps


@triton.jit
def _pairs(x, HEADS: tl.constexpr, D: tl.constexpr):
    """(HEADS, D) -> even and odd columns, (HEADS, D / 2) each."""
    return tl.split(tl.reshape(x, (HEADS, D // 2, 2)))


@triton.jit
def _normed_and_turned(x, weight_ptr, cos, sin, eps, HEADS: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):
    weight = tl.load(weight_ptr + tl.arange(0, D)).to(tl.float32)[None, :]
    normed = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight
    even, odd = _pairs(rounded(normed, dtype).to(tl.float32), HEADS, D)
    cos_even, cos_odd = _pairs(tl.broadcast_to(cos[None, :], (HEADS, D)), HEADS, D)
    sin_even, sin_odd = _pairs(tl.broadcast_to(sin[None, :], (HEADS, D)), HEADS, D)
    turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
    return tl.reshape(turned, (HEADS, D))


@triton.jit
def _norm_rope(
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    S,
    H,
    stride_b,
    stride_s,
    out_stride_b,
    first,  # token of the results that token 0 of x becomes
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    columns = tl.arange(0, D)
    dtype = x_ptr.dtype.element_ty
    out_dtype = q_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + (first + s) * D + columns).to(tl.float32)  # (D,)
    sin = tl.load(sin_ptr + (first + s) * D + columns).to(tl.float32)
    source = x_ptr + b * stride_b + s * stride_s
    target = b * out_stride_b + (first + s) * H * D
    for head in range(0, H, HEADS):
        heads = head + tl.arange(0, HEADS)
        at, inside = heads[:, None] * D + columns[None, :], heads[:, None] < H  # (HEADS, D)
        q = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(source + H * D + at, mask=inside, other=0.0).to(tl.float32)
        q = _normed_and_turned(q, q_weight_ptr, cos, sin, eps, HEADS, D, dtype)
        k = _normed_and_turned(k, k_weight_ptr, cos, sin, eps, HEADS, D, dtype)
        tl.store(q_ptr + target + at, rounded(q, out_dtype), mask=inside)
        tl.store(k_ptr + target + at, rounded(k, out_dtype), mask=inside)
        if PARTS == 3:
            v = tl.load(source + 2 * H * D + at, mask=inside, other=0.0)
            tl.store(v_ptr + target + at, v, mask=inside)


def _launch(
    x: Tensor, weights: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], eps: float, first: int, out: list[Tensor]
) -> None:
    """Tokens of x into the results, from token `first` on."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens = x.shape[:2]
    if batch * tokens == 0:
        return
    q_weight, k_weight, cos, sin = (tensor.contiguous() for tensor in (*weights, *tables))
    _, _, heads, d = out[0].shape
    with torch.cuda.device_of(x):
        _norm_rope[(batch * tokens,)](
            x, q_weight, k_weight, cos, sin, out[0], out[1], out[-1], tokens, heads, x.stride(0), x.stride(1),
            out[0].stride(0), first, eps, d, len(out), min(HEADS, triton.next_power_of_2(heads)),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _results(x: Tensor, tokens: int, parts: int, d: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    shape = (x.shape[0], tokens, x.shape[2] // (parts * d), d)
    return [torch.empty(shape, dtype=dtype or x.dtype, device=x.device) for _ in range(parts)]


def norm_rope(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(B, S, 2 H D) -> q, k (B, S, H, D)."""
    out = _results(x, x.shape[1], 2, q_weight.shape[0])
    _launch(x, (q_weight, k_weight), (cos, sin), eps, 0, out)
    return out[0], out[1]


def norm_rope_joint(
    text: Tensor,
    image: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 H D), (B, I, 3 H D) -> q, k, v (B, T + I, H, D)."""
    out = _results(image, text.shape[1] + image.shape[1], 3, q_weight.shape[0])
    _launch(text, (text_q_weight, text_k_weight), (cos, sin), eps, 0, out)
    _launch(image, (q_weight, k_weight), (cos, sin), eps, text.shape[1], out)
    return out[0], out[1], out[2]


def norm_rope_fp8(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, S, 3 H D) -> q, k, v e4m3 (B, S, H, D), scale of v (B,)."""
    d = q_weight.shape[0]
    q, k = _results(x, x.shape[1], 3, d, torch.float32)[:2]
    _launch(x, (q_weight, k_weight), (cos, sin), eps, 0, [q, k])
    v, v_scale = fp8_of(x[..., -q.shape[2] * d :].unflatten(-1, (-1, d)).contiguous())
    return to_fp8(q), to_fp8(k), v, v_scale


def norm_rope_joint_fp8(
    text: Tensor,
    image: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, T, 3 H D), (B, I, 3 H D) -> q, k, v e4m3 (B, T + I, H, D), scale of v (B,)."""
    out = _results(image, text.shape[1] + image.shape[1], 3, q_weight.shape[0], torch.float32)
    _launch(text, (text_q_weight, text_k_weight), (cos, sin), eps, 0, out)
    _launch(image, (q_weight, k_weight), (cos, sin), eps, text.shape[1], out)
    return to_fp8(out[0]), to_fp8(out[1]), *fp8_of(out[2])


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """e4m3 (B, S, H, D) -> (B, S, H, D)."""
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=out_dtype, device=q.device)
    with torch.cuda.device_of(q):
        narrow = cudnn.attend(q.contiguous(), k.contiguous(), v.contiguous())
    return (narrow.float() * v_scale.view(-1, 1, 1, 1)).to(out_dtype)
