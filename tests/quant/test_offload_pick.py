"""Which placement is picked, on components made by hand: that it fits, moves least, and can be made."""

from typing import Any

import pytest

from convrot_quant.offload import PAGEABLE, PINNED, Component, Offload, pick


def component(name: str, size: int, layer: int, scratch: int, **changes: Any) -> Component:
    values = {"tiled_scratch": scratch, "swaps": True, "streams": True} | changes
    return Component(name, size, layer, scratch, **values)


def test_peaks_count_what_is_there_at_the_same_time() -> None:
    """By hand: a (size 100, layer 10, scratch 5) runs, then b (60, 20, 30)."""
    parts = [component("a", 100, 10, 5), component("b", 60, 20, 30)]
    cases = {
        208: ("none", (), 190),  # 100 + 60, and the larger scratch
        192: ("group", ("b",), 170),  # a stays, b passes in layers of 20, two of them, and 30
        112: ("group", ("a",), 90),  # b stays, a passes in layers of 10 and 5; but b's own scratch is more
        80: ("group", ("a", "b"), 70),  # both pass: two layers of b and 30
        64: ("sequential", ("a", "b"), 50),  # one layer of b and 30
    }
    for vram, (method, streamed, peak) in cases.items():
        chosen = pick(parts, vram)
        assert (chosen.method, chosen.streamed, chosen.peak, chosen.resident_peak) == (method, streamed, peak, 190)


def test_what_streaming_leaves_on_the_gpu_is_counted() -> None:
    parts = [component("a", 100, 10, 5, buffers=8), component("b", 60, 20, 30)]
    chosen = pick(parts, 112)
    assert (chosen.streamed, chosen.peak) == (("a",), 8 + 90)


def test_what_runs_at_every_step_is_swapped_where_there_are_many() -> None:
    """Streamed 9 times it is copied for less long than swapped, 11 times for longer: once each way is 10 times."""
    encoder, vae = component("encoder", 100, 5, 0), component("vae", 10, 1, 0, streams=False)
    few, many = (component("transformer", 900, 10, 0, runs=runs) for runs in (9, 11))
    chosen = pick([encoder, few, vae], 980)
    assert (chosen.streamed, chosen.swapped) == (("transformer",), ())
    chosen = pick([encoder, many, vae], 980)
    assert (chosen.streamed, chosen.swapped, chosen.resident) == (("encoder",), ("transformer", "vae"), ())
    assert chosen.seconds == pytest.approx(100 / PINNED + 2 * 910 / PAGEABLE)


def test_a_vae_is_copied_both_ways_and_every_layer_by_itself_is_pageable() -> None:
    parts = (component("encoder", 100, 10, 0, runs=2), component("vae", 40, 4, 0))
    every = ("encoder", "vae")
    assert Offload("group", every, (), False, 0, 0, 0, parts).seconds == pytest.approx(200 / PINNED + 80 / PAGEABLE)
    assert Offload("sequential", every, (), False, 0, 0, 0, parts).seconds == pytest.approx(280 / PAGEABLE)
    assert Offload("model", (), every, False, 0, 0, 0, parts).seconds == pytest.approx(280 / PAGEABLE)


def test_equal_costs_are_decided_by_what_moves_and_then_by_the_peak() -> None:
    one_or_two = [component("a", 100, 20, 0), component("b", 50, 1, 0), component("c", 50, 1, 0)]
    any_one = [component("a", 100, 20, 0), component("b", 100, 10, 0), component("c", 100, 15, 0)]
    for parts, vram, streamed in ((one_or_two, 154, "a"), (any_one, 260, "b")):
        for order in (parts, parts[::-1]):
            assert pick(order, vram).streamed == (streamed,)


def test_without_streams_all_that_swap_are_swapped_or_none() -> None:
    """A pipeline whose first component waits on the CPU, and that has no streamed one, would draw its noise there."""
    parts = [component(name, size, 1, 0, streams=False) for name, size in (("a", 100), ("b", 60), ("c", 10))]
    assert pick(parts, 190).method == "none"
    chosen = pick(parts, 150)  # a and b swapped and c resident would do
    assert (chosen.method, chosen.swapped) == ("model", ("a", "b", "c"))


def test_a_component_is_never_swapped_alone() -> None:
    parts = [component("encoder", 100, 5, 0), component("transformer", 900, 10, 0, runs=28), component("vae", 10, 1, 0)]
    for vram in range(20, 1200, 10):
        assert len(pick(parts, vram).swapped) != 1


def test_components_that_cannot_move_stay() -> None:
    fixed = component("fixed", 50, 50, 0, swaps=False, streams=False)
    chosen = pick([component("a", 100, 10, 5), component("b", 60, 20, 30), fixed], 128)
    assert (chosen.method, chosen.peak, chosen.resident) == ("group", 50 + 70, ("fixed",))
    with pytest.raises(ValueError, match="cannot hold this run"):
        pick([fixed], 50)


def test_tiles_are_a_last_resort() -> None:
    vae = component("vae", 10, 1, 500, tiled_scratch=100)
    assert pick([vae], 120).tiles
    assert pick([vae], 538).tiles  # layer by layer it would fit in 502
    assert not pick([vae], 1000).tiles
    # beside what cannot move it does not fit, and alone it would
    fixed = component("fixed", 200, 50, 0, swaps=False, streams=False)
    chosen = pick([fixed, vae], 640)
    assert (chosen.tiles, chosen.method, chosen.peak) == (True, "none", 310)
    with pytest.raises(ValueError, match="cannot hold this run"):
        pick([fixed, vae], 300)
    # moving the transformer leaves the image as it is
    chosen = pick([component("transformer", 400, 10, 50, runs=20), vae], 640)
    assert (chosen.tiles, chosen.method) == (False, "model")
