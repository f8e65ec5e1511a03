import pytest
import torch

from convrot_kernels import preferred_codes, preferred_layout, prepare_weight, restore_weight
from convrot_kernels.layouts import LAYOUTS
from convrot_kernels.testing import assert_equal


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("n", "k"), [(16, 128), (3072, 256)])
def test_restore_undoes_prepare_bit_for_bit(layout: str, n: int, k: int) -> None:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    resident = prepare_weight(packed, layout)
    assert (resident.numel(), resident.dtype) == (packed.numel(), torch.uint8)
    assert_equal(restore_weight(resident, layout), packed)


def test_row_major_is_the_weight_itself() -> None:
    weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    assert prepare_weight(weight, "row_major").data_ptr() == weight.data_ptr()
    assert restore_weight(weight, "row_major").data_ptr() == weight.data_ptr()


def test_preferences_are_known_names(device: str) -> None:
    assert preferred_codes(device) in ("int8", "packed")
    assert preferred_layout(device) in LAYOUTS


def test_the_cpu_reads_int8_codes_and_row_major_weights() -> None:
    assert preferred_codes("cpu") == "int8"
    assert preferred_layout(torch.device("cpu")) == "row_major"
