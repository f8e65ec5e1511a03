"""norm_rope and norm_rope_joint on the compiled library: norm_rope.cu."""

import torch
from torch import Tensor

from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.products import DTYPES, ready

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
    d, tokens = weights[0].shape[0], image.shape[1] + (0 if text is None else text.shape[1])
    shape = (image.shape[0], tokens, image.shape[2] // (parts * d), d)
    out = [image.new_empty(shape) for _ in range(parts)]
    if out[0].numel() == 0:
        return out
    _, ours = library.of(image.device)
    with torch.cuda.device(image.device):
        streams = [None if x is None else _readable(x) for x in (text, image)]
        if len({weight.dtype for weight in weights}) > 1:
            weights = tuple(weight.float() for weight in weights)
        weights = tuple(ready(weight) for weight in weights)
        cos, sin = ready(cos.float()), ready(sin.float())
        pointers = [weight.data_ptr() for weight in weights]
        ours.call(
            "convrot_norm_rope",
            *(value for x in streams for value in _stream(x)),
            *(
                DTYPES[image.dtype],
                *(pointers if text is not None else (None, None, *pointers)),
                DTYPES[weights[0].dtype],
            ),
            *(cos.data_ptr(), sin.data_ptr(), *(tensor.data_ptr() for tensor in out), *(None,) * (3 - parts)),
            *(shape[0], 0 if text is None else text.shape[1], image.shape[1], shape[2], d, eps),
            torch.cuda.current_stream().cuda_stream,
        )
    return out


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
