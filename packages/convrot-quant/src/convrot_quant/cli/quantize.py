"""convrot quantize: a 16-bit model folder in, a quantized one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convrot_quant.cli.options import (
    Device,
    DType,
    Dtype,
    Json,
    Keep,
    Model,
    Override,
    Preset,
    Quiet,
    check_globs,
    read_config,
    read_device,
)
from convrot_quant.cli.output import Output, hush
from convrot_quant.config import QuantConfig
from convrot_quant.pipeline import meta_transformer, open_folder, quantize_folder
from convrot_quant.plans import Plan, size_text

EXAMPLES = """Examples:

convrot quantize ./FLUX.1-dev -o ./FLUX.1-dev-4bit --device cuda

convrot quantize ./FLUX.1-dev -o ./out --preset paper --keep 'single_transformer_blocks.{last}.*'

convrot quantize ./FLUX.1-dev/transformer -o ./out --override '*.to_out.0=W8A8' --max-shard-size 2GB
"""


def command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it appears whole or not at all.")],
    preset: Preset = "ours",
    keep: Keep = None,
    override: Override = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Quantize by this plan (from `convrot inspect --json`) instead of a preset.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = DType.bfloat16,
    max_shard_size: Annotated[str, typer.Option(help="Of each safetensors file.", metavar="SIZE")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model folder with its transformer rotated and quantized.

    A pipeline folder gives a whole pipeline folder, a transformer folder a transformer folder.
    """
    output = Output(json, quiet)
    hush(quiet=quiet)
    if plan is not None and (preset != "ours" or keep or override):
        raise typer.BadParameter("--plan decides every layer; leave out --preset, --keep and --override")
    config: QuantConfig | Plan = read_config(preset, keep, override)
    if plan is not None:
        config = _read_plan(plan)
    place = read_device(device)
    folder = open_folder(model)
    check_globs([meta_transformer(path) for path in folder.transformers.values()], keep, override)
    plans = quantize_folder(
        folder,
        out,
        config,
        dtype=dtype.torch,
        device=place,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=output.progress,
    )
    for name, made in plans.items():
        before, after = size_text(made.bytes_before), size_text(made.bytes_after)
        output.show(made, f"{name}: {before} -> {after}, written to {out}")
    output.result({"out": str(out), "components": {name: _figures(made) for name, made in plans.items()}})


def _figures(plan: Plan) -> dict[str, object]:
    return {"bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after, "plan": plan.to_dict()}


def _read_plan(path: Path) -> Plan:
    import json

    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if isinstance(data, dict) and "components" in data:  # the whole output of inspect --json
        plans = [component["plan"] for component in data["components"].values()]
        if len(plans) != 1:
            raise ValueError(f"{path}: has {len(plans)} plans; quantize each transformer folder with its own")
        data = plans[0]
    return Plan.from_dict(data)
