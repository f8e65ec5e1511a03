"""convrot generate: images in 4 bits, and beside them in 16 bits when a sheet is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

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
    Steps,
    Width,
    describe,
    read_config,
    read_device,
    read_prompts,
)
from convrot_quant.cli.output import Output, figures_table, hush, images_table
from convrot_quant.compare import Result, Variant, compare, dtype_name
from convrot_quant.generation import Picture, Settings, call_arguments
from convrot_quant.generation import generate as generate_images
from convrot_quant.manifest import read_manifest
from convrot_quant.patch import model_bytes, plan, quantize_
from convrot_quant.pipeline import ModelFolder, load_pipeline, load_transformer, open_folder
from convrot_quant.presets import PRESETS

NONE = "none"
EXAMPLES = """Examples:

convrot generate ./FLUX.1-dev-4bit --prompt "a red cube in front of a blue sphere" -o image.png

convrot generate ./FLUX.1-dev --prompts-file prompts.txt --seed 0 --sheet sheet.png -o outputs/

convrot generate ./FLUX.1-dev-4bit --reference ./FLUX.1-dev --prompt "a fox" --sheet sheet.png --json
"""


def command(
    model: Model,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for images, or one .png for one image.")] = Path(
        "outputs"
    ),
    sheet: Annotated[
        Path | None,
        typer.Option(help="Also run the 16-bit model; write both side by side to this PNG and show errors."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"How to quantize a 16-bit MODEL: {', '.join(PRESETS)}; {NONE} leaves it. Default: ours.",
            metavar="NAME",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="With --sheet and a quantized MODEL: the 16-bit one.", metavar="MODEL")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    num_images: NumImages = 1,
    max_sequence_length: MaxSequenceLength = None,
    device: Device = "auto",
    dtype: Dtype = DType.bfloat16,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw prompts with a quantized model; a 16-bit MODEL is quantized in memory first."""
    output = Output(json, quiet)
    hush(quiet=quiet)
    prompts = read_prompts(prompt, prompts_file)
    settings = Settings(seed, steps, guidance, height, width, num_images, max_sequence_length)
    count = len(prompts) * num_images
    if out.suffix and count * (1 if sheet is None else 2) > 1:
        more = f"{count} images" if sheet is None else "16-bit and quantized images"
        raise typer.BadParameter(f"-o {out} is one file, but {more} are to be made: give a folder")
    folder, place = open_folder(model), read_device(device)
    _check_options(folder, preset, reference, sheet)
    if sheet is None:
        pipe = load_pipeline(folder, dtype=dtype.torch, device=place)
        result = _one_model(output, folder, pipe, preset, prompts, settings)
        paths = _save(result.pictures, out, "")
        output.show(figures_table([result]))
        _finish(output, settings, call_arguments(pipe, settings), [result], {"images": paths})
        return
    base = folder if reference is None else open_folder(reference)
    pipe = load_pipeline(base, dtype=dtype.torch, device=place)
    make = _variant(folder, pipe, preset, dtype.torch, place, output.progress)
    results = compare(pipe, [make], prompts, settings, progress=output.progress)
    saved = {
        "images": _save(results[1].pictures, out, ""),
        "images_16bit": _save(results[0].pictures, out, f"_{results[0].name.lower()}"),
    }
    arguments = call_arguments(pipe, settings)
    write_sheet(sheet, results, type(pipe.transformer).__name__, settings, arguments)
    output.show(images_table(results), figures_table(results))
    _finish(output, settings, arguments, results, saved | {"sheet": str(sheet)})


def _check_options(folder: ModelFolder, preset: str | None, reference: str | None, sheet: Path | None) -> None:
    if folder.is_quantized and preset not in (None, NONE):
        raise typer.BadParameter(f"--preset {preset}: {folder.root} is quantized already")
    if folder.is_quantized and sheet is not None and reference is None:
        raise typer.BadParameter("--sheet of a quantized MODEL needs its 16-bit original: --reference MODEL")
    if reference is not None and not (folder.is_quantized and sheet is not None):
        raise typer.BadParameter("--reference goes with --sheet and a quantized MODEL")
    if sheet is not None and preset == NONE:
        raise typer.BadParameter("--sheet compares with a quantized model: leave out --preset none")
    if preset not in (None, NONE):
        read_config(preset, None, None)


def _one_model(
    output: Output, folder: ModelFolder, pipe: Any, preset: str | None, prompts: Sequence[str], settings: Settings
) -> Result:
    """Quantize in place where that is due, and draw."""
    name = "quantized" if folder.is_quantized else dtype_name(pipe.transformer)
    if not folder.is_quantized and preset != NONE:
        for component in folder.transformers:
            quantize_(getattr(pipe, component), preset or "ours", progress=output.progress)
        name = preset or "ours"
    pictures = generate_images(pipe, prompts, settings, progress=output.progress, label=name)
    return Result(name, pictures, model_bytes(pipe.transformer))


def _variant(folder: ModelFolder, pipe: Any, preset: str | None, dtype: Any, device: str, progress: bool) -> Variant:
    """The quantized model of --sheet: MODEL itself, or MODEL quantized by the preset."""
    path = folder.transformers["transformer"]
    if folder.is_quantized:
        return Variant(
            "quantized", read_manifest(path).plan, lambda: load_transformer(path, dtype=dtype, device=device)
        )
    return preset_variant(path, pipe, preset or "ours", dtype, device, progress)


def preset_variant(path: Path, pipe: Any, preset: str, dtype: Any, device: str, progress: bool) -> Variant:
    """A preset as a variant: its transformer is read again and quantized when its turn comes."""
    config = read_config(preset, None, None)

    def make() -> nn.Module:
        model = load_transformer(path, dtype=dtype, device=device)
        quantize_(model, config, progress=progress)
        return model

    return Variant(f"{preset} ({config.scheme.name})", plan(pipe.transformer, config), make)


def write_sheet(
    path: Path, results: Sequence[Result], model: str, settings: Settings, arguments: dict[str, Any]
) -> None:
    """Draw the results of compare() into one PNG."""
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


def _save(pictures: Sequence[Picture], out: Path, suffix: str) -> list[str]:
    """Write pictures as 000.png, 001.png, ... in a folder, or the only one as the file `out`."""
    single = bool(out.suffix)
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    paths = [out if single else out / f"{i:03d}{suffix}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.image.save(path)
    return [str(path) for path in paths]


def _finish(
    output: Output, settings: Settings, arguments: dict[str, Any], results: Sequence[Result], saved: dict[str, Any]
) -> None:
    where = saved["images"][0] if len(saved["images"]) == 1 else str(Path(saved["images"][0]).parent)
    output.show(f"images: {where}")
    if "sheet" in saved:
        output.show(f"sheet: {saved['sheet']}")
    pictures = [{"prompt": picture.prompt, "seed": picture.seed} for picture in results[0].pictures]
    run = {"settings": asdict(settings), "arguments": arguments, "pictures": pictures}
    output.result({**run, **saved, "results": [result.to_dict(results[0]) for result in results]})
