"""How a pipeline fits a GPU: components(pipe) are measured, pick() decides where each one waits, apply() does it.

A component is resident (always on the GPU), swapped (there while it runs) or streamed (there layer by layer while it
runs, which is how T5's 9.5 GB pass through 8 GB). Of the placements that fit, the one is taken that copies for the
fewest seconds an image: a swapped component both ways, in pageable memory; a streamed one from pinned memory and never
back, but whenever it runs. So text encoders are streamed, and a transformer of many steps is swapped. Every layer is
offloaded by itself (sequential) where none fits. Tiles change an image at their seams: the VAE decodes in tiles where
it would not fit alone, or nothing fits without them; never to copy less.

What a component needs beside its weights is estimated, then rounded up to a multiple of 256 MiB:
    transformer, text encoders: rows * K of the widest linear * bytes a value * 6; rows = batch * tokens
    VAE: pixels * channels at full resolution * bytes a value * 5; of one tile where it decodes in tiles
Counted on the modules of diffusers (every tensor that is alive at once) it is 3.4 times such a map for FLUX.1, 5.2 for
SD3.5 large and 3.0 for their VAE; the rest is for codes, and for what cuDNN and attention need. Images are drawn one at
a time, so that slicing a VAE's batch would save nothing.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from convrot_quant.generation import Settings, call_arguments, size_multiple
from convrot_quant.plans import size_text

Method = Literal["none", "model", "group", "sequential"]
Names = tuple[str, ...]
Placement = tuple[Method, Names, Names]  # the method, what it streams, what it swaps
LINEAR_MAPS, VAE_MAPS = 6, 5
SCRATCH_UNIT = 2**28
KEPT_FREE = 16  # of 16 parts of the memory one is left alone: the CUDA context, and holes between blocks
COPIED_BACK = "vae"  # layer by layer: its encoder, which never runs, would confuse a stream, and only that goes one way
LAYERS_AHEAD = 2  # a streamed component holds the layer that runs and the next one, which is on its way
# Bytes a second: 16 lanes of PCIe 4 carry about 20e9 from pinned memory; from and to pageable memory, which the driver
# copies once more, an H200's host was measured at 2.5e9 and others are faster. What is picked hangs on their ratio.
PINNED, PAGEABLE = 20e9, 4e9
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
    runs: int = 1  # for one image: the steps of a denoiser
    buffers: int = 0  # bytes of them, which streaming leaves on the GPU: diffusers sends parameters away only

    @property
    def alone(self) -> int:
        """What it needs with nothing else on the GPU."""
        return self.bytes + self.scratch


@dataclass(frozen=True)
class Offload:
    """Where each component of a pipeline is during a run, and the bytes that this needs of those that there are."""

    method: Method
    streamed: Names
    swapped: Names
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
        text += f"; moving takes about {self.seconds:.1f} s an image" if self.method != "none" else ""
        return f"{text}; the VAE decodes in tiles" if self.tiles else text

    @property
    def resident(self) -> Names:
        """The components that stay on the GPU."""
        moved = {*self.streamed, *self.swapped}
        return tuple(c.name for c in self.components if c.name not in moved)

    @property
    def seconds(self) -> float:
        """What copying takes for one image, estimated; a stream's share of it goes on while layers run."""
        moved = [c for c in self.components if c.name not in self.resident]
        back = sum(c.bytes for c in moved if c.name in {*self.swapped, COPIED_BACK})
        runs = sum(c.bytes * c.runs for c in moved if c.name not in {*self.swapped, COPIED_BACK})
        return 2 * back / PAGEABLE + runs / (PAGEABLE if self.method == "sequential" else PINNED)

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
            "moving_seconds": self.seconds,
            "component_bytes": {c.name: c.bytes for c in self.components},
        }


def choose(pipe: Any, vram_bytes: int, settings: Settings) -> Offload:
    """How this pipeline's run with these settings fits into `vram_bytes`. Modules on the meta device will do."""
    return pick(components(pipe, settings), vram_bytes)


def pick(components: Sequence[Component], vram_bytes: int) -> Offload:
    """Of the placements that fit the one that moves least; a ValueError with the number needed where none does."""
    usable = vram_bytes - vram_bytes // KEPT_FREE
    resident_peak = _peak(components, "none")
    whole, in_tiles = tuple(components), tuple(replace(c, scratch=c.tiled_scratch) for c in components)
    last: Placement = ("sequential", tuple(c.name for c in components if c.swaps or c.streams), ())
    tries = [(whole, _placements(whole)), (in_tiles, _placements(whole)), (in_tiles, iter([last]))]
    if any(c.alone > usable and c.tiled_scratch < c.scratch for c in components):
        del tries[0]
    for parts, placements in tries:
        tiles = parts != whole
        found = [Offload(*where, tiles, _peak(parts, *where), resident_peak, vram_bytes, parts) for where in placements]
        if fitting := [offload for offload in found if offload.peak <= usable]:
            return min(fitting, key=lambda o: (o.seconds, len(o.streamed) + len(o.swapped), o.peak))
    tenth = 2**30 / 10
    needed = -(-found[-1].peak * KEPT_FREE // (KEPT_FREE - 1)) // tenth * tenth + tenth
    raise ValueError(
        f"{size_text(vram_bytes)} of GPU memory cannot hold this run: it needs {size_text(needed)}, with every layer "
        "offloaded; give it more memory or draw a smaller image"
    )


def _placements(components: Sequence[Component]) -> Iterator[Placement]:
    """Each component wherever it can be, as far as `apply` can place it.

    With nothing streamed only diffusers' own chain, of all that swap, lets a pipeline know on which device it runs. A
    component swapped alone never leaves, so that it needs what a resident one does and is not picked.
    """
    yield "none", (), ()
    yield "model", (), tuple(c.name for c in components if c.swaps)
    ways = [["resident"] + ["streamed"] * c.streams + ["swapped"] * c.swaps for c in components]
    for placed in itertools.product(*ways):
        streamed = tuple(c.name for c, way in zip(components, placed, strict=True) if way == "streamed")
        swapped = tuple(c.name for c, way in zip(components, placed, strict=True) if way == "swapped")
        if streamed:
            yield "group", streamed, swapped


def _peak(components: Sequence[Component], method: Method, streamed: Names = (), swapped: Names = ()) -> int:
    """Bytes on the GPU at the worst moment: what stays there, and the most that one component adds as it runs."""
    stays = sum(c.buffers if c.name in streamed else c.bytes for c in components if c.name not in swapped)
    # a swapped component stays until the next swapped one runs
    waits = max((c.bytes for c in components if c.name in swapped), default=0)
    ahead = 1 if method == "sequential" else LAYERS_AHEAD
    adds = [
        c.alone if c.name in swapped else waits + c.scratch + ahead * c.layer_bytes * (c.name in streamed)
        for c in components
    ]
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
        scratch, tiled, runs = _decoding(module, height, width), _decoding_tiles(module, height, width), 1
    else:
        rows = arguments.get("max_sequence_length", TEXT_TOKENS)
        runs = batch = _batch(pipe, arguments)  # a text encoder takes the prompt and its negative apart
        if name.startswith("transformer"):
            runs = arguments["num_inference_steps"]
            multiple = size_multiple(pipe)
            patch = multiple if multiple > 1 else PATCH
            rows += -(-height // patch) * -(-width // patch)
        widest = max((linear.in_features for linear in module.modules() if isinstance(linear, nn.Linear)), default=0)
        scratch = tiled = batch * rows * widest * _itemsize(module) * LINEAR_MAPS
    free = name not in pipe._exclude_from_cpu_offload
    streams = free and bool(getattr(module, "_supports_group_offloading", True))
    sizes = _bytes(module), layer, _in_units(scratch), _in_units(tiled)
    return Component(name, *sizes, free and in_order, streams, runs, sum(b.nbytes for b in module.buffers()))


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
            stream = device.type == "cuda" and component.name != COPIED_BACK
            options = {"onload_device": device, "offload_type": "leaf_level", "use_stream": stream}
            apply_group_offloading(module, offload_device=torch.device("cpu"), **options)
        elif component.name in offload.swapped:
            _, hook = cpu_offload_with_hook(module, device, prev_module_hook=hooks[-1] if hooks else None)
            hooks.append(hook)
        else:
            module.to(device)
    if len(hooks) > 1:  # the first component of the next image sends the last one of this image away
        hooks[0].hook.prev_module_hook = hooks[-1]
