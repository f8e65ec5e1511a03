"""--cuda-graphs and --fp8-attention of generate: what each goes with, checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from convrot_kernels.backends import cudnn
from convrot_quant.fuse import unfused_blocks
from convrot_quant.offload import Offload
from convrot_quant.patch import plan_of

LARGE = 1024
GRAPHED_PIXELS = 768 * 768  # of an image; at more the GPU is slower than the host that launches its kernels


def check_graphs(cuda_graphs: bool | None, device: str, sheet: Path | None) -> None:
    """--cuda-graphs against the device and the other options."""
    if cuda_graphs and torch.device(device).type != "cuda":
        raise typer.BadParameter(f"--cuda-graphs needs a CUDA GPU, and this run is on {device}; leave it out")
    if cuda_graphs and sheet is not None:
        raise typer.BadParameter("--cuda-graphs goes without --sheet, whose models change from image to image")


def takes_graphs(cuda_graphs: bool | None, arguments: Mapping[str, Any], offload: Offload | None) -> bool:
    """Whether steps become CUDA graphs: where they were asked for, or (None) help."""
    if offload is None or cuda_graphs is False:
        return False
    small = arguments.get("height", LARGE) * arguments.get("width", LARGE) <= GRAPHED_PIXELS
    if cuda_graphs is None and not (small and offload.method == "none"):
        return False
    if offload.method != "none":
        raise ValueError(f"--cuda-graphs needs the whole pipeline on the GPU, but {offload}; leave the option out")
    return True


def check_attention(device: str, sheet: Path | None) -> None:
    """--fp8-attention against --sheet and the machine."""
    if sheet is not None:
        raise typer.BadParameter(
            "--fp8-attention goes without --sheet, which compares models that attend in 16 bits; leave one of them out"
        )
    place = torch.device(device)
    why_not = cudnn.why_not(place) if place.type == "cuda" else None  # elsewhere the reference computes it
    if why_not is not None:
        raise ValueError(f"--fp8-attention does not run on {device}: {why_not}; without it attention is in 16 bits")


def check_fused(pipe: Any, transformers: Iterable[str], offload: Offload | None) -> None:
    """--fp8-attention against an outlined pipeline: blocks of each transformer run fused, where it will be."""
    for name in transformers:
        model = getattr(pipe, name)
        if unfused_blocks(model, plan_of(model)) == unfused_blocks(model, {}):
            raise ValueError(
                f"--fp8-attention is of fused blocks, and no block of this {type(model).__name__} runs fused: take a "
                "FLUX.1 model whose layers have 4- or 8-bit activations, such as preset ours; or leave the option out"
            )
        if offload is not None and name in offload.streamed:
            raise ValueError(
                "--fp8-attention is of fused blocks, and a block whose layers are offloaded one by one does not run "
                f"fused, but {offload}; give it more memory, draw a smaller image, or leave the option out"
            )
