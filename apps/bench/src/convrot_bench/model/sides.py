"""One side of a comparison: a model and what it is called with; its step eager, compiled, or as a CUDA graph."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convrot_bench.bench import Bench, GateError
from convrot_bench.model import build
from convrot_bench.model.configs import Scale
from convrot_bench.model.phases import Tell
from convrot_bench.model.timing import is_gpu, time_once, timing_of

BF16, OURS, UNFUSED = "bf16", "ours", "ours, layer by layer"
EAGER, COMPILED, GRAPH_OF = "eager", "compiled", "cuda graph of "
FULLGRAPH = {"fullgraph": True}
GRAPH_WARMUP = 3
ENTRIES = 64  # graphs of one code object that torch keeps; all blocks of all sides share nn.Module's
MakeInputsOf = Callable[[Any], dict[str, Any]]  # model -> what it is called with


class Contender(NamedTuple):
    """What is timed: which side, and how it runs."""

    side: str
    how: str


@dataclass
class Side:
    """A model in one process with others. `held`: bytes of the GPU that building it took."""

    name: str
    model: Any
    inputs: dict[str, Any]
    held: int = 0
    _mode: str = field(default=EAGER, init=False)
    _compiled: dict[nn.Module, Any] = field(default_factory=dict, init=False)

    def step(self, mode: str = EAGER) -> Tensor:
        """One forward of the model."""
        if mode != self._mode:
            # nn.Module.compile knows no way back: what it has put into each block is taken out and put back
            for block, compiled in self._compiled.items():
                block._compiled_call_impl = compiled if mode == COMPILED else None
            self._mode = mode
        out: Tensor = self.model(**self.inputs, return_dict=False)[0]
        return out

    def bind(self, mode: str) -> Callable[[], Tensor]:
        """`step` without an argument."""
        return lambda: self.step(mode)

    def compile(self, device: str) -> float:
        """Compile the repeated blocks for the present inputs; seconds of the first step, which is when it happens."""
        if not getattr(self.model, "_repeated_blocks", None):
            self.model._repeated_blocks = self.model._no_split_modules  # SD3 names its blocks only there
        self.model.compile_repeated_blocks(**compile_options(device))
        blocks = (m for m in self.model.modules() if m._compiled_call_impl is not None)
        self._compiled = {block: block._compiled_call_impl for block in blocks}
        self._mode = COMPILED
        with torch._dynamo.config.patch(recompile_limit=ENTRIES):
            return time_once(self.bind(COMPILED))


def compile_options(device: str) -> dict[str, Any]:
    """Of both sides. On a CPU blocks are traced but not compiled: what C++ makes of them takes minutes to build."""
    return FULLGRAPH if is_gpu(device) else FULLGRAPH | {"backend": "eager"}


def check_finite(name: str, out: Tensor) -> None:
    """The gate of a step: what holds NaN or inf is not timed."""
    if not bool(torch.isfinite(out).all()):
        raise GateError(f"{name}: its output holds NaN or inf")


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph, its inputs where they are."""
    aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(GRAPH_WARMUP):
            step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        # the watchdog of NCCL asks for its events from a thread of its own, which is none of the capture's business
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = step()
    except RuntimeError:
        torch.cuda.set_stream(here)  # a capture that fails leaves its own behind
        torch.cuda.synchronize()
        raise

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def graphs(bench: Bench, side: Side, modes: tuple[str, ...]) -> dict[Contender, Callable[[], Tensor]]:
    """A graph of each mode; what cannot be captured is said. On a CPU there are none."""
    found: dict[Contender, Callable[[], Tensor]] = {}
    if not is_gpu(bench.device):
        return found
    for mode in modes:
        label = f"{side.name}, {GRAPH_OF}{mode}"
        try:
            replay = capture(side.bind(mode))
            check_finite(label, replay())
            found[Contender(side.name, GRAPH_OF + mode)] = replay
        except RuntimeError as error:
            bench.refuse(f"{label}: {error}")
    return found


def allocated(device: str) -> int:
    """Bytes of the GPU that something refers to."""
    if not is_gpu(device):
        return 0
    gc.collect()
    return torch.cuda.memory_allocated()


def built(name: str, make: Callable[[], Any], make_inputs: MakeInputsOf, device: str) -> Side:
    """A side whose model `make` builds."""
    before = allocated(device)
    model = make()
    held = allocated(device) - before
    return Side(name, model, make_inputs(model), held)


def sides_from(
    make: Callable[[], Any], make_inputs: MakeInputsOf, names: Sequence[str], device: str, phase: Tell
) -> dict[str, Side]:
    """{name: side} of BF16, OURS, UNFUSED: the 16-bit model is built and quantized once, gone if not asked for."""
    phase("building the 16-bit model")
    sides = {BF16: built(BF16, make, make_inputs, device)}
    if set(names) - {BF16}:
        phase("quantizing a copy of it")
        sides[UNFUSED] = built(UNFUSED, lambda: build.quantized_copy(sides[BF16].model), make_inputs, device)
    if OURS in names:
        sides[OURS] = built(OURS, lambda: build.fused_copy(sides[UNFUSED].model), make_inputs, device)
    sides = {name: sides[name] for name in names}
    release()
    return sides


def release() -> None:
    """Give memory of the GPU back that nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def facts(bench: Bench, scale: Scale, **more: Any) -> dict[str, Any]:
    """Fields of every row of a model. `weights`: how ours are quantized; tables that time that say it themselves."""
    backend, options = bench.backends[0], compile_options(bench.device)
    fields = bench.facts(backend) | {
        "weights": build.FAST_RULES,
        "multiplied": multiplied(backend, bench.device),
        "timing": timing_of(bench.device),
        "diffusers": version("diffusers"),
        "compile": ", ".join(f"{key}={value}" for key, value in options.items()),
    }
    return fields | ({"tiny": True} if scale.tiny else {}) | more


def multiplied(backend: str, device: str) -> str:
    """Of which bits the products are made where the scheme says W4A4."""
    if not is_gpu(device):
        return "int4 codes, by the reference on a CPU"
    major = torch.cuda.get_device_capability(device)[0]
    if backend == "cutlass" and major == 8:
        return "int4 weights and activations on int4 tensor cores"
    where = {8: "Ampere and Ada", 9: "Hopper"}.get(major, "Blackwell")
    return f"int4 weights widened to int8 tensor cores on {where}"
