"""convrot convert: a quantized model between ComfyUI's single files and diffusers folders, bit for bit."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from convrot_quant.cli.options import Json, Quiet, check_size
from convrot_quant.cli.output import Output, hush
from convrot_quant.comfy import SUFFIX
from convrot_quant.contents import schemes_text
from convrot_quant.convert import config_from, convert
from convrot_quant.markers import DEFAULT_GROUP
from convrot_quant.plans import size_text

EXAMPLES = """Examples:

convrot convert ./FLUX.1-dev-4bit flux1-dev-convrot.safetensors

convrot convert flux1-dev-convrot.safetensors ./FLUX.1-dev-4bit/transformer --overwrite

convrot convert ./model-4bit model.safetensors --format comfy --keys diffusers
"""


class FormatName(str, Enum):
    """The formats that are written."""

    comfy = "comfy"
    diffusers = "diffusers"


class KeyNames(str, Enum):
    """The names of layers in a comfy file."""

    original = "original"
    diffusers = "diffusers"


Source = Annotated[
    str,
    typer.Argument(
        help="A quantized folder, a file for ComfyUI, or an official ConvRot state dict (.safetensors).", metavar="IN"
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="The model's folder or config.json, where IN does not say which model it is (FLUX.1 needs none).",
        exists=True,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="The rotation of an official state dict, which does not tell it. "
        f"Default: {DEFAULT_GROUP}; refused for every other IN, which tells its own.",
    ),
]


def command(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The file or folder to write; it appears whole or not.", metavar="OUT")],
    to: Annotated[
        FormatName | None,
        typer.Option("--format", help=f"Default: comfy where OUT ends in {SUFFIX}, else diffusers."),
    ] = None,
    keys: Annotated[
        KeyNames,
        typer.Option(help="Names in a comfy file: FLUX.1's original ones with q, k, v fused, or diffusers'."),
    ] = KeyNames.original,
    config: Config = None,
    group_size: GroupSize = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Of each file of a folder.", metavar="SIZE")
    ] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or model folder.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantized model in another file format: the same codes and scales, one tensor in memory at a time."""
    output = Output(as_json, quiet)
    hush(quiet=quiet)
    kind = to or (FormatName.comfy if out.suffix == SUFFIX else FormatName.diffusers)
    check_size(max_shard_size)
    with output.warnings():
        contents = convert(
            source,
            out,
            to=kind.value,
            keys=keys.value,
            config=None if config is None else config_from(config),
            group_size=group_size,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=output.progress,
        )
    written = [out] if out.is_file() else sorted(out.glob(f"*{SUFFIX}"))
    size = sum(path.stat().st_size for path in written)
    text = schemes_text(contents.schemes)
    output.show(f"{source}: {text}; written to {out} ({size_text(size)})")
    schemes = {name: scheme.to_dict() for name, scheme in contents.schemes.items()}
    output.result({"source": source, "out": str(out), "format": kind.value, "file_bytes": size, "layers": schemes})
