"""The norm_rope ops, and what attention_fp8 does around cuDNN's product, on the compiled library: norm_rope.cu."""

import torch
from torch import Tensor

from convrot_kernels.backends import cudnn
from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.products import DTYPES, ready
from convrot_kernels.reference import FP8, SCALE_FLOOR

_ALIGNMENT = 16  # bytes: eight 16-bit columns are one load


def _readable(x: Tensor) -> Tensor:
    """(B, S, C) itself where every lane can load its columns at once, else a copy."""
    size = x.element_size()
    strides = [stride for length, stride in zip(x.shape[:2], x.stride()[:2], strict=True) if length > 1]
    fits = x.stride(2) == 1 and x.data_ptr() % _ALIGNMENT == 0 and all(s * size % _ALIGNMENT == 0 for s in strides)
    return x if fits else x.new_empty(x.shape).copy_(x)


def _run(
    text: Tensor | None, image: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, eps: float, parts: int
) -> list[Tensor]:
    """weights: those of image's q and k, after text's if there is text."""
    out = [image.new_empty(_shape(text, image, weights, parts)) for _ in range(parts)]
    addresses = (*(tensor.data_ptr() for tensor in out), *(None,) * (3 - parts))
    _launch("convrot_norm_rope", text, image, weights, cos, sin, eps, out[0].shape, addresses)
    return out


def _run_fp8(
    text: Tensor | None, image: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q, k, v e4m3 (B, S, H, D), scale of v fp32 (B,); weights as in _run."""
    shape = _shape(text, image, weights, 3)
    q, k, v = (image.new_empty(shape, dtype=FP8) for _ in range(3))
    v_scale, most = (image.new_empty(size, dtype=torch.float32) for size in (shape[:1], shape[:2]))
    if q.numel() == 0:
        return q, k, v, v_scale.fill_(SCALE_FLOOR)
    addresses = tuple(tensor.data_ptr() for tensor in (q, k, v, v_scale, most))
    _launch("convrot_norm_rope_fp8", text, image, weights, cos, sin, eps, q.shape, addresses)
    return q, k, v, v_scale


def _shape(text: Tensor | None, image: Tensor, weights: tuple[Tensor, ...], parts: int) -> tuple[int, ...]:
    """(B, S, H, D) of a result."""
    d, tokens = weights[0].shape[0], image.shape[1] + (0 if text is None else text.shape[1])
    return image.shape[0], tokens, image.shape[2] // (parts * d), d


def _launch(
    name: str,
    text: Tensor | None,
    image: Tensor,
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    shape: torch.Size,
    out: tuple[int | None, ...],
) -> None:
    """`shape` (B, S, H, D) of each result; `out`: addresses of what is written."""
    if shape.numel() == 0:
        return
    _, ours = library.of(image.device)
    with torch.cuda.device(image.device):
        streams = [None if x is None else _readable(x) for x in (text, image)]
        if len({weight.dtype for weight in weights}) > 1:
            weights = tuple(weight.float() for weight in weights)
        weights = tuple(ready(weight) for weight in weights)
        cos, sin = ready(cos.float()), ready(sin.float())
        pointers = [weight.data_ptr() for weight in weights]
        ours.call(
            name,
            *(value for x in streams for value in _stream(x)),
            *(
                DTYPES[image.dtype],
                *(pointers if text is not None else (None, None, *pointers)),
                DTYPES[weights[0].dtype],
            ),
            *(cos.data_ptr(), sin.data_ptr(), *out),
            *(shape[0], 0 if text is None else text.shape[1], image.shape[1], shape[2], shape[3], eps),
            torch.cuda.current_stream().cuda_stream,
        )


def _stream(x: Tensor | None) -> tuple[int | None, int, int]:
    return (None, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def norm_rope(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(B, S, 2 H D) -> q, k (B, S, H, D)."""
    q, k = _run(None, x, (q_weight, k_weight), cos, sin, eps, 2)
    return q, k


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
    q, k, v = _run(text, image, (text_q_weight, text_k_weight, q_weight, k_weight), cos, sin, eps, 3)
    return q, k, v


def norm_rope_fp8(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, S, 3 H D) -> q, k, v e4m3 (B, S, H, D), scale of v (B,)."""
    return _run_fp8(None, x, (q_weight, k_weight), cos, sin, eps)


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
    return _run_fp8(text, image, (text_q_weight, text_k_weight, q_weight, k_weight), cos, sin, eps)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """e4m3 (B, S, H, D) -> (B, S, H, D): cuDNN's product, which Hopper gives in e4m3, times v_scale."""
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    if out.numel() == 0:
        return out
    _, ours = library.of(q.device)
    with torch.cuda.device(q.device):
        narrow, v_scale = cudnn.attend(*map(ready, (q, k, v))), ready(v_scale)
        batch, stream = q.shape[0], torch.cuda.current_stream().cuda_stream
        addresses = narrow.data_ptr(), v_scale.data_ptr(), out.data_ptr()
        ours.call("convrot_widen_fp8", *addresses, DTYPES[out_dtype], batch, out.numel() // batch, stream)
    return out
