"""Every GPU kernel once or twice on small odd shapes, for a memory checker:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitized.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/kernels/sanitized.py

Results are compared with reference too. Not a pytest module: the checker slows everything but this a hundred times.
"""

import argparse
import itertools
import sys

import torch

import convrot_kernels as ck
from convrot_kernels import reference
from convrot_kernels.backends import cudnn
from convrot_kernels.testing import assert_codes_close, assert_equal, make_codes, make_inputs, make_scale

DEVICE = torch.device("cuda")


def products() -> None:
    """GEMM tiles and their edges, the GEMV in its three weight formats, every epilogue."""
    layout = ck.preferred_layout(DEVICE)
    for (m, n, k), out_dtype in itertools.product(
        [(1, 48, 96), (7, 80, 160), (40, 272, 512), (129, 144, 320), (300, 96, 64)], (torch.bfloat16, torch.float32)
    ):
        a, b = make_codes(m, k, device=DEVICE), make_codes(n, k, device=DEVICE, seed=1)
        a_scale, b_scale, bias = (
            make_scale(m, device=DEVICE),
            make_scale(n, device=DEVICE, seed=1),
            torch.randn(n).cuda(),
        )
        packed = ck.pack_int4(b)
        for weight, order in ((ck.prepare_weight(packed, layout), layout), (packed, "row_major"), (b, "row_major")):
            expected = reference.scaled_mm(a, weight, a_scale, b_scale, bias, out_dtype, b_layout=order)
            assert_equal(ck.scaled_mm(a, weight, a_scale, b_scale, bias, out_dtype, b_layout=order), expected)
            values = make_inputs(m, k, device=DEVICE)
            ck.scaled_mm(values, weight, None, b_scale, bias, b_layout=order)
            whole = torch.full((m + 2, n + 24), 7.0, dtype=out_dtype, device=DEVICE)
            ck.scaled_mm_out(whole[1:-1, 8 : 8 + n], a, weight, a_scale, b_scale, bias, b_layout=order)
            assert_equal(whole[1:-1, 8 : 8 + n], expected)
            beside = [weight, weight.clone()], a_scale, [b_scale, b_scale], [bias, bias]
            joined = ck.scaled_mm_cat(a, *beside, out_dtype, b_layout=order)
            assert_equal(joined, torch.cat([expected, expected], dim=-1))
        gate, residual = torch.randn(n).cuda(), torch.randn(m, n).cuda().to(out_dtype)
        arguments = (a, ck.prepare_weight(packed, layout), a_scale, b_scale, bias, gate, residual)
        expected = reference.scaled_mm_gate_residual(*arguments, b_layout=layout)
        assert_equal(ck.scaled_mm_gate_residual(*arguments, b_layout=layout), expected)


def rotations() -> None:
    """Every mode of rotate_quantize (whole runs, guarded, streamed), prologue, input and form of codes; broken rows."""
    for dtype, (group, k) in itertools.product(
        (torch.bfloat16, torch.float32), [(256, 1024), (256, 768), (16, 48), (1024, 3072), (256, 16640)]
    ):
        x, y = make_inputs(3, k, dtype=dtype, device=DEVICE), make_inputs(3, k, dtype=dtype, device=DEVICE, seed=1)
        x[1, 5] = float("nan")
        for bits, packed in ((4, False), (4, True), (8, False)):
            options = (group, bits)
            expected = reference.rotate_quantize(x, *options, packed=packed)
            assert_codes_close(ck.rotate_quantize(x, *options, packed=packed), expected)
            ck.rotate_quantize_gelu(x, *options, packed=packed)
            ck.rotate_quantize_silu_mul(x, y, *options, packed=packed)
            ck.rotate_quantize_cat_gelu(x, y, *options, packed=packed)
            ck.rotate_quantize_modulate(x, y[0], y[2], 1e-6, *options, packed=packed)


def low_rank() -> None:
    """Every prologue and number of tiles, rows and columns that fill no block, terms beside each other, gates."""
    for (rows, k, r), dtype in itertools.product(
        [(5, 264, 7), (37, 512, 24), (33, 1032, 44), (16, 576, 80)], (torch.bfloat16, torch.float16)
    ):
        x, y = make_inputs(2, rows, k, dtype=dtype, device=DEVICE), make_inputs(2, rows, 40, dtype=dtype, device=DEVICE)
        vectors = torch.randn(2, k, device=DEVICE).to(dtype)
        down = torch.randn(r, k + 40, device=DEVICE).to(dtype) / 16
        for options in ({}, {"gelu": True}, {"scale": vectors, "shift": vectors}, {"y": y}):
            terms = list((down if "y" in options else down[:, :k].contiguous()).split((r + 1) // 2))
            expected = reference.low_rank_down(x, terms, **options)
            torch.testing.assert_close(ck.low_rank_down(x, terms, **options), expected, rtol=0.02, atol=0.05)
        r = 4 * (r // 4)
        up = [torch.randn(n, r, device=DEVICE).to(dtype) for n in (8, 264, 72)]
        low = torch.randn(2, rows, 3 * r, device=DEVICE).to(dtype)
        for gate in (None, torch.randn(2, 344, device=DEVICE)):
            out = torch.randn(2, rows, 344, device=DEVICE).to(dtype)
            expected = out.clone()
            arguments = (low, up, [0, 8, 272], [1.0, -0.5, 2.0], gate)
            reference.low_rank_up(expected, *arguments)
            ck.low_rank_up(out, *arguments)
            torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05)


def attention() -> None:
    """The norms and rotations before attention in every size of head, and e4m3 before and after cuDNN's product."""
    for d, dtype in itertools.product((16, 32, 64, 128, 256), (torch.bfloat16, torch.float32)):
        text = make_inputs(2, 3, 9 * d, dtype=dtype, device=DEVICE)
        image = make_inputs(2, 6, 9 * d + 64, dtype=dtype, device=DEVICE, seed=1)[..., : 9 * d]
        weights, tables = torch.randn(4, d, device=DEVICE), torch.rand(2, 9, d, device=DEVICE)
        ck.norm_rope(image[..., : 6 * d], *weights[:2], *tables[:, :6])
        ck.norm_rope_joint(text, image, *weights, *tables)
        ck.norm_rope_fp8(image, *weights[:2], *tables[:, :6])
        q, k, v, v_scale = ck.norm_rope_joint_fp8(text, image, *weights, *tables)
        expected = reference.norm_rope_joint_fp8(text, image, *weights, *tables)
        assert_equal(v_scale, expected[3])
        assert_equal(v.float(), expected[2].float())
        if cudnn.why_not(DEVICE) is None:
            out = ck.attention_fp8(q, k, v, v_scale, dtype)
            torch.testing.assert_close(out, reference.attention_fp8(q, k, v, v_scale, dtype), rtol=0.2, atol=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cutlass", choices=["cutlass", "triton"])
    options = parser.parse_args()
    with torch.no_grad(), ck.use_backend(options.backend):
        products()
        rotations()
        low_rank()
        attention()
        torch.cuda.synchronize()
    sys.stdout.write(f"{options.backend}: every kernel ran and agreed\n")


if __name__ == "__main__":
    main()
