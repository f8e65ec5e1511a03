"""Scheme.low_rank: a 16-bit branch beside the codes of the rest, in layers, models, files, scores and plans."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convrot_quant import (
    CheckpointError,
    ConvLinear4bit,
    ConvRotConfig,
    QuantConfig,
    Scheme,
    apply,
    dequantize_,
    load_quantized,
    plan,
    quantize_,
    save_quantized,
)
from convrot_quant.budgets import Budget
from convrot_quant.comfy import save_comfy
from convrot_quant.fuse import fuse_, is_fused, stacked_layers
from convrot_quant.linear import Side
from convrot_quant.low_rank import branch_of, leading
from convrot_quant.manifest import WEIGHTS
from convrot_quant.planner import Ladder, Problem, spend
from convrot_quant.scores import model_weights, schemes_of, weight_scores
from convrot_quant.streaming import outline
from convrot_quant.verify import verify

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
BLOCK = "single_transformer_blocks.0"
LAYER = f"{BLOCK}.attn.to_q"
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
    assert all(tensor.is_contiguous() for tensor in branch)  # as a file gives it back: products round by the order
    torch.testing.assert_close(branch.down.float().norm(dim=1), branch.up.float().norm(dim=0), rtol=0.01, atol=0)
    rest = branch.rest_of(weight)
    assert rest.dtype == torch.float32
    assert torch.equal(rest, weight.float() - branch.up.float() @ branch.down.float())
    assert 0.6 < float(rest.norm() / weight.float().norm()) < 0.75  # sqrt(1/2), less what rank 8 holds of noise


def test_a_weight_of_zeros_has_a_branch_of_zeros() -> None:
    branch = branch_of(torch.zeros(64, 256, dtype=torch.bfloat16), 8)
    assert torch.equal(branch.up.float() @ branch.down.float(), torch.zeros(64, 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_and_small_weights_have_the_same_branch(dtype: torch.dtype) -> None:
    weight = linear(dtype=dtype).weight
    rest = branch_of(weight, 8).rest_of(weight)
    for factor in (2.0**110, 2.0**-70):  # whose squares fp32 does not hold
        assert torch.equal(branch_of(weight * factor, 8).rest_of(weight * factor), rest * factor)


def test_defaults_of_torch_change_no_branch() -> None:
    weight = linear().weight
    expected = branch_of(weight, 8)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = branch_of(weight, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


# layers


@pytest.mark.parametrize("name", ["W4A4-r8", "W4A8-r8", "W4A16-r8"])
def test_a_layer_is_that_of_the_rest_and_the_branch_beside_it(name: str, device: str) -> None:
    original, scheme = linear(dtype=torch.float32).to(device), Scheme.parse(name)
    layer = ConvLinear4bit.from_linear(original, scheme)
    branch = branch_of(original.weight, 8)
    rest = copy.deepcopy(original)
    rest.weight = nn.Parameter(branch.rest_of(original.weight), requires_grad=False)
    plain = ConvLinear4bit.from_linear(rest, Scheme.parse(name.removesuffix("-r8")))
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_scale, plain.weight_scale)
    x = normal(32, 512, seed=3).to(device)
    assert distance(layer(x), plain(x) + x @ branch.down.T @ branch.up.T) < 1e-6
    expected = original(x)
    without = ConvLinear4bit.from_linear(original, Scheme.parse(name.removesuffix("-r8")))
    assert distance(layer(x), expected) < 0.8 * distance(without(x), expected)
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
    for wrong in (4, -8, 264, True, 8.5, 16.0, "8"):
        with pytest.raises(ValueError, match="low_rank must be 0 or a multiple of 8 up to 256; got"):
            Scheme(low_rank=wrong)  # type: ignore[arg-type]
    for numbers in ({"group_size": 256.0}, {"weight_bits": 4.0}):  # as a plan that was written by hand may have them
        with pytest.raises(ValueError, match=r"must be one of .*; got \d+\.0$"):
            Scheme.from_dict(numbers | {"low_rank": 16})
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


@pytest.fixture(scope="module")
def original(make_flux: Flux) -> nn.Module:
    """One single block, which has every kind of layer; copy it to change it."""
    return make_flux(0, 1)


@pytest.fixture(scope="module")
def files(original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `bf16` and `saved`, quantized with a branch beside the output layer too; copy them to change them."""
    root = tmp_path_factory.mktemp("low_rank")
    original.save_pretrained(root / "bf16")  # type: ignore[operator]
    model = copy.deepcopy(original)
    apply(model, plan_of_files(model), progress=False)
    save_quantized(model, root / "saved")
    return root


def plan_of_files(model: nn.Module) -> Any:
    decided = plan(model, "paper-r16")
    decided["proj_out"] = Scheme(low_rank=8)
    return decided


def rewrite(path: Path, change: Change) -> None:
    """Change the tensors and the schemes {layer: its JSON} of a file."""
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, data = load_file(path), json.loads(metadata["convrot_plan"])
    change(tensors, {layer["name"]: layer["scheme"] for layer in data["layers"]})
    save_file(tensors, path, metadata | {"convrot_plan": json.dumps(data)})


def test_layers_that_are_too_narrow_go_without(make_flux: Flux) -> None:
    with torch.device("meta"):
        model = make_flux(0, 1)
        attn = model.get_submodule(f"{BLOCK}.attn")
        attn.to_q = nn.Linear(512, 128, bias=False, dtype=torch.bfloat16)
        attn.to_k = nn.Linear(512, 176, bias=False, dtype=torch.bfloat16)
    decided = plan(model, QuantConfig.preset("ours-r32"))
    assert decided[LAYER].low_rank == 0
    assert {layer.name: layer.note for layer in decided.layers}[LAYER] == "too narrow for a branch of rank 32"
    to_k = LAYER.replace("to_q", "to_k")
    assert decided[to_k].low_rank == 32
    assert decided[to_k].activation_clip == plan(model, "ours")[LAYER].activation_clip
    named = plan(model, QuantConfig(Scheme(), {"proj_out": Scheme(low_rank=64)}))  # as wide as the layer
    assert (named["proj_out"].low_rank, named["proj_out"].weight_bits) == (0, 4)


def test_bytes_are_those_of_the_file_and_dequantizing_gives_the_weight_back(
    original: nn.Module, run: Run, tmp_path: Path
) -> None:
    model = copy.deepcopy(original)
    decided = quantize_(model, "ours-r64", progress=False)
    save_quantized(model, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= written - decided.bytes_after < 30_000  # headers
    with pytest.raises(ValueError, match=rf"'{BLOCK}\.\S+': ComfyUI's formats have no place for .*low_rank=64\)"):
        save_comfy(model, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = load_quantized(tmp_path / "out", dtype=torch.float16)
    assert again.get_submodule(LAYER).low_rank_up.dtype == torch.float16
    held = distance(model.get_submodule(LAYER).dequantize().weight, original.get_submodule(LAYER).weight)
    assert 0.05 < held < 0.115  # of W4A4 alone .12
    dequantize_(model)
    assert type(model.get_submodule(LAYER)) is nn.Linear
    exact = run(original)
    assert distance(run(model), exact) < distance(run(again.to(torch.bfloat16)), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_diffusers_quantizes_saves_and_loads_it(
    original: nn.Module, files: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from diffusers import FluxTransformer2DModel

    config = ConvRotConfig("ours-r16", quantization_device="cpu")
    model = FluxTransformer2DModel.from_pretrained(files / "bf16", quantization_config=config, torch_dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    expected = copy.deepcopy(original).to(dtype)
    count = sum(parameter.numel() for parameter in expected.parameters())
    quantize_(expected, "ours-r16", progress=False)
    for name, tensor in expected.state_dict().items():
        for other in (model, again, load_quantized(tmp_path / "saved")):
            found = other.state_dict()[name]
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name
    assert again.num_parameters() == count
    narrower = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.float16)
    assert narrower.get_submodule(LAYER).low_rank_down.dtype == torch.float16


def test_loras_and_ranks_that_differ_in_a_fused_block(make_flux: Flux, run: Run) -> None:
    from peft import LoraConfig

    fused, results = make_flux(1, 1, dtype=torch.float32), []
    decided = plan(fused, "paper-r16")
    for block in ("transformer_blocks.0", BLOCK):
        decided[f"{block}.attn.to_k"] = Scheme(low_rank=8)
        decided[f"{block}.attn.to_v"] = Scheme()
    apply(fused, decided, fuse=False, progress=False)
    apart = copy.deepcopy(fused)
    assert fuse_(fused) == 2
    for model in (fused, apart):
        before = run(model)
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
        results += [before, run(model)]
        assert distance(results[-1], before) > 0.005
    assert distance(results[0], results[2]) < 2e-3
    assert distance(results[1], results[3]) < 2e-3


def test_autocast_to_the_other_16_bits_runs_fused(original: nn.Module, files: Path, run: Run) -> None:
    model, exact = load_quantized(files / "saved"), run(original)
    assert is_fused(model.get_submodule(BLOCK))
    with torch.autocast("cpu", torch.float16):
        cast = run(model)
    assert distance(cast, exact) < 1.2 * distance(run(model), exact)


# files


def drop(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.low_rank_up"]


def cut(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
    tensors[f"{LAYER}.low_rank_up"] = tensors[f"{LAYER}.low_rank_up"][:-8].clone()


def cast(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
    tensors[f"{LAYER}.low_rank_up"] = tensors[f"{LAYER}.low_rank_up"].to(torch.int8)


def forget(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
    del schemes[LAYER]["low_rank"]


def widen(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
    schemes["proj_out"]["low_rank"] = 64


def blur(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
    schemes[LAYER]["low_rank"] = 16.0


# what both loaders say of the layer
WRONG: list[tuple[Change, str]] = [
    (drop, rf"lack.* '{LAYER}.low_rank_up'"),
    (cut, rf"'{LAYER}.low_rank_up' must be \(512, 16\), got \(504, 16\)"),
    (cast, rf"'{LAYER}.low_rank_up' must not be (I8|torch.int8)"),
    (forget, rf"'{LAYER}.low_rank_down'"),
    (widen, r"the plan's W4A4-r64 g256.* does not fit 'proj_out'"),
    (blur, r"metadata is damaged \(Scheme: low_rank must be .*; got 16.0\)"),
]


@pytest.mark.parametrize(("change", "match"), WRONG, ids=[change.__name__ for change, _ in WRONG])
def test_a_wrong_file_is_refused_in_one_sentence(files: Path, tmp_path: Path, change: Change, match: str) -> None:
    from diffusers import FluxTransformer2DModel

    folder = shutil.copytree(files / "saved", tmp_path / "saved")
    rewrite(folder / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=match):
        load_quantized(folder)
    with pytest.raises(CheckpointError, match=match):
        FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_a_rank_that_is_no_less_than_the_layer_is_refused_by_name(files: Path, original: nn.Module) -> None:
    decided = plan_of_files(original)
    decided["proj_out"] = Scheme(low_rank=64)
    match = "'proj_out' cannot be quantized: low_rank=64 is not less than N=64 and K=512; plan this model first"
    with pytest.raises(ValueError, match=match):
        outline(files / "bf16", decided)
    model = copy.deepcopy(original)
    with pytest.raises(ValueError, match=match.partition(";")[0]):
        apply(model, decided, progress=False)
    assert not any(isinstance(module, ConvLinear4bit) for module in model.modules())


def test_verify_finds_a_branch_that_is_not_finite(files: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
        tensors[f"{LAYER}.low_rank_up"][5, 3] = float("nan")

    folder = shutil.copytree(files / "saved", tmp_path / "saved")
    assert verify(folder).passed
    rewrite(folder / WEIGHTS, spoil)
    wrong = [check for check in verify(folder).checks if check.passed is False]
    assert [check.name for check in wrong] == ["scales"]
    assert f"{LAYER}.low_rank_up" in wrong[0].detail


def test_a_text_encoder_is_quantized_saved_loaded_and_checked(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    torch.manual_seed(7)
    made = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=64, max_position_embeddings=32, eos_token_id=2))
    made.save_pretrained(tmp_path / "16")
    config = ConvRotConfig("w4a8-r8", quantization_device="cpu")
    model = CLIPTextModel.from_pretrained(tmp_path / "16", quantization_config=config, dtype=torch.bfloat16)
    name = next(name for name, layer in model.named_modules() if isinstance(layer, ConvLinear4bit))
    model.save_pretrained(tmp_path / "4")
    again = CLIPTextModel.from_pretrained(tmp_path / "4", dtype=torch.bfloat16)
    ids = torch.arange(12).reshape(2, 6) % 60 + 3
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])
    path = tmp_path / "4" / "model.safetensors"
    whole = path.read_bytes()

    def cast(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
        tensors[f"{name}.low_rank_up"] = tensors[f"{name}.low_rank_up"].to(torch.int8)

    def forget(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> None:
        del schemes[name]["low_rank"]

    for change, match in ((cast, f"'{name}.low_rank_up' must not be torch.int8"), (forget, "no low_rank of")):
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(CheckpointError, match=match):
            CLIPTextModel.from_pretrained(tmp_path / "4", dtype=torch.bfloat16)


# plans


def test_the_planner_spends_bytes_on_branches(original: nn.Module) -> None:
    least, most = plan(original, "ours").bytes_after, plan(original, "ours-r16").bytes_after
    ladder = Ladder.of(original, ("W4A4", "w4a4-r16"))
    scores = weight_scores(model_weights(original, ladder.rungs[0]), schemes_of(ladder.rungs), progress=False)
    problem = Problem.of(ladder, scores, stacked_layers(original))
    planned = spend(problem, Budget(bytes=(least + most) // 2))
    assert least < planned.bytes_after <= (least + most) // 2
    assert {scheme.name for scheme in planned.values()} == {"W4A4", "W4A4-r16", "W4A16"}
    assert spend(problem, Budget(bytes=most)) == plan(original, "ours-r16")
