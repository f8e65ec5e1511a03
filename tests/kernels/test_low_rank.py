from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from convrot_kernels import low_rank_down, low_rank_up
from convrot_kernels.testing import assert_equal, make_inputs

OP = "low_rank_down"
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def _random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def _assert_close(actual: Tensor, expected: Tensor, size: Tensor | float) -> None:
    """Within a rounding of the result and what fp32 sums of terms whose magnitudes add up to `size` may lose."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    assert (error <= ROUNDING[actual.dtype] * expected.abs() + 2e-6 * size + 1e-6).all()


def _values(x: Tensor, options: dict[str, Any]) -> Tensor:
    """What is multiplied, in fp64 of x's dtype."""

    def gelu(v: Tensor) -> Tensor:
        return F.gelu(v.double(), approximate="tanh").to(x.dtype)

    if options.get("gelu"):
        return gelu(x).double()
    if "y" in options:
        return torch.cat((x, gelu(options["y"])), dim=-1).double()
    if "scale" in options:
        wide = F.layer_norm(x.double(), x.shape[-1:], eps=1e-6)
        gain, shift = (vector.double().view(-1, *[1] * (x.dim() - 2), x.shape[-1]) for vector in
                       (options["scale"], options["shift"]))  # fmt: skip
        return (wide * (1 + gain) + shift).to(x.dtype).double()
    return x.double()


def _options(kind: str, b: int, rows: int, k: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    if kind == "gelu":
        return {"gelu": True}
    if kind == "cat_gelu":
        return {"y": _random(b, rows, 2 * k + 16, dtype=dtype, device=device, seed=5)}
    if kind == "modulate":
        return {
            name: _random(b, k, dtype=dtype, device=device, seed=i) * 0.3 for i, name in enumerate(("scale", "shift"))
        }
    return {}


@pytest.mark.parametrize("kind", ["none", "gelu", "modulate", "cat_gelu"])
@pytest.mark.parametrize(("b", "rows", "k", "r"), [(1, 37, 256, 16), (2, 9, 80, 5), (1, 3, 300, 70)])
def test_down_is_the_product_of_what_a_quantizer_reads(
    backend: str, device: str, dtype: torch.dtype, kind: str, b: int, rows: int, k: int, r: int
) -> None:
    x = make_inputs(b, rows, k, dtype=dtype, device=device)
    options = _options(kind, b, rows, k, dtype, device)
    values = _values(x, options)
    down = _random(r, values.shape[-1], dtype=dtype, device=device, seed=1) / 16
    low = low_rank_down(x, list(down.split((r + 1) // 2)), **options)
    assert low.dtype == dtype
    # a prologue's own rounding may fall the other way, once in many values
    flips = 0.0 if kind == "none" else ROUNDING[dtype] * 4
    size = values.abs() @ down.double().abs().t()
    _assert_close(low, values @ down.double().t(), size * (1 + flips / 2e-6))


def test_down_of_rows_whose_squares_leave_fp32(backend: str, device: str) -> None:
    x = make_inputs(1, 5, 128, dtype=torch.float32, device=device)
    x[0, 2] *= 1e25
    zeros = torch.zeros(1, 128, device=device)
    low = low_rank_down(x, [torch.eye(8, 128, device=device)], scale=zeros, shift=zeros)
    expected = F.layer_norm(x.double(), (128,), eps=0.0)[..., :8]
    torch.testing.assert_close(low.double(), expected, rtol=1e-4, atol=1e-4)


def test_down_reads_slices_and_transposed_weights(backend: str, device: str) -> None:
    wide = make_inputs(2, 9, 3 * 64, device=device)
    down = _random(64, 12, dtype=torch.bfloat16, device=device).t()
    part = wide[..., 64:128]
    assert_equal(low_rank_down(part, [down]), low_rank_down(part.contiguous(), [down.contiguous()]))
    assert low_rank_down(wide[:0, :, :64], [down]).shape == (0, 9, 12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("b", "rows"), [(1, 70), (2, 33), (2, 1)])
def test_up_adds_every_term_to_its_columns(
    backend: str, device: str, dtype: torch.dtype, b: int, rows: int, gated: bool
) -> None:
    terms = [(96, 16, 0, 1.0), (40, 5, 96, -0.5), (40, 80, 96, 2.0)]  # n, r, first column, alpha: two on one place
    up = [_random(n, r, dtype=dtype, device=device, seed=i) / 8 for i, (n, r, _, _) in enumerate(terms)]
    out = _random(b, rows, 150, dtype=dtype, device=device, seed=7)
    low = _random(b, rows, 101, dtype=dtype, device=device, seed=8)
    gate = _random(b, 150, dtype=dtype, device=device, seed=9) if gated else None
    expected, first = out.double(), 0
    for (n, r, column, alpha), term in zip(terms, up, strict=True):
        factor = alpha if gate is None else alpha * gate[:, None, column : column + n].double()
        expected[..., column : column + n] += factor * (low[..., first : first + r].double() @ term.double().t())
        first += r
    before = out.clone()
    low_rank_up(out, low, up, [c for _, _, c, _ in terms], [a for *_, a in terms], gate)
    # a place that two terms were added to was rounded twice
    _assert_close(out, expected, 100 * (1 + ROUNDING[dtype] * 3 / 2e-6 / 10))
    assert_equal(out[..., 136:], before[..., 136:])


@pytest.mark.parametrize("gated", [False, True])
def test_up_of_many_terms_is_that_of_one_after_the_other(backend: str, device: str, gated: bool) -> None:
    sizes = [(200, 8), (128, 8), (7, 8), (130, 8), (64, 8), (64, 16), (64, 16)]  # the last two on one place
    columns = [0, 200, 328, 340, 470, 534, 534]
    up = [_random(n, r, dtype=torch.bfloat16, device=device, seed=i) for i, (n, r) in enumerate(sizes)]
    alpha = [0.5 + i / 4 for i in range(len(up))]
    low = _random(2, 40, sum(r for _, r in sizes), dtype=torch.bfloat16, device=device, seed=20)
    gate = _random(2, 600, dtype=torch.bfloat16, device=device, seed=21) if gated else None
    out = _random(2, 40, 600, dtype=torch.bfloat16, device=device, seed=22)
    expected, first = out.clone(), 0
    for term, column, factor in zip(up, columns, alpha, strict=True):
        last = first + term.shape[1]
        low_rank_up(expected, low[..., first:last], [term], [column], [factor], gate)
        first = last
    before = out.clone()
    low_rank_up(out, low, up, columns, alpha, gate)
    assert_equal(out, expected)
    assert not torch.equal(out[..., :598], before[..., :598])
    assert_equal(out[..., 598:], before[..., 598:])


def test_up_writes_into_a_slice_and_into_rows_that_no_one_stride_reaches(backend: str, device: str) -> None:
    up, low = (
        [_random(32, 4, dtype=torch.bfloat16, device=device)],
        _random(3, 5, 4, dtype=torch.bfloat16, device=device),
    )
    expected = torch.zeros(3, 5, 32, dtype=torch.bfloat16, device=device)
    low_rank_up(expected, low, up)
    whole = torch.zeros(3, 7, 64, dtype=torch.bfloat16, device=device)
    low_rank_up(whole[:, 1:6, 16:48], low, up)
    assert_equal(whole[:, 1:6, 16:48], expected)
    assert whole.count_nonzero() == expected.count_nonzero()
    assert expected.count_nonzero() > 0


def test_terms_held_in_fp32_are_rounded_to_the_dtype_of_the_values(backend: str, device: str) -> None:
    x = make_inputs(2, 9, 64, device=device)
    down, up = (_random(*shape, dtype=torch.float32, device=device) for shape in ((8, 64), (48, 8)))
    low = low_rank_down(x, [down])
    assert_equal(low, low_rank_down(x, [down.bfloat16()]))
    out, other = torch.ones(2, 2, 9, 48, dtype=torch.bfloat16, device=device)
    low_rank_up(out, low, [up])
    low_rank_up(other, low, [up.bfloat16()])
    assert_equal(out, other)


def test_empty_low_and_no_term_change_nothing(backend: str, device: str) -> None:
    out = _random(2, 3, 16, dtype=torch.float32, device=device)
    before = out.clone()
    low = low_rank_down(out, [])
    assert low.shape == (2, 3, 0)
    low_rank_up(out, low, [])
    low_rank_up(out[:0], out.new_zeros(0, 3, 4), [out.new_ones(16, 4)])
    assert_equal(out, before)


def test_compiled_it_adds_in_place(device: str) -> None:
    def layer(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        out = x.repeat(1, 1, 2)
        low_rank_up(out, low_rank_down(x, [down], gelu=True), [up, up], [0, 64], [1.0, 0.5])
        return out * 2

    x, down, up = (_random(*shape, dtype=torch.float32, device=device) for shape in ((2, 5, 64), (8, 64), (64, 4)))
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, down, up), layer(x, down, up))


def _down(**change: Any) -> None:
    low_rank_down(**({"x": torch.zeros(2, 3, 16), "down": [torch.zeros(4, 16)]} | change))


def _up(**change: Any) -> None:
    arguments = {"out": torch.zeros(2, 3, 16), "low": torch.zeros(2, 3, 4), "up": [torch.zeros(16, 4)]}
    low_rank_up(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "change", "sentence"),
    [
        (_down, {"down": [torch.zeros(4, 8)]}, r"down\[0\] must have the shape \(4, 16\), got \(4, 8\)"),
        (_down, {"down": [torch.zeros(16)]}, r"down\[0\] must be a matrix \(r, K\), got 1 dimensions"),
        (_down, {"down": [torch.zeros(4, 16).int()]}, r"down\[0\] must be float16, bfloat16 or float32"),
        (_up, {"low": torch.zeros(2, 3, 4).half()}, "out and low must have one dtype"),
        (_down, {"y": torch.zeros(2, 3, 8)}, r"down\[0\] must have the shape \(4, 24\), got \(4, 16\)"),
        (_down, {"scale": torch.zeros(16)}, "scale and shift come together, got one of them"),
        (_down, {"gelu": True, "y": torch.zeros(2, 3, 8)}, "x is changed in one way at most"),
        (_down, {"scale": torch.zeros(16), "shift": torch.zeros(16), "eps": 0.0}, "eps must be positive"),
        (_down, {"down": [torch.zeros(4, 16, requires_grad=True)]}, r"down\[0\] must not require grad"),
        (_up, {"up": [torch.zeros(16, 4, requires_grad=True)]}, r"up\[0\] must not require grad"),
        (_up, {"low": torch.zeros(2, 3, 5)}, r"low must have the shape \(2, 3, 4\)"),
        (_up, {"columns": [1]}, r"up\[0\] must lie within the columns of out, got 16 columns from 1 on, N=16"),
        (_up, {"alpha": [1.0, 2.0]}, "each term has one column and one alpha, got 1 up, 1 columns, 2 alpha"),
        (_up, {"up": [torch.zeros(16)]}, r"up\[0\] must be a matrix"),
        (_up, {"gate": torch.zeros(3, 16)}, r"gate must have the shape \(16,\) or \(2, 16\)"),
        (_up, {"out": torch.zeros(2, 3, 16, requires_grad=True)}, "out must not require grad"),
        (_up, {"out": torch.zeros(2, 16, 3).mT}, "out must be contiguous in its last dimension"),
        (_up, {"out": torch.zeros(1, 3, 16).expand(2, 3, 16)}, "rows of out must not share memory"),
    ],
)
def test_wrong_input_gets_one_sentence(call: Callable[..., None], change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(**change)
