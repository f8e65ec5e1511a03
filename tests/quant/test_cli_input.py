"""The `convrot` command's input: what is checked before the work, what is warned of, what a signal leaves behind."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import convrot_quant.cli.generate
from convrot_quant import save_quantized
from convrot_quant.cli import app
from convrot_quant.cli.options import read_device
from convrot_quant.cli.output import sentences
from convrot_quant.generation import size_multiple

CONVROT = Path(sys.executable).with_name("convrot")


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """What a box of rich says, on one line."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())


def refused(code: int, message: str, *arguments: object) -> None:
    """Exit code, nothing on stdout, the message, and no traceback."""
    result = convrot(*arguments)
    assert result.exit_code == code, (arguments, result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert message in plain(result.stderr), result.stderr


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pipeline may be loaded: the refusal comes first."""

    def load_pipeline(*_: object, **__: object) -> None:
        raise AssertionError("loaded a pipeline before the check")

    for name in ("load_pipeline", "outline_pipeline"):
        monkeypatch.setattr(convrot_quant.cli.generate, name, load_pipeline)


@pytest.mark.usefixtures("no_work")
def test_names_and_numbers_are_checked_before_the_work(pipeline_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", pipeline_folder, "-p", "x")
    refused(2, "-o out.xyz: images cannot be written under this name; use .png", *draw, "-o", "out.xyz")
    refused(2, "-o out.h5: images cannot be written under this name", *draw, "-o", "out.h5")  # a name PIL only knows
    refused(2, "--sheet s.xyz: images cannot be written", *draw, "--sheet", "s.xyz")
    refused(2, "--sheet s: images cannot be written", *draw, "--sheet", "s")
    refused(2, "--sheet s.xyz: images cannot be written", "compare", pipeline_folder, "-p", "x", "--sheet", "s.xyz")
    refused(2, "Invalid value for '--seed'", *draw, "--seed", 2**63)
    for size in ("abc", "-5GB"):
        options = ("-o", "out", "--max-shard-size", size)
        refused(2, f"max_shard_size must be a size such as 5GB or 500MB, got '{size}'", "quantize", draw[1], *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
def test_places_that_cannot_be_written_are_found_before_the_work(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    draw, compare = (("generate", pipeline_folder, "-p", "x"), ("compare", pipeline_folder, "-p", "x"))
    plan = ("plan", pipeline_folder, "--budget", "1GB")
    message = f" cannot be made: {tmp_path / 'file'} is not a folder; choose another destination"
    for arguments in (
        (*draw, "-o", "file"),
        (*draw, "-o", "file/x.png"),
        (*draw, "--sheet", "file/s.png"),
        (*compare, "--sheet", "file/s.png"),
        (*plan, "-o", "file/p.json"),
        (*plan, "--pareto", "file/p.png"),
    ):
        refused(1, message, *arguments, "-q")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lora_that_is_no_file_is_named(pipeline_folder: Path, tmp_path: Path) -> None:
    for name in ("no.safetensors", "no.safetensors:0,5", "."):
        message = f"convrot: {name}: no such file; give a LoRA (.safetensors), with its scale as FILE:0.8"
        refused(1, message, "quantize", pipeline_folder, "-o", "out", "--lora", name, "-q")
    assert list(tmp_path.iterdir()) == []


def test_guidance_is_a_number(pipeline_folder: Path) -> None:
    for guidance in ("nan", "inf"):
        draw = ("generate", pipeline_folder, "-p", "x", "--steps", 1, "--guidance", guidance, "-q")
        refused(2, f"guidance must be a finite number, got {guidance}", *draw)


def test_what_is_compared_with_is_not_quantized(pipeline_folder: Path) -> None:
    assert convrot("quantize", pipeline_folder, "-o", "four", "-q").exit_code == 0
    draw = ("generate", "four", "--reference", "four", "-p", "x", "--sheet", "s.png", "-q")
    refused(1, "convrot: four is quantized; compare with the 16-bit model", *draw)
    assert [path.name for path in Path().iterdir()] == ["four"]


def test_save_quantized_checks_the_shard_size_first(make_flux: Any, tmp_path: Path) -> None:
    from convrot_quant import quantize_

    model = make_flux(1, 1)
    quantize_(model, progress=False)
    with pytest.raises(ValueError, match="max_shard_size must be a size such as 5GB or 500MB, got 0"):
        save_quantized(model, tmp_path / "a" / "b", max_shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_dot_takes_images(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v1.5").mkdir()
    result = convrot("generate", pipeline_folder, "-p", "x", "--steps", 1, "--num-images", 2, "-o", "v1.5")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "v1.5").iterdir()) == ["000.png", "001.png"]


def test_sizes_and_text_lengths_that_the_pipeline_lacks(pipeline_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", pipeline_folder, "-p", "x", "--steps", 1, "-q")
    refused(2, "height must be a multiple of 16 for FluxPipeline, got 100; use 96", *draw, "--height", 100)
    refused(2, "width must be a multiple of 16 for FluxPipeline, got 130; use 128", *draw, "--width", 130)
    refused(2, "`max_sequence_length` cannot be greater than 512", *draw, "--max-sequence-length", 513)
    assert list(tmp_path.iterdir()) == []


def test_the_multiple_is_that_of_the_vae() -> None:
    class Pipe:
        vae_scale_factor: object = 8

    pipe = Pipe()
    assert size_multiple(pipe) == 16
    pipe.vae_scale_factor = 32
    assert size_multiple(pipe) == 32
    pipe.vae_scale_factor = None
    assert size_multiple(pipe) == 1


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_json_has_the_real_size_and_the_machine(pipeline_folder: Path, command: str) -> None:
    options = ("--steps", 1, "--height", 48, "--width", 64, "--device", "cpu", "--json")
    result = convrot(command, pipeline_folder, "-p", "a red cube", *options)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    picture = {"prompt": "a red cube", "seed": 0, "width": 64, "height": 48}
    assert data["pictures"] == [picture]
    keys = ["device", "cpu_cores", "convrot-quant", "convrot-kernels", "torch", "diffusers", "date"]
    assert list(data["machine"]) == keys
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["cpu_cores"] >= 1
    if command == "generate":
        assert Image.open(data["images"][0]).size == (64, 48)


def test_a_prompt_over_the_limit_is_warned_of(pipeline_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", pipeline_folder, "-p", "a red cube", "-p", "a red cube " * 8, "--steps", 1, "--json")
    result = convrot(*draw)
    data = json.loads(result.stdout)
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    limit = data["arguments"]["max_sequence_length"]
    expected = f"prompt 2 has 25 tokens, more than the limit of {limit}: its end is cut off"
    assert limit == 16
    assert warnings == [f"convrot: warning: {expected}"]  # 8 times 3 words, and </s>
    assert "warning" not in convrot(*draw, "--quiet").stderr
    assert "warning" not in convrot(*draw, "--max-sequence-length", 25).stderr


def test_a_prompts_file_may_start_with_a_byte_order_mark(pipeline_folder: Path) -> None:
    Path("p.txt").write_bytes("a red cube\n".encode("utf-8-sig"))
    result = convrot("generate", pipeline_folder, "--prompts-file", "p.txt", "--steps", 1, "--json")
    assert json.loads(result.stdout)["pictures"][0]["prompt"] == "a red cube"


def test_files_that_are_no_text_are_named(pipeline_folder: Path) -> None:
    Path("p.txt").write_bytes("ein gr\u00fcner W\u00fcrfel".encode("latin-1"))
    message = "convrot: p.txt: not UTF-8 text (byte 6); save it as UTF-8"
    refused(1, message, "generate", pipeline_folder, "--prompts-file", "p.txt", "-q")
    refused(1, message, "quantize", pipeline_folder, "-o", "out", "--plan", "p.txt", "-q")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"components": 3}', "its components hold no plans; write it with `convrot inspect --json`"),
        ('{"components": {"t": {}}}', "its components hold no plans"),
        ('{"components": {"t": {"plan": 3}}}', "format_version must be 1; got None"),
        ('{"components": {}}', "has 0 plans"),
        ("3", "format_version must be 1; got None"),
    ],
)
def test_a_plan_file_that_is_none_is_named(pipeline_folder: Path, content: str, message: str) -> None:
    Path("plan.json").write_text(content)
    result = convrot("quantize", pipeline_folder, "-o", "out", "--plan", "plan.json", "-q")
    assert result.exit_code == 1, result.exception
    assert result.stderr.startswith("convrot: plan.json: ")
    assert message in result.stderr


@pytest.mark.usefixtures("no_work")
def test_devices_that_cannot_be_used(pipeline_folder: Path) -> None:
    draw = ("generate", pipeline_folder, "-p", "x", "-q")
    refused(2, "'meta' is not a device; use cpu, cuda or cuda:1", *draw, "--device", "meta")
    assert read_device("cpu:3") == "cpu"
    for device in ("vulkan", "hpu") if torch.backends.mps.is_available() else ("mps", "hpu"):
        refused(1, f"convrot: --device {device}: not usable on this machine (", *draw, "--device", device)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"_class_name": "FluxPipeline", "vae": 3}'])
def test_a_damaged_pipeline_index_is_one_sentence(pipeline_folder: Path, content: str) -> None:
    shutil.copytree(pipeline_folder, "pipe")
    (Path("pipe") / "model_index.json").write_text(content)
    result = convrot("generate", "pipe", "-p", "x", "-q")
    assert result.exit_code == 1, result.exception
    assert result.stderr.startswith("convrot: pipe")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_damaged_16_bit_weight_file_is_one_sentence(pipeline_folder: Path) -> None:
    shutil.copytree(pipeline_folder, "pipe")
    weights = next((Path("pipe") / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    for arguments in (("quantize", "pipe", "-o", "out"), ("generate", "pipe", "-p", "x")):
        result = convrot(*arguments, "-q")
        assert result.exit_code == 1, result.exception
        assert result.stderr.startswith("convrot: pipe")
        assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_json_nested_without_end_is_one_sentence(pipeline_folder: Path, name: str) -> None:
    shutil.copytree(pipeline_folder, "pipe")
    (Path("pipe") / name).write_text("[" * 200_000)
    refused(1, "maximum recursion depth exceeded", "generate", "pipe", "-p", "x", "-q")
    if name != "vae/config.json":  # which is copied as it is
        refused(1, f"convrot: pipe/{name}: not valid JSON (", "quantize", "pipe", "-o", "out", "-q")
    assert [path.name for path in Path().iterdir()] == ["pipe"]


def test_so_are_such_a_plan_and_such_an_index(pipeline_folder: Path, shards: Path) -> None:
    Path("plan.json").write_text("[" * 200_000)
    refused(1, "convrot: plan.json: not valid JSON", "quantize", pipeline_folder, "-o", "out", "--plan", "plan.json")
    next(shards.glob("*.index.json")).write_text("[" * 200_000)
    refused(1, ".index.json: not a shard index (", "verify", shards, "-q")


def test_a_component_that_cannot_be_copied_is_one_sentence(pipeline_folder: Path) -> None:
    shutil.copytree(pipeline_folder, "pipe")
    (Path("pipe") / "vae" / "broken").symlink_to("nowhere")
    message = "convrot: pipe/vae/broken cannot be copied ([Errno 2] No such file or directory); copy or download"
    refused(1, message, "quantize", "pipe", "-o", "out", "-q")
    assert [path.name for path in Path().iterdir()] == ["pipe"]


def test_a_missing_16_bit_shard_is_one_sentence(pipeline_folder: Path, make_flux: Any) -> None:
    shutil.copytree(pipeline_folder, "pipe", ignore=lambda _, names: [name for name in names if name == "transformer"])
    make_flux().save_pretrained("pipe/transformer", max_shard_size="20MB")
    missing = min(Path("pipe/transformer").glob("*.safetensors"))
    missing.unlink()
    for options in (("--preset", "none"), ()):
        result = convrot("generate", "pipe", "-p", "x", "-q", *options)
        assert result.exit_code == 1, result.exception
        assert missing.name in result.stderr
        assert "again" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_what_the_machine_lacks_is_a_sentence_and_a_bug_is_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def run(error: Exception) -> None:
        def command() -> None:
            raise error

        sentences(command)()

    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory: x")):
        with pytest.raises(typer.Exit) as caught:
            run(error)
        assert caught.value.exit_code == 1
        assert "memory" in capsys.readouterr().err
    for bug in (RuntimeError("mat1 and mat2 shapes"), KeyError("x"), AttributeError("y")):
        with pytest.raises(type(bug)):
            run(bug)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_sigterm_leaves_nothing_behind(pipeline_folder: Path, tmp_path: Path) -> None:
    waits = "import time, convrot_quant.streaming as streaming; from convrot_quant.cli.app import main\n"
    waits += "streaming.write_shards = lambda *_, **__: (print('writing', flush=True), time.sleep(120)); main()"
    arguments = [sys.executable, "-c", waits, "quantize", str(pipeline_folder), "-o", str(tmp_path / "out"), "-q"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert [path.name.partition(".tmp-")[0] for path in tmp_path.iterdir()] == [".out"]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
