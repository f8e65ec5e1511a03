"""convrot-bench: the result format, the correctness gate, the tables, and both measuring commands end to end."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from convrot_bench import methods, ops, report
from convrot_bench.cli import app
from convrot_bench.results import REQUIRED, Writer, load, ratio
from convrot_kernels import dispatch, reference, transforms
from convrot_kernels.testing import make_inputs
from convrot_quant import ConvLinear4bit, Scheme

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}


@pytest.mark.parametrize(("unit", "expected"), [("us", 4.0), ("bytes", 4.0), ("db", 0.25), ("share", 0.25)])
def test_ratio_is_how_many_times_better(unit, expected):
    assert ratio(5.0, 20.0, unit) == expected


def test_ratio_refuses_a_unit_it_can_not_order():
    with pytest.raises(ValueError, match=r"unknown unit 'furlong'.*use one of us, ms"):
        ratio(1.0, 1.0, "furlong")


def test_rows_have_every_field_and_append(tmp_path):
    path = tmp_path / "results" / "ops.jsonl"
    Writer(path, "ops", FACTS).write("gemm", {"M": 1}, 2.0, 4.0, "us", "bf16", backend="x")
    Writer(path, "ops", FACTS).write("gemm", {"M": 1}, 1.0, 4.0, "us", "bf16", backend="x")
    rows = load([path])
    assert [r["ratio"] for r in rows] == [2.0, 4.0]
    assert all(k in r for r in rows for k in REQUIRED)
    assert rows[0]["run_id"] != rows[1]["run_id"]


def test_a_figure_that_is_not_a_number_is_no_row(tmp_path):
    writer = Writer(tmp_path / "q.jsonl", "quality", FACTS)
    with pytest.raises(ValueError, match="ours must be finite, got nan; leave the row out and say why"):
        writer.write("psnr", {}, float("nan"), 1.0, "db", "bf16")
    assert not (tmp_path / "q.jsonl").exists()


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"bench": "ops"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: lacks case, shape"):
        load([tmp_path / "bad.jsonl"])
    (tmp_path / "bad.jsonl").write_text("half a li")
    with pytest.raises(ValueError, match=r"bad.jsonl:1: not a JSON object"):
        load([tmp_path / "bad.jsonl"])


def test_gate_passes_the_reference_and_stops_a_wrong_backend(monkeypatch):
    """A backend whose product is off by one rounding step must not be timed."""
    problem = ops.Problem(32, 64, 256, "cpu")
    ops.gate(problem, "reference")

    class Wrong:
        rotate_quantize = staticmethod(reference.rotate_quantize)

        @staticmethod
        def why_not(device):
            return None

        @staticmethod
        def preferred_codes(device):
            return "int8"

        @staticmethod
        def scaled_mm(*args, **options):
            out = reference.scaled_mm(*args, **options)
            out[3, 5] = torch.nextafter(out[3, 5].float(), torch.tensor(1e9)).bfloat16() + out[3, 5] * 0.01
            return out

    monkeypatch.setitem(dispatch.BACKENDS, "wrong", "wrong_backend")
    monkeypatch.setattr(dispatch, "import_module", lambda name: Wrong if name == "wrong_backend" else reference)
    with pytest.raises(ops.GateError, match=r"wrong at M=32, N=64, K=256 disagrees: 1 of 2048 elements differ"):
        ops.gate(problem, "wrong")


def test_ops_command_writes_checked_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("convrot_bench.shapes.MINI_FLUX_LINEARS", ((32, 256),))
    monkeypatch.setattr("convrot_bench.shapes.MINI_FLUX_TOKENS", (4,))
    out = tmp_path / "ops.jsonl"
    result = CliRunner().invoke(
        app, ["ops", "--shapes", "mini-flux", "--device", "cpu", "--repeats", "2", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    rows = load([out])
    assert {r["case"] for r in rows} == {"gemm_w4a4", "linear_w4a4", "rotate_quantize"}
    assert len({r["run_id"] for r in rows}) == 1
    assert all(r["ours"] > 0 and r["backend"] == "reference" for r in rows)
    assert "gemm_w4a4 | reference | M=4 x N=32 x K=256" in report.ops_table(rows)


def test_emulation_under_the_regular_matrix_is_the_product():
    """So that rows of other rotations differ from the paper's row in the rotation alone."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 64).bfloat16()
    x = make_inputs(40, 512)
    product = ConvLinear4bit.from_linear(linear, Scheme())
    emulated = methods.EmulatedLinear(linear, Scheme(), transforms.regular(256))
    a, b = product(x).float(), emulated(x).float()
    assert (a - b).norm() / a.norm() < 5e-3  # bf16 rounding, and codes that fall on a tie


@pytest.mark.parametrize("name", ["rtn", "sylvester256"])
def test_emulated_methods_take_the_papers_layers(name):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    built = next(m for m in methods.METHODS if m.name == name).build(model)
    replaced = [n for n, m in model.named_modules() if isinstance(m, methods.EmulatedLinear)]
    assert tuple(replaced) == built.layers
    assert len(replaced) == built.planned == 20
    assert built.bytes < before / 3


def test_a_rotation_that_fits_no_layer_leaves_them_and_says_so():
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(512, 512))])
    built = methods.rotated(lambda k: None)(model)
    assert (built.layers, built.planned) == ((), 1)
    assert built.bytes == 4 * (512 * 512 + 512)


def quality_rows(tmp_path):
    writer = Writer(tmp_path / "q.jsonl", "quality", FACTS)
    shape = {"model": "weights", "steps": 20, "prompts": 500}
    for name, psnr in (("rtn", 14.0), ("paper_w4a4", 18.0)):
        more = {"layers": 37, "layers_planned": 38}
        writer.write(f"{name}/psnr_db", shape, psnr, 18.0, "db", "paper_w4a4", **more)
        writer.write(f"{name}/object", shape, 0.5, 0.5, "share", "paper_w4a4", **more)
    return load([tmp_path / "q.jsonl"])


def test_quality_table_says_how_many_layers_a_row_fits(tmp_path):
    table = report.quality_table(quality_rows(tmp_path))
    assert "500 held-out captions, 20 steps, bf16, NVIDIA H200" in table
    assert "| no rotation * | 37 of 38 |" in table
    assert "| 14.00 |" in table


def test_the_quality_table_takes_the_runs_over_the_most_captions(tmp_path):
    rows = quality_rows(tmp_path)
    few = [r | {"shape": r["shape"] | {"prompts": 4}, "ours": 99.0} for r in rows]
    assert report.quality_table([*few, *rows]) == report.quality_table(rows)


def test_the_layers_table_has_a_line_a_layer(tmp_path):
    writer = Writer(tmp_path / "q.jsonl", "quality", FACTS)
    shape = {"model": "weights", "steps": 20, "prompts": 4}
    for name, errors in (("rtn", {"a": 0.25, "b": 0.5}), ("paper_w4a4", {"a": 0.125})):
        more = {"title": name, "layer_l2": errors}
        writer.write(f"{name}/layer_l2_median", shape, 0.1, 0.1, "relative_l2", "paper_w4a4", **more)
    table = report.layers_table(load([tmp_path / "q.jsonl"]))
    assert "| layer | rtn | paper_w4a4 |" in table
    assert "| `a` | 0.250 | 0.125 |" in table
    assert "| `b` | 0.500 | 16-bit |" in table
    assert "No run" in report.layers_table([])


def test_report_fills_only_between_its_marks(tmp_path):
    page = "before\n<!-- results:quality -->\nold\n<!-- /results -->\nafter\n"
    rows = quality_rows(tmp_path)
    filled = report.fill(page, rows)
    assert filled.startswith("before\n<!-- results:quality -->\n")
    assert filled.endswith("<!-- /results -->\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, rows) == filled
    with pytest.raises(ValueError, match="unknown table 'speed'; use one of quality, layers, ops"):
        report.fill("<!-- results:speed -->\n<!-- /results -->", [])


def test_report_check_notices_a_stale_page(tmp_path):
    quality_rows(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- results:quality -->\n<!-- /results -->\n")
    command = ["report", str(page), "--results", str(tmp_path)]
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 1
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 0


def test_committed_tables_are_those_of_the_committed_results():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    stale = report.update(sorted((ROOT / "docs" / "results").glob("*.jsonl")), pages, check=True)
    assert not stale, f"run convrot-bench report: {stale}"


def test_committed_results_name_no_machine():
    for path in (ROOT / "docs" / "results").glob("*.jsonl"):
        for row in load([path]):
            assert not row["command"].startswith("/"), path
            assert " /" not in row["command"], path
            json.dumps(row)


def test_quality_command_records_every_layer(tmp_path):
    """The real pipeline and judge, two captions and two steps: every row, and one error a quantized layer."""
    out = tmp_path / "q.jsonl"
    home = ROOT / "apps" / "mini-flux"
    command = ["quality", str(home / "weights"), "--judge", str(home / "judge.safetensors"), "--out", str(out)]
    few = ["--captions", "2", "--steps", "2", "--batch", "2", "--device", "cpu", "--method", "sylvester256"]
    result = CliRunner().invoke(app, [*command, *few])
    assert result.exit_code == 0, result.output
    rows = load([out])
    assert {r["case"].split("/")[0] for r in rows} == {"bf16", "chance", "sylvester256", "paper_w4a4"}
    errors = next(r["layer_l2"] for r in rows if r["case"] == "paper_w4a4/layer_l2_median")
    assert len(errors) == 38
    assert all(0.01 < e < 0.5 for e in errors.values())
    assert "single_transformer_blocks.3.proj_out" in report.layers_table(rows)
