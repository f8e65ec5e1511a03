"""The demo in a real browser: Debian's chromium through playwright; screenshots in outputs/demo."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("convrot_demo", reason="apps/demo is not installed")
pytest.importorskip("gradio", reason="needs gradio")
pytest.importorskip("playwright", reason="needs playwright")

import torch
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from safetensors.torch import save_file

from convrot_demo import worker as worker_file
from convrot_demo.comparison import FULL, Event
from convrot_demo.drawing import Step, Stopped
from convrot_demo.serve import Server, launch
from convrot_demo.worker import Worker

ROOT = Path(__file__).parents[2]
WEIGHTS, SHOTS = ROOT / "apps" / "mini-flux" / "weights", ROOT / "outputs" / "demo"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 60_000  # ms; a machine may be busy with something else

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """open_page(query, viewport=...) -> the demo; the test fails if the page asks another server for anything."""
    contexts, foreign = [], []

    def watch(request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            foreign.append(request.url)

    def opened(query: str = "", viewport: dict[str, int] = DESKTOP, at: str = url, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport=viewport, accept_downloads=True, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.on("request", watch)
        page.goto(at + query)
        expect(page.locator("#generate")).to_be_enabled()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not foreign


def set_number(page: Page, label: str, value: int) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def generate(page: Page, steps: int = 2) -> None:
    """A whole comparison, of few steps."""
    set_number(page, "Steps", steps)
    page.locator("#generate").click()
    expect(page.locator("#figures table")).to_be_visible()
    expect(page.locator("#generate")).to_be_enabled()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pane(page: Page, side: int) -> Locator:
    return page.locator("#panes figure").nth(side)


def test_a_whole_comparison_with_every_tab(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    page.screenshot(path=SHOTS / "start.png", full_page=True)
    generate(page, steps=20)
    for side, name in enumerate(("BF16", "W4A4")):
        expect(pane(page, side).locator("b")).to_have_text(name)
        expect(pane(page, side).locator("img")).to_have_attribute("src", re.compile("^data:image/png"))
        expect(pane(page, side).locator(".cr-status")).to_contain_text("a step")
    expect(page.locator("#figures")).to_contain_text("3.28x smaller")
    assert re.search(r"PSNR\s*\d\d\.\d dB", page.locator("#figures").inner_text())
    page.screenshot(path=SHOTS / "pair.png", full_page=True)
    with page.expect_download() as saved:
        pane(page, 1).get_by_text("Save PNG").click()
    assert saved.value.suggested_filename == "w4a4.png"
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as settings:
        page.get_by_text("Settings (JSON)").click()
    assert json.loads(Path(settings.value.path()).read_text())["inputs"]["steps"] == 20
    tab(page, "Difference")
    expect(page.locator("#heat img")).to_be_visible()
    page.screenshot(path=SHOTS / "difference.png", full_page=True)
    tab(page, "Error per layer")
    expect(page.locator("#layers rect")).to_have_count(38)
    page.screenshot(path=SHOTS / "layers.png", full_page=True)
    tab(page, "Plan")
    expect(page.locator("#plan")).to_contain_text("16-bit: output layer")
    page.screenshot(path=SHOTS / "plan.png", full_page=True)


def test_the_slider_moves(open_page: Callable[..., Page]) -> None:
    page = open_page()
    generate(page, steps=12)
    tab(page, "Slider")
    handle = page.locator("#slider [data-testid=slider]")
    expect(handle).to_be_visible()
    before = handle.bounding_box()
    assert before is not None
    x, y = before["x"] + before["width"] / 2, before["y"] + before["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 120, y, steps=5)
    page.mouse.up()
    after = handle.bounding_box()
    assert after is not None
    assert -140 < after["x"] - before["x"] < -100
    right = page.locator("#slider img").nth(1)
    assert re.search(r"clip-path: inset\(0px 0px 0px [1-4]\d", right.get_attribute("style") or "")
    page.screenshot(path=SHOTS / "slider.png", full_page=True)


def test_progress_appears_step_by_step_and_stop_ends_it(open_page: Callable[..., Page]) -> None:
    page = open_page()
    set_number(page, "Steps", 50)
    page.locator("#generate").click()
    expect(pane(page, 0).locator(".cr-status")).to_contain_text(re.compile(r"step \d+ of 50, \d+"))
    expect(pane(page, 0).locator("img")).to_have_attribute("src", re.compile("^data:image/jpeg"))
    expect(page.locator("#generate")).to_be_disabled()
    page.screenshot(path=SHOTS / "progress.png", full_page=True)
    page.locator("#stop").click()
    expect(pane(page, 1)).to_contain_text("stopped")
    expect(page.locator("#generate")).to_be_enabled()
    assert page.locator("#figures table").count() == 0


def slow(started: threading.Event, stopped: threading.Event) -> Callable[..., Any]:
    """In the place of compare: steps for minutes, unless it is stopped."""

    def steps(_models: Any, _job: Any, report: Callable[[Event], None], stop: threading.Event) -> None:
        started.set()
        for done in range(1, 600):
            report(Event(FULL, step=Step(done, 600, 0.1, None)))
            if stop.wait(0.5):
                stopped.set()
                raise Stopped
        raise AssertionError("nobody stopped it")

    return steps


def test_leaving_the_page_stops_its_job_and_stop_works_before_a_turn(
    open_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, stopped = threading.Event(), threading.Event()
    monkeypatch.setattr(worker_file, "compare", slow(started, stopped))
    first, second = open_page(), open_page()
    first.locator("#generate").click()
    assert started.wait(PATIENCE / 1000)
    expect(pane(first, 0).locator(".cr-status")).to_contain_text("of 600")
    started.clear()
    second.locator("#generate").click()
    expect(pane(second, 0)).to_contain_text("waiting for its turn")
    second.locator("#stop").click()
    first.close()
    assert stopped.wait(PATIENCE / 1000)
    expect(pane(second, 0)).to_contain_text("stopped")


def test_a_full_line_refuses_with_a_message(
    worker: Worker, open_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_file, "compare", slow(threading.Event(), threading.Event()))
    server = launch(worker, Server(queue=1), wait=False)
    try:
        served, waiting, refused = (open_page(at=server.local_url) for _ in range(3))
        for page, seen in ((served, "of 600"), (waiting, "waiting for its turn")):
            page.locator("#generate").click()
            expect(pane(page, 0)).to_contain_text(seen)
        deadline = time.monotonic() + PATIENCE / 1000
        while not len(server._queue) and time.monotonic() < deadline:  # what is seen comes before the job is in line
            waiting.wait_for_timeout(50)
        refused.locator("#generate").click()
        expect(refused.locator("#message")).to_contain_text("This job was refused: the line is full")
        expect(refused.locator("#generate")).to_be_enabled()
        for page in (served, waiting):
            page.locator("#stop").click()
            expect(pane(page, 0)).to_contain_text("stopped")
    finally:
        server.close()


def test_a_wrong_file_and_a_wrong_link_are_sentences(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page("?prompt=a+red+cube&steps=999")
    expect(page.get_by_role("alert").first).to_contain_text("steps must be from 1 to 50, got '999'")
    path = tmp_path / "other.safetensors"
    save_file({"transformer.blocks.9.lora_A.weight": torch.ones(4, 64)}, path)
    page.get_by_text("LoRA", exact=True).click()
    page.locator("#lora input[type=file]").set_input_files(path)
    expect(page.locator("#lora")).to_contain_text("other")
    set_number(page, "Steps", 1)
    page.locator("#generate").click()
    expect(page.get_by_role("alert").first).to_contain_text("does not fit this FluxTransformer2DModel")
    expect(page.locator("#generate")).to_be_enabled()
    page.screenshot(path=SHOTS / "error.png", full_page=True)
    page.locator("#lora").get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    generate(page)
    assert page.locator("#message [role=alert]").count() == 0


def test_a_link_restores_the_settings(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.locator("#prompt textarea").fill("a large red cube & <b>more</b>")
    page.get_by_label("W8A8").check()
    set_number(page, "Width", 64)
    page.get_by_label("Random seed").check()
    generate(page)
    seed = page.get_by_label("Seed", exact=True).input_value()
    link = page.locator("#settings-link").get_attribute("href")
    assert link is not None
    again = open_page(link)
    expect(again.locator("#prompt textarea")).to_have_value("a large red cube & <b>more</b>")
    expect(again.get_by_label("W8A8")).to_be_checked()
    expect(again.get_by_label("number input for Width")).to_have_value("64")
    expect(again.get_by_label("Seed", exact=True)).to_have_value(seed)


def test_a_phone_sized_window_needs_no_sideways_scrolling(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport=PHONE, device_scale_factor=2, has_touch=True)
    generate(page, steps=8)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    ask, show, settings = (page.locator(f"#{name}").bounding_box() for name in ("ask", "show", "settings"))
    assert ask is not None
    assert show is not None
    assert settings is not None
    assert ask["y"] < show["y"] < settings["y"]
    page.screenshot(path=SHOTS / "phone.png", full_page=True)


def test_the_dark_theme_is_dark(open_page: Callable[..., Page]) -> None:
    page = open_page("?__theme=dark")
    generate(page, steps=8)
    colour = page.locator("gradio-app").evaluate("page => getComputedStyle(page).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour))) < 60
    page.screenshot(path=SHOTS / "dark.png", full_page=True)
