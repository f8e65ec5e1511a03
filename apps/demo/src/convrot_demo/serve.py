"""serve: from a model to a page that answers, on this machine alone unless told otherwise."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

from convrot_demo.lora import MAX_BYTES
from convrot_demo.models import Models, Options
from convrot_demo.page import CSS, build, theme
from convrot_demo.worker import Worker
from convrot_quant.cli.output import hush


@dataclass(frozen=True)
class Server:
    """Where the page is served, to whom, and how many may wait."""

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    mcp: bool = False
    queue: int = 16


def serve(options: Options, server: Server) -> None:
    """Load the model, then serve until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    hush(quiet=False)
    worker = Worker(load(options))
    launch(worker, server, wait=True)
    worker.close()


def load(options: Options) -> Models:
    """Both transformers, so that the first press of Generate does not wait and a wrong model shows here."""
    models = Models(options)
    models.take_quantized(models.schemes[0])
    return models


def launch(worker: Worker, server: Server, *, wait: bool) -> Any:
    """The page, served; with `wait` until Ctrl-C, else in the background: the gr.Blocks is to be closed."""
    if server.mcp and importlib.util.find_spec("mcp") is None:
        raise ValueError("--mcp needs the package mcp: pip install 'gradio[mcp]'")
    page = build(worker, server.queue)
    page.launch(
        server_name=server.host,
        server_port=server.port,
        share=server.share,
        mcp_server=server.mcp,
        max_file_size=MAX_BYTES,
        footer_links=["api", "settings"],
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=not wait,
        quiet=not wait,
        theme=theme(),
        css_paths=CSS,
    )
    return page
