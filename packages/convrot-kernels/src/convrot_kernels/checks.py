"""What every op accepts and what it returns: the only file that raises ValueError for the input of an op.

One helper per rule; a message names op, rule, value and remedy. One function per op, of the op's own name and
arguments, applies the rules and returns the shape and dtype of each result: they follow from the arguments alone.
Nothing here reads the contents of a tensor, so the same functions serve fake tensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from convrot_kernels.layouts import LAYOUTS
from convrot_kernels.reference import FP8, GROUP_SIZES, QMAX, SCALE_RULES

WEIGHT_RULES, ROUNDINGS = ("absmax", "mse"), ("nearest", "balanced")
HEAD_SIZES = (16, 32, 64, 128, 256)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Result(NamedTuple):
    """Shape and dtype of one result."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _fail(op: str, rule: str, got: str, remedy: str) -> NoReturn:
    raise ValueError(f"{op}: {rule}, got {got}; {remedy}")


# rules


def _check_float(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            remedy = f"convert it with {name}.to(torch.bfloat16)"
            _fail(op, f"{name} must be float16, bfloat16 or float32", str(tensor.dtype), remedy)


def _check_rank(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            _fail(op, f"{name} must have at least one dimension, the last one K", "a scalar", "pass a shape (..., K)")


def _check_device(op: str, **tensors: Tensor | None) -> None:
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in given.items())
        _fail(op, "all tensors must be on one device", got, f"move them with .to({str(next(iter(given.values())))!r})")


def _check_input(op: str, **tensors: Tensor) -> None:
    """What holds for every floating-point input: a rank, a dtype and one device."""
    _check_rank(op, **tensors)
    _check_float(op, **tensors)
    _check_device(op, **tensors)


def _check_shape(op: str, name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        wanted = " or ".join(str(tuple(shape)) for shape in allowed)
        _fail(op, f"{name} must have the shape {wanted}", str(tuple(tensor.shape)), f"reshape or slice {name}")


def _check_per_batch(op: str, name: str, vector: Tensor, shape: tuple[int, ...]) -> None:
    """(C,), or (B, C) where the input is (B, ..., C)."""
    batched = [(shape[0], shape[-1])] if len(shape) > 1 else []
    _check_shape(op, name, vector, (shape[-1],), *batched)


def _check_same_dtype(op: str, **tensors: Tensor) -> None:
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        first, *_, last = tensors
        _fail(op, f"{' and '.join(tensors)} must have one dtype", got, f"convert with {last}.to({first}.dtype)")


def _check_group(op: str, k: int, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        _fail(op, f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}", str(group_size), "use 256")
    if k == 0 or k % group_size:
        fitting = [size for size in GROUP_SIZES if k and k % size == 0 and size < group_size]
        remedy = f"use group_size={fitting[-1]}" if fitting else "pad K with zeros to a multiple of 16"
        _fail(op, "K must be a multiple of group_size", f"K={k}, group_size={group_size}", remedy)


def _check_quantizer(op: str, bits: int, packed: bool, rule: str, clip: float) -> None:
    if bits not in QMAX:
        _fail(op, "bits must be 4 or 8", str(bits), "use bits=4")
    if packed and bits != 4:
        _fail(op, "packed codes need bits=4", f"bits={bits}", "use packed=False")
    if rule not in SCALE_RULES:
        _fail(op, f"rule must be one of {', '.join(SCALE_RULES)}", repr(rule), 'use rule="absmax"')
    if not 0 < clip <= 1:
        _fail(op, "clip must be above 0 and at most 1", str(clip), "use clip=1.0 for no clipping")


def _check_codes(op: str, name: str, codes: Tensor) -> None:
    if codes.dtype not in (torch.int8, torch.uint8):
        rule = f"{name} must be int8 codes or uint8 packed codes"
        _fail(op, rule, str(codes.dtype), f"quantize {name} with rotate_quantize, or view I8 files as torch.uint8")


def _check_written(op: str, out: Tensor) -> None:
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        _fail(op, "out must be contiguous in its last dimension", f"stride {out.stride(-1)}", "slice rows or columns")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        _fail(op, "rows of out must not share memory", f"strides {out.stride()}", "expand with .repeat() or .clone()")
    _check_no_gradient(op, out=out)


def _check_no_gradient(op: str, **tensors: Tensor) -> None:
    """Of what is written to, and of tensors in lists, which autograd does not see."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            _fail(op, f"{name} must not require grad", "requires_grad=True", f"use torch.no_grad() or {name}.detach()")


def _check_layout(op: str, layout: str) -> None:
    if layout not in LAYOUTS:
        remedy = 'use "row_major", or ask preferred_layout(device)'
        _fail(op, f"the layout must be one of {', '.join(LAYOUTS)}", repr(layout), remedy)


def _check_scale(op: str, name: str, scale: Tensor | None, shape: tuple[int, ...]) -> None:
    if scale is None:
        _fail(op, f"{name} is required here", "None", "pass the fp32 scale that rotate_quantize returned")
    if scale.dtype != torch.float32:
        _fail(op, f"{name} must be float32", str(scale.dtype), f"convert it with {name}.float()")
    _check_shape(op, name, scale, shape)


def _columns(codes: Tensor) -> int:
    return codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)


# ops: `options` are the arguments that all quantizing ops share, from group_size on


def rotate(x: Tensor, group_size: int = 256) -> tuple[Result, ...]:
    _check_input("rotate", x=x)
    _check_group("rotate", x.shape[-1], group_size)
    return (Result(tuple(x.shape), x.dtype),)


def _quantized(
    op: str,
    shape: tuple[int, ...],
    group_size: int = 256,
    bits: int = 4,
    *,
    packed: bool = False,
    rule: str = "absmax",
    clip: float = 1.0,
) -> tuple[Result, ...]:
    *rows, k = shape
    _check_group(op, k, group_size)
    _check_quantizer(op, bits, packed, rule, clip)
    codes = Result((*rows, k // 2), torch.uint8) if packed else Result((*rows, k), torch.int8)
    return codes, Result(tuple(rows), torch.float32)


def rotate_quantize(x: Tensor, *options: int, **more: Any) -> tuple[Result, ...]:
    _check_input("rotate_quantize", x=x)
    return _quantized("rotate_quantize", tuple(x.shape), *options, **more)


def rotate_quantize_gelu(x: Tensor, *options: int, **more: Any) -> tuple[Result, ...]:
    _check_input("rotate_quantize_gelu", x=x)
    return _quantized("rotate_quantize_gelu", tuple(x.shape), *options, **more)


def rotate_quantize_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *options: int, **more: Any
) -> tuple[Result, ...]:
    op = "rotate_quantize_modulate"
    _check_input(op, x=x, scale=scale, shift=shift)
    _check_per_batch(op, "scale", scale, tuple(x.shape))
    _check_shape(op, "shift", shift, tuple(scale.shape))
    if not eps > 0:
        _fail(op, "eps must be positive", str(eps), "use eps=1e-6")
    return _quantized(op, tuple(x.shape), *options, **more)


def rotate_quantize_silu_mul(x: Tensor, y: Tensor, *options: int, **more: Any) -> tuple[Result, ...]:
    op = "rotate_quantize_silu_mul"
    _check_input(op, x=x, y=y)
    _check_shape(op, "y", y, tuple(x.shape))
    _check_same_dtype(op, x=x, y=y)
    return _quantized(op, tuple(x.shape), *options, **more)


def rotate_quantize_cat_gelu(
    x: Tensor, y: Tensor, group_size: int = 256, *options: int, **more: Any
) -> tuple[Result, ...]:
    op = "rotate_quantize_cat_gelu"
    _check_input(op, x=x, y=y)
    _check_shape(op, "y", y, (*x.shape[:-1], y.shape[-1]))
    _check_same_dtype(op, x=x, y=y)
    _check_group(op, x.shape[-1], group_size)
    return _quantized(op, (*x.shape[:-1], x.shape[-1] + y.shape[-1]), group_size, *options, **more)


def _product(
    op: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    layout: str,
    **more: Tensor,
) -> tuple[int, ...]:
    """The rules that all matrix products share -> the shape (..., N) of the result."""
    _check_rank(op, a=a)
    _check_layout(op, layout)
    _check_codes(op, "b", b)
    _check_float(op, bias=bias, **more)
    _check_device(op, a=a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias, **more)
    if b.dim() != 2:
        _fail(op, "b must be a matrix (N, K)", f"{b.dim()} dimensions", "flatten it or pass one matrix at a time")
    if _columns(a) != _columns(b):
        got = f"K={_columns(a)} of a, K={_columns(b)} of b"
        _fail(op, "a and b must have the same K", got, "uint8 means packed: two columns a byte")
    rows, n = tuple(a.shape[:-1]), b.shape[0]
    if a.dtype not in FLOATS:
        _check_codes(op, "a", a)
        _check_scale(op, "a_scale", a_scale, rows)
    elif a_scale is not None:
        _fail(op, "values take no a_scale", f"a {a.dtype} with a_scale", "pass a_scale=None, or codes as a")
    _check_scale(op, "b_scale", b_scale, (n,))
    if bias is not None:
        _check_shape(op, "bias", bias, (n,))
    return (*rows, n)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    b_layout: str = "row_major",
) -> tuple[Result, ...]:
    return (_returned("scaled_mm", a, b, a_scale, b_scale, bias, out_dtype, b_layout),)


def _returned(
    op: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    layout: str,
) -> Result:
    """Of a product that is not written into a tensor of the caller's."""
    shape = _product(op, a, b, a_scale, b_scale, bias, layout)
    dtype = out_dtype or (a.dtype if a.dtype in FLOATS else torch.bfloat16)
    if dtype not in FLOATS:
        _fail(op, "out_dtype must be float16, bfloat16 or float32", str(dtype), "use torch.bfloat16")
    return Result(shape, dtype)


def scaled_mm_out(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    b_layout: str = "row_major",
) -> tuple[Result, ...]:
    op = "scaled_mm_out"
    _check_shape(op, "out", out, _product(op, a, b, a_scale, b_scale, bias, b_layout, out=out))
    _check_written(op, out)
    return ()


def scaled_mm_cat(
    a: Tensor,
    b: Sequence[Tensor],
    a_scale: Tensor | None,
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    out_dtype: torch.dtype | None = None,
    *,
    b_layout: str = "row_major",
) -> tuple[Result, ...]:
    op = "scaled_mm_cat"
    if not b:
        _fail(op, "b must hold at least one weight", "none", "pass the weights that meet a")
    for name, vectors in (("b_scale", b_scale), *([("bias", bias)] if bias else [])):
        if len(vectors) != len(b):
            _fail(op, f"{name} must hold one vector for each weight", f"{len(vectors)} for {len(b)}", "pass as many")
    _check_no_gradient(op, **{f"b_scale[{i}]": scale for i, scale in enumerate(b_scale)})
    _check_no_gradient(op, **{f"bias[{i}]": vector for i, vector in enumerate(bias)})
    (*rows, n), dtype = _returned(op, a, b[0], a_scale, b_scale[0], bias[0] if bias else None, out_dtype, b_layout)
    for i in range(1, len(b)):
        vector = bias[i] if bias else None
        if not _is_alike(b[i], b_scale[i], vector, b[0], bias[0] if bias else None):  # says why, or that it fits too
            _product(f"{op}, weight {i}", a, b[i], a_scale, b_scale[i], vector, b_layout)
            for name, tensors in (("b", b), *([("bias", bias)] if bias else [])):
                if tensors[i].dtype != tensors[0].dtype:
                    got = f"{name}[0] {tensors[0].dtype}, {name}[{i}] {tensors[i].dtype}"
                    _fail(op, f"{name} must be of one dtype", got, "multiply those of another in a call of their own")
        n += b[i].shape[0]
    return (Result((*rows, n), dtype),)


def _is_alike(b: Tensor, b_scale: Tensor, bias: Tensor | None, first: Tensor, first_bias: Tensor | None) -> bool:
    """Whether a weight is as good as the first, which was checked: quickly, for a step has many."""
    width, device, vectors = (b.shape[0],), first.device, [(b_scale, torch.float32)]
    if bias is not None and first_bias is not None:
        vectors.append((bias, first_bias.dtype))
    return (
        b.dtype == first.dtype
        and b.dim() == 2
        and b.shape[1] == first.shape[1]
        and b.device == device
        and all(v.dtype == dtype and v.shape == width and v.device == device for v, dtype in vectors)
    )


def scaled_mm_gate_residual(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    b_layout: str = "row_major",
) -> tuple[Result, ...]:
    op = "scaled_mm_gate_residual"
    shape = _product(op, a, b, a_scale, b_scale, bias, b_layout, gate=gate, residual=residual)
    _check_shape(op, "residual", residual, shape)
    _check_per_batch(op, "gate", gate, shape)
    return (Result(shape, residual.dtype),)


_JOINT_WEIGHTS = ("text_q_weight", "text_k_weight", "q_weight", "k_weight")


def _norm_rope(
    op: str, parts: int, sources: dict[str, Tensor], weights: dict[str, Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Result, ...]:
    """The rules of all norm_rope ops; sources (B, S, parts * H * D) follow one another in S."""
    name, first = next(iter(sources.items()))
    d = next(iter(weights.values())).shape[-1:].numel()
    _check_float(op, **sources, **weights, cos=cos, sin=sin)
    _check_device(op, **sources, **weights, cos=cos, sin=sin)
    _check_same_dtype(op, **sources)
    for source, x in sources.items():
        if x.dim() != 3:
            _fail(op, f"{source} must be (batch, tokens, columns)", f"{x.dim()} dimensions", "unsqueeze or flatten it")
        _check_shape(op, source, x, (first.shape[0], x.shape[1], first.shape[2]))
    if d not in HEAD_SIZES:
        rule = f"a head must have {', '.join(map(str, HEAD_SIZES))} columns"
        _fail(op, rule, str(d), "leave norm and rotary embedding to PyTorch")
    if first.shape[2] == 0 or first.shape[2] % (parts * d):
        rule = f"{name} must hold {parts} parts of whole heads of {d} columns"
        _fail(op, rule, f"{first.shape[2]} columns", f"pass q, k{' and v' if parts == 3 else ''} side by side")
    tokens = sum(x.shape[1] for x in sources.values())
    for vector, weight in weights.items():
        _check_shape(op, vector, weight, (d,))
    for table, values in (("cos", cos), ("sin", sin)):
        _check_shape(op, table, values, (tokens, d))
    if not eps > 0:
        _fail(op, "eps must be positive", str(eps), "use eps=1e-6")
    return (Result((first.shape[0], tokens, first.shape[2] // (parts * d), d), first.dtype),) * parts


def norm_rope(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Result, ...]:
    return _norm_rope("norm_rope", 2, {"x": x}, {"q_weight": q_weight, "k_weight": k_weight}, cos, sin, eps)


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
) -> tuple[Result, ...]:
    weights = dict(zip(_JOINT_WEIGHTS, (text_q_weight, text_k_weight, q_weight, k_weight), strict=True))
    return _norm_rope("norm_rope_joint", 3, {"text": text, "image": image}, weights, cos, sin, eps)


def _as_fp8(results: tuple[Result, ...]) -> tuple[Result, ...]:
    """q, k and v -> the same in e4m3, and the scale of v."""
    shape = results[0].shape
    return (*(Result(shape, FP8) for _ in results), Result(shape[:1], torch.float32))


def norm_rope_fp8(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Result, ...]:
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    return _as_fp8(_norm_rope("norm_rope_fp8", 3, {"x": x}, weights, cos, sin, eps))


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
) -> tuple[Result, ...]:
    weights = dict(zip(_JOINT_WEIGHTS, (text_q_weight, text_k_weight, q_weight, k_weight), strict=True))
    return _as_fp8(_norm_rope("norm_rope_joint_fp8", 3, {"text": text, "image": image}, weights, cos, sin, eps))


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> tuple[Result, ...]:
    op = "attention_fp8"
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.dtype != FP8:
            _fail(op, f"{name} must be float8_e4m3fn", str(tensor.dtype), "norm_rope_fp8 makes q, k and v")
    _check_device(op, q=q, k=k, v=v, v_scale=v_scale)
    if q.dim() != 4:
        _fail(op, "q must be (batch, tokens, heads, columns)", f"{q.dim()} dimensions", "unflatten its last one")
    _check_shape(op, "k", k, (q.shape[0], k.shape[1] if k.dim() == 4 else 1, *q.shape[2:]))
    _check_shape(op, "v", v, tuple(k.shape))
    if q.shape[3] not in HEAD_SIZES:
        rule = f"a head must have {', '.join(map(str, HEAD_SIZES))} columns"
        _fail(op, rule, str(q.shape[3]), "keep attention in 16 bits")
    if q.shape[1] > 0 and k.shape[1] == 0:
        _fail(op, "every token must have keys to attend to", "no token in k", "pass keys and values")
    if v_scale.dtype != torch.float32:
        _fail(op, "v_scale must be float32", str(v_scale.dtype), "convert it with v_scale.float()")
    _check_shape(op, "v_scale", v_scale, (q.shape[0],))
    if out_dtype not in FLOATS:
        _fail(op, "out_dtype must be float16, bfloat16 or float32", str(out_dtype), "use torch.bfloat16")
    return (Result(tuple(q.shape), out_dtype),)


def low_rank_down(
    x: Tensor,
    down: Sequence[Tensor],
    y: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gelu: bool = False,
) -> tuple[Result, ...]:
    op = "low_rank_down"
    terms = {f"down[{i}]": term for i, term in enumerate(down)}
    _check_rank(op, x=x)
    _check_float(op, x=x, y=y, scale=scale, shift=shift, **terms)
    _check_no_gradient(op, **terms)
    _check_device(op, x=x, y=y, scale=scale, shift=shift, **terms)
    k = x.shape[-1]
    if gelu + (y is not None) + (scale is not None or shift is not None) > 1:
        _fail(op, "x is changed in one way at most", "two of gelu, y, and scale with shift", "leave one out")
    if y is not None:
        _check_same_dtype(op, x=x, y=y)
        _check_shape(op, "y", y, (*x.shape[:-1], y.shape[-1]))
        k += y.shape[-1]
    if (scale is None) != (shift is None):
        _fail(op, "scale and shift come together", "one of them", "pass both or none")
    if scale is not None and shift is not None:
        _check_per_batch(op, "scale", scale, tuple(x.shape))
        _check_shape(op, "shift", shift, tuple(scale.shape))
        if not eps > 0:
            _fail(op, "eps must be positive", str(eps), "use eps=1e-6")
    for name, term in terms.items():
        if term.dim() != 2:
            _fail(op, f"{name} must be a matrix (r, K)", f"{term.dim()} dimensions", "pass the weight of a linear")
        _check_shape(op, name, term, (term.shape[0], k))
    return (Result((*x.shape[:-1], sum(term.shape[0] for term in down)), x.dtype),)


def low_rank_up(
    out: Tensor,
    low: Tensor,
    up: Sequence[Tensor],
    columns: Sequence[int],
    alpha: Sequence[float],
    gate: Tensor | None = None,
) -> tuple[Result, ...]:
    op = "low_rank_up"
    terms = {f"up[{i}]": term for i, term in enumerate(up)}
    _check_rank(op, out=out)
    _check_float(op, out=out, low=low, gate=gate, **terms)
    _check_no_gradient(op, **terms)
    _check_device(op, out=out, low=low, gate=gate, **terms)
    _check_same_dtype(op, out=out, low=low)
    if not len(up) == len(columns) == len(alpha):
        got = f"{len(up)} up, {len(columns)} columns, {len(alpha)} alpha"
        _fail(op, "each term has one column and one alpha", got, "leave columns and alpha out for 0 and 1")
    for (name, term), column in zip(terms.items(), columns, strict=True):
        if term.dim() != 2:
            _fail(op, f"{name} must be a matrix (n, r)", f"{term.dim()} dimensions", "pass the weight of a linear")
        if not 0 <= column <= out.shape[-1] - term.shape[0]:
            got = f"{term.shape[0]} columns from {column} on, N={out.shape[-1]}"
            _fail(op, f"{name} must lie within the columns of out", got, "columns holds the first column of each")
    _check_shape(op, "low", low, (*out.shape[:-1], sum(term.shape[1] for term in up)))
    if gate is not None:
        _check_per_batch(op, "gate", gate, tuple(out.shape))
    _check_written(op, out)
    return ()


def pack_int4(codes: Tensor) -> tuple[Result, ...]:
    op = "pack_int4"
    _check_rank(op, codes=codes)
    if codes.dtype != torch.int8:
        _fail(op, "codes must be int8", str(codes.dtype), "convert them with codes.to(torch.int8)")
    if codes.shape[-1] % 2:
        _fail(op, "K must be even, two codes a byte", f"K={codes.shape[-1]}", "pad K with one zero code")
    return (Result((*codes.shape[:-1], codes.shape[-1] // 2), torch.uint8),)


def unpack_int4(packed: Tensor) -> tuple[Result, ...]:
    op = "unpack_int4"
    _check_rank(op, packed=packed)
    if packed.dtype != torch.uint8:
        _fail(op, "packed must be uint8", str(packed.dtype), "view I8 files with packed.view(torch.uint8)")
    return (Result((*packed.shape[:-1], packed.shape[-1] * 2), torch.int8),)


def weight_layout(op: str, weight: Tensor, layout: str) -> None:
    """The rules of prepare_weight and restore_weight, which are functions, not ops."""
    _check_layout(op, layout)
    _check_codes(op, "weight", weight)
    if weight.dim() != 2:
        _fail(op, "weight must be a matrix", f"{weight.dim()} dimensions", "pass codes (N, K) or packed (N, K/2)")


def quantize_weight(weight: Tensor, group_size: int, bits: int, packed: bool, rule: str, rounding: str) -> None:
    """The rules of quantize_weight, a function as well."""
    op = "quantize_weight"
    if weight.dim() != 2:
        _fail(op, "weight must be a matrix", f"{weight.dim()} dimensions", "pass a weight (N, K)")
    _check_float(op, weight=weight)
    _check_group(op, weight.shape[1], group_size)
    _check_quantizer(op, bits, packed, "absmax", 1.0)
    if rule not in WEIGHT_RULES:
        _fail(op, f"rule must be one of {', '.join(WEIGHT_RULES)}", repr(rule), 'use rule="absmax"')
    if rounding not in ROUNDINGS:
        _fail(op, f"rounding must be one of {', '.join(ROUNDINGS)}", repr(rounding), 'use rounding="nearest"')
    if rule == "mse" and bits != 4:
        _fail(op, 'rule="mse" needs bits=4', f"bits={bits}", 'use rule="absmax", whose 8-bit scales are as good')
