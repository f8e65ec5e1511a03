"""`convrot generate --vram`: sizes that are none, machines without a GPU, and what a run says of its memory."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
from click.testing import Result
from typer.testing import CliRunner

import convrot_quant.cli.generate
from convrot_quant import QuantConfig
from convrot_quant.cli import app
from convrot_quant.cli.options import read_vram
from convrot_quant.cli.switches import takes_graphs
from convrot_quant.generation import Settings
from convrot_quant.offload import components
from convrot_quant.pipeline import open_folder, outline_pipeline


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """What a box of rich says, on one line."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())


def test_sizes_are_decimal_or_binary() -> None:
    sizes = {"8GB": 8 * 10**9, "12GiB": 12 * 2**30, "500MB": 500 * 10**6, "1.5 gib": 3 * 2**29, "auto": None}
    assert {text: read_vram(text, "cuda:0") for text in sizes} == sizes


@pytest.mark.parametrize("size", ["8", "GB", "8TB", "-8GB", "0GB", "eight", "8GB!", "", "1e3GB", "\u0668GB"])
def test_a_size_that_is_none_is_wrong_usage(pipeline_folder: Path, size: str) -> None:
    result = convrot("generate", pipeline_folder, "-p", "x", "--vram", size)
    assert result.exit_code == 2, result.exception
    assert f"--vram must be a size such as 8GB, 12GiB or 500MB, or auto; got {size!r}" in plain(result.stderr)


def test_without_a_gpu_the_option_is_refused_and_auto_is_not(pipeline_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", pipeline_folder, "-p", "x", "--steps", 1, "-o", tmp_path / "x.png", "--device", "cpu")
    result = convrot(*draw, "--vram", "8GB")
    assert result.exit_code == 1
    assert result.stderr == (
        "convrot: --vram 8GB limits the memory of a CUDA GPU, and this run is on cpu; leave it out\n"
    )
    result = convrot(*draw, "--vram", "auto", "--json")
    assert json.loads(result.stdout)["offload"] is None


def test_a_sheet_takes_no_limit(pipeline_folder: Path) -> None:
    result = convrot("generate", pipeline_folder, "-p", "x", "--sheet", "s.png", "--vram", "8GB")
    assert result.exit_code == 2
    assert "--vram goes without --sheet" in plain(result.stderr)


def test_help_has_an_example() -> None:
    text = plain(convrot("generate", "--help").stdout)
    assert 'convrot generate ./FLUX.1-dev --prompt "a fox" --vram 8GB' in text
    assert "what does not fit is offloaded to the CPU" in text


@pytest.mark.parametrize("source", ["16-bit", "quantized"])
def test_a_run_that_needs_offloading_says_so_and_draws_the_same(
    pipeline_folder: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands for a GPU with room for each component, and not for all; in few steps layers would pass."""
    folder, picture = pipeline_folder, tmp_path / "x.png"
    if source == "quantized":
        folder = tmp_path / "quantized"
        assert convrot("quantize", pipeline_folder, "-o", folder, "-q").exit_code == 0
    parts = components(outline_pipeline(open_folder(folder), QuantConfig.preset("ours")), Settings())
    room = max(c.alone for c in parts) * 16 // 15 + 16
    draw = ("generate", folder, "-p", "a red cube", "--steps", 12, "-o", picture, "--device", "cpu")
    assert convrot(*draw, "-q").exit_code == 0
    expected = picture.read_bytes()
    monkeypatch.setattr(convrot_quant.cli.generate, "budget", lambda device, size: room)
    result = convrot(*draw)
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("GPU memory: "))
    assert "one at a time: text_encoder (" in line
    assert line.endswith(" s an image")
    assert picture.read_bytes() == expected
    data = json.loads(convrot(*draw, "--json").stdout)["offload"]
    assert (data["method"], data["vram_bytes"]) == ("model", room)
    assert data["moving_seconds"] > 0
    assert data["peak_bytes"] < room < data["resident_peak_bytes"] * 16 / 15


def test_a_run_that_cannot_fit_is_one_sentence(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convrot_quant.cli.generate, "budget", lambda device, size: 100 * 10**6)
    monkeypatch.setattr(convrot_quant.cli.generate, "fill_pipeline", None)  # said before anything is quantized
    result = convrot("generate", pipeline_folder, "-p", "x", "-q")
    assert result.exit_code == 1, result.exception
    assert result.stderr.startswith("convrot: 95.4 MiB of GPU memory cannot hold this run: it needs 307 MiB, ")
    assert len(result.stderr.splitlines()) == 1


def test_a_16_bit_transformer_is_never_loaded_whole(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "from_pretrained", None)
    result = convrot("generate", pipeline_folder, "-p", "x", "--steps", 1, "-o", tmp_path / "x.png", "-q")
    assert result.exit_code == 0, result.exception


def _resident(method: str = "none") -> SimpleNamespace:
    return SimpleNamespace(method=method)


@pytest.mark.parametrize(
    ("asked", "side", "method", "expected"),
    [
        (None, 512, "none", True),
        (None, 1024, "none", False),  # the GPU has enough to do
        (None, 512, "model", False),
        (True, 1024, "none", True),
        (False, 512, "none", False),
    ],
)
def test_graphs_are_taken_where_they_help_or_are_asked_for(
    asked: bool | None, side: int, method: str, expected: bool
) -> None:
    arguments = {"height": side, "width": side}
    offload: Any = _resident(method)
    assert takes_graphs(asked, arguments, offload) is expected
    assert not takes_graphs(asked, arguments, None)  # no GPU


def test_graphs_and_offloading_exclude_each_other() -> None:
    offload: Any = _resident("group")
    with pytest.raises(ValueError, match="--cuda-graphs needs the whole pipeline on the GPU"):
        takes_graphs(True, {"height": 512, "width": 512}, offload)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [((), "--cuda-graphs needs a CUDA GPU, and this run is on cpu"), (("--sheet", "s.png"), "--cuda-graphs")],
)
def test_graphs_without_a_gpu_are_refused(pipeline_folder: Path, more: tuple[str, ...], sentence: str) -> None:
    result = convrot("generate", pipeline_folder, "-p", "x", "--device", "cpu", "--cuda-graphs", *more)
    assert result.exit_code == 2
    assert sentence in plain(result.stderr)
