"""convrot inspect: the plan of a 16-bit model, or what is in a quantized folder; no weights are read.

A model may also be a name: of a released model (released.py) or of a transformer class of diffusers, with its defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convrot_quant.cli.options import DType, Dtype, Json, Keep, Override, Preset, Quiet, check_globs, read_config
from convrot_quant.cli.output import Output, hush
from convrot_quant.manifest import is_quantized, read_manifest
from convrot_quant.named_models import alike, find, named_model
from convrot_quant.patch import plan
from convrot_quant.pipeline import ModelFolder, meta_transformer, open_folder
from convrot_quant.plans import Plan, size_text

EXAMPLES = """Examples:

convrot inspect ./FLUX.1-dev --preset paper-mixed

convrot inspect ./FLUX.1-dev-4bit --all

convrot inspect black-forest-labs/FLUX.1-dev --json > plan.json

convrot inspect Wan2.2-T2V-A14B

convrot inspect QwenImageTransformer2DModel
"""
Model = Annotated[
    str,
    typer.Argument(
        help="A diffusers folder (pipeline or transformer), a hub id such as black-forest-labs/FLUX.1-dev, or with no "
        "folder at all: a released model such as FLUX.1-dev, a transformer class such as FluxTransformer2DModel.",
        metavar="MODEL",
    ),
]


def command(
    model: Model,
    preset: Preset = "ours",
    keep: Keep = None,
    override: Override = None,
    every: Annotated[bool, typer.Option("--all", help="One row a layer, instead of one for all blocks alike.")] = False,
    dtype: Dtype = DType.bfloat16,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show each linear's scheme, or why it stays in 16 bits, and the bytes before and after."""
    output = Output(as_json, quiet)
    hush(quiet=quiet)
    config = read_config(preset, keep, override)
    components: dict[str, Any] = {}
    if not Path(model).is_dir() and find(model) is not None:
        empty = named_model(model, dtype.torch)
        check_globs([empty], keep, override)
        components["transformer"] = _show(output, plan(empty, config), every)
        output.result({"model": model, "quantized": False, "components": components})
        return
    folder = _open(model)
    for name, path in folder.transformers.items():
        if is_quantized(path):
            if preset != "ours" or keep or override:
                raise typer.BadParameter(f"{path} is quantized already: --preset, --keep and --override do not apply")
            found, entry = _quantized(output, path)
        else:
            empty = meta_transformer(path, dtype.torch)
            check_globs([empty], keep, override)
            found, entry = plan(empty, config), {}
        components[name or "transformer"] = {**entry, **_show(output, found, every)}
    output.result({"model": model, "quantized": folder.is_quantized, "components": components})


def _open(model: str) -> ModelFolder:
    """The folder, and for a word that is none: the names that are like it."""
    try:
        return open_folder(model, weights=False)
    except FileNotFoundError as error:
        if "/" in model:
            raise
        near = f" (there is {', '.join(alike(model))})" if alike(model) else ""
        raise FileNotFoundError(f"{error}, and it is no released model nor transformer class{near}") from None


def _show(output: Output, found: Plan, every: bool) -> dict[str, Any]:
    """Print a plan; its part of the JSON."""
    output.show(found.table(fold=not every, width=output.width))
    return {"bytes_before": found.bytes_before, "bytes_after": found.bytes_after, "plan": found.to_dict()}


def _quantized(output: Output, path: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan that a quantized folder's headers hold, and what else they say."""
    manifest = read_manifest(path)
    written = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
    files = len({header.file for header in manifest.tensors.values()})
    output.show(f"{path}: {files} file(s), {size_text(manifest.file_bytes)}, written with {written}")
    return manifest.plan, {"files": files, "file_bytes": manifest.file_bytes, "versions": manifest.versions}
