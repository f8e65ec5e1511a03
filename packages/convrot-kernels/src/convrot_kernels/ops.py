"""The ops: schema, fake and implementation of each, registered with torch.library in the namespace `convrot`.

Every call goes checks.py -> dispatch.py -> a backend. The ops are opaque to torch.compile and safe under autocast.
`rotate` is differentiable (it is its own adjoint). The others are not: backward through them raises.

On a GPU, compiled code may take calls before they get here: backends/cutlass/binding.py. Its way back into Python is
the namespace `convrot_python`, which holds the same ops and is nobody else's.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from convrot_kernels import checks, dispatch
from convrot_kernels.layouts import LAYOUTS

_OPTIONS = "int group_size=256, int bits=4, *, bool packed=False, str rule='absmax', float clip=1.0"
_PAIR = "Tensor a, Tensor b, Tensor? a_scale=None, Tensor? b_scale=None, Tensor? bias=None"
_LAYOUT = "str b_layout='row_major'"
SCHEMAS = (
    "rotate(Tensor x, int group_size=256) -> Tensor",
    f"rotate_quantize(Tensor x, {_OPTIONS}) -> (Tensor, Tensor)",
    f"rotate_quantize_gelu(Tensor x, {_OPTIONS}) -> (Tensor, Tensor)",
    f"rotate_quantize_modulate(Tensor x, Tensor scale, Tensor shift, float eps=1e-6, {_OPTIONS}) -> (Tensor, Tensor)",
    f"rotate_quantize_silu_mul(Tensor x, Tensor y, {_OPTIONS}) -> (Tensor, Tensor)",
    f"rotate_quantize_cat_gelu(Tensor x, Tensor y, {_OPTIONS}) -> (Tensor, Tensor)",
    f"scaled_mm({_PAIR}, ScalarType? out_dtype=None, *, {_LAYOUT}) -> Tensor",
    f"scaled_mm_out(Tensor(a!) out, {_PAIR}, *, {_LAYOUT}) -> ()",
    "scaled_mm_cat(Tensor a, Tensor[] b, Tensor? a_scale, Tensor[] b_scale, Tensor[] bias, ScalarType? out_dtype=None, "
    f"*, {_LAYOUT}) -> Tensor",
    "scaled_mm_gate_residual(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, Tensor gate, "
    f"Tensor residual, *, {_LAYOUT}) -> Tensor",
    "norm_rope(Tensor x, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps=1e-6) -> (Tensor, Tensor)",
    "norm_rope_joint(Tensor text, Tensor image, Tensor text_q_weight, Tensor text_k_weight, Tensor q_weight, "
    "Tensor k_weight, Tensor cos, Tensor sin, float eps=1e-6) -> (Tensor, Tensor, Tensor)",
    "norm_rope_fp8(Tensor x, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps=1e-6) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "norm_rope_joint_fp8(Tensor text, Tensor image, Tensor text_q_weight, Tensor text_k_weight, Tensor q_weight, "
    "Tensor k_weight, Tensor cos, Tensor sin, float eps=1e-6) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_fp8(Tensor q, Tensor k, Tensor v, Tensor v_scale, ScalarType out_dtype=bfloat16) -> Tensor",
    "low_rank_down(Tensor x, Tensor[] down, Tensor? y=None, Tensor? scale=None, Tensor? shift=None, float eps=1e-6, *, "
    "bool gelu=False) -> Tensor",
    "low_rank_up(Tensor(a!) out, Tensor low, Tensor[] up, int[] columns, float[] alpha, Tensor? gate=None) -> ()",
    "pack_int4(Tensor codes) -> Tensor",
    "unpack_int4(Tensor packed) -> Tensor",
)

_WRITING = ("scaled_mm_out", "low_rank_up")
_REFUSE = "refuse_gradient(Tensor grad, Tensor input, str op) -> Tensor"

_LIBRARY = torch.library.Library("convrot", "DEF")
_PYTHON = torch.library.Library("convrot_python", "DEF")
_OPS = torch.ops.convrot


def _register(schema: str) -> None:
    """Define one op; its check in checks.py and its functions in the backends bear the name in the schema."""
    op = schema.partition("(")[0]
    check: Callable[..., tuple[checks.Result, ...]] = getattr(checks, op)

    def run(first: Tensor, *args: Any, **options: Any) -> Any:
        check(first, *args, **options)
        function = dispatch.select(op, first.device)
        with torch.no_grad(), _no_autocast(first.device.type):
            return function(first, *args, **options)

    def fake(first: Tensor, *args: Any, **options: Any) -> Any:
        results = [first.new_empty(shape, dtype=dtype) for shape, dtype in check(first, *args, **options)]
        return tuple(results) if len(results) > 1 else next(iter(results), None)

    results = schema.partition("->")[2].count("Tensor")

    def serve(first: Tensor, *args: Any, **options: Any) -> Any:
        from convrot_kernels.backends.cutlass import binding

        return binding.serve(run, results, first, args, options)

    # there, a str is the address of its text: torch loses memory over a str that compiled code hands to it
    twin = re.sub(r"str (\w+)(='\w+')?", r"int \1", schema)
    for lib, known_as, implementation in ((_LIBRARY, schema, run), (_PYTHON, twin, serve)):
        lib.define(known_as, tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"convrot::{op}", fake, lib=_LIBRARY)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would turn the fp32 products inside an op into 16-bit ones."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _save_group_size(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group_size = inputs[1]


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return rotate(grad, ctx.group_size), None


def _refuse_gradient(grad: Tensor, input: Tensor, op: str) -> Tensor:
    raise NotImplementedError(
        f"{op}: not differentiable, its codes are integers, got inputs that require grad; "
        "call it under torch.no_grad() or detach them"
    )


for _schema in SCHEMAS:
    _register(_schema)
torch.library.register_autograd("convrot::rotate", _rotate_backward, setup_context=_save_group_size, lib=_LIBRARY)
# an op, so that a compiled graph raises where it runs and not while it is traced
_PYTHON.define(_REFUSE, tags=(torch.Tag.pt2_compliant_tag,))
_PYTHON.impl("refuse_gradient", _refuse_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "convrot_python::refuse_gradient", lambda grad, input, op: torch.empty_like(input), lib=_PYTHON
)


class _NotDifferentiable(torch.autograd.Function):
    """An op whose backward raises. A formula in the dispatcher would cost a call into Python under no_grad too."""

    @staticmethod
    def forward(ctx: Any, op: str, options: dict[str, Any], *args: Any) -> Any:
        ctx.op = op
        ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in args))
        return getattr(_OPS, op).default(*args, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        refuse = torch.ops.convrot_python.refuse_gradient.default
        return None, None, *(refuse(grads[-1], arg, ctx.op) if needs else None for arg, needs in needed)


def _call(op: str, *args: Any, **options: Any) -> Any:
    """Run the op: with a backward that refuses where one could be asked for. An op that writes has none to ask for."""
    asks = torch.is_grad_enabled() and op not in _WRITING
    if asks and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return _NotDifferentiable.apply(op, options, *args)
    try:
        return getattr(_OPS, op).default(*args, **options)
    except RuntimeError as error:
        original = _original(error)
        if original is None:
            raise
    raise original  # outside of the block: what compiled code made of it is no part of its story


def _original(error: RuntimeError) -> BaseException | None:
    from convrot_kernels.backends.cutlass import binding

    return binding.original(error)


def rotate(x: Tensor, group_size: int = 256) -> Tensor:
    """(..., K) fp16, bf16 or fp32 -> (..., K), same dtype: every group of `group_size` columns times H.

    H is the regular Hadamard matrix over sqrt(group_size), group_size 16, 64, 256 or 1024. Its own inverse.
    Sums are at least fp32, rounded once to x.dtype. Differentiable.
    """
    return _OPS.rotate.default(x, group_size)


def rotate_quantize(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes int8 (..., K) or, packed, uint8 (..., K/2); scale fp32 (...).

    scale = max(clip * absmax(rotated row) / qmax, 1e-10), codes = clamp(round_half_even(rotated / scale), -qmax, qmax);
    qmax is 7 (bits=4) or 127 (bits=8). `packed` needs bits=4: low nibble = even column, two's complement.
    A row that holds inf or NaN, or whose rotation leaves fp32, gets scale NaN and codes 0.
    """
    return _call("rotate_quantize", x, group_size, bits, packed=packed, rule=rule, clip=clip)


def rotate_quantize_gelu(
    x: Tensor, group_size: int = 256, bits: int = 4, *, packed: bool = False, rule: str = "absmax", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(..., K) -> rotate_quantize(gelu(x)): tanh gelu in fp32, rounded once to x.dtype."""
    return _call("rotate_quantize_gelu", x, group_size, bits, packed=packed, rule=rule, clip=clip)


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
    """x (B, ..., K), scale and shift (B, K) or (K,) -> rotate_quantize(layer_norm(x) * (1 + scale) + shift).

    LayerNorm over K without affine part, variance in two passes; all in fp32, rounded once to x.dtype.
    """
    return _call(
        "rotate_quantize_modulate", x, scale, shift, eps, group_size, bits, packed=packed, rule=rule, clip=clip
    )


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
    """x, y (..., K), one dtype -> rotate_quantize(silu(x) * y), in fp32, rounded once to x.dtype."""
    return _call("rotate_quantize_silu_mul", x, y, group_size, bits, packed=packed, rule=rule, clip=clip)


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
    """x (..., K1), y (..., K2), one dtype -> rotate_quantize([x | gelu(y)]) over K = K1 + K2, one scale a row.

    K1 and K2 are multiples of group_size; gelu as in rotate_quantize_gelu.
    """
    return _call("rotate_quantize_cat_gelu", x, y, group_size, bits, packed=packed, rule=rule, clip=clip)


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
    """(..., K) x (N, K) -> (..., N): (acc * a_scale) * b_scale + bias, each step in fp32, then one rounding.

    a: int8 codes (..., K), uint8 packed codes (..., K/2), both with a_scale fp32 (...) and exact integer sums,
    or fp16, bf16, fp32 values (..., K) without a_scale and with fp32 sums. b: uint8 packed (N, K/2) or int8 (N, K)
    in the order `b_layout`, with b_scale fp32 (N,). bias (N,). out_dtype: default bf16 for codes, a.dtype for values.
    """
    return _call("scaled_mm", a, b, a_scale, b_scale, bias, out_dtype, b_layout=b_layout)


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
    """scaled_mm written into out (..., N), fp16, bf16 or fp32; out may be a slice of a larger tensor."""
    if _ask_for_gradients(out):
        checks.scaled_mm_out(out, a, b, a_scale, b_scale, bias, b_layout=b_layout)
    _call("scaled_mm_out", out, a, b, a_scale, b_scale, bias, b_layout=b_layout)
    _written(out)


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
    """(..., K) x weights (N1, K), (N2, K), ... of one dtype -> (..., N1 + N2 + ...): their scaled_mm side by side.

    b_scale: fp32 (N1,), (N2,), ...; bias: none, or one (N,) for each, of one dtype. Wherever the weights lie, few rows
    are multiplied with all of them at once.
    """
    b, b_scale, bias = list(b), list(b_scale), list(bias)
    if _ask_for_gradients(*b_scale, *bias):
        checks.scaled_mm_cat(a, b, a_scale, b_scale, bias, out_dtype, b_layout=b_layout)
    return _call("scaled_mm_cat", a, b, a_scale, b_scale, bias, out_dtype, b_layout=b_layout)


def _ask_for_gradients(*tensors: Tensor) -> bool:
    """Of what is written to and of tensors in lists: compiled code cannot ask, and autograd does not see them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _written(out: Tensor) -> None:
    """A kernel writes behind autograd's back."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)


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
) -> Tensor:
    """residual (B, ..., N), gate (B, N) or (N,) -> residual + gate * y, fp32, rounded once to residual.dtype.

    y is what scaled_mm computes from the other arguments, before its last rounding.
    """
    return _call("scaled_mm_gate_residual", a, b, a_scale, b_scale, bias, gate, residual, b_layout=b_layout)


def norm_rope(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x (B, S, 2 H D), q and k side by side -> q, k (B, S, H, D), x's dtype: what attention reads.

    RMSNorm of every head with q_weight, k_weight (D,), in fp32, rounded to x.dtype; then the rotary embedding of
    neighbouring pairs, y * cos + (-y1, y0, -y3, y2, ...) * sin, cos and sin (S, D), in fp32, rounded once.
    """
    return _call("norm_rope", x, q_weight, k_weight, cos, sin, eps)


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
    """text (B, T, 3 H D), image (B, I, 3 H D), q, k and v side by side -> q, k, v (B, T + I, H, D), text first.

    q and k as in norm_rope, each stream with its own weights, cos and sin (T + I, D); v is copied.
    """
    return _call("norm_rope_joint", text, image, text_q_weight, text_k_weight, q_weight, k_weight, cos, sin, eps)


def norm_rope_fp8(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, S, 3 H D), q, k and v side by side -> q, k, v e4m3 (B, S, H, D), v_scale fp32 (B,): attention_fp8's inputs.

    q and k as norm_rope makes them, but rounded last to e4m3 and not to x.dtype; what is beyond 448 becomes 448 (a head
    of 128 columns that RMSNorm leaves at weights below 39 has none). v is divided by v_scale = max(absmax (1 / 448),
    1e-10) of its sample.
    """
    return _call("norm_rope_fp8", x, q_weight, k_weight, cos, sin, eps)


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
    """text (B, T, 3 H D), image (B, I, 3 H D) -> q, k, v e4m3 (B, T + I, H, D), text first, v_scale fp32 (B,).

    As norm_rope_fp8, each stream with its own weights, cos and sin (T + I, D).
    """
    return _call("norm_rope_joint_fp8", text, image, text_q_weight, text_k_weight, q_weight, k_weight, cos, sin, eps)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, v_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q (B, S, H, D), k, v (B, T, H, D), e4m3, v_scale fp32 (B,) -> softmax(q k^T / sqrt(D)) v v_scale, (B, S, H, D).

    On a GPU by cuDNN, else BackendError: Hopper (newer ones were not tried) and nvidia-cudnn-frontend. Probabilities
    are rounded to e4m3 against the running maximum of their row, the result to e4m3 before v_scale.
    """
    return _call("attention_fp8", q, k, v, v_scale, out_dtype)


def low_rank_down(
    x: Tensor,
    down: Sequence[Tensor],
    y: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gelu: bool = False,
) -> Tensor:
    """x (..., K), down: matrices (r, K) -> (..., R), x.dtype: values @ down^T, one after the other, R the sum of the r.

    values: x; with `gelu` gelu(x); with y (..., K2) [x | gelu(y)], down (r, K + K2); with scale and shift, (B, K) or
    (K,), layer_norm(x) * (1 + scale) + shift: what rotate_quantize and its kin rotate, rounded once to x.dtype. So is
    down. Sums are fp32, rounded once.
    """
    down = list(down)
    if _ask_for_gradients(*down):
        checks.low_rank_down(x, down, y, scale, shift, eps, gelu=gelu)
    return _call("low_rank_down", x, down, y, scale, shift, eps, gelu=gelu)


def low_rank_up(
    out: Tensor,
    low: Tensor,
    up: Sequence[Tensor],
    columns: Sequence[int] | None = None,
    alpha: Sequence[float] | None = None,
    gate: Tensor | None = None,
) -> None:
    """out (B, ..., N), low (B, ..., R), one dtype; up: matrices (n, r), whose r add up to R; gate (B, N) or (N,).

    In turn for each up, with its first column c (default 0), its alpha (1) and the next r columns of low:
    out[..., c : c + n] += gate[c : c + n] * alpha * low @ up^T, up rounded to out's dtype, in fp32, rounded once.
    The last dimension of out is contiguous.
    """
    columns, alpha = list(columns or [0] * len(up)), list(alpha or [1.0] * len(up))
    if _ask_for_gradients(out, *up):
        checks.low_rank_up(out, low, up, columns, alpha, gate)
    _call("low_rank_up", out, low, list(up), columns, alpha, gate)
    _written(out)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 (..., K), K even, codes in [-8, 7] -> uint8 (..., K/2): low nibble = even column, two's complement.

    Contents are not checked: of a code outside the range the low four bits are kept.
    """
    return _OPS.pack_int4.default(codes)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (..., K/2) -> int8 (..., K): the inverse of pack_int4."""
    return _OPS.unpack_int4.default(packed)


def prepare_weight(weight: Tensor, layout: str) -> Tensor:
    """Row-major codes, int8 (N, K) or packed uint8 (N, K/2) -> the same codes in the resident order `layout`."""
    checks.weight_layout("prepare_weight", weight, layout)
    return LAYOUTS[layout].prepare(weight)


def restore_weight(weight: Tensor, layout: str) -> Tensor:
    """Codes in the resident order `layout` -> row-major, bit for bit what prepare_weight was given."""
    checks.weight_layout("restore_weight", weight, layout)
    return LAYOUTS[layout].restore(weight)
