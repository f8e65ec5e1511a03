"""cuda_graphs_ without a GPU: what makes graphs stale, what is refused, undoing, copies."""

import copy
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from convrot_quant.captures import GraphError
from convrot_quant.graphs import cuda_graphs_

X = torch.linspace(-1, 1, 12).view(3, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor, extra: Any = None) -> Any:
        return self.linear(x) + self.shift


@pytest.fixture
def model(recorder: Any) -> Iterator[Model]:
    module = Model().eval()
    cuda_graphs_(module)
    with torch.no_grad():
        yield module


# stale


def _new_data(model: Model) -> None:
    model.linear.weight.data = model.linear.weight.data.clone()


def _written_past_the_module(model: Model) -> None:
    model.linear._parameters["bias"] = nn.Parameter(torch.ones(4))


def _with_lora(model: Model) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), model)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "data": _new_data,
    "a parameter": lambda model: setattr(model.linear, "weight", nn.Parameter(torch.ones(4, 4))),
    "a parameter that was None": lambda model: model.linear.register_parameter("bias", None),
    "past the module": _written_past_the_module,
    "a buffer": lambda model: setattr(model, "shift", torch.ones(4)),
    "a module": lambda model: setattr(model, "linear", nn.Linear(4, 4)),
    "a class": lambda model: setattr(model.linear, "__class__", type("Linear", (nn.Linear,), {})),
    "moved": lambda model: model.double().float(),
    "assigned": lambda model: model.load_state_dict(Model().state_dict(), assign=True),
    "LoRA": _with_lora,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_replaces_something_makes_graphs_stale(change: str, model: Model, recorder: Any) -> None:
    model(X), model(X[:2])
    CHANGES[change](model)
    assert torch.equal(model(X), Model.forward(model, X))
    assert [graph.alive for graph in recorder.graphs] == [False, False, True]
    assert recorder.pools == 2
    model(X)
    assert len(recorder.graphs) == 3


def test_another_dtype_at_the_same_address_is_noticed(model: Model, recorder: Any) -> None:
    model.half()(X.half())
    model.linear.weight.data = model.linear.weight.data.view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):  # a graph would read the bits as fp16
        model(X.half())
    assert recorder.alive == 0


def test_values_copied_in_place_do_not(model: Model, recorder: Any) -> None:
    model(X)
    model.load_state_dict(Model().state_dict())
    model.linear.bias.add_(1)
    assert torch.equal(model(X), Model.forward(model, X))
    assert len(recorder.graphs) == 1


def test_adapter_settings_make_graphs_stale(model: Model, recorder: Any) -> None:
    _with_lora(model)
    layer: Any = model.linear
    settings = [
        lambda: layer.scale_layer(0.5),
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
    ]
    settings += [layer.merge, layer.unmerge]
    for count, change in enumerate(settings, 1):
        model(X)
        assert len(recorder.graphs) == count
        change()
        assert torch.equal(model(X), Model.forward(model, X))
        assert recorder.alive == 1


def test_a_forward_that_moves_what_others_read_frees_them(recorder: Any) -> None:
    class Growing(Model):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.shift) < len(x):
                self.shift = torch.arange(float(len(x)))
            return x + self.shift[: len(x), None]

    model = Growing().eval()
    cuda_graphs_(model)
    with torch.no_grad():
        for rows in (5, 6, 5):
            assert torch.equal(model(torch.zeros(rows, 1))[:, 0], torch.arange(float(rows)))
    assert [graph.alive for graph in recorder.graphs] == [False, True, True]


# refused


class Opaque:
    pass


def _offloaded(model: Model) -> Any:
    add_hook_to_module(model.linear, ModelHook())
    return model(X)


def _cached(model: Model) -> Any:
    HookRegistry.check_if_exists_or_initialize(model.linear).register_hook(DiffusersHook(), "cache")
    return model(X)


def _hooked(model: Model) -> Any:
    model.linear.register_forward_hook(print)
    return model(X)


REFUSED: dict[str, tuple[Callable[[Model], Any], str]] = {
    "an object": (lambda m: m(X, Opaque()), "arguments must be tensors, numbers.* got Opaque"),
    "no tensor": (lambda m: m(None), "must be on one CUDA device, got no tensors; move the model"),
    "another device": (
        lambda m: m(X, X.to("meta")),
        "on one CUDA device, got cpu, meta; move the model and its inputs",
    ),
    "accelerate": (_offloaded, "exclude offloading and step caches, but Model.linear has a hook"),
    "diffusers": (_cached, "but Model.linear has a hook of accelerate or diffusers; keep the whole model on the GPU"),
    "a hook": (_hooked, "Model.linear has a forward hook, which a replay would not run; remove it"),
}


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.parametrize("captured", [False, True])
def test_says_what_cannot_be_captured_and_how_to_go_on(case: str, captured: bool, model: Model, recorder: Any) -> None:
    call, message = REFUSED[case]
    if captured:
        model(X)
    with pytest.raises(GraphError, match=f"cuda_graphs_: .*{message}.*or switch graphs off: cuda_graphs_"):
        call(model)
    assert recorder.running == 0


@pytest.mark.parametrize("result", [Opaque(), torch.ones(2, device="meta")])
def test_results_that_a_replay_could_not_fill_are_refused(result: Any, model: Model, recorder: Any) -> None:
    cuda_graphs_(model, False)
    model.forward = lambda x: {"sample": x, "more": result}
    cuda_graphs_(model)
    with pytest.raises(
        GraphError, match=r"must return tensors on its GPU.*got (Opaque|a tensor on meta); ask for return"
    ):
        model(X)


def test_a_capture_that_fails_leaves_the_model_usable(model: Model, recorder: Any, monkeypatch: Any) -> None:
    model(X)

    def fail(forward: Any, pool: Any) -> Any:
        raise GraphError("cuda_graphs_: this forward cannot be captured: it waits for the GPU")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "record", fail)
        with pytest.raises(GraphError, match="it waits for the GPU"):
            model(X[:2])
    assert recorder.alive == 0
    assert torch.equal(model(X[:2]), Model.forward(model, X[:2]))
    assert recorder.pools == 2


def test_the_models_own_errors_pass_unchanged(model: Model, recorder: Any) -> None:
    model(X)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(X[:, :3])
    model(X)
    assert [graph.replays for graph in recorder.graphs] == [2]


def test_refuses_to_be_switched_on_where_it_can_never_work(recorder: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a model such as pipe\.transformer; got str"):
        cuda_graphs_("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        cuda_graphs_(Model(), keep=0)
    compiled = Model()
    compiled.compile(backend="eager")
    with pytest.raises(GraphError, match=r'Model is compiled as a whole.*mode="reduce-overhead"'):
        cuda_graphs_(compiled)
    recorder.reason = "torch sees none"
    with pytest.raises(GraphError, match="need an NVIDIA GPU, but torch sees none; leave them off here"):
        cuda_graphs_(Model())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_names_the_missing_gpu() -> None:
    with pytest.raises(GraphError, match="need an NVIDIA GPU, but torch sees none"):
        cuda_graphs_(Model())


# undone and copied


def test_undone_without_a_trace(recorder: Any) -> None:
    model, untouched = Model().eval(), Model()
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    for _ in range(2):
        cuda_graphs_(model)
        assert type(model) is Model
        assert list(model.state_dict()) == keys
        assert inspect.signature(model.forward) == signature
        with torch.no_grad():
            model(X)
        cuda_graphs_(model, False)
        assert vars(model).keys() == vars(untouched).keys()
        assert recorder.alive == 0
    assert recorder.settled == recorder.trimmed == 2
    cuda_graphs_(model, False)


def test_a_forward_that_the_model_had_of_its_own_comes_back(recorder: Any) -> None:
    model = Model().eval()
    own = model.forward = lambda x: x * 3  # type: ignore[method-assign]
    cuda_graphs_(model)
    with torch.no_grad():
        assert torch.equal(model(X), X * 3)
    cuda_graphs_(model, False)
    assert model.forward is own


def test_under_a_later_hook_it_passes_calls_on_once_undone(model: Model, recorder: Any) -> None:
    add_hook_to_module(model, ModelHook())
    cuda_graphs_(model, False)
    assert torch.equal(model(X), Model.forward(model, X))
    remove_hook_from_module(model)
    assert torch.equal(model(X), Model.forward(model, X))
    assert recorder.graphs == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_captures_graphs_of_its_own(copied: Callable[[Model], Model], model: Model, recorder: Any) -> None:
    model(X)
    twin = copied(model)
    twin.linear.weight.zero_()
    assert torch.equal(twin(X), twin.linear.bias.expand(3, 4))
    assert torch.equal(model(X), Model.forward(model, X))
    assert len(recorder.graphs) == 2
    cuda_graphs_(twin, False)
    assert [graph.alive for graph in recorder.graphs] == [True, False]


def test_a_model_that_goes_takes_its_graphs_along_at_once(recorder: Any) -> None:
    model = Model().eval()
    cuda_graphs_(model)
    with torch.no_grad():
        model(X)
    del recorder.graphs[0].forward  # a real graph holds no functions
    gone = weakref.ref(model)
    del model
    assert gone() is None
