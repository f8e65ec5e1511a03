"""scaled_mm, its _out, _cat and _gate_residual on the compiled library.

Every shape runs: `variants.pick` names a GEMM, else the GEMV does the product (fp32 output, few rows, 16-bit values,
extents off the GEMM's multiples). Operands are padded, packed codes widened and buffers copied only where a kernel
needs it; with the codes and the layout that `preferred_codes` and `preferred_layout` name, nothing is.
"""

from collections.abc import Sequence
from ctypes import c_int, c_void_p
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.variants import GEMV_ROWS, MAX_K, GemmVariant, pick
from convrot_kernels.layouts import LAYOUTS

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in abi.h
BLOCKS = "blocks16x32"  # the layout that sm_90a's kernels read
_CODES = 3  # the GEMV's x is int8
_REORDERED, _PACKED, _BYTES = 0, 1, 2  # the GEMV's weight formats
_OUT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ALIGNMENT = 16  # bytes: one vector load, and what a tensor map needs


def preferred_codes(device: torch.device) -> str:
    """packed where s4 tensor cores read both operands (8.x), else int8, which wgmma and mma.sync s8 read."""
    return "packed" if torch.cuda.get_device_capability(device)[0] == 8 else "int8"


def preferred_layout(device: torch.device) -> str:
    """The order of a Hopper fragment on 9.0, else files' own."""
    return BLOCKS if torch.cuda.get_device_capability(device)[0] == 9 else "row_major"


class _Weight(NamedTuple):
    codes: Tensor
    reordered: bool


class _Epilogue(NamedTuple):
    """What follows the sum; gate and residual belong to the rows at hand."""

    a_scale: Tensor | None
    b_scale: Tensor
    bias: Tensor | None
    gate: Tensor | None = None
    residual: Tensor | None = None


def ready(tensor: Tensor) -> Tensor:
    """Contiguous and aligned: the tensor itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _rows_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0 and tensor.stride(0) * tensor.element_size() % _ALIGNMENT == 0


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]


def _unpack(packed: Tensor, ours: library.Library, stream: int) -> Tensor:
    """Packed (R, C/2), C a multiple of 32 -> int8 (R, C), for a kernel that reads bytes."""
    codes = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int8, device=packed.device)
    ours.call("convrot_unpack", packed.data_ptr(), codes.data_ptr(), packed.numel() // 8, stream)
    return codes


def _padded(codes: Tensor) -> Tensor:
    """K to a multiple of 32 with zero codes, which add nothing to a sum."""
    step = 16 if codes.dtype == torch.uint8 else 32
    missing = -codes.shape[1] % step if codes.shape[1] else step
    return F.pad(codes, (0, missing)) if missing else codes


def _weight(b: Tensor, layout: str, arch: str) -> _Weight:
    n, k = b.shape[0], 2 * b.shape[1]
    if layout == BLOCKS and b.dtype == torch.uint8 and n % 16 == 0 and k % 32 == 0:
        if arch == "sm_90a":
            return _Weight(ready(b), True)
        layout, b = "row_major", LAYOUTS[BLOCKS].restore(b)
    return _Weight(ready(_padded(LAYOUTS[layout].restore(b))), False)


def _choose(
    m: int, weight: _Weight, x: Tensor, out: Tensor, arch: str, ours: library.Library, stream: int
) -> tuple[GemmVariant | None, Tensor, Tensor]:
    """-> (variant or None, weight codes, x codes), each in the form that the variant or the GEMV reads."""
    codes = weight.codes
    n, k, kind = codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1), _OUT[out.dtype]
    if codes.dtype == x.dtype == torch.uint8 and (found := pick(m, n, k, arch, "s4", "s4", kind)):
        return found, codes, x
    if x.dtype == torch.uint8:
        x = _unpack(x, ours, stream)
    if codes.dtype == torch.uint8 and (found := pick(m, n, k, arch, "s4", "s8", kind)):
        if not weight.reordered:  # a weight that was not prepared: right, and slow
            codes = ready(LAYOUTS[BLOCKS].prepare(codes))
        return found, codes, x
    if found := pick(m, n, k, arch, "s8", "s8", kind):
        if codes.dtype == torch.uint8 and weight.reordered:
            codes = LAYOUTS[BLOCKS].restore(codes)
        return found, _unpack(codes, ours, stream) if codes.dtype == torch.uint8 else codes, x
    return None, codes, x


def _gemm(
    variant: GemmVariant, ours: library.Library, weight: Tensor, x: Tensor, out: Tensor, e: _Epilogue, stream: int
) -> None:
    bias, gate = e.bias, e.gate
    if variant.template == "sm80":  # its broadcasts are fp32
        bias, gate = (vector if vector is None else vector.float() for vector in (bias, gate))
    index = library.index_of(out.device)
    ours.call(
        variant.name,
        *(weight.data_ptr(), x.data_ptr(), _address(e.a_scale), e.b_scale.data_ptr()),
        *(_address(bias), _dtype(bias), _address(gate), _dtype(gate)),
        *(_address(e.residual), 0 if e.residual is None else e.residual.stride(0), out.data_ptr(), out.stride(0)),
        *(*out.shape, x.shape[1] * (2 if x.dtype == torch.uint8 else 1), index, library.sm_count(index), stream),
    )


def _format(weight: _Weight) -> int:
    return _BYTES if weight.codes.dtype == torch.int8 else _REORDERED if weight.reordered else _PACKED


def _gemv(ours: library.Library, weight: _Weight, x: Tensor, out: Tensor, e: _Epilogue, stream: int) -> None:
    ours.call(
        "convrot_gemv",
        *(weight.codes.data_ptr(), _format(weight), x.data_ptr(), DTYPES.get(x.dtype, _CODES)),
        *(
            _address(e.a_scale),
            e.b_scale.data_ptr(),
            _address(e.bias),
            _dtype(e.bias),
            _address(e.gate),
            _dtype(e.gate),
        ),
        *(_address(e.residual), 0 if e.residual is None else e.residual.stride(0)),
        *(out.data_ptr(), DTYPES[out.dtype], out.stride(0), *out.shape, x.shape[1], stream),
    )


def _product(
    out: Tensor, x: Tensor, weight: _Weight, e: _Epilogue, arch: str, ours: library.Library, stream: int
) -> None:
    """out (M, N), rows at any stride."""
    if x.is_floating_point():
        return _gemv(ours, weight, x, out, e, stream)
    variant, codes, x = _choose(out.shape[0], weight, x, out, arch, ours, stream)
    if variant is None:
        return _gemv(ours, weight, x, out, e, stream)
    residual = e.residual if e.residual is None or _rows_aligned(e.residual) else ready(e.residual)
    target = out if _rows_aligned(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    # CUTLASS puts an fp32 residual into registers of the accumulator's type, int32: added afterwards, to the same bits
    apart = residual if out.dtype == torch.float32 else None
    _gemm(variant, ours, codes, x, target, e._replace(residual=None if apart is not None else residual), stream)
    if apart is not None:
        torch.add(target, apart, out=out)
    elif target is not out:
        out.copy_(target)


def _multiply(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    bias: Tensor | None,
    layout: str,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """out (M, N); residual (M, N); gate (N,) or (B, N) with M a multiple of B: one launch a sample."""
    m, n = out.shape
    if m == 0 or n == 0:
        return
    if not a.is_floating_point() and a.shape[-1] * (2 if a.dtype == torch.uint8 else 1) > MAX_K:
        raise library.KernelError(
            f"scaled_mm: codes of at most K={MAX_K} here; use_backend('reference') sums wider rows"
        )
    arch, ours = library.of(out.device)
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream().cuda_stream
        x = ready(_padded(a.reshape(m, a.shape[-1])))
        weight = _weight(b, layout, arch)
        a_scale = None if a_scale is None else a_scale.reshape(-1).contiguous()
        shared = _Epilogue(None, b_scale.contiguous(), None if bias is None else bias.contiguous())
        samples = 1 if gate is None or gate.dim() == 1 else gate.shape[0]
        gates = None if gate is None else gate.contiguous().view(samples, n)
        step = m // samples
        for sample in range(samples):
            part = slice(sample * step, (sample + 1) * step)
            mine = shared._replace(
                a_scale=None if a_scale is None else a_scale[part],
                gate=None if gates is None else gates[sample],
                residual=None if residual is None else residual[part],
            )
            _product(out[part], ready(x[part]), weight, mine, arch, ours, stream)


def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """An output and its view (M, N)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    return out, out.view(out.shape[:-1].numel(), shape[-1])


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
    out, rows = _new((*a.shape[:-1], b.shape[0]), dtype, a.device)
    _multiply(rows, a, b, a_scale, b_scale, bias, b_layout)
    return out


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
    """scaled_mm written into out (..., N): in place where its rows have one stride, else through a copy."""
    assert b_scale is not None, "checks.py requires b_scale"
    rows = _as_rows(out)
    if rows is None:
        out.copy_(scaled_mm(a, b, a_scale, b_scale, bias, out.dtype, b_layout=b_layout))
    else:
        _multiply(rows, a, b, a_scale, b_scale, bias, b_layout)


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
    """(..., K) x (N1, K), (N2, K), ... -> (..., N1 + N2 + ...): on the GEMV in one launch, else one GEMM each."""
    biases: Sequence[Tensor | None] = bias or [None] * len(b)
    dtype = out_dtype or (a.dtype if a.is_floating_point() else torch.bfloat16)
    widths = [weight.shape[0] for weight in b]
    out, rows = _new((*a.shape[:-1], sum(widths)), dtype, a.device)
    m, k = len(rows), a.shape[-1] * (2 if a.dtype == torch.uint8 else 1)
    if a.is_floating_point() or (m <= GEMV_ROWS and k <= MAX_K):
        _gemv_joined(rows, a, b, a_scale, b_scale, bias, b_layout)
        return out
    for part, weight, scale, vector in zip(rows.split(widths, 1), b, b_scale, biases, strict=True):
        _multiply(part, a, weight, a_scale, scale, vector, b_layout)
    return out


def _gemv_joined(
    out: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    a_scale: Tensor | None,
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: str,
) -> None:
    """out (M, N1 + N2 + ...); neighbours whose codes are in one form share a launch."""
    arch, ours = library.of(out.device)
    members = [i for i, weight in enumerate(b) if weight.shape[0]]
    if not len(out):
        return
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream().cuda_stream
        x = ready(_padded(a.reshape(len(out), a.shape[-1])))
        x = _unpack(x, ours, stream) if x.dtype == torch.uint8 else x
        row_scale = None if a_scale is None else a_scale.reshape(-1).contiguous()
        weights = {i: _weight(b[i], layout, arch) for i in members}
        scales = {i: b_scale[i].contiguous() for i in members}
        biases = {i: bias[i].contiguous() if bias else None for i in members}
        column = 0
        for form, run in groupby(members, key=lambda i: _format(weights[i])):
            joined = list(run)
            widths = [b[i].shape[0] for i in joined]
            pointers = c_void_p * len(joined)
            ours.call(
                "convrot_gemv_joined",
                len(joined),
                pointers(*(weights[i].codes.data_ptr() for i in joined)),
                pointers(*(scales[i].data_ptr() for i in joined)),
                pointers(*(_address(biases[i]) for i in joined)),
                (c_int * len(joined))(*widths),
                *(form, x.data_ptr(), DTYPES.get(x.dtype, _CODES), _address(row_scale)),
                _dtype(bias[0] if bias else None),
                *(out[:, column:].data_ptr(), DTYPES[out.dtype], out.stride(0), len(out), x.shape[1], stream),
            )
            column += sum(widths)


def _as_rows(out: Tensor) -> Tensor | None:
    """(..., N) -> a view (M, N), or None where the leading dimensions have no common stride or N is not contiguous."""
    shape, strides = out.shape[:-1], out.stride()[:-1]
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        return None
    live = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    if any(stride != inner * size for (_, stride), (size, inner) in pairwise(live)):
        return None
    row = live[-1][1] if live else out.shape[-1]
    if shape.numel() and row < out.shape[-1]:
        return None
    return out.as_strided((shape.numel(), out.shape[-1]), (row, 1))


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
    out, rows = _new(tuple(residual.shape), residual.dtype, a.device)
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    _multiply(rows, a, b, a_scale, b_scale, bias, b_layout, gate, residual.reshape(rows.shape))
    return out
