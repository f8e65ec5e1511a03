"""The shipped pipeline: what it is, that it draws its captions, and that it still does in 4 bits."""

import json
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from convrot_quant import load_quantized, quantize_, save_quantized
from mini_flux.evaluate import draw_captions, judge_figures, read_images
from mini_flux.judge import Verdict, judge_images, labels, load_judge
from mini_flux.parts import load_pipeline
from mini_flux.render import place, render
from mini_flux.scenes import caption, held_out_scenes

HOME = Path(__file__).parents[2] / "apps" / "mini-flux"
WEIGHTS, JUDGE = HOME / "weights", HOME / "judge.safetensors"
COUNT, STEPS = 12, 8


@cache
def drawn(preset: str | None) -> torch.Tensor:
    pipe = load_pipeline(WEIGHTS)
    if preset is not None:
        quantize_(pipe.transformer, preset, progress=False)
    return draw_captions(pipe, [caption(s) for s in held_out_scenes(COUNT)], steps=STEPS, batch=12)


def verdict(preset: str | None) -> Verdict:
    return judge_images(read_images(load_judge(JUDGE), drawn(preset)), held_out_scenes(COUNT))


def test_it_is_a_flux_with_two_groups_a_row():
    config = json.loads((WEIGHTS / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert config["num_attention_heads"] * config["attention_head_dim"] == 512
    assert config["in_channels"] == 64
    assert config["guidance_embeds"]
    assert config["num_layers"] >= 1
    assert config["num_single_layers"] >= 1
    assert json.loads((WEIGHTS / "vae" / "config.json").read_text())["latent_channels"] == 16


def test_weights_are_small_enough_to_ship():
    files = [*WEIGHTS.rglob("*.safetensors"), JUDGE]
    assert sum(f.stat().st_size for f in files) <= 64e6
    assert max(f.stat().st_size for f in files) <= 15e6
    assert JUDGE.stat().st_size <= 2e6
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_tokenizers_know_every_caption_word():
    pipe = load_pipeline(WEIGHTS)
    for scene in held_out_scenes(200):
        text = caption(scene)
        assert pipe.tokenizer_2.unk_token_id not in pipe.tokenizer_2(text).input_ids
        assert len(pipe.tokenizer_2(text).input_ids) <= 32
        assert pipe.tokenizer.decode(pipe.tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_the_judge_reads_renderings():
    scenes = held_out_scenes(60, seed=3)
    batch = place(scenes, "a test")
    images = torch.cat([render(batch[i : i + 20]) for i in range(0, 60, 20)])
    seen = read_images(load_judge(JUDGE), images)
    assert judge_images(seen, scenes).all >= 0.9
    assert (seen == labels(scenes)).float().mean() >= 0.97


def test_the_judge_was_97_percent_right_on_held_out_renderings():
    figures = judge_figures(JUDGE)
    assert figures["verdict_images"] >= 1000
    for what in ("object", "color", "relation", "all"):
        assert figures[f"verdict_{what}"] >= 0.97


def test_bf16_pictures_show_their_captions():
    """On a dozen captions; the committed figures over 500 are in docs/quality.md."""
    right = verdict(None)
    assert right.object >= 0.8
    assert right.color >= 0.8
    assert right.relation >= 0.8
    assert right.all >= 0.75


def test_4_bit_pictures_stay_recognizable():
    right = verdict("ours")
    assert right.object >= 0.8
    assert right.color >= 0.8
    assert right.relation >= 0.8
    error = (drawn("ours") - drawn(None)).pow(2).mean((1, 2, 3))
    assert (-10 * error.log10()).median() >= 25  # dB; unrelated scenes are at about 12


def test_more_bits_are_closer_to_bf16():
    def psnr(preset: str) -> float:
        return float((-10 * (drawn(preset) - drawn(None)).pow(2).mean((1, 2, 3)).log10()).mean())

    assert psnr("w8a8") > psnr("ours") + 10


@pytest.mark.slow  # reads the clock
@pytest.mark.parametrize("preset", [None, "ours"])
def test_a_20_step_picture_takes_at_most_ten_seconds(preset):
    pipe = load_pipeline(WEIGHTS)
    if preset is not None:
        quantize_(pipe.transformer, preset, progress=False)
    text = [caption(held_out_scenes(1)[0])]
    draw_captions(pipe, text, steps=1)  # first-call costs are not a picture's
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        draw_captions(pipe, text, steps=20)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 10


def test_a_picture_does_not_depend_on_its_batch():
    """Same noise for the same seed; bf16 products differ a little with the batch's size, pictures hardly."""
    pipe = load_pipeline(WEIGHTS)
    text = [caption(held_out_scenes(COUNT)[5])]
    alone = draw_captions(pipe, text, steps=STEPS, seed=105)
    assert (alone[0] - drawn(None)[5]).abs().mean() < 0.02


def test_saved_and_reloaded_4_bit_transformer_draws_the_same(tmp_path):
    pipe = load_pipeline(WEIGHTS)
    quantize_(pipe.transformer, progress=False)
    text = [caption(s) for s in held_out_scenes(2)]
    before = draw_captions(pipe, text, steps=3)
    save_quantized(pipe.transformer, tmp_path / "4bit")
    pipe.transformer = load_quantized(tmp_path / "4bit")
    assert torch.equal(draw_captions(pipe, text, steps=3), before)
    size = sum(f.stat().st_size for f in (tmp_path / "4bit").glob("*.safetensors"))
    full = sum(f.stat().st_size for f in (WEIGHTS / "transformer").glob("*.safetensors"))
    assert size < full / 3
