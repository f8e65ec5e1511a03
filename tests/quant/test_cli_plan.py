"""`convrot plan`: budgets in, plans out, for the weights alone and for prompts; errors in one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from convrot_quant import Plan, scores
from convrot_quant.cli import app
from convrot_quant.folders import replace_folder
from convrot_quant.manifest import read_manifest

BUDGET = "15MB"  # between 11.7 and 20.1, all in 4 and all in 8 bits


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = convrot(*arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "ROWS", 64)
        yield


def test_a_budget_becomes_a_plan_that_quantize_takes(pipeline_folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "out"
    made = convrot("plan", pipeline_folder, "--budget", BUDGET, "-o", file)
    assert made.exit_code == 0, made.stderr
    assert "W8A8 g256" in made.stdout
    assert "predicted error 0." in made.stdout
    assert (
        "5 groups of layers read one input each and get one scheme: a fused block quantizes that input" in made.stdout
    )
    assert f"-o FOLDER --plan {file}" in made.stdout
    assert "score" in made.stderr  # the progress bar
    planned = Plan.from_json(file.read_text())
    assert {scheme.name for scheme in planned.values()} == {"W4A4", "W4A16", "W8A8"}
    assert convrot("quantize", pipeline_folder, "-o", out, "--plan", file, "--quiet").exit_code == 0
    manifest = read_manifest(out / "transformer")
    assert manifest.plan == planned
    assert manifest.plan.bytes_after == planned.bytes_after <= 15_000_000


def test_two_runs_write_the_same_file(pipeline_folder: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("a.json", "b.json"))
    for file in (first, second):
        ran = convrot("plan", pipeline_folder / "transformer", "--budget", BUDGET, "-o", file, "--quiet")
        assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "", "")
    assert first.read_bytes() == second.read_bytes()
    again = convrot("plan", pipeline_folder, "--budget", BUDGET, "-o", first)
    assert again.exit_code == 1
    assert again.stderr == f"convrot: {first} exists; choose another destination, or overwrite it (--overwrite)\n"


def test_prompts_calibrate_and_the_plot_has_every_preset(pipeline_folder: Path, tmp_path: Path) -> None:
    prompts, plot = tmp_path / "prompts.txt", tmp_path / "pareto.png"
    prompts.write_text("a red cube\n# no prompt\n")
    options = ("--budget", BUDGET, "--prompts", prompts, "--prompt", "a cone", "--steps", 2, "--pareto", plot)
    data = run_json("plan", pipeline_folder, *options)
    assert data["scored_on"] == ["a cone", "a red cube"]
    presets = data["pareto"]["presets"]
    assert list(presets) == ["ours", "paper", "paper-mixed", "w4a8", "w8a8"]
    assert presets["w8a8"][1] < presets["w4a8"][1] < presets["ours"][1] < presets["paper"][1]
    curve = data["pareto"]["curve"]
    assert curve == sorted(curve)
    assert [error for _, error in curve] == sorted((error for _, error in curve), reverse=True)
    assert curve[0] == pytest.approx(presets["ours"])
    assert curve[-1] == [data["components"]["transformer"]["bytes_before"], pytest.approx(0, abs=1e-6)]
    assert Image.open(plot).size == (1350, 825)
    assert data["components"]["transformer"]["bytes_after"] <= 15_000_000


def test_quantize_takes_the_json_of_a_run(pipeline_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_json("plan", pipeline_folder, "--budget", "21MB", "--schemes", "W8A8,16")))
    quantized = convrot("quantize", pipeline_folder, "-o", tmp_path / "out", "--plan", file, "--quiet")
    assert quantized.exit_code == 0, quantized.stderr
    assert read_manifest(tmp_path / "out" / "transformer").plan.bytes_after <= 21_000_000


def test_a_latency_budget_says_the_time(pipeline_folder: Path) -> None:
    options = ("--latency-budget", "0.15ms", "--tokens", 1024, "--text-tokens", 64, "--machine", "RTX4090")
    made = convrot("plan", pipeline_folder, *options, "--budget", BUDGET, "--no-group", "--quiet", "--json")
    assert made.exit_code == 0, made.stderr
    data = json.loads(made.stdout)
    assert data["budget"] == {"bytes": 15_000_000, "seconds": pytest.approx(0.15e-3)}
    assert 0 < data["seconds"] <= 0.15e-3


def test_options_choose_the_schemes(pipeline_folder: Path) -> None:
    options = ("--schemes", "w4a4,w8a8", "--allow-w4a8", "--keep", "*.to_out.0", "--override", "*.to_add_out=W8A8")
    data = run_json("plan", pipeline_folder, "--budget", "1GB", *options)
    layers = {layer["name"]: layer for layer in data["components"]["transformer"]["plan"]["layers"]}
    assert layers["transformer_blocks.0.attn.to_out.0"]["note"] == "kept by '*.to_out.0'"
    assert layers["transformer_blocks.0.attn.to_add_out"]["scheme"]["weight_bits"] == 8
    small = run_json("plan", pipeline_folder, "--budget", "13MB", *options)
    plan = Plan.from_dict(small["components"]["transformer"]["plan"])
    assert {scheme.name for scheme in plan.values()} == {"W4A8", "W4A16", "W8A8"}


def test_a_budget_for_everything_says_so(pipeline_folder: Path) -> None:
    made = convrot("plan", pipeline_folder, "--budget", "1GB")
    assert made.exit_code == 0, made.stderr
    assert "the budget holds every layer in 16 bits: there is nothing to quantize" in made.stdout
    assert "predicted error 0.0000" in made.stdout


def test_blocks_that_lose_their_fused_forward_are_counted(pipeline_folder: Path) -> None:
    made = convrot("plan", pipeline_folder, "--budget", "25MB", "--schemes", "W8A8,16")
    assert made.exit_code == 0, made.stderr
    assert "block(s) will not run fused, since layers of theirs stay in 16 bits: --schemes without 16" in made.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --budget SIZE, --latency-budget TIME or both"),
        (("--budget", "6"), "--budget must be a size such as 6.5GB, 6GiB or 500MB; got '6'"),
        (("--latency-budget", "fast"), "--latency-budget must be a time such as 45ms or 0.2s; got 'fast'"),
        (("--budget", "1GB", "--schemes", "W3A3"), "--schemes: a ladder has one or more of W4A4, W4A4-R16"),
        (("--budget", "1GB", "--machine", "abacus"), "--machine must be one of h200, a100, rtx4090; got 'abacus'"),
        (("--budget", "1GB", "--keep", "*.nothing"), "'*.nothing' matches no linear layer"),
        (("--budget", "1GB", "--override", "W8A8"), "--override must look like GLOB=SCHEME"),
    ],
)
def test_wrong_usage_is_code_2(pipeline_folder: Path, options: tuple[str, ...], said: str) -> None:
    result = convrot("plan", pipeline_folder, *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "11MB"), "the budget is 11.00 MB, and the smallest plan takes 12."),
        (("--latency-budget", "1ms", "--tokens", "1000000"), "the budget is 1 ms, and the fastest plan takes "),
        (("--budget", "1GB", "--pareto", "plot.gif"), "plot.gif: a plot is written as .png, .svg, .pdf"),
    ],
)
def test_what_cannot_be_is_one_sentence(pipeline_folder: Path, options: tuple[str, ...], said: str) -> None:
    result = convrot("plan", pipeline_folder, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"convrot: {said}")
    assert result.stderr.count("\n") == 1


def test_a_plot_without_matplotlib_says_how_to_get_it(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = convrot("plan", pipeline_folder, "--budget", BUDGET, "--pareto", tmp_path / "a.png")
    assert result.exit_code == 1
    assert result.stderr == "convrot: the plot needs matplotlib: pip install matplotlib, or 'convrot-quant[plot]'\n"


def test_folders_without_one_16_bit_transformer_are_refused(pipeline_folder: Path, saved: Path, tmp_path: Path) -> None:
    quantized = convrot("plan", saved / "one", "--budget", BUDGET)
    assert quantized.exit_code == 1
    assert "one is quantized already; plan the 16-bit model" in quantized.stderr
    bare = convrot("plan", pipeline_folder / "transformer", "--budget", BUDGET, "--prompt", "a cube")
    assert bare.exit_code == 1
    assert "a bare transformer cannot generate" in bare.stderr
    with replace_folder(tmp_path / "two") as two:
        (two / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
        for name in ("transformer", "transformer_2"):
            (two / name).symlink_to(pipeline_folder / "transformer")
    several = convrot("plan", tmp_path / "two", "--budget", BUDGET)
    assert several.exit_code == 1
    assert "has several transformers: plan" in several.stderr
    assert f"{tmp_path / 'two' / 'transformer_2'}, each with its own budget" in several.stderr


def test_help_has_examples() -> None:
    result = convrot("plan", "--help")
    assert result.exit_code == 0
    for text in ("Examples:", "convrot plan ./FLUX.1-dev --budget 6.5GB -o plan.json", "--json", "--quiet"):
        assert text in result.stdout
