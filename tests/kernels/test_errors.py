"""One row per rule: the call, and the whole message: op, rule, value, remedy."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import convrot_kernels as ck
from convrot_kernels.layouts import LAYOUTS
from convrot_kernels.testing import make_codes, make_scale

X = torch.ones(2, 256)
HALF = X.half()
A, B = make_codes(2, 256), ck.pack_int4(make_codes(8, 256))
SA, SB = make_scale(2), make_scale(8)
OUT, GATE, RESIDUAL = torch.zeros(2, 8), torch.ones(8), torch.zeros(2, 8)
META = X.to("meta")

FLOAT = "must be float16, bfloat16 or float32"
ERRORS: list[tuple[Callable[[], Any], str]] = [
    # rotation
    (
        lambda: ck.rotate_quantize(torch.ones(2, 1152)),
        "rotate_quantize: K must be a multiple of group_size, got K=1152, group_size=256; use group_size=64",
    ),
    (
        lambda: ck.rotate(torch.ones(2, 528)),
        "rotate: K must be a multiple of group_size, got K=528, group_size=256; use group_size=16",
    ),
    (
        lambda: ck.rotate(torch.ones(2, 50), 16),
        "rotate: K must be a multiple of group_size, got K=50, group_size=16; pad K with zeros to a multiple of 16",
    ),
    (lambda: ck.rotate(torch.ones(2, 0)), "rotate: K must be a multiple of group_size, got K=0, group_size=256; pad"),
    (lambda: ck.rotate(X, 128), "rotate: group_size must be one of 16, 64, 256, 1024, got 128; use 256"),
    (
        lambda: ck.rotate(torch.tensor(1.0)),
        "rotate: x must have at least one dimension, the last one K, got a scalar; pass a shape (..., K)",
    ),
    (lambda: ck.rotate(X.int()), f"rotate: x {FLOAT}, got torch.int32; convert it with x.to(torch.bfloat16)"),
    (lambda: ck.rotate_quantize(X.double()), f"rotate_quantize: x {FLOAT}, got torch.float64; convert it with"),
    # quantizer
    (lambda: ck.rotate_quantize(X, 256, 3), "rotate_quantize: bits must be 4 or 8, got 3; use bits=4"),
    (
        lambda: ck.rotate_quantize_gelu(X, 256, 8, packed=True),
        "rotate_quantize_gelu: packed codes need bits=4, got bits=8; use packed=False",
    ),
    (
        lambda: ck.rotate_quantize(X, rule="median"),
        "rotate_quantize: rule must be one of absmax, got 'median'; use rule=\"absmax\"",
    ),
    (lambda: ck.rotate_quantize(X, clip=0.0), "rotate_quantize: clip must be above 0 and at most 1, got 0.0; use clip"),
    (lambda: ck.rotate_quantize(X, clip=1.5), "rotate_quantize: clip must be above 0 and at most 1, got 1.5; use clip"),
    (lambda: ck.rotate_quantize(X, clip=float("nan")), "rotate_quantize: clip must be above 0 and at most 1, got nan;"),
    # prologues
    (
        lambda: ck.rotate_quantize_modulate(X, X[:, :8], X[:, :8]),
        "rotate_quantize_modulate: scale must have the shape (256,) or (2, 256), got (2, 8); reshape or slice scale",
    ),
    (
        lambda: ck.rotate_quantize_modulate(X[0], X, X),
        "rotate_quantize_modulate: scale must have the shape (256,), got (2, 256); reshape or slice scale",
    ),
    (
        lambda: ck.rotate_quantize_modulate(X, X, X[0]),
        "rotate_quantize_modulate: shift must have the shape (2, 256), got (256,); reshape or slice shift",
    ),
    (
        lambda: ck.rotate_quantize_modulate(X, X, X, 0.0),
        "rotate_quantize_modulate: eps must be positive, got 0.0; use eps=1e-6",
    ),
    (
        lambda: ck.rotate_quantize_modulate(X, X.long(), X),
        f"rotate_quantize_modulate: scale {FLOAT}, got torch.int64; convert it with scale.to(torch.bfloat16)",
    ),
    (
        lambda: ck.rotate_quantize_modulate(X, META, X),
        "rotate_quantize_modulate: all tensors must be on one device, got x on cpu, scale on meta, shift on cpu; "
        "move them with .to('cpu')",
    ),
    (
        lambda: ck.rotate_quantize_silu_mul(X, X[:1]),
        "rotate_quantize_silu_mul: y must have the shape (2, 256), got (1, 256); reshape or slice y",
    ),
    (
        lambda: ck.rotate_quantize_silu_mul(X, HALF),
        "rotate_quantize_silu_mul: x and y must have one dtype, got x torch.float32, y torch.float16; "
        "convert with y.to(x.dtype)",
    ),
    (
        lambda: ck.rotate_quantize_cat_gelu(X, X[0]),
        "rotate_quantize_cat_gelu: y must have the shape (2, 256), got (256,); reshape or slice y",
    ),
    (
        lambda: ck.rotate_quantize_cat_gelu(X[:, :128], X[:, :128]),
        "rotate_quantize_cat_gelu: K must be a multiple of group_size, got K=128, group_size=256; use group_size=64",
    ),
    (lambda: ck.rotate_quantize_cat_gelu(X, HALF), "rotate_quantize_cat_gelu: x and y must have one dtype, got x "),
    # products
    (
        lambda: ck.scaled_mm(A, B.float(), SA, SB),
        "scaled_mm: b must be int8 codes or uint8 packed codes, got torch.float32; quantize b with rotate_quantize",
    ),
    (
        lambda: ck.scaled_mm(A.int(), B, SA, SB),
        "scaled_mm: a must be int8 codes or uint8 packed codes, got torch.int32;",
    ),
    (
        lambda: ck.scaled_mm(A, B[0], SA, SB),
        "scaled_mm: b must be a matrix (N, K), got 1 dimensions; flatten it or pass one matrix at a time",
    ),
    (
        lambda: ck.scaled_mm(A[:, :128], B, SA, SB),
        "scaled_mm: a and b must have the same K, got K=128 of a, K=256 of b; uint8 means packed: two columns a byte",
    ),
    (
        lambda: ck.scaled_mm(A, B, None, SB),
        "scaled_mm: a_scale is required here, got None; pass the fp32 scale that rotate_quantize returned",
    ),
    (lambda: ck.scaled_mm(A, B, SA), "scaled_mm: b_scale is required here, got None; pass the fp32 scale"),
    (
        lambda: ck.scaled_mm(X, B, SA, SB),
        "scaled_mm: values take no a_scale, got a torch.float32 with a_scale; pass a_scale=None, or codes as a",
    ),
    (
        lambda: ck.scaled_mm(A, B, SA[:1], SB),
        "scaled_mm: a_scale must have the shape (2,), got (1,); reshape or slice a_scale",
    ),
    (
        lambda: ck.scaled_mm(A, B, SA, SB[:, None]),
        "scaled_mm: b_scale must have the shape (8,), got (8, 1); reshape or slice b_scale",
    ),
    (
        lambda: ck.scaled_mm(A, B, SA.half(), SB),
        "scaled_mm: a_scale must be float32, got torch.float16; convert it with a_scale.float()",
    ),
    (
        lambda: ck.scaled_mm(A, B, SA, SB, SB[:2]),
        "scaled_mm: bias must have the shape (8,), got (2,); reshape or slice",
    ),
    (lambda: ck.scaled_mm(A, B, SA, SB, SB.long()), f"scaled_mm: bias {FLOAT}, got torch.int64; convert it with bias"),
    (
        lambda: ck.scaled_mm(A, B, SA, SB, None, torch.int32),
        "scaled_mm: out_dtype must be float16, bfloat16 or float32, got torch.int32; use torch.bfloat16",
    ),
    (
        lambda: ck.scaled_mm(A, B, SA, SB, b_layout="hopper"),
        f"scaled_mm: the layout must be one of {', '.join(LAYOUTS)}, got 'hopper'; "
        'use "row_major", or ask preferred_layout(device)',
    ),
    (
        lambda: ck.scaled_mm(A, B.to("meta"), SA, SB),
        "scaled_mm: all tensors must be on one device, got a on cpu, b on meta, a_scale on cpu, b_scale on cpu; move",
    ),
    (
        lambda: ck.scaled_mm(torch.tensor(1, dtype=torch.int8), B, SA, SB),
        "scaled_mm: a must have at least one dimension, the last one K, got a scalar; pass a shape (..., K)",
    ),
    (
        lambda: ck.scaled_mm_out(OUT[:, :7], A, B, SA, SB),
        "scaled_mm_out: out must have the shape (2, 8), got (2, 7); reshape or slice out",
    ),
    (
        lambda: ck.scaled_mm_out(torch.zeros(8, 2).t(), A, B, SA, SB),
        "scaled_mm_out: out must be contiguous in its last dimension, got stride 2; slice rows or columns",
    ),
    (
        lambda: ck.scaled_mm_out(OUT.int(), A, B, SA, SB),
        f"scaled_mm_out: out {FLOAT}, got torch.int32; convert it with",
    ),
    (
        lambda: ck.scaled_mm_out(torch.zeros(2, 8, requires_grad=True), A, B, SA, SB),
        "scaled_mm_out: out must not require grad, got requires_grad=True; use torch.no_grad() or out.detach()",
    ),
    (lambda: ck.scaled_mm_cat(A, [], SA, []), "scaled_mm_cat: b must hold at least one weight, got none; pass the"),
    (
        lambda: ck.scaled_mm_cat(A, [B, B], SA, [SB]),
        "scaled_mm_cat: b_scale must hold one vector for each weight, got 1 for 2; pass as many",
    ),
    (
        lambda: ck.scaled_mm_cat(A, [B, B], SA, [SB, SB], [GATE[0]]),
        "scaled_mm_cat: bias must hold one vector for each weight, got 1 for 2; pass as many",
    ),
    (
        lambda: ck.scaled_mm_cat(A, [B, ck.unpack_int4(B)], SA, [SB, SB]),
        "scaled_mm_cat: b must be of one dtype, got b[0] torch.uint8, b[1] torch.int8; multiply those of another in a",
    ),
    (
        lambda: ck.scaled_mm_cat(A, [B, B], SA, [SB, SB], [GATE, GATE.half()]),
        "scaled_mm_cat: bias must be of one dtype, got bias[0] torch.float32, bias[1] torch.float16; multiply",
    ),
    (
        lambda: ck.scaled_mm_cat(A, [B, B[:, :8]], SA, [SB, SB]),
        "scaled_mm_cat, weight 1: a and b must have the same K, got",
    ),
    (
        lambda: ck.scaled_mm_cat(A, [B, B], SA, [SB, SB[:7]]),
        "scaled_mm_cat, weight 1: b_scale must have the shape (8,), got (7,); reshape",
    ),
    (
        lambda: ck.scaled_mm_gate_residual(A, B, SA, SB, None, GATE[:3], RESIDUAL),
        "scaled_mm_gate_residual: gate must have the shape (8,) or (2, 8), got (3,); reshape or slice gate",
    ),
    (
        lambda: ck.scaled_mm_gate_residual(A, B, SA, SB, None, GATE, RESIDUAL[0]),
        "scaled_mm_gate_residual: residual must have the shape (2, 8), got (8,); reshape or slice residual",
    ),
    (
        lambda: ck.scaled_mm_gate_residual(A, B, SA, SB, None, GATE.long(), RESIDUAL),
        f"scaled_mm_gate_residual: gate {FLOAT}, got torch.int64; convert it with gate.to(torch.bfloat16)",
    ),
    # packing and layouts
    (
        lambda: ck.pack_int4(A.int()),
        "pack_int4: codes must be int8, got torch.int32; convert them with codes.to(torch.int8)",
    ),
    (lambda: ck.pack_int4(A[:, :5]), "pack_int4: K must be even, two codes a byte, got K=5; pad K with one zero code"),
    (
        lambda: ck.unpack_int4(A),
        "unpack_int4: packed must be uint8, got torch.int8; view I8 files with packed.view(torch.uint8)",
    ),
    (
        lambda: ck.prepare_weight(B, "hopper"),
        f"prepare_weight: the layout must be one of {', '.join(LAYOUTS)}, got 'hopper'; use \"row_major\"",
    ),
    (
        lambda: ck.restore_weight(B.float(), "row_major"),
        "restore_weight: weight must be int8 codes or uint8 packed codes, got torch.float32; quantize weight with",
    ),
    (
        lambda: ck.prepare_weight(B[0], "row_major"),
        "prepare_weight: weight must be a matrix, got 1 dimensions; pass codes (N, K) or packed (N, K/2)",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message.split(", got")[0] for _, message in ERRORS])
def test_error_names_op_rule_value_and_remedy(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()


def test_the_raw_op_checks_as_well() -> None:
    with pytest.raises(ValueError, match="rotate: K must be a multiple of group_size, got K=1152"):
        torch.ops.convrot.rotate(torch.ones(2, 1152))


def test_a_refused_call_leaves_out_alone() -> None:
    out = torch.full((2, 8), 5.0)
    with pytest.raises(ValueError, match="a_scale must be float32"):
        ck.scaled_mm_out(out, A, B, SA.half(), SB)
    assert (out == 5).all()


def test_compiling_a_wrong_call_says_the_same() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ck.rotate(x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="got K=1152, group_size=256; use group_size=64"):
        compiled(torch.ones(2, 1152))
