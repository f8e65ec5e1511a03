"""What generate and compare share: checks before the work, variants, sheets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from PIL import Image
from torch import nn

from convrot_quant.cli.options import describe, read_config
from convrot_quant.cli.output import Output
from convrot_quant.compare import Result, Variant
from convrot_quant.folders import check_place
from convrot_quant.generation import Settings, call_arguments, cut_prompts, generate
from convrot_quant.patch import plan
from convrot_quant.pipeline import ModelFolder, load_pipeline
from convrot_quant.streaming import load_and_quantize

Listener = TypeVar("Listener")


def check_image_file(path: Path | None, option: str) -> None:
    """Wrong usage unless PIL can write an RGB image under this suffix, which a small one shows; None is no file."""
    if path is None:
        return
    suffix = path.suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    try:
        if kind is None or path.is_dir():
            raise ValueError("no image format")
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=kind)
    except (KeyError, ValueError, OSError):
        raise typer.BadParameter(f"{option} {path}: images cannot be written under this name; use .png") from None
    check_place(path)


def prepare(output: Output, pipe: Any, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The pipeline call's arguments, checked before anything is quantized; warns of prompts that are too long."""
    arguments = call_arguments(pipe, settings)
    for number, tokens, limit in cut_prompts(pipe, prompts, arguments):
        output.warn(f"prompt {number} has {tokens} tokens, more than the limit of {limit}: its end is cut off")
    return arguments


def calibrate(
    output: Output,
    folder: ModelFolder,
    prompts: Sequence[str],
    settings: Settings,
    dtype: torch.dtype,
    device: str,
    listen: Callable[[nn.Module, int], AbstractContextManager[Listener]],
) -> tuple[nn.Module, Listener]:
    """Run the 16-bit pipeline on the prompts inside of listen(transformer, calls) -> the transformer, what listened."""
    pipe = load_pipeline(folder, dtype=dtype, device=device)
    prepare(output, pipe, prompts, settings)
    with listen(pipe.transformer, settings.steps * len(prompts)) as listener:
        generate(pipe, prompts, settings, progress=output.progress, label="calibrate")
    return pipe.transformer, listener


def preset_variant(path: Path, pipe: Any, preset: str, dtype: torch.dtype, device: str, progress: bool) -> Variant:
    """A preset as a variant: its transformer is read again and quantized when its turn comes."""
    config = read_config(preset, None, None)

    def make() -> nn.Module:
        return load_and_quantize(path, config, device=device, dtype=dtype, progress=progress)

    return Variant(f"{preset} ({config.scheme.name})", plan(pipe.transformer, config), make)


def write_sheet(
    path: Path, results: Sequence[Result], model: str, settings: Settings, arguments: dict[str, Any]
) -> None:
    """Draw the results of compare() into one image."""
    from convrot_quant.sheet import draw_sheet

    title = f"{model}: {results[0].name} and {results[1].name if len(results) == 2 else 'quantized'}"
    subtitle = f"Same prompts, same noise. {describe(settings, arguments)}"
    if len(results) == 2:
        figures = results[1].to_dict(results[0])
        psnr = figures["psnr_db_mean"]
        mean = "All images identical" if psnr is None else f"Mean PSNR {psnr:.1f} dB, SSIM {figures['ssim_mean']:.3f}"
        subtitle += f". {mean}. Transformer {figures['times_smaller']:.2f}x smaller."
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(results, title=title, subtitle=subtitle).save(path)


def picture_entries(result: Result) -> list[dict[str, Any]]:
    """Each picture's prompt, seed and real size, ready for JSON."""
    return [
        {"prompt": p.prompt, "seed": p.seed, "width": p.image.width, "height": p.image.height} for p in result.pictures
    ]
