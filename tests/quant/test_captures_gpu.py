"""Captures on a GPU of forwards that are not FLUX's: random numbers, autocast, failures, memory that others free."""

import pytest
import torch
from torch import Tensor, nn

from convrot_quant.captures import GraphError
from convrot_quant.graphs import cuda_graphs_

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


class Random(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + torch.rand_like(x) * t


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum())


class Raising(nn.Module):
    """Fails in Python, with nothing wrong in CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 16
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing")
        return y


def test_random_numbers_are_those_of_eager_and_a_scalar_may_be_on_the_cpu() -> None:
    model, x = Random().eval(), torch.zeros(1000, device="cuda")
    scales = [torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.5, 2.0)]
    with torch.no_grad():
        torch.manual_seed(5)
        expected = [model(x, scale) for scale in scales]
        cuda_graphs_(model)
        torch.manual_seed(5)
        results = [model(x, scale) for scale in scales]
    assert results[0].dtype == torch.float32  # a scalar does not promote, wherever it is
    assert all(map(torch.equal, results, expected))


def test_autocast_weights_outlive_the_callers_context() -> None:
    model, x = nn.Linear(512, 512).cuda().eval(), torch.randn(64, 512, device="cuda")
    cuda_graphs_(model)
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            result = model(x)
            assert torch.equal(result, nn.functional.linear(x, model.weight, model.bias))
        assert result.dtype == torch.bfloat16
        torch.full((2**22,), float("nan"), device="cuda")


@pytest.mark.parametrize("model", [Waiting(), Raising()])
def test_a_capture_that_fails_names_its_cause_and_leaves_all_usable(model: nn.Module) -> None:
    model.eval()
    other, x = nn.Linear(8, 8).cuda().eval(), torch.ones(2, 8, device="cuda")
    stream = torch.cuda.current_stream()
    cuda_graphs_(model)
    cuda_graphs_(other)
    with torch.no_grad():
        expected = other(x)
        for _ in range(2):
            with pytest.raises(GraphError, match=r"cannot be captured: .*captur.*; or switch graphs off: cuda_graphs_"):
                model(x)
        assert torch.cuda.current_stream() == stream
        assert torch.equal(other(x), expected)
        cuda_graphs_(model, False)
        assert torch.equal(model(x), x * 16)
        cuda_graphs_(other)  # captured anew
        assert torch.equal(other(x), expected)


def test_a_workspace_that_others_free_is_the_graphs_own() -> None:
    model, x = nn.Linear(4096, 4096).cuda().half().eval(), torch.randn(8, 4096, device="cuda").half()
    cuda_graphs_(model)
    with torch.no_grad():
        expected = model(x)
        torch._C._cuda_clearCublasWorkspaces()  # as torch.compile(mode="reduce-overhead") does
        torch.cuda.empty_cache()
        kept = [torch.ones(2**20, device="cuda") for _ in range(32)]
        assert torch.equal(model(x), expected)
        assert all((block == 1).all() for block in kept)


def test_a_model_that_goes_takes_its_memory_along() -> None:
    before = torch.cuda.memory_allocated()
    model, x = nn.Linear(64, 64).cuda().eval(), torch.randn(2**16, 64, device="cuda")
    cuda_graphs_(model)
    with torch.no_grad():
        model(x)
    del model, x
    assert torch.cuda.memory_allocated() <= before + 4096
