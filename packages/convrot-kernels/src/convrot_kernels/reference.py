"""Pure PyTorch, and the definition of every op: rounding, clamping, nibble order and the order of the epilogue.

A backend changes speed, never these numbers:
- rotation sums in fp64 and rounds once to fp32, so no summation order, thread count or matmul precision shows;
- codes are round_half_even(rotated / scale) with a true division;
- integer sums are exact, then rounded once to fp32; every epilogue step is rounded to fp32 on its own, the last to
  the output dtype.
Arguments arrive validated (checks.py). Sizes: M tokens, N outputs, K inputs.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from convrot_kernels.layouts import LAYOUTS

GROUP_SIZES = (16, 64, 256, 1024)
QMAX = {4: 7, 8: 127}
SCALE_FLOOR = 1e-10  # keeps the division defined for all-zero rows
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
_BLOCK = 1 << 20  # weights are widened to fp32 this many at a time: the block stays in cache
_ROTATE_BLOCK = 1 << 16  # the same for the fp64 copy of what is rotated
_GPU_BLOCK = 1 << 24  # and on a GPU, where a launch costs more than a cache saves: 270 MB of copies
_EXACT = 1 << 24  # up to here fp32 holds every integer


def why_not(device: torch.device) -> str | None:
    """None where this backend runs, else the reason it cannot."""
    return "mps has no float64, move the tensors to the cpu" if device.type == "mps" else None


def preferred_codes(device: torch.device) -> str:
    """int8: the GEMM widens codes to fp32, so packing them first would only add a pass."""
    return "int8"


def preferred_layout(device: torch.device) -> str:
    """row_major: the layout of files is read as it is."""
    return "row_major"


# rotation


def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """-> (n, n) regular Hadamard matrix over sqrt(n), n a power of 4: symmetric, its own inverse, rows sum to 1."""
    if n < 1 or n & (n - 1) or n.bit_length() % 2 == 0:
        raise ValueError(f"hadamard: n must be a power of 4, got {n}; use 4, 16, 64, 256 or 1024")
    h4 = torch.tensor(_H4, dtype=dtype, device=device) / 2
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < n:
        matrix = torch.kron(matrix, h4)
    return matrix


@lru_cache
def _kept_factor(n: int) -> Tensor:
    return hadamard(n, torch.float64)


def _factor(n: int, device: torch.device) -> Tensor:
    # kept on the CPU alone: a GPU's stream could read what another is still writing, and a graph owns what it captures
    return _kept_factor(n) if device.type == "cpu" else hadamard(n, torch.float64, device)


def _rotate(x: Tensor, group_size: int) -> Tensor:
    """(..., K) -> fp32 (..., K): a group is a matrix X of rows of 16, and its rotation H X H16."""
    left, right = _factor(group_size // 16, x.device), _factor(16, x.device)
    groups = x.reshape(-1, group_size // 16, 16)
    out = torch.empty(groups.shape, dtype=torch.float32, device=x.device)
    step = (_ROTATE_BLOCK if x.device.type == "cpu" else _GPU_BLOCK) // group_size
    for block, rotated in zip(groups.split(step), out.split(step), strict=True):
        rotated.copy_(left @ (block.double() @ right))
    return out.view(x.shape)


def rotate(x: Tensor, group_size: int = 256) -> Tensor:
    """(..., K) -> (..., K), same dtype."""
    return _rotate(x, group_size).to(x.dtype)


# quantization


def _absmax(rotated: Tensor, qmax: int) -> Tensor:
    return rotated.abs().amax(-1)


# rule name -> (rotated fp32 (..., K), qmax) -> fp32 (...): the magnitude that code qmax stands for, before `clip`;
# not finite exactly where the row is not
SCALE_RULES: dict[str, Callable[[Tensor, int], Tensor]] = {"absmax": _absmax}


def rotate_quantize(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes int8 (..., K) or packed uint8 (..., K/2), scale fp32 (...)."""
    rotated, qmax = _rotate(x, group_size), QMAX[bits]
    scale = row_scale(rotated, qmax, rule, clip)
    codes = codes_of(rotated, scale, qmax)
    return (pack_int4(codes) if packed else codes), scale


def row_scale(rotated: Tensor, qmax: int, rule: str = "absmax", clip: float = 1.0) -> Tensor:
    """fp32 (..., K) -> fp32 (...), NaN for rows that are not finite."""
    reach = SCALE_RULES[rule](rotated, qmax)
    # a tensor, because on a GPU PyTorch multiplies by the reciprocal of a number
    scale = (reach * clip).div_(torch.full_like(reach, qmax))
    return scale.clamp_min_(SCALE_FLOOR).masked_fill_(~reach.isfinite(), float("nan"))


def codes_of(rotated: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """fp32 (..., K), which is overwritten, and fp32 (...) -> int8 (..., K); 0 where the scale is NaN."""
    codes = rotated.div_(scale.unsqueeze(-1)).round_().clamp_(-qmax, qmax).to(torch.int8)
    return codes.mul_(scale.isfinite().unsqueeze(-1))  # the int8 of a NaN is anything


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def rotate_quantize_gelu(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(gelu(x)), gelu by tanh in fp32, rounded once to x.dtype."""
    return rotate_quantize(_gelu(x), group_size, bits, packed=packed, rule=rule, clip=clip)


def rotate_quantize_silu_mul(
    x: Tensor,
    y: Tensor,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(silu(x) * y), in fp32, rounded once to x.dtype."""
    gated = F.silu(x.float()).mul_(y).to(x.dtype)
    return rotate_quantize(gated, group_size, bits, packed=packed, rule=rule, clip=clip)


def rotate_quantize_cat_gelu(
    x: Tensor,
    y: Tensor,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize([x | gelu(y)]), one scale over both halves."""
    joined = torch.cat((x, _gelu(y)), dim=-1)
    return rotate_quantize(joined, group_size, bits, packed=packed, rule=rule, clip=clip)


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred.mul_(torch.rsqrt(variance + eps)), variance


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    """fp32 (..., K) -> fp32 (..., K). Rows whose squares leave fp32 are scaled first: eps is nothing to them."""
    out, variance = _standardize(x, eps)
    large = ~variance.isfinite()
    if large.any():
        out = torch.where(large, _standardize(x * 2.0**-80, eps * 2.0**-80)[0], out)
    return out


def rotate_quantize_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize(layer_norm(x) * (1 + scale) + shift), in fp32, rounded once to x.dtype."""
    modulated = _modulated(x, scale, shift, eps)
    return rotate_quantize(modulated, group_size, bits, packed=packed, rule=rule, clip=clip)


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift, in fp32, rounded once."""
    gain, offset = _per_batch(1 + scale.float(), x), _per_batch(shift, x)
    return _layer_norm(x.float(), eps).mul_(gain).add_(offset).to(x.dtype)


def _per_batch(vector: Tensor, like: Tensor) -> Tensor:
    """(B, C) -> (B, 1, ..., C) so that it broadcasts over (B, ..., C); (C,) stays."""
    return vector if vector.dim() == 1 else vector.view(vector.shape[0], *[1] * (like.dim() - 2), vector.shape[1])


# low-rank terms


def low_rank_down(
    x: Tensor,
    down: list[Tensor],
    y: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gelu: bool = False,
) -> Tensor:
    """values @ down^T of every term (..., R), fp32 sums, rounded once; values: what the quantizers rotate."""
    if gelu:
        x = _gelu(x)
    if y is not None:
        x = torch.cat((x, _gelu(y)), dim=-1)
    if scale is not None and shift is not None:
        x = _modulated(x, scale, shift, eps)
    rows = [term.to(x.dtype).float() for term in down]
    return (x.float() @ torch.cat(rows).t()).to(x.dtype) if rows else x.new_empty((*x.shape[:-1], 0))


def low_rank_up(
    out: Tensor,
    low: Tensor,
    up: list[Tensor],
    columns: list[int],
    alpha: list[float],
    gate: Tensor | None = None,
) -> None:
    """out[..., c : c + n] += gate * alpha * low @ up^T for each term in turn, in fp32, rounded once."""
    lows = low.split([term.shape[1] for term in up], dim=-1)
    for part, term, column, factor in zip(lows, up, columns, alpha, strict=True):
        target = out.narrow(-1, column, term.shape[0])
        added = (part.float() @ term.to(out.dtype).float().t()).mul_(factor)
        if gate is not None:
            added.mul_(_per_batch(gate.narrow(-1, column, term.shape[0]), out))
        target.copy_(added.add_(target))


def pack_int4(codes: Tensor) -> Tensor:
    """int8 (..., K) -> uint8 (..., K/2), low nibble = even column, two's complement."""
    return ((codes[..., 0::2] & 0x0F) | (codes[..., 1::2] << 4)).contiguous().view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (..., K/2) -> int8 (..., K)."""
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)  # one nibble a byte
    return pairs.view(torch.int8).bitwise_xor_(8).sub_(8)  # sign


# attention's inputs


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., D) -> (..., D), in fp32, rounded once."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, S, H, D) -> x * cos + (-x1, x0, -x3, x2, ...) * sin, cos and sin (S, D), fp32."""
    wide = x.float()
    turned = torch.stack((-wide[..., 1::2], wide[..., 0::2]), dim=-1).flatten(-2)
    return wide * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1)


def _normed_and_turned(x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, eps: float) -> list[Tensor]:
    """(B, S, H D for each weight) -> of each part (B, S, H, D), fp32; only the norm's result was rounded."""
    parts = x.contiguous().chunk(len(weights), dim=-1)  # results are contiguous whatever x is
    return [
        _turned(_rms_norm(part.unflatten(-1, (-1, weight.shape[0])), weight, eps), cos, sin)
        for part, weight in zip(parts, weights, strict=True)
    ]


def norm_rope(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(B, S, 2 H D) -> q, k (B, S, H, D)."""
    q, k = _normed_and_turned(x, (q_weight, k_weight), cos, sin, eps)
    return q.to(x.dtype), k.to(x.dtype)


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
    tokens, width = text.shape[1], text.shape[2] // 3
    of_text = norm_rope(text[..., : 2 * width], text_q_weight, text_k_weight, cos[:tokens], sin[:tokens], eps)
    of_image = norm_rope(image[..., : 2 * width], q_weight, k_weight, cos[tokens:], sin[tokens:], eps)
    v = torch.cat((text[..., 2 * width :], image[..., 2 * width :]), dim=1)
    q, k = (torch.cat(pair, dim=1) for pair in zip(of_text, of_image, strict=True))
    return q, k, v.unflatten(-1, (-1, q_weight.shape[0]))


def to_fp8(x: Tensor) -> Tensor:
    """fp32 -> e4m3, the nearest, ties to even; what is beyond 448 becomes 448, NaN stays."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def fp8_of(v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) -> e4m3 of v (1 / scale), scale fp32 (B,): each sample's largest value becomes 448."""
    wide = v.float()
    most = wide.abs().amax((1, 2, 3)) if v.shape[1] else wide.new_zeros(len(v))
    scale = (most * (1 / FP8_MAX)).clamp_min(SCALE_FLOOR)  # products: PyTorch divides by a number otherwise on a GPU
    return to_fp8(wide * scale.reciprocal().view(-1, 1, 1, 1)), scale


def norm_rope_fp8(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, S, 3 H D) -> q, k, v e4m3 (B, S, H, D), scale of v (B,)."""
    x, width = x.contiguous(), x.shape[2] // 3
    q, k = _normed_and_turned(x[..., : 2 * width], (q_weight, k_weight), cos, sin, eps)
    v, v_scale = fp8_of(x[..., 2 * width :].unflatten(-1, (-1, q_weight.shape[0])))
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
    tokens, width = text.shape[1], text.shape[2] // 3
    weights = (text_q_weight, text_k_weight), (q_weight, k_weight)
    of_text = _normed_and_turned(text[..., : 2 * width], weights[0], cos[:tokens], sin[:tokens], eps)
    of_image = _normed_and_turned(image[..., : 2 * width], weights[1], cos[tokens:], sin[tokens:], eps)
    q, k = (to_fp8(torch.cat(pair, dim=1)) for pair in zip(of_text, of_image, strict=True))
    v = torch.cat((text[..., 2 * width :], image[..., 2 * width :]), dim=1)
    return q, k, *fp8_of(v.unflatten(-1, (-1, q_weight.shape[0])))


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """e4m3 (B, S, H, D) -> (B, S, H, D). Head by head: the scores of all would not fit.

    A kernel rounds its probabilities against the running maximum of a row, so that backends agree within e4m3's steps.
    """
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h].float() @ k[b, :, h].float().T * q.shape[3] ** -0.5
            p = torch.exp(scores - scores.amax(-1, keepdim=True)) if scores.numel() else scores
            sums = to_fp8(p * FP8_MAX).float() @ v[b, :, h].float()
            out[b, :, h] = sums / (FP8_MAX * p.sum(-1, keepdim=True))
    return (to_fp8(out).float() * v_scale.view(-1, 1, 1, 1)).to(out_dtype)


# matrix product


def _widen(codes: Tensor) -> Tensor:
    """Packed or int8 codes, or values, (..., K) -> fp32 (..., K)."""
    return (unpack_int4(codes) if codes.dtype == torch.uint8 else codes).float()


def _dot(a: Tensor, b: Tensor, exact_width: int) -> Tensor:
    """fp32 (M, K) x fp32 (N, K) -> fp32 (M, N), summed in fp32 over at most `exact_width` columns, then in fp64."""
    if a.shape[1] <= exact_width:
        return a @ b.t()
    parts = zip(a.split(exact_width, 1), b.split(exact_width, 1), strict=True)
    return torch.stack([(left @ right.t()).double() for left, right in parts]).sum(0).float()


def _scaled(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor, bias: Tensor | None, b_layout: str
) -> Tensor:
    """-> fp32 (..., N): (acc * a_scale) * b_scale + bias, every step rounded to fp32."""
    b = LAYOUTS[b_layout].restore(b)
    left = _widen(a.reshape(-1, a.shape[-1]))
    depth = left.shape[1]
    if not a.is_floating_point():
        depth = _EXACT // ((8 if a.dtype == torch.uint8 else 128) * (8 if b.dtype == torch.uint8 else 128))
    rows = max(1, _BLOCK // left.shape[1])
    out = left.new_empty((*a.shape[:-1], b.shape[0]))  # a result that is a view could not be written into
    parts = [_dot(left, _widen(block), depth) for block in b.split(rows)]
    torch.cat(parts, dim=1, out=out.view(len(left), b.shape[0]))
    if a_scale is not None:
        out.mul_(a_scale.unsqueeze(-1))
    out.mul_(b_scale)
    return out if bias is None else out.add_(bias)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    b_layout: str = "row_major",
) -> Tensor:
    """(..., K) x (N, K) -> (..., N), rounded once to out_dtype."""
    assert b_scale is not None, "checks.py requires b_scale"
    dtype = out_dtype or (a.dtype if a.is_floating_point() else torch.bfloat16)
    return _scaled(a, b, a_scale, b_scale, bias, b_layout).to(dtype)


def scaled_mm_out(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    b_layout: str = "row_major",
) -> None:
    """scaled_mm written into out (..., N), rounded once to its dtype."""
    assert b_scale is not None, "checks.py requires b_scale"
    out.copy_(_scaled(a, b, a_scale, b_scale, bias, b_layout))


def scaled_mm_cat(
    a: Tensor,
    b: Sequence[Tensor],
    a_scale: Tensor | None,
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    out_dtype: torch.dtype | None = None,
    *,
    b_layout: str = "row_major",
) -> Tensor:
    """(..., K) x (N1, K), (N2, K), ... -> (..., N1 + N2 + ...): scaled_mm of each, one after the other."""
    biases: Sequence[Tensor | None] = bias or [None] * len(b)
    members = zip(b, b_scale, biases, strict=True)
    return torch.cat([scaled_mm(a, x, a_scale, y, z, out_dtype, b_layout=b_layout) for x, y, z in members], dim=-1)


def scaled_mm_gate_residual(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    b_layout: str = "row_major",
) -> Tensor:
    """residual + gate * (scaled_mm before its last rounding), in fp32, rounded once to residual.dtype."""
    out = _scaled(a, b, a_scale, b_scale, bias, b_layout)
    return out.mul_(_per_batch(gate.float(), residual)).add_(residual).to(residual.dtype)
