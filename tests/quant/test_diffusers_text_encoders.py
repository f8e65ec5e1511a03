"""T5, CLIP and Qwen text encoders through transformers' own from_pretrained with the same ConvRotConfig."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import CheckpointError, ConvLinear4bit, ConvRotConfig, plan, quantize_

IDS = torch.arange(12).reshape(2, 6) % 60 + 3


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 8, "vocab_size": 64}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=64, max_position_embeddings=32, eos_token_id=2))


def qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    tied = {"num_key_value_heads": 4, "vocab_size": 64, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **tied))


MAKERS: dict[str, Callable[[], Any]] = {"t5": t5, "clip": clip, "qwen": qwen}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(7)
    root = tmp_path_factory.mktemp("encoders")
    for name, make in MAKERS.items():
        make().to(torch.bfloat16).save_pretrained(root / name)
    return {name: root / name for name in MAKERS}


@pytest.fixture(params=list(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def run(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS)[0]
    assert torch.isfinite(out).all()
    return out


def class_of(kind: str) -> Any:
    return type(MAKERS[kind]())


def load(kind: str, folder: Path, config: Any = None, **kwargs: Any) -> Any:
    quantization_config = ConvRotConfig(config, quantization_device="cpu")
    kwargs = {"dtype": torch.bfloat16} | kwargs
    return class_of(kind).from_pretrained(folder, quantization_config=quantization_config, **kwargs)


def layers(model: nn.Module) -> dict[str, ConvLinear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)}


def test_quantizes_on_load_as_quantize_does(kind: str, folders: dict[str, Path]) -> None:
    model, expected = load(kind, folders[kind]), class_of(kind).from_pretrained(folders[kind], dtype=torch.bfloat16)
    sixteen = run(expected).float()
    decided = quantize_(expected, "text-encoder", progress=False)
    assert layers(model).keys() == decided.keys()
    assert {scheme.name for scheme in decided.values()} == {"W8A8"}
    state, again = expected.state_dict(), model.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert torch.equal(run(model), run(expected))
    assert (run(model).float() - sixteen).norm() / sixteen.norm() < 0.05


@pytest.mark.parametrize("shard_size", ["50GB", "500KB"])
@pytest.mark.parametrize("preset", ["text-encoder", "w4a8", "w4a8-r8"])
def test_saving_and_loading_is_bit_equal(
    kind: str, folders: dict[str, Path], preset: str, shard_size: str, tmp_path: Path
) -> None:
    model = load(kind, folders[kind], preset)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "convrot"
    assert "quantized by ConvRot" in (tmp_path / "README.md").read_text()
    loaded = class_of(kind).from_pretrained(tmp_path)
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name
    assert torch.equal(run(loaded), run(model))
    assert loaded.num_parameters() == model.num_parameters() == MAKERS[kind]().num_parameters()


def test_the_loaded_dtype_is_the_saved_one_or_the_one_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    load("t5", folders["t5"]).save_pretrained(tmp_path)
    for asked, got in ((None, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        loaded = class_of("t5").from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
        assert {layer.compute_dtype for layer in layers(loaded).values()} == {got}
        assert {layer.weight_scale.dtype for layer in layers(loaded).values()} == {torch.float32}
        assert run(loaded).dtype == got


def test_t5_never_gets_packed_codes_where_it_reads_their_dtype(folders: dict[str, Path]) -> None:
    model = load("t5", folders["t5"], "w4a16")
    for name, layer in layers(model).items():
        assert layer.scheme.name == ("W8A16" if name.endswith(".wo") else "W4A16"), name
    original = class_of("t5").from_pretrained(folders["t5"], dtype=torch.bfloat16)
    assert (run(model).float() - run(original).float()).norm() / run(original).float().norm() < 0.3
    assert plan(original, "ours")["encoder.block.1.layer.1.DenseReluDense.wo"].name == "W8A8"


def test_t5_in_fp16_keeps_wo_in_fp32(folders: dict[str, Path]) -> None:
    model = load("t5", folders["t5"], dtype=torch.float16)
    assert not any(name.endswith(".wo") for name in layers(model))
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_embeddings_and_heads_stay_in_16_bits(kind: str, folders: dict[str, Path]) -> None:
    model = load(kind, folders[kind], "paper")
    names = [name for name, module in model.named_modules() if type(module) in (nn.Embedding, nn.Linear)]
    assert names
    assert all(type(model.get_submodule(name)) is nn.Embedding or name == "lm_head" for name in names)
    assert load(kind, folders[kind], "paper").get_memory_footprint() < model.num_parameters() * 2


def test_dequantizes_to_a_plain_model(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(kind, folders[kind])
    before = run(model).float()
    model.dequantize()
    assert type(model) is class_of(kind)
    assert not layers(model)
    assert (run(model).float() - before).norm() / before.norm() < 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(run(class_of(kind).from_pretrained(tmp_path, dtype=torch.bfloat16)), run(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(folders: dict[str, Path], device_map: str) -> None:
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("inputs are on the CPU")
    assert torch.equal(run(load("t5", folders["t5"], device_map=device_map)), run(load("t5", folders["t5"])))


def test_a_copy_is_independent(folders: dict[str, Path]) -> None:
    model = load("clip", folders["clip"])
    again = copy.deepcopy(model)
    model.dequantize()
    assert layers(again)
    assert again.num_parameters() == clip().num_parameters()


def test_a_folder_without_a_scale_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    load("t5", folders["t5"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        header = file.metadata()
    del state["encoder.block.0.layer.0.SelfAttention.q.weight_scale"]
    save_file(state, path, header)
    with pytest.raises(CheckpointError, match=r"the files lack 'encoder\.block\.0\.layer\.0\.SelfAttention\.q"):
        class_of("t5").from_pretrained(tmp_path)


def test_a_component_of_a_pipeline(pipeline_folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from diffusers.quantizers import PipelineQuantizationConfig

    encoder = load("t5", folders["t5"])
    pipe = FluxPipeline.from_pretrained(pipeline_folder, text_encoder_2=encoder, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "pipe")
    mapping = {"transformer": ConvRotConfig()}
    again = FluxPipeline.from_pretrained(
        tmp_path / "pipe", quantization_config=PipelineQuantizationConfig(quant_mapping=mapping), dtype=torch.bfloat16
    )
    assert layers(again.text_encoder_2).keys() == layers(encoder).keys()
    assert torch.equal(run(again.text_encoder_2), run(encoder))
    assert layers(again.transformer)


def test_one_backend_for_every_component(pipeline_folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from diffusers.quantizers import PipelineQuantizationConfig

    encoder = class_of("t5").from_pretrained(folders["t5"], dtype=torch.bfloat16)
    pipe = FluxPipeline.from_pretrained(pipeline_folder, text_encoder_2=encoder, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend="convrot",
        quant_kwargs={"quantization_device": "cpu"},
        components_to_quantize=["transformer", "text_encoder_2"],
    )
    pipe = FluxPipeline.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert {layer.scheme.name for layer in layers(pipe.text_encoder_2).values()} == {"W8A8"}
    assert {layer.scheme.name for layer in layers(pipe.transformer).values()} == {"W4A4", "W4A16"}
