"""quantize_to: the files of load_and_quantize and save_quantized, with one layer in memory at a time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convrot_quant import CheckpointError, load_and_quantize, load_quantized, save_quantized
from convrot_quant.manifest import INDEX, WEIGHTS, read_manifest
from convrot_quant.pipeline import open_folder, quantize_folder
from convrot_quant.streaming import quantize_to

MEASURED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from convrot_quant.pipeline import open_folder, quantize_folder, meta_transformer
folder = open_folder(sys.argv[1])
meta_transformer(folder.root)  # what importing the model class takes
def memory(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key + ":")) * 1024
peak = [0]
before = memory("RssAnon")
import convrot_quant.streaming as streaming
quantize = streaming.quantize_weight
def measured(*arguments, **options):
    made = quantize(*arguments, **options)
    peak[0] = max(peak[0], memory("RssAnon") - before)
    return made
streaming.quantize_weight = measured
quantize_folder(folder, sys.argv[2], sys.argv[3], progress=False)
print(peak[0])
"""


@pytest.mark.parametrize(("size", "dtype"), [("5GB", torch.bfloat16), ("3MB", torch.bfloat16), ("5GB", torch.float32)])
def test_the_files_are_those_of_a_quantized_model_that_is_saved(
    pipeline_folder: Path, tmp_path: Path, size: str, dtype: torch.dtype
) -> None:
    source, written = pipeline_folder / "transformer", tmp_path / "written"
    model = load_and_quantize(source, "paper-mixed", dtype=dtype, progress=False)
    save_quantized(model, tmp_path / "saved", max_shard_size=size)
    written.mkdir()
    plan = quantize_to(source, written, "paper-mixed", dtype=dtype, max_shard_size=size, progress=False)
    folders = written, tmp_path / "saved"
    ours, theirs = (
        {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()} for folder in folders
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert len({tuple(metadata(path).items()) for folder in folders for path in folder.glob("*.safetensors")}) == 1
    assert len({(folder / "config.json").read_text() for folder in folders}) == 1
    assert (written / INDEX).is_file() == (size == "3MB") == (not (written / WEIGHTS).is_file())
    assert plan.to_dict() == read_manifest(written).plan.to_dict()
    load_quantized(written)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(sorted(file.metadata().items()))


def test_a_weight_that_cannot_be_quantized_is_named(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder / "transformer", tmp_path / "broken"))
    state = load_file(folder / WEIGHTS)
    name = "single_transformer_blocks.1.attn.to_k"
    state[f"{name}.weight"][3, 5] = float("nan")
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"'{name}' cannot be quantized: .*row 3 of 512"):
        quantize_to(folder, tmp_path / "out", progress=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' count of anonymous memory")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Seven more blocks, 50 MB more in 4 bits: the same peak, to within a layer."""
    peaks = []
    # or malloc keeps freed tensors, as many as chance has it: a range of 50 MB between equal runs
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for blocks in (3, 10):
        model = FluxTransformer2DModel(
            num_layers=0, num_single_layers=blocks, num_attention_heads=8, joint_attention_dim=64
        ).to(torch.bfloat16)
        model.save_pretrained(tmp_path / f"{blocks}")
        del model
        command = [sys.executable, "-c", MEASURED, str(tmp_path / f"{blocks}"), str(tmp_path / f"out{blocks}"), "paper"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[0]))
    grown = sum(path.stat().st_size for path in (tmp_path / "out10").glob("*.safetensors"))
    assert peaks[1] - peaks[0] < 4 * 2**20 < grown / 12


def test_the_card_names_what_the_files_were_made_from_and_how_to_load_them(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "FLUX.1-dev-4bit"
    base = "black-forest-labs/FLUX.1-dev"
    (tmp_path / "source").mkdir()
    source = shutil.copytree(pipeline_folder, tmp_path / "source", dirs_exist_ok=True)
    (source / "README.md").write_text("of the base model")
    quantize_folder(open_folder(source), out, "paper", base_model=base, progress=False)  # type: ignore[arg-type]
    card = (out / "transformer" / "README.md").read_text()
    assert f"base_model: {base}\n" in card
    assert 'FluxTransformer2DModel.from_pretrained("FLUX.1-dev-4bit/transformer", dtype=torch.bfloat16)' in card
    assert "Merged into the weights" not in card
    assert (out / "README.md").read_text() == "of the base model"
