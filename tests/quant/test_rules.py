"""Which layer gets which scheme: all of FLUX.1-dev on the meta device, other families, odd layers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from convrot_quant import Plan, QuantConfig, Scheme, plan
from convrot_quant.config import recommended_clip

GIB = 2**30


@pytest.fixture(scope="module")
def flux_dev() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model: nn.Module = FluxTransformer2DModel(guidance_embeds=True)  # the defaults are FLUX.1-dev's
    return model.to(torch.bfloat16)


def counts(decided: Plan) -> Counter[str]:
    return Counter("16-bit" if layer.scheme is None else layer.scheme.name for layer in decided.layers)


def meta_model(name: str, **sizes: Any) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, name)(**sizes)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("ours", {"W4A4": 418, "W4A16": 76, "16-bit": 10}),
        ("paper", {"W4A4": 494, "16-bit": 10}),
        ("paper-mixed", {"W4A4": 396, "W8A8": 95, "16-bit": 13}),
        ("w4a8", {"W4A8": 418, "W4A16": 76, "16-bit": 10}),
        ("w4a16", {"W4A16": 494, "16-bit": 10}),
        ("w8a8", {"W8A8": 418, "W8A16": 76, "16-bit": 10}),
        ("w8a16", {"W8A16": 494, "16-bit": 10}),
    ],
)
def test_flux_dev_has_504_linears_by_scheme(flux_dev: nn.Module, preset: str, expected: dict[str, int]) -> None:
    decided = plan(flux_dev, preset)
    assert counts(decided) == expected
    assert len(decided.layers) == 504
    assert all(scheme.group_size == 256 for scheme in decided.values())


def test_flux_dev_bytes_are_the_papers(flux_dev: nn.Module) -> None:
    """22.16 GiB in BF16; the paper reports 5.6 GiB for W4A4 and 7.0 for its mixed model."""
    paper, mixed = plan(flux_dev, "paper"), plan(flux_dev, "paper-mixed")
    assert paper.bytes_before == 23_802_816_640
    codes = sum(layer.out_features * layer.in_features for layer in paper.layers if layer.scheme) / 2
    sixteen_bit = sum(layer.bytes_before for layer in paper.layers if layer.scheme is None)
    assert (codes + sixteen_bit) / GIB == pytest.approx(5.63, abs=0.01)
    assert paper.bytes_after / GIB == pytest.approx(5.65, abs=0.01)  # with scales and biases
    assert mixed.bytes_after / GIB == pytest.approx(7.06, abs=0.02)
    assert plan(flux_dev, "ours").bytes_after == paper.bytes_after
    assert plan(flux_dev, "ours").bytes_before / plan(flux_dev, "ours").bytes_after > 3.9


def test_paper_mixed_names_the_papers_layers(flux_dev: nn.Module) -> None:
    decided = plan(flux_dev, "paper-mixed")
    w8a8 = {name for name, scheme in decided.items() if scheme.name == "W8A8"}
    expected = {f"transformer_blocks.{i}.attn.to_out.0" for i in range(19)}
    expected |= {f"transformer_blocks.{i}.{norm}.linear" for i in range(19) for norm in ("norm1", "norm1_context")}
    expected |= {f"single_transformer_blocks.{i}.attn.to_v" for i in range(38)}
    assert w8a8 == expected
    kept = {name for name, reason in decided.reasons.items() if reason.startswith("kept by")}
    tail = {"transformer_blocks.18.ff.net.2", "transformer_blocks.18.ff_context.net.2"}
    assert kept == tail | {"single_transformer_blocks.37.proj_out"}


def test_last_follows_the_depth_of_the_model(make_flux: Callable[..., nn.Module]) -> None:
    decided = plan(make_flux(2, 3), "paper-mixed")
    kept = {name for name, reason in decided.reasons.items() if reason.startswith("kept by")}
    tail = {"transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_context.net.2"}
    assert kept == tail | {"single_transformer_blocks.2.proj_out"}


def test_ours_gives_modulation_sixteen_bit_activations(flux_dev: nn.Module) -> None:
    decided = plan(flux_dev)
    weight_only = {name for name, scheme in decided.items() if scheme.activation_bits == 16}
    assert len(weight_only) == 76
    assert all(name.split(".")[2] in ("norm", "norm1", "norm1_context") for name in weight_only)
    outside = {name.split(".")[0] for name in decided.reasons}
    assert outside == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}


def test_plan_is_in_the_order_of_the_model(flux_dev: nn.Module) -> None:
    names = [name for name, module in flux_dev.named_modules() if isinstance(module, nn.Linear)]
    assert [layer.name for layer in plan(flux_dev).layers] == names


def test_later_overrides_win_and_keep_wins_over_all(make_flux: Callable[..., nn.Module]) -> None:
    overrides = {"*.attn.*": Scheme.parse("W8A8"), "*.to_v": Scheme.parse("W4A8"), "*.to_q": Scheme.parse("W4A8")}
    decided = plan(make_flux(), QuantConfig(overrides=overrides, keep=("*.to_q",)))
    assert decided["transformer_blocks.0.attn.to_k"].name == "W8A8"
    assert decided["transformer_blocks.0.attn.to_v"].name == "W4A8"
    assert decided.reasons["transformer_blocks.0.attn.to_q"] == "kept by '*.to_q'"


def test_a_full_name_lifts_taste_but_not_what_cannot_run(flux_dev: nn.Module) -> None:
    w8a8 = Scheme.parse("W8A8")
    decided = plan(flux_dev, QuantConfig(overrides={"context_embedder": w8a8, "x_embedder": w8a8, "*": w8a8}))
    assert decided.reasons["context_embedder"] == "text embedder"  # the wildcard came last and lifts nothing
    decided = plan(flux_dev, QuantConfig(overrides={"*": w8a8, "context_embedder": w8a8, "x_embedder": w8a8}))
    assert decided["context_embedder"] == w8a8
    assert decided["x_embedder"] == replace(w8a8, group_size=64)
    assert "proj_out" in decided.reasons


FAMILIES = {
    # class, sizes, {scheme: layers}, some 16-bit layers and their reasons, group sizes
    "SD3Transformer2DModel": (
        {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 38, "caption_projection_dim": 2432},
        {"W4A4": 21, "W4A16": 4},  # the last block has no text output
        {"context_embedder": "outside the repeated blocks (embedder or output layer)"},
        {64, 256},
    ),
    "WanTransformer3DModel": (
        {"num_layers": 2, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960},
        {"W4A4": 20},
        {"condition_embedder.time_proj": "outside the repeated blocks (embedder or output layer)"},
        {256},
    ),
    "QwenImageTransformer2DModel": (
        {"num_layers": 2},
        {"W4A4": 24, "W4A16": 4},
        {"txt_in": "outside the repeated blocks (embedder or output layer)"},
        {256},
    ),
    "ChromaTransformer2DModel": (
        {"num_layers": 1, "num_single_layers": 1},
        {"W4A4": 17},
        {"distilled_guidance_layer.layers.0.linear_1": "makes the modulation of every block"},
        {256},
    ),
    "Flux2Transformer2DModel": (
        {"num_layers": 1, "num_single_layers": 1},
        {"W4A4": 14},
        {"double_stream_modulation_img.linear": "outside the repeated blocks (embedder or output layer)"},
        {256},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_generic_rule_finds_the_block_linears_of_other_families(name: str) -> None:
    sizes, expected, kept, groups = FAMILIES[name]
    decided = plan(meta_model(name, **sizes))
    found = counts(decided)
    del found["16-bit"]
    assert found == expected, str(decided)
    for layer, reason in kept.items():
        assert decided.reasons[layer] == reason
    assert {scheme.group_size for scheme in decided.values()} == groups


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def model_of(**layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(**layers)])
    return model


class Special(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "outcome"),
    [
        (nn.Linear(1152, 512), "K=1152 is not a multiple of 256"),
        (nn.Linear(520, 512), "K=520 is not a multiple of 64"),
        (nn.Linear(512, 100), "N=100 is not a multiple of 16"),
        (nn.Linear(256, 512), "K=256 is below 512"),
        (Special(512, 512), "is a Special, not a plain nn.Linear"),
        (nn.Linear(512, 512, dtype=torch.float64), "its weight is Tensor torch.float64, not fp16, bf16 or fp32"),
    ],
)
def test_the_reason_or_the_fallback_group_is_said(layer: nn.Linear, outcome: str) -> None:
    decided = plan(model_of(lin=layer)).layers[0]
    assert decided.note == outcome
    if layer.in_features == 1152:
        clip = recommended_clip(1152)
        assert decided.scheme == replace(Scheme.parse("W4A4"), group_size=64, activation_clip=clip)
    else:
        assert decided.scheme is None


def test_group_1024_falls_back_to_256_then_64() -> None:
    layers = {"a": nn.Linear(2048, 512), "b": nn.Linear(2304, 512), "c": nn.Linear(1152, 512)}
    decided = plan(model_of(**layers), QuantConfig(Scheme(group_size=1024)))
    assert [scheme.group_size for scheme in decided.values()] == [1024, 256, 64]


def test_tied_weights_and_shared_modules_stay_in_16_bits() -> None:
    first, second, shared = nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512)
    second.weight = first.weight
    decided = plan(model_of(a=first, b=second, c=shared, d=shared, e=nn.Linear(512, 512)))
    assert list(decided) == ["blocks.0.e"]
    assert decided.reasons == {
        "blocks.0.a": "shares its weight with 'blocks.0.b'",
        "blocks.0.b": "shares its weight with 'blocks.0.a'",
        "blocks.0.c": "shares its weight with 'blocks.0.d'",
    }


def test_a_linear_right_in_a_list_is_no_block() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(512, 512)])
    assert plan(model).reasons == {"heads.0": "outside the repeated blocks (embedder or output layer)"}


def test_the_recommended_clip_follows_the_length_of_a_row_and_a_chosen_one_stays() -> None:
    layers = {"a": nn.Linear(512, 512), "b": nn.Linear(3072, 512)}
    found = [scheme.activation_clip for scheme in plan(model_of(**layers)).values()]
    assert found == [recommended_clip(512), recommended_clip(3072)] == [0.85, 0.721]
    chosen = replace(Scheme.parse("W4A4"), activation_clip=0.9)
    assert {scheme.activation_clip for scheme in plan(model_of(**layers), QuantConfig(chosen)).values()} == {0.9}
    assert {scheme.activation_clip for scheme in plan(model_of(**layers), QuantConfig("W4A8")).values()} == {1.0}
