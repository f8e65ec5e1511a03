"""The demo on mini-flux, served once for each file of tests that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # gradio is not there where only other apps are tested
    from convrot_demo.worker import Worker

WEIGHTS = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    from convrot_demo.models import Options
    from convrot_demo.serve import load
    from convrot_demo.worker import Worker

    worker = Worker(load(Options(str(WEIGHTS), mini_flux=WEIGHTS)))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def url(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from convrot_demo.serve import Server, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = launch(worker, Server(), wait=False)
        yield page.local_url
        page.close()
