"""load_quantized refuses every way in which a folder can be wrong, in one sentence that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convrot_quant import CheckpointError, load_quantized
from convrot_quant.manifest import INDEX, WEIGHTS

LAYER = "transformer_blocks.0.attn.to_q"


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, **tensors: Tensor | None) -> None:
    """Change a file's tensors (None drops one; __ stands for .) or its metadata."""
    with safe_open(str(path), framework="pt") as file:
        old = dict(file.metadata())
    state = load_file(path)
    for name, tensor in tensors.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, path, old if metadata is None else metadata)


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        return dict(file.metadata())


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def damage_plan(folder: Path) -> None:
    rewrite(folder / WEIGHTS, metadata=metadata_of(folder) | {"convrot_plan": "{"})


def name_foreign_layer(folder: Path) -> None:
    text = metadata_of(folder)["convrot_plan"].replace("transformer_blocks.0.attn.to_q", "blocks.9.to_q")
    rewrite(folder / WEIGHTS, metadata=metadata_of(folder) | {"convrot_plan": text})


def unfit_group(folder: Path) -> None:
    data = json.loads(metadata_of(folder)["convrot_plan"])
    for layer in data["layers"]:
        if layer["name"] == LAYER:
            layer["scheme"]["group_size"] = 1024
    rewrite(folder / WEIGHTS, metadata=metadata_of(folder) | {"convrot_plan": json.dumps(data)})


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated data": (truncate, "truncated or damaged .* copy or save it again"),
    "truncated header": (cut_header, "truncated or damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}; give a folder written by save_quantized"),
    "foreign": (
        lambda f: rewrite(f / WEIGHTS, metadata={"format": "pt"}),
        "not written by convrot .* quantize the",
    ),
    "newer": (
        lambda f: rewrite(f / WEIGHTS, metadata=metadata_of(f) | {"convrot_format_version": "2"}),
        "format_version 2 is newer than the 1 that this convrot-quant reads; upgrade convrot-quant",
    ),
    "no version": (
        lambda f: rewrite(f / WEIGHTS, metadata=metadata_of(f) | {"convrot_format_version": "one"}),
        "convrot_format_version must be a whole number, got 'one'",
    ),
    "damaged plan": (damage_plan, "its convrot metadata is damaged .*not valid JSON"),
    "plan of another model": (name_foreign_layer, "the plan names 'blocks.9.to_q', which FluxTransformer2DModel lacks"),
    "unfit group": (unfit_group, f"the plan's W4A4 g1024 does not fit '{LAYER}'"),
    "missing tensor": (lambda f: rewrite(f / WEIGHTS, proj_out__bias=None), "lacks tensor 'proj_out.bias'; save"),
    "extra tensor": (lambda f: rewrite(f / WEIGHTS, extra=torch.ones(1)), "has an unknown tensor 'extra'"),
    "wrong shape": (
        lambda f: rewrite(f / WEIGHTS, proj_out__bias=torch.ones(3)),
        r"'proj_out.bias' must be \(64,\), got \(3,\)",
    ),
    "scales not fp32": (
        lambda f: rewrite(f / WEIGHTS, transformer_blocks__0__attn__to_q__weight_scale=torch.ones(512).bfloat16()),
        f"'{LAYER}.weight_scale' must not be BF16",
    ),
    "codes not int8": (
        lambda f: rewrite(f / WEIGHTS, transformer_blocks__0__attn__to_q__weight=torch.ones(512, 256)),
        f"'{LAYER}.weight' must not be F32",
    ),
    "integer bias": (
        lambda f: rewrite(f / WEIGHTS, proj_out__bias=torch.ones(64, dtype=torch.int8)),
        "'proj_out.bias' must not be I8",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json; give a model folder of diffusers"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config without a class": (lambda f: (f / "config.json").write_text("{}"), "no _class_name"),
    "class that diffusers lacks": (
        lambda f: change_config(f, _class_name="Flux9"),
        "has no model Flux9; upgrade",
    ),
    "class that is no model": (lambda f: change_config(f, _class_name="FluxPipeline"), "has no model FluxPipeline"),
    "class that is no class": (lambda f: change_config(f, _class_name="logging"), "has no model logging"),
    "config of another size": (lambda f: change_config(f, num_attention_heads=4), "must be|does not fit|lacks|unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(one: Path, case: str) -> None:
    damage, message = WRONG[case]
    damage(one)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_quantized(one)
    assert "\n" not in str(caught.value)


def reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncate_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-7])


def mix_saves(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata())
    rewrite(path, metadata=metadata | {"convrot_versions": '{"torch": "1"}'})


def swap_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


WRONG_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (drop_shard, "the shard .*-00002-of-.* is missing; copy the folder again"),
    "truncated shard": (
        lambda f: (p := sorted(f.glob("*.safetensors"))[2]).write_bytes(p.read_bytes()[:-7]),
        "truncated",
    ),
    "shards of two saves": (mix_saves, "its metadata differs from the first shard's"),
    "shards swapped": (swap_shards, "is not listed for this file"),
    "tensor missing from the index": (lambda f: reindex(f, lambda m: m.pop("proj_out.bias")), "is not listed for this"),
    "tensor missing from its file": (
        lambda f: reindex(f, lambda m: m.update(ghost=next(iter(m.values())))),
        "lists 'ghost', but its file lacks it",
    ),
    "index empty": (lambda f: reindex(f, lambda m: m.clear()), "the shard index is empty"),
    "index not JSON": (lambda f: (f / INDEX).write_text("["), "not a shard index"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "not a shard index"),
    "index not text": (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), "not a shard index"),
}


@pytest.mark.parametrize("case", WRONG_SHARDS)
def test_a_wrong_shard_is_refused_in_one_sentence(shards: Path, case: str) -> None:
    damage, message = WRONG_SHARDS[case]
    damage(shards)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(shards)


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", ".x.safetensors", "x.bin", ""],
)
def test_an_index_cannot_point_out_of_its_folder(shards: Path, name: str) -> None:
    target = sorted(shards.glob("*.safetensors"))[0]
    shutil.copy(target, shards.parent / "evil.safetensors")
    reindex(shards, lambda m: m.update({"proj_out.bias": name}))
    with pytest.raises(CheckpointError, match=r"is not the plain name of a .safetensors file; do not trust"):
        load_quantized(shards)
