"""Several processes draw what one does: shares of a run, and convrot generate under torchrun and accelerate launch."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from convrot_quant import replicas
from convrot_quant.cli import app
from convrot_quant.replicas import World, gather, own_device, share, world

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
PROMPTS = ("a red cube", "a blue sphere behind a cone", "a red cone")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The environment that a launcher sets: WORLD_SIZE, RANK, LOCAL_RANK; None leaves one out."""

    def set_environment(*values: object) -> None:
        for name, value in zip(LAUNCHER, values, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return set_environment


def start(*command: object, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """A command in processes that share two cores."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment = clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=240)
    assert (done.returncode != 0) == expected, done.stderr
    return done


def torchrun(*arguments: object, processes: int = 2, expected: int = 0) -> subprocess.CompletedProcess[str]:
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return start(*run, *arguments, expected=expected)


CONVROT = Path(sys.executable).with_name("convrot")


# shares


def test_a_process_alone_has_everything_and_joins_nothing(launched: Callable[..., None]) -> None:
    launched(None, None, None)
    here = world()
    assert here == World(0, 1, 0)
    assert here.is_main
    assert share(PROMPTS, here) == list(PROMPTS)
    assert gather(PROMPTS, here) == list(PROMPTS)
    assert not torch.distributed.is_initialized()


def test_what_a_launcher_says_is_read(launched: Callable[..., None]) -> None:
    launched(4, 3, 1)
    assert world() == World(rank=3, size=4, local_rank=1)
    assert not world().is_main
    launched(1, 0, 0)
    assert world() == World()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((2, None, 0), "RANK='' in the environment"),
        ((2, 0, None), "LOCAL_RANK='' in the environment"),
        (("two", 0, 0), "WORLD_SIZE='two' in the environment"),
        ((0, 0, 0), "WORLD_SIZE='0' in the environment"),
        ((2, 2, 0), "RANK=2 and LOCAL_RANK=0 are not below WORLD_SIZE=2"),
        ((2, 1, 5), "RANK=1 and LOCAL_RANK=5 are not below WORLD_SIZE=2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    launched: Callable[..., None], values: tuple[object, ...], words: str
) -> None:
    launched(*values)
    with pytest.raises(ValueError, match=words) as caught:
        world()
    assert "torchrun or accelerate launch" in str(caught.value)


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    second = World(rank=1, size=2, local_rank=1)
    assert [own_device(name, second) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert current == [1, 1]
    assert own_device("cuda:0", World()) == "cuda:0"
    with pytest.raises(ValueError, match=r"cuda:0 is one GPU, and this run has 2 processes; say cuda"):
        own_device("cuda:0", second)
    with pytest.raises(ValueError, match=r"process 2 of 3 has LOCAL_RANK 2, and this machine shows 2 GPUs"):
        own_device("auto", World(2, 3, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto", second) == "auto"


SHARES = """
from convrot_quant.replicas import gather, share, world
here = world()
for count in (0, 1, 2, 5):
    mine = share(range(count), here)
    assert len(mine) in (count // here.size, -(-count // here.size)), mine
    found = gather([(here.rank, item) for item in mine], here)
    if here.is_main:
        assert [item for _, item in found] == list(range(count)), found
        assert [rank for rank, _ in found] == sorted(rank for rank, _ in found), found
        print("right", count)
    else:
        assert found == []
if not here.is_main:
    raise SystemExit("the second process fails")
try:
    gather([], here)
except ConnectionError as error:
    print("said:", error)
"""


def test_shares_are_neighbours_and_come_back_in_order(tmp_path: Path) -> None:
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    done = torchrun(script, expected=1)  # at the end one process fails, and the other does not wait for it
    assert done.stdout.splitlines()[:4] == [f"right {count}" for count in (0, 1, 2, 5)], done.stderr
    assert "the second process fails" in done.stderr
    assert "said: another process of this run ended early" in done.stdout or "SIGTERM" in done.stderr


# convrot generate


def pixels(folder: Path) -> dict[str, numpy.ndarray]:
    return {path.name: numpy.array(Image.open(path)) for path in sorted(folder.iterdir())}


@pytest.fixture
def arguments(pipeline_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return ("generate", pipeline_folder, "--prompts-file", file, "--steps", 2, "--seed", 5, "--device", "cpu")


def check(arguments: tuple[object, ...], tmp_path: Path, *launcher: object) -> None:
    """What two processes draw and print is what one does."""
    alone = CliRunner().invoke(app, [*map(str, arguments), "-o", str(tmp_path / "alone"), "--json"])
    assert alone.exit_code == 0, alone.stderr
    done = start(*launcher, *arguments, "-o", tmp_path / "both", "--json")
    first, both = (json.loads(text) for text in (alone.stdout, done.stdout))  # one object: rank 0 alone has printed
    assert (first["processes"], both["processes"]) == (1, 2)
    for key in ("pictures", "settings", "arguments", "cuda_graphs", "offload"):
        assert both[key] == first[key]
    assert [Path(name).name for name in both["images"]] == ["000.png", "001.png", "002.png"]
    one, two = pixels(tmp_path / "alone"), pixels(tmp_path / "both")
    assert list(one) == list(two) == ["000.png", "001.png", "002.png"]
    for name, image in one.items():
        assert numpy.array_equal(image, two[name]), name
    assert len({image.tobytes() for image in one.values()}) == 3
    assert done.stderr.count("image 2/2") >= 1  # one bar, of the first process's share
    assert "2 of 2" not in done.stderr


def test_two_processes_draw_the_images_of_one(arguments: tuple[object, ...], tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--no-python")
    check(arguments, tmp_path, *launcher, CONVROT)


@pytest.mark.slow
def test_accelerate_launch_does_too(arguments: tuple[object, ...], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    accelerate = Path(sys.executable).with_name("accelerate")
    launch = ("launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", port, "--no_python")
    check(arguments, tmp_path, accelerate, *launch, CONVROT)


@pytest.mark.slow
def test_more_processes_than_images_are_no_error(pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    command = ("generate", pipeline_folder, "-p", PROMPTS[0], "--steps", 1, "-o", out, "--device", "cpu")
    done = torchrun("--no-python", CONVROT, *command, processes=3)
    assert Image.open(out).size == (32, 32)
    assert "(by 3 processes)" in done.stdout


def test_a_sheet_is_refused_and_a_numbered_gpu_too(
    pipeline_folder: Path, tmp_path: Path, launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(2, 1, 1)
    draw = ["generate", str(pipeline_folder), "-p", "x"]
    refused = CliRunner().invoke(app, [*draw, "--sheet", str(tmp_path / "sheet.png")])
    assert refused.exit_code == 2
    assert "--sheet is made by one process, and this run has 2" in " ".join(refused.stderr.replace("│", " ").split())
    monkeypatch.setattr(replicas.torch.cuda, "is_available", lambda: True)
    refused = CliRunner().invoke(app, [*draw, "--device", "cuda:1"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("convrot: cuda:1 is one GPU, and this run has 2 processes")
