"""Offloading on a GPU whose memory is limited: a run fits where its pipeline would not."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from convrot_quant import QuantConfig
from convrot_quant.generation import Settings, generate
from convrot_quant.offload import apply, budget, choose
from convrot_quant.pipeline import fill_pipeline, open_folder, outline_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
MB = 10**6


@pytest.fixture
def limited() -> Iterator[None]:
    """torch's limit on this process goes after the test."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def _pipeline(folder: Path) -> Any:
    """The tiny pipeline, quantized while it is read, with a T5 of 0.6 GB: more than the others together."""
    from transformers import T5Config, T5EncoderModel

    pipe = outline_pipeline(open_folder(folder), QuantConfig.preset("ours"), dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16, "device": "cuda", "home": "cpu", "progress": False}
    fill_pipeline(pipe, open_folder(folder), QuantConfig.preset("ours"), **options)
    old = pipe.text_encoder_2.config
    config = T5Config(
        d_model=old.d_model, d_kv=64, d_ff=65536, num_layers=24, num_heads=2, vocab_size=old.vocab_size,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    pipe.text_encoder_2 = T5EncoderModel(config).bfloat16().eval()
    return pipe


@pytest.mark.parametrize(("megabytes", "method"), [(700, "group"), (1500, "none")])
def test_a_limited_run_fits_and_draws_the_same(
    limited: None, pipeline_folder: Path, megabytes: int, method: str
) -> None:
    settings = Settings(steps=2)
    torch.manual_seed(0)
    pipe = _pipeline(pipeline_folder)
    memory = budget("cuda", megabytes * MB)
    assert memory is not None
    offload = choose(pipe, memory, settings)
    assert offload.method == method
    torch.cuda.reset_peak_memory_stats()
    apply(pipe, offload, "cuda")
    (picture,) = generate(pipe, ["a red cube"], settings, progress=False)
    assert torch.cuda.max_memory_reserved() <= megabytes * MB
    assert torch.cuda.max_memory_allocated() <= offload.peak
    assert len(picture.image.getcolors(1 << 20) or range(2)) > 1
