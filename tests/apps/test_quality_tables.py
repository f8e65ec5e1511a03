"""Quality tables and bars from rows, old ones included; plots that are the same for the same rows."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from convrot_bench import report
from convrot_bench.quality import images, plots, section
from convrot_bench.quality.bars import quality_bars_table
from convrot_bench.quality.tables import SYNTHETIC, layers_table, reported
from convrot_bench.results import Writer, load

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": "NVIDIA H200", "driver": "1", "clocks": "x", "torch": "2", "triton": "3", "commit": "abc"}
SHAPE = {"model": "weights", "steps": 20, "prompts": 500, "split": "report"}
LAYERS = {"layers": 37, "layers_planned": 38, "multiplied": "4 x 4 (100 %)"}
WORST = {"worst_layer": "single.proj_out", "worst_layer_l2": 0.25}


def write(path, figures, shape=SHAPE, **facts):
    """{method: {case: figure}} -> rows."""
    writer = Writer(path, "quality", FACTS | facts)
    units = {"psnr_db": "db", "ssim": "ssim", "fid": "fid", "object": "share", "bytes": "bytes"}
    for method, cases in figures.items():
        more = LAYERS | WORST | {"title": method, "emulated": method in ("rtn", "lever_shift")}
        for case, value in cases.items():
            extra = {"layer_l2": {"a": value, "b": 2 * value}} if case == "layer_l2_median" else {}
            unit = units.get(case, "relative_l2")
            writer.write(f"{method}/{case}", shape, value, value, unit, "paper_w4a4", **more, **extra)
    return load([path])


def met(path, error=0.88, psnr=1.0, size=1.0, **facts):
    """Rows whose W4A4 has this share of the paper's error, this much more PSNR, this share of its bytes."""
    paper = {"layer_l2_median": 0.1, "layer_l2_p95": 0.2, "psnr_db": 36.0, "bytes": 16e6, "object": 1.0}
    ours = {"layer_l2_median": 0.1 * error, "psnr_db": 36.0 + psnr, "bytes": 16e6 * size, "object": 1.0}
    figures = {"rtn": paper, "paper_w4a4": paper, "ours_w4a4": ours, "ours_w4a8": ours, "lever_shift": ours}
    return write(path, figures | {"svdquant_style": paper, "plan_at_svdquant_bytes": ours}, **facts)


def test_readme_has_the_short_table_and_docs_the_full_one(tmp_path):
    rows = met(tmp_path / "q.jsonl")
    short, full, levers = (report.TABLES[f"quality{name}"](rows) for name in ("", "_full", "_levers"))
    assert "mini-flux, 500 held-out captions, 20 steps, bf16, NVIDIA H200" in short
    assert "| no rotation * | 0.100 | 36.00 |" in short
    assert "shift" not in short
    assert "| no rotation * | 37 of 38 | 4 x 4 (100 %) | 0.100 | 0.200 | 36.00 |" in full
    assert "`single.proj_out` 0.250 |" in full
    assert "shift" not in full
    assert [line.split(" | ")[0] for line in levers.splitlines()[4:7]] == [
        "| regular-256 (paper)", "| ours, W4A4 (default)", "| ours + AdaLN shift taken out *",
    ]  # fmt: skip


def test_tables_show_the_report_with_the_most_captions_on_a_gpu(tmp_path):
    rows = met(tmp_path / "q.jsonl")
    others = [
        {"shape": SHAPE | {"prompts": 4}},
        {"shape": SHAPE | {"model": "FLUX.1-dev", "prompts": 5000, "steps": 50}},
        {"shape": SHAPE | {"split": "tuning", "prompts": 900}},
        {"gpu": "none (x86_64, 2 cores)"},
        {"shape": {k: v for k, v in SHAPE.items() if k != "split"}},
    ]
    worse = [row | {"ours": 99.0, "date": "2099-01-01"} | other for other in others for row in rows]
    for name in ("quality", "quality_bars", "layers"):
        assert report.TABLES[name]([*worse, *rows]) == report.TABLES[name](rows)
    full = report.TABLES["quality_full"]([*worse, *rows])
    assert "FLUX.1-dev, 5000 prompts, 50 steps" in full
    assert report.TABLES["quality_full"](rows) in full


def test_two_step_counts_are_two_tables(tmp_path):
    rows = met(tmp_path / "a.jsonl") + met(tmp_path / "b.jsonl", shape=SHAPE | {"steps": 8})
    full = report.TABLES["quality_full"](rows)
    assert full.index("20 steps") < full.index("8 steps")
    assert "20 steps" in report.TABLES["quality"](rows)
    assert "8 steps" not in report.TABLES["quality"](rows)


def test_what_is_not_measured_is_said_under_the_table(tmp_path):
    rows = [r | {"unmeasured": {"lpips": "URLError: no network"}} for r in met(tmp_path / "q.jsonl")]
    assert "lpips is not measured here: URLError: no network" in report.TABLES["quality_full"](rows)
    assert "\\* emulated in fp32" in report.TABLES["quality"](rows)


def test_committed_rows_of_earlier_versions_are_read():
    """Their shape names no split."""
    rows = load(sorted((ROOT / "docs" / "results").glob("quality*.jsonl")))
    old = [row for row in rows if "split" not in row["shape"]]
    assert old
    assert {r["shape"]["prompts"] for r in reported(old)} == {500}
    assert "| regular-256 (paper) | 0.108 | 36.11 | 0.984 |" in report.TABLES["quality"](old)


def cells(rows):
    return {line.split(" | ")[0][2:]: line.split(" | ")[2] for line in quality_bars_table(rows).splitlines()[4:]}


def test_bars_that_are_met(tmp_path):
    said = cells(met(tmp_path / "q.jsonl"))
    assert said["W4A4 on mini-flux, the paper's bytes"].startswith(
        "20 steps: 0.088 against 0.100, 12.0% below, in 16.0 against 16.0 MB ✓, 37.00 dB against 36.00, 1.00 dB above"
    )
    assert said["W4A8 on mini-flux, the paper's bytes"].count("**missed**") == 1
    assert said["the same bytes spent by the planner on W8A8 layers"].count("✓") == 2
    assert said["the planner's list at the bytes of the paper's mixed list"] == "not measured |"


@pytest.mark.parametrize(("error", "psnr", "size"), [(0.89, 1.0, 1.0), (0.88, 0.9, 1.0), (0.88, 1.0, 1.02)])
def test_bars_are_missed_by_error_by_psnr_and_by_bytes(tmp_path, error, psnr, size):
    said = cells(met(tmp_path / "q.jsonl", error, psnr, size))
    assert "**missed**" in said["W4A4 on mini-flux, the paper's bytes"]
    worse = cells(met(tmp_path / "w.jsonl", 1.2, -1.0))
    assert "20.0% above" in worse["the same bytes spent by the planner on W8A8 layers"]
    assert "1.00 dB below" in worse["the same bytes spent by the planner on W8A8 layers"]


def test_what_no_kernel_runs_meets_no_bar(tmp_path):
    rows = [r | {"emulated": True} for r in met(tmp_path / "q.jsonl", 0.1, 9.0)]
    said = cells(rows)["W4A4 on mini-flux, the paper's bytes"]
    assert "emulated: meets no bar" in said
    assert "✓" not in said


def generated(path):
    writer = Writer(path, "quality", FACTS)
    shape = {"model": SYNTHETIC, "split": "report", "layers": 14, "seeds": 5, "tokens": 512, "outputs": 0}
    for name, error in (("paper_w4a4", 0.2), ("ours_w4a4", 0.149), ("ours_w4a8", 0.12)):
        kinds = {"gaussian/gaussian": error, "gaussian/heavy_tailed": 3 * error, "proj_out/gaussian": error}
        more = {"title": name, "layer_l2": kinds, "multiplied": "4 x 4 (100 %)", "emulated": False}
        for case, value, unit in (("median", error, "relative_l2"), ("worst", 0.9, "relative_l2")):
            writer.write(f"{name}/layer_l2_{case}", shape, value, 0.2, unit, "paper_w4a4", **more)
        writer.write(f"{name}/bytes", shape, 5e6, 5e6, "bytes", "paper_w4a4", **more)
    return load([path])


def test_generated_layers_have_their_own_table_and_bars(tmp_path):
    rows = generated(tmp_path / "q.jsonl")
    said = cells(rows)
    assert said["W4A4 on generated layers of FLUX's shapes, the paper's bytes"].startswith(
        "0.149 against 0.200, 25.5% below"
    )
    missed = said["W4A8 on generated layers of FLUX's shapes, the paper's bytes"]
    assert missed == "0.120 against 0.200, 40.0% below, in 5.0 against 5.0 MB **missed** |"
    looks = ({"split": "tuning"}, {"outputs": 64})
    tuned = [r | {"shape": r["shape"] | look, "date": "2099-01-01", "ours": 9.0} for look in looks for r in rows]
    assert cells([*tuned, *rows]) == said
    table = report.TABLES["quality_synthetic"](rows)
    assert "14 generated layers, 5 seeds each, 512 tokens" in table
    assert "| ours, W4A4 (default) | 4 x 4 (100 %) | 5.0 | 0.149 | 0.900 | 0.298 |  |" in table
    assert report.TABLES["quality"](rows) == "No quality runs are committed yet."


def test_the_layers_table_has_a_line_a_layer(tmp_path):
    paper = {"layer_l2_median": 0.125}
    rows = write(tmp_path / "q.jsonl", {"rtn": {"layer_l2_median": 0.25}, "paper_w4a4": paper, "lever_shift": paper})
    del rows[1]["layer_l2"]["b"]
    table = layers_table(rows)
    assert "| layer | no rotation | regular-256 (paper) |" in table
    assert "| `a` | 0.250 | 0.125 |" in table
    assert "| `b` | 0.500 | 16-bit |" in table
    assert "No run" in layers_table([])


def test_figure_3_is_reproduced():
    """A Sylvester matrix turns a mean of 10 into a spike of 16 x 10; regular leaves it; kept apart it is gone."""
    data = plots.figure_3_data()
    last = {name: values["amplitude"][-1] for name, values in data.items()}
    assert last["Sylvester-256"] == pytest.approx(160, abs=5)
    assert last["regular-256"] == pytest.approx(13.5, abs=2)
    assert last["regular-256, mean kept apart"] < 5
    assert data["Sylvester-256"]["crest_factor"][-1] == pytest.approx(16, abs=0.5)
    first = [values["error"][0] for values in data.values()]
    assert max(first) - min(first) < 0.01  # without a mean all rotations are alike
    assert data["Sylvester-256"]["error"][4] > 3 * data["regular-256"]["error"][4]


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 2.0), (3.0, 3.0), (4.0, 2.0)]
    assert plots._front(points, 1) == ([1.0, 3.0], [5.0, 2.0])
    assert plots._front(points, -1) == ([1.0, 2.0], [5.0, 6.0])


def test_pictures_are_drawn_again_only_for_other_figures(tmp_path):
    rows, folder = met(tmp_path / "q.jsonl") + generated(tmp_path / "g.jsonl"), tmp_path / "images"
    made = images.draw(rows, folder, check=False)
    assert [p.name for p in made] == list(images.PICTURES)
    assert images.draw(rows, folder, check=False) == []
    changed = [r | {"ours": r["ours"] * 2} if r["case"] == "ours_w4a4/psnr_db" else r for r in rows]
    assert [p.name for p in images.draw(changed, folder, check=True)] == ["quality_pareto.png"]
    bytes_of = {p.name: p.read_bytes() for p in made}
    images.draw(rows, tmp_path / "again", check=False)
    assert {p.name: (tmp_path / "again" / p.name).read_bytes() for p in made} == bytes_of


def test_the_report_shows_charts_and_holds_its_pictures(tmp_path):
    rows = met(tmp_path / "q.jsonl") + generated(tmp_path / "g.jsonl")
    charts = section.charts(rows)
    assert len(charts) == 3
    assert "ours, W4A4 (default)" in charts[0].svg
    assert section.charts([]) == []
    Image.new("RGB", (8, 8)).save(tmp_path / "quality_pareto.png")
    (part,) = section.pictures(tmp_path)
    assert 'src="data:image/png;base64,iVBOR' in part.html


def test_a_contact_sheet_has_a_row_a_method(tmp_path):
    pictures = {name: [torch.full((3, 16, 16), 90 * i, dtype=torch.uint8) for i in range(3)] for name in ("a", "b")}
    figure = plots.contact_sheet(pictures, {"a": [""] * 3, "b": ["1 dB", "2 dB", "3 dB"]})
    assert len(figure.axes) == 6
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == ["1 dB", "2 dB", "3 dB"]
    assert figure.axes[3].get_ylabel() == "b"
