"""FLUX.1's names and fused layers: the same rows as diffusers' own converter moves, and back again."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from convrot_quant import CheckpointError
from convrot_quant.contents import Contents
from convrot_quant.keys import flux_config, is_original, to_diffusers, to_original
from convrot_quant.tensorfile import in_memory

CONFIG = {"_class_name": "FluxTransformer2DModel"}


def contents(state: Mapping[str, Tensor], config: dict[str, Any] | None = CONFIG) -> Contents:
    return Contents(Path("x"), {}, {name: in_memory(tensor) for name, tensor in state.items()}, config)


def thin(model: nn.Module) -> dict[str, Tensor]:
    """A real-sized model's state with one column a weight, so that all rows are there and few bytes."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {n: torch.randn(s[0], 1) if len(s) == 2 else torch.randn(s) for n, s in shapes.items()}


@pytest.mark.parametrize("guidance", [True, False])
def test_the_way_there_is_undone_by_diffusers_own_converter(guidance: bool) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=guidance)
    state = thin(model)
    original = to_original(contents(state))
    assert is_original(original.tensors)
    assert not is_original(state)
    back = convert_flux_transformer_checkpoint_to_diffusers({n: t.value() for n, t in original.tensors.items()})
    assert back.keys() == state.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name
    ours = to_diffusers(original)
    for name, stored in ours.tensors.items():
        assert torch.equal(stored.value(), state[name]), name
    again = to_original(ours)  # tensors of several parts are cut as well
    for name, stored in again.tensors.items():
        assert torch.equal(stored.value(), original.tensors[name].value()), name


def test_flux_1_dev_has_its_780_tensors_and_its_config_is_read_from_shapes() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    original = to_original(contents(model.state_dict()))
    assert len(original.tensors) == 780
    assert original.tensors["double_blocks.18.txt_attn.qkv.weight"].shape == (9216, 3072)
    assert original.tensors["single_blocks.37.linear1.bias"].shape == (21504,)
    assert original.tensors["final_layer.adaLN_modulation.1.weight"].shape == (6144, 3072)
    config = to_diffusers(replace(original, config=None)).config
    assert config is not None
    for key, value in config.items():
        if key != "_class_name":
            assert value == (list(model.config[key]) if key == "axes_dims_rope" else model.config[key]), key


def test_flux_1_fill_is_told_by_its_inputs() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(in_channels=384, out_channels=64, num_layers=1, num_single_layers=1)
    config = flux_config(contents(model.state_dict()))
    assert (config["in_channels"], config["out_channels"], config["guidance_embeds"]) == (384, 64, False)


def test_rotary_axes_of_other_heads_are_not_guessed(make_flux: Callable[..., nn.Module]) -> None:
    original = to_original(contents(make_flux().state_dict()))
    with pytest.raises(CheckpointError, match=r"heads of 64 are not FLUX.1's 128.*--config"):
        to_diffusers(replace(original, config=None))


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(state)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.ones(1)}, "'extra' is no tensor of FLUX.1"),
        ({"double_blocks__9__img_mod__lin__bias": torch.ones(6)}, "blocks are missing: double_blocks has not 0 to 1"),
        ({"double_blocks__999999999__x": torch.ones(6)}, "'double_blocks.999999999.x' is no tensor of FLUX.1"),
        ({"single_blocks__0__linear1__bias": torch.ones(10)}, r"linear1.bias' of \(10,\) cannot be split"),
        ({"single_blocks__0__linear1__bias": torch.tensor(1.0)}, r"linear1.bias' of \(\) cannot be split"),
    ],
)
def test_what_is_not_flux_is_refused(
    make_flux: Callable[..., nn.Module], changes: dict[str, Tensor | None], message: str
) -> None:
    original = {n: t.value() for n, t in to_original(contents(make_flux().state_dict())).tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        to_diffusers(contents(changed(original, **changes)))


def test_a_lost_third_of_qkv_is_named(make_flux: Callable[..., nn.Module]) -> None:
    state = changed(make_flux().state_dict(), transformer_blocks__0__attn__to_k__weight=None)
    with pytest.raises(CheckpointError, match=r"'transformer_blocks\.0\.attn\.to_k\.weight' is missing"):
        to_original(contents(state))


def test_the_original_layout_of_other_models_is_not_guessed() -> None:
    with pytest.raises(CheckpointError, match=r"FLUX.1 alone, not of SanaTransformer2DModel.*--keys diffusers"):
        to_original(contents({}, {"_class_name": "SanaTransformer2DModel"}))
