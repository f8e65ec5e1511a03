"""Folders of pipelines: found, quantized whole, loaded; images that depend on the seed alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from torch import nn

from convrot_quant import CheckpointError, ConvLinear4bit, QuantConfig, plan, quantize_
from convrot_quant.generation import Settings, call_arguments, generate, image_size, text_length
from convrot_quant.manifest import is_quantized, read_manifest
from convrot_quant.pipeline import load_pipeline, load_transformer, meta_transformer, open_folder, quantize_folder

FAST = Settings(steps=2)


@pytest.fixture(scope="module")
def quantized_folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "pipeline"
    quantize_folder(open_folder(pipeline_folder), out, QuantConfig.preset("ours"), progress=False)
    return out


def pixels(pictures: list) -> list[bytes]:
    return [numpy.array(picture.image).tobytes() for picture in pictures]


def test_quantized_pipeline_has_every_other_component_unchanged(pipeline_folder: Path, quantized_folder: Path) -> None:
    names = {str(path.relative_to(pipeline_folder)) for path in pipeline_folder.rglob("*") if path.is_file()}
    found = {str(path.relative_to(quantized_folder)) for path in quantized_folder.rglob("*") if path.is_file()}
    assert found == names | {"transformer/README.md"}  # the model card
    for name in names:
        if not name.startswith("transformer/"):  # the rest of the pipeline, model_index.json included
            assert (quantized_folder / name).read_bytes() == (pipeline_folder / name).read_bytes()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (quantized_folder / weights).stat().st_size < (pipeline_folder / weights).stat().st_size / 3


def test_quantized_pipeline_draws_what_quantizing_in_memory_draws(
    pipeline_folder: Path, quantized_folder: Path, prompts: tuple[str, ...]
) -> None:
    stored = load_pipeline(open_folder(quantized_folder))
    memory = load_pipeline(open_folder(pipeline_folder))
    quantize_(memory.transformer, "ours", progress=False)
    assert pixels(generate(stored, prompts, FAST, progress=False)) == pixels(
        generate(memory, prompts, FAST, progress=False)
    )


def test_a_picture_depends_on_prompt_and_seed_alone(pipeline_folder: Path, prompts: tuple[str, ...]) -> None:
    pipe = load_pipeline(open_folder(pipeline_folder))
    first = generate(pipe, prompts, Settings(steps=2, seed=5, num_images=2), progress=False)
    assert [(picture.prompt, picture.seed) for picture in first] == [
        (prompts[0], 5),
        (prompts[0], 6),
        (prompts[1], 7),
        (prompts[1], 8),
    ]
    assert len(set(pixels(first))) == 4
    assert all(picture.seconds > 0 for picture in first)
    torch.manual_seed(99)
    again = generate(pipe, prompts[1:], Settings(steps=2, seed=8), progress=False)
    assert pixels(again) == pixels(first[3:])


def test_a_bare_transformer_folder_gives_a_bare_one(pipeline_folder: Path, tmp_path: Path) -> None:
    plans = quantize_folder(open_folder(pipeline_folder / "transformer"), tmp_path / "out", plan_of(pipeline_folder))
    assert list(plans) == ["transformer"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    model = load_transformer(tmp_path / "out")
    assert sum(isinstance(module, ConvLinear4bit) for module in model.modules()) == len(plans["transformer"])


def plan_of(folder: Path) -> QuantConfig:
    return plan(meta_transformer(folder / "transformer"), "w4a8").config


def test_a_plan_made_on_meta_quantizes_the_folder(pipeline_folder: Path, tmp_path: Path) -> None:
    decided = plan(meta_transformer(pipeline_folder / "transformer"), "paper")
    del decided["transformer_blocks.0.attn.to_q"]
    quantize_folder(open_folder(pipeline_folder), tmp_path / "out", decided, progress=False)
    model = load_transformer(tmp_path / "out" / "transformer")
    names = [name for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)]
    assert set(names) == set(decided)
    assert model.convrot_plan.reasons["transformer_blocks.0.attn.to_q"] == "taken out by hand"


def test_refuses_destinations_that_hold_the_source(pipeline_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pipeline_folder, tmp_path / "model"))
    config = QuantConfig.preset("ours")
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(ValueError, match="must lie outside of the model's own folder"):
            quantize_folder(open_folder(source), target, config, overwrite=True)
    with pytest.raises(ValueError, match="nothing to quantize: every linear stays in 16 bits"):
        quantize_folder(open_folder(source), tmp_path / "out", QuantConfig(keep=("*",)), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_refuses_to_quantize_twice_and_to_generate_without_a_pipeline(quantized_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is already quantized; start from the 16-bit folder"):
        quantize_folder(open_folder(quantized_folder), tmp_path / "out", QuantConfig())
    with pytest.raises(CheckpointError, match="a bare transformer cannot generate; give a pipeline folder"):
        load_pipeline(open_folder(quantized_folder / "transformer"))


def test_a_quantized_model_that_save_pretrained_wrote_is_refused(
    make_flux: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = make_flux(1, 1)
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path)
    assert is_quantized(tmp_path)
    with pytest.raises(CheckpointError, match=r"written by save_pretrained\(\), .* write it with save_quantized"):
        load_transformer(tmp_path)


def test_open_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder$"):
        open_folder(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="someone/model: no such folder, and the hub did not give it: "):
        open_folder("someone/model")
    with pytest.raises(CheckpointError, match=r"neither model_index.json nor config.json"):
        open_folder(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="a pipeline without a transformer folder"):
        open_folder(tmp_path)


def test_a_hub_id_fetches_what_is_needed_and_no_more(
    pipeline_folder: Path, quantized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"some/model": pipeline_folder, "some/model-4bit": quantized_folder}

    def snapshot_download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [str(path.relative_to(hub[repo])) for path in hub[repo].rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            target = tmp_path / repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub[repo] / name, target)
        return str(tmp_path / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    looked = open_folder("some/model", weights=False)
    assert not looked.is_quantized
    assert not list(looked.root.rglob("*.safetensors"))
    looked = open_folder("some/model-4bit", weights=False)
    assert looked.is_quantized
    assert [path.parent.name for path in looked.root.rglob("*.safetensors")] == ["transformer"]
    assert read_manifest(looked.transformers["transformer"]).plan
    whole = open_folder("some/model-4bit")
    assert generate(load_pipeline(whole), ["a red cube"], FAST, progress=False)


def test_defaults_come_from_the_pipeline(pipeline_folder: Path) -> None:
    pipe = load_pipeline(open_folder(pipeline_folder))
    assert image_size(pipe) == 32  # the VAE's
    assert text_length(pipe) == 16  # the tokenizer's, below the pipeline's 512
    expected = {"num_inference_steps": 20, "guidance_scale": 3.5, "height": 32, "width": 32, "max_sequence_length": 16}
    assert call_arguments(pipe, Settings()) == expected
    chosen = Settings(steps=3, guidance=1.0, height=64, width=48, max_sequence_length=8)
    assert call_arguments(pipe, chosen) == {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "height": 64,
        "width": 48,
        "max_sequence_length": 8,
    }
    picture = generate(pipe, ["a red cube"], Settings(steps=1, height=64, width=48), progress=False)[0]
    assert picture.image.size == (48, 64)


def test_an_option_that_the_pipeline_lacks_is_refused() -> None:
    class Plain:
        def __call__(self, prompt: str, num_inference_steps: int = 5, callback_on_step_end: object = None) -> None:
            """A pipeline without sizes or guidance."""

    assert call_arguments(Plain(), Settings()) == {"num_inference_steps": 20}
    with pytest.raises(ValueError, match="Plain has no option guidance_scale; leave it out or use another pipeline"):
        call_arguments(Plain(), Settings(guidance=2.0))
