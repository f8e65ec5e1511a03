"""What diffusers asks of a quantization backend: the requirements of its QuantizationTesterMixin and
QuantizationCompileTesterMixin (tests/models/testing_utils/quantization.py), one test each, on tiny FLUX and SD3.

Only training is left out: is_trainable says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import ConvLinear4bit, ConvRotConfig


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64}
    sizes |= {"num_attention_heads": 8, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    return FluxTransformer2DModel(**sizes, axes_dims_rope=(16, 24, 24))


def flux_inputs() -> dict[str, Tensor]:
    values = {"hidden_states": (1, 4, 64), "encoder_hidden_states": (1, 6, 64), "pooled_projections": (1, 64)}
    inputs = {name: torch.randn(shape) for name, shape in values.items()}
    return inputs | {"timestep": torch.full((1,), 0.5), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(6, 3)}


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 16, "out_channels": 16, "num_layers": 2}
    sizes |= {"attention_head_dim": 64, "num_attention_heads": 8, "caption_projection_dim": 512}
    return SD3Transformer2DModel(**sizes, joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=8)


def sd3_inputs() -> dict[str, Tensor]:
    values = {"hidden_states": (1, 16, 4, 4), "encoder_hidden_states": (1, 6, 64), "pooled_projections": (1, 64)}
    return {name: torch.randn(shape) for name, shape in values.items()} | {"timestep": torch.full((1,), 500.0)}


@dataclass(frozen=True)
class Family:
    """A model class, random 16-bit weights of it on disk, and inputs."""

    folder: Path
    model_class: Any
    inputs: Callable[[], dict[str, Tensor]]
    device: str

    def load_16bit(self) -> Any:
        return self.model_class.from_pretrained(self.folder, torch_dtype=torch.bfloat16)

    def load(self, config: Any = "ours", **kwargs: Any) -> Any:
        options = kwargs.pop("options", {})
        quantization_config = ConvRotConfig(config, quantization_device=self.device, **options)
        kwargs = {"torch_dtype": torch.bfloat16} | kwargs
        return self.model_class.from_pretrained(self.folder, quantization_config=quantization_config, **kwargs)

    @torch.no_grad()
    def run(self, model: Any) -> Tensor:
        torch.manual_seed(0)
        dtype = model.dtype
        inputs = {
            name: value.to(self.device, torch.float32 if name.endswith("_ids") else dtype)
            for name, value in self.inputs().items()
        }
        out: Tensor = model(**inputs, return_dict=False)[0]
        assert torch.isfinite(out).all()
        return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    torch.manual_seed(5)
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, make in (("flux", flux), ("sd3", sd3)):
        model = make().to(torch.bfloat16)
        model.save_pretrained(root / name)  # type: ignore[operator]
        found[name] = (root / name, type(model))
    return found


@pytest.fixture(params=["flux", "sd3"])
def family(request: pytest.FixtureRequest, folders: dict[str, tuple[Path, Any]], device: str) -> Family:
    folder, model_class = folders[request.param]
    return Family(folder, model_class, {"flux": flux_inputs, "sd3": sd3_inputs}[request.param], device)


def quantized(model: nn.Module) -> dict[str, ConvLinear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)}


@pytest.mark.parametrize("preset", ["ours", "w8a8"])
def test_num_parameters_are_those_of_the_16_bit_model(family: Family, preset: str) -> None:
    model, original = family.load(preset), family.load_16bit()
    assert model.num_parameters() == original.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable


@pytest.mark.parametrize(("preset", "least"), [("ours", 2.5), ("w8a8", 1.5)])
def test_memory_footprint_shrinks_and_is_what_the_tensors_hold(family: Family, preset: str, least: float) -> None:
    model = family.load(preset)
    assert family.load_16bit().get_memory_footprint() / model.get_memory_footprint() >= least
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() == held


@pytest.mark.parametrize("preset", ["ours", "paper", "w4a8", "w4a16", "w8a8"])
def test_inference_is_finite_and_close_to_16_bits(family: Family, preset: str) -> None:
    model = family.load(preset).to(family.device)
    ours, theirs = family.run(model).float(), family.run(family.load_16bit().to(family.device)).float()
    assert (ours - theirs).norm() / theirs.norm() < {"w4a8": 0.3, "w4a16": 0.3, "w8a8": 0.05}.get(preset, 0.5)


def test_casting_is_refused_and_moving_is_not(family: Family) -> None:
    model = family.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.float16)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(device=family.device, dtype=torch.float16)
    with pytest.raises(ValueError, match="float"):
        model.float()
    with pytest.raises(ValueError, match="half"):
        model.half()
    model.to(family.device)
    after = model.state_dict()
    assert all(torch.equal(value, after[name].cpu()) for name, value in before.items())


def test_lora_by_add_adapter_adds_to_the_output(family: Family) -> None:
    from peft import LoraConfig

    model = family.load()
    without = family.run(model.to(family.device))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    model.to(family.device)
    assert not torch.equal(family.run(model), without)
    model.disable_adapters()
    assert torch.equal(family.run(model), without)


@pytest.mark.parametrize("shard_size", ["10GB", "400KB"])
def test_saving_and_loading_is_bit_equal(family: Family, shard_size: str, tmp_path: Path) -> None:
    model = family.load("paper-mixed")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "400KB")
    loaded = family.model_class.from_pretrained(tmp_path)
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name
    assert {layer.weight_scale.dtype for layer in quantized(loaded).values()} == {torch.float32}
    assert torch.equal(family.run(model.to(family.device)), family.run(loaded.to(family.device)))


def test_config_is_serializable_and_says_how(family: Family) -> None:
    config = family.load("w4a8").config["quantization_config"]
    assert config.to_dict()["config"] == config.to_diff_dict()["config"] == "w4a8"
    assert '"quant_method": "convrot"' in config.to_json_string()
    assert ConvRotConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_original_dtype_is_kept_and_used(family: Family, dtype: torch.dtype) -> None:
    model = family.load(torch_dtype=dtype)
    assert model.config["_pre_quantization_dtype"] == dtype
    assert {layer.compute_dtype for layer in quantized(model).values()} == {dtype}
    assert family.run(model.to(family.device)).dtype == dtype


def test_every_block_linear_is_quantized_and_nothing_else(family: Family) -> None:
    model = family.load()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, ConvLinear4bit) == ("blocks." in name), name
            assert module.weight.dtype == (torch.uint8 if "blocks." in name else torch.bfloat16), name


def test_modules_to_not_convert_stay_in_16_bits(family: Family) -> None:
    model = family.load(options={"modules_to_not_convert": ["to_k", "*.ff.net.2", "norm1.linear"]})
    kept = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in quantized(model)]
    expected = ("to_k", ".ff.net.2", "norm1.linear")
    assert {end for end in expected for name in kept if name.endswith(end)} == set(expected)
    assert not any(name.endswith(expected) for name in quantized(model))
    assert model.get_memory_footprint() > family.load().get_memory_footprint()
    family.run(model.to(family.device))


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu"])
def test_device_map(family: Family, device_map: str) -> None:
    model = family.load(device_map=device_map)
    assert model.hf_device_map
    if device_map == "cpu":
        assert model.device == torch.device("cpu")
        model.to(family.device)
    plain = family.load().to(family.device)
    assert torch.equal(family.run(model), family.run(plain))


def test_dequantize_gives_a_plain_model(family: Family, tmp_path: Path) -> None:
    model = family.load().to(family.device)
    before = family.run(model).float()
    model.dequantize()
    assert type(model) is family.model_class
    assert not quantized(model)
    after = family.run(model).float()
    assert (before - after).norm() / after.norm() < 0.5  # activations are in 16 bits now
    model.to(torch.float16)
    model.save_pretrained(tmp_path)
    family.run(family.model_class.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).to(family.device))


def test_is_compileable_serializable_and_not_trainable(family: Family) -> None:
    quantizer = family.load().hf_quantizer
    assert (quantizer.is_compileable, quantizer.is_serializable, quantizer.is_trainable) == (True, True, False)


def backend_of(device: str) -> str:
    return "inductor" if device == "cuda" else "aot_eager"  # inductor needs a C++ compiler on the CPU


def test_compiles_as_one_graph_without_recompiling(family: Family) -> None:
    model = family.load().to(family.device)
    expected = family.run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend_of(family.device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        first, second = family.run(compiled), family.run(compiled)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("use_stream", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_compiles_with_group_offload(family: Family, use_stream: bool) -> None:
    if use_stream and family.device == "cpu":
        pytest.skip("streams are a GPU's")
    expected = family.run(family.load().to(family.device))
    model = family.load()
    model.enable_group_offload(
        torch.device(family.device), torch.device("cpu"), offload_type="leaf_level", use_stream=use_stream
    )
    torch._dynamo.reset()
    model.compile(backend=backend_of(family.device))
    torch.testing.assert_close(family.run(model), expected, rtol=0.1, atol=0.1)
