"""FLUX's variants and adapters run through the quantized, fused transformer, and give what the 16-bit one gives.

W8A8 goes through the same fused forwards as W4A4 and is close enough to 16 bits for a wrong input to be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from convrot_kernels.testing import assert_equal
from convrot_quant import ConvLinear4bit, load_quantized, quantize_, save_quantized
from convrot_quant.families import flux as fused_flux

CLOSE = 0.03  # relative L2 of latents after two steps in W8A8; a missing input gives 0.1 and more
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
SIZES: dict[str, Any] = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 8,
    "joint_attention_dim": 64, "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


@pytest.fixture(scope="module")
def on_cpu(pipeline_folder: Path) -> dict[str, Any]:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(pipeline_folder, transformer=None, dtype=torch.bfloat16)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {name: pipe.components[name] for name in names}


@pytest.fixture
def components(on_cpu: dict[str, Any], device: str) -> dict[str, Any]:
    """Every component of the tiny pipeline but the transformer."""
    return {name: one.to(device) if isinstance(one, nn.Module) else one for name, one in on_cpu.items()}


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused forwards that have run: "double", "single"."""
    calls: list[str] = []
    for name, attribute in (("double", "norm_rope_joint"), ("single", "rotate_quantize_cat_gelu")):
        own = getattr(fused_flux, attribute)

        def watching(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(fused_flux, attribute, watching)
    return calls


def random_(model: nn.Module, seed: int = 5) -> Any:
    """Zero-initialized projections too, which would let nothing through."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return model.bfloat16().eval()


def image(seed: int = 1, size: int = 32) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    found: dict[str, Any] = {"prompt": "a red cube", "max_sequence_length": 16} | OPTIONS | options
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipe(**found, generator=generator).images
    assert torch.isfinite(latents).all()
    return latents.float().cpu()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def both(pipe_class: Any, components: dict[str, Any], transformer: nn.Module, **more: Any) -> tuple[Any, Any]:
    """The pipeline in 16 bits, and with its transformer quantized, where the components are."""
    import copy

    quantized = copy.deepcopy(transformer)
    quantize_(quantized, "w8a8", progress=False)
    device = components["vae"].device
    pipes = (pipe_class(**components, transformer=model, **more) for model in (transformer, quantized))
    return tuple(pipe.to(device) for pipe in pipes)  # type: ignore[return-value]


def control(name: str) -> dict[str, Any]:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    return {
        "FluxKontextPipeline": {"image": image(), "max_area": 32 * 32, "_auto_resize": False},
        "FluxFillPipeline": {"image": image(), "mask_image": mask},
        "FluxImg2ImgPipeline": {"image": image(), "strength": 0.5, "num_inference_steps": 4},
        "FluxInpaintPipeline": {"image": image(), "mask_image": mask, "strength": 0.9},
    }[name]


@pytest.mark.parametrize(
    "name", ["FluxKontextPipeline", "FluxFillPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"]
)
def test_variants_that_read_an_image(components: dict[str, Any], fused_calls: list[str], name: str) -> None:
    import diffusers

    channels = 384 if name == "FluxFillPipeline" else 64  # latents, masked latents and mask side by side
    transformer = random_(diffusers.FluxTransformer2DModel(in_channels=channels, out_channels=64, **SIZES))
    plain, quantized = both(getattr(diffusers, name), components, transformer)
    options = control(name)
    theirs = draw(plain, **options)
    assert not fused_calls
    ours = draw(quantized, **options)
    assert {"double", "single"} == set(fused_calls)
    assert apart(ours, theirs) < CLOSE
    other = draw(quantized, **(options | {"image": torch.zeros(1, 3, 32, 32)}))
    assert apart(other, ours) > 3 * apart(ours, theirs)


def test_redux_conditions_on_an_image(components: dict[str, Any], fused_calls: list[str]) -> None:
    from diffusers import FluxPipeline, FluxPriorReduxPipeline, FluxTransformer2DModel
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=32
        )
    )
    texts = {name: components[name] for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    prior = FluxPriorReduxPipeline(
        random_(vision, seed=6),
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        random_(ReduxImageEncoder(redux_dim=32, txt_in_features=64)),
        **texts,
    ).to(components["vae"].device)
    plain, quantized = both(FluxPipeline, components, random_(FluxTransformer2DModel(in_channels=64, **SIZES)))
    embeds = [
        dict(prior(Image.fromarray((255 * image(seed)[0].permute(1, 2, 0)).byte().numpy()), prompt="a red cube"))
        for seed in (1, 2)
    ]
    assert embeds[0]["prompt_embeds"].shape[1] > 512  # text and image tokens
    embeds = [{key: value[:, -8:] if key == "prompt_embeds" else value for key, value in e.items()} for e in embeds]
    (ours, other), theirs = (draw(quantized, prompt=None, **e) for e in embeds), draw(plain, prompt=None, **embeds[0])
    assert set(fused_calls) == {"double", "single"}
    assert apart(ours, theirs) < CLOSE
    assert apart(other, ours) > 3 * apart(ours, theirs)


@pytest.fixture(scope="module")
def controlnet() -> Any:
    from diffusers import FluxControlNetModel

    return random_(FluxControlNetModel(in_channels=64, **SIZES), seed=8)


def test_a_controlnet_steers_the_quantized_transformer_and_is_quantized_itself(
    components: dict[str, Any], controlnet: Any, fused_calls: list[str], tmp_path: Path
) -> None:
    from diffusers import FluxControlNetPipeline, FluxTransformer2DModel

    transformer = random_(FluxTransformer2DModel(in_channels=64, **SIZES))
    plain, quantized = both(FluxControlNetPipeline, components, transformer, controlnet=controlnet)
    theirs = draw(plain, control_image=image())
    ours = draw(quantized, control_image=image())
    assert set(fused_calls) == {"double", "single"}
    assert apart(ours, theirs) < CLOSE
    assert apart(draw(quantized, control_image=image(), controlnet_conditioning_scale=0.0), ours) > 2 * CLOSE
    own = FluxControlNetPipeline(**components, transformer=quantized.transformer, controlnet=quantized_(controlnet))
    own.to(quantized.device)
    steps = len(fused_calls)
    drawn = draw(own, control_image=image())
    assert len(fused_calls) - steps == 8  # two steps, one double and one single block in each of both models
    assert apart(drawn, theirs) < 1.5 * CLOSE
    save_quantized(own.controlnet, tmp_path / "controlnet")
    loaded = load_quantized(tmp_path / "controlnet", device=str(quantized.device))
    again = FluxControlNetPipeline(**components, transformer=quantized.transformer, controlnet=loaded)
    assert_equal(draw(again, control_image=image()), drawn)


def quantized_(controlnet: Any) -> Any:
    import copy

    made = copy.deepcopy(controlnet)
    quantize_(made, "w8a8", progress=False)
    assert isinstance(made.transformer_blocks[0].attn.to_q, ConvLinear4bit)
    for kept in (made.controlnet_x_embedder, *made.controlnet_blocks, *made.controlnet_single_blocks):
        assert type(kept) is nn.Linear
    return made


def ip_adapter() -> dict[str, Any]:
    """Four image tokens from a CLIP embedding of 16 values, for one double block."""
    generator = torch.Generator().manual_seed(9)
    rand = lambda *shape: torch.randn(shape, generator=generator) * 0.5  # noqa: E731
    projection = {"proj.weight": rand(256, 16), "proj.bias": rand(256)}
    projection |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}
    attention = {f"0.to_{part}_ip.weight": rand(512, 64) for part in "kv"}
    attention |= {f"0.to_{part}_ip.bias": rand(512) for part in "kv"}
    return {"image_proj": projection, "ip_adapter": attention}


def adapted(embeds: list[Tensor]) -> dict[str, Any]:
    """Without its own negative, FluxPipeline encodes a black image, for which there is no encoder here."""
    return {"ip_adapter_image_embeds": embeds, "negative_ip_adapter_image_embeds": embeds}


def test_an_ip_adapter_takes_the_blocks_over_and_gives_them_back(
    components: dict[str, Any], fused_calls: list[str]
) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    plain, quantized = both(FluxPipeline, components, random_(FluxTransformer2DModel(in_channels=64, **SIZES)))
    before = draw(quantized)
    assert set(fused_calls) == {"double", "single"}
    for pipe in (plain, quantized):
        pipe.load_ip_adapter(ip_adapter(), weight_name=None, image_encoder_pretrained_model_name_or_path=None)
    fused_calls.clear()
    embeds = [[torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()] for seed in (1, 2)]
    theirs = draw(plain, **adapted(embeds[0]))
    ours, other = (draw(quantized, **adapted(embed)) for embed in embeds)
    assert not fused_calls  # its processor adds what a fused block knows nothing of
    assert apart(ours, theirs) < CLOSE
    assert apart(ours, before) > 2 * CLOSE
    assert apart(other, ours) > CLOSE
    quantized.set_ip_adapter_scale(0.0)
    assert apart(draw(quantized, **adapted(embeds[0])), before) < CLOSE
    quantized.unload_ip_adapter()
    assert_equal(draw(quantized), before)
    assert set(fused_calls) == {"double", "single"}
