"""The term kernels of the compiled library against the reference, lane by lane on a CPU (cuda_on_cpu.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from convrot_kernels import reference
from convrot_kernels.backends import cutlass
from convrot_kernels.testing import assert_equal, make_inputs

SOURCE = "low_rank"


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_close(actual: Tensor, expected: Tensor, more: Tensor | float = 0.0) -> None:
    """Within one rounding, and `more`."""
    error = (actual.double() - expected.double()).abs()
    assert (error <= torch.finfo(actual.dtype).eps * expected.double().abs() + more).all(), error.max()


def _assert_projected(actual: Tensor, x: Tensor, down: list[Tensor], **options: Any) -> None:
    """As the reference, but for sums in another order, and two values of a row that a prologue rounds the other way."""
    expected, matrix = reference.low_rank_down(x, down, **options), torch.cat(down).double()
    values = reference.low_rank_down(x, [torch.eye(matrix.shape[1], dtype=x.dtype)], **options).double()
    sums = 2e-6 * (values.abs() @ matrix.abs().t())
    flips = 2 * torch.finfo(x.dtype).eps * values.abs().amax(-1, keepdim=True) * matrix.abs().max()
    _assert_close(actual, expected, sums + (flips if options else 0.0))


# rows, K, ranks of every term: tiles and bands that are not full, warps without a chunk, one to four terms; rows enough
# for two bands a block, a row too long to be held while its moments are taken
SHAPES = [
    (1, 8, (1,)), (5, 264, (7,)), (17, 1032, (8, 8)), (37, 520, (16, 16, 16)), (33, 1544, (12,) * 4), (16, 72, (80,)),
    (515, 72, (20, 20)), (515, 40, (12,) * 4), (2, 4104, (5,)),
]  # fmt: skip
DOWN = [*((torch.bfloat16, *shape) for shape in SHAPES), *((torch.float16, *shape) for shape in SHAPES[1:4])]


@pytest.mark.parametrize("kind", ["none", "gelu", "modulate", "cat_gelu"])
@pytest.mark.parametrize(("dtype", "rows", "k", "ranks"), DOWN)
def test_down(cpu_kernels: Any, dtype: torch.dtype, rows: int, k: int, ranks: tuple[int, ...], kind: str) -> None:
    x = make_inputs(2, rows, k + 24).to(dtype)[..., 16 : 16 + k]  # rows further apart than they are long
    options: dict[str, Any] = {}
    if kind == "gelu":
        options = {"gelu": True}
    elif kind == "modulate":
        scale, shift = _random(2, 2 * k, dtype=dtype, seed=3).chunk(2, dim=-1)
        options = {"scale": scale, "shift": shift}
    elif kind == "cat_gelu":
        options = {"y": make_inputs(2, rows, 40, seed=1).to(dtype)}
    wide = k + (40 if kind == "cat_gelu" else 0)
    down = [_random(r, wide, dtype=dtype, seed=i) / 16 for i, r in enumerate(ranks)]
    _assert_projected(cutlass.low_rank_down(x, down, **options), x, down, **options)


@pytest.mark.parametrize("vectors", ["one sample", "all alike", "whole blocks", "fp32", "each its own dtype"])
def test_down_with_vectors_of_any_kind(cpu_kernels: Any, vectors: str) -> None:
    b, rows = 1 if vectors == "one sample" else 3, 32 if vectors == "whole blocks" else 11
    x, down = make_inputs(b, rows, 520), [_random(24, 520) / 16]
    scale, shift = _random(2, 520, seed=1) if vectors == "all alike" else _random(2, b, 520, seed=1)
    if vectors == "fp32":
        scale, shift = scale.float(), shift.float()
    if vectors == "each its own dtype":
        scale, shift = scale.half(), shift.float()
    options = {"scale": scale, "shift": shift}
    _assert_projected(cutlass.low_rank_down(x, down, **options), x, down, **options)


def test_down_of_rows_whose_squares_leave_fp32_and_of_broken_rows(cpu_kernels: Any) -> None:
    x, down = make_inputs(1, 6, 512), [torch.eye(16, 512).bfloat16()]
    x[0, 1] *= 1e25
    x[0, 3, 7] = float("nan")
    x[0, 4] = 0
    vectors = {"scale": _random(512), "shift": _random(512, seed=1)}
    low, expected = cutlass.low_rank_down(x, down, **vectors), reference.low_rank_down(x, down, **vectors)
    assert low[0, 3].isnan().all()
    whole = [0, 1, 2, 4, 5]
    torch.testing.assert_close(low[0, whole], expected[0, whole], rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "each sample", "all alike"])
@pytest.mark.parametrize(("rows", "r"), [(1, 4), (37, 8), (70, 16), (33, 28), (130, 64)])
def test_up(cpu_kernels: Any, rows: int, r: int, gate: str, dtype: torch.dtype) -> None:
    sizes, columns, alpha = [(264, r), (8, r), (72, r)], [8, 272, 288], [1.0, -0.5, 2.0]
    up = [_random(*size, dtype=dtype, seed=i) / 8 for i, size in enumerate(sizes)]
    gates = {"none": None, "each sample": _random(2, 376, seed=4), "all alike": _random(376, seed=4).float()}[gate]
    whole = _random(2, rows, 400, dtype=dtype, seed=5)
    low = _random(2, rows, 3 * r + 4, dtype=dtype, seed=6)[..., : 3 * r]
    expected, before = whole.clone(), whole.clone()
    reference.low_rank_up(expected[..., 8:384], low, up, columns, alpha, gates)
    cutlass.low_rank_up(whole[..., 8:384], low, up, columns, alpha, gates)
    _assert_close(whole, expected, 1e-5)
    for untouched in (slice(0, 16), slice(288, 296), slice(368, 400)):
        assert_equal(whole[..., untouched], before[..., untouched])
    assert cpu_kernels.names == ["convrot_low_rank_up"]
