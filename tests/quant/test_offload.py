"""Offloading: what is chosen for FLUX.1 on cards of several sizes, why, and that placing changes no image."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import convrot_quant.offload
from convrot_quant import QuantConfig
from convrot_quant.fuse import unfuse_
from convrot_quant.generation import Settings, generate
from convrot_quant.offload import Names, Offload, apply, budget, choose, components
from convrot_quant.pipeline import ModelFolder, fill_pipeline, open_folder, outline_pipeline
from convrot_quant.streaming import outline

MINI_FLUX = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights"
OURS = QuantConfig.preset("ours")
GB = 10**9
ALL = ("text_encoder", "text_encoder_2", "transformer", "vae")
T5 = ("text_encoder_2",)
REST = ("text_encoder", "transformer", "vae")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """FLUX.1-dev in its real sizes, quantized, on the meta device."""
    # filling 60 GB of empty memory, each piece of which goes to the meta device at once, would take half a minute
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return _flux(tmp_path_factory.mktemp("flux"))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def _flux(folder: Path) -> Any:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}))
    t5_sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    clip_sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with init_empty_weights():
        t5 = T5EncoderModel(T5Config(**t5_sizes, feed_forward_proj="gated-gelu"))
        clip = CLIPTextModel(CLIPTextConfig(**clip_sizes))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    t5.encoder.embed_tokens = t5.shared  # tied, which the meta device forgets
    vae, clip, t5 = (module.to(torch.bfloat16) for module in (vae, clip, t5))
    return FluxPipeline(None, vae, clip, None, t5, None, outline(folder, "ours"))


def test_flux_has_the_sizes_of_flux(flux: Any) -> None:
    found = {c.name: c for c in components(flux, Settings())}
    assert list(found) == list(ALL)  # the order in which they run
    assert {name: round(c.bytes / GB, 2) for name, c in found.items()} == {
        "text_encoder": 0.25,
        "text_encoder_2": 9.52,
        "transformer": 6.06,
        "vae": 0.17,
    }
    assert found["text_encoder_2"].layer_bytes == 32128 * 4096 * 2  # the embedding
    assert found["transformer"].layer_bytes < 0.04 * GB
    # 4096 image and 512 text tokens of 15360 columns, 6 times; 1024 x 1024 pixels of 256 channels, 5 times; in 2 bytes
    assert found["transformer"].scratch == 4 * 2**28 >= 4608 * 15360 * 2 * 6
    assert found["vae"].scratch == 10 * 2**28 == 1024 * 1024 * 256 * 2 * 5
    assert all(c.swaps and c.streams for c in found.values())
    assert [c.runs for c in found.values()] == [1, 1, Settings().steps, 1]
    # the scales of the codes, 4 bytes for each of a layer's outputs
    assert 0.01 * GB < found["transformer"].buffers < 0.02 * GB
    assert found["text_encoder_2"].buffers == 0


@pytest.mark.parametrize(
    ("gigabytes", "steps", "streamed", "swapped", "peak", "seconds"),
    [
        (4, 28, (*T5, "transformer"), (), 3.11, 8.97),
        (6, 28, (*T5, "transformer"), (), 3.11, 8.97),
        (8, 28, T5, ("transformer", "vae"), 7.38, 3.59),
        (8, 4, (*T5, "transformer"), (), 3.11, 1.69),  # 4 times 6 GB one way are less than one time both ways
        (12, 28, T5, (), 9.16, 0.48),
        (16, 28, T5, (), 9.16, 0.48),
        (16, 4, T5, (), 9.16, 0.48),
        (24, 28, (), (), 18.69, 0.0),
    ],
)
def test_choices_for_flux(
    flux: Any, gigabytes: int, steps: int, streamed: Names, swapped: Names, peak: float, seconds: float
) -> None:
    chosen = choose(flux, gigabytes * GB, Settings(steps=steps))
    assert (chosen.streamed, chosen.swapped) == (streamed, swapped)
    assert chosen.method == ("group" if streamed else "none")
    assert chosen.peak <= gigabytes * GB * 15 / 16
    assert (round(chosen.peak / GB, 2), round(chosen.seconds, 2)) == (peak, seconds)
    assert not chosen.tiles
    assert {*chosen.resident, *chosen.streamed, *chosen.swapped} == set(ALL)


def test_the_line_says_what_is_done_and_why(flux: Any) -> None:
    assert str(choose(flux, 8 * GB, Settings())) == (
        "GPU memory: about 6.88 GiB of 7.45 GiB (all at once would need 17.4 GiB); one at a time: transformer "
        "(5.65 GiB), vae (160 MiB); layer by layer: text_encoder_2 (8.87 GiB); all the time: text_encoder (235 MiB); "
        "moving takes about 3.6 s an image"
    )
    whole = str(choose(flux, 48 * GB, Settings()))
    assert whole.startswith("GPU memory: about 17.4 GiB of 44.7 GiB; all the time: ")
    assert "moving" not in whole
    data = choose(flux, 8 * GB, Settings()).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert (data["method"], data["streamed"], data["vram_bytes"]) == ("group", list(T5), 8 * GB)
    assert round(data["moving_seconds"], 2) == 3.59


def test_large_images_are_decoded_in_tiles_only_where_they_must_be(flux: Any) -> None:
    large = Settings(height=2048, width=2048)
    small_card, large_card = choose(flux, 8 * GB, large), choose(flux, 24 * GB, large)
    assert (small_card.tiles, large_card.tiles) == (True, False)
    assert str(small_card).endswith("; the VAE decodes in tiles")
    by_name = {c.name: c for c in components(flux, large)}
    assert by_name["vae"].scratch == 4 * by_name["vae"].tiled_scratch
    assert by_name["transformer"].scratch > 2.5 * 2**30


def test_what_cannot_fit_is_refused_with_a_number_that_does(flux: Any) -> None:
    with pytest.raises(ValueError, match=r"954 MiB of GPU memory cannot hold this run: it needs 2.70 GiB, ") as caught:
        choose(flux, GB, Settings())
    needed = float(str(caught.value).split("it needs ")[1].split(" GiB")[0])
    assert choose(flux, int(needed * 2**30), Settings()).method == "group"
    with pytest.raises(ValueError, match="cannot hold this run"):
        choose(flux, int((needed - 0.2) * 2**30), Settings())


def test_a_negative_prompt_takes_twice_the_scratch_and_runs_text_encoders_twice(
    flux: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {c.name: c.scratch for c in components(flux, Settings(height=2048, width=2048))}

    def guided(
        self: Any, prompt: str, negative_prompt: str, num_inference_steps: int, height: int, width: int,
        callback_on_step_end: object, guidance_scale: float = 7.0, max_sequence_length: int = 512,
    ) -> None:  # fmt: skip
        """A pipeline that runs the prompt and its negative as one batch."""

    monkeypatch.setattr(type(flux), "__call__", guided)
    parts = components(flux, Settings(height=2048, width=2048))
    after = {c.name: c.scratch for c in parts}
    assert after["transformer"] > 1.9 * before["transformer"]
    assert after["vae"] == before["vae"]
    assert [c.runs for c in parts] == [2, 2, Settings().steps, 1]  # a step takes both as one batch


def outlined(folder: ModelFolder) -> Any:
    return outline_pipeline(folder, OURS)


def test_mini_flux_fits_as_it_is_wherever_its_scratch_does() -> None:
    pipe = outlined(open_folder(MINI_FLUX))
    chosen = choose(pipe, 500 * 10**6, Settings())
    assert (chosen.method, chosen.tiles) == ("none", False)
    assert sum(c.bytes for c in chosen.components) < 30 * 10**6
    assert all(c.scratch == 2**28 for c in chosen.components)
    with pytest.raises(ValueError, match=r"191 MiB of GPU memory cannot hold this run: it needs 307 MiB"):
        choose(pipe, 200 * 10**6, Settings())


def ways(pipe: Any) -> dict[str, Offload]:
    """Every way to place mini-flux that runs on a CPU, by hand: none is due."""
    parts = tuple(components(pipe, Settings()))
    return {
        "none": Offload("none", (), (), False, 0, 0, 0, parts),
        "model": Offload("model", (), ALL, False, 0, 0, 0, parts),
        "streamed and swapped": Offload("group", T5, REST, False, 0, 0, 0, parts),
        "text encoder streamed": Offload("group", T5, (), False, 0, 0, 0, parts),
        "streamed and resident": Offload("group", ("transformer", *T5), (), False, 0, 0, 0, parts),
        "all streamed": Offload("group", ALL, (), False, 0, 0, 0, parts),
    }


@pytest.mark.parametrize(
    "way", ["model", "streamed and swapped", "text encoder streamed", "streamed and resident", "all streamed"]
)
def test_placing_changes_no_image(way: str) -> None:
    folder = open_folder(MINI_FLUX)

    def draw(way: str) -> list[bytes]:
        pipe = outlined(folder)
        fill_pipeline(pipe, folder, OURS, progress=False)
        unfuse_(pipe.transformer)  # a streamed block runs diffusers' own forward, which rounds more often
        apply(pipe, ways(pipe)[way], "cpu")
        pictures = generate(pipe, ["a red cube", "a blue sphere"], Settings(steps=2), progress=False)
        return [numpy.array(picture.image).tobytes() for picture in pictures]

    assert draw(way) == draw("none")


def test_swapped_components_send_each_other_away_round_and_round() -> None:
    folder = open_folder(MINI_FLUX)
    pipe = outlined(folder)
    fill_pipeline(pipe, folder, OURS, progress=False)
    apply(pipe, ways(pipe)["streamed and swapped"], "cpu")
    before = {name: getattr(pipe, name)._hf_hook.prev_module_hook.model for name in REST}
    assert before == {"text_encoder": pipe.vae, "transformer": pipe.text_encoder, "vae": pipe.transformer}
    assert not hasattr(pipe.text_encoder_2, "_hf_hook")


def test_sequential_offload_and_tiles_are_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Pipe:
        vae = nn.Module()

        def enable_sequential_cpu_offload(self, *, device: str) -> None:
            calls.append(device)

    monkeypatch.setattr(Pipe.vae, "enable_tiling", lambda: calls.append("tiles"), raising=False)
    apply(Pipe(), Offload("sequential", ALL, (), True, 0, 0, 0, ()), "cuda:1")
    assert calls == ["tiles", "cuda:1"]


def test_the_budget_is_what_is_free_or_a_limit_that_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(convrot_quant.offload, "_limited", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (20 * GB, 24 * GB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: limits.append((share, index))
    )
    assert budget("cuda", None) == 20 * GB
    assert limits == []
    assert budget("cuda", 12 * GB) == 12 * GB
    assert budget("cuda:1", 24 * GB) == 20 * GB
    assert limits == [(0.5, 0), (1.0, 1)]
    with pytest.raises(ValueError, match=r"29.8 GiB is more memory than cuda has \(22.4 GiB\); give less"):
        budget("cuda", 32 * GB)
    assert budget("cpu", None) is None
    del limits[:]
    assert budget("cuda", None) == 20 * GB
    assert budget("cuda", None) == 20 * GB
    assert limits == [(1.0, 0)]  # lifted for a run without a limit, once; the other GPU's stays
