"""`convrot convert` and `convrot verify`: formats back and forth, bounded memory, whole files or none, damaged ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from convrot_quant import load_quantized, quantize_, save_quantized
from convrot_quant.cli import app
from convrot_quant.comfy import load_comfy
from convrot_quant.manifest import WEIGHTS
from convrot_quant.verify import golden

KILLED = """
import os, sys
from convrot_quant import tensorfile
number, whole, left = int(sys.argv[3]), tensorfile.Stored.chunks, [30]
def chunks(stored):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), number)
    return whole(stored)
tensorfile.Stored.chunks = chunks
from convrot_quant.cli import main
sys.argv = ["convrot", "convert", sys.argv[1], sys.argv[2], "-q", "--overwrite"]
main()
"""


def convrot(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = convrot(*arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(make_flux: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, out = make_flux(), tmp_path_factory.mktemp("convert") / "ours"
    quantize_(model, progress=False)
    save_quantized(model, out)
    return out


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    path = folder.with_name("comfy.safetensors")
    assert convrot("convert", folder, path, "-q").exit_code == 0
    return path


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_help_has_examples(command: str) -> None:
    result = convrot(command, "--help")
    assert result.exit_code == 0
    assert f"convrot {command} " in result.stdout
    for option in ("Examples:", "--json", "--quiet"):
        assert option in result.stdout


def test_there_and_back_is_the_same_folder(
    folder: Path, file: Path, tmp_path: Path, run: Callable[..., Tensor]
) -> None:
    data = run_json("convert", file, tmp_path / "back", "--max-shard-size", "3MB")
    assert data["format"] == "diffusers"
    assert data["layers"]["transformer_blocks.0.norm1.linear"]["activation_bits"] == 16
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert data["file_bytes"] == sum(path.stat().st_size for path in shards)
    assert len(shards) > 3
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    ours = load_file(folder / WEIGHTS)
    assert found.keys() == ours.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in ours.items())
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back")]
    assert configs[0] == configs[1]
    models = load_quantized(folder), load_quantized(tmp_path / "back"), load_comfy(file)
    assert [layer.scheme for layer in models[0].convrot_plan.layers] == [
        layer.scheme for layer in models[1].convrot_plan.layers
    ]
    outs = [run(model) for model in models]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_file_with_diffusers_names_and_one_of_another_file(file: Path, tmp_path: Path) -> None:
    text = convrot("convert", file, tmp_path / "names.safetensors", "--keys", "diffusers")
    assert text.exit_code == 0
    assert "4 layers W4A16 g256, 22 layers W4A4 g256; written to" in text.stdout
    assert "write" in text.stderr  # the progress bar
    run_json("convert", tmp_path / "names.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_pipeline_gives_its_transformer(pipeline_folder: Path, tmp_path: Path) -> None:
    assert convrot("quantize", pipeline_folder, "-o", tmp_path / "q", "-q").exit_code == 0
    data = run_json("convert", tmp_path / "q", tmp_path / "out", "--format", "comfy")
    assert (tmp_path / "out").is_file()
    assert data["format"] == "comfy"


def test_config_from_a_folder_where_the_file_has_none(folder: Path, file: Path, tmp_path: Path) -> None:
    save_file(load_file(file), tmp_path / "x.safetensors")
    bare = convrot("convert", tmp_path / "x.safetensors", tmp_path / "out", "-q")
    assert bare.exit_code == 1
    assert "heads of 64 are not FLUX.1's 128" in bare.stderr
    for config in (folder, folder / "config.json"):
        run_json("convert", tmp_path / "x.safetensors", tmp_path / "out", "--config", config, "--overwrite")
    assert all(torch.equal(t, load_file(folder / WEIGHTS)[n]) for n, t in load_file(tmp_path / "out" / WEIGHTS).items())


def test_failures_are_one_sentence_and_leave_nothing(
    pipeline_folder: Path, folder: Path, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"x")
    cases = {
        "16-bit": ((pipeline_folder, tmp_path / "out"), "is not quantized; write a quantized folder with"),
        "pickle": ((tmp_path / "x.ckpt", tmp_path / "out"), "a pickle can run code"),
        "missing": ((tmp_path / "no.safetensors", tmp_path / "out"), "no such file"),
        "itself": ((file, file, "--overwrite"), "is, holds or lies in what is read"),
        "a folder with the source": ((file, file.parent, "--overwrite"), "is, holds or lies in what is read"),
        "exists": ((file, tmp_path / "x.ckpt", "--format", "comfy"), "exists; choose another destination"),
        "not a model folder": ((file, tmp_path, "--overwrite"), "so it is not overwritten"),
        "a file's rotation": (
            (file, tmp_path / "out", "--group-size", 256),
            f"{file}: --group-size is only for official",
        ),
        "a folder's": (
            (folder, tmp_path / "o.safetensors", "--group-size", 64),
            "files say theirs; got 64, leave it out",
        ),
    }
    for case, (arguments, message) in cases.items():
        result = convrot("convert", *arguments, "-q")
        assert result.exit_code == 1, (case, result.stdout, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1, case
        assert message in result.stderr, (case, result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    assert convrot("convert", file, tmp_path / "y", "--format", "gguf").exit_code == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_half_way_leaves_the_old_one(folder: Path, file: Path, tmp_path: Path, kind: str, number: int) -> None:
    source, out = (folder, tmp_path / "out.safetensors") if kind == "file" else (file, tmp_path / "out")
    old = Path(shutil.copyfile(file, out) if kind == "file" else shutil.copytree(folder, out))
    before = {path: path.read_bytes() for path in ([old] if kind == "file" else old.iterdir())}
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == (-9 if number == signal.SIGKILL else 143), done.stderr
    assert {path: path.read_bytes() for path in before} == before
    others = [path for path in tmp_path.iterdir() if path != out]
    if number == signal.SIGTERM:
        assert others == []
    else:
        assert [path.name.startswith(".out") for path in others] == [True]
    again = convrot("convert", source, out, "--overwrite")
    assert again.exit_code == 0
    warned = [f"convrot: warning: removed {path}, left by a run that was killed" for path in others]
    assert [line for line in again.stderr.splitlines() if "warning" in line] == warned
    assert list(tmp_path.iterdir()) == [out]
    assert convrot("verify", out, "-q").exit_code == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' count of peak memory")
def test_memory_is_bounded(tmp_path: Path) -> None:
    marker = torch.tensor(list(b'{"format": "convrot_w4a4"}'), dtype=torch.uint8)
    weight, scale = torch.randint(-128, 127, (16384, 12288), dtype=torch.int8), torch.ones(16384)
    save_file({"a.weight": weight, "a.weight_scale": scale, "a.comfy_quant": marker}, tmp_path / "x.safetensors")
    del weight
    out = tmp_path / "y.safetensors"
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    assert convrot("convert", tmp_path / "x.safetensors", out, "--keys", "diffusers").exit_code == 0
    assert _memory("VmHWM") - before < 64 * 2**20 < out.stat().st_size
    verified = convrot("verify", out, "-q")
    assert verified.exit_code == 1
    assert "a.weight and 0 more hold -8 or -128, which no quantizer writes" in verified.stderr
    assert _memory("VmHWM") - before < 64 * 2**20


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def test_verify_says_what_it_has_checked(folder: Path, file: Path) -> None:
    data = run_json("verify", file)
    assert data["passed"] is True
    assert [check["passed"] for check in data["checks"]] == [True] * 5
    names = ["names and shapes", "checksum", "codes", "scales", "golden codes"]
    assert [check["name"] for check in data["checks"]] == names
    text = convrot("verify", folder).stdout
    for name in (*names, "all of FluxTransformer2DModel", "W4A16 g256", "folders have none"):
        assert name in text
    ours = run_json("verify", folder)["tensors"]
    same = "transformer_blocks.0.attn.to_out.0.weight"
    assert ours[same] == data["tensors"]["double_blocks.0.img_attn.proj.weight"]


def flip(path: Path, name: str, position: int, value: int) -> None:
    """Change one byte of a tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + begin + position] = value
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("proj_out.weight", 7, "checksum: .* is not the .* that the file claims"),
        ("double_blocks.0.img_attn.qkv.weight", 0x87, "checksum"),
    ],
)
def test_verify_finds_one_changed_byte(file: Path, tmp_path: Path, tensor: str, value: int, message: str) -> None:
    path = Path(shutil.copyfile(file, tmp_path / "x.safetensors"))
    flip(path, tensor.replace("proj_out.", "final_layer.linear.", 1), 3, value)
    result = convrot("verify", path, "--json", "-q")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    failed = {check["name"] for check in data["checks"] if check["passed"] is False}
    assert failed == ({"checksum", "codes"} if value == 0x87 else {"checksum"})
    assert len(result.stderr.strip().splitlines()) == 1
    assert message.split(":")[0] in result.stderr


def test_verify_finds_scales_that_are_none(file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(file, tmp_path / "x.safetensors"))
    for position in range(4):
        flip(path, "double_blocks.0.img_attn.qkv.weight_scale", position, 255)
    result = convrot("verify", path, "--json", "-q")
    failed = {check["name"]: check["detail"] for check in json.loads(result.stdout)["checks"] if not check["passed"]}
    assert set(failed) == {"checksum", "scales"}
    assert failed["scales"].startswith("double_blocks.0.img_attn.qkv.weight_scale and 0 more hold NaN")


def test_verify_without_a_config_or_a_checksum_says_so(file: Path, tmp_path: Path) -> None:
    save_file(load_file(file), tmp_path / "x.safetensors")
    data = run_json("verify", tmp_path / "x.safetensors")
    assert [check["passed"] for check in data["checks"]] == [None, None, True, True, True]


def test_the_golden_check_would_see_another_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    import convrot_quant.verify as module

    assert golden().passed is True
    whole = module.rotate_quantize
    monkeypatch.setattr(module, "rotate_quantize", lambda x, packed: whole(x, 64, packed=packed))
    assert golden().passed is False
