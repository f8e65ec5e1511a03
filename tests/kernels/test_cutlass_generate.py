import re
from importlib.util import find_spec

import pytest

from convrot_kernels.backends.cutlass import build, cppgen
from convrot_kernels.backends.cutlass.generate import generate, sm80_epilogue
from convrot_kernels.backends.cutlass.variants import VARIANTS, GemmVariant

ELEMENT = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "fp32": "float"}
NATIVE = [variant for variant in VARIANTS if variant.template == "sm80"]
HOPPER = [variant for variant in VARIANTS if variant.template == "sm90"]
# what would round twice, ask the device in a call, compile for another arch, or fuse a multiplication with an addition
BANNED = ["fast_accum", "multiply_add", "homogeneous", "cudaGetDevice", "Sm100", "LinearCombination", "printf", "$"]


def _by_name(variants: list[GemmVariant]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", variants, ids=lambda variant: variant.name)


@_by_name(list(VARIANTS))
def test_text_exports_one_function_of_the_variants_name(variant: GemmVariant) -> None:
    text = generate(variant)
    assert re.findall(r"^CONVROT_GEMM\((\w+),", text, re.M) == [variant.name]
    assert ELEMENT[variant.out] in text
    assert not [word for word in BANNED if word in text]
    assert generate(variant) == text


@_by_name(HOPPER)
def test_hopper_text_holds_the_table_s_numbers(variant: GemmVariant) -> None:
    text = generate(variant)
    n, m, k = variant.tile
    assert f"using Tile = Shape<_{n}, _{m}, _{k}>;" in text
    assert f"using Cluster = Shape<_{variant.cluster[0]}, _{variant.cluster[1]}, _1>;" in text
    assert "KernelTmaWarpSpecializedPingpong" in text
    four_bits = variant.weight == "s4"
    assert f"FirstScale<{str(four_bits).lower()}>" in text
    assert ("NibbleLayout" in text) == four_bits
    assert f"run_sm90<Kernel, Weight, Output, {str(four_bits).lower()}>" in text


@_by_name(HOPPER)
def test_hopper_epilogue_rounds_step_by_step_in_the_order_of_the_reference(variant: GemmVariant) -> None:
    text = generate(variant)
    order = ["EVTScaled", "EVTProduct", "EVTBiased", "EVTGated", "EVTOut"]
    nodes = re.findall(
        r"using (EVT\w+) = fusion::Sm90EVT<fusion::Sm90Compute<([\w<>: ]+), (\w+), float, kNearest>", text
    )
    assert [name for name, _, _ in nodes] == order
    functions = [function.split("<")[0] for _, function, _ in nodes]
    assert functions == ["FirstScale", "Multiply", "Add", "Multiply", "Add"]
    assert [element for _, _, element in nodes] == ["float"] * 4 + ["Output"]  # one rounding to the output, the last


@_by_name(NATIVE)
def test_mma_sync_text_holds_the_table_s_numbers(variant: GemmVariant) -> None:
    text = generate(variant)
    m, n, k = variant.tile
    assert text.count(f"cutlass::gemm::GemmShape<{m}, {n}, {k}>") == 2
    assert f"GemmShape<16, 8, {64 if variant.weight == 's4' else 32}>" in text
    assert f"\n    {variant.stages},\n" in text
    assert text.count("VisitorCompute<\n    cutlass::plus, float, float") == 1
    assert text.count(f"VisitorCompute<\n    cutlass::plus, {ELEMENT[variant.out]}, float") == 1


@pytest.mark.parametrize("header", ["sm90_gemm.cuh", "sm80_gemm.cuh"])
def test_templates_query_no_device_and_read_no_null(header: str) -> None:
    text = (build.HERE / "csrc" / header).read_text()
    assert not re.findall(r"cudaGetDevice|query_device|cudaDeviceSynchronize|cudaMalloc|cudaStreamSynchronize", text)
    assert "-0.f" in text  # x + -0 is x, also for x = -0


@pytest.mark.parametrize("source", ["gemv.cu", "rotate_quantize.cu"])
def test_kernels_synchronize_and_allocate_nothing(source: str) -> None:
    text = (build.HERE / "csrc" / source).read_text()
    assert not re.findall(
        r"cudaGetDevice|cudaDeviceSynchronize|cudaMalloc|cudaStreamSynchronize|atomicAdd|printf", text
    )


@pytest.mark.parametrize("source", ["rotate_quantize.cu", "norm_rope.cu"])
def test_kernels_that_are_launched_early_wait_before_they_read(source: str) -> None:
    text = re.sub(r"//.*", "", (build.HERE / "csrc" / source).read_text())
    kernels = re.findall(r"__global__ .*?\n}\n", text, re.S)
    assert len(kernels) == text.count("__global__")
    assert "<<<" not in text
    for kernel in kernels:
        before, wait, _ = kernel.partition("wait_for_previous();")
        assert wait
        assert "start_next();" in before
        assert not re.search(r"load|__ldg|\bp\.", before.partition("{")[2])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("cutlass_cppgen") is None, reason="needs nvidia-cutlass")
@_by_name(NATIVE)
def test_mma_sync_epilogue_is_what_cutlass_generates(variant: GemmVariant) -> None:
    ours = sm80_epilogue(variant).replace("convrot::OptionalAuxLoad", "cutlass::epilogue::threadblock::VisitorAuxLoad")
    assert cppgen.emit_epilogue(variant).split() == ours.split()
