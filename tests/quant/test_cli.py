"""The `convrot` command: each subcommand on a tiny pipeline, errors in one sentence, exit codes 0, 1 and 2."""

import json
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy
import pytest
from click.testing import Result
from PIL import Image
from typer.main import get_params_from_function
from typer.models import OptionInfo
from typer.testing import CliRunner

from convrot_bench.cli import app as bench
from convrot_demo.cli import command as demo
from convrot_quant.cli import app
from convrot_quant.cli.app import COMMANDS
from convrot_quant.cli.machine import machine
from convrot_quant.manifest import is_quantized
from mini_flux.cli import app as mini_flux

CONVROT = Path(sys.executable).with_name("convrot")


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = convrot(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def entry_point(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CONVROT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def quantized(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "quantized"
    assert convrot("quantize", pipeline_folder, "-o", out, "--quiet").exit_code == 0
    return out


def test_the_entry_point_quantizes_and_generates(pipeline_folder: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    made = entry_point("quantize", pipeline_folder, "-o", out, "--preset", "w4a8")
    assert made.returncode == 0, made.stderr
    assert "W4A8 g256" in made.stdout
    assert "36.3 MiB -> 11.7 MiB" in made.stdout
    assert "quantize" in made.stderr  # the progress bar
    drawn = entry_point("generate", out, "--prompt", "a red cube", "--steps", 2, "-o", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(picture).size == (32, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "picture.png"]


def test_the_entry_point_fails_with_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    failed = entry_point("inspect", tmp_path)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.strip().splitlines() == [
        f"convrot: {tmp_path}: neither model_index.json nor config.json; "
        "give a folder of a diffusers pipeline or transformer"
    ]
    wrong = entry_point("inspect")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = convrot(command, "--help")
    assert result.exit_code == 0
    start = f"convrot {command} "  # an example of another command may follow
    examples = [line for line in COMMANDS[command].EXAMPLES.splitlines() if line.startswith(start)]
    assert examples
    used = {word for example in examples for word in example.split() if word.startswith("--")}
    assert all(text in result.stdout for text in ("Examples:", start, "--json", "--quiet", *used))


def test_help_lists_the_commands() -> None:
    result = convrot("--help")
    assert {"quantize", "inspect", "generate", "compare", "convert", "verify", "doctor"} <= COMMANDS.keys()
    positions = [result.stdout.index(f" {command} ") for command in COMMANDS]
    assert positions == sorted(positions)


def test_an_option_with_a_metavar_names_its_flag() -> None:
    """Else typer 0.26.9 to 0.27 takes a metavar of the same letters for it, with its capitals: --DEVICE."""
    commands = [demo, *(one.callback for typed in (app, bench, mini_flux) for one in typed.registered_commands)]
    params = [param for command in commands for param in get_params_from_function(command).values()]
    options = [param for param in params if isinstance(param.default, OptionInfo) and param.default.metavar is not None]
    assert {"device", "vram", "quantized"} <= {option.name for option in options}
    assert [option.name for option in options if not option.default.param_decls] == []


def test_inspect_plans_a_16_bit_folder_without_its_weights(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text((pipeline_folder / "transformer" / "config.json").read_text())
    data = run_json("inspect", folder, "--preset", "paper-mixed", "--keep", "*.add_q_proj")
    found = data["components"]["transformer"]
    schemes = {layer["name"]: layer["scheme"] for layer in found["plan"]["layers"]}
    assert data["quantized"] is False
    assert schemes["transformer_blocks.0.attn.to_out.0"]["weight_bits"] == 8
    assert schemes["transformer_blocks.0.attn.add_q_proj"] is None
    assert found["bytes_before"] > 1.9 * found["bytes_after"]
    text = convrot("inspect", folder).stdout
    assert "single_transformer_blocks.{0-1}.proj_out" in text
    assert "(3.11x smaller)" in text
    assert "single_transformer_blocks.1.proj_out" in convrot("inspect", folder, "--all").stdout


def test_inspect_shows_what_is_in_a_quantized_folder(quantized: Path) -> None:
    data = run_json("inspect", quantized)
    found = data["components"]["transformer"]
    assert data["quantized"] is True
    assert found["versions"]["convrot-quant"] == "0.1.0"
    assert found["files"] == 1
    assert found["bytes_after"] < found["file_bytes"] < found["bytes_after"] + 60_000  # and the header
    text = convrot("inspect", quantized).stdout
    assert "written with convrot-quant 0.1.0" in text
    assert "W4A16 g256" in text


def test_quantize_by_an_edited_plan(pipeline_folder: Path, tmp_path: Path) -> None:
    plan = run_json("inspect", pipeline_folder)
    for layer in plan["components"]["transformer"]["plan"]["layers"]:
        layer["scheme"] = {"weight_bits": 8, "activation_bits": 8} if layer["name"].endswith("to_q") else None
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    data = run_json("quantize", pipeline_folder, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    layers = data["components"]["transformer"]["plan"]["layers"]
    assert {layer["name"].rsplit(".")[-1] for layer in layers if layer["scheme"]} == {"to_q"}
    assert is_quantized(tmp_path / "out" / "transformer")
    refused = convrot("quantize", pipeline_folder, "-o", "x", "--plan", tmp_path / "plan.json", "--keep", "*")
    assert refused.exit_code == 2
    assert "--plan decides every layer" in refused.stderr


def test_quantize_shards_overrides_and_overwrites(pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convrot("quantize", pipeline_folder / "transformer", "-o", out, "--max-shard-size", "3MB", "-q")
    assert (first.exit_code, first.stdout) == (0, "")
    assert len(list(out.glob("*.safetensors"))) > 3
    again = convrot("quantize", pipeline_folder / "transformer", "-o", out)
    assert again.exit_code == 1
    assert "exists; choose another destination, or overwrite it" in again.stderr
    options = ("--overwrite", "--override", "*.to_v=w8a16", "--override", "x_embedder=W4A16")
    data = run_json("quantize", pipeline_folder / "transformer", "-o", out, *options)
    schemes = {layer["name"]: layer["scheme"] for layer in data["components"]["transformer"]["plan"]["layers"]}
    assert schemes["transformer_blocks.0.attn.to_v"]["activation_bits"] == 16
    assert schemes["x_embedder"]["group_size"] == 64
    assert len(list(out.glob("*.safetensors"))) == 1


def test_generate_with_a_sheet(pipeline_folder: Path, prompts: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"# two scenes\n{prompts[0]}\n\n{prompts[1]}\n")
    sheet, out = tmp_path / "deep" / "sheet.png", tmp_path / "images"
    arguments = ("generate", pipeline_folder, "--prompts-file", file, "--steps", 2, "--seed", 7, "--sheet", sheet)
    data = run_json(*arguments, "-o", out)
    assert [picture["seed"] for picture in data["pictures"]] == [7, 8]
    assert [picture["prompt"] for picture in data["pictures"]] == list(prompts)
    assert data["arguments"]["max_sequence_length"] == 16
    names = [Path(path).name for path in (*data["images"], *data["images_16bit"])]
    assert names == ["000.png", "001.png", "000_bf16.png", "001_bf16.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    base, ours = data["results"]
    assert (base["name"], ours["name"]) == ("BF16", "ours (W4A4)")
    assert ours["times_smaller"] == pytest.approx(3.11, abs=0.01)
    assert len(ours["psnr_db"]) == len(ours["ssim"]) == 2
    assert 20 < ours["psnr_db_mean"] < 80
    assert 0.05 < ours["layer_l2_median"] < 0.3
    assert Image.open(sheet).width > 2 * 224
    text = convrot(*arguments, "-o", out).stdout
    for word in ("PSNR dB", "SSIM", "layer L2", "s/image", "3.11x", "36.3 MiB", "11.7 MiB", *prompts):
        assert word in text


def test_generate_draws_the_same_from_a_stored_folder(pipeline_folder: Path, quantized: Path, tmp_path: Path) -> None:
    common = ("--prompt", "a red cube", "--steps", 2, "--seed", 3, "-q")
    for name, arguments in {
        "memory": (pipeline_folder,),
        "folder": (quantized,),
        "sixteen": (pipeline_folder, "--preset", "none"),
        "paper": (pipeline_folder, "--preset", "paper"),
    }.items():
        result = convrot("generate", *arguments, *common, "-o", tmp_path / f"{name}.png")
        assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    images = {path.stem: numpy.array(Image.open(path)).tobytes() for path in tmp_path.iterdir()}
    assert images["memory"] == images["folder"]
    assert len(set(images.values())) == 3


def test_generate_compares_a_quantized_folder_with_its_reference(
    pipeline_folder: Path, quantized: Path, tmp_path: Path
) -> None:
    common = ("--prompt", "a red cube", "--steps", 2, "--sheet", tmp_path / "sheet.png", "-o", tmp_path)
    stored = run_json("generate", quantized, "--reference", pipeline_folder, *common)
    memory = run_json("generate", pipeline_folder, *common)
    assert stored["results"][1]["psnr_db"] == memory["results"][1]["psnr_db"]
    assert stored["results"][1]["layer_l2"] == memory["results"][1]["layer_l2"]


def test_compare_tables_several_presets(pipeline_folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = ("compare", pipeline_folder, "-p", "a red cube", "--steps", 2, "--preset", "w8a8", "--preset", "paper")
    data = run_json(*arguments, "--sheet", sheet, "--num-images", 2)
    assert [result["name"] for result in data["results"]] == ["BF16", "w8a8 (W8A8)", "paper (W4A4)"]
    assert data["results"][1]["layer_l2_median"] < data["results"][2]["layer_l2_median"]
    assert len(data["results"][1]["psnr_db"]) == 2
    assert Image.open(sheet).width > 3 * 224
    text = convrot(*arguments).stdout
    assert text.index("w8a8 (W8A8)") < text.index("paper (W4A4)")


def test_doctor_says_versions_and_backends() -> None:
    data = run_json("doctor")
    assert {"convrot-kernels", "convrot-quant", "diffusers", "transformers", "peft", "torch"} <= data["packages"].keys()
    assert data["devices"]["cpu"]["runs"] is True
    text = convrot("doctor").stdout
    assert "reference" in text
    assert "diffusers" in text


def test_a_run_is_described_where_the_packages_are_only_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Distribution.from_name

    def installed(name: str) -> Distribution:
        if name.startswith("convrot"):
            raise PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(Distribution, "from_name", installed)
    described = machine("cpu")
    assert described.keys() >= {"torch", "diffusers", "device", "date"}
    assert not described.keys() & {"convrot-quant", "convrot-kernels"}


def usage(pipeline: Path, quantized: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    draw = ("generate", pipeline, "--prompt", "x", "--steps", 1)
    stored = ("generate", quantized, "--prompt", "x", "--steps", 1)
    return {
        "no model": (("quantize", "-o", "x"), "Missing argument"),
        "no prompt": (("generate", pipeline), "nothing to draw: give --prompt TEXT or --prompts-file FILE"),
        "unknown preset": (("inspect", pipeline, "--preset", "best"), "unknown preset 'best'; presets are ours, paper"),
        "unknown preset to draw": ((*draw, "--preset", "best"), "unknown preset 'best'"),
        "unknown preset to compare": (("compare", pipeline, "-p", "x", "--preset", "best"), "unknown preset 'best'"),
        "glob without a layer": (("inspect", pipeline, "--keep", "*.to_x"), "'*.to_x' matches no linear layer"),
        "override without a scheme": (("inspect", pipeline, "--override", "*.to_v"), "must look like GLOB=SCHEME"),
        "override with a bad scheme": (
            ("inspect", pipeline, "--override", "*=W3A3"),
            "weight_bits must be one of 4, 8",
        ),
        "device": ((*draw, "--device", "tpu9"), "'tpu9' is not a device; use cpu, cuda or cuda:1"),
        "steps": ((*draw, "--steps", 0), "Invalid value for '--steps'"),
        "one file for two images": (
            (*draw, "--num-images", 2, "-o", "x.png"),
            "2 images are to be made: give a folder",
        ),
        "one file for a sheet": (
            (*draw, "--sheet", "s.png", "-o", "x.png"),
            "16-bit and quantized images are to be made",
        ),
        "sheet of nothing": ((*draw, "--sheet", "s.png", "--preset", "none"), "leave out --preset none"),
        "reference without need": ((*draw, "--reference", "y"), "--reference goes with --sheet and a quantized MODEL"),
        "preset twice": ((*stored, "--preset", "paper"), "is quantized already"),
        "sheet without a reference": ((*stored, "--sheet", "s.png"), "needs its 16-bit original: --reference MODEL"),
        "options of another folder": (("inspect", quantized, "--keep", "*"), "is quantized already"),
    }


def failures(pipeline: Path, quantized: Path, tmp_path: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    (tmp_path / "bad.json").write_text("{")
    plan = ("quantize", pipeline, "-o", tmp_path / "out", "--plan", tmp_path / "bad.json")
    return {
        "no such folder": (("inspect", tmp_path / "nothing"), "nothing: no such folder"),
        "hub without a network": (("inspect", "someone/model"), "no such folder, and the hub did not give it"),
        "no GPU": (("generate", pipeline, "-p", "x", "--device", "cuda"), "no usable CUDA GPU; use --device cpu"),
        "quantized twice": (
            ("quantize", quantized, "-o", tmp_path / "out"),
            "already quantized; start from the 16-bit",
        ),
        "compare of a quantized one": (
            ("compare", quantized, "-p", "x"),
            "is quantized; compare with the 16-bit model",
        ),
        "bare transformer": (("generate", pipeline / "transformer", "-p", "x"), "a bare transformer cannot generate"),
        "plan that is no JSON": (plan, "bad.json: not valid JSON"),
        "into itself": (("quantize", pipeline, "-o", pipeline / "x"), "must lie outside of the model's own folder"),
        "an empty plan": (("quantize", pipeline, "-o", tmp_path / "out", "--keep", "*"), "nothing to quantize"),
    }


def plain(text: str) -> str:
    """What a box of rich says, on one line."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())


def test_wrong_usage_exits_2_and_says_why(
    pipeline_folder: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for case, (arguments, message) in usage(pipeline_folder, quantized).items():
        result = convrot(*arguments)
        assert result.exit_code == 2, (case, result.stdout, result.stderr)
        assert message in plain(result.stderr), case
        assert result.stdout == "", case
    assert list(tmp_path.iterdir()) == []


def test_failures_exit_1_with_one_sentence(pipeline_folder: Path, quantized: Path, tmp_path: Path) -> None:
    for case, (arguments, message) in failures(pipeline_folder, quantized, tmp_path).items():
        if case == "no GPU" and __import__("torch").cuda.is_available():
            continue
        result = convrot(*arguments, "--quiet")
        assert result.exit_code == 1, (case, result.stdout, result.stderr)
        sentences = result.stderr.strip().splitlines()
        assert len(sentences) == 1, (case, result.stderr)
        assert sentences[0].startswith("convrot: "), case
        assert message in sentences[0], case
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVROT_DEBUG", "1")
    assert isinstance(convrot("inspect", tmp_path).exception, ValueError)
