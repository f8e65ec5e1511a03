"""How a pipeline fits a GPU: components(pipe) are measured, pick() decides where each one waits, apply() does it.

A component is resident (always on the GPU), swapped (there while it runs) or streamed (there layer by layer while it
runs, which is how T5's 9.5 GB pass through 8 GB). Least moving first: the first way that fits is taken.

What a component needs beside its weights is estimated, then rounded up to a multiple of 256 MiB:
    transformer, text encoders: rows * K of the widest linear * bytes a value * 6; rows = batch * tokens
    VAE: pixels * channels at full resolution * bytes a value * 5; of one tile where it decodes in tiles
Counted on the modules of diffusers (every tensor that is alive at once) it is 3.4 times such a map for FLUX.1, 5.2 for
SD3.5 large and 3.0 for their VAE; the rest is for codes, and for what cuDNN and attention need. Images are drawn one at
a time, so that slicing a VAE's batch would save nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from convrot_quant.generation import Settings, call_arguments, size_multiple
from convrot_quant.plans import size_text

Method = Literal["none", "model", "group", "sequential"]
LINEAR_MAPS, VAE_MAPS = 6, 5
SCRATCH_UNIT = 2**28
KEPT_FREE = 16  # of 16 parts of the memory one is left alone: the CUDA context, and holes between blocks
LAYERS_AHEAD = 2  # a streamed component holds the layer that runs and the next one, which is on its way
# what is assumed of a pipeline that does not say it
IMAGE_SIZE, TEXT_TOKENS, PATCH, VAE_CHANNELS = 1024, 512, 16, 256
_limited: set[int] = set()  # GPUs on which budget() limits this process


@dataclass(frozen=True)
class Component:
    """One module of a pipeline in bytes: all of it, its largest layer, and what it needs beside them while it runs."""

    name: str
    bytes: int
    layer_bytes: int
    scratch: int
    tiled_scratch: int  # the same number but for a VAE that can decode in tiles
    swaps: bool  # the pipeline knows when it runs
    streams: bool  # diffusers can offload its layers

    @property
    def alone(self) -> int:
        """What it needs with nothing else on the GPU."""
        return self.bytes + self.scratch


@dataclass(frozen=True)
class Offload:
    """Where each component of a pipeline is during a run, and the bytes that this needs of those that there are."""

    method: Method
    streamed: tuple[str, ...]
    swapped: tuple[str, ...]
    tiles: bool
    peak: int
    resident_peak: int  # with everything on the GPU
    vram: int
    components: tuple[Component, ...]

    def __str__(self) -> str:
        """What is done and why, in one line."""
        text = f"GPU memory: about {size_text(self.peak)} of {size_text(self.vram)}"
        if self.method != "none":
            text += f" (all at once would need {size_text(self.resident_peak)})"
        ways = {"one at a time": self.swapped, "layer by layer": self.streamed, "all the time": self.resident}
        sizes = {c.name: f"{c.name} ({size_text(c.bytes)})" for c in self.components}
        for way, names in ways.items():
            text += f"; {way}: {', '.join(sizes[name] for name in names)}" if names else ""
        return f"{text}; the VAE decodes in tiles" if self.tiles else text

    @property
    def resident(self) -> tuple[str, ...]:
        """The components that stay on the GPU."""
        moved = {*self.streamed, *self.swapped}
        return tuple(c.name for c in self.components if c.name not in moved)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        return {
            "method": self.method,
            "resident": list(self.resident),
            "swapped": list(self.swapped),
            "streamed": list(self.streamed),
            "vae_tiles": self.tiles,
            "vram_bytes": self.vram,
            "peak_bytes": self.peak,
            "resident_peak_bytes": self.resident_peak,
            "component_bytes": {c.name: c.bytes for c in self.components},
        }


def choose(pipe: Any, vram_bytes: int, settings: Settings) -> Offload:
    """How this pipeline's run with these settings fits into `vram_bytes`. Modules on the meta device will do."""
    return pick(components(pipe, settings), vram_bytes)


def pick(components: Sequence[Component], vram_bytes: int) -> Offload:
    """The first way to place the components that fits; a ValueError with the number needed where none does."""
    usable = vram_bytes - vram_bytes // KEPT_FREE
    resident_peak = _peak(components, (), ())
    tiles = any(c.alone > usable and c.tiled_scratch < c.scratch for c in components)
    if tiles:
        components = [replace(c, scratch=c.tiled_scratch) for c in components]
    peaks = []
    for method, streamed, swapped in _ways(components, usable):
        ahead = 1 if method == "sequential" else LAYERS_AHEAD
        peaks.append(_peak(components, streamed, swapped, ahead))
        if peaks[-1] <= usable:
            return Offload(method, streamed, swapped, tiles, peaks[-1], resident_peak, vram_bytes, tuple(components))
    tenth = 2**30 / 10
    needed = -(-min(peaks) * KEPT_FREE // (KEPT_FREE - 1)) // tenth * tenth + tenth
    raise ValueError(
        f"{size_text(vram_bytes)} of GPU memory cannot hold this run: it needs {size_text(needed)}, with every layer "
        "offloaded; give it more memory or draw a smaller image"
    )


def _ways(components: Sequence[Component], usable: int) -> Iterator[tuple[Method, tuple[str, ...], tuple[str, ...]]]:
    """(method, streamed, swapped) from the least moving to the most."""
    swaps = tuple(c.name for c in components if c.swaps)
    streams = tuple(c.name for c in components if c.streams)
    large = tuple(c.name for c in components if c.streams and c.alone > usable)
    yield "none", (), ()
    yield "model", (), swaps
    yield "group", large, ()
    yield "group", large, tuple(name for name in swaps if name not in large)
    yield "group", streams, ()
    yield "sequential", tuple(c.name for c in components if c.swaps or c.streams), ()


def _peak(components: Sequence[Component], streamed: Sequence[str], swapped: Sequence[str], ahead: int = 1) -> int:
    """Bytes on the GPU at the worst moment: what stays there, and the most that one component adds as it runs."""
    stays = sum(c.bytes for c in components if c.name not in {*streamed, *swapped})
    # a swapped component stays until the next swapped one runs
    waits = max((c.bytes for c in components if c.name in swapped), default=0)
    adds = []
    for c in components:
        if c.name in swapped:
            adds.append(c.alone)
        else:
            adds.append(waits + c.scratch + (ahead * c.layer_bytes if c.name in streamed else 0))
    return stays + max(adds, default=0)


def components(pipe: Any, settings: Settings) -> list[Component]:
    """The pipeline's modules, measured for one image with these settings, in the order in which they run."""
    arguments = call_arguments(pipe, settings)
    order = (pipe.model_cpu_offload_seq or "").split("->")
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    names = sorted(modules, key=lambda name: order.index(name) if name in order else -1)
    return [_component(pipe, name, modules[name], arguments, in_order=name in order) for name in names]


def _component(pipe: Any, name: str, module: nn.Module, arguments: Mapping[str, Any], *, in_order: bool) -> Component:
    height, width = arguments.get("height", IMAGE_SIZE), arguments.get("width", IMAGE_SIZE)
    layer = max(_bytes(child, recurse=False) for child in module.modules())
    if name == "vae":
        scratch, tiled = _decoding(module, height, width), _decoding_tiles(module, height, width)
    else:
        rows = arguments.get("max_sequence_length", TEXT_TOKENS)
        if name.startswith("transformer"):
            multiple = size_multiple(pipe)
            patch = multiple if multiple > 1 else PATCH
            rows += -(-height // patch) * -(-width // patch)
        widest = max((linear.in_features for linear in module.modules() if isinstance(linear, nn.Linear)), default=0)
        scratch = tiled = _batch(pipe, arguments) * rows * widest * _itemsize(module) * LINEAR_MAPS
    free = name not in pipe._exclude_from_cpu_offload
    streams = free and bool(getattr(module, "_supports_group_offloading", True))
    return Component(name, _bytes(module), layer, _in_units(scratch), _in_units(tiled), free and in_order, streams)


def _batch(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """2 where guidance runs the prompt and its negative at once; pipelines of guided models have another option."""
    known = inspect.signature(pipe.__call__).parameters
    twice = "negative_prompt" in known and "true_cfg_scale" not in known
    return 2 if twice and (arguments.get("guidance_scale") or 0) > 1 else 1


def _decoding(vae: nn.Module, height: int, width: int) -> int:
    """What decoding (height, width) pixels needs: the last block's input still has the second level's channels."""
    channels = getattr(getattr(vae, "config", None), "block_out_channels", None) or (VAE_CHANNELS,)
    return height * width * max(channels[:2]) * _itemsize(vae) * VAE_MAPS


def _decoding_tiles(vae: nn.Module, height: int, width: int) -> int:
    side = getattr(vae, "tile_sample_min_size", None)  # some classes have one, some two
    rows, columns = (getattr(vae, f"tile_sample_min_{name}", side) for name in ("height", "width"))
    if not (hasattr(vae, "enable_tiling") and isinstance(rows, int) and isinstance(columns, int)):
        return _decoding(vae, height, width)
    return _decoding(vae, min(height, rows), min(width, columns))


def _bytes(module: nn.Module, *, recurse: bool = True) -> int:
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _itemsize(module: nn.Module) -> int:
    return next((p.element_size() for p in module.parameters() if p.is_floating_point()), 2)


def _in_units(size: int) -> int:
    return -(-size // SCRATCH_UNIT) * SCRATCH_UNIT


def budget(device: str, vram_bytes: int | None) -> int | None:
    """The bytes of a GPU that a run may use: what is free, or less, to which torch then holds this process.

    Asked again without a limit, for a run that has none, it lifts the one it set. None for other devices.
    """
    if torch.device(device).type != "cuda":
        return None
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    free, total = torch.cuda.mem_get_info(index)
    if vram_bytes is None:
        if index in _limited:  # whoever calls torch for a limit of their own keeps it
            torch.cuda.set_per_process_memory_fraction(1.0, index)
            _limited.discard(index)
        return free
    if vram_bytes > total:
        raise ValueError(f"{size_text(vram_bytes)} is more memory than {device} has ({size_text(total)}); give less")
    torch.cuda.set_per_process_memory_fraction(vram_bytes / total, index)
    _limited.add(index)
    return min(vram_bytes, free)


def apply(pipe: Any, offload: Offload, device: str) -> None:
    """Place a pipeline's components for a run on `device`, with the hooks of diffusers and accelerate."""
    if offload.tiles:
        pipe.vae.enable_tiling()
    if offload.method == "none":
        pipe.to(device)
    elif offload.method == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload.method == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        _group(pipe, offload, torch.device(device))


def _group(pipe: Any, offload: Offload, device: torch.device) -> None:
    """Streamed components get diffusers' group offloading, the swapped ones a chain of accelerate's hooks.

    diffusers' own chain (enable_model_cpu_offload) refuses a pipeline of which any component is streamed.
    """
    from accelerate import cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading

    hooks: list[Any] = []
    for component in offload.components:
        module = getattr(pipe, component.name)
        if component.name in offload.streamed:
            # without a stream every layer is copied back as well; a VAE's encoder, which never runs, would confuse one
            stream = device.type == "cuda" and component.name != "vae"
            options = {"onload_device": device, "offload_type": "leaf_level", "use_stream": stream}
            apply_group_offloading(module, offload_device=torch.device("cpu"), **options)
        elif component.name in offload.swapped:
            _, hook = cpu_offload_with_hook(module, device, prev_module_hook=hooks[-1] if hooks else None)
            hooks.append(hook)
        else:
            module.to(device)
    if len(hooks) > 1:  # the first component of the next image sends the last one of this image away
        hooks[0].hook.prev_module_hook = hooks[-1]
