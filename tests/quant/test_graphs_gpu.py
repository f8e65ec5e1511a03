"""cuda_graphs_ on a GPU: the bits of eager FLUX in bf16 and quantized, what is followed, memory, streams, threads."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from convrot_kernels import use_backend
from convrot_kernels.backends import cudnn
from convrot_kernels.dispatch import pick
from convrot_kernels.testing import time_host
from convrot_quant import fp8_attention_, quantize_
from convrot_quant.captures import GraphError
from convrot_quant.graphs import cuda_graphs_

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
GRAD_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(params=["bf16", "w4a4", "w4a16", "w4a4_fp8_attention"])
def model(request: pytest.FixtureRequest, make_flux: Callable[..., nn.Module]) -> Iterator[nn.Module]:
    """A FLUX transformer with two double and two single blocks, on the GPU."""
    flux = make_flux(2, 2)
    if request.param != "bf16":
        quantize_(flux, "w4a16" if request.param == "w4a16" else "ours", progress=False)
    flux.cuda()
    if request.param.endswith("fp8_attention"):
        if why_not := cudnn.why_not(torch.device("cuda")):
            pytest.skip(why_not)
        fp8_attention_(flux)
    yield flux
    cuda_graphs_(flux, False)


def inputs(prompt: int = 0, step: float = 0.5, *, size: int = 4, device: str = "cuda:0") -> dict[str, Any]:
    """One step's arguments, `size` x `size` image tokens and 6 text tokens."""
    generator = torch.Generator().manual_seed(prompt)
    shapes = {"encoder_hidden_states": (2, 6, 64), "pooled_projections": (2, 64), "hidden_states": (2, size**2, 64)}
    values: dict[str, Any] = {
        name: torch.randn(shape, generator=generator).bfloat16().to(device) for name, shape in shapes.items()
    }
    ids = torch.zeros(size, size, 3, device=device)
    ids[..., 1], ids[..., 2] = torch.arange(size)[:, None], torch.arange(size)
    values |= {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(6, 3, device=device), "return_dict": False}
    steps = {name: torch.full((2,), value, dtype=torch.bfloat16, device=device) for name, value in
             (("timestep", step), ("guidance", 3.5))}  # fmt: skip
    return values | steps


def plain(model: nn.Module, values: dict[str, Any]) -> Tensor:
    """The forward of the class, which no switch changes."""
    result: Tensor = type(model).forward(model, **values)[0]
    return result


def captured(model: nn.Module) -> list[Any]:
    return [recorded.graph for recorded in vars(model)["convrot_graphs"].graphs.values()]


STEPS = [(prompt, step) for prompt in range(2) for step in (1.0, 0.75, 0.5, 0.25)]


@GRAD_MODES
def test_steps_and_prompts_have_the_bits_of_eager(model: nn.Module, mode: Callable[[], Any]) -> None:
    with mode():
        expected = [plain(model, inputs(*step)) for step in STEPS]
        cuda_graphs_(model)
        results = [model(**inputs(*step))[0] for step in STEPS]
        assert len(captured(model)) == 1
        assert all(map(torch.equal, results, expected))  # all kept: later replays have not touched them
        assert results[0].is_inference() == (mode is torch.inference_mode)
        noisy = inputs()
        for _ in range(3):  # a result is the next input, as in a sampler
            wanted = plain(model, noisy)
            noisy["hidden_states"] = model(**noisy)[0]
            assert torch.equal(noisy["hidden_states"], wanted)
        assert len(captured(model)) == 1


def test_an_output_of_diffusers_stays_one(model: nn.Module) -> None:
    cuda_graphs_(model)
    with torch.no_grad():
        output = model(**inputs() | {"return_dict": True})
        assert type(output).__name__ == "Transformer2DModelOutput"
        assert torch.equal(output.sample, plain(model, inputs()))


def test_sizes_each_have_a_graph_and_the_oldest_goes(model: nn.Module) -> None:
    cuda_graphs_(model, keep=2)
    with torch.no_grad():
        for size in (4, 6, 4, 8, 4, 6):
            for step in (0.9, 0.3):
                values = inputs(size, step, size=size)
                assert torch.equal(model(**values)[0], plain(model, values))
        assert len(captured(model)) == 2


def test_each_backend_has_a_graph_of_its_own(model: nn.Module) -> None:
    cuda_graphs_(model)
    with torch.no_grad():
        for backend in ("auto", "triton", "auto"):
            with use_backend(backend):
                assert torch.equal(model(**inputs())[0], plain(model, inputs()))
    assert len(captured(model)) == len({"triton", pick("scaled_mm", "cuda")[0]})


def test_tensors_on_the_cpu_and_any_strides_are_copied(model: nn.Module) -> None:
    cuda_graphs_(model)
    with torch.no_grad():
        for step in (0.8, 0.4):
            values = inputs(step=step)
            expected = plain(model, values)
            strided = values["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
            values |= {"hidden_states": strided, "timestep": values["timestep"].cpu()}
            assert torch.equal(model(**values)[0], expected)
    assert len(captured(model)) == 1


# what graphs were captured from


def assert_follows(model: nn.Module, change: Callable[[], Any]) -> None:
    """After the change the result is eager's, from one new graph; and the change did change it."""
    before = [model(**inputs())[0], captured(model)]
    change()
    torch.full((2**24,), float("nan"), device="cuda")  # what the old graph would read may be overwritten
    after = model(**inputs())[0]
    assert torch.equal(after, plain(model, inputs()))
    assert not torch.equal(after, before[0])
    assert len(captured(model)) == 1
    assert captured(model) != before[1]


def test_parameters_that_are_replaced_are_followed(model: nn.Module) -> None:
    cuda_graphs_(model)
    layer = model.x_embedder

    def swap_data() -> None:
        layer.bias.data = layer.bias.data + 1

    with torch.no_grad():
        assert_follows(model, swap_data)
        assert_follows(model, lambda: setattr(layer, "bias", nn.Parameter(layer.bias + 1)))
        assert_follows(model, lambda: setattr(model, "x_embedder", nn.Linear(64, 512).cuda().bfloat16()))


def test_an_adapter_is_followed_through_its_life(model: nn.Module) -> None:
    cuda_graphs_(model)
    config = LoraConfig(r=4, target_modules=["to_q", "to_out.0", "proj_out"], init_lora_weights=False)
    with torch.no_grad():
        assert_follows(model, lambda: model.add_adapter(config))
        assert_follows(model, lambda: model.set_adapters(["default"], [0.3]))
        assert_follows(model, model.disable_adapters)
        assert_follows(model, model.enable_adapters)
        scaled = inputs() | {"joint_attention_kwargs": {"scale": 0.5}}
        assert torch.equal(model(**scaled)[0], plain(model, scaled))
        assert_follows(model, lambda: model.delete_adapters("default"))


def test_values_loaded_in_place_are_read_by_the_same_graph(model: nn.Module) -> None:
    cuda_graphs_(model)
    with torch.no_grad():
        model(**inputs())
        graph = captured(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["proj_out.bias"] += 1
        model.load_state_dict(state)
        assert torch.equal(model(**inputs())[0], plain(model, inputs()))
        assert captured(model) == graph


def test_a_model_that_moved_says_so_and_comes_back(model: nn.Module) -> None:
    cuda_graphs_(model)
    with torch.no_grad():
        expected = model(**inputs())[0]
        model.cpu()
        with pytest.raises(GraphError, match="must be on one CUDA device, got cpu; move the model and its inputs"):
            model(**inputs(device="cpu"))
        assert captured(model) == []
        model.cuda()
        assert torch.equal(model(**inputs())[0], expected)
        accelerate.cpu_offload_with_hook(model, "cuda")
        with pytest.raises(
            GraphError, match="exclude offloading and step caches, but FluxTransformer2DModel has a hook"
        ):
            model(**inputs())
        accelerate.hooks.remove_hook_from_module(model)
        model.cuda()
        assert torch.equal(model(**inputs())[0], expected)


def _settled() -> tuple[int, int]:
    """Bytes allocated and reserved, without what waits for garbage collection or lies in caches."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def test_memory_goes_with_the_graphs(model: nn.Module) -> None:
    with torch.no_grad():
        for size in (32, 16):
            model(**inputs(size=size))
        allocated, reserved = _settled()
        cuda_graphs_(model, keep=1)
        held = []
        for size in (32, 16, 32, 16, 32):
            model(**inputs(size=size))
            held.append(_settled())
        assert held[0][1] > reserved
        assert held[4][0] <= held[0][0]  # the others went
        assert held[4][1] <= held[0][1] + 2 * 2**20
        cuda_graphs_(model, False)
        now = _settled()
    assert now[0] <= allocated + 4096  # the generator's two numbers
    assert now[1] <= reserved + 2 * 2**20


# streams, threads, devices, other captures


def test_streams_take_turns(model: nn.Module) -> None:
    cuda_graphs_(model)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.no_grad():
        steps = [inputs(i, 0.1 * i) for i in range(12)]
        expected = [plain(model, values) for values in steps]
        torch.cuda.synchronize()
        results = []
        for i, values in enumerate(steps):
            with torch.cuda.stream(streams[i % 3]):
                results.append(model(**values)[0])
        torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


def test_threads_take_turns(model: nn.Module) -> None:
    cuda_graphs_(model)
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            values = inputs(i, 0.1 * i, size=4 + 2 * (i % 2))
            expected = plain(model, values)
            wrong.extend(i for _ in range(20) if not torch.equal(model(**values)[0], expected))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(captured(model)) == 2


@TWO_GPUS
def test_on_the_gpu_that_is_not_current(model: nn.Module) -> None:
    cuda_graphs_(model)
    with torch.no_grad():
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            model.to(device)
            for step in (0.9, 0.2):
                values = inputs(step=step, device=device)
                result = model(**values)[0]
                assert result.device == torch.device(device)
                assert torch.equal(result, plain(model, values))
            assert torch.cuda.current_device() == 0


def test_within_another_capture_it_runs_as_before(model: nn.Module) -> None:
    cuda_graphs_(model)
    graph, values = torch.cuda.CUDAGraph(), inputs()
    with torch.no_grad():
        expected = plain(model, values)
        with torch.cuda.graph(graph):
            result = model(**values)[0]
        graph.replay()
        assert torch.equal(result, expected)
    assert captured(model) == []


def test_the_host_is_done_sooner(model: nn.Module) -> None:
    values = inputs()
    with torch.no_grad():
        eager = time_host(lambda: model(**values), (), calls=20)
        cuda_graphs_(model)
        assert time_host(lambda: model(**values), (), calls=20) < eager / 2
