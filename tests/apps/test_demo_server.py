"""The demo as a server: gradio_client, bounds at the door, the queue, uploads, MCP, memory over many runs."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("convrot_demo", reason="apps/demo is not installed")
pytest.importorskip("gradio", reason="needs gradio")

import httpx
from gradio_client import Client, handle_file
from PIL import Image

from convrot_demo import cli, lora
from convrot_demo import worker as worker_file
from convrot_demo.drawing import Stopped
from convrot_demo.serve import Server, launch
from convrot_demo.worker import Worker

WEIGHTS = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights"
SMALL = {"steps": 1, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def generate(client: Client, **changes: Any) -> Any:
    return client.predict(**{"prompt": "a red cube", **SMALL, **changes}, api_name="/generate")


def test_the_api_gives_both_images_and_the_figures(client: Client) -> None:
    full, quantized, record = generate(client, seed=5, width=64)
    assert Image.open(full).size == Image.open(quantized).size == (64, 32)
    assert record["model"] == "mini-flux"
    assert record["inputs"]["seed"] == 5
    assert [side["name"] for side in record["sides"]] == ["BF16", "W4A4"]
    assert record["psnr_db"] > 10
    assert record["machine"]["torch"]


def test_a_random_seed_is_told(client: Client) -> None:
    seeds = {generate(client, seed=1, random_seed=True)[2]["inputs"]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_only_generate_is_offered(client: Client) -> None:
    offered = client.view_api(return_format="dict", print_info=False)
    assert list(offered["named_endpoints"]) == ["/generate"]
    assert not offered["unnamed_endpoints"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x" * 2001}, "2000"),
        ({"steps": 1000}, "50"),
        ({"width": 33}, "width must be a multiple of 16, got 33; use 32"),
        ({"height": 100_000}, "128"),
        ({"scheme": "W1A1"}, "W1A1"),
    ],
)
def test_inputs_are_bounded_at_the_door(client: Client, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        generate(client, **changes)
    assert generate(client)[2]["psnr_db"] > 10


def test_a_file_that_was_not_uploaded_is_not_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that names a path of the server instead of uploading something: never opened, and the call fails."""
    opened: list[str] = []
    monkeypatch.setattr(lora, "read", opened.append)
    path = str(WEIGHTS / "vae" / "diffusion_pytorch_model.safetensors")
    named = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.safetensors"}
    inputs = ["a red cube", "", 4.0, 0, 1, 3.5, 32, 32, "W4A4", 1.0, False, None, named]
    started = httpx.post(f"{url}gradio_api/call/generate", json={"data": inputs})
    events = httpx.get(f"{url}gradio_api/call/generate/{started.json()['event_id']}", timeout=120).text
    assert "event: error" in events
    assert "event: complete" not in events
    assert not opened


def test_an_upload_that_is_no_lora_is_refused(client: Client, tmp_path: Path) -> None:
    fake, pickled = tmp_path / "fake.safetensors", tmp_path / "lora.pt"
    fake.write_bytes(b"\x00" * 100)
    pickled.write_bytes(b"\x80\x04")
    with pytest.raises(Exception, match="cannot be read as safetensors"):
        generate(client, lora=handle_file(str(fake)))
    with pytest.raises(Exception, match=r"(?i)\.safetensors"):
        generate(client, lora=handle_file(str(pickled)))


def test_an_error_inside_is_a_sentence_and_the_server_stays_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker_file, "compare", broken)
    with pytest.raises(Exception, match="The machine ran out of memory: choose a smaller size than 32 x 32"):
        generate(client)
    monkeypatch.undo()
    assert generate(client)[2]["psnr_db"] > 10


def test_twenty_requests_at_once_all_finish_or_are_refused(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    real = worker_file.compare

    def counted(*arguments: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return real(*arguments)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(worker_file, "compare", counted)
    page = launch(worker, Server(queue=12), wait=False)
    try:
        client = Client(page.local_url, verbose=False, download_files=False)
        options = {"prompt": "a red cube", **SMALL, "api_name": "/generate"}
        jobs = [client.submit(**options, seed=seed) for seed in range(20)]
        answers = [job.exception(timeout=120) for job in jobs]
    finally:
        page.close()
    refused = [str(error) for error in answers if error is not None]
    assert most == 1
    assert all("Queue is full" in text for text in refused), refused
    assert 0 < len(refused) < 20
    assert {job.result()[2]["inputs"]["seed"] for job, error in zip(jobs, answers, strict=True) if error is None}


def test_a_client_that_cancels_stops_its_job(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    def endless(_models: Any, _job: Any, _report: Any, stop: threading.Event) -> None:
        assert stop.wait(120)
        stopped.set()
        raise Stopped

    monkeypatch.setattr(worker_file, "compare", endless)
    job = client.submit(**{"prompt": "a red cube", **SMALL}, api_name="/generate")
    deadline = time.monotonic() + 60
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.cancel()
    assert stopped.wait(60)


def test_mcp_offers_the_same_tool(worker: Worker) -> None:
    mcp = pytest.importorskip("mcp", reason="needs gradio[mcp]")
    from mcp.client.streamable_http import streamable_http_client

    async def follow(*_: object) -> None:
        """Gradio gives images as images only to a client that follows the call's progress."""

    async def ask(url: str) -> Any:
        async with streamable_http_client(url) as (reader, writer, _), mcp.ClientSession(reader, writer) as session:
            await session.initialize()
            given = {"prompt": "a red cube", **SMALL}
            return await session.list_tools(), await session.call_tool("generate", given, progress_callback=follow)

    page = launch(worker, Server(mcp=True), wait=False)
    try:
        listed, answer = asyncio.run(ask(f"{page.local_url}gradio_api/mcp/"))
    finally:
        page.close()
    (tool,) = listed.tools
    assert tool.name == "generate"
    assert "from the same noise" in tool.description
    assert tool.inputSchema["properties"]["prompt"]["description"].startswith("What to draw")
    assert not answer.isError, answer.content
    assert [part.type for part in answer.content].count("image") == 2, answer.content


def test_the_command_says_in_a_sentence_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convrot-demo", "--model", "/nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "convrot: /nowhere: no such folder"


@pytest.mark.slow
def test_memory_is_stable_over_fifty_runs(client: Client) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS:"))

    sizes = []
    for seed in range(50):
        generate(client, steps=2, width=128, height=128, seed=seed)
        sizes.append(resident())
    assert max(sizes[40:]) - max(sizes[:10]) < 64, sizes
