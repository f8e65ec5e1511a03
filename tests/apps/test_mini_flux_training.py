"""Training from nothing, in miniature: every stage runs, leaves its file, and a second run goes on from there."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline

from mini_flux import flow
from mini_flux.train import Recipe, train

pytestmark = pytest.mark.slow

TINY = Recipe(
    scenes=32, vae_seconds=2, judge_seconds=2, flow_seconds=6, distill_seconds=3, batch=8, checks=16, previews=4
)


def test_a_stopped_training_goes_on_and_ends_in_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "SAVE_EVERY_SECONDS", 0.5)
    run = flow.Trainer.run

    def stop_in_distillation(self, phase, *rest):
        if phase == "distill":
            raise KeyboardInterrupt
        run(self, phase, *rest)

    monkeypatch.setattr(flow.Trainer, "run", stop_in_distillation)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TINY, "cpu")
    assert (tmp_path / "flow.pt").exists()
    assert not (tmp_path / "pipeline").exists()
    monkeypatch.setattr(flow.Trainer, "run", run)
    folder = train(tmp_path, replace(TINY, flow_seconds=7), "cpu")
    log = (tmp_path / "train.log").read_text()
    assert "autoencoder, judge and latents of an earlier run" in log
    assert "flow: going on from step" in log
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    image = pipe("a small red cube", height=128, width=128, num_inference_steps=1, max_sequence_length=32).images[0]
    assert image.size == (128, 128)
