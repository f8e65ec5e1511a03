"""What only the Triton backend has: its refusals, its block tables, two passes, weight layouts, descriptors."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import convrot_kernels as ck
from convrot_kernels import dispatch, layouts, reference
from convrot_kernels.backends import triton as backend_module
from convrot_kernels.testing import assert_codes_close, assert_equal, make_codes, make_inputs, make_scale

ON_TRITON = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def _kernel_file(name: str) -> Any:
    return pytest.importorskip(f"convrot_kernels.backends.triton.{name}")


# refusals


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend_module, "find_spec", lambda name: "found")
    monkeypatch.setattr(backend_module, "why_not", backend_module.why_not.__wrapped__)  # not the kept answers
    return monkeypatch


def _why_not(device: str) -> str | None:
    return backend_module.why_not(torch.device(device))


def test_says_why_it_cannot_run(plain_environment: pytest.MonkeyPatch) -> None:
    assert _why_not("cpu") == "needs a CUDA device, not cpu"
    assert _why_not("mps") == "needs a CUDA device, not mps"
    plain_environment.setattr(torch.cuda, "is_available", lambda: False)
    assert _why_not("cuda") == "PyTorch finds no CUDA device"
    plain_environment.setattr(torch.cuda, "is_available", lambda: True)
    plain_environment.setattr(torch.version, "cuda", None)
    assert _why_not("cuda") == "was not tried on AMD GPUs"
    plain_environment.setattr(torch.version, "cuda", "13.0")
    plain_environment.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    plain_environment.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert _why_not("cuda:1") == "needs compute capability 8.0, Tesla T4 has 7.5"
    plain_environment.setattr(backend_module, "find_spec", lambda name: None)
    assert _why_not("cuda") == "Triton is not installed, run `pip install triton`"


def test_runs_on_ampere_and_later_and_in_the_interpreter(plain_environment: pytest.MonkeyPatch) -> None:
    plain_environment.setattr(torch.cuda, "is_available", lambda: True)
    plain_environment.setattr(torch.version, "cuda", "13.0")
    plain_environment.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _why_not("cuda") is None
    plain_environment.setenv("TRITON_INTERPRET", "1")
    assert _why_not("cpu") is None
    assert _why_not("mps") is not None


def test_auto_takes_it_where_it_runs_and_nothing_faster_does(plain_environment: pytest.MonkeyPatch) -> None:
    computing = [op for op in dispatch.ORDER if op not in ("pack_int4", "unpack_int4")]
    assert {dispatch.pick(op, "cpu")[0] for op in computing} == {"reference"}
    plain_environment.setattr(backend_module, "why_not", lambda device: None)
    assert dispatch.pick("attention_fp8", "cpu")[0] == "reference"  # which needs cuDNN as well
    assert {dispatch.pick(op, "cpu")[0] for op in computing if op != "attention_fp8"} == {"triton"}


def test_imports_and_refuses_without_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, convrot_kernels as ck\n"
        "from convrot_kernels.backends import triton\n"
        "triton.find_spec = lambda name: None\n"
        "print(ck.available_backends('cpu')['triton'])\n"
        "ck.rotate(torch.ones(256))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "Triton is not installed, run `pip install triton`"


# tables


@pytest.mark.parametrize("group_size", reference.GROUP_SIZES)
@pytest.mark.parametrize("m", [1, 511, 512, 4608])
def test_row_blocks_cover_the_row_and_fit_the_registers(m: int, group_size: int) -> None:
    kernel = _kernel_file("rotate_quantize_kernel")
    for k in [group_size, 3 * group_size, 3072, 12288, 15360, 16384, 17408, 65536]:
        blocks = kernel.pick_blocks(m, k, group_size)
        assert blocks.columns * blocks.steps >= k
        assert blocks.columns * (blocks.steps - 1) < k
        assert blocks.columns & (blocks.columns - 1) == 0
        assert blocks.columns % kernel.LEAST_COLUMNS[group_size] == 0
        assert blocks.columns // (32 * blocks.warps) <= 64


def test_row_blocks_of_flux_are_the_measured_ones() -> None:
    pick = _kernel_file("rotate_quantize_kernel").pick_blocks
    assert pick(4608, 3072, 256) == (4096, 1, 4)
    assert pick(4608, 12288, 256) == (1024, 12, 1)
    assert pick(4608, 15360, 256) == (1024, 15, 1)


@pytest.mark.parametrize("value_bytes", [1, 2, 4])
def test_tiles_fit_the_shared_memory_of_every_gpu(value_bytes: int) -> None:
    kernel = _kernel_file("scaled_mm_kernel")
    for m in (1, 16, 17, 64, 65, 256, 257, 512, 4608):
        for n, k in ((16, 16), (3072, 3072), (21504, 3072), (3072, 15360)):
            blocks = kernel.pick_blocks(m, n, k, value_bytes)
            wide = blocks.n * kernel.BLOCK_K  # int8 weights, or nibbles after interleaving
            assert (blocks.m * kernel.BLOCK_K * value_bytes + wide) * blocks.stages <= 99 * 1024
            assert min(blocks.m, blocks.n) >= 16
            assert blocks.m * blocks.n // (32 * blocks.warps) <= 64  # accumulators a thread


def test_tables_are_the_factors_of_h() -> None:
    functions = _kernel_file("device_functions")
    for group_size in reference.GROUP_SIZES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            right, left = (table.double() for table in functions.tables(group_size, dtype, torch.device("cpu")))
            whole = torch.kron(left, right) if group_size > 64 else right
            scale = functions.SHRINK[group_size] / (8 if dtype == torch.float32 else 1)
            assert_equal(whole * scale, reference.hadamard(group_size, torch.float64))


# rotation and quantization


@ON_TRITON
@pytest.mark.parametrize(
    ("m", "group_size", "k"),
    [
        (1, 16, 16),
        (33, 16, 272),
        (7, 64, 64),
        (33, 64, 192),
        (1, 256, 256),
        (33, 256, 768),
        (1, 1024, 1024),
        (7, 1024, 3072),
    ],
)
def test_ragged_rows_and_few_groups(
    backend: str, device: str, dtype: torch.dtype, m: int, group_size: int, k: int
) -> None:
    x = make_inputs(m, k, dtype=dtype, device=device)
    for bits, packed in ((4, True), (8, False)):
        expected = reference.rotate_quantize(x, group_size, bits, packed=packed)
        assert_codes_close(ck.rotate_quantize(x, group_size, bits, packed=packed), expected)


def _prologues(x: Tensor, y: Tensor, gain: Tensor, shift: Tensor) -> dict[str, tuple[Any, ...]]:
    return {
        "rotate_quantize": (x,),
        "rotate_quantize_gelu": (x,),
        "rotate_quantize_modulate": (x, gain, shift, 1e-6),
        "rotate_quantize_silu_mul": (x, y),
        "rotate_quantize_cat_gelu": (x, y),
    }


@ON_TRITON
@pytest.mark.parametrize("op", list(_prologues(*[torch.ones(1)] * 4)))
@pytest.mark.parametrize(
    ("group_size", "k", "dtype"), [(256, 768, torch.bfloat16), (1024, 3072, torch.float16), (64, 1088, torch.float32)]
)
def test_two_passes_give_what_one_gives(
    backend: str, device: str, op: str, group_size: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _kernel_file("rotate_quantize_kernel")
    x, y = (make_inputs(2, 3, k, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    x[1, 1, k - 1] = float("nan")
    gain, shift = torch.randn(2, 2, k, device=device)
    arguments = _prologues(x, y, gain, shift)[op]
    one = getattr(ck, op)(*arguments, group_size, packed=True, clip=0.9)
    least = kernel.LEAST_COLUMNS[group_size]
    monkeypatch.setattr(kernel, "pick_blocks", lambda m, k, group: kernel.Blocks(least, -(-k // least), 1))
    two = getattr(ck, op)(*arguments, group_size, packed=True, clip=0.9)
    if op == "rotate_quantize_modulate":  # sums in another order
        assert (two[0] != one[0]).float().mean() < 2e-3
        torch.testing.assert_close(two[1], one[1], rtol=2e-3, atol=0, equal_nan=True)
    else:
        assert_equal(two[0], one[0])
        assert_equal(two[1], one[1])
    assert_equal(two[1].isnan().cpu(), torch.tensor([[False] * 3, [False, True, False]]))


@ON_TRITON
@pytest.mark.parametrize("group_size", [256, 1024])
def test_the_longest_rows(backend: str, device: str, group_size: int) -> None:
    x = make_inputs(2, 65536, device=device)
    assert_codes_close(ck.rotate_quantize(x, group_size), reference.rotate_quantize(x, group_size))


@ON_TRITON
@pytest.mark.parametrize("group_size", reference.GROUP_SIZES)
def test_a_broken_group_touches_no_other(backend: str, device: str, group_size: int) -> None:
    x = make_inputs(2, 3 * 1024, dtype=torch.float32, device=device)
    broken = x.clone()
    broken[1, 2 * group_size] = float("nan")
    expected = ck.rotate(x, group_size)
    expected[1, 2 * group_size : 3 * group_size] = float("nan")
    assert_equal(ck.rotate(broken, group_size), expected)


# matrix product

OPERANDS = [(4, False, 4), (4, True, 4), (8, False, 4), (8, False, 8), (4, True, 8)]  # a bits, a packed, b bits


@ON_TRITON
@pytest.mark.parametrize("layout", ["row_major", "halves128"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 128), (33, 7, 384), (70, 70, 256), (300, 130, 128), (7, 40, 208)])
def test_every_layout_gives_the_same_integers(
    backend: str, device: str, layout: str, m: int, n: int, k: int, plain_product: Callable[..., Tensor]
) -> None:
    a_scale, b_scale, bias = make_scale(m, device=device), make_scale(n, device=device), torch.randn(n, device=device)
    for a_bits, a_packed, b_bits in OPERANDS:
        a, b = make_codes(m, k, bits=a_bits, device=device), make_codes(n, k, bits=b_bits, device=device, seed=1)
        expected = plain_product(a, b, a_scale, b_scale, bias).bfloat16()
        weight = ck.prepare_weight(ck.pack_int4(b) if b_bits == 4 else b, layout)
        actual = ck.scaled_mm(ck.pack_int4(a) if a_packed else a, weight, a_scale, b_scale, bias, b_layout=layout)
        assert_equal(actual.cpu(), expected)


@ON_TRITON
@pytest.mark.parametrize("k", [256, 208])
def test_values_in_halves(backend: str, device: str, dtype: torch.dtype, k: int) -> None:
    a, b, b_scale = make_inputs(33, k, dtype=dtype, device=device), make_codes(40, k, device=device), make_scale(40)
    packed = ck.pack_int4(b)
    row_major = ck.scaled_mm(a, packed, None, b_scale.to(device), out_dtype=torch.float32)
    halves = ck.scaled_mm(
        a,
        ck.prepare_weight(packed, "halves128"),
        None,
        b_scale.to(device),
        out_dtype=torch.float32,
        b_layout="halves128",
    )
    exact = a.cpu().double() @ b.cpu().double().t() * b_scale
    bound = a.cpu().double().abs() @ b.cpu().double().abs().t() * b_scale * 1e-6
    assert ((halves.cpu() - exact).abs() <= bound).all()
    assert ((row_major.cpu() - exact).abs() <= bound).all()


@ON_TRITON
def test_another_backends_layout_is_restored_first(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layouts.LAYOUTS, "upside_down", layouts.Layout(lambda w: w.flip(0), lambda w: w.flip(0)))
    a, b = make_codes(5, 128, device=device), ck.pack_int4(make_codes(9, 128, device=device))
    a_scale, b_scale = make_scale(5, device=device), make_scale(9, device=device)
    actual = ck.scaled_mm(a, ck.prepare_weight(b, "upside_down"), a_scale, b_scale, b_layout="upside_down")
    assert_equal(actual, ck.scaled_mm(a, b, a_scale, b_scale))


@ON_TRITON
@pytest.mark.parametrize(("b_bits", "layout"), [(4, "halves128"), (4, "row_major"), (8, "row_major")])
def test_descriptors_carry_the_same_tiles(
    backend: str, device: str, b_bits: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _kernel_file("scaled_mm_kernel")
    if kernel.TensorDescriptor is None:
        pytest.skip("this Triton has no tensor descriptors")
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    a, b = make_codes(300, 384, device=device), make_codes(140, 384, bits=b_bits, device=device)
    weight = ck.prepare_weight(ck.pack_int4(b) if b_bits == 4 else b, layout)
    a_scale, b_scale = make_scale(300, device=device), make_scale(140, device=device)
    monkeypatch.setattr(kernel, "uses_descriptors", lambda a, b, mode: False)
    expected = ck.scaled_mm(a, weight, a_scale, b_scale, b_layout=layout)
    monkeypatch.setattr(kernel, "uses_descriptors", lambda a, b, mode: True)
    assert_equal(ck.scaled_mm(a, weight, a_scale, b_scale, b_layout=layout), expected)


@ON_TRITON
def test_out_whose_rows_no_single_stride_reaches(backend: str, device: str) -> None:
    a, b = make_codes(2, 3, 64, device=device), ck.pack_int4(make_codes(8, 64, device=device))
    a_scale, b_scale = make_scale(2, 3, device=device), make_scale(8, device=device)
    whole = torch.zeros(2, 5, 8, dtype=torch.bfloat16, device=device)
    ck.scaled_mm_out(whole[:, 1:4], a, b, a_scale, b_scale)
    expected = torch.zeros_like(whole)
    expected[:, 1:4] = ck.scaled_mm(a, b, a_scale, b_scale)
    assert_equal(whole, expected)
