import itertools

import pytest

from convrot_kernels.backends.cutlass.variants import ARCHS, GEMV_ROWS, MAX_K, VARIANTS, arch_of, of_arch, pick

FLUX = [(12288, 3072), (3072, 12288), (21504, 3072), (3072, 3072), (9216, 3072), (3072, 15360)]


def test_the_table_is_small_and_its_names_are_c_functions() -> None:
    assert len(VARIANTS) <= 12
    assert all(variant.name.isidentifier() for variant in VARIANTS)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_no_arch_from_9_0_on_gets_the_emulated_s4_product() -> None:
    for variant in VARIANTS:
        if "s4" in (variant.activation, variant.weight) and variant.template == "sm80":
            assert variant.archs == ("sm_80",)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "sm_80"])
def test_pick_never_takes_packed_activations_from_9_0_on(arch: str) -> None:
    for m, (n, k), weight, out in itertools.product((9, 64, 65, 4608), FLUX, ("s4", "s8"), ("bf16", "fp16", "fp32")):
        assert pick(m, n, k, arch, weight, "s4", out) is None
        found = pick(m, n, k, arch, weight, "s8", out)
        assert found is None or found.activation == "s8"


def test_every_arch_multiplies_int8_and_writes_both_16_bit_types() -> None:
    for arch in ARCHS:
        held = {(variant.weight, variant.activation, variant.out) for variant in of_arch(arch)}
        assert {("s8", "s8", "bf16"), ("s8", "s8", "fp16")} <= held


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        *[((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")],
        *[((12, 0), "sm_120"), ((12, 1), "sm_121"), ((7, 5), None), ((9, 1), None), ((6, 1), None), ((13, 0), None)],
    ],
)
def test_arch_of_a_capability(capability: tuple[int, int], arch: str | None) -> None:
    assert arch_of(capability) == arch


@pytest.mark.parametrize(("n", "k"), FLUX)
@pytest.mark.parametrize("out", ["bf16", "fp16"])
def test_hopper_has_two_tiles_for_the_shapes_of_flux(n: int, k: int, out: str) -> None:
    tiles = {m: pick(m, n, k, "sm_90a", "s4", "s8", out) for m in (9, 64, 65, 512, 4608)}
    assert [variant and variant.tile for variant in tiles.values()] == [(64, 16, 256)] * 2 + [(128, 128, 128)] * 3


def test_few_rows_wide_rows_and_extents_off_the_multiples_go_to_the_gemv() -> None:
    assert pick(GEMV_ROWS, 3072, 3072, "sm_90a", "s4", "s8", "bf16") is None
    assert pick(4096, 3072, MAX_K + 32, "sm_90a", "s4", "s8", "bf16") is None
    assert pick(4096, 3080, 3072, "sm_90a", "s4", "s8", "bf16") is None
    assert pick(4096, 3080, 3072, "sm_90a", "s8", "s8", "bf16") is not None
    assert pick(4096, 3072, 3072 + 16, "sm_90a", "s4", "s8", "bf16") is None
    assert pick(4096, 3072, 3072, "sm_90a", "s8", "s8", "fp32") is None


def test_int32_holds_the_largest_sum_that_a_variant_may_meet() -> None:
    assert 16 * 8 * 128 * MAX_K < 2**31
    assert 128 * 128 * MAX_K < 2**31


def test_pick_depends_on_its_arguments_alone() -> None:
    assert pick(512, 3072, 3072, "sm_80", "s4", "s4", "bf16") is pick(512, 3072, 3072, "sm_80", "s4", "s4", "bf16")
    assert pick(512, 3072, 3072, "sm_90a", "s4", "s4", "bf16") is None
    assert pick(512, 3072, 3072, "sm_120", "s4", "s8", "bf16") is None
