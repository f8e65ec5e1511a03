"""State dicts of the official ConvRot code, as formats.md describes them, saved as safetensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convrot_quant import CheckpointError, QuantConfig, Scheme, load_quantized, quantize_
from convrot_quant.convert import convert, read_quantized
from convrot_quant.linear import ConvLinear4bit


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """What the official modules would hold for a model of ours: packed codes U8, scales F16 (N, 1) twice."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    for name, layer in model.named_modules():
        if isinstance(layer, ConvLinear4bit):
            scale = state.pop(f"{name}.weight_scale").reshape(-1, 1)
            state |= {f"{name}.weight_scales": scale, f"{name}.scale": scale.clone()}
    return state


@pytest.fixture(scope="module")
def model(make_flux: Callable[..., nn.Module]) -> nn.Module:
    made = make_flux(1, 1, dtype=torch.float16)
    quantize_(made, QuantConfig(Scheme(4, 4, 64)), progress=False)
    return made


def test_codes_stay_and_scales_widen(
    model: nn.Module, run: Callable[..., Tensor], make_flux: Callable[..., nn.Module], tmp_path: Path
) -> None:
    state = official_state(model)
    save_file(state, tmp_path / "official.safetensors")
    config: dict[str, Any] = dict(make_flux(1, 1).config) | {"_class_name": "FluxTransformer2DModel"}
    convert(tmp_path / "official.safetensors", tmp_path / "ours", to="diffusers", config=config, group_size=64)
    loaded = load_quantized(tmp_path / "ours")
    for name, layer in loaded.named_modules():
        if isinstance(layer, ConvLinear4bit):
            assert layer.scheme == Scheme(4, 4, 64)
            assert torch.equal(layer.weight, state[f"{name}.weight"])
            assert torch.equal(layer.weight_scale, state[f"{name}.weight_scales"].float().reshape(-1))
    for layer in model.modules():  # the same model with scales that a half can hold
        if isinstance(layer, ConvLinear4bit):
            layer.weight_scale = layer.weight_scale.half().float()
    assert torch.equal(run(loaded), run(model))


def one_layer(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {"weight": torch.zeros(16, 128, dtype=torch.uint8), "bias": torch.ones(16).half()}
    state |= {"weight_scales": torch.ones(16, 1).half(), "scale": torch.ones(16, 1).half()}
    return {f"a.{name}": tensor for name, tensor in (state | changes).items() if tensor is not None}


@pytest.mark.parametrize("only", ["weight_scales", "scale"])
def test_one_of_the_two_scales_is_enough(tmp_path: Path, only: str) -> None:
    other = "scale" if only == "weight_scales" else "weight_scales"
    save_file(one_layer(**{other: None}), tmp_path / "x.safetensors")
    contents = read_quantized(tmp_path / "x.safetensors")
    assert sorted(contents.tensors) == ["a.bias", "a.weight", "a.weight_scale"]
    assert contents.schemes == {"a": Scheme(4, 4, 256)}


@pytest.mark.parametrize(
    ("changes", "group_size", "message"),
    [
        ({"scale": torch.full((16, 1), 2.0).half()}, 256, "'a' has two scales that differ"),
        ({"scale": None, "weight_scales": torch.ones(8, 1).half()}, 256, r"must be F16 \(16, 1\), got F16 \(8, 1\)"),
        ({"scale": None, "weight_scales": torch.ones(16, 1).int()}, 256, r"must be F16 \(16, 1\), got I32"),
        ({}, 1024, "not packed codes .* a multiple of the rotation's 1024; give the right --group-size"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], group_size: int, message: str
) -> None:
    save_file(one_layer(**changes), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_quantized(tmp_path / "x.safetensors", group_size=group_size)
