"""The demo on mini-flux: comparisons, LoRA files, Stop, placements, saved transformers, limits."""

from __future__ import annotations

import json
import math
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("convrot_demo", reason="apps/demo is not installed")
pytest.importorskip("gradio", reason="needs gradio")

import torch
from PIL import Image
from safetensors.torch import save_file

from convrot_demo import figures, heat, layers, lora, plan_table
from convrot_demo import models as models_file
from convrot_demo import worker as worker_file
from convrot_demo.comparison import FULL, QUANTIZED, Event, Job, Side, compare
from convrot_demo.drawing import Drawn, Stopped, arguments_of, draw
from convrot_demo.errors import UserError
from convrot_demo.inputs import Inputs
from convrot_demo.models import SAVED, Models, Options
from convrot_demo.traits import Limits, read_traits
from convrot_demo.worker import Failed, Worker
from convrot_quant.config import QuantConfig
from convrot_quant.generation import Settings
from convrot_quant.generation import generate as generate_images
from convrot_quant.pipeline import load_pipeline, open_folder, quantize_folder

WEIGHTS = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights"
DEFAULTS = Inputs("a red cube", steps=2, width=64, height=64)
MIB = 2**20


def side(name: str, size: int, seconds: float, peak: int | None = 5 * MIB) -> Side:
    return Side(name, Drawn(Image.new("RGB", (8, 8)), seconds, seconds / 10, peak), size)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(Options(str(WEIGHTS), mini_flux=WEIGHTS))


@pytest.fixture(scope="module")
def mini_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on two kinds of mini-flux's layers, strong enough to be seen."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    shapes = {"transformer_blocks.0.attn.to_q": (512, 512), "single_transformer_blocks.1.proj_mlp": (2048, 512)}
    for name, (n, k) in shapes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, k, generator=generator) * 0.1
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, 4, generator=generator) * 0.1
    path = tmp_path_factory.mktemp("lora") / "mini.safetensors"
    save_file(tensors, path)
    return path


def run(models: Models, job: Job, report: Callable[[Event], None] = lambda event: None) -> Any:
    return compare(models, job, report, threading.Event())


def test_a_lora_must_be_safetensors_of_bounded_size_with_a_lora_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_lora: Path
) -> None:
    pickled, torn, other = tmp_path / "a.pt", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    pickled.write_bytes(b"\x80\x04")
    torn.write_bytes(b"\x10" * 64)
    save_file({"weight": torch.ones(2)}, other)
    for path, said in ((pickled, "must be a .safetensors"), (torn, "cannot be read"), (other, "holds no LoRA")):
        with pytest.raises(UserError, match=said):
            lora.read(str(path))
    assert lora.read(str(mini_lora)).name == "mini.safetensors"
    monkeypatch.setattr(lora, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="use a lower rank"):
        lora.read(str(mini_lora))


def test_a_lora_changes_both_sides_and_leaves_nothing_behind(models: Models, mini_lora: Path) -> None:
    plain, with_lora = run(models, Job(DEFAULTS)), run(models, Job(DEFAULTS, lora=lora.read(str(mini_lora))))
    after = run(models, Job(DEFAULTS))
    for side in ("full", "quantized"):
        before, changed, again = (getattr(found, side).drawn.image for found in (plain, with_lora, after))
        assert heat.difference(before, changed).mean() > 0.5
        assert before.tobytes() == again.tobytes()
    # both sides have it: a layer's error is that of quantization alone
    assert max(with_lora.layer_l2.values()) < 0.5
    assert with_lora.to_dict()["lora"]["name"] == "mini.safetensors"


@pytest.mark.parametrize("broken", ["shape", "name", "other"])
def test_a_lora_of_another_model_is_a_sentence_and_the_models_stay_usable(
    models: Models, mini_lora: Path, broken: str
) -> None:
    good = lora.read(str(mini_lora))
    changed = {
        "shape": {key: t[:, :100] if "lora_A" in key else t for key, t in good.tensors.items()},
        "name": {key.replace("blocks.0", "blocks.77"): t for key, t in good.tensors.items()},
        "other": {"lora_junk": torch.ones(3)},
    }[broken]
    with pytest.raises(UserError, match="does not fit this FluxTransformer2DModel"):
        run(models, Job(DEFAULTS, lora=replace(good, tensors=changed)))
    assert not [name for name, _ in models.take_16bit().transformer.named_modules() if "lora" in name]
    assert run(models, Job(DEFAULTS)).psnr_db > 20


def test_both_sides_are_what_convrot_generate_draws(models: Models) -> None:
    inputs, seen = replace(DEFAULTS, prompt=models.traits.examples[0], seed=3), []
    outcome = run(models, Job(inputs), seen.append)
    settings = Settings(seed=3, steps=2, guidance=inputs.guidance, height=64, width=64)
    pipe = load_pipeline(open_folder(WEIGHTS))
    expected = generate_images(pipe, [inputs.prompt], settings, progress=False)[0].image
    assert outcome.full.drawn.image.tobytes() == expected.tobytes()
    assert [event.step.done for event in seen if event.side == FULL and event.step] == [1, 2]
    assert [event.step.done for event in seen if event.side == QUANTIZED and event.step] == [1, 2]
    assert outcome.full.transformer_bytes > 3 * outcome.quantized.transformer_bytes
    assert len(outcome.layer_l2) == 38
    assert 0 < outcome.quantized.drawn.step_seconds <= outcome.quantized.drawn.seconds
    assert json.loads(json.dumps(outcome.to_dict(), allow_nan=False))["inputs"]["seed"] == 3


def test_the_other_sides_of_a_run_are_shared(models: Models) -> None:
    encoder = models.take_16bit().text_encoder_2
    assert models.take_quantized("W4A4").text_encoder_2 is encoder


def test_a_negative_prompt_counts_on_both_sides(models: Models) -> None:
    plain, negative = (run(models, Job(replace(DEFAULTS, negative_prompt=text))) for text in ("", "a blue cone"))
    assert plain.full.drawn.image.tobytes() != negative.full.drawn.image.tobytes()
    assert plain.quantized.drawn.image.tobytes() != negative.quantized.drawn.image.tobytes()


def test_an_editing_model_gets_the_picture_and_the_size_that_was_asked_for(models: Models) -> None:
    from diffusers import FluxKontextPipeline

    pipe, picture = FluxKontextPipeline(**models.take_16bit().components), Image.new("RGB", (40, 20))
    arguments = arguments_of(pipe, DEFAULTS, picture)
    assert arguments["image"] is picture
    assert arguments["max_area"] == 64 * 64
    traits = read_traits(pipe, "kontext", mini_flux=None, schemes=("W4A4",))
    assert (traits.has_image, traits.defaults.steps, traits.examples[0]) == (True, 28, "make it a watercolour")
    without, stop = arguments_of(pipe, DEFAULTS, None), threading.Event()
    drawn = draw(pipe, without, 0, device="cpu", report=lambda step: None, stop=stop, previews=True)
    assert drawn.image.size == (64, 64)


def test_a_distilled_model_has_no_guidance_to_set_and_few_steps(models: Models) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    components = models.take_16bit().components
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config({**components["transformer"].config, "guidance_embeds": False})
    pipe = FluxPipeline(**{**components, "transformer": model})
    traits = read_traits(pipe, "schnell", mini_flux=None, schemes=("W4A4",))
    assert (traits.has_guidance, traits.has_negative, traits.defaults.steps) == (False, False, 4)


def test_previews_come_before_the_image_and_resemble_it(models: Models) -> None:
    inputs, seen = replace(models.traits.defaults, steps=12), []
    outcome = run(models, Job(inputs), seen.append)
    found = [e.step.preview for e in seen if e.side == QUANTIZED and e.step and e.step.preview]
    assert found
    assert found[-1].size == (128, 128)
    distance = [heat.difference(picture, outcome.quantized.drawn.image).mean() for picture in (found[0], found[-1])]
    assert distance[-1] <= distance[0] < 80


def test_a_prompt_that_is_too_long_for_the_model_is_said(models: Models) -> None:
    outcome = run(models, Job(replace(DEFAULTS, prompt="a red cube " * 100)))
    assert outcome.warnings[0].endswith("its end is cut off.")


def test_stop_ends_a_run_after_its_step_and_the_next_one_works(models: Models) -> None:
    stop, seen = threading.Event(), []

    def report(event: Event) -> None:
        seen.append(event)
        if event.step is not None:
            stop.set()

    with pytest.raises(Stopped):
        compare(models, Job(replace(DEFAULTS, steps=50)), report, stop)
    assert len([event for event in seen if event.step]) == 1
    assert run(models, Job(DEFAULTS)).psnr_db > 20


def test_the_worker_streams_events_and_ends_with_an_outcome_or_a_failure(models: Models) -> None:
    worker = Worker(models)
    *events, last = worker.stream(Job(DEFAULTS), threading.Event())
    assert [event.side for event in events if event and event.finished] == [FULL, QUANTIZED]
    assert last.psnr_db > 20
    *_, failed = worker.stream(Job(replace(DEFAULTS, scheme="W9A9")), threading.Event())
    assert isinstance(failed, Failed)
    stop = threading.Event()
    stream = worker.stream(Job(replace(DEFAULTS, steps=50)), stop)
    next(stream)
    stream.close()  # the visitor has left
    assert stop.is_set()
    worker.close()


def test_what_a_failed_run_held_is_let_go_and_its_log_says_where(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []

    def broken(*_: object) -> None:
        x = torch.empty(8)
        held.append(weakref.ref(x))
        raise MemoryError

    def restoring(*_: object) -> None:
        try:
            broken()
        finally:
            broken()

    monkeypatch.setattr(worker_file, "compare", restoring)
    worker = Worker(models)
    *_, failed = worker.stream(Job(DEFAULTS), threading.Event())
    worker.close()
    assert [one() for one in held] == [None, None]
    assert "in broken" in "".join(traceback.format_exception(failed.error))


@pytest.mark.parametrize("way", ["swap", "offload", "4bit"])
def test_every_placement_draws_the_same_images(
    models: Models, monkeypatch: pytest.MonkeyPatch, device: str, way: str
) -> None:
    """The bytes that budget() gives are pretended; on the CPU the ways of a GPU are as well."""
    options = Options(str(WEIGHTS), device=device, mini_flux=WEIGHTS)
    expected = run(models if device == "cpu" else Models(options), Job(DEFAULTS))
    sizes = {"swap": 345, "offload": 345, "4bit": 292}
    monkeypatch.setattr(models_file, "budget", lambda device, vram: sizes[way] * MIB)
    memory: Any = "offload" if way == "offload" else "auto"
    other = Models(replace(options, memory=memory))
    assert other.way == way
    outcome = run(other, Job(DEFAULTS))
    assert outcome.quantized.drawn.image.tobytes() == expected.quantized.drawn.image.tobytes()
    if way == "4bit":
        assert outcome.full is None
        assert outcome.psnr_db is None
        assert "BF16 does not fit" in other.placement.note
    else:
        assert outcome.full.drawn.image.tobytes() == expected.full.drawn.image.tobytes()
    again = run(other, Job(replace(DEFAULTS, scheme="W8A8")))
    assert again.quantized.transformer_bytes > outcome.quantized.transformer_bytes


def test_a_saved_transformer_draws_what_its_preset_draws(models: Models, tmp_path: Path) -> None:
    quantize_folder(open_folder(WEIGHTS), tmp_path / "saved", QuantConfig.preset("ours"), progress=False)
    both = Models(Options(str(WEIGHTS), str(tmp_path / "saved"), mini_flux=WEIGHTS))
    assert both.schemes == (SAVED, "W4A4", "W4A4-r16", "W4A8", "W8A8", "paper")
    saved, preset = run(both, Job(replace(DEFAULTS, scheme=SAVED))), run(models, Job(DEFAULTS))
    assert saved.quantized.drawn.image.tobytes() == preset.quantized.drawn.image.tobytes()
    alone = Models(Options(str(tmp_path / "saved")))
    assert (alone.schemes, alone.way) == ((SAVED,), "4bit")
    assert "has no 16-bit weights" in alone.placement.note
    assert run(alone, Job(replace(DEFAULTS, scheme=SAVED))).full is None
    with pytest.raises(ValueError, match="is not quantized; `convrot quantize` makes one"):
        Models(Options(str(WEIGHTS), str(WEIGHTS)))
    with pytest.raises(ValueError, match="--model is the 16-bit one"):
        Models(Options(str(tmp_path / "saved"), str(tmp_path / "saved")))


def test_a_server_s_limits_bound_what_a_model_could_do() -> None:
    small = Models(Options(str(WEIGHTS), limits=Limits(steps=4, size=128), mini_flux=WEIGHTS))
    assert (small.bounds.steps, small.bounds.sizes, small.traits.defaults.steps) == (4, (32, 128), 4)
    with pytest.raises(ValueError, match="--max-size 64 is below the 128 x 128 of this model"):
        Models(Options(str(WEIGHTS), limits=Limits(size=64)))


def test_a_missing_model_is_a_sentence() -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Models(Options("/nowhere/at/all"))


def test_figures_say_how_the_sides_compare(models: Models) -> None:
    outcome = run(models, Job(DEFAULTS))
    faster = replace(outcome, full=side("BF16", 400, 2.0), quantized=side("W4A4", 100, 1.0, None), psnr_db=math.inf)
    text = figures.html(faster, ("a <note>",))
    for said in ("2.00x faster", "4.00x smaller", "not measured", "equal", "a &lt;note&gt;", "100 ms", "200 ms"):
        assert said in text
    alone = figures.html(replace(outcome, full=None, psnr_db=None, ssim=None), ())
    assert "PSNR" not in alone
    assert "cr-side1" in alone


def test_layer_plot_and_plan_table_show_every_layer(models: Models) -> None:
    outcome = run(models, Job(DEFAULTS))
    text = layers.html(outcome.layer_l2, outcome.plan)
    assert text.count("<rect") == 38
    assert text.count("<title>") == 38
    assert "single_transformer_blocks" in text
    assert "Needs a 16-bit run" in layers.html({}, outcome.plan)
    table = plan_table.html(outcome.plan)
    assert "16-bit: output layer" in table
    assert "51.6 MiB become 15.7 MiB" in table
