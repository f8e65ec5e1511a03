"""convrot-bench: the result format, the correctness gate, the tables, and both measuring commands end to end."""

import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from convrot_bench import cli, html, ops, report, shapes
from convrot_bench.bench import Bench, GateError, Job, run
from convrot_bench.cli import app
from convrot_bench.ops import costs, gates, linears, peers, problems, rotations, step
from convrot_bench.ops.problems import Source, backends_of, prepared
from convrot_bench.results import REQUIRED, Writer, load, ratio
from convrot_bench.sections import SECTIONS
from convrot_kernels import dispatch, reference, rotate_quantize, scaled_mm
from convrot_kernels.testing import gemm_operations, make_inputs

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


@pytest.fixture
def wrong_backend(monkeypatch):
    """A backend whose product is off by one rounding step in one element."""

    class Wrong:
        rotate_quantize = staticmethod(reference.rotate_quantize)

        @staticmethod
        def why_not(device):
            return None

        @staticmethod
        def preferred_codes(device):
            return "int8"

        @staticmethod
        def preferred_layout(device):
            return "row_major"

        @staticmethod
        def scaled_mm(*args, **options):
            out = reference.scaled_mm(*args, **options)
            out[-1, 5] = torch.nextafter(out[-1, 5].float(), torch.tensor(1e9)).bfloat16() + out[-1, 5] * 0.01
            return out

    monkeypatch.setitem(dispatch.BACKENDS, "wrong", "wrong_backend")
    monkeypatch.setattr(dispatch, "import_module", lambda name: Wrong if name == "wrong_backend" else reference)
    return "wrong"


def bench_of(*backends):
    said = []
    return Bench("cpu", backends, said.append), said


@pytest.fixture
def clock(monkeypatch):
    """The GPU's clocks on a CPU: every contender runs once on each of its sets, and takes as long as its calls."""

    def time_graphs(contenders, **options):
        for function, arguments in contenders.values():
            for some in arguments:
                function(*some)
        return {name: float(rank) for rank, name in enumerate(contenders, 1)}

    monkeypatch.setattr("convrot_kernels.testing.time_graphs", time_graphs)
    monkeypatch.setattr("convrot_kernels.testing.time_host", lambda function, arguments: function(*arguments) is None)
    monkeypatch.setattr("convrot_bench.ops.problems.MOST", 3)
    copies = types.ModuleType("convrot_bench.ops.copies")  # the real one needs Triton
    copies.triton_copy = lambda target, source: target.copy_(source)
    monkeypatch.setitem(sys.modules, "convrot_bench.ops.copies", copies)


def test_gates_compare_the_last_rows_of_the_full_shape(wrong_backend):
    one = linears.Linear.draw(Source("cpu"), 300, 64, 256, "reference")
    bench, said = bench_of("reference", wrong_backend)
    assert linears.agrees(bench, "reference", one)
    assert not linears.agrees(bench, wrong_backend, one)
    wanted = "scaled_mm of wrong at M=300, N=64, K=256 disagrees: 1 of 12288 elements differ; first at (191, 5)"
    assert len(bench.failures) == 1
    assert bench.failures[0].startswith(wanted)
    assert said == [f"not timed: {bench.failures[0]}"]


def test_what_fails_its_gate_has_no_row_and_the_rest_does(wrong_backend, clock, tmp_path):
    bench, _ = bench_of("reference", wrong_backend)
    jobs = [Job("gemm", lambda bench: linears.gemm_w4a4(bench, 8, 64, 256))]

    def broken(bench):
        yield from ()
        raise RuntimeError("no memory")

    with pytest.raises(GateError, match=r"2 not timed: .*broken: no memory; .*scaled_mm of wrong"):
        run(Writer(tmp_path / "o.jsonl", "ops", FACTS), bench, [Job("broken", broken), *jobs])
    rows = load([tmp_path / "o.jsonl"])
    assert [(r["case"], r["backend"], r["ratio"]) for r in rows] == [("gemm_w4a4", "reference", 0.5)]


def test_gates_refuse_wrong_codes_and_wrong_values():
    def off(x, **options):
        codes, scale = reference.rotate_quantize(x, **options)
        return codes.roll(1, 0), scale

    x = Source("cpu").inputs(32, 256)
    for exact in (True, False):
        with pytest.raises(GateError, match=r"of reference at \(32, 256\) \{\} disagrees"):
            # the op is the caller's, so the reference's side is what the real op says
            gates.gate_codes("reference", flip_flop(reference.rotate_quantize, off), (x,), {}, exact)
    one = linears.Linear.draw(Source("cpu"), 1, 64, 256, "reference")
    weight = prepared(one.packed, one.scale, "reference")
    gates.gate_values("reference", one.x, weight, one.bias)
    doubled = weight._replace(codes=weight.codes.roll(1, 0))
    assert gates.relative_l2(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")
    out = linears.multiply_values(one.x, doubled, one.bias)
    assert gates.relative_l2(out, linears.multiply_values(one.x, weight, one.bias)) > gates.VALUE_ERROR
    with pytest.raises(GateError, match=r"peer disagrees: relative error 0\.400"):
        gates.gate_peer("peer", 0.4)


def flip_flop(first, second):
    """A function that is `first` when called the first time, and `second` from then on."""
    order = iter([first])
    return lambda *args, **options: next(order, second)(*args, **options)


def test_device_inputs_have_the_outliers_of_make_inputs():
    drawn, made = Source("cpu").inputs(512, 1024).float(), make_inputs(512, 1024).float()
    for x in (drawn, made):
        assert int((x.std(0) > 10).sum()) == 8
        assert int((x.median(1).values > 3).sum()) == 32
    assert torch.equal(drawn, Source("cpu").inputs(512, 1024).float())


def test_ops_command_writes_checked_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("convrot_bench.shapes.MINI_FLUX_LINEARS", ((32, 256),))
    monkeypatch.setattr("convrot_bench.shapes.MINI_FLUX_TOKENS", (4,))
    out = tmp_path / "ops.jsonl"
    command = ["ops", "--shapes", "mini-flux", "--device", "cpu", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = load([out])
    assert {r["case"] for r in rows} == set(ops.CPU_CASES)
    assert len({r["run_id"] for r in rows}) == 1
    assert all(r["ours"] > 0 and r["timing"] == "median of single calls" for r in rows)
    assert {r["backend"] for r in rows} == set(backends_of("cpu"))
    table = report.ops_table(rows)
    assert "`gemm_w4a4`, in us; baseline: F.linear bf16" in table
    assert "| M=4, N=32, K=256 | reference |" in table
    assert report.bars_table(rows) == "No op runs are committed yet."
    assert CliRunner().invoke(app, [*command, "--case", "linear_w4a4"]).exit_code == 0
    assert {r["case"] for r in load([out])[len(rows) :]} == {"linear_w4a4"}


def test_case_selection():
    assert ops.select([], "cpu") == ops.CPU_CASES
    assert ops.select([], "cuda") == ops.CASES
    assert ops.select(["gemm_step"], "cuda") == ("gemm_step",)
    with pytest.raises(ValueError, match=r"ops: unknown case 'gem'; use one of gemm_w4a4, "):
        ops.select(["gem"], "cuda")
    with pytest.raises(ValueError, match=r"ops: case 'gemm_step' needs a GPU, got device cpu; here use gemm_w4a4, "):
        ops.select(["gemm_step"], "cpu")


def test_help_names_every_case():
    assert cli.CASES.replace("; by name only: ", ", ").split(", ") == [*ops.CASES, *ops.EXTRA_CASES]


def test_the_backend_of_auto_is_measured_on_the_path_of_auto(wrong_backend):
    assert problems.route(dispatch.pick("scaled_mm", "cpu")[0], "cpu") == "auto"
    assert problems.route(wrong_backend, "cpu") == wrong_backend
    chosen = problems.under(wrong_backend, "cpu", lambda: dispatch.pick("scaled_mm", "cpu")[0])
    assert chosen() == wrong_backend


def test_plan_of_a_gpu_has_every_case_once_a_shape(monkeypatch):
    monkeypatch.setattr("convrot_bench.ops.peers.find_spec", lambda name: None)
    said = []
    bench = Bench("cuda", ("cutlass", "triton"), said.append)
    sizes = (shapes.FLUX_LINEARS, shapes.FLUX_TOKENS)
    count = Counter(job.label.split()[0] for job in ops.plan(bench, ops.CASES, sizes, 1))
    assert count == {
        "gemm_w4a4": 12, "linear_w4a4": 12, "gemm_step": 1, "gemv_w4a16": 4, "gemv_step": 1, "rotate_quantize": 9,
        "host_cost": 1, "weight_bits": 1,
    }  # fmt: skip
    assert said == [
        "linear_w4a4_vs_comfy_kitchen skipped: comfy-kitchen is not installed, run `pip install 'convrot-bench[peers]'`"
    ]
    assert [job.label for job in ops.plan(bench, ["gemm_step"], sizes, 1)] == ["gemm_step"]
    said.clear()
    only = Bench("cuda", ("triton",), said.append)
    assert len(ops.plan(only, ["rotate_quantize", "rotate_quantize_triton"], sizes, 1)) == 9
    assert said == ["rotate_quantize skipped: its backend does not run on cuda"]


def test_the_step_is_the_whole_of_flux():
    assert len(shapes.FLUX_STEP) == 304
    assert sum(gemm_operations(*product) for product in shapes.FLUX_STEP) == pytest.approx(59.5e12, rel=1e-3)
    assert sum(n * k for _, n, k in shapes.FLUX_STEP) == pytest.approx(11.87e9, rel=5e-3)  # 23.7 GB of bf16


def test_cases_of_a_gpu_run_on_small_shapes(clock):
    """All but the clocks: arguments, gates, wrappers and fields."""
    bench, _ = bench_of("reference")
    with torch.no_grad():
        figures = [
            *linears.gemm_w4a4(bench, 4, 32, 256),
            *linears.linear_w4a4(bench, 4, 32, 256),
            *linears.gemv_w4a16(bench, 1, 32, 256),
            *step.gemm_step(bench, ((1, 32, 256), (4, 32, 256), (4, 32, 256), (4, 16, 512))),
            *step.gemv_step(bench, ((1, 32, 256), (1, 16, 256))),
            *costs.weight_bits(bench, 32, 256),
        ]
    assert not bench.failures
    rows = {f.case: f for f in figures}
    assert list(rows) == ["gemm_w4a4", "linear_w4a4", "gemv_w4a16", "gemm_step", "gemv_step", "weight_bits"]
    assert all(f.more["backend"] == "reference" and "auto" in f.more for f in figures)
    assert all(f.more["timing"] == "cuda graph, sustained" for f in figures[:-1])
    assert rows["gemm_w4a4"].shape == {"M": 4, "N": 32, "K": 256}
    assert rows["gemm_step"].shape == {"model": "FLUX.1-dev", "products": 4}
    assert rows["gemm_step"].more["operations"] == 2 * 256 * (32 + 3 * 4 * 32)
    assert rows["gemv_step"].shape == {"model": "FLUX.1-dev", "products": 2}
    assert rows["gemv_step"].more["apart_us"] > 0
    bits = rows["weight_bits"]
    assert (bits.ours, bits.baseline, bits.more["bits_per_weight"]) == (32 * 128 + 128, 2 * 32 * 256, 4.0)


def test_rotations_are_compared_with_a_copy_of_their_bytes(clock):
    bench, _ = bench_of("reference")
    variants = [rotations.Variant(p) for p in rotations.PROLOGUES]
    variants += [rotations.Variant(bits=8), rotations.Variant(packed=True)]
    figures = list(rotations.rotate_quantize_all(bench, 32, 1280, variants))
    assert not bench.failures
    assert [f.shape["prologue"] for f in figures] == [*rotations.PROLOGUES, "none", "none"]
    assert figures[-2].shape == {"M": 32, "K": 1280, "prologue": "none", "bits": 8}
    assert figures[-1].shape == {"M": 32, "K": 1280, "prologue": "none", "packed": True}
    for f in figures:
        assert f.baseline == min(f.more["copies"].values())
        assert ("over_plain" in f.more) == (f.shape["prologue"] != "none")
    assert figures[1].more["over_plain"] == 2.0  # the clock fixture counts contenders
    assert {f.case for f in figures} == {"rotate_quantize"}
    moved = {f.shape["prologue"]: v.moved(32, 1280) for f, v in zip(figures, variants, strict=True)}
    assert moved["silu_mul"] == 32 * (1280 * 5 + 4)


def test_host_cost_takes_the_mean_of_two_baselines(monkeypatch, clock):
    times = iter([2e-6, 1e-6, 3e-6, 4e-6])
    monkeypatch.setattr("convrot_kernels.testing.time_host", lambda function, arguments: next(times))
    figures = list(costs.host_cost(bench_of("reference")[0], 4, 32, 256))
    assert figures[0].more["auto"] == "reference"
    assert [(f.shape["op"], round(f.ours, 6), round(f.baseline, 6)) for f in figures] == [
        ("rotate_quantize", 1.0, 3.0),
        ("scaled_mm", 3.0, 3.0),
    ]


@pytest.mark.parametrize("captured", [True, False])
def test_a_peer_is_measured_on_equal_terms(monkeypatch, clock, captured):
    """Where a graph does not take the peer's call, both sides are timed by events, and the row says so."""

    class Peer:
        @staticmethod
        def quantize_convrot_w4a4_weight(weight):
            return rotate_quantize(weight, packed=True)

        @staticmethod
        def convrot_w4a4_linear(x, weight, scale, bias=None):
            codes, a_scale = rotate_quantize(x)
            return scaled_mm(codes, weight, a_scale, scale, bias, x.dtype)

    monkeypatch.setattr("convrot_bench.ops.peers.import_module", lambda name: Peer)
    monkeypatch.setattr("convrot_bench.ops.peers.version", lambda name: "0")
    monkeypatch.setattr("convrot_bench.ops.peers.capturable", lambda function, arguments: captured)
    bench, _ = bench_of("reference")
    (figure,) = peers.linear_w4a4_vs_comfy_kitchen(bench, 32, 64, 512)
    assert figure.more["timing"] == ("cuda graph, sustained" if captured else peers.EVENTS)
    assert 0.05 < figure.more["baseline_l2"] == figure.more["our_l2"] < 0.3
    monkeypatch.setattr(Peer, "convrot_w4a4_linear", lambda x, weight, scale, bias=None: x.new_zeros(32, 64))
    assert list(peers.linear_w4a4_vs_comfy_kitchen(bench, 32, 64, 512)) == []
    assert "comfy-kitchen at M=32, N=64, K=512 disagrees: relative error 1.000" in bench.failures[0]


def op_rows(path, factor, commit="abc", run_id="1"):
    """What a full run writes, every bar met `factor` times over."""
    writer = Writer(path, "ops", FACTS | {"commit": commit}, run_id)

    def write(case, shape, ratio, backend="cutlass", **more):
        writer.write(case, shape, 10.0, 10.0 * ratio * factor, "us", "bf16", backend=backend, **more)

    for m in shapes.FLUX_TOKENS:
        for n, k in shapes.FLUX_LINEARS:
            shape, square = {"M": m, "N": n, "K": k}, n == k
            write("gemm_w4a4", shape, 1.7 if square else 1.75, tops=1400.0)
            write("gemm_w4a4", shape, 1.2, "triton", tops=900.0)
            write("linear_w4a4", shape, (1.4 if square else 1.5) if m > 512 else (0.85 if square else 1.1))
            write("linear_w4a4_vs_comfy_kitchen", shape, 2.6 if square else 1.9, our_l2=0.1, baseline_l2=0.2)
    write("gemm_step", {"model": "FLUX.1-dev", "products": 304}, 1.85)
    write("gemv_w4a16", {"M": 1, "N": 18432, "K": 3072}, 3.0, gb_s=3000.0)
    for m in shapes.ROTATE_TOKENS:
        for k, prologues in shapes.ROTATE_PROLOGUES.items():
            for prologue in prologues:
                shape, more = {"M": m, "K": k, "prologue": prologue}, {"gb_s": 3000.0}
                if prologue != "none":
                    more["over_plain"] = {"gelu": 1.35, "modulate": 1.6}.get(prologue, 1.5) / factor
                write("rotate_quantize", shape, 0.85, **more)
                write("rotate_quantize_triton", shape, 0.45, "triton", **more)
        write("rotate_quantize", {"M": m, "K": 3072, "prologue": "none", "bits": 8}, 0.1)
    for op in ("rotate_quantize", "scaled_mm"):
        write("host_cost", {"M": 64, "N": 3072, "K": 3072, "op": op}, 1.0)
    write("weight_bits", {"N": 12288, "K": 3072}, 3.9, bits_per_weight=4.0, scale_bytes=49152)
    return load([path])


def test_bars_table_shows_met_bars(tmp_path):
    table = report.bars_table(op_rows(tmp_path / "o.jsonl", 1.03))
    assert table.startswith("NVIDIA H200, torch 2, commit abc, 1 run(s)")
    assert len(table.splitlines()) == 2 + 2 + 8
    assert "missed" not in table
    assert "not measured" not in table
    assert "incomplete" not in table
    assert "not reached" not in table
    assert "| 1.75–1.80x (worst at N=" in table
    assert "K=3072) ✓; step: 1.90x ✓; moonshot 1.9x: ✓ |" in table
    assert "LayerNorm + modulate: +56 % (worst at M=4608) ✓" in table
    assert "| 4 bits, 49,152 bytes of scales for N=12288, K=3072 ✓ |" in table
    assert "rotate_quantize: 10.0 us against 10.3 us ✓; scaled_mm: 10.0 us against 10.3 us ✓" in table


def test_bars_table_shows_missed_bars(tmp_path):
    table = report.bars_table(op_rows(tmp_path / "o.jsonl", 0.99))
    cells = [line.split(" | ")[2] for line in table.splitlines()[4:]]
    assert [cell.count("**missed**") for cell in cells] == [1, 2, 2, 1, 4, 1, 0, 2]
    assert "1.68–1.73x" in cells[0]
    assert "step: 1.83x ✓; moonshot 1.9x: not reached" in cells[0]


def test_bars_need_every_shape(tmp_path):
    rows = op_rows(tmp_path / "o.jsonl", 1.1)
    few = [r for r in rows if r["shape"].get("N") != 21504 and r["case"] != "gemv_w4a16"]
    table = report.bars_table(few)
    assert "**incomplete, 5 of 6 shapes**" in table
    assert "| >= 3x bf16 | not measured |" in table


def test_tables_take_medians_of_the_newest_commit(tmp_path):
    old = op_rows(tmp_path / "old.jsonl", 5.0, "old", "0")
    old = [r | {"date": "2020-01-01T00:00:00+00:00"} for r in old]
    runs = [r for i, f in enumerate((1.0, 1.1, 1.2)) for r in op_rows(tmp_path / f"{i}.jsonl", f, "new", f"r{i}")]
    only = [r for r in old if r["case"] == "gemm_step"] + [r for r in runs if r["case"] != "gemm_step"]
    table = report.bars_table([*old, *runs])
    assert "commit new, 3 run(s)" in table
    assert "step: 2.03x ✓" in table
    assert "commit old, new, 4 run(s)" in report.bars_table(only)
    assert "step: 9.25x ✓" in report.bars_table(only)


def test_ops_table_has_every_figure(tmp_path):
    table = report.ops_table(op_rows(tmp_path / "o.jsonl", 1.0))
    assert "`gemm_w4a4`, in us; baseline: bf16" in table
    assert "| M=4608, N=3072, K=3072 | cutlass | 10.0 | 17.0 | 1.70 | 1,400 TOPS |  |" in table
    assert (
        "| M=4608, K=3072, prologue=gelu | triton | 10.0 | 4.5 | 0.45 | 3,000 GB/s | 1.35 times the plain op |" in table
    )
    assert "relative error 0.100, theirs 0.200" in table
    assert "4 bits a weight, 49,152 bytes of scales" in table
    assert report.ops_table([]) == "No op runs are committed yet."


def quality_rows(tmp_path):
    writer = Writer(tmp_path / "q.jsonl", "quality", FACTS)
    shape = {"model": "weights", "steps": 20, "prompts": 500}
    for name, psnr in (("rtn", 14.0), ("paper_w4a4", 18.0)):
        more = {"layers": 37, "layers_planned": 38}
        writer.write(f"{name}/psnr_db", shape, psnr, 18.0, "db", "paper_w4a4", **more)
        writer.write(f"{name}/object", shape, 0.5, 0.5, "share", "paper_w4a4", **more)
    return load([tmp_path / "q.jsonl"])


def test_report_fills_only_between_its_marks(tmp_path):
    page = "before\n<!-- results:quality -->\nold\n<!-- /results -->\nafter\n"
    rows = quality_rows(tmp_path)
    filled = report.fill(page, rows)
    assert filled.startswith("before\n<!-- results:quality -->\n")
    assert filled.endswith("<!-- /results -->\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, rows) == filled
    with pytest.raises(ValueError, match="unknown table 'speed'; use one of quality, layers, ops, bars"):
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


def test_the_committed_page_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted(Path("docs/results").glob("*.jsonl"))
    source = html.gather(Path("docs/report.html"), files, images=Path("docs/images"))
    assert not html.update(Path("docs/report.html"), source, SECTIONS, check=True), "run convrot-bench report"


def test_committed_results_name_no_machine():
    for path in (ROOT / "docs" / "results").glob("*.jsonl"):
        for row in load([path]):
            assert not row["command"].startswith("/"), path
            assert " /" not in row["command"], path
            json.dumps(row)
