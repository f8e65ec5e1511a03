"""cuda_graphs_(model): each signature's forward is captured once as a CUDA graph, then replayed in one launch.

For small images, where the host cannot launch a step's thousands of kernels as fast as the GPU runs them.
A signature: the structure of the arguments, shapes and dtypes of their tensors, all other values, and the modes that
choose kernels (inference mode, autocast, backend). Tensors are copied into static buffers, results out of them.

A graph reads the addresses that it was captured with. Each call asks first whether they are still the model's (_Watch):
the same parameters, buffers, submodules, hooks, addresses, dtypes, classes and adapter settings.
Measured for FLUX's 1,236 tensors in 1,279 modules: 0.3 to 0.4 ms on a shared VM, while the GPU is busy with the step
before; a walk in Python took 0.7 ms. Registration hooks and an `_apply` of our own would be free, but miss
`.data = ...` and what accelerate writes into `_parameters`. What load_state_dict copies in place, replays read.
Not seen: another value of an attribute (attention processor, Scheme), torch's global switches (TF32, SDPA backends).
cuda_graphs_(model) once more starts afresh.
"""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convrot_kernels import BackendError
from convrot_kernels.dispatch import pick
from convrot_quant.captures import UNDO, CudaCaptures, GraphError

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CAPTURES = CudaCaptures()


def cuda_graphs_(model: nn.Module, enabled: bool = True, *, keep: int = 4) -> None:
    """From now on the model's forward is replayed from CUDA graphs, in place; `enabled=False` undoes it, memory too.

    `keep`: how many signatures (image sizes, say) keep their graph; the one used longest ago goes. They share memory.
    Calls with grad enabled or in training mode run as before. Not for a forward that writes into its arguments.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"cuda_graphs_: expected a model such as pipe.transformer; got {type(model).__name__}")
    if keep < 1:
        raise ValueError(f"cuda_graphs_: keep must be at least 1, got {keep}")
    _switch_off(model)
    if enabled:
        _switch_on(model, keep)


def _switch_on(model: nn.Module, keep: int) -> None:
    why_not = CAPTURES.why_not()
    if why_not is not None:
        raise GraphError(f"cuda_graphs_: CUDA graphs need an NVIDIA GPU, but {why_not}; leave them off here")
    if vars(model).get("_compiled_call_impl") is not None:
        raise GraphError(
            f"cuda_graphs_: {type(model).__name__} is compiled as a whole, its forward is no longer called; "
            'compile(mode="reduce-overhead") has CUDA graphs of its own, or compile_repeated_blocks() leaves them to us'
        )
    forward = GraphedForward(model, vars(model).get("forward"), keep)
    vars(model).update(forward=forward, convrot_graphs=forward)


def _switch_off(model: nn.Module) -> None:
    forward = vars(model).pop("convrot_graphs", None)
    if forward is None:
        return
    forward.switch_off()
    if vars(model)["forward"] is forward:  # else someone has wrapped it, and it passes calls on
        del vars(model)["forward"]
        if forward.before is not None:
            vars(model)["forward"] = forward.before


class GraphedForward:
    """What stands in for a model's forward. A copy of the model, pickled or deep, captures graphs of its own."""

    def __init__(self, model: nn.Module, before: Callable[..., Any] | None, keep: int) -> None:
        self.model, self.before, self.keep = weakref.ref(model), before, keep  # no cycle: `del model` frees all
        self.__signature__ = inspect.signature(before or type(model).forward.__get__(model))
        self._lock = threading.RLock()
        self.graphs: OrderedDict[Any, _Recorded] = OrderedDict()
        self._pool: Any = None
        self._watch: _Watch | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedForward, (self.model(), self.before, self.keep)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        assert model is not None, "the model's own attribute"
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training or CAPTURES.busy()):
            with self._lock:
                if self.keep:
                    return self._replay(model, args, kwargs)
        return self._plain(model, args, kwargs)

    def switch_off(self) -> None:
        with self._lock:
            self.keep = 0
            self._forget(0)

    def _plain(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(model).forward(model, *args, **kwargs)

    def _replay(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._watch is not None and not self._watch.intact():
            self._forget(0)
        leaves, structure = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        device = _device_of(leaves)
        key = (structure, device, *_modes(device), *map(_describe, leaves))
        recorded = self.graphs.get(key) or self._capture(key, model, leaves, structure, device)
        self.graphs.move_to_end(key)
        with CAPTURES.turn(self._pool):
            return recorded.run([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def _capture(
        self, key: Any, model: nn.Module, leaves: list[Any], structure: Any, device: torch.device
    ) -> _Recorded:
        _refuse_hooks(model)
        self._forget(self.keep - 1)
        pool = self._pool or CAPTURES.open(device)
        inputs: list[Tensor] = []

        def forward() -> Any:
            statics = iter(inputs)
            values = [next(statics) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._plain(model, *pytree.tree_unflatten(values, structure))

        with CAPTURES.turn(pool), _casting_afresh(device):
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    inputs.append(torch.empty(leaf.shape, dtype=leaf.dtype, device=device).copy_(leaf))
            try:
                recorded = _Recorded.of(*CAPTURES.record(forward, pool), inputs)
            except GraphError:
                self._forget(0)  # torch takes no more captures into this pool
                raise
        self._pool, self.graphs[key] = pool, recorded
        if self._watch is not None and not self._watch.intact():  # the warm-ups have moved what the others read
            self._forget(1)
        self._watch = _Watch(model)
        return recorded

    def _forget(self, most: int) -> None:
        """Keep `most` graphs, those used last. The others go with their memory, once the GPU is through with them."""
        if len(self.graphs) > most:
            CAPTURES.settle(self._pool)
        while len(self.graphs) > most:
            self.graphs.popitem(last=False)[1].graph.reset()
        if not self.graphs and self._pool is not None:
            self._pool = self._watch = None
            CAPTURES.trim()


class _Recorded(NamedTuple):
    """A graph, the buffers that it reads and writes, and where the written ones belong in the result."""

    graph: Any
    inputs: list[Tensor]
    results: list[Any]
    structure: Any

    @classmethod
    def of(cls, graph: Any, result: Any, inputs: list[Tensor]) -> _Recorded:
        results, structure = pytree.tree_flatten(result)
        for leaf in results:
            if not isinstance(leaf, PLAIN) and not (isinstance(leaf, Tensor) and leaf.device == inputs[0].device):
                found = f"a tensor on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise GraphError(
                    f"cuda_graphs_: a forward must return tensors on its GPU in tuples, lists and dicts, "
                    f"got {found}; ask for return_dict=False, {UNDO}"
                )
        return cls(graph, inputs, results, structure)

    def run(self, values: list[Tensor]) -> Any:
        for static, value in zip(self.inputs, values, strict=True):
            static.copy_(value)
        self.graph.replay()
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.results]
        return pytree.tree_unflatten(kept, self.structure)


class _Watch:
    """What the graphs of a model were captured from, and whether it still is there.

    What was replaced since lives on until the next call, which finds out: no other tensor can have its place before.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._contents = gc.get_referents(*self._tables)  # the values of all dicts in one call
        self._tensors = [value for value in self._contents if isinstance(value, Tensor)]
        self._modules = modules[1:]  # not the root: it holds us
        self._attributes = [*map(vars, self._modules)]
        self._adapters = [module for module in self._modules if hasattr(module, "_disable_adapters")]
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        addresses, dtypes = map(Tensor.data_ptr, self._tensors), map(attrgetter("dtype"), self._tensors)
        # fuse_ changes classes; accelerate and diffusers hang up their hooks as attributes
        classes, attributes = map(type, self._modules), map(len, self._attributes)
        return [*addresses], [*dtypes], [*classes], [*attributes], [*map(_adapter_settings, self._adapters)]

    def intact(self) -> bool:
        now = gc.get_referents(*self._tables)
        same = len(now) == len(self._contents) and all(map(is_, now, self._contents))
        return same and not any(self._hooks) and self._read() == self._state


def _adapter_settings(layer: Any) -> tuple[Any, ...]:
    """What peft layers read in forward beside their tensors."""
    scaling = getattr(layer, "scaling", None)
    return layer._active_adapter, layer._disable_adapters, (*layer.merged_adapters,), dict(scaling or {})


def _describe(leaf: Any) -> tuple[Any, ...]:
    """A leaf of the arguments as a part of the signature. Strides are not: the static buffers are contiguous."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf
    raise GraphError(
        "cuda_graphs_: arguments must be tensors, numbers, strings or containers of them, "
        f"got {type(leaf).__name__}, which may change unseen; leave it out, {UNDO}"
    )


def _device_of(leaves: list[Any]) -> torch.device:
    """The GPU of the arguments. Tensors on the CPU, a timestep perhaps, are copied to it: their values may change."""
    found = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    gpus = [device for device in found if device.type == CAPTURES.device_type]
    if len(gpus) != 1 or {device.type for device in found} - {CAPTURES.device_type, "cpu"}:
        raise GraphError(
            f"cuda_graphs_: the tensors of a call must be on one CUDA device, got "
            f'{", ".join(sorted(map(str, found))) or "no tensors"}; move the model and its inputs: .to("cuda"), {UNDO}'
        )
    return gpus[0]


def _modes(device: torch.device) -> tuple[Any, ...]:
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    try:
        backend = pick("scaled_mm", device)[0]
    except BackendError:
        backend = None  # only a quantized model has to know, and says so when it runs
    return torch.is_inference_mode_enabled(), autocast, backend


def _casting_afresh(device: torch.device) -> Any:
    """Under autocast, casts of weights into the graph's own memory: a cached one dies with the caller's context."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        where = f"{type(model).__name__}{'.' if name else ''}{name}"
        if hasattr(module, "_hf_hook") or (registry is not None and registry.hooks):
            raise GraphError(
                f"cuda_graphs_: CUDA graphs exclude offloading and step caches, but {where} has a hook of accelerate "
                f"or diffusers; keep the whole model on the GPU: pipe.remove_all_hooks(), .to('cuda'), {UNDO}"
            )
        if name and (module._forward_hooks or module._forward_pre_hooks):
            raise GraphError(
                f"cuda_graphs_: {where} has a forward hook, which a replay would not run; remove it, {UNDO}"
            )
