"""Plan: a dict that prints as a table and goes to JSON and back."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from convrot_quant import Plan, Scheme, plan
from convrot_quant.plans import size_text

LAST = "single_transformer_blocks.1.proj_out"


@pytest.fixture
def decided(make_flux: Callable[..., nn.Module]) -> Plan:
    return plan(make_flux(), "ours")


def test_is_the_dict_of_quantized_layers(decided: Plan) -> None:
    assert isinstance(decided, dict)
    assert decided[LAST] == replace(Scheme.parse("W4A4"), activation_clip=0.775)  # attention and GELU
    assert not set(decided) & set(decided.reasons)
    assert len(decided) + len(decided.reasons) == len(decided.layers) == 36


def test_bytes_are_those_of_the_model(make_flux: Callable[..., nn.Module], decided: Plan) -> None:
    expected = sum(p.numel() * p.element_size() for p in make_flux().parameters())
    assert decided.bytes_before == expected
    layer = next(layer for layer in decided.layers if layer.name == LAST)
    assert layer.bytes_before == 512 * 2560 * 2 + 512 * 2
    assert layer.bytes_after == 512 * 2560 // 2 + 512 * 4 + 512 * 2


def test_prints_as_a_table_that_folds_like_blocks(decided: Plan) -> None:
    text = str(decided)
    rows = [line for line in text.splitlines() if "proj_out" in line]
    expected = "single_transformer_blocks.{0-1}.proj_out  2 512 x 2560 5.00 MiB 1.26 MiB W4A4 g256"
    assert rows[0].split() == expected.split()
    assert rows[1].endswith("16-bit: output layer")
    total = "total 36 layers 36.3 MiB -> 11.7 MiB (3.11x smaller)"
    assert text.splitlines()[-1].split() == total.split()
    assert len(decided.rows(fold=False)) == 36 > len(decided.rows())


@pytest.mark.parametrize("width", [60, 80, 140])
def test_rich_shows_every_layer_in_any_width(decided: Plan, width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(decided)
    shown = console.export_text()
    joined = "".join(line[: shown.index("count") - shown.index("layer")].strip() for line in shown.splitlines())
    assert "single_transformer_blocks.{0-1}.proj_out" in joined
    assert max(map(len, shown.splitlines())) <= width


def test_json_round_trip(decided: Plan) -> None:
    again = Plan.from_json(decided.to_json())
    assert again == decided
    assert again.layers == decided.layers
    assert again.config == decided.config
    assert list(again) == list(decided)
    assert str(again) == str(decided)


def test_copies_keep_everything(decided: Plan) -> None:
    for again in (copy.deepcopy(decided), pickle.loads(pickle.dumps(decided))):
        assert isinstance(again, Plan)
        assert again.to_dict() == decided.to_dict()


def test_edits_show_and_survive_json(decided: Plan) -> None:
    del decided[LAST]
    decided["single_transformer_blocks.0.proj_out"] = Scheme.parse("W8A8")
    again = Plan.from_json(decided.to_json())
    assert again.reasons[LAST] == "taken out by hand"
    assert again["single_transformer_blocks.0.proj_out"].name == "W8A8"
    assert again.bytes_after == decided.bytes_after > plan_bytes(decided)


def plan_bytes(decided: Plan) -> int:
    return decided.other_bytes + sum(layer.bytes_after for layer in decided.planned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1; got 2; upgrade convrot-quant"),
        ({"layers": [{}]}, "the key 'name' is missing"),
        (
            {"layers": [{"name": [], "shape": [1, 1], "dtype": "int8", "bias_bytes": 0, "note": ""}]},
            "a layer has a name",
        ),
        ({"other_bytes": -1}, "other_bytes a number of bytes"),
        ({"config": {"x": 1}}, "unknown key 'x'"),
    ],
)
def test_json_errors_name_the_place(decided: Plan, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(decided.to_dict() | change))


def test_a_layer_listed_twice_is_refused(decided: Plan) -> None:
    data = decided.to_dict()
    again = data["layers"][3] | {"scheme": None}
    message = f"every layer must be listed once; '{again['name']}' is there 2 times"
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(data | {"layers": [*data["layers"], again]})


def test_json_errors_for_no_plan_at_all() -> None:
    with pytest.raises(ValueError, match="Plan: not valid JSON"):
        Plan.from_json("{")
    with pytest.raises(ValueError, match="format_version must be 1; got None"):
        Plan.from_json("[]")


def test_size_text_has_three_digits() -> None:
    sizes = (0, 512, 1000, 1536, 10 * 2**20, 2**30, 22.168 * 2**30, 5e13)
    expected = ["0 B", "512 B", "0.98 KiB", "1.50 KiB", "10.0 MiB", "1.00 GiB", "22.2 GiB", "46566 GiB"]
    assert [size_text(n) for n in sizes] == expected


def test_planning_reads_no_values(make_flux: Callable[..., nn.Module]) -> None:
    assert plan(make_flux().to("meta")) == plan(make_flux())
    assert torch.is_grad_enabled()
