"""Scheme.low_rank: a 16-bit branch beside the codes of the rest, in layers, models, files, scores and plans."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import (
    ConvLinear4bit,
    ConvRotConfig,
    QuantConfig,
    Scheme,
    dequantize_,
    load_quantized,
    plan,
    plan_within,
    quantize_,
    save_quantized,
)
from convrot_quant.comfy import save_comfy
from convrot_quant.linear import Side
from convrot_quant.low_rank import branch_of, leading

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
LAYER = "transformer_blocks.0.attn.to_q"
BRANCH = ("low_rank_down", "low_rank_up")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(n: int = 96, k: int = 512, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """Half of the weight's energy is of rank 8."""
    made = nn.Linear(k, n)
    low = normal(n, 8, seed=1) @ normal(8, k, seed=2) / 8**0.5
    made.weight = nn.Parameter((normal(n, k) + low) / k**0.5, requires_grad=False)
    return made.to(dtype)


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# factors


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_leading_is_the_nearest_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    """Of noise, nearly what its rank can hold; of a matrix of that rank, all of it."""
    matrix = normal(*shape)
    up, down = leading(matrix, 8)
    held = float(torch.linalg.svdvals(matrix)[:8].square().sum())
    assert float((matrix - up @ down).square().sum()) < float(matrix.square().sum()) - 0.985 * held
    assert (up.shape, down.shape) == ((shape[0], 8), (8, shape[1]))
    low = normal(shape[0], 8) @ normal(8, shape[1], seed=1)
    up, down = leading(low, 8)
    assert distance(up @ down, low) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_branch_is_rounded_before_the_rest_is_made(dtype: torch.dtype) -> None:
    weight = linear(dtype=dtype).weight
    branch = branch_of(weight, 8)
    assert {tensor.dtype for tensor in branch} == {dtype}
    torch.testing.assert_close(branch.down.float().norm(dim=1), branch.up.float().norm(dim=0), rtol=0.01, atol=0)
    rest = branch.rest_of(weight)
    assert rest.dtype == torch.float32
    assert torch.equal(rest, weight.float() - branch.up.float() @ branch.down.float())
    assert 0.6 < float(rest.norm() / weight.float().norm()) < 0.75  # sqrt(1/2), less what rank 8 holds of noise


def test_a_weight_of_zeros_has_a_branch_of_zeros() -> None:
    branch = branch_of(torch.zeros(64, 256, dtype=torch.bfloat16), 8)
    assert torch.equal(branch.up.float() @ branch.down.float(), torch.zeros(64, 256))


# layers


@pytest.mark.parametrize("name", ["W4A4-r8", "W4A8-r8", "W4A16-r8"])
def test_a_layer_is_that_of_the_rest_and_the_branch_beside_it(name: str) -> None:
    original, scheme = linear(dtype=torch.float32), Scheme.parse(name)
    layer = ConvLinear4bit.from_linear(original, scheme)
    branch = branch_of(original.weight, 8)
    rest = copy.deepcopy(original)
    rest.weight = nn.Parameter(branch.rest_of(original.weight), requires_grad=False)
    plain = ConvLinear4bit.from_linear(rest, Scheme.parse(name.removesuffix("-r8")))
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_scale, plain.weight_scale)
    x = normal(32, 512, seed=3)
    assert distance(layer(x), plain(x) + x @ branch.down.T @ branch.up.T) < 1e-6
    expected = original(x)
    error = distance(layer(x), expected)
    assert error < 0.8 * distance(
        ConvLinear4bit.from_linear(original, Scheme.parse(name.removesuffix("-r8")))(x), expected
    )
    assert distance(layer.dequantize().weight, original.weight) < 0.8 * 0.16


def test_the_branch_follows_the_layer_and_stays_in_16_bits() -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme.parse("W4A4-r8"))
    assert list(layer.state_dict()) == ["weight", "bias", "weight_scale", *BRANCH]
    assert (layer.low_rank_down.shape, layer.low_rank_up.shape) == ((8, 512), (96, 8))
    assert "W4A4-r8" in repr(layer)
    x = normal(5, 512).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    fresh = ConvLinear4bit(512, 96, layer.scheme, device="meta")
    fresh.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(fresh(x), layer(x))
    layer.to(torch.float16)
    assert layer.low_rank_up.dtype == layer.low_rank_down.dtype == layer.compute_dtype == torch.float16
    assert layer.weight_scale.dtype == torch.float32


def test_what_is_added_comes_after_the_branch_and_goes_again() -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme.parse("W4A4-r8"))
    x = normal(5, 512).bfloat16()
    before = layer(x)
    layer.add_side("style", Side(normal(4, 512).bfloat16(), normal(96, 4).bfloat16(), 0.5))
    assert [len(side.down) for side in layer.sides()] == [8, 4]
    assert layer.has_added_sides
    assert distance(layer(x), before) > 0.1
    layer.remove_side("style")
    assert not layer.has_added_sides
    assert torch.equal(layer(x), before)


def test_refuses_what_cannot_have_a_branch() -> None:
    for wrong in (4, -8, 264, True, 8.5, "8"):
        with pytest.raises(ValueError, match="low_rank must be 0 or a multiple of 8 up to 256; got"):
            Scheme(low_rank=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low_rank=16 needs weight_bits=4; got weight_bits=8"):
        Scheme.parse("W8A8-r16")
    with pytest.raises(ValueError, match="low_rank must be less than in_features and out_features"):
        ConvLinear4bit(512, 32, Scheme(low_rank=32))
    broken = linear()
    with torch.no_grad():
        broken.weight[7, 3] = float("inf")
    with pytest.raises(ValueError, match="the weight must be finite; row 7 of 96 is not"):
        ConvLinear4bit.from_linear(broken, Scheme(low_rank=8))


# names


def test_names_say_the_rank_and_files_without_one_say_nothing() -> None:
    scheme = Scheme.parse("w4a4-R32")
    assert (scheme.low_rank, scheme.name) == (32, "W4A4-r32")
    assert scheme == Scheme.from_dict(scheme.to_dict())
    assert "low_rank" not in Scheme.parse("W4A4").to_dict()
    assert Scheme.parse("W4A4-absmax-r8") == Scheme(low_rank=8)
    config = QuantConfig.preset("ours-r16")
    plain = QuantConfig.preset("ours")
    assert config.scheme == Scheme.parse("W4A4-r16")
    for glob, override in config.overrides.items():  # the clips stay, and modulation has none
        assert override.low_rank == (0 if override.activation_bits == 16 else 16)
        assert override.activation_clip == plain.overrides[glob].activation_clip
    assert QuantConfig.from_json(config.to_json()) == config
    for name in ("ours-r17", "w8a8-r16", "best-r16", "ours-r"):
        with pytest.raises(ValueError, match=r"low_rank must|low_rank=16 needs|unknown preset"):
            QuantConfig.preset(name)


# models


def test_layers_that_are_too_narrow_go_without(make_flux: Flux) -> None:
    model = make_flux(1, 1)
    model.transformer_blocks[0].attn.to_q = nn.Linear(512, 128, bias=False, dtype=torch.bfloat16)
    model.transformer_blocks[0].attn.to_k = nn.Linear(512, 176, bias=False, dtype=torch.bfloat16)
    decided = plan(model, "ours-r32")
    assert decided[LAYER].low_rank == 0
    assert {layer.name: layer.note for layer in decided.layers}[LAYER] == "too narrow for a branch of rank 32"
    assert decided[LAYER.replace("to_q", "to_k")].low_rank == 32
    assert decided[LAYER.replace("to_q", "to_k")].activation_clip == plan(model, "ours")[LAYER].activation_clip


def test_bytes_are_those_of_the_file_and_dequantizing_gives_the_weight_back(
    make_flux: Flux, run: Run, tmp_path: Path
) -> None:
    model, exact = make_flux(1, 1), make_flux(1, 1)
    decided = quantize_(model, "ours-r64", progress=False)
    save_quantized(model, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= written - decided.bytes_after < 30_000  # headers
    with pytest.raises(ValueError, match=rf"'{LAYER}': ComfyUI's formats have no place for Scheme\(.*low_rank=64\)"):
        save_comfy(model, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = load_quantized(tmp_path / "out", dtype=torch.float16)
    assert again.get_submodule(LAYER).low_rank_up.dtype == torch.float16
    held = distance(model.get_submodule(LAYER).dequantize().weight, exact.get_submodule(LAYER).weight)
    assert 0.05 < held < 0.115  # of W4A4 alone .12
    dequantize_(model)
    assert type(model.get_submodule(LAYER)) is nn.Linear
    assert distance(run(model), run(exact)) < distance(run(again.to(torch.bfloat16)), run(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_diffusers_quantizes_saves_and_loads_it(make_flux: Flux, tmp_path: Path, dtype: torch.dtype) -> None:
    from diffusers import FluxTransformer2DModel

    make_flux(1, 1).save_pretrained(tmp_path / "bf16")  # type: ignore[operator]
    config = ConvRotConfig("ours-r16", quantization_device="cpu")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "bf16", quantization_config=config, torch_dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    expected = make_flux(1, 1).to(dtype)
    quantize_(expected, "ours-r16", progress=False)
    for name, tensor in expected.state_dict().items():
        for other in (model, again, load_quantized(tmp_path / "saved")):
            found = other.state_dict()[name]
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name
    narrower = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.float16)
    assert narrower.get_submodule(LAYER).low_rank_down.dtype == torch.float16


def test_a_lora_beside_a_branch_in_a_fused_block(make_flux: Flux, run: Run) -> None:
    from peft import LoraConfig

    results = []
    for fuse in (True, False):
        model = make_flux(1, 1, dtype=torch.float32)
        quantize_(model, "ours-r16", fuse=fuse, progress=False)
        before = run(model)
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))  # type: ignore[operator]
        results.append(run(model))
        assert distance(results[-1], before) > 0.005
    assert distance(*results) < 2e-3


# plans


def test_the_planner_spends_bytes_on_branches(make_flux: Flux) -> None:
    model = make_flux(1, 1)
    least, most = plan(model, "ours").bytes_after, plan(model, "ours-r16").bytes_after
    planned = plan_within(model, (least + most) // 2, schemes=("W4A4", "w4a4-r16"), progress=False)
    assert least < planned.bytes_after <= (least + most) // 2
    assert {scheme.name for scheme in planned.values()} == {"W4A4", "W4A4-r16", "W4A16"}
    assert plan_within(model, most, schemes=("W4A4", "w4a4-r16"), progress=False) == plan(model, "ours-r16")
