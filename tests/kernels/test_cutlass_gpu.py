"""The compiled library against reference on a GPU: bit-equal products over odd shapes, codes within 1e-5.

Skipped where no library is built for the GPU at hand (`python -m convrot_kernels build`).
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, prepare_weight, reference
from convrot_kernels.backends import cutlass
from convrot_kernels.backends.cutlass.products import BLOCKS
from convrot_kernels.layouts import LAYOUTS
from convrot_kernels.testing import assert_codes_close, assert_equal, make_codes, make_inputs, make_scale

pytestmark = pytest.mark.gpu

OUTS = [torch.bfloat16, torch.float16, torch.float32]
# (activation bits, weight bits, packed activations)
SCHEMES = [(4, 4, False), (4, 4, True), (8, 4, False), (8, 8, False), (4, 8, True)]
M = [1, 2, 7, 8, 9, 15, 17, 33, 63, 64, 65, 127, 129, 1000, 4097]
N = [1, 8, 16, 24, 31, 48, 64, 80, 128, 144, 264, 3088]
K = [32, 64, 96, 128, 160, 3072]
GUARD = 7.0
Problem = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _library() -> None:
    device = torch.device("cuda")
    reason = "torch sees no GPU" if not torch.cuda.is_available() else cutlass.why_not(device)
    if reason is not None:
        pytest.skip(reason)


def _store(codes: Tensor, packed: bool) -> Tensor:
    return pack_int4(codes) if packed else codes


@pytest.mark.parametrize("m", M)
def test_products_of_odd_shapes_are_bit_equal(m: int, assert_product: Callable[..., None]) -> None:
    for n, k in itertools.product(N, K):  # 15 x 72 shapes, each in one scheme, output and layout
        index = (m + N.index(n) + 5 * K.index(k)) % (len(SCHEMES) * len(OUTS))
        scheme, out_dtype = SCHEMES[index % len(SCHEMES)], OUTS[index % len(OUTS)]
        layout = list(LAYOUTS)[(n + k) // 16 % len(LAYOUTS)]
        bias_dtype = torch.float32 if index % 2 else None
        assert_product(cutlass.scaled_mm, (m, n, k), scheme, layout, out_dtype, bias_dtype)


@pytest.mark.parametrize("out_dtype", OUTS)
@pytest.mark.parametrize("m", [1, 8, 16, 64, 65, 512, 4608])
@pytest.mark.parametrize(("n", "k"), [(3072, 3072), (3072, 12288), (9216, 3072)])
def test_products_of_flux_are_bit_equal(m: int, n: int, k: int, out_dtype: torch.dtype, problem: Problem) -> None:
    a, b, a_scale, b_scale, bias = problem(m, n, k)
    packed = pack_int4(b)
    bias = bias.to(out_dtype)
    expected = reference.scaled_mm(a, packed, a_scale, b_scale, bias, out_dtype)
    device = torch.device("cuda")
    layout, codes = cutlass.preferred_layout(device), cutlass.preferred_codes(device)
    resident, x = prepare_weight(packed, layout), _store(a, codes == "packed")
    assert_equal(cutlass.scaled_mm(x, resident, a_scale, b_scale, bias, out_dtype, b_layout=layout), expected)


@pytest.mark.parametrize("value", [-8, -7, 7])
@pytest.mark.parametrize("m", [3, 200])
def test_sums_of_one_sign_are_exact(value: int, m: int) -> None:
    a = torch.full((m, 15360), -128, dtype=torch.int8, device="cuda")
    b = torch.full((256, 15360), value, dtype=torch.int8, device="cuda")
    ones = torch.ones(256, device="cuda")
    packed = pack_int4(b)
    for out_dtype in OUTS:
        expected = reference.scaled_mm(a, packed, ones[:m], ones, None, out_dtype)
        resident = prepare_weight(packed, BLOCKS)
        actual = cutlass.scaled_mm(a, resident, ones[:m], ones, None, out_dtype, b_layout=BLOCKS)
        assert_equal(actual, expected)


@pytest.mark.parametrize("bias_dtype", OUTS)
@pytest.mark.parametrize("m", [4, 40, 300])
def test_bias_gate_and_residual_in_one_epilogue(m: int, bias_dtype: torch.dtype, problem: Problem) -> None:
    for out_dtype, batch in itertools.product(OUTS, (1, 2)):
        a, b, a_scale, b_scale, bias = problem(batch * m, 272, 512)
        a, a_scale, packed = a.view(batch, m, 512), a_scale.view(batch, m), pack_int4(b)
        gate = torch.randn(batch, 272, device="cuda", dtype=bias_dtype)
        residual = torch.randn(batch, m, 272, device="cuda").to(out_dtype)
        arguments = (a, prepare_weight(packed, BLOCKS), a_scale, b_scale, bias.to(bias_dtype), gate, residual)
        expected = reference.scaled_mm_gate_residual(*arguments, b_layout=BLOCKS)
        assert_equal(cutlass.scaled_mm_gate_residual(*arguments, b_layout=BLOCKS), expected)


@pytest.mark.parametrize("m", [5, 130])
@pytest.mark.parametrize(("first", "width"), [(0, 512), (64, 512), (3, 512), (16, 1040), (8, 530)])
def test_output_in_a_slice_leaves_its_surroundings_alone(m: int, first: int, width: int, problem: Problem) -> None:
    a, b, a_scale, b_scale, bias = problem(m, 448, 256)
    packed = prepare_weight(pack_int4(b), BLOCKS)
    for out_dtype in OUTS:
        whole = torch.full((m + 2, width), GUARD, dtype=out_dtype, device="cuda")
        expected = whole.clone()
        view = (slice(1, m + 1), slice(first, first + 448))
        if first + 448 > width:
            continue
        expected[view] = reference.scaled_mm(a, packed, a_scale, b_scale, bias, out_dtype, b_layout=BLOCKS)
        cutlass.scaled_mm_out(whole[view], a, packed, a_scale, b_scale, bias, b_layout=BLOCKS)
        assert_equal(whole, expected)


def test_misaligned_and_strided_operands(problem: Problem) -> None:
    a, b, a_scale, b_scale, bias = problem(40, 128, 288)
    expected = reference.scaled_mm(a[1:, 17:273], pack_int4(b[:, 16:272]), a_scale[1:], b_scale, bias)
    storage = torch.zeros(128 * 128 + 3, dtype=torch.uint8, device="cuda")
    off = storage[3:].view(128, 128)
    off.copy_(pack_int4(b[:, 16:272]))
    assert_equal(cutlass.scaled_mm(a[1:, 17:273], off, a_scale[1:], b_scale, bias), expected)


@pytest.mark.parametrize("dtype", OUTS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 18432, 3072), (2, 96, 256), (9, 48, 1088), (40, 33, 64), (3, 64, 48)])
def test_sixteen_bit_activations_are_summed_in_fp32(m: int, n: int, k: int, layout: str, dtype: torch.dtype) -> None:
    x = make_inputs(m, k, dtype=dtype, device="cuda")
    for bits in (4, 8):
        b, scale = make_codes(n, k, bits=bits, device="cuda"), make_scale(n, device="cuda")
        stored = prepare_weight(_store(b, bits == 4), layout)
        exact = (x.double() @ b.double().t()) * scale.double()
        actual = cutlass.scaled_mm(x, stored, None, scale, None, torch.float32, b_layout=layout)
        bound = 1e-6 * (x.double().abs() @ b.double().abs().t()) * scale.double() + 1e-30
        assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("m", [1, 3, 8, 9])
def test_many_weights_at_once_are_summed_as_each_alone(m: int, dtype: torch.dtype) -> None:
    """More than a launch takes, of every size: blocks of four warps and of eight, weights that no block is full of."""
    widths, k = [16, 48, 12288, 272, 16384, 32, 80, *range(16, 16 * 65, 16)], 1088
    scales, bias = [make_scale(n, device="cuda", seed=n) for n in widths], [torch.randn(n).cuda() for n in widths]
    coded = dtype == torch.int8
    a = make_codes(m, k, device="cuda") if coded else make_inputs(m, k, dtype=dtype, device="cuda")
    a_scale = make_scale(m, device="cuda") if coded else None
    for bits, layout in ((4, BLOCKS), (4, "row_major"), (8, "row_major")):
        codes = [make_codes(n, k, bits=bits, device="cuda", seed=n) for n in widths]
        weights = [prepare_weight(_store(b, bits == 4), layout) for b in codes]
        out = cutlass.scaled_mm_cat(a, weights, a_scale, scales, bias, b_layout=layout)
        alone = [
            cutlass.scaled_mm(a, weight, a_scale, scale, vector, b_layout=layout)
            for weight, scale, vector in zip(weights, scales, bias, strict=True)
        ]
        assert_equal(out, torch.cat(alone, dim=-1))


@pytest.mark.parametrize("m", [17, 512, 4608])
def test_kernels_that_start_early_wait_for_what_they_read_and_overwrite(m: int) -> None:
    """A chain in which every kernel reads the one before and takes memory that an earlier one has just left."""
    k, heads = 3072, 24
    weights = [prepare_weight(pack_int4(make_codes(k, k, device="cuda", seed=i)), BLOCKS) for i in range(3)]
    scale = torch.full((k,), 1 / (4.3 * k**0.5), device="cuda")
    ones, tables, gate = (
        torch.ones(2, 128, device="cuda"),
        torch.rand(2, m, 128, device="cuda"),
        torch.full((k,), 0.5).cuda(),
    )

    def chain(pause: Callable[[], object]) -> list[Tensor]:
        x, seen = make_inputs(1, m, k, device="cuda"), []
        for i in range(40):
            codes, row_scale = cutlass.rotate_quantize(x)
            pause()
            y = cutlass.scaled_mm(codes, weights[i % 3], row_scale, scale, b_layout=BLOCKS)
            pause()
            q, _ = cutlass.norm_rope(torch.stack((y, x), 2).view(1, m, 2 * k), *ones, *tables)
            pause()
            codes, row_scale = cutlass.rotate_quantize_gelu(q.view(1, m, heads * 128))
            pause()
            del q, y
            x = cutlass.scaled_mm_gate_residual(
                codes, weights[(i + 1) % 3], row_scale, scale, None, gate, x, b_layout=BLOCKS
            )
            pause()
            seen.append(x.sum(-1))
        return [*seen, x]

    for early, alone in zip(chain(lambda: None), chain(torch.cuda.synchronize), strict=True):
        assert_equal(early, alone)


def test_two_runs_a_side_stream_and_a_captured_graph_agree(problem: Problem) -> None:
    a, b, a_scale, b_scale, bias = problem(300, 512, 1024)
    packed = prepare_weight(pack_int4(b), BLOCKS)
    arguments = (a, packed, a_scale, b_scale, bias)
    expected = cutlass.scaled_mm(*arguments, b_layout=BLOCKS)
    assert_equal(cutlass.scaled_mm(*arguments, b_layout=BLOCKS), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = cutlass.scaled_mm(*arguments, b_layout=BLOCKS)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(aside, expected)
    x, graph = make_inputs(300, 1024, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scale = cutlass.rotate_quantize(x)
        out = cutlass.scaled_mm(codes, packed, scale, b_scale, bias, b_layout=BLOCKS)
    for seed in (1, 2):
        x.copy_(make_inputs(300, 1024, seed=seed))
        graph.replay()
        fresh = cutlass.rotate_quantize(x)
        assert_equal(out, cutlass.scaled_mm(fresh[0], packed, fresh[1], b_scale, bias, b_layout=BLOCKS))


def test_new_addresses_get_new_descriptors(problem: Problem) -> None:
    for seed in range(200):  # more than a thread keeps
        a, b, a_scale, b_scale, bias = problem(72 + seed % 3, 256, 256)
        a, a_scale = a.clone(), a_scale * (seed + 1)
        packed = prepare_weight(pack_int4(b), BLOCKS)
        expected = reference.scaled_mm(a, packed, a_scale, b_scale, bias, b_layout=BLOCKS)
        assert_equal(cutlass.scaled_mm(a, packed, a_scale, b_scale, bias, b_layout=BLOCKS), expected)


# rotation and quantization


@pytest.mark.parametrize("dtype", OUTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "k"),
    [
        *[(16, 16), (16, 48), (16, 3088), (64, 64), (64, 1152), (64, 18496), (256, 256), (256, 768), (256, 3072)],
        *[(256, 16384), (256, 16640), (256, 65536), (1024, 1024), (1024, 15360), (1024, 20480)],
    ],
)
def test_codes_are_those_of_reference(group_size: int, k: int, bits: int, dtype: torch.dtype) -> None:
    x = make_inputs(61, k, dtype=dtype, device="cuda")
    for packed, clip in itertools.product((False, True) if bits == 4 else (False,), (1.0, 0.8)):
        actual = cutlass.rotate_quantize(x, group_size, bits, packed=packed, clip=clip)
        assert_codes_close(actual, reference.rotate_quantize(x, group_size, bits, packed=packed, clip=clip))


@pytest.mark.parametrize("dtype", OUTS)
@pytest.mark.parametrize(("k1", "k2"), [(3072, 12288), (256, 768), (1024, 512), (16384, 4096)])
def test_prologues_are_those_of_reference(k1: int, k2: int, dtype: torch.dtype) -> None:
    # a million codes and more: the bound is a share, and a few codes tell nothing about it
    rows = max(33, 2**20 // k1)
    x, y = (make_inputs(2, rows, k1, dtype=dtype, device="cuda", seed=seed) for seed in (0, 1))
    more = make_inputs(2, rows, k2, dtype=dtype, device="cuda", seed=2)
    scale, shift = torch.randn(2, 2, k1, device="cuda", dtype=dtype)
    for op, arguments in (("gelu", (x,)), ("silu_mul", (x, y)), ("cat_gelu", (x, more))):
        name = f"rotate_quantize_{op}"
        assert_codes_close(getattr(cutlass, name)(*arguments), getattr(reference, name)(*arguments), prologue=True)
    codes, row_scale = cutlass.rotate_quantize_modulate(x, scale, shift)
    expected, expected_scale = reference.rotate_quantize_modulate(x, scale, shift)
    # another order of the sums moves a few 16-bit roundings of the LayerNorm
    assert (codes != expected).float().mean() < 2e-3
    torch.testing.assert_close(row_scale, expected_scale, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", OUTS)
@pytest.mark.parametrize("k", [512, 4096, 20480])
def test_broken_rows_have_a_nan_scale_and_zero_codes(k: int, dtype: torch.dtype) -> None:
    x = make_inputs(9, k, dtype=dtype, device="cuda")
    clean, clean_scale = cutlass.rotate_quantize(x)
    x[1, 3], x[4, k - 1], x[6, 0] = float("inf"), float("nan"), -float("inf")
    codes, scale = cutlass.rotate_quantize(x)
    assert scale.isnan().tolist() == [False, True, False, False, True, False, True, False, False]
    assert not codes[scale.isnan()].any()
    good = ~scale.isnan()
    assert_equal(codes[good], clean[good])
    assert_equal(scale[good], clean_scale[good])


@pytest.mark.parametrize("dtype", OUTS)
def test_any_row_stride_and_offset(dtype: torch.dtype) -> None:
    x = make_inputs(64, 1040, dtype=dtype, device="cuda")
    for view in (x[:, :1024], x[::3, 8:1032], x[:, 1:1025], x.t(), x[:1, :512].expand(7, 512)):
        codes, scale = cutlass.rotate_quantize(view, 64)
        expected, expected_scale = cutlass.rotate_quantize(view.contiguous(), 64)
        assert_equal(codes, expected)
        assert_equal(scale, expected_scale)


def test_empty_rows() -> None:
    x = torch.empty(0, 256, dtype=torch.bfloat16, device="cuda")
    codes, scale = cutlass.rotate_quantize(x)
    assert (codes.shape, scale.shape) == ((0, 256), (0,))
    b = pack_int4(make_codes(16, 256, device="cuda"))
    assert cutlass.scaled_mm(codes, b, scale, make_scale(16, device="cuda")).shape == (0, 16)
