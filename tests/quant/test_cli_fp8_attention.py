"""`convrot generate --fp8-attention` and what `convrot doctor` says of it, on a tiny pipeline and without a GPU."""

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import convrot_quant.cli.generate
from convrot_kernels.backends import cudnn
from convrot_quant import fp8_attention_
from convrot_quant.cli import app, doctor
from convrot_quant.families.blocks import FusedBlock
from convrot_quant.generation import Settings
from convrot_quant.offload import Method, Names, Offload, components
from convrot_quant.pipeline import open_folder, outline_pipeline

generate = convrot_quant.cli.generate
EACH = ("text_encoder", "text_encoder_2", "transformer", "vae")
NO_FRONTEND = "cuDNN's frontend is not installed, run `pip install 'nvidia-cudnn-frontend~=1.18.0'`"


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """What a box of rich says, on one line."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())


def draw(folder: Path, out: Path, *more: object) -> tuple[numpy.ndarray, Any]:
    """The image, and the JSON."""
    options = ("-p", "a red cube", "--steps", 2, "-o", out, "--device", "cpu", "--json")
    result = convrot("generate", folder, *options, *more)
    assert result.exit_code == 0, result.stderr
    return numpy.array(Image.open(out)).astype(int), json.loads(result.stdout)


@pytest.fixture(scope="module")
def quantized(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "quantized"
    assert convrot("quantize", pipeline_folder, "-o", out, "--quiet", "--preset", "paper").exit_code == 0
    return out


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the fused blocks are set to as images are drawn, filled by the run."""
    found: list[bool] = []
    drawn = generate.generate_images

    def record(pipe: Any, *arguments: Any, **options: Any) -> Any:
        found[:] = [block.fp8_attention for block in pipe.transformer.modules() if isinstance(block, FusedBlock)]
        return drawn(pipe, *arguments, **options)

    monkeypatch.setattr(generate, "generate_images", record)
    return found


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal comes before weights are read."""
    monkeypatch.setattr(generate, "fill_pipeline", None)
    monkeypatch.setattr(generate, "load_pipeline", None)


def place(monkeypatch: pytest.MonkeyPatch, folder: Path, method: Method, streamed: Names, swapped: Names) -> None:
    """The CPU stands for a GPU on which a pipeline is placed so."""
    parts = tuple(components(outline_pipeline(open_folder(folder)), Settings()))
    offload = Offload(method, streamed, swapped, tiles=False, peak=1, resident_peak=3, vram=2, components=parts)
    monkeypatch.setattr(generate, "budget", lambda device, size: offload.vram)
    monkeypatch.setattr(generate, "choose", lambda *_: offload)


def test_every_fused_block_attends_in_8_bits_wherever_the_pipeline_waits(
    quantized: Path, tmp_path: Path, switched: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, data = draw(quantized, tmp_path / "16.png")
    assert (data["fp8_attention"], switched) == (False, [False] * 3)
    image, data = draw(quantized, tmp_path / "8.png", "--fp8-attention")
    assert (data["fp8_attention"], data["cuda_graphs"], switched) == (True, False, [True] * 3)
    apart = abs(image - expected)
    assert 0 < apart.max() < 32
    assert apart.mean() < 2
    for placed in (("model", (), EACH), ("group", ("text_encoder_2",), ("transformer", "vae"))):
        place(monkeypatch, quantized, *placed)
        moved, data = draw(quantized, tmp_path / "moved.png", "--fp8-attention")
        assert data["offload"]["method"] == placed[0]
        assert numpy.array_equal(moved, image)  # no hook inside of a block


def test_graphs_are_captured_of_what_was_switched(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(generate, "fp8_attention_", lambda _: calls.append("fp8_attention_"))
    monkeypatch.setattr(generate, "cuda_graphs_", lambda _: calls.append("cuda_graphs_"))
    monkeypatch.setattr(generate, "takes_graphs", lambda *_: True)
    draw(quantized, tmp_path / "x.png", "--fp8-attention")
    assert calls == ["fp8_attention_", "cuda_graphs_"]


@pytest.mark.usefixtures("no_weights")
def test_it_goes_with_quantized_models_and_without_a_sheet(pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("generate", pipeline_folder, "-p", "x", "--device", "cpu", "-o", out, "--fp8-attention", "-q")
    cases = {
        ("--sheet", tmp_path / "s.png"): (2, "--fp8-attention goes without --sheet"),
        ("--preset", "none"): (2, "--fp8-attention is of quantized models: leave it out, or --preset none"),
        ("--preset", "w4a16"): (1, "no block of this FluxTransformer2DModel runs fused: take a FLUX.1 model whose"),
    }
    for more, (code, sentence) in cases.items():
        result = convrot(*options, *more)
        assert (result.exit_code, result.stdout) == (code, ""), (more, result.exception)
        assert sentence in plain(result.stderr), more
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("placed", [("group", ("transformer",), ("text_encoder_2", "vae")), ("sequential", EACH, ())])
def test_a_transformer_offloaded_by_the_layer_is_refused(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placed: tuple[Method, Names, Names]
) -> None:
    """Its layers have hooks, under which blocks run diffusers' own forward."""
    place(monkeypatch, quantized, *placed)
    options = ("generate", quantized, "-p", "x", "--device", "cpu", "-o", tmp_path / "out")
    result = convrot(*options, "--fp8-attention", "-q")
    assert (result.exit_code, result.stdout) == (1, ""), result.exception
    found = re.fullmatch(
        "convrot: --fp8-attention is of fused blocks, and a block whose layers are offloaded one by one does not run "
        r"fused, but GPU memory: .*; layer by layer: [^;]*transformer \(11\.7 MiB\).*; "
        "give it more memory, draw a smaller image, or leave the option out\n",
        result.stderr,
    )
    assert found, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_cannot_is_found_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def why_not(device: torch.device) -> str:
        asked.append(device)
        return NO_FRONTEND

    monkeypatch.setattr(generate, "read_device", lambda device: device)
    monkeypatch.setattr(cudnn, "why_not", why_not)
    monkeypatch.setattr(generate, "open_folder", None)  # a hub id would be downloaded
    result = convrot("generate", "some/model", "-p", "x", "--device", "cuda:1", "--fp8-attention", "-o", tmp_path / "x")
    assert (result.exit_code, asked) == (1, [torch.device("cuda:1")]), result.exception
    assert result.stderr == (
        f"convrot: --fp8-attention does not run on cuda:1: {NO_FRONTEND}; without it attention is in 16 bits\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_the_switch_itself_refuses_is_one_sentence(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "fp8_attention_", lambda _: fp8_attention_(torch.nn.Linear(1, 1)))
    result = convrot("generate", quantized, "-p", "x", "-o", tmp_path / "x.png", "--fp8-attention", "-q")
    assert result.exit_code == 1
    assert result.stderr.startswith("convrot: fp8_attention_: only fused blocks attend in 8 bits, and Linear has none")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_on_which_gpus_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine()
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory": 2**37}
    devices = {name: report["devices"]["cpu"] for name in ("cpu", "cuda:0", "cuda:1")}
    monkeypatch.setattr(doctor, "examine", lambda: report | {"gpus": [gpu, gpu], "devices": devices})
    monkeypatch.setattr(cudnn, "why_not", lambda device: NO_FRONTEND if device.index else None)
    assert json.loads(convrot("doctor", "--json").stdout)["fp8_attention"] == {"cuda:0": None, "cuda:1": NO_FRONTEND}
    lines = convrot("doctor").stdout.splitlines()
    assert f"fp8 attention: cuda:0: ready; cuda:1: {NO_FRONTEND}" in lines
    monkeypatch.setattr(doctor, "examine", lambda: report | {"gpus": [], "devices": {"cpu": devices["cpu"]}})
    assert json.loads(convrot("doctor", "--json").stdout)["fp8_attention"] == {}
    assert "fp8 attention" not in convrot("doctor").stdout


def test_the_extra_is_the_one_of_the_kernels() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    packages = Path(__file__).parents[2] / "packages"
    kernels, quant = (
        tomllib.loads((packages / name / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in ("convrot-kernels", "convrot-quant")
    )
    assert quant["fp8-attention"] == ["convrot-kernels[fp8-attention]"]
    assert [f"run `pip install '{need}'`" in NO_FRONTEND for need in kernels["fp8-attention"]] == [True]
