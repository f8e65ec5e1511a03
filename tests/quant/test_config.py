"""Scheme and QuantConfig: JSON round trips, names, presets, and errors that say what to do."""

import json
import re

import pytest

from convrot_quant import QuantConfig, Scheme
from convrot_quant.presets import PRESETS


@pytest.mark.parametrize("name", ["W4A4", "W4A8", "W4A16", "W8A8", "W8A16"])
def test_parse_reads_the_short_name_in_any_case(name: str) -> None:
    scheme = Scheme.parse(name.lower())
    assert scheme.name == name
    assert scheme == Scheme.parse(f" {name} ")
    assert f"W{scheme.weight_bits}A{scheme.activation_bits}" == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 3}, "Scheme: weight_bits must be one of 4, 8; got 3"),
        ({"activation_bits": 2}, "Scheme: activation_bits must be one of 4, 8, 16; got 2"),
        ({"group_size": 128}, "Scheme: group_size must be one of 16, 64, 256, 1024; got 128"),
        ({"weight_rule": "best"}, "Scheme: weight_rule must be one of 'absmax', 'mse'; got 'best'"),
        ({"weight_rule": "mse", "weight_bits": 8}, "weight_rule='mse' needs weight_bits=4; got weight_bits=8; use"),
        ({"weight_rounding": "up"}, "Scheme: weight_rounding must be one of 'nearest', 'balanced', 'gptq'; got 'up'"),
        ({"activation_rule": ""}, "Scheme: activation_rule must be one of 'absmax'; got ''"),
        ({"activation_clip": 0}, "activation_clip must be a number with 0 < activation_clip <= 1; got 0"),
        ({"activation_clip": 1.5}, "got 1.5"),
        ({"activation_clip": True}, "got True"),
    ],
)
def test_scheme_refuses_a_bad_value_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Scheme(**values)


@pytest.mark.parametrize("name", ["int4", "W4", "W4A4g64", "", "4"])
def test_parse_names_what_it_accepts(name: str) -> None:
    with pytest.raises(ValueError, match="is not a scheme name; use one like W4A4, W4A8"):
        Scheme.parse(name)


def test_a_short_name_means_the_recommended_rules_and_absmax_the_papers() -> None:
    assert Scheme.parse("W4A4-absmax") == Scheme()
    recommended = Scheme.parse("W4A4")
    assert (recommended.weight_rule, recommended.weight_rounding) == ("mse", "balanced")
    assert 0.5 < recommended.activation_clip < 1
    assert Scheme.parse("W8A8").weight_rule == "absmax"


def test_the_paper_presets_hold_nothing_but_the_papers_rules() -> None:
    for name in ("paper", "paper-mixed"):
        config = QuantConfig.preset(name)
        for scheme in (config.scheme, *config.overrides.values()):
            rules = scheme.weight_rule, scheme.weight_rounding, scheme.activation_rule, scheme.activation_clip
            assert rules == ("absmax", "nearest", "absmax", 1.0)


def test_parse_refuses_bits_that_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="weight_bits must be one of 4, 8; got 16"):
        Scheme.parse("W16A16")


def test_scheme_dict_round_trip_and_defaults() -> None:
    scheme = Scheme(8, 8, 64, activation_clip=0.9)
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert Scheme.from_dict({"group_size": 64}) == Scheme(group_size=64)


def test_scheme_refuses_unknown_keys_by_name() -> None:
    with pytest.raises(ValueError, match="Scheme: unknown key 'bits'; known keys are weight_bits, activation_bits"):
        Scheme.from_dict({"bits": 4})
    with pytest.raises(ValueError, match="Scheme: expected an object"):
        Scheme.from_dict([4, 4])  # type: ignore[arg-type]


def test_config_is_frozen_and_copies_its_overrides() -> None:
    overrides = {"a": Scheme()}
    config = QuantConfig(overrides=overrides)
    overrides["b"] = Scheme()
    assert list(config.overrides) == ["a"]
    with pytest.raises(AttributeError):
        config.keep = ("x",)  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip_keeps_the_order_of_overrides(name: str) -> None:
    config = QuantConfig.preset(name)
    again = QuantConfig.from_json(config.to_json())
    assert again == config
    assert list(again.overrides) == list(config.overrides)


def test_config_json_takes_short_scheme_names() -> None:
    config = QuantConfig.from_json('{"scheme": "w4a8", "overrides": {"*.to_v": "W8A8"}, "keep": ["*.to_q"]}')
    assert config == QuantConfig(Scheme.parse("W4A8"), {"*.to_v": Scheme.parse("W8A8")}, ("*.to_q",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "QuantConfig: not valid JSON"),
        ("[]", "QuantConfig: expected an object with the keys scheme, overrides, keep; got list"),
        ('{"skip": []}', "QuantConfig: unknown key 'skip'; known keys are scheme, overrides, keep"),
        ('{"scheme": {"w": 4}}', "Scheme: unknown key 'w'"),
        ('{"overrides": []}', "QuantConfig: overrides must map globs to schemes"),
        ('{"overrides": {"": "W4A4"}}', "QuantConfig: a glob must be a non-empty string"),
        ('{"keep": "x"}', "QuantConfig: keep must be a list of globs"),
    ],
)
def test_config_json_errors_name_the_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantConfig.from_json(text)


def test_config_refuses_a_string_as_keep_and_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match="keep must be a sequence of globs"):
        QuantConfig(keep="proj_out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown preset 'best'; presets are ours, paper, paper-mixed"):
        QuantConfig.preset("best")
    with pytest.raises(ValueError, match=r"the override of '\*' must be a Scheme or a name"):
        QuantConfig(overrides={"*": 4})  # type: ignore[dict-item]


def test_import_is_light() -> None:
    import subprocess
    import sys

    heavy = ("diffusers", "transformers", "torchmetrics", "rich")
    code = f"import sys, convrot_quant; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
