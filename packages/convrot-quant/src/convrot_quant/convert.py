"""convert: a quantized model from one file format to another, codes and scales bit for bit, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from convrot_quant.comfy import SUFFIX, Keys, read_comfy, with_diffusers_keys, write_comfy
from convrot_quant.contents import Contents, build, read_folder, write_folder
from convrot_quant.folders import replace_folder
from convrot_quant.manifest import CheckpointError, is_quantized, read_config
from convrot_quant.official import is_official, read_official
from convrot_quant.pipeline import open_folder
from convrot_quant.source import PICKLED
from convrot_quant.tensorfile import read_tensors

Format = Literal["comfy", "diffusers"]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Format,
    keys: Keys = "original",
    config: Mapping[str, Any] | None = None,
    group_size: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> Contents:
    """Write `destination`, a file for ComfyUI or a transformer folder; it appears whole or not at all.

    `keys`: as in save_comfy. `config`: the model's config.json, for files that do not say. `group_size`: as in
    read_quantized. Returns what was read, under diffusers' names.
    """
    contents = read_quantized(source, group_size=group_size)
    contents = contents if config is None else contents.with_config(config)
    contents = with_diffusers_keys(contents)
    if contents.config is not None or to == "diffusers":
        build(contents)  # every name, shape and dtype, before a byte is written
    read, written = Path(source).resolve(), Path(destination).resolve()
    if read == written or written in read.parents or read in written.parents:
        raise ValueError(f"the destination {destination} is, holds or lies in what is read; choose another one")
    if to == "comfy":
        write_comfy(contents, destination, keys=keys, overwrite=overwrite, progress=progress)
    else:
        with replace_folder(destination, overwrite=overwrite) as building:
            write_folder(contents, building, max_shard_size=max_shard_size, progress=progress)
    return contents


def read_quantized(source: str | Path, *, group_size: int | None = None) -> Contents:
    """A quantized folder, a file for ComfyUI, or an official state dict, by what is in it; values stay on disk.

    `group_size`: the rotation of an official state dict, None for 256; refused for other sources, which say it.
    """
    path = Path(source)
    if path.suffix in PICKLED:
        raise CheckpointError(f"{path}: a pickle can run code when it is read; write it as safetensors first")
    if path.is_file():
        if path.suffix != SUFFIX:
            raise CheckpointError(f"{path}: not a {SUFFIX} file; give one, or a quantized model folder")
        if is_official(read_tensors(path)[1]):
            return read_official(path, group_size=group_size)
        _refuse_group_size(path, group_size)
        return read_comfy(path)
    if path.suffix == SUFFIX and not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    found = open_folder(source).transformers
    if len(found) > 1:
        raise ValueError(f"{source}: has {len(found)} transformers; convert each one's folder by itself")
    folder = next(iter(found.values()))
    if not is_quantized(folder):
        raise ValueError(f"{folder} is not quantized; write a quantized folder with `convrot quantize` first")
    _refuse_group_size(folder, group_size)
    return read_folder(folder)


def _refuse_group_size(path: Path, group_size: int | None) -> None:
    """Headers and markers decide it: what was asked for would have no effect."""
    if group_size is not None:
        raise ValueError(
            f"{path}: --group-size is only for official ConvRot state dicts, since all other files say theirs; "
            f"got {group_size}, leave it out"
        )


def config_from(path: Path) -> dict[str, Any]:
    """The config.json of a model folder, of a pipeline's transformer, or that file itself."""
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(found, dict) or not isinstance(found.get("_class_name"), str):
            raise CheckpointError(f"{path}: no _class_name; it is not the config of a diffusers model")
        return found
    return read_config(next(iter(open_folder(path, weights=False).transformers.values())))
