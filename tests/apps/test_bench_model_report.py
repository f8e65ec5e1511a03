"""The tables and the picture of whole models, from rows as `convrot-bench model` writes them."""

import pytest
from typer.testing import CliRunner

from convrot_bench import breakdown_plot, report
from convrot_bench.cli import app
from convrot_bench.model.flux import shape_of
from convrot_bench.model.kernels import TITLES
from convrot_bench.model.peers import PEERS
from convrot_bench.results import Writer, load

FACTS = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}
BITS = "int4 weights widened to int8 tensor cores on Hopper"
MORE = {"backend": "cutlass", "multiplied": BITS, "fused": True}
# every bar, as a ratio at 100 ms of BF16 or as bytes
STEPS = {
    ("flux_step_compiled", 1024): 1.6,
    ("flux_step_compiled_vs_eager", 1024): 2.1,
    ("flux_step_eager", 1024): 1.4,
    ("flux_step_graph", 1024): 1.6,
    ("flux_step_best", 512): 1.55,
    ("flux_step_compiled", 2048): 1.25,
    ("fp8_attention_compiled_vs_bf16_eager", 1024): 2.26,
    ("fp8_attention_compiled_vs_bf16", 1024): 1.6,
    ("fp8_attention_graph_vs_bf16", 1024): 1.6,
    ("fp8_attention_compiled_vs_bf16", 2048): 1.25,
    ("lora_rank16", 1024): 1 / 1.1,
    ("lora_rank16_graph", 1024): 1 / 1.1,
}
FLUX = {"model": "FLUX.1-dev"}
BYTES = {"flux_weights": (6.1e9, FLUX), "flux_peak": (6.6e9, shape_of(1024))}
BYTES |= {f"flux_convert_{where}_peak": (3e9, FLUX) for where in ("host", "gpu")}


def model_rows(path, factor=1.01, run_id="1", **facts):
    """What a full run writes, every bar met `factor` times over; the last peer does not run."""
    writer = Writer(path, "model", FACTS | facts, run_id)

    def write(case, shape, ratio, **more):
        ours = 100.0 / (ratio * factor)
        spread = {"p10": 0.9 * ours, "p90": 1.1 * ours, "baseline_p10": 90.0, "baseline_p90": 110.0, "runs": 30}
        more = MORE | spread | {"how": "compiled", "baseline_how": "compiled"} | more
        more |= {"relative_l2": 0.3, "baseline_relative_l2": 0.2} if case.startswith("fp8_attention") else {}
        writer.write(case, shape, ours, 100.0, "ms", "BF16 compiled", **more)

    for (case, size), ratio in STEPS.items():
        write(case, shape_of(size), ratio)
        write(case, shape_of(size, 4), ratio / 2)  # another batch, of which no bar speaks
    for case, (most, shape) in BYTES.items():
        writer.write(case, shape, most / factor, 24e9, "bytes", "BF16", **MORE)
    writer.write("flux_convert", FLUX, 60 / factor, 3.0, "s", "reading the files", **MORE)
    for side in ("bf16_eager", "bf16_compiled", "ours_eager", "ours_compiled"):
        kinds = dict.fromkeys(TITLES, 5.0) | {"rotate_quantize": 6.0 / factor}
        write(f"breakdown/{side}", shape_of(1024), 1.6, kernels=1234, **kinds)
    for peer in PEERS[:-1]:
        more = {"peer_version": "1.2", "our_l2": 0.3, "baseline_l2": 0.2, "our_bytes": 6.1e9, "baseline_bytes": 7e9}
        more |= {"weights": "absmax"} if peer == PEERS[0] else {}
        more |= MORE | {"how": "compiled", "baseline_how": "eager"}
        writer.write(f"peer_{peer.name}", shape_of(1024), 100.0, 120.0 * factor, "ms", peer.title, **more)
    last = PEERS[-1]
    more = MORE | {"how": "compiled", "peer_version": "not installed", "error": "ModuleNotFoundError: a | b"}
    writer.write(f"peer_{last.name}", shape_of(1024), 100.0, None, "ms", last.title, **more)
    return load([path])


def test_bars_of_models_are_met_at_their_edge(tmp_path):
    table = report.TABLES["model_bars"](model_rows(tmp_path / "m.jsonl"))
    head, rows = table.split("\n")[0], table.split("\n")[4:]
    assert head == (
        "NVIDIA H200, torch 2, commit abc, 1 run(s); medians over runs. Random weights. "
        "W4A4 is multiplied as int4 weights widened to int8 tensor cores on Hopper."
    )
    assert len(rows) == 18 + len(PEERS)
    assert "| >= 2.1x, then 2.26x | 47.1 ms against 100.0 ms, 2.12x (2.26x not reached) ✓ |" in table
    assert "missed" not in table
    assert "not measured" not in table
    assert rows[0] == ("| step at 1024 x 1024, both compiled | >= 1.6x BF16 | 61.9 ms against 100.0 ms, 1.61x ✓ |")
    assert "| <= 6.1 GB | 6.04 GB against 24.00 GB ✓ |" in table
    assert "| <= 6.6 GB | 6.54 GB against 24.00 GB ✓ |" in table
    assert "| <= 6 ms | 5.95 ms ✓ |" in table
    assert "| <= 10 % of a step; target 6 % | 108.9 ms against 100.0 ms, 9.0 % more ✓ |" in table
    assert "| <= 60 s | 59.5 s ✓ |" in table
    assert "| faster; target 1.3x | 100.0 ms against 121.2 ms, 1.21x ✓; target not reached |" in table
    assert "against bitsandbytes NF4 | faster; target 1.3x | does not run: ModuleNotFoundError: a / b |" in table


def test_bars_of_models_are_missed_below_their_edge(tmp_path):
    table = report.TABLES["model_bars"](model_rows(tmp_path / "m.jsonl", 0.99))
    rows = table.split("\n")[4:]
    assert [row.count("**missed**") for row in rows] == [1] * 18 + [0] * len(PEERS)
    slower = report.TABLES["model_bars"](model_rows(tmp_path / "n.jsonl", 0.8))
    assert "100.0 ms against 96.0 ms, 0.96x **missed**; target not reached" in slower
    faster = report.TABLES["model_bars"](model_rows(tmp_path / "o.jsonl", 1.1))
    assert "100.0 ms against 132.0 ms, 1.32x ✓; target ✓" in faster


def test_every_figure_of_models_is_in_their_table(tmp_path):
    rows = model_rows(tmp_path / "m.jsonl")
    table = report.TABLES["model"](rows)
    elsewhere = ("peer_", "fp8_attention")  # tables of their own
    for case in {r["case"] for r in rows if "/" not in r["case"] and not r["case"].startswith(elsewhere)}:
        unit = "GB" if case in BYTES else "s" if case == "flux_convert" else "ms"
        assert f"`{case}`, in {unit}" in table
    assert (
        "| height=1024, width=1024, batch=1 | 61.9 | 55.7–68.1 | 100.0 | 90.0–110.0 | 1.62 "
        "| compiled | compiled | yes |" in table
    )
    assert "| model=FLUX.1-dev | 6.04 |  | 24.00 |  | 3.97 |  |  | yes |" in table
    assert (
        "| torchao int8 dynamic | 1.2 | 121.2 | 100.0 | 1.21 | eager | compiled | 7.00, 6.10 | 0.200, 0.300 |" in table
    )
    assert table.count("0.200, 0.300 (absmax) |") == 1
    assert "| bitsandbytes NF4 | not installed | does not run: ModuleNotFoundError: a / b | 100.0 |" in table
    assert "| side | step | GEMM (low-bit) | GEMM (16-bit) |" in table
    assert "| ours compiled | 61.9 | 5.0 | 5.0 | 5.9 | 5.0 |" in table
    columns = {line.count("|") for line in table.splitlines() if line.startswith("| ")}
    assert columns == {10, 11, 13}


def test_ways_to_share_several_gpus_are_one_table(tmp_path):
    writer, shape = Writer(tmp_path / "m.jsonl", "model", FACTS), shape_of(1024) | {"gpus": 2}

    def write(case, ours, baseline, **more):
        spread = {"p10": 0.9 * ours, "p90": 1.1 * ours, "baseline_p10": 90.0, "baseline_p90": 110.0, "runs": 15}
        distances = {"relative_l2": 0.3, "baseline_relative_l2": 0.02}
        more = MORE | spread | distances | {"how": "cuda graph of eager", "baseline_how": "compiled"} | more
        writer.write(case, shape, ours, baseline, "ms", "BF16, ring", **more)

    write("flux_ring_graph", 50.0, 112.0)
    write("flux_ring", 50.0, 100.0)
    writer.write("flux_ring_efficiency", shape, 0.75, 0.625, "share", "BF16, ring", **MORE)
    writer.write("flux_ring_distance", shape, 0.3, 0.4, "relative_l2", "compiled from eager", **MORE)
    table = report.TABLES["model"](load([tmp_path / "m.jsonl"]))
    assert "`flux_ring" not in table
    assert "FLUX.1-dev on 2 GPUs, 1024 x 1024, batch 1, in ms a step" in table
    assert "median of 15. Efficiency: the time of one GPU over 2 times that of 2." in table
    assert (
        "| a step shared, ring | both as CUDA graphs of eager steps | 50.0 | 45.0–55.0 | 112.0 | 90.0–110.0 | 2.24 |  |"
        in table
    )
    assert (
        "| a step shared, ring | each its fastest: cuda graph of eager, BF16 compiled "
        "| 50.0 | 45.0–55.0 | 100.0 | 90.0–110.0 | 2.00 | 75%, 62% |" in table
    )
    assert "with random weights: ring 0.300 (BF16 0.020); compiled from eager: 0.400." in table


def test_attention_in_8_bits_is_one_table(tmp_path):
    writer = Writer(tmp_path / "m.jsonl", "model", FACTS)

    def write(case, size, ours, baseline, name):
        spread = {"p10": 0.9 * ours, "p90": 1.1 * ours, "baseline_p10": 90.0, "baseline_p90": 110.0, "runs": 30}
        more = MORE | spread | {"how": "compiled", "baseline_how": "eager", "relative_l2": 0.25}
        more["baseline_relative_l2"] = 0.2
        writer.write(case, shape_of(size), ours, baseline, "ms", name, **more)

    write("fp8_attention_compiled_vs_bf16_eager", 1024, 70.0, 175.0, "BF16")
    write("fp8_attention_compiled", 1024, 70.0, 77.0, "ours, attention in 16 bits")
    write("fp8_attention_compiled", 2048, 400.0, 500.0, "ours, attention in 16 bits")
    table = report.TABLES["model"](load([tmp_path / "m.jsonl"]))
    assert "`fp8_attention_compiled" not in table
    assert "each side the median of 30. Relative L2 of one step against BF16's" in table
    assert [line for line in table.splitlines() if line.startswith("| ")][2:] == [
        f"| {size} | compiled | {line} | 0.250, 0.200 |"
        for size, line in (
            ("1024 x 1024", "70.0 | 63.0–77.0 | ours, attention in 16 bits | eager | 77.0 | 90.0–110.0 | 1.10"),
            ("2048 x 2048", "400.0 | 360.0–440.0 | ours, attention in 16 bits | eager | 500.0 | 90.0–110.0 | 1.25"),
            ("1024 x 1024", "70.0 | 63.0–77.0 | BF16 | eager | 175.0 | 90.0–110.0 | 2.50"),
        )
    ]


def test_a_long_error_is_cut_and_what_was_never_run_says_so(tmp_path):
    writer = Writer(tmp_path / "m.jsonl", "model", FACTS)
    more = MORE | {"how": "eager", "peer_version": "1", "error": "RuntimeError: when calling `f(" + " descriptor" * 40}
    writer.write(f"peer_{PEERS[0].name}", shape_of(1024), 100.0, None, "ms", PEERS[0].title, **more)
    rows = load([tmp_path / "m.jsonl"])
    for name in ("model", "model_bars"):
        (line,) = [line for line in report.TABLES[name](rows).splitlines() if "does not run" in line]
        assert "does not run: RuntimeError: when calling 'f( descriptor" in line
        assert line.count("descriptor") < 8
        assert "…" in line
    assert report.TABLES["model_bars"](rows).count("| not measured yet |") == len(PEERS) - 1


def test_tables_of_models_take_medians_of_the_newest_commit(tmp_path):
    old = [r | {"date": "2020-01-01"} for r in model_rows(tmp_path / "a.jsonl", 9.0, "a", commit="old")]
    runs = [r for i in range(3) for r in model_rows(tmp_path / f"{i}.jsonl", 1.0 + i / 10, str(i))]
    assert "3 run(s)" in report.TABLES["model_bars"]([*old, *runs])
    assert "56.8 ms against 100.0 ms, 1.76x ✓" in report.TABLES["model_bars"]([*old, *runs])


def test_rows_of_toys_and_cpus_are_in_no_table(tmp_path):
    rows = model_rows(tmp_path / "m.jsonl")
    none = "No runs of whole models are committed yet."
    for toys in ([r | {"tiny": True} for r in rows], [r | {"gpu": "none (x86_64, 2 cores)"} for r in rows], []):
        assert report.TABLES["model"](toys) == report.TABLES["model_bars"](toys) == none
        assert breakdown_plot.draw(toys, tmp_path, check=False) == []


def test_the_picture_is_drawn_when_its_figures_change(tmp_path):
    rows = model_rows(tmp_path / "m.jsonl")
    picture = tmp_path / "images" / "step_breakdown.png"
    assert breakdown_plot.draw(rows, picture.parent, check=True) == [picture]
    assert not picture.exists()
    assert breakdown_plot.draw(rows, picture.parent, check=False) == [picture]
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert breakdown_plot.draw(rows, picture.parent, check=False) == []
    changed = model_rows(tmp_path / "n.jsonl", 1.2)
    assert breakdown_plot.draw(changed, picture.parent, check=True) == [picture]
    assert picture.read_bytes() == drawn


def test_report_draws_and_checks_the_picture(tmp_path):
    results, images = tmp_path / "results", tmp_path / "images"
    model_rows(results / "m.jsonl")
    page = tmp_path / "page.md"
    page.write_text("<!-- results:model_bars -->\n<!-- /results -->\n<!-- results:model -->\n<!-- /results -->\n")
    command = ["report", str(page), "--results", str(results), "--images", str(images)]
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 1
    assert not images.exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (images / "step_breakdown.png").exists()
    assert "| side | step |" in page.read_text()
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 0


def test_a_baseline_without_a_figure_says_why(tmp_path):
    writer = Writer(tmp_path / "m.jsonl", "model", FACTS)
    row = writer.write("peer_x", {}, 2.0, None, "ms", "x", error="RuntimeError: no")
    assert row["ratio"] is row["baseline"] is None
    with pytest.raises(ValueError, match="peer_x: without a figure of x the row has to say why, as `error`"):
        writer.write("peer_x", {}, 2.0, None, "ms", "x")
    assert len(load([tmp_path / "m.jsonl"])) == 1
