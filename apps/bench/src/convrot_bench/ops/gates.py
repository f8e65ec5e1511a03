"""What an op has to agree with before it is timed. Large tensors are compared on some of their rows, at both ends.

Ours always runs the full shape: it is a kernel's last rows and columns that go wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convrot_bench.bench import GateError
from convrot_bench.ops.problems import Weight, route
from convrot_kernels import rotate_quantize, scaled_mm, unpack_int4, use_backend
from convrot_kernels.layouts import LAYOUTS
from convrot_kernels.testing import assert_codes_close, assert_equal

FIRST_CODES, FIRST_PRODUCTS, LAST = 960, 128, 64  # rows; codes are many, since 1e-5 of them may differ
FLIPS = 2e-3  # share of the codes behind a LayerNorm, where another order of sums moves a few 16-bit roundings
FLIPPED_SCALE = 2e-3
VALUE_ERROR = 1e-2  # of values times codes, summed in fp32 and rounded to bf16
PEER_ERROR = 0.3  # of another project's W4A4 against the product of its 16-bit arguments


def ends(m: int, first: int, device: torch.device) -> Tensor:
    """Indices of the first rows and the last: all, where there are few."""
    rows = torch.arange(m, device=device)
    return rows if m <= first + LAST else torch.cat((rows[:first], rows[-LAST:]))


def relative_l2(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|; inf where actual is not finite."""
    error = ((actual.double() - exact.double()).norm() / exact.double().norm()).item()
    return error if error == error else float("inf")


def gate_codes(
    backend: str, op: Callable[..., Any], arguments: tuple[Tensor, ...], options: dict[str, Any], exact: bool
) -> None:
    """op(*arguments) of the backend against the reference's; not `exact`: up to a few flipped roundings."""
    x = arguments[0]
    rows = ends(len(x), FIRST_CODES, x.device)
    some = [argument[rows] if argument.dim() == 2 else argument for argument in arguments]
    with use_backend("reference"):
        wanted = op(*some, **options)
    with use_backend(route(backend, x.device)):
        codes, scale = op(*arguments, **options)
    try:
        if exact:
            assert_codes_close((codes[rows], scale[rows]), wanted, prologue=op is not rotate_quantize)
        else:
            share = (codes[rows] != wanted[0]).float().mean().item()
            assert share < FLIPS, f"{share:.2%} of the codes differ, allowed are {FLIPS:.2%}"
            torch.testing.assert_close(scale[rows], wanted[1], rtol=FLIPPED_SCALE, atol=0)
    except AssertionError as error:
        name = getattr(op, "__name__", "op")
        raise GateError(f"{name} of {backend} at {tuple(x.shape)} {options} disagrees: {error}") from None


def gate_product(backend: str, codes: Tensor, a_scale: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """scaled_mm of the backend, bit for bit the reference's."""
    rows = ends(len(codes), FIRST_PRODUCTS, codes.device)
    with use_backend("reference"):
        row_major = LAYOUTS[weight.layout].restore(weight.codes)
        wanted = scaled_mm(codes[rows], row_major, a_scale[rows], weight.scale, bias, torch.bfloat16)
    with use_backend(route(backend, codes.device)):
        out = scaled_mm(codes, weight.codes, a_scale, weight.scale, bias, torch.bfloat16, b_layout=weight.layout)
    try:
        assert_equal(out[rows], wanted)
    except AssertionError as error:
        m, n, k = len(codes), len(weight.codes), codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
        raise GateError(f"scaled_mm of {backend} at M={m}, N={n}, K={k} disagrees: {error}") from None


def gate_values(backend: str, x: Tensor, weight: Weight, bias: Tensor) -> None:
    """Weight-only scaled_mm of the backend against the fp64 product with the dequantized weight."""
    with use_backend(route(backend, x.device)):
        out = scaled_mm(x, weight.codes, None, weight.scale, bias, b_layout=weight.layout)
    with use_backend("reference"):
        codes = unpack_int4(LAYOUTS[weight.layout].restore(weight.codes))
    exact = x.double() @ (codes.double() * weight.scale.double().unsqueeze(1)).t() + bias.double()
    error = relative_l2(out, exact)
    if error > VALUE_ERROR:
        shape = f"M={len(x)}, N={len(codes)}, K={x.shape[1]}"
        raise GateError(f"scaled_mm of {backend} at {shape} disagrees: relative error {error:.1e} of values")


def gate_integers(name: str, out: Tensor, codes: Tensor, weight: Tensor) -> None:
    """int32 (M, N) against the exact sums of int8 codes (M, K) x (N, K)."""
    rows = ends(len(codes), FIRST_PRODUCTS, codes.device)
    wanted = (codes[rows].double() @ weight.double().t()).to(torch.int32)
    if not torch.equal(out[rows], wanted):
        off = int((out[rows] != wanted).sum())
        raise GateError(f"{name} at {tuple(codes.shape)} x {tuple(weight.shape)} disagrees: {off} sums are not exact")


def gate_same(name: str, out: Tensor, wanted: Tensor) -> None:
    """Bit for bit."""
    try:
        assert_equal(out, wanted)
    except AssertionError as error:
        raise GateError(f"{name} at {tuple(wanted.shape)} disagrees: {error}") from None


def gate_close(name: str, out: Tensor, wanted: Tensor, error: float) -> None:
    """Within a relative error: where an op may sum in another order and round once more."""
    found = relative_l2(out, wanted)
    if not found <= error:
        raise GateError(
            f"{name} at {tuple(wanted.shape)} disagrees: relative error {found:.1e}, allowed is {error:.0e}"
        )


def gate_peer(name: str, error: float) -> None:
    """A peer that computes something else is no baseline."""
    if error > PEER_ERROR:
        raise GateError(f"{name} disagrees: relative error {error:.3f} against the 16-bit product")
