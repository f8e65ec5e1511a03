"""A FLUX transformer that was quantized on load, with what diffusers, accelerate and peft do to models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import ConvLinear4bit, ConvRotConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(make_flux: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    make_flux(2, 2).save_pretrained(path)  # type: ignore[operator]
    return path


def quantized_on_load(folder: Path) -> Any:
    from diffusers import FluxTransformer2DModel

    config = ConvRotConfig(quantization_device="cpu")
    return FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    quantized_on_load(folder).save_pretrained(path)
    return path


@pytest.fixture
def model(quantized: Path) -> Any:
    """A quantized transformer as users have it; read from files, which is faster than quantizing for every test."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(quantized, torch_dtype=torch.bfloat16)


def test_layerwise_casting_is_refused_and_changes_nothing(model: Any, run: Callable[..., Tensor]) -> None:
    before = run(model)
    with pytest.raises(ValueError, match=r"enable_layerwise_casting: .* would round scales and biases"):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.equal(run(model), before)


def test_a_copy_and_a_pickle_are_whole_and_independent(model: Any, run: Callable[..., Tensor]) -> None:
    expected, count = run(model), model.num_parameters()
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.dequantize()
    for again in copies:
        assert torch.equal(run(again), expected)
        assert again.num_parameters() == count
        with pytest.raises(ValueError, match="Casting a quantized model"):
            again.to(torch.float16)


def test_the_class_looks_like_the_models_own(model: Any) -> None:
    import inspect

    from diffusers import FluxTransformer2DModel

    assert isinstance(model, FluxTransformer2DModel)
    own, ours = FluxTransformer2DModel, type(model)
    assert (own.__name__, own.__module__, own.__qualname__) == (ours.__name__, ours.__module__, ours.__qualname__)
    assert inspect.signature(model.save_pretrained) == inspect.signature(own.save_pretrained.__get__(model))


def test_memory_of_a_deleted_model_is_freed_at_once(folder: Path) -> None:
    import gc
    import weakref

    from diffusers import FluxTransformer2DModel

    gc.collect()
    gc.disable()
    try:
        config = ConvRotConfig(quantization_device="cpu")
        model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
        gone = weakref.ref(model.transformer_blocks[0].attn.to_q.weight)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_repeated_blocks_compile_as_one_graph(model: Any, run: Callable[..., Tensor]) -> None:
    expected = run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "disk"])
def test_group_offload(model: Any, run: Callable[..., Tensor], kind: str, tmp_path: Path) -> None:
    expected = run(model)
    options: dict[str, Any] = {"offload_type": kind}
    if kind == "block_level":
        options["num_blocks_per_group"] = 1
    if kind == "disk":
        options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    model.enable_group_offload(CPU, CPU, **options)
    for _ in range(2):
        torch.testing.assert_close(run(model), expected, rtol=0.1, atol=0.1)  # hooked blocks run unfused
    if kind == "disk":
        assert list(tmp_path.rglob("*.safetensors"))


def test_accelerate_cpu_offload_takes_codes_away(model: Any, run: Callable[..., Tensor], tmp_path: Path) -> None:
    from accelerate import cpu_offload

    expected = run(model)
    cpu_offload(model, CPU)
    layers = [module for module in model.modules() if isinstance(module, ConvLinear4bit)]
    assert all(layer.weight.is_meta for layer in layers)
    torch.testing.assert_close(run(model), expected, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="is offloaded and has no values here; save before offloading"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ["FirstBlockCacheConfig", "TaylorSeerCacheConfig"])
def test_caching(model: Any, run: Callable[..., Tensor], name: str) -> None:
    import diffusers

    expected = run(model)
    model.enable_cache(getattr(diffusers, name)())
    with model.cache_context("cond"):
        torch.testing.assert_close(run(model), expected, rtol=0.1, atol=0.1)
    model.disable_cache()
    torch.testing.assert_close(run(model), expected, rtol=0.1, atol=0.1)  # a forward stays behind, which unfuses blocks


def test_pipeline_quant_mapping_and_its_round_trip(pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from diffusers.quantizers import PipelineQuantizationConfig

    mapping = {"transformer": ConvRotConfig("paper-mixed", quantization_device="cpu")}
    pipe = FluxPipeline.from_pretrained(
        pipeline_folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping), dtype=torch.bfloat16
    )
    pipe.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    again = FluxPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    images = [generate(found) for found in (pipe, again)]
    assert torch.equal(*images)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.to(dtype=torch.float16)
    pipe.to("cpu")


def generate(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt"}
    image: Tensor = pipe("a red cube", generator=torch.Generator().manual_seed(0), **options).images
    return image


def test_unknown_backends_and_components_are_named(pipeline_folder: Path) -> None:
    from diffusers.quantizers import PipelineQuantizationConfig

    with pytest.raises(ValueError, match=r"quant_backend=conv-rot was not found.*\n.*'convrot'"):
        PipelineQuantizationConfig(quant_backend="conv-rot", quant_kwargs={"config": "ours"})
    PipelineQuantizationConfig(quant_backend="convrot", quant_kwargs={"config": "ours"})


def test_lora_layers_are_not_saved_into_the_model(model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="is a LoRA layer; unload the LoRA first"):
        model.save_pretrained(tmp_path)


def test_model_card_says_what_and_how(model: Any, folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "README.md"
    card = path.read_text()
    assert "library_name: diffusers" in card
    assert "- W4A4\n" in card
    assert f"Made from `{folder.name}`" in card
    assert "base_model:" not in card  # a local folder is none of the hub's
    assert str(folder) not in card
    assert 'FluxTransformer2DModel.from_pretrained("model", dtype=torch.bfloat16)' in card
    assert "| transformer_blocks.{0-1}.attn.to_q | 2 | 512 x 512 |" in card
    assert "| norm_out.linear | 1 | 1024 x 512 | 1.00 MiB | 1.00 MiB | 16-bit: output layer |" in card
    for text in ("my own words", "gr\u00fcn"):
        path.write_text(text, encoding="latin-1")  # the second is no UTF-8
        model.save_pretrained(tmp_path / "model")
        assert path.read_text(encoding="latin-1") == text


def test_model_card_names_the_base_model_through_several_saves(folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    model = quantized_on_load(folder)
    model.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    model.save_pretrained(tmp_path / "first")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        card = (tmp_path / name / "README.md").read_text()
        assert "base_model: black-forest-labs/FLUX.1-dev\n" in card
        assert "base_model_relation: quantized\n" in card
