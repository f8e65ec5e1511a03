"""convrot quantize: a 16-bit model folder in, a quantized one out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from convrot_quant.calibration import Calibration
from convrot_quant.cli.options import (
    Device,
    DType,
    Dtype,
    Guidance,
    Height,
    Json,
    Keep,
    Model,
    Override,
    Preset,
    Quiet,
    Seed,
    Steps,
    Width,
    check_globs,
    check_size,
    read_config,
    read_device,
    read_prompts,
    read_text,
)
from convrot_quant.cli.output import Output, hush
from convrot_quant.cli.runs import calibrate as run_calibration
from convrot_quant.config import QuantConfig
from convrot_quant.folders import check_place
from convrot_quant.generation import Settings
from convrot_quant.lora_files import LoraFile
from convrot_quant.patch import plan as plan_of_model
from convrot_quant.pipeline import ModelFolder, meta_transformer, open_folder, quantize_folder
from convrot_quant.plans import Plan, size_text

EXAMPLES = """Examples:

convrot quantize ./FLUX.1-dev -o ./FLUX.1-dev-4bit --device cuda

convrot quantize ./FLUX.1-dev -o ./out --preset paper --keep 'single_transformer_blocks.{last}.*'

convrot quantize ./FLUX.1-dev/transformer -o ./out --override '*.to_out.0=W8A8' --max-shard-size 2GB

convrot quantize ./FLUX.1-dev -o ./FLUX.1-dev-4bit --calibrate prompts.txt --device cuda

convrot quantize ./FLUX.1-dev -o ./styled --lora style.safetensors:0.8 --lora detail.safetensors
"""
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it appears whole or not at all.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        help="Quantize by this plan (from `convrot inspect --json`) instead of a preset.", exists=True, dir_okay=False
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="Merge a LoRA file (safetensors; diffusers', kohya's or the original names) into the 16-bit weights "
        "before they are quantized, by SCALE (1); repeatable.",
        metavar="FILE[:SCALE]",
    ),
]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Of each safetensors file.", metavar="SIZE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        help="Prompts, one a line, which the 16-bit pipeline draws first: 4-bit weights are then rounded by what "
        "layers read (GPTQ). Less error, the same bytes and speed; quantizing takes longer.",
        exists=True,
        dir_okay=False,
    ),
]


def command(
    model: Model,
    out: Out,
    preset: Preset = "ours",
    keep: Keep = None,
    override: Override = None,
    plan: PlanFile = None,
    lora: Lora = None,
    calibrate: Calibrate = None,
    steps: Steps = 20,
    seed: Seed = 0,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = "auto",
    dtype: Dtype = DType.bfloat16,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model folder with its transformer rotated and quantized.

    A pipeline folder gives a whole pipeline folder, a transformer folder a transformer folder.

    --steps, --seed, --guidance, --height and --width are those of --calibrate.
    """
    output = Output(as_json, quiet)
    hush(quiet=quiet)
    config = _read_config(preset, keep, override, plan)
    check_size(max_shard_size)
    place, folder = read_device(device), open_folder(model)
    check_globs([meta_transformer(path) for path in folder.transformers.values()], keep, override)
    loras = [LoraFile.parse(text) for text in lora or ()]
    calibration = None
    if calibrate is not None:
        _check_calibration(folder, loras, out, overwrite)
        settings = Settings(seed, steps, guidance, height, width)
        prompts = read_prompts(None, calibrate)
        _, calibration = run_calibration(output, folder, prompts, settings, dtype.torch, place, _listen(config))
    with output.warnings():
        plans = quantize_folder(
            folder,
            out,
            config,
            dtype=dtype.torch,
            device=place,
            max_shard_size=max_shard_size,
            loras=loras,
            calibration=calibration,
            base_model=None if Path(model).is_dir() else model,
            overwrite=overwrite,
            progress=output.progress,
        )
    for name, made in plans.items():
        before, after = size_text(made.bytes_before), size_text(made.bytes_after)
        output.show(made, f"{name}: {before} -> {after}, written to {out}")
    merged = [{"file": str(file.path), "scale": file.scale} for file in loras]
    output.result(
        {"out": str(out), "loras": merged, "components": {name: _figures(made) for name, made in plans.items()}}
    )


def _listen(config: QuantConfig | Plan) -> Callable[[nn.Module, int], Calibration]:
    """A calibration of the layers that this configuration quantizes."""

    def listen(model: nn.Module, calls: int) -> Calibration:
        return Calibration(model, config if isinstance(config, Plan) else plan_of_model(model, config), calls=calls)

    return listen


def _check_calibration(folder: ModelFolder, loras: list[LoraFile], out: Path, overwrite: bool) -> None:
    """What --calibrate cannot do, and what would be refused after it."""
    if not folder.is_pipeline:
        raise ValueError(f"--calibrate draws its prompts with the pipeline, and {folder.root} is a transformer alone")
    if folder.is_quantized:
        raise ValueError(f"{folder.root} is already quantized; start from the 16-bit folder")
    if len(folder.transformers) > 1:
        raise ValueError(f"{folder.root} has {' and '.join(folder.transformers)}: --calibrate is for one transformer")
    if loras:
        raise ValueError("--calibrate draws with the model as it is, without --lora; give one of the two")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another destination, or overwrite it (--overwrite)")
    check_place(out)


def _figures(plan: Plan) -> dict[str, object]:
    return {"bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after, "plan": plan.to_dict()}


def _read_config(
    preset: str, keep: list[str] | None, override: list[str] | None, plan: Path | None
) -> QuantConfig | Plan:
    """What decides the layers: the options, or a plan's file alone."""
    if plan is None:
        return read_config(preset, keep, override)
    if preset != "ours" or keep or override:
        raise typer.BadParameter("--plan decides every layer; leave out --preset, --keep and --override")
    return _read_plan(plan)


def _read_plan(path: Path) -> Plan:
    """A plan's JSON, or the whole output of inspect --json with the one plan in it."""
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if isinstance(data, dict) and "components" in data:
        components = data["components"]
        values: list[Any] = list(components.values()) if isinstance(components, dict) else [None]
        if not all(isinstance(value, dict) and "plan" in value for value in values):
            raise ValueError(f"{path}: its components hold no plans; write it with `convrot inspect --json`")
        if len(values) != 1:
            raise ValueError(f"{path}: has {len(values)} plans; quantize each transformer folder with its own")
        data = values[0]["plan"]
    try:
        return Plan.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
