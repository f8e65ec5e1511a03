"""A FLUX pipeline that was quantized on load, on a GPU: offloading, compiling, LoRA, and these together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import ConvLinear4bit, ConvRotConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CLOSE = 0.1  # relative L2 of latents: blocks with hooks run layer by layer, compiled ones round elsewhere
GROUPS: dict[str, dict[str, Any]] = {
    "leaf": {"offload_type": "leaf_level"},
    "leaf, streams": {"offload_type": "leaf_level", "use_stream": True},
    "leaf, recorded streams": {"offload_type": "leaf_level", "use_stream": True, "record_stream": True},
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "block, streams": {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipe(pipeline_folder: Path) -> Any:
    from diffusers import FluxPipeline
    from diffusers.quantizers import PipelineQuantizationConfig

    mapping = {"transformer": ConvRotConfig(quantization_device="cuda")}
    found = FluxPipeline.from_pretrained(
        pipeline_folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping), dtype=torch.bfloat16
    )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def lora(make_flux: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.safetensors and two.safetensors of the same layers and rank."""
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two")):
        model: Any = make_flux()
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "ff.net.2"]
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        layers = {
            key: value * (16 if "lora_B" in key else 1) for key, value in get_peft_model_state_dict(model).items()
        }
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    return folder


def draw(pipe: Any, prompt: str = "a red cube", size: int = 32) -> Tensor:
    options = {"height": size, "width": size, "num_inference_steps": 2, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipe(prompt, generator=generator, output_type="latent", **options).images
    assert torch.isfinite(latents).all()
    return latents.float().cpu()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def codes(pipe: Any) -> list[ConvLinear4bit]:
    return [module for module in pipe.transformer.modules() if isinstance(module, ConvLinear4bit)]


def test_quantized_on_load_it_runs_and_survives_saving_bit_for_bit(pipe: Any, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    pipe.to("cuda")
    drawn = draw(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    again = FluxPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), drawn)


def test_model_cpu_offload_changes_nothing_and_frees_the_gpu(pipe: Any) -> None:
    pipe.to("cuda")
    expected = draw(pipe)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
        pipe.maybe_free_model_hooks()
        assert {layer.weight.device.type for layer in codes(pipe)} == {"cpu"}


def test_sequential_cpu_offload_takes_every_code_away(pipe: Any) -> None:
    pipe.to("cuda")
    expected = draw(pipe)
    pipe.to("cpu")
    pipe.enable_sequential_cpu_offload()
    for _ in range(2):
        assert apart(draw(pipe), expected) < CLOSE
        assert all(layer.weight.is_meta for layer in codes(pipe))


@pytest.mark.parametrize("kind", list(GROUPS))
def test_group_offload(pipe: Any, kind: str) -> None:
    pipe.to("cuda")
    expected = draw(pipe)
    pipe.to("cpu")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).to("cuda")
    pipe.transformer.enable_group_offload(CUDA, CPU, **GROUPS[kind])
    for _ in range(2):
        assert apart(draw(pipe), expected) < CLOSE
    if "streams" not in kind:
        assert {layer.weight.device.type for layer in codes(pipe)} == {"cpu"}


def test_group_offload_to_disk(pipe: Any, tmp_path: Path) -> None:
    pipe.to("cuda")
    expected = draw(pipe)
    pipe.to("cpu")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).to("cuda")
    pipe.transformer.enable_group_offload(CUDA, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert list(tmp_path.rglob("*.safetensors"))
    for _ in range(2):
        assert apart(draw(pipe), expected) < CLOSE


def test_compiled_blocks_serve_every_prompt_and_compile_again_only_for_a_size(pipe: Any) -> None:
    pipe.to("cuda")
    expected = [draw(pipe, prompt) for prompt in ("a red cube", "a blue sphere")]
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert apart(draw(pipe), expected[0]) < CLOSE
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert apart(draw(pipe, "a blue sphere"), expected[1]) < CLOSE
    draw(pipe, size=64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(pipe, "a blue sphere", size=64)
        draw(pipe)


def load(pipe: Any, folder: Path, name: str, **options: Any) -> None:
    pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name="style", **options)


@pytest.mark.parametrize("offload", ["none", "model", "leaf, streams"])
def test_a_lora_with_compiled_blocks_and_offloading(pipe: Any, lora: Path, offload: str) -> None:
    pipe.to("cuda")
    without = draw(pipe)
    load(pipe, lora, "one")
    expected = draw(pipe)
    assert apart(expected, without) > 2 * CLOSE
    if offload != "none":
        pipe.to("cpu")
    if offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload != "none":
        for name in ("vae", "text_encoder", "text_encoder_2"):
            getattr(pipe, name).to("cuda")
        pipe.transformer.enable_group_offload(CUDA, CPU, **GROUPS[offload])
    pipe.transformer.compile_repeated_blocks(fullgraph=offload == "none")  # hooks that move weights break graphs
    for _ in range(2):
        assert apart(draw(pipe), expected) < CLOSE


def test_a_lora_is_swapped_into_compiled_blocks_without_compiling_again(pipe: Any, lora: Path) -> None:
    pipe.to("cuda")
    load(pipe, lora, "two")
    expected = draw(pipe)
    pipe.unload_lora_weights()
    load(pipe, lora, "one")
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    first = draw(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        load(pipe, lora, "two", hotswap=True)
        swapped = draw(pipe)
    assert apart(swapped, expected) < CLOSE < apart(first, expected)


def test_a_lora_fuses_and_unfuses_to_the_last_bit(pipe: Any, lora: Path) -> None:
    pipe.to("cuda")
    plain = draw(pipe)
    load(pipe, lora, "one")
    active = draw(pipe)
    pipe.fuse_lora()
    assert torch.equal(draw(pipe), active)
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe), active)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
