"""LoRA on quantized pipelines through diffusers: load, scale, several, fuse, unload, swap, compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels.testing import assert_equal, make_inputs
from convrot_quant import ConvLinear4bit, Scheme, dequantize_, quantize_, save_quantized
from convrot_quant.linear import Side

pytest.importorskip("peft")
Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
LAST = [f"single_transformer_blocks.{i}.proj_out" for i in range(2)]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "ff.net.2", *LAST]


@pytest.fixture(scope="module")
def folder(make_flux: Flux, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA files for tiny FLUX: one, two, and wide, which reaches a layer in 16 bits as well."""
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    path = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two", "wide")):
        model = make_flux()
        torch.manual_seed(seed)
        targets = [*TARGETS, *(["x_embedder"] if name == "wide" else [])]
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        layers = get_peft_model_state_dict(model)
        FluxPipeline.save_lora_weights(path, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    return path


@pytest.fixture
def pipe(make_flux: Flux) -> Any:
    """A FLUX pipeline of a quantized transformer and nothing else."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer = make_flux()
    quantize_(transformer, progress=False)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)


def test_loaded_scaled_switched_off_and_unloaded(pipe: Any, folder: Path, run: Run) -> None:
    plain = run(pipe.transformer)
    pipe.load_lora_weights(folder, weight_name="one.safetensors", adapter_name="one")
    with_one = run(pipe.transformer)
    assert not torch.equal(with_one, plain)
    pipe.load_lora_weights(folder, weight_name="wide.safetensors", adapter_name="two")
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert_equal(run(pipe.transformer), with_one)
    pipe.set_adapters(["one", "two"], [0.5, 1.0])
    both = run(pipe.transformer)
    assert not torch.equal(both, with_one)
    pipe.disable_lora()
    assert_equal(run(pipe.transformer), plain)
    pipe.enable_lora()
    assert_equal(run(pipe.transformer), both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert_equal(run(pipe.transformer), with_one)
    pipe.unload_lora_weights()
    assert_equal(run(pipe.transformer), plain)


def test_fused_and_unfused_to_the_last_bit(pipe: Any, folder: Path, run: Run) -> None:
    plain = run(pipe.transformer)
    codes = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(folder, weight_name="one.safetensors", adapter_name="one")
    active = run(pipe.transformer)
    pipe.fuse_lora(lora_scale=1.0)
    assert pipe.num_fused_loras == 1
    fused = run(pipe.transformer)
    assert_equal(fused, active)
    pipe.unfuse_lora()
    assert_equal(run(pipe.transformer), active)
    pipe.unload_lora_weights()
    assert_equal(run(pipe.transformer), plain)
    for name, tensor in pipe.transformer.state_dict().items():
        assert_equal(tensor, codes[name])


def test_a_fused_lora_stays_when_its_files_are_unloaded(pipe: Any, folder: Path, run: Run) -> None:
    pipe.load_lora_weights(folder, weight_name="one.safetensors", adapter_name="one")
    pipe.set_adapters("one", 0.7)
    active = run(pipe.transformer)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert type(layer) is ConvLinear4bit
    assert [side.scale for side in layer.sides()] == pytest.approx([0.7])
    assert_equal(run(pipe.transformer), active)
    with pytest.raises(ValueError, match=r"has a fused LoRA; unfuse_lora\(\) first"):
        save_quantized(pipe.transformer, folder / "model")
    twin = copy.deepcopy(pipe.transformer)
    assert_equal(run(twin), active)
    dequantize_(twin)  # the term goes into the 16-bit weight
    quantized_apart = dequantized_without_sides(pipe.transformer)
    assert not torch.equal(twin.transformer_blocks[0].attn.to_q.weight, quantized_apart)


def dequantized_without_sides(model: Any) -> Tensor:
    layer = copy.deepcopy(model.transformer_blocks[0].attn.to_q)
    for side in list(layer._side_scales):
        layer.remove_side(side)
    weight: Tensor = layer.dequantize().weight
    return weight


def test_an_adapter_that_is_no_low_rank_term_is_not_fused(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_bias=True, init_lora_weights=False))
    with pytest.raises(ValueError, match="fuse_lora: adapter 'default' is more than a low-rank term"):
        pipe.fuse_lora()
    assert not pipe.transformer.transformer_blocks[0].attn.to_q.merged


def test_hot_swap_reuses_the_compiled_blocks(pipe: Any, folder: Path, run: Run) -> None:
    torch._dynamo.reset()
    pipe.load_lora_weights(folder, weight_name="two.safetensors", adapter_name="default")
    expected = run(pipe.transformer)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder, weight_name="one.safetensors", adapter_name="default")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    run(pipe.transformer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_lora_weights(folder, weight_name="two.safetensors", adapter_name="default", hotswap=True)
        swapped = run(pipe.transformer)
    assert (swapped.float() - expected.float()).norm() < 0.3 * expected.float().norm()
    torch._dynamo.reset()


def test_group_offload_keeps_the_adapter(pipe: Any, folder: Path, run: Run) -> None:
    pipe.load_lora_weights(folder, weight_name="one.safetensors", adapter_name="one")
    expected = run(pipe.transformer)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    actual = run(pipe.transformer)
    # blocks with hooks run layer by layer, with more roundings
    assert (actual.float() - expected.float()).norm() < 0.3 * expected.float().norm()


def test_sd3_takes_a_lora_layer_by_layer(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict

    def make() -> Any:
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8, num_layers=1, attention_head_dim=64, num_attention_heads=8, joint_attention_dim=64,
            caption_projection_dim=512, pooled_projection_dim=64, in_channels=16, patch_size=2, pos_embed_max_size=8,
        ).bfloat16().eval()  # fmt: skip

    def forward(model: Any) -> Tensor:
        inputs = make_inputs(1, 16, 8, 8), make_inputs(1, 3, 64), make_inputs(1, 64), torch.tensor([500.0])
        with torch.no_grad():
            out: Tensor = model(*inputs, return_dict=False)[0]
        return out

    source, model = make(), make()
    source.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(source)
    quantize_(model, progress=False)
    plain = forward(model)
    model.load_lora_adapter(state, prefix=None)
    active = forward(model)
    assert not torch.equal(active, plain)
    model.fuse_lora()
    assert_equal(forward(model), active)
    model.unfuse_lora()
    model.unload_lora()
    assert_equal(forward(model), plain)


def test_a_side_is_a_low_rank_term_that_moves_with_the_layer() -> None:
    torch.manual_seed(0)
    layer = ConvLinear4bit.from_linear(nn.Linear(256, 64, dtype=torch.bfloat16), Scheme())
    x, before = make_inputs(5, 256), layer.state_dict()
    plain = layer(x)
    side = Side(torch.randn(4, 256).bfloat16(), torch.randn(64, 4).bfloat16(), 0.25)
    layer.add_side("style.v1", side)
    expected = plain.float() + 0.25 * (x.float() @ side.down.float().t() @ side.up.float().t())
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.3)
    assert list(layer.state_dict()) == list(before)
    assert layer.half().sides()[0].down.dtype == torch.float16
    with pytest.raises(ValueError, match=r"there is a side 'style\.v1' already"):
        layer.add_side("style.v1", side)
    layer.bfloat16().remove_side("style.v1")
    assert_equal(layer(x), plain)
