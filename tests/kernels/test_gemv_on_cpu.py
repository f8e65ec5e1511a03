"""The GEMV of the compiled library against the reference, lane by lane on a CPU (cuda_on_cpu.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, prepare_weight, reference
from convrot_kernels.backends import cutlass
from convrot_kernels.backends.cutlass.products import BLOCKS
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

SOURCE = "gemv"
FORMS = [(4, BLOCKS), (4, "row_major"), (8, "row_major")]  # bits and order of a weight


def _weight(n: int, k: int, bits: int, layout: str) -> Tensor:
    codes = make_codes(n, k, bits=bits, seed=n)
    return prepare_weight(pack_int4(codes) if bits == 4 else codes, layout)


@pytest.mark.parametrize(("bits", "layout"), FORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 96), (3, 80, 544), (8, 32, 64)])
def test_codes(cpu_kernels: Any, m: int, n: int, k: int, bits: int, layout: str) -> None:
    a, scales, bias = make_codes(m, k), (make_scale(m), make_scale(n)), torch.linspace(-3, 3, n)
    arguments = (a, _weight(n, k, bits, layout), *scales, bias, torch.float32)
    assert_equal(cutlass.scaled_mm(*arguments, b_layout=layout), reference.scaled_mm(*arguments, b_layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "layout"), FORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 96), (5, 32, 544), (9, 16, 160)])
def test_values(cpu_kernels: Any, m: int, n: int, k: int, bits: int, layout: str, dtype: torch.dtype) -> None:
    x, weight, scale = make_inputs(m, k, dtype=dtype), _weight(n, k, bits, layout), make_scale(n)
    exact = (x.double() @ make_codes(n, k, bits=bits, seed=n).double().t()) * scale
    bound = 1e-6 * (x.double().abs() @ make_codes(n, k, bits=bits, seed=n).double().abs().t()) * scale
    out = cutlass.scaled_mm(x, weight, None, scale, None, torch.float32, b_layout=layout)
    assert ((out.double() - exact).abs() <= bound).all()


MANY = [16, 48, *[16] * 63]  # more than a launch takes


@pytest.mark.parametrize(
    ("m", "widths", "coded", "form"),
    [
        *((3, [16, 80, 48], coded, form) for form in FORMS for coded in (False, True)),
        (9, [16, 48], False, FORMS[0]),
        (1, MANY, False, FORMS[0]),
        (1, [16, 12288, 32], False, FORMS[0]),  # the second has rows enough for blocks of half the warps
    ],
)
def test_many_weights_at_once_are_summed_as_each_alone(
    cpu_kernels: Any, m: int, widths: list[int], coded: bool, form: tuple[int, str]
) -> None:
    k, (bits, layout) = 64, form
    a, a_scale = (make_codes(m, k), make_scale(m)) if coded else (make_inputs(m, k), None)
    members = [
        (_weight(n, k, bits, layout), make_scale(n, seed=i), torch.full((n,), float(i))) for i, n in enumerate(widths)
    ]
    weights, scales, biases = (list(operands) for operands in zip(*members, strict=True))
    out = cutlass.scaled_mm_cat(a, weights, a_scale, scales, biases, b_layout=layout)
    assert cpu_kernels.names == ["convrot_gemv_joined"]
    alone = [cutlass.scaled_mm(a, b, a_scale, b_scale, bias, b_layout=layout) for b, b_scale, bias in members]
    assert_equal(out, torch.cat(alone, dim=-1))
