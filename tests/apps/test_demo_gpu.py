"""The demo as its visitors use it, without a browser: mini-flux, a pipeline of FLUX.1-dev's size, a full GPU.

What runs on a GPU runs on the CPU as well, on smaller pictures and a toy, so that a GPU's time is not spent on typos.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("convrot_demo", reason="apps/demo is not installed")
pytest.importorskip("gradio", reason="needs gradio")

import httpx
import torch
from gradio_client import Client
from PIL import Image

from convrot_bench.model import build
from convrot_bench.model.configs import REAL, TINY, Scale
from convrot_bench.model.pipeline import shared_parts
from convrot_demo.models import Options
from convrot_demo.serve import Server, launch, load
from convrot_demo.worker import Worker
from mini_flux.parts import make_clip_tokenizer, make_t5_tokenizer, save_pipeline

WEIGHTS = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
PROMPT = "a red cube in front of a blue sphere"
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job of a shell may ignore Ctrl-C
)
START += "from convrot_demo.cli import main; main()"
READY, PATIENCE = re.compile(r"http://127\.0\.0\.1:\d+/?"), 300  # seconds
GIB = 2**30


class Visitor:
    """Someone with the page's address: generate() is the API's, press() is the page's own button."""

    def __init__(self, url: str, downloads: Path, settings: dict[str, Any]) -> None:
        self._client = Client(url, verbose=False, download_files=str(downloads))
        self._settings = {"prompt": PROMPT, **settings}
        self._http = httpx.Client(base_url=url, timeout=PATIENCE)

    def generate(self, **changes: Any) -> tuple[Image.Image, Image.Image, dict[str, Any]]:
        """-> the 16-bit picture, the 4-bit one, settings and figures."""
        full, quantized, record = self._client.predict(**self._settings | changes, api_name="/generate")
        return Image.open(full), Image.open(quantized), record

    def press(self, **changes: Any) -> tuple[dict[str, Any], list[str]]:
        """What a press of Generate leaves in the page, by elem_id, and every state of its panes on the way."""
        config = self._http.get("config").json()
        boxes = {box["id"]: box["props"] for box in config["components"]}
        button = next(key for key, props in boxes.items() if props.get("elem_id") == "generate")
        steps = config["dependencies"]
        first = next(step for step in steps if [button, "click"] in step["targets"])
        job = next(step for step in steps if step["trigger_after"] == first["id"])
        wanted = {name.capitalize(): value for name, value in (self._settings | changes).items()}
        values = [wanted.get(boxes[key].get("label"), boxes[key].get("value")) for key in job["inputs"]]
        ids = [boxes[key].get("elem_id") for key in job["outputs"]]
        given = {"data": values, "fn_index": job["id"], "session_hash": f"visitor{time.monotonic_ns()}"}
        self._http.post("gradio_api/queue/join", json=given).raise_for_status()
        states: list[str] = []
        address = f"gradio_api/queue/data?session_hash={given['session_hash']}"
        with self._http.stream("GET", address) as events:
            for line in events.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if event.get("msg") == "process_generating":
                    states.append(line)
                elif event.get("msg") == "process_completed":
                    assert event["success"], event
                    left = zip(ids, event["output"]["data"], strict=True)
                    return {name: value for name, value in left if not isinstance(value, dict)}, states  # dict: kept
        raise AssertionError(f"the job never ended: {states[-1:]}")


@dataclass(frozen=True)
class Served:
    """The demo in this process: its models can be looked into."""

    device: str
    worker: Worker
    visitor: Visitor


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)])
def mini(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shipped mini-flux, served as `convrot-demo --device ...` does."""
    device = request.param
    size = {"steps": 2, "width": 64, "height": 48} if device == "cpu" else {"steps": 20, "width": 128, "height": 96}
    worker = Worker(load(Options(str(WEIGHTS), device=device, mini_flux=WEIGHTS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = launch(worker, Server(), wait=False)
        yield Served(device, worker, Visitor(page.local_url, tmp_path_factory.mktemp("client"), size))
        page.close()
    worker.close()


def psnr_of(record: dict[str, Any]) -> float:
    """PSNR in dB; equal pictures, which have none, are no plausible answer."""
    assert isinstance(record["psnr_db"], float), record
    return record["psnr_db"]


def check_page(shown: dict[str, Any], states: list[str], size: tuple[int, int], device: str) -> None:
    """Both pictures, the figures and the other tabs are in the page, previews came before, and there is no message."""
    assert "message" not in shown
    pictures = re.findall(r"data:image/png;base64,([\w+/=]+)", shown["panes"])
    assert [Image.open(io.BytesIO(b64decode(picture))).size for picture in pictures] == [size] * 2
    for said in ("SSIM", "Time per step", "Total time", "Peak memory", "Weights", "smaller"):
        assert said in shown["figures"]
    assert "not measured" not in shown["figures"]
    assert ("On a CPU the 4-bit side" in shown["figures"]) == (device == "cpu")
    assert len(shown["slider"]) == 2
    assert "data:image/" in shown["heat"]
    assert "<rect" in shown["layers"]
    assert any("data:image/jpeg" in state for state in states)


def test_both_pictures_come_with_their_figures(mini: Served) -> None:
    full, quantized, record = mini.visitor.generate(seed=5)
    models, inputs = mini.worker.models, record["inputs"]
    assert full.size == quantized.size == (inputs["width"], inputs["height"])
    assert all(low < high for picture in (full, quantized) for low, high in picture.getextrema())
    assert psnr_of(record) > 20
    assert record["memory"] == "both"
    assert len(record["layer_l2"]) == 38
    assert max(record["layer_l2"].values()) < 0.5
    sides = record["sides"]
    assert [side["name"] for side in sides] == ["BF16", "W4A4"]
    assert sides[0]["transformer_bytes"] > 3 * sides[1]["transformer_bytes"]
    for side in sides:
        assert 0 < side["seconds_per_step"] < side["seconds"]
        assert side["peak_memory_bytes"] > side["transformer_bytes"]
    for pipe in (models.take_16bit(), models.take_quantized("W4A4")):
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert {t.device.type for part in parts for t in part.state_dict().values()} == {mini.device}
    if mini.device == "cuda":
        assert record["machine"]["device"] == torch.cuda.get_device_name()
        assert sides[0]["peak_memory_bytes"] - sides[1]["peak_memory_bytes"] > 10 * 2**20


def test_a_seed_draws_the_same_pictures_again_and_another_seed_others(mini: Served) -> None:
    first, again, other = ([p.tobytes() for p in mini.visitor.generate(seed=seed)[:2]] for seed in (7, 7, 8))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("scheme", ["W4A8", "paper", "W4A4"])
def test_other_schemes_draw_and_the_first_one_comes_back(mini: Served, scheme: str) -> None:
    full, quantized, record = mini.visitor.generate(scheme=scheme)
    assert record["sides"][1]["name"] == mini.worker.models.scheme == scheme
    assert full.tobytes() != quantized.tobytes()
    assert psnr_of(record) > 20
    assert record["sides"][0]["transformer_bytes"] > 3 * record["sides"][1]["transformer_bytes"]


def test_a_press_of_generate_fills_the_page(mini: Served) -> None:
    steps = 6 if mini.device == "cpu" else 20  # a preview is due where it takes no more than a share of the time
    shown, states = mini.visitor.press(steps=steps, width=112, height=128)
    check_page(shown, states, (112, 128), mini.device)


@contextmanager
def full_gpu() -> Iterator[None]:
    """Nothing is left on the GPU for this process: all that its allocator has is taken, and it may not get more."""
    torch.cuda.empty_cache()
    taken, size = [], GIB
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        while size >= 512:  # the allocator's unit
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        taken.clear()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("mini", [pytest.param("cuda", marks=GPU)], indirect=True)
def test_a_gpu_that_is_full_is_a_sentence_and_the_next_run_draws(mini: Served) -> None:
    before = [p.tobytes() for p in mini.visitor.generate()[:2]]
    gc.collect()
    held = torch.cuda.memory_allocated()
    said = r"The GPU ran out of memory: choose a smaller size than 128 x 96, or start the demo with --memory"
    with full_gpu():
        with pytest.raises(Exception, match=said):
            mini.visitor.generate()
        shown, _ = mini.visitor.press()
        assert re.search(said, shown["message"])
    assert [p.tobytes() for p in mini.visitor.generate()[:2]] == before
    assert torch.cuda.memory_allocated() < held + 2**20


# a pipeline of FLUX.1-dev's size, by the command


def write_pipeline(scale: Scale, folder: Path, device: str) -> None:
    """A FluxPipeline with the scale's transformer and VAE, and text encoders of one layer each; random weights."""
    clip, t5 = make_clip_tokenizer([PROMPT]), make_t5_tokenizer([PROMPT])
    clip.model_max_length = scale.text_tokens["clip"]
    shallow = {"num_layers": 1, "num_heads": 4, "d_ff": 64, "vocab_size": len(t5)}
    narrow = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": len(clip)}
    shared = shared_parts(replace(scale, t5={**scale.t5, **shallow}, clip={**scale.clip, **narrow}), device)
    transformer = build.transformer("FluxTransformer2DModel", scale.flux, device)
    save_pipeline(folder, clip, t5, *shared.values(), transformer, max_shard_size="5GB")


@contextmanager
def command(log: Path, *options: str) -> Iterator[str]:
    """`convrot-demo` in a process of its own -> its address; ended with Ctrl-C, which is to be a clean end."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(log.with_suffix(".uploads"))}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)  # what tests set, and a visitor has not
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START, *options], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while (found := READY.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not re.search("Traceback|ERROR", log.read_text()), log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "scale"), [pytest.param("cpu", TINY, id="toy"), pytest.param("cuda", REAL, id="flux", marks=GPU)]
)
def test_a_pipeline_of_flux_size_opens_by_the_command_and_4_bits_are_faster(
    device: str, scale: Scale, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """24 GB are written and read: about two minutes on an H200."""
    folder = tmp_path / "flux"
    try:
        started = time.monotonic()
        write_pipeline(scale, folder, device)
        record_property("writing_seconds", time.monotonic() - started)
        if device == "cuda":  # room for the other process
            gc.collect()
            torch.cuda.empty_cache()
        with command(tmp_path / "log", "--model", str(folder), "--device", device) as url:
            record_property("ready_seconds", time.monotonic() - started)
            visitor = Visitor(url, tmp_path / "client", {"steps": 4, "width": scale.side, "height": scale.side})
            shown, states = visitor.press()
            check_page(shown, states, (scale.side, scale.side), device)
            runs = [visitor.generate(steps=steps) for steps in (4, 12)]
    finally:
        for file in sorted(folder.rglob("*.safetensors")):
            file.unlink()
    for full, quantized, record in runs:
        record_property(f"{record['inputs']['steps']}_steps", record["sides"])
        assert full.size == quantized.size == (scale.side, scale.side)
        assert record["memory"] == "both"
        assert 0.01 < median(record["layer_l2"].values()) < 0.4
        if device == "cuda":
            check_gain(*record["sides"])


def check_gain(full: dict[str, Any], quantized: dict[str, Any]) -> None:
    """FLUX.1-dev's 23.8 GB in BF16 against 6.1; beside them both sides need the same: VAE, latents, decoding."""
    assert full["transformer_bytes"] == pytest.approx(23.8e9, rel=0.01)
    assert quantized["transformer_bytes"] == pytest.approx(6.1e9, rel=0.1)
    beside = [side["peak_memory_bytes"] - side["transformer_bytes"] for side in (full, quantized)]
    assert all(0 < size < 8e9 for size in beside), beside
    assert beside[1] == pytest.approx(beside[0], abs=2e9)
    assert quantized["seconds_per_step"] < full["seconds_per_step"] / 1.3
    assert quantized["seconds"] < full["seconds"]
