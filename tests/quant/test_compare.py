"""Error figures on known inputs, the layer probe, the comparison run, and the sheet's pixels."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convrot_quant.compare
from convrot_quant import Scheme, apply, dequantize_, plan, quantize_
from convrot_quant.compare import Result, Variant, compare, dtype_name, psnr_db, ssim
from convrot_quant.generation import Picture, Settings
from convrot_quant.pipeline import load_pipeline, load_transformer, open_folder
from convrot_quant.probe import CALLS, ROWS, LayerProbe
from convrot_quant.sheet import draw_sheet


def image(values: numpy.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(numpy.uint8))


@pytest.fixture
def noise() -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 200, (32, 48, 3))


def test_psnr_is_ten_log_of_peak_over_squared_error(noise: numpy.ndarray) -> None:
    assert psnr_db(image(noise), image(noise)) == math.inf
    assert psnr_db(image(noise + 51), image(noise)) == pytest.approx(20 * math.log10(255 / 51))
    assert psnr_db(image(noise + 1), image(noise)) == pytest.approx(20 * math.log10(255))


def test_ssim_is_one_for_equal_images_and_falls_with_noise(noise: numpy.ndarray) -> None:
    assert ssim(image(noise), image(noise)) == pytest.approx(1.0)
    little = ssim(image(noise + numpy.random.default_rng(1).integers(0, 9, noise.shape)), image(noise))
    assert 0.9 < little < 1.0
    assert ssim(image(199 - noise), image(noise)) < 0


def test_probe_measures_the_relative_error_of_each_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 64))
    x = torch.randn(3, 40, 512)
    with LayerProbe(model, ["0"], expected_calls=1) as probe, torch.no_grad():
        model(x)
        expected = model[0](x).flatten(0, 1)[:: 120 // ROWS][:ROWS]
    assert probe.errors(model, ["0"]) == {"0": 0.0}
    apply(model, {"0": Scheme()}, progress=False)
    actual = model[0](x).flatten(0, 1)[:: 120 // ROWS][:ROWS]
    error = float((actual - expected).norm() / expected.norm())
    assert probe.errors(model, ["0"]) == {"0": pytest.approx(error)}
    assert 0.05 < error < 0.25


def test_probe_keeps_few_rows_of_calls_from_the_whole_run() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with LayerProbe(model, ["0"], expected_calls=20) as probe:
        for i in range(20):
            model(torch.full((100, 8), float(i)))
    kept = [float(rows[0, 0]) for rows in probe.inputs["0"]]
    assert kept == [2.0, 7.0, 12.0, 17.0]
    assert len(kept) == CALLS
    assert {tuple(rows.shape) for rows in probe.inputs["0"]} == {(ROWS, 8)}
    assert not model[0]._forward_hooks
    assert probe.errors(model, ["1"]) == {}


@pytest.mark.parametrize(("calls", "kept"), [(1, [0]), (2, [0]), (4, [1]), (8, [1, 4, 7]), (12, [1, 4, 7, 10])])
def test_most_calls_of_a_short_run_are_not_slowed_by_the_probe(calls: int, kept: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with LayerProbe(model, ["0"], expected_calls=calls) as probe:
        for i in range(calls):
            model(torch.full((2, 8), float(i)))
    assert [int(rows[0, 0]) for rows in probe.inputs["0"]] == kept


def test_compare_gives_errors_sizes_and_one_model_at_a_time(
    pipeline_folder: Path, prompts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pipeline_folder / "transformer"
    pipe = load_pipeline(open_folder(pipeline_folder))
    held = []

    def make(preset: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            held.append(pipe.transformer)
            model = load_transformer(path)
            quantize_(model, preset, progress=False)
            return model

        return build

    variants = [Variant(name, plan(pipe.transformer, name), make(name)) for name in ("w8a8", "paper")]
    results = compare(pipe, variants, prompts, Settings(steps=2), progress=False)
    assert held == [None, None]
    assert [result.name for result in results] == ["BF16", "w8a8", "paper"]
    base, w8a8, paper = results
    assert base.transformer_bytes == plan(load_transformer(path)).bytes_before
    assert paper.transformer_bytes == plan(load_transformer(path), "paper").bytes_after
    assert w8a8.layer_l2_median < 0.02 < paper.layer_l2_median < 0.25
    assert paper.layer_l2 is not None
    assert paper.layer_l2.keys() == plan(load_transformer(path), "paper").keys()
    for result in (w8a8, paper):
        for i, picture in enumerate(result.pictures):
            assert result.psnr_db[i] == psnr_db(base.pictures[i].image, picture.image)
            assert result.ssim[i] == ssim(base.pictures[i].image, picture.image)
    assert sum(w8a8.psnr_db) > sum(paper.psnr_db)
    figures = paper.to_dict(base)
    assert figures["times_smaller"] == base.transformer_bytes / paper.transformer_bytes
    assert "psnr_db" not in base.to_dict(base)


def test_figures_of_equal_images_are_null_not_infinite(noise: numpy.ndarray) -> None:
    pictures = [Picture("x", 0, image(noise), 1.0)]
    base = Result("BF16", pictures, 4)
    figures = Result("same", pictures, 2, [math.inf], [1.0], {}).to_dict(base)
    assert figures["psnr_db"] == [None]
    assert figures["psnr_db_mean"] is None
    assert figures["layer_l2_median"] is None
    assert figures["times_smaller"] == 2.0


def test_dtype_name_is_that_of_most_values(make_flux: Callable[..., nn.Module]) -> None:
    assert dtype_name(make_flux()) == "BF16"
    assert dtype_name(make_flux(dtype=torch.float16)) == "FP16"


def results_of(count: int, columns: int, size: tuple[int, int], prompt: str = "a red cube") -> list[Result]:
    """Plain-coloured pictures: column c of picture i is (40 i, 60 c, 200)."""
    made = []
    for c in range(columns):
        colours = [(40 * i % 256, 60 * c, 200) for i in range(count)]
        pictures = [Picture(prompt, i, Image.new("RGB", size, colours[i]), 1.0) for i in range(count)]
        figures: dict = {} if c == 0 else {"psnr_db": [20.0] * count, "ssim": [0.9] * count, "layer_l2": {"a": 0.1}}
        made.append(Result(f"model {c}", pictures, 1000, **figures))
    return made


@pytest.mark.parametrize(("count", "columns", "size"), [(1, 2, (32, 32)), (8, 2, (128, 128)), (3, 4, (300, 200))])
def test_sheet_shows_every_picture_once_and_in_order(count: int, columns: int, size: tuple[int, int]) -> None:
    results = results_of(count, columns, size)
    sheet = draw_sheet(results, title="title", subtitle="subtitle")
    pixels = torch.from_numpy(numpy.array(sheet)).int()
    factor = max(1, math.ceil(224 / min(size)))
    corners: list[list[tuple[int, int]]] = []
    for i in range(count):
        row = []
        for c in range(columns):
            mask = (pixels == torch.tensor([40 * i % 256, 60 * c, 200])).all(-1)
            assert int(mask.sum()) == size[0] * size[1] * factor**2
            y, x = (int(v) for v in mask.nonzero()[0])
            row.append((y, x))
        assert len({y for y, _ in row}) == 1  # side by side
        assert [x for _, x in row] == sorted(x for _, x in row)
        corners.append(row)
    assert [row[0] for row in corners] == sorted(row[0] for row in corners)
    assert sheet.width <= 2600


def test_sheet_survives_long_captions_and_titles() -> None:
    long = "a caption that nobody would ever want to read in full " * 20
    sheet = draw_sheet(results_of(2, 2, (64, 64), long), title=long, subtitle=long)
    edge = torch.from_numpy(numpy.array(sheet))[:, -30:]
    assert bool((edge == 255).all())  # no text runs into the margin


def test_dequantized_layers_show_no_activation_error(make_flux: Callable[..., nn.Module]) -> None:
    """The probe tells weight-only from W4A4: dequantizing gives the weight-only error."""
    model = make_flux()
    name = "single_transformer_blocks.0.proj_mlp"
    x: Tensor = torch.randn(2, 20, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = model.get_submodule(name)
    with LayerProbe(model, [name], expected_calls=1) as probe, torch.no_grad():
        layer(x)
    quantize_(model, progress=False)
    both = probe.errors(model, [name])[name]
    dequantize_(model)
    weight_only = probe.errors(model, [name])[name]
    assert 0 < weight_only < both
    assert convrot_quant.compare.dtype_name(model) == "BF16"
