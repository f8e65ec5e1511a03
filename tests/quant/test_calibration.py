"""Calibration and GPTQ: which rows are kept, what rounding by them gains, and `convrot quantize --calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

from convrot_kernels import rotate, unpack_int4
from convrot_quant import (
    Calibration,
    ConvLinear4bit,
    Scheme,
    apply,
    load_and_quantize,
    load_quantized,
    plan,
    quantize_,
    save_quantized,
)
from convrot_quant.cli import app
from convrot_quant.gptq import gptq_codes
from convrot_quant.linear import operand

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
TO_Q = "single_transformer_blocks.0.attn.to_q"
MODULATION = "single_transformer_blocks.0.norm.linear"


def correlated(rows: int, k: int, seed: int = 0) -> Tensor:
    """Rows with few directions that matter, as layers read them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(9)) * torch.logspace(0.5, -1.5, k)[:, None]
    return torch.randn(rows, k, generator=generator) @ mix / 4


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def weight_error(layer: ConvLinear4bit, weight: Tensor, x: Tensor) -> float:
    """Of the product of 16-bit rows with what the codes stand for."""
    return distance(x @ layer.dequantize().weight.float().T, x @ weight.T)


# rounding


def test_codes_undo_the_error_of_the_columns_before() -> None:
    """Two equal columns: what the first loses by rounding, the second takes up."""
    x = torch.randn(64, 1).expand(64, 2)
    codes = gptq_codes(torch.tensor([[1.4, 1.4], [0.3, 2.3]]), torch.ones(2, 1), x, 7)
    assert codes.tolist() == [[1, 2], [0, 3]]
    independent = torch.eye(2).repeat(32, 1)
    assert gptq_codes(torch.tensor([[1.4, 1.4]]), torch.ones(1, 1), independent, 7).tolist() == [[1, 1]]


@pytest.mark.parametrize("rows", [64, 256, 1024])
@pytest.mark.parametrize("order", [0.0, 0.3, 1.0])
def test_few_rows_are_not_believed_more_than_they_show(rows: int, order: float) -> None:
    """On other rows the error is no larger than without, however few were seen and however little order they have."""
    k = 512
    basis = torch.linalg.qr(torch.randn(k, k)).Q
    spread = torch.arange(1, k + 1).float() ** -order
    x, other = (torch.randn(count, k) * spread @ basis for count in (rows, 2000))
    weight = torch.randn(64, k)
    scale = weight.abs().amax(1, keepdim=True) / 10
    errors = [
        distance(other @ (codes * scale).T, other @ weight.T)
        for codes in (gptq_codes(weight, scale, x, 7), (weight / scale).round().clamp(-7, 7))
    ]
    assert errors[0] < (1.01 if order < 1 else 0.5) * errors[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_rounds_as_the_cpu_does() -> None:
    weight, x = torch.randn(32, 256), correlated(512, 256)
    scale = weight.abs().amax(1, keepdim=True) / 7
    codes = gptq_codes(weight.cuda(), scale.cuda(), x, 7).cpu()
    assert (codes != gptq_codes(weight, scale, x, 7)).double().mean() < 0.02  # a tie moves what follows


def test_codes_stay_in_range_and_dead_inputs_change_nothing() -> None:
    weight = 3 * torch.randn(16, 256)
    codes = gptq_codes(weight, torch.full((16, 1), 0.5), torch.zeros(32, 256), 7)
    assert torch.equal(codes, (weight / 0.5).round().clamp(-7, 7).to(torch.int8))
    assert codes.dtype == torch.int8


@pytest.mark.parametrize("name", ["W4A4", "W4A8", "W4A16", "W4A4-r16"])
def test_a_layer_loses_less_on_other_rows_of_the_kind(name: str) -> None:
    linear, scheme = nn.Linear(512, 96, bias=False), Scheme.parse(name)
    calibrated = Scheme.from_dict(scheme.to_dict() | {"weight_rounding": "gptq"})
    x, weight = correlated(64, 512, seed=1), linear.weight.detach()
    layer = ConvLinear4bit.from_linear(linear, calibrated, inputs=correlated(1024, 512))
    plain = ConvLinear4bit.from_linear(linear, scheme)
    assert weight_error(layer, weight, x) < 0.7 * weight_error(plain, weight, x)
    assert distance(layer(x), linear(x)) < distance(plain(x), linear(x))
    assert torch.equal(layer.weight_scale, plain.weight_scale)
    assert layer.weight.shape == plain.weight.shape
    codes, scale = operand(x, scheme)
    if scheme.activation_bits == 4 and not scheme.low_rank:  # the codes are those that the product multiplies
        assert scale is not None
        values = (unpack_int4(codes) if codes.dtype == torch.uint8 else codes).float() * scale[:, None]
        held = rotate(layer.dequantize().weight, 256)
        assert distance(layer(x), values @ held.T) < 1e-5


def test_without_rows_it_is_refused() -> None:
    linear, scheme = nn.Linear(512, 96), Scheme(weight_rounding="gptq")
    for rows in (None, torch.ones(4, 256), torch.ones(0, 512)):
        with pytest.raises(ValueError, match=r"weight_rounding='gptq' needs inputs \(C, 512\), got"):
            ConvLinear4bit.from_linear(linear, scheme, inputs=rows)
    with pytest.raises(ValueError, match="weight_rounding='gptq' needs weight_bits=4; got weight_bits=8"):
        Scheme(8, 8, weight_rounding="gptq")
    model = nn.Sequential(nn.Linear(512, 64))
    with pytest.raises(ValueError, match=r"'0' cannot be quantized: weight_rounding='gptq' needs rows"):
        apply(model, {"0": scheme}, progress=False)
    assert type(model[0]) is nn.Linear


# rows


def test_keeps_rows_of_every_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with Calibration(model, ["0", "1"], calls=3, rows=12) as seen:
        for _ in range(3):
            x = torch.randn(2, 10, 4)
            model(x)
    model(x)  # no longer listened to
    for name in ("0", "1"):
        kept = seen.inputs(name)
        assert kept is not None
        assert kept.shape == (12, 4)
    first = seen.inputs("0")
    assert first is not None
    assert torch.equal(first[-4:], x.flatten(0, 1)[::5])
    assert seen.inputs("2") is None
    for wrong in ({"calls": 0}, {"calls": 1, "rows": 0}):
        with pytest.raises(ValueError, match="calls and rows must be 1 or more"):
            Calibration(model, **wrong)


def test_layers_that_read_the_same_share_their_rows_and_bad_rows_are_left_out() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    x = torch.randn(8, 4)
    x[3, 1] = float("inf")
    with Calibration(model, calls=1) as seen:
        model["q"](x), model["k"](x)
    assert seen._kept["q"][0] is seen._kept["k"][0]
    kept = seen.inputs("k")
    assert kept is not None
    assert torch.equal(kept, x[[0, 1, 2, 4, 5, 6, 7]])


def test_a_tensor_that_was_written_to_is_read_again() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Calibration(model, calls=1) as seen:
            x = torch.ones(8, 4)
            model["q"](x)
            model["k"](x.mul_(2))
            found = seen.inputs("q"), seen.inputs("k")
            assert [float(rows.mean()) for rows in found if rows is not None] == [1, 2]


def test_rows_that_do_not_fit_are_refused_before_a_layer_changes() -> None:
    model = nn.Sequential(nn.Linear(512, 64), nn.Linear(512, 64))
    schemes = {"0": Scheme.parse("W4A4"), "1": Scheme.parse("W4A4")}
    narrow = Calibration.of({"0": torch.ones(300, 512), "1": torch.ones(300, 256)})
    with pytest.raises(ValueError, match=r"'1' cannot be .*: its calibration has rows of 256 values, and K=512"):
        apply(model, schemes, calibration=narrow, progress=False)
    spoiled = Calibration.of({"1": torch.full((300, 512), float("nan"))})
    assert spoiled.rounded(schemes) == schemes  # too few rows are left
    assert type(model[0]) is nn.Linear


# models


@pytest.fixture(scope="module")
def seen(make_flux: Flux, run: Run) -> Calibration:
    model = make_flux(0, 1)
    with Calibration(model, calls=40) as found:
        for seed in range(40):
            run(model, seed)
    return found


@pytest.mark.parametrize("preset", ["ours", "ours-r16"])
def test_a_model_comes_closer_in_the_same_bytes(
    make_flux: Flux, run: Run, seen: Calibration, preset: str, tmp_path: Path
) -> None:
    exact, calibrated, plain = (make_flux(0, 1) for _ in range(3))
    decided = quantize_(calibrated, preset, calibration=seen, progress=False)
    quantize_(plain, preset, progress=False)
    assert {decided[TO_Q].weight_rounding, decided[MODULATION].weight_rounding} == {"gptq", "balanced"}  # 2 rows a call
    assert {layer.name: layer.note for layer in decided.layers}[TO_Q] == "calibrated"
    assert seen.plan(decided).to_dict() == decided.to_dict()
    assert decided.bytes_after == plan(exact, preset).bytes_after
    wanted = [run(exact, seed=seed) for seed in range(95, 101)]
    errors = [sum(distance(run(m, seed=95 + i), out) for i, out in enumerate(wanted)) for m in (calibrated, plain)]
    assert errors[0] < 0.95 * errors[1]
    save_quantized(calibrated, tmp_path / "out")
    again = load_quantized(tmp_path / "out")
    assert torch.equal(run(again), run(calibrated))
    assert again.convrot_plan.to_dict() == decided.to_dict()
    if preset == "ours-r16":
        return
    exact.save_pretrained(tmp_path / "bf16")  # type: ignore[operator]
    streamed = load_and_quantize(tmp_path / "bf16", preset, calibration=seen, progress=False)
    state = calibrated.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in streamed.state_dict().items())


def test_rows_of_elsewhere_and_plain_schemes_do_too(make_flux: Flux, seen: Calibration) -> None:
    rows = seen.inputs(TO_Q)
    assert rows is not None
    one, other = make_flux(0, 1), make_flux(0, 1)
    apply(one, {TO_Q: Scheme.parse("W4A4")}, calibration=Calibration.of({TO_Q: rows}), progress=False)
    apply(other, {TO_Q: Scheme.parse("W4A4")}, calibration=seen, progress=False)
    assert one.get_submodule(TO_Q).scheme.weight_rounding == "gptq"
    assert torch.equal(one.get_submodule(TO_Q).weight, other.get_submodule(TO_Q).weight)


# the command


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_draws_prompts_and_writes_a_pipeline(pipeline_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\na blue sphere\n" * 3)
    out = tmp_path / "out"
    small = ("--steps", 4, "--height", 64, "--width", 64, "--device", "cpu", "--quiet")
    result = convrot("quantize", pipeline_folder, "-o", out, "--calibrate", prompts, *small)
    assert result.exit_code == 0, result.output
    model = load_quantized(out / "transformer")
    roundings = {m.scheme.weight_rounding for m in model.modules() if isinstance(m, ConvLinear4bit)}
    assert roundings == {"gptq", "balanced"}
    assert (out / "model_index.json").is_file()


def test_the_command_refuses_before_it_draws(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded a pipeline before the check")

    monkeypatch.setattr("convrot_quant.cli.runs.load_pipeline", never)
    prompts, there = tmp_path / "prompts.txt", tmp_path / "there"
    prompts.write_text("a red cube\n")
    there.mkdir()
    lora = tmp_path / "style.safetensors"
    for source, out, more, message in (
        (pipeline_folder / "transformer", "out", (), "is a transformer alone"),
        (pipeline_folder, "there", (), "there exists; choose another destination"),
        (pipeline_folder, "out", ("--lora", lora), "give one of the two"),
    ):
        result = convrot("quantize", source, "-o", tmp_path / out, "--calibrate", prompts, *more)
        assert result.exit_code != 0
        assert message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()
