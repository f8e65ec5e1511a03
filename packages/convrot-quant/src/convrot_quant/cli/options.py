"""Options that commands share, and what they are turned into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from convrot_quant.checkpoint import check_shard_size
from convrot_quant.config import QuantConfig, Scheme
from convrot_quant.generation import Settings
from convrot_quant.presets import PRESETS
from convrot_quant.rules import linears, matches


class DType(str, Enum):
    """The dtypes of a 16-bit model."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        """The dtype itself."""
        found: torch.dtype = getattr(torch, self.value)
        return found


_PRESETS = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
_PRESETS += "; with -r16 or the like behind it (4-bit weights): a 16-bit branch of that rank beside every block linear"
Model = Annotated[
    str,
    typer.Argument(
        help="A diffusers folder (pipeline or transformer), or a hub id such as black-forest-labs/FLUX.1-dev.",
        metavar="MODEL",
    ),
]
Preset = Annotated[str, typer.Option("--preset", "--scheme", help=f"{_PRESETS}.", metavar="NAME")]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", help="Keep layers whose name matches GLOB in 16 bits; repeatable.", metavar="GLOB"),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="Another scheme for layers whose name matches GLOB, such as '*.to_v=W8A8'; repeatable.",
        metavar="GLOB=SCHEME",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.", metavar="DEVICE")
]
Dtype = Annotated[DType, typer.Option(help="The dtype of what stays in 16 bits.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables; errors still show.")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.", metavar="TEXT")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(help="A text file with one prompt a line; # starts a comment line.", exists=True, dir_okay=False),
]
Seed = Annotated[int, typer.Option(help="Image i of the run uses seed + i.", min=0, max=2**63 - 1)]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's own.")]
Sheet = Annotated[
    Path | None,
    typer.Option(help="Compare with the 16-bit model; write all images side by side to this file (.png) with errors."),
]
Height = Annotated[int | None, typer.Option(help="Pixels. Default: what the VAE was made for.", min=16)]
Width = Annotated[int | None, typer.Option(help="Pixels. Default: what the VAE was made for.", min=16)]
NumImages = Annotated[int, typer.Option(help="Images per prompt.", min=1)]
MaxSequenceLength = Annotated[
    int | None,
    typer.Option(help="Text tokens. Default: the pipeline's own (512), or the tokenizer's limit if lower.", min=1),
]
Vram = Annotated[
    str,
    typer.Option(
        "--vram",
        help="GPU memory that the run may use, such as 8GB or 12GiB; what does not fit is offloaded to the CPU. "
        "auto: what is free.",
        metavar="SIZE",
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="Replay each step as one CUDA graph. Default: where the whole pipeline is on a GPU and images are small.",
    ),
]
Fp8Attention = Annotated[
    bool,
    typer.Option(
        "--fp8-attention",
        help="Let fused FLUX.1 blocks attend with 8-bit operands, which changes images slightly. A GPU must be Hopper "
        "or newer, with nvidia-cudnn-frontend installed.",
    ),
]
AUTO = "auto"
UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def read_config(preset: str, keep: Sequence[str] | None, override: Sequence[str] | None) -> QuantConfig:
    """--preset, --keep and --override as one QuantConfig."""
    try:
        config = QuantConfig.preset(preset)
        overrides = dict(config.overrides)
        for item in override or ():
            glob, equals, scheme = item.rpartition("=")
            if not equals:
                raise ValueError(f"--override must look like GLOB=SCHEME, for example '*.to_v=W8A8'; got {item!r}")
            overrides.pop(glob, None)  # so that it moves to the end, where it wins
            overrides[glob] = Scheme.parse(scheme)
        return QuantConfig(config.scheme, overrides, (*config.keep, *(keep or ())))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def check_globs(models: Sequence[nn.Module], keep: Sequence[str] | None, override: Sequence[str] | None) -> None:
    """A --keep or --override that names no layer is a mistake in the command."""
    layers = [layer for model in models for layer in linears(model)]
    for glob in (*(keep or ()), *(item.rpartition("=")[0] for item in override or ())):
        if not any(matches(layer, glob) for layer in layers):
            example = layers[-1].name if layers else "none"
            raise typer.BadParameter(f"{glob!r} matches no linear layer; layers have names like {example!r}")


def check_size(size: str) -> None:
    """--max-shard-size must be a size."""
    try:
        check_shard_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def read_device(device: str) -> str:
    """auto -> cuda where there is a GPU, else cpu; anything else must be a device of this machine."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "meta"
    if kind == "meta":  # a device without values
        raise typer.BadParameter(f"--device {device!r} is not a device; use cpu, cuda or cuda:1")
    if kind == "cpu":
        return kind  # cpu:0 and the like, which not every library below takes
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no usable CUDA GPU; use --device cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for a device it cannot use
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ValueError(f"--device {device}: not usable on this machine ({reason}); use --device cpu") from None
    return device


def parse_size(size: str) -> int:
    """A size such as 8GB, 12GiB or 500MB as a number of bytes; 0 for what is none."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([mg]i?b)", size.strip().lower())
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


def read_vram(vram: str, device: str) -> int | None:
    """--vram as a number of bytes; None for auto."""
    if vram == AUTO:
        return None
    size = parse_size(vram)
    if not size:
        raise typer.BadParameter(f"--vram must be a size such as 8GB, 12GiB or 500MB, or {AUTO}; got {vram!r}")
    if torch.device(device).type != "cuda":
        raise ValueError(f"--vram {vram} limits the memory of a CUDA GPU, and this run is on {device}; leave it out")
    return size


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_prompts(prompts: Sequence[str] | None, file: Path | None) -> list[str]:
    """--prompt and --prompts-file together, in that order."""
    found = list(prompts or ())
    if file is not None:
        lines = (line.strip() for line in read_text(file).splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise typer.BadParameter("nothing to draw: give --prompt TEXT or --prompts-file FILE")
    return found


def describe(settings: Settings, arguments: dict[str, object]) -> str:
    """The run in a line: steps, guidance, size, seeds."""
    parts = [f"{settings.steps} steps"]
    if "guidance_scale" in arguments:
        parts.append(f"guidance {arguments['guidance_scale']}")
    if "height" in arguments:
        parts.append(f"{arguments['width']} x {arguments['height']}")
    return ", ".join([*parts, f"seeds from {settings.seed}"])
