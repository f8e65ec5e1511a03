"""Scenes, captions, renderer and the judge's arithmetic: what the training set and every accuracy figure rest on."""

import random

import pytest
import torch

from mini_flux.data import draw
from mini_flux.evaluate import chance
from mini_flux.judge import HEADS, judge_images, labels
from mini_flux.render import RGB, place, render
from mini_flux.scenes import (
    COLORS,
    OPPOSITE,
    Scene,
    Thing,
    caption,
    held_out,
    held_out_scenes,
    is_held_out,
    random_scene,
)

SPHERE, CUBE, CYLINDER, CONE = range(4)
RED, GREEN, BLUE = range(3)


def two(relation: int, first: int = RED, second: int = BLUE) -> Scene:
    return Scene((Thing(SPHERE, first, 0, 1), Thing(CUBE, second, 0, 1)), relation, 0)


def test_no_training_scene_has_a_held_out_pair():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(3000)]
    pairs = [s for s in scenes if len(s.things) == 2]
    assert len(pairs) > 2000
    assert not any(is_held_out(s) for s in pairs)


def test_test_scenes_are_different_and_all_held_out():
    scenes = held_out_scenes(500)
    assert len(set(scenes)) == 500
    assert all(is_held_out(s) for s in scenes)
    assert scenes == held_out_scenes(500)
    kinds = {tuple(sorted((t.color, t.shape) for t in s.things)) for s in scenes}
    assert len(kinds) > 30  # not one pair over and over
    assert {s.relation for s in scenes} == {0, 1, 2, 3}


def test_holding_out_does_not_depend_on_the_order():
    things = [(c, s) for c in range(8) for s in range(4)]
    assert all(held_out(a, b) == held_out(b, a) for a in things for b in things)
    share = sum(held_out(a, b) for a in things for b in things if a < b) / (32 * 31 / 2)
    assert 0.05 < share < 0.15


def test_plain_caption_says_everything():
    assert caption(two(0)) == "a large matte red sphere left of a large matte blue cube on a plain floor"
    single = Scene((Thing(CONE, 6, 1, 0),), 0, 1)
    assert caption(single) == "a small shiny orange cone on a checkered floor"


def test_varied_captions_turn_the_relation_when_they_turn_the_things():
    rng = random.Random(1)
    seen = {caption(two(0), rng) for _ in range(400)}
    assert any("red" in c.split(" left of ")[0] for c in seen if " left of " in c)
    assert all("red" in c.split(" left of ")[0] for c in seen if " left of " in c and "to the" not in c)
    assert all("blue" in c.split(" right of ")[0] for c in seen if " right of " in c and "to the" not in c)


def centre(image: torch.Tensor, color: int) -> tuple[float, float]:
    """(x, y) of the pixels whose hue is nearest to a palette colour, in 0..1 from the top left."""
    rgb = torch.tensor(RGB[color])
    hue = image / image.norm(dim=0, keepdim=True).clamp_min(1e-3)
    near = (hue * (rgb / rgb.norm())[:, None, None]).sum(0) > 0.97
    assert near.sum() > 30, f"no {COLORS[color]} in the picture"
    y, x = near.nonzero().float().mean(0).tolist()
    return x / image.shape[2], y / image.shape[1]


@pytest.mark.parametrize("relation", range(4))
def test_rendered_things_stand_as_the_relation_says(relation):
    image = render(place([two(relation)], 3), size=64)[0]
    (xr, yr), (xb, yb) = centre(image, RED), centre(image, BLUE)
    apart = {0: xb - xr, 1: xr - xb, 2: yr - yb, 3: yb - yr}[relation]  # nearer to the camera is lower
    assert apart > 0.1


def test_rendering_repeats_and_depends_on_the_place_seed():
    scenes = [two(0), two(3)]
    once, again, other = (render(place(scenes, seed), size=32) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == (2, 3, 32, 32)
    assert once.min() >= 0
    assert once.max() <= 1


def test_scenes_are_not_mirror_symmetric():
    """The lamp stands on the left: mirrored floors differ clearly, which is what tells left from right."""
    image = render(place([Scene((Thing(SPHERE, 7, 0, 0),), 0, 0)], 0), size=32)[0]
    assert image[:, :, :8].mean() > image[:, :, -8:].mean() + 0.05


def test_drawing_does_not_depend_on_the_number_of_cores(monkeypatch):
    import mini_flux.data as data

    monkeypatch.setattr(data, "CHUNK", 40)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)
    one = draw(100, 2, seed=5)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 4)
    many = draw(100, 2, seed=5)
    assert one.captions == many.captions
    assert torch.equal(one.labels, many.labels)
    assert torch.equal(one.batch.x, many.batch.x)


def test_judging_a_perfect_reading_is_all_right():
    scenes = held_out_scenes(40)
    verdict = judge_images(labels(scenes), scenes)
    assert (verdict.object, verdict.color, verdict.relation, verdict.all) == (1, 1, 1, 1)
    assert (verdict.material, verdict.size, verdict.floor, verdict.images) == (1, 1, 1, 40)


def test_a_swapped_relation_is_wrong_alone():
    """Seen the other way round: every thing is there, only the relation is not."""
    scenes = [s for s in held_out_scenes(60) if s.things[0].shape != s.things[1].shape]
    mirrored = [Scene(s.things, OPPOSITE[s.relation], s.floor) for s in scenes]
    verdict = judge_images(labels(mirrored), scenes)
    assert (verdict.object, verdict.color, verdict.relation, verdict.all) == (1, 1, 0, 0)


def test_a_wrong_colour_is_wrong_alone():
    seen = labels([two(0, RED, GREEN)])
    verdict = judge_images(seen, [two(0)])
    assert (verdict.object, verdict.color, verdict.relation, verdict.all) == (1, 0, 1, 0)


def test_an_undecidable_order_counts_as_wrong():
    """Both things came out as green cylinders: neither order agrees better, so the relation is not right."""
    alike = Scene((Thing(CYLINDER, GREEN, 0, 1), Thing(CYLINDER, GREEN, 0, 1)), 0, 0)
    assert judge_images(labels([alike]), [two(0)]).relation == 0


def test_chance_is_far_below_right():
    scenes = held_out_scenes(200)
    by_chance = chance(labels(scenes), scenes)
    assert by_chance.all < 0.05
    assert 0.1 < by_chance.relation < 0.45
    assert by_chance.object < 0.4


def test_heads_and_labels_agree():
    scenes = held_out_scenes(30)
    table = labels(scenes)
    assert table.shape == (30, len(HEADS))
    assert all(0 <= int(v) < n for row in table for v, n in zip(row, HEADS.values(), strict=True))


def test_a_recipe_keeps_its_shares_in_another_time():
    from mini_flux.train import Recipe

    short = Recipe().lasting(1.0)
    assert short.vae_seconds + short.judge_seconds + short.flow_seconds + short.distill_seconds == pytest.approx(60)
    assert short.flow_seconds / short.vae_seconds == pytest.approx(Recipe().flow_seconds / Recipe().vae_seconds)
    assert short.scenes == Recipe().scenes


def test_the_command_line_draws_scenes(tmp_path):
    from PIL import Image
    from typer.testing import CliRunner

    from mini_flux.cli import app

    result = CliRunner().invoke(app, ["scenes", str(tmp_path / "scenes.png"), "--count", "2"])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "scenes.png").size == (8 * 128, 128)
    assert CliRunner().invoke(app, ["scenes", "x.png", "--count", "0"]).exit_code == 2
