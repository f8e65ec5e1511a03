"""Released models at their real sizes on the meta device: which layers are quantized, bytes, `convrot inspect NAME`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from convrot_bench.family_table import released_plan
from convrot_bench.report import fill
from convrot_quant import Plan, plan
from convrot_quant.cli.app import app
from convrot_quant.named_models import MODELS, alike, find, named_model
from convrot_quant.released import RELEASED

README = Path(__file__).parents[2] / "packages/convrot-quant/README.md"
# Where a class's repeated blocks are and which of their linears see tokens: written by hand, not read from the rules.
BLOCKS: Mapping[str, str] = {
    "FluxTransformer2DModel": "(single_)?transformer_blocks",
    "Flux2Transformer2DModel": "(single_)?transformer_blocks",
    "ChromaTransformer2DModel": "(single_)?transformer_blocks",
    "SD3Transformer2DModel": "transformer_blocks",
    "QwenImageTransformer2DModel": "transformer_blocks",
    "ZImageTransformer2DModel": "layers|noise_refiner|context_refiner",
    "HiDreamImageTransformer2DModel": "(single|double)_stream_blocks",
    "PixArtTransformer2DModel": "transformer_blocks",
    "SanaTransformer2DModel": "transformer_blocks",
    "Lumina2Transformer2DModel": "layers|noise_refiner|context_refiner",
    "AuraFlowTransformer2DModel": "(joint|single)_transformer_blocks",
    "WanTransformer3DModel": "blocks",
    "HunyuanVideo15Transformer3DModel": "transformer_blocks",
    "LTXVideoTransformer3DModel": "transformer_blocks",
    "LTX2VideoTransformer3DModel": "transformer_blocks",
    "CogVideoXTransformer3DModel": "transformer_blocks",
    "Kandinsky5Transformer3DModel": "(text|visual)_transformer_blocks",
    "CosmosTransformer3DModel": "transformer_blocks",
}
TOKENS = re.compile(
    r"\.(attn\d?|\w+_attn\d?|attention|\w+_attention|ff(_\w+)?|\w+_ff|ffn|feed_forward|\w+_mlp|proj_\w+)(\.|$)"
)
# Billions of values in a model, position tables included: within rounding of the size that its name or page gives.
# Counted here but for FLUX.2 klein, whose files' sizes were seen; they catch a slip in released.py.
BILLIONS: Mapping[str, float] = {
    "FLUX.1-dev": 11.9, "FLUX.1-schnell": 11.9, "FLUX.1-Kontext-dev": 11.9, "FLUX.1-Fill-dev": 11.9,
    "FLUX.2-dev": 32.2, "FLUX.2-klein-4B": 3.88, "FLUX.2-klein-9B": 9.08, "Chroma1-HD": 8.9,
    "SD3-medium": 2.09, "SD3.5-medium": 2.47, "SD3.5-large": 8.15,
    "Qwen-Image": 20.4, "Qwen-Image-Edit": 20.4, "Qwen-Image-Edit-2511": 20.4,
    "Z-Image-Turbo": 6.15, "HiDream-I1": 17.1, "PixArt-Alpha-XL-2-1024-MS": 0.61, "PixArt-Sigma-XL-2-1024-MS": 0.61,
    "Sana-600M": 0.59, "Sana-1600M": 1.6, "SANA1.5-4.8B": 4.72, "Lumina-Image-2.0": 2.61, "AuraFlow-v0.3": 6.86,
    "Wan2.1-T2V-1.3B": 1.42, "Wan2.1-T2V-14B": 14.3, "Wan2.1-I2V-14B": 16.4,
    "Wan2.2-TI2V-5B": 5.0, "Wan2.2-T2V-A14B": 14.3, "Wan2.2-I2V-A14B": 14.3,
    "HunyuanVideo-1.5-480p-t2v": 8.33, "HunyuanVideo-1.5-480p-i2v": 8.33,
    "LTX-Video-2B": 1.92, "LTX-Video-13B": 13.0, "LTX-2": 18.9,
    "CogVideoX-2b": 1.69, "CogVideoX-5b": 5.57, "CogVideoX1.5-5B": 5.57,
    "Kandinsky-5.0-T2I-Lite": 6.0, "Kandinsky-5.0-T2V-Lite": 2.0, "Kandinsky-5.0-T2V-Pro": 19.3,
    "Cosmos-1.0-Diffusion-7B-Text2World": 7.24, "Cosmos-1.0-Diffusion-14B-Text2World": 14.3,
    "Cosmos-Predict2-2B-Text2Image": 1.96, "Cosmos-Predict2-14B-Text2Image": 14.3, "Cosmos-Predict2.5-2B": 2.06,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)  # one test, so that each model is planned in one process only
def test_layers_that_see_tokens_are_w4a4_and_bytes_follow(name: str) -> None:
    decided, model_class = released_plan(name), MODELS[name][0]
    check_layers(decided, re.compile(rf"({BLOCKS[model_class]})\.\d+\."))
    linears = sum(layer.out_features * layer.in_features for layer in decided.layers)
    assert (linears + decided.other_bytes / 2) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    check_bytes(decided, mostly_linear=model_class != "SanaTransformer2DModel")


def check_layers(decided: Plan, block: re.Pattern[str]) -> None:
    """What sees tokens is W4A4 and nothing else is; modulation is W4A16; nothing is planned outside the blocks."""
    tokens = {layer.name for layer in decided.layers if block.match(layer.name) and TOKENS.search(layer.name)}
    assert {layer for layer, scheme in decided.items() if scheme.name == "W4A4"} == tokens
    modulation = set(decided) - tokens
    assert {decided[layer].name for layer in modulation} <= {"W4A16"}
    assert all(block.match(layer) and re.search(r"norm|_mod\.|adaLN|modulation", layer) for layer in modulation)
    assert {scheme.group_size for scheme in decided.values()} <= {64, 256}


def check_bytes(decided: Plan, *, mostly_linear: bool) -> None:
    """A planned layer shrinks to a quarter, or from fp32 to an eighth; a model as far as it consists of such layers."""
    for layer in decided.layers:
        if layer.scheme is not None:
            halves = getattr(torch, layer.dtype).itemsize * 2
            assert 0.95 * halves < layer.bytes_before / layer.bytes_after < halves
    smaller = decided.bytes_before / decided.bytes_after
    assert (2.8 < smaller < 4.6) if mostly_linear else (1.5 < smaller < 1.7)


def test_readme_has_the_table_of_today() -> None:
    text = README.read_text()
    assert "<!-- families -->" in text
    assert fill(text, []) == text, "run `convrot-bench report packages/convrot-quant/README.md`"


def test_names_are_found_in_any_case_and_classes_by_their_own() -> None:
    assert find("flux.1-DEV") == ("FluxTransformer2DModel", {"guidance_embeds": True})
    assert find("WanTransformer3DModel") == ("WanTransformer3DModel", {})
    assert find("black-forest-labs/FLUX.1-dev") is None
    assert alike("flux1-dev")[0] == "FLUX.1-dev"
    assert len(MODELS) == sum(map(len, RELEASED.values()))
    assert set(BLOCKS) == set(RELEASED)
    assert set(BILLIONS) == set(MODELS)


def test_a_class_without_defaults_names_its_models() -> None:
    with pytest.raises(ValueError, match=r"cannot be built from its defaults .*; give HiDream-I1"):
        named_model("HiDreamImageTransformer2DModel")
    with pytest.raises(ValueError, match=r"diffusers .* has no model AnyTransformer; upgrade diffusers"):
        named_model("AnyTransformer")
    with pytest.raises(ValueError, match="'flux' is no released model and no transformer class"):
        named_model("flux")


def test_fp32_layers_are_planned_in_the_dtype_that_they_are_loaded_in() -> None:
    decided = released_plan("Kandinsky-5.0-T2V-Lite")
    dtypes = {layer.dtype for layer in decided.layers if layer.name.endswith("modulation.out_layer")}
    assert dtypes == {"float32"}
    assert {layer.dtype for layer in decided.layers if ".self_attention." in layer.name} == {"bfloat16"}


def test_gates_of_attention_heads_stay_in_16_bits() -> None:
    """LTX-2.3's config is not in released.py; its gates are 32 outputs of 4096 inputs in every attention."""
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(num_layers=1, gated_attn=True, audio_gated_attn=True)
    reasons = plan(model.to(torch.bfloat16)).reasons
    gates = [reason for name, reason in reasons.items() if name.endswith("to_gate_logits")]
    assert len(gates) == 6
    assert set(gates) == {"gate of attention heads"}


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_inspect_takes_the_name_of_a_released_model() -> None:
    result = inspect("wan2.1-t2v-1.3b", "--json")
    data = json.loads(result.stdout)
    decided = released_plan("Wan2.1-T2V-1.3B")
    assert data["components"]["transformer"]["plan"] == decided.to_dict()
    assert data["components"]["transformer"]["bytes_after"] == decided.bytes_after
    assert data["quantized"] is False


def test_inspect_takes_the_name_of_a_class_and_options() -> None:
    result = inspect("SanaTransformer2DModel", "--preset", "w8a8", "--keep", "*.to_v")
    assert "transformer_blocks.{0-19}.attn1.to_q" in result.stdout
    assert "kept by '*.to_v'" in result.stdout


def test_inspect_says_what_is_like_a_name_that_is_none() -> None:
    result = inspect("flux1-dev")
    assert result.exit_code == 1
    assert "no such folder, and it is no released model nor transformer class (there is FLUX.1-dev" in result.stderr
