"""convrot compare: several presets against the 16-bit model, on the same prompts and seeds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from convrot_quant.cli.machine import machine
from convrot_quant.cli.options import (
    Device,
    DType,
    Dtype,
    Guidance,
    Height,
    Json,
    MaxSequenceLength,
    Model,
    NumImages,
    Prompt,
    PromptsFile,
    Quiet,
    Seed,
    Sheet,
    Steps,
    Width,
    read_config,
    read_device,
    read_prompts,
)
from convrot_quant.cli.output import Output, figures_table, hush
from convrot_quant.cli.runs import check_image_file, picture_entries, prepare, preset_variant, write_sheet
from convrot_quant.compare import compare
from convrot_quant.generation import Settings
from convrot_quant.pipeline import load_pipeline, open_16bit
from convrot_quant.presets import PRESETS

EXAMPLES = """Examples:

convrot compare ./FLUX.1-dev --preset ours --preset paper --prompt "a red cube" --sheet presets.png

convrot compare ./FLUX.1-dev --prompts-file prompts.txt --num-images 2 --json
"""

Preset = Annotated[
    list[str] | None,
    typer.Option("--preset", help=f"Repeatable: {', '.join(PRESETS)}. Default: ours, paper.", metavar="NAME"),
]


def command(
    model: Model,
    preset: Preset = None,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    sheet: Sheet = None,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    num_images: NumImages = 1,
    max_sequence_length: MaxSequenceLength = None,
    device: Device = "auto",
    dtype: Dtype = DType.bfloat16,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure presets against the 16-bit model: image errors, per-layer errors, bytes, seconds."""
    output = Output(as_json, quiet)
    hush(quiet=quiet)
    prompts = read_prompts(prompt, prompts_file)
    settings = Settings(seed, steps, guidance, height, width, num_images, max_sequence_length)
    check_image_file(sheet, "--sheet")
    names, place, folder = _preset_names(preset), read_device(device), open_16bit(model)
    pipe = load_pipeline(folder, dtype=dtype.torch, device=place)
    path = folder.transformers["transformer"]
    arguments = prepare(output, pipe, prompts, settings)
    variants = [preset_variant(path, pipe, name, dtype.torch, place, output.progress) for name in names]
    results = compare(pipe, variants, prompts, settings, progress=output.progress)
    output.show(figures_table(results))
    data: dict[str, Any] = {"settings": asdict(settings), "arguments": arguments, "prompts": prompts}
    data |= {"pictures": picture_entries(results[0]), "results": [r.to_dict(results[0]) for r in results]}
    if sheet is not None:
        write_sheet(sheet, results, type(pipe.transformer).__name__, settings, arguments)
        output.show(f"sheet: {sheet}")
        data["sheet"] = str(sheet)
    output.result({"machine": machine(place), **data})


def _preset_names(presets: list[str] | None) -> list[str]:
    """--preset without repetitions; an unknown name is wrong usage."""
    names = list(dict.fromkeys(presets or ["ours", "paper"]))
    for name in names:
        read_config(name, None, None)
    return names
