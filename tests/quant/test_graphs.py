"""cuda_graphs_ without a GPU: signatures, replays, and which calls run as before. A recorder stands in for CUDA."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convrot_kernels import use_backend
from convrot_quant import quantize_
from convrot_quant.graphs import cuda_graphs_


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor, extra: Any = None, *, scale: float = 1.0, more: Any = None) -> tuple[Any, ...]:
        y = self.linear(x * scale) + self.shift
        return (y + extra["t"] if isinstance(extra, dict) else y), "same"


@pytest.fixture
def model(recorder: Any) -> Iterator[Model]:
    module = Model().eval()
    cuda_graphs_(module)
    with torch.no_grad():
        yield module


X = torch.linspace(-1, 1, 12).view(3, 4)


# replays


def test_one_capture_serves_all_values_and_results_are_the_callers_own(model: Model, recorder: Any) -> None:
    plain = copy.deepcopy(model)
    cuda_graphs_(plain, False)
    inputs = [X, -X, X * 3]
    results = [model(x, {"t": torch.tensor(i)}) for i, x in enumerate(inputs)]
    for i, (x, result) in enumerate(zip(inputs, results, strict=True)):
        assert torch.equal(result[0], plain(x, {"t": torch.tensor(i)})[0])
        assert result[1] == "same"
    assert [graph.replays for graph in recorder.graphs] == [3]
    assert torch.equal(model(results[0][0])[0], plain(results[0][0])[0])  # a result as the next input


SAME = {
    "strides": lambda model: model(X.t().contiguous().t()),
    "an expanded tensor": lambda model: model(X[:1].expand(3, 4)),
    "a parameter": lambda model: model(nn.Parameter(X)),
}
OTHER = {
    "shape": lambda model: model(X[:2]),
    "dtype": lambda model: model(X.to(torch.int32)),
    "structure": lambda model: model(X, {"t": X}),
    "a nested structure": lambda model: model(X, more={"a": [X, (X, None)]}),
    "a keyword instead of a place": lambda model: model(x=X),
    "a value": lambda model: model(X, scale=2.0),
    "a value of another type": lambda model: model(X, scale=1),
    "a string": lambda model: model(X, "some"),
}


@pytest.mark.parametrize("case", list(SAME))
def test_the_same_signature_is_replayed(case: str, model: Model, recorder: Any) -> None:
    model(X)
    SAME[case](model)
    assert len(recorder.graphs) == 1


@pytest.mark.parametrize("case", list(OTHER))
def test_another_signature_is_captured_once(case: str, model: Model, recorder: Any) -> None:
    model(X)
    model(X, scale=1.0)
    for _ in range(2):
        OTHER[case](model)
        model(X)
    assert len(recorder.graphs) == 3
    assert recorder.alive == 3
    assert recorder.pools == 1


def test_keywords_in_another_order_are_the_same_call(model: Model, recorder: Any) -> None:
    model(X, scale=2.0, more=X)
    model(X, more=X, scale=2.0)
    assert len(recorder.graphs) == 1


def test_modes_that_choose_kernels_belong_to_the_signature(model: Model, recorder: Any) -> None:
    for _ in range(2):
        model(X)
        with torch.inference_mode():
            assert model(X)[0].is_inference()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(X)[0].dtype == torch.float32  # the fp32 buffer added to a bf16 product
        with use_backend("triton"):
            model(X)
    assert len(recorder.graphs) == 4


def test_the_signature_used_longest_ago_goes(model: Model, recorder: Any) -> None:
    cuda_graphs_(model, keep=2)
    for rows in (1, 2, 1, 3):
        model(X[:rows])
    assert [graph.alive for graph in recorder.graphs] == [True, False, True]
    assert recorder.settled == 1
    model(X[:1])
    assert len(recorder.graphs) == 3
    model(X[:2])
    assert len(recorder.graphs) == 4


@pytest.mark.parametrize("trained", [False, True])
def test_training_and_grad_mode_run_as_before(trained: bool, model: Model, recorder: Any) -> None:
    model.train(trained)
    with torch.set_grad_enabled(not trained):
        assert model(X)[0].requires_grad is not trained
    assert recorder.graphs == []


def test_a_compiler_sees_the_plain_forward(model: Model, recorder: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X)[0], model.linear(X))
    assert recorder.graphs == []


def test_threads_take_turns(model: Model, recorder: Any) -> None:
    expected = [model.linear(X * i) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(50) if not torch.equal(model(X * i)[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [graph.replays for graph in recorder.graphs] == [200]


def test_cpu_tensors_move_to_the_device_of_the_others(
    model: Model, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.device_type = "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # torch knows no autocast on meta
    model.to("meta")
    assert model(X.to("meta"), {"t": torch.tensor(0.5)})[0].device.type == "meta"
    assert all(static.device.type == "meta" for static in pytree.tree_leaves(recorder.graphs[0].results[:1]))


def test_a_quantized_flux(
    recorder: Any, make_flux: Callable[..., nn.Module], run: Callable[[nn.Module, int], Tensor]
) -> None:
    model = make_flux(1, 1)
    quantize_(model, progress=False)
    expected = [run(model, seed) for seed in range(3)]
    cuda_graphs_(model)
    results = [run(model, seed) for seed in range(3)]
    assert all(map(torch.equal, results, expected))
    assert [graph.replays for graph in recorder.graphs] == [3]


def test_an_output_of_diffusers_stays_one(recorder: Any) -> None:
    class Wrapped(Model):
        def forward(self, x: Tensor) -> Any:
            return Transformer2DModelOutput(sample=self.linear(x))

    model = Wrapped().eval()
    cuda_graphs_(model)
    with torch.no_grad():
        first, second = model(X), model(-X)
        assert type(first) is Transformer2DModelOutput
        assert torch.equal(first.sample, model.linear(X))
        assert torch.equal(second.sample, model.linear(-X))
