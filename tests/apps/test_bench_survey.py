"""The survey of ops, the steps of a linear, rotations, peers: end to end on a CPU, each kernel against its formula."""

import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from convrot_bench import html, shapes, survey_sections
from convrot_bench.bench import Bench, GateError
from convrot_bench.cli import app
from convrot_bench.family_table import released_plan
from convrot_bench.ops import (
    attention,
    breakdown,
    clock,
    gates,
    layer_peers,
    plan,
    products,
    rotation_peers,
    row_ops,
    survey,
)
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.ops.problems import Source
from convrot_bench.results import REQUIRED, load
from convrot_bench.shapes import FAMILIES, MINI_FLUX, Family
from convrot_bench.survey_tables import (
    attention_ops_table,
    is_extra,
    peers_table,
    rotations_table,
    steps_table,
    survey_table,
)
from convrot_kernels import ops as public
from convrot_kernels import pack_int4, rotate

TINY = Family(
    name="FLUX.1-dev", tokens=24, text=8, linears=((256, 256), (512, 256), (256, 512)),
    prologues={256: ("none", "modulate"), 512: ("gelu", "silu_mul"), 1280: ("cat_gelu",)}, gated=((256, 512),),
    modulation=(512, 256), group_sizes={256: 64}, heads=(4, 64), streams=2,
)  # fmt: skip


def bench_on_cpu():
    return Bench("cpu", ("reference",), lambda text: None)


@pytest.fixture
def ceiling():
    return Ceiling(copy=1e10, products={"int8": 1e12, "bf16": 5e11})


@pytest.fixture
def few(monkeypatch):
    """Fewer sets and calls: what is measured is not looked at here."""
    monkeypatch.setattr("convrot_bench.ops.problems.MOST", 2)
    monkeypatch.setattr("convrot_bench.ops.problems.FEWEST", 2)
    monkeypatch.setattr("convrot_bench.ops.clock.REPEATS", 1)


@pytest.fixture
def plain_stages(monkeypatch):
    """The kernels of the steps in PyTorch: the real ones need a GPU or Triton's interpreter."""
    stages = types.ModuleType("convrot_bench.ops.stages")
    stages.scale = lambda x: (x.float().abs().amax(1) / 7).clamp_min(1e-10)
    stages.quantize = lambda x, scale: (x.float() / scale[:, None]).round().clamp(-7, 7).to(torch.int8)
    stages.pack = pack_int4
    stages.epilogue = lambda acc, a, b, bias: (acc.float() * a[:, None] * b + bias.float()).bfloat16()
    monkeypatch.setattr(breakdown, "_kernels", lambda: stages)
    return stages


# the survey


APART = {"norm_rope_fp8", "norm_rope_joint_fp8", "attention_fp8", "scaled_mm_cat"}  # which have cases of their own


def test_survey_command_measures_every_other_public_op(tmp_path, few, monkeypatch):
    monkeypatch.setattr("convrot_bench.ops.survey.MINI_FLUX", TINY)
    monkeypatch.setattr("convrot_bench.ops.ceiling.CPU_PRODUCTS", ((64, 64, 256),))
    out = tmp_path / "ops.jsonl"
    result = CliRunner().invoke(app, ["ops", "--case", "survey", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = load([out])
    schemas = {schema.partition("(")[0] for schema in public.SCHEMAS}
    measured = {r["case"].removeprefix("survey/") for r in rows if r["case"].startswith("survey/")}
    assert measured == schemas - APART | {"prepare_weight", "restore_weight"}
    assert all(key in r for r in rows for key in REQUIRED)
    assert all(is_extra(r) for r in rows)
    assert rows[0]["case"] == "ceiling/copy"
    shares = [r["of_ceiling"] for r in rows if r["case"].startswith("survey/")]
    assert all(share > 0 for share in shares)
    assert {r["scheme"] for r in rows if r["case"] == "survey/scaled_mm"} == {"W4A4", "W4A8", "W8A8", "W4A16"}
    by_rate = [r for r in rows if r.get("ceiling") == "int8"]
    best = max(r["tops"] for r in rows if r["case"] == "ceiling/int8")
    assert all(r["of_ceiling"] == pytest.approx(r["tops"] / best) for r in by_rate)
    table = survey_table(rows)
    assert "**FLUX.1-dev**" in table
    assert "The ceiling, measured in the same run: copy " in table
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {9}


def test_families_are_the_released_models():
    """Every linear is one that the default preset puts into 4 bits, q, k and v of one size side by side."""
    for family in FAMILIES:
        layers = released_plan(family.name).layers
        planned = {(layer.out_features, layer.in_features): layer.scheme for layer in layers if layer.scheme}
        for n, k in family.linears:
            stacked = (n // 3, k) in planned or (n, k) == (21504, 3072)  # q, k, v; with the MLP in FLUX's single blocks
            assert (n, k) in planned or stacked, (family.name, n, k)
        for k in family.prologues:
            scheme = next(scheme for (_, inputs), scheme in planned.items() if inputs == k)
            assert scheme.group_size == family.group_size(k), (family.name, k)
        assert set(family.gated) <= set(family.linears)
        if family.modulation:
            assert planned[family.modulation].name == "W4A16"
    covered = {prologue for family in FAMILIES for names in family.prologues.values() for prologue in names}
    assert covered == set(row_ops.PROLOGUES)


def test_families_by_name():
    assert survey.families_of([], real=True) == FAMILIES
    assert survey.families_of([], real=False) == (MINI_FLUX,)
    assert [f.name for f in survey.families_of(["Qwen-Image"], real=False)] == ["Qwen-Image"]
    with pytest.raises(ValueError, match=r"ops: unknown family 'flux'; use some of FLUX.1-dev, "):
        survey.families_of(["flux"], real=True)


def test_the_plan_of_a_gpu_measures_the_ceiling_first_and_once():
    bench = Bench("cuda", ("cutlass", "triton"), lambda text: None)
    jobs = plan(bench, ["survey", "breakdown", "rotations", "peers"], ((), ()), 1, FAMILIES)
    labels = [job.label for job in jobs]
    assert labels[0] == "ceiling"
    assert labels.count("ceiling") == 1
    assert "breakdown 4608 x 21504 x 3072" in labels
    assert "rotations 32760 x 5120" in labels
    assert "peers 4608 x 3072 x 12288" in labels
    assert "survey Wan2.2-T2V-A14B 32760 x 13824 x 5120" in labels
    only = plan(bench, ["host_cost"], ((), ()), 1, FAMILIES)
    assert [job.label for job in only] == ["host_cost 64 x 3072 x 3072"]


def test_no_share_of_a_ceiling_that_was_not_measured():
    with pytest.raises(GateError, match="the ceiling of this machine was not measured"):
        Ceiling().of_bytes(1.0)


def test_what_disagrees_is_not_in_the_survey(ceiling, few, monkeypatch):
    bench = bench_on_cpu()
    monkeypatch.setitem(products.OPS, "scaled_mm_out", lambda o: products._product(o) * 1.01)
    with torch.no_grad():
        cases = [f.case for f in products.measure(bench, ceiling, TINY, 24, 256, 256)]
    assert cases == ["survey/scaled_mm"]
    assert "scaled_mm_out of reference at (24, 256) disagrees" in bench.failures[0]
    broken = row_ops.rotations(TINY, 256)[-1]
    assert broken.op == "rotate"
    with pytest.raises(GateError, match=r"rotate of reference at \(24, 256\) disagrees: relative error"):
        broken.gate("reference", lambda x: rotate(x, 16), broken.draw(Source("cpu")))


# the steps of a linear


def test_steps_of_a_linear_stand_beside_the_fused_kernels(ceiling, few, plain_stages):
    bench = bench_on_cpu()
    with torch.no_grad():
        (figure,) = breakdown.measure(bench, 32, 64, 512, ceiling=ceiling)
    assert not bench.failures
    assert figure.case == "breakdown"
    assert figure.baseline == pytest.approx(sum(figure.more[name] for name in breakdown.UNFUSED))
    assert {*breakdown.STEPS, "fused_rotate_quantize", "fused_scaled_mm", "bf16"} <= figure.more.keys()
    row = {"bench": "ops", "case": figure.case, "shape": figure.shape, "ours": 1.0, "baseline": 2.0, "ratio": 2.0}
    row |= figure.more | {"gpu": "g", "torch": "t", "commit": "c", "run_id": "r", "date": "2026"}
    assert "| M=32, N=64, K=512 |" in steps_table([row])


@pytest.mark.parametrize("step", ["scale", "quantize", "pack", "epilogue"])
def test_a_wrong_step_is_not_timed(ceiling, few, plain_stages, monkeypatch, step):
    right = getattr(plain_stages, step)
    staged = breakdown.staged

    def wrong_from_now_on(one):
        found = staged(one)
        monkeypatch.setattr(plain_stages, step, lambda *args: right(*args).roll(1, 0))
        return found

    monkeypatch.setattr(breakdown, "staged", wrong_from_now_on)
    monkeypatch.setattr("convrot_bench.ops.problems.MOST", 1)
    monkeypatch.setattr("convrot_bench.ops.problems.FEWEST", 1)
    bench = bench_on_cpu()
    with torch.no_grad():
        assert list(breakdown.measure(bench, 32, 64, 512, ceiling=ceiling)) == []
    assert f"the step {step} at" in bench.failures[0]


KERNELS = """
import torch
from convrot_bench.ops import stages
from convrot_kernels import pack_int4
torch.manual_seed(0)
x = torch.randn(5, 2304).bfloat16() * torch.tensor([1, 10, 0, 1e-3, 1]).bfloat16()[:, None]
scale = stages.scale(x)
assert torch.equal(scale, (x.float().abs().amax(1) / torch.tensor(7.0)).clamp_min(1e-10)), "scale"
codes = stages.quantize(x, scale)
assert torch.equal(codes, (x.float() / scale[:, None]).round().clamp(-7, 7).to(torch.int8)), "quantize"
assert torch.equal(stages.pack(codes), pack_int4(codes)), "pack"
acc = torch.randint(-9999, 9999, (5, 300), dtype=torch.int32)
b_scale, bias = torch.rand(300), torch.randn(300).bfloat16()
wanted = (acc.float() * scale[:, None] * b_scale + bias.float()).bfloat16()
assert torch.equal(stages.epilogue(acc, scale, b_scale, bias), wanted), "epilogue"
"""


def test_kernels_of_the_steps_are_their_formulas():
    """In Triton's interpreter, which a process has from its start or not at all."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", KERNELS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode == 0, result.stderr


# rotations and peers


@pytest.fixture
def graphless(monkeypatch):
    monkeypatch.setattr("convrot_bench.ops.rotation_peers.WAYS", rotation_peers.WAYS[:1] + rotation_peers.WAYS[2:])


def test_ways_to_rotate_that_are_not_installed_have_a_row_that_says_so(ceiling, few, graphless):
    bench = bench_on_cpu()
    with torch.no_grad():
        figures = list(rotation_peers.compare(bench, 32, 512, ceiling=ceiling))
    assert not bench.failures
    assert [f.case.removeprefix("rotations/") for f in figures] == ["dense", "fast_hadamard_transform", "hadacore"]
    dense, package, _ = figures
    assert dense.baseline > 0
    assert dense.more["baseline_gb_s"] == pytest.approx(4 * 32 * 512 / dense.baseline / 1e3)
    assert package.baseline is None
    assert package.more["error"] == "ModuleNotFoundError: No module named 'fast_hadamard_transform'"


def test_a_rotation_by_another_matrix_is_not_timed():
    x = Source("cpu").inputs(16, 512)
    way = rotation_peers.WAYS[0]
    run = way.make("cpu")
    rotation_peers.gate("dense", run, x, way.matrix(), True)
    rotation_peers.gate("dense", lambda x: 16 * run(x), x, way.matrix(), False)
    with pytest.raises(GateError, match=r"dense at \(16, 512\) disagrees: relative error"):
        rotation_peers.gate("dense", lambda x: 16 * run(x), x, way.matrix(), True)
    with pytest.raises(GateError, match="disagrees"):
        rotation_peers.gate("dense", run, x, rotation_peers._sylvester(), True)


def test_peers_that_run_are_compared_and_others_say_why(ceiling, few, monkeypatch):
    """On a CPU torch has _int_mm and no fp8 product by rows that any backend must have; projects are stand-ins."""
    right = types.SimpleNamespace(
        name="right", title="right", package="torch", module="torch", swap=lambda model, names: None
    )
    doubled = types.SimpleNamespace(
        name="doubled", title="doubled", package="torch", module="torch",
        swap=lambda model, names: model.get_submodule(names[0]).weight.mul_(2),
    )  # fmt: skip
    absent = types.SimpleNamespace(
        name="absent", title="absent", package="no-such-package", module="no_such_module", swap=None
    )
    monkeypatch.setattr("convrot_bench.model.peers.PEERS", (right, doubled, absent))
    bench = bench_on_cpu()
    with torch.no_grad():
        figures = {f.case: f for f in layer_peers.compare(bench, 32, 64, 256, ceiling=ceiling)}
    assert list(figures)[:3] == ["peers/int_mm", "peers/fp8_tensor", "peers/fp8_row"]
    assert figures["peers/int_mm"].baseline > 0
    assert figures["peers/right"].more["baseline_l2"] < 0.01 < figures["peers/right"].more["our_l2"]
    assert figures["peers/doubled"].baseline is None
    assert "doubled disagrees" in figures["peers/doubled"].more["error"]
    assert figures["peers/absent"].more["error"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert figures["peers/absent"].more["peer_version"] == "not installed"


def test_fp8_operands_are_within_half_a_step():
    x = Source("cpu").inputs(32, 256)
    for dim, share in ((None, 0.05), (1, 0.04)):
        values, scale = layer_peers._fp8(x, dim)
        assert float(values.float().abs().max()) <= layer_peers.LARGEST
        assert gates.relative_l2(values.float() * scale, x.float()) < share


def test_a_peer_that_no_graph_takes_meets_ours_on_equal_terms(monkeypatch):
    monkeypatch.setattr(clock, "is_gpu", lambda device: True)
    monkeypatch.setattr(clock, "capturable", lambda function, arguments: function is not max)
    monkeypatch.setattr(clock, "time_all", lambda bench, contenders: dict.fromkeys(contenders, 1.0))
    monkeypatch.setattr(clock, "time_singly", lambda contenders, repeats: dict.fromkeys(contenders, 2.0))
    bench = Bench("cuda", ("cutlass",), lambda text: None)
    pairs, seconds = clock.time_pairs(bench, (sum, [()]), {"a": (min, [()]), "b": (max, [()])}, {"c": (sum, [()])})
    assert pairs["a"] == clock.Pair(1.0, 1.0, clock.GRAPHED)
    assert pairs["b"] == clock.Pair(2.0, 2.0, clock.EVENTS)
    assert seconds == {"": 1.0, "c": 1.0}


# attention


def test_attention_command_measures_both_ways(tmp_path, few, monkeypatch):
    monkeypatch.setattr("convrot_bench.shapes.MINI_FLUX_ATTENTION", ((40, 3, 64),))
    out = tmp_path / "ops.jsonl"
    result = CliRunner().invoke(app, ["ops", "--case", "attention", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = load([out])
    assert [r["case"] for r in rows] == ["attention_fp8", "attention_fp8_with_norm"]  # and no ceiling
    for r in rows:
        assert all(key in r for key in REQUIRED)
        assert is_extra(r)
        assert r["shape"] == {"tokens": 40, "heads": 3, "D": 64}
        assert r["backend"] == r["auto"] == "reference"
        assert 0.02 < r["relative_l2"] < 0.1
        assert r["baseline_relative_l2"] < 0.01
        for rate, figure in (("tflops", "ours"), ("baseline_tflops", "baseline")):
            assert r[rate] == pytest.approx(4 * 40**2 * 3 * 64 / r[figure] / 1e6)
    assert [r["baseline_name"] for r in rows] == ["torch attention bf16", "norm_rope, torch attention bf16"]


def test_attention_of_a_gpu_is_measured_at_the_sizes_of_flux():
    labels = [job.label for job in plan(Bench("cuda", ("cutlass",), str), ["attention"], ((), ()), 1)]
    assert labels == [f"attention {tokens} x 24 x 128" for tokens in (4608, 1536, 16896)]


def test_attention_needs_a_gpu_that_has_it_in_8_bits(monkeypatch):
    monkeypatch.setattr(attention.cudnn, "why_not", lambda device: "an old GPU")
    with pytest.raises(GateError, match="attention_fp8 does not run on cuda: an old GPU"):
        next(attention.measure(Bench("cuda", ("cutlass",), str), 40, 3, 64))


def test_rows_of_attention_say_what_multiplied(monkeypatch):
    monkeypatch.setattr(attention.cudnn, "why_not", lambda device: "an old GPU")
    assert attention.versions() == {}
    monkeypatch.setattr(attention.cudnn, "why_not", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(attention, "version", lambda package: f"of {package}")
    assert attention.versions() == {"cudnn": 91900, "cudnn_frontend": "of nvidia-cudnn-frontend"}


def test_attention_in_fp32_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 7)
    q, k, v = torch.randn(3, 2, 24, 3, 16).unbind()
    wide = (x.double().transpose(1, 2) for x in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    torch.testing.assert_close(attention.attended(q, k, v).double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda out: out.flip(1), r"at (1, 40, 2, 64) disagrees: relative error"),
        (lambda out: out.index_fill(2, torch.tensor([1]), float("nan")), "at (1, 40, 3, 64): its output holds NaN"),
    ],
    ids=["rows", "a head that is not compared"],
)
def test_attention_that_is_wrong_is_not_timed(few, monkeypatch, side, wrong, said):
    for number, way in enumerate(attention.WAYS):
        right = getattr(way, side)
        broken = way._replace(**{side: lambda *args, right=right: wrong(right(*args))})
        monkeypatch.setattr(attention, "WAYS", (broken,))
        bench = bench_on_cpu()
        with torch.no_grad():
            assert list(attention.measure(bench, 40, 3, 64)) == []
        assert len(bench.failures) == 1
        assert said in bench.failures[0], number


def attention_rows():
    shape, more = {"tokens": 4608, "heads": 24, "D": 128}, {"tflops": 850.0, "baseline_tflops": 600.0}
    more |= {"relative_l2": 0.0791, "baseline_relative_l2": 0.0031}
    return [
        extra_row("attention_fp8", shape, 3.0, **more),
        extra_row("attention_fp8_with_norm", shape, 4.0, **more),
    ]


def test_the_table_and_the_chart_of_attention_have_both_ways(monkeypatch):
    rows, drawn = attention_rows(), {}
    table = attention_ops_table(rows)
    line = "| tokens=4608, heads=24, D=128 | 2.0 | {} | 850.0 | 600.0 | 0.079, 0.0031 |"
    assert "| attention " + line.format("3.0 | 1.50") in table
    assert "| norm, rotary embedding and attention " + line.format("4.0 | 2.00") in table
    monkeypatch.setattr(survey_sections, "bars", lambda title, values, axis, at: drawn.update(values))
    survey_sections.attention(html.Source(rows))
    assert drawn == {"4608 tokens": {"attention": 1.5, "norm, rotary embedding and attention": 2.0}}
    assert attention_ops_table([]) == "No attention in 8 bits is committed yet."


def extra_row(case, shape, baseline, **more):
    row = {"bench": "ops", "case": case, "shape": shape, "ours": 2.0, "baseline": baseline, "unit": "us", "gpu": "g"}
    row |= {"ratio": None if baseline is None else baseline / 2, "torch": "t", "commit": "c", "run_id": "r"}
    return row | {"date": "2026", "backend": "triton", "baseline_name": "other"} | more


def test_tables_of_rotations_and_peers_say_what_does_not_run():
    rows = [
        extra_row("rotations/a", {"M": 1, "K": 256}, 3.0, fused=1.5, gb_s=10.0, baseline_gb_s=7.0),
        extra_row("rotations/b", {"M": 1, "K": 256}, None, fused=1.5, gb_s=10.0, error="ImportError: a | b"),
    ]
    table = rotations_table(rows)
    assert "| M=1, K=256 | other | 3.0 | 2.0 | 1.50 | 1.5 | 7.0 | 10.0 |" in table
    assert "| M=1, K=256 | other | does not run: ImportError: a / b | 2.0 |  | 1.5 |  | 10.0 |" in table
    rows = [extra_row("peers/a", {"M": 1}, 5.0, peer_version="1", baseline_l2=0.1, our_l2=0.2)]
    assert "| M=1 | other | 1 | 5.0 | 2.0 | 2.50 | 0.100, 0.200 |" in peers_table(rows)
    rows = [extra_row("peers/b", {"M": 1}, None, peer_version="1", error="ModuleNotFoundError: No module named 'b'")]
    assert "| M=1 | other | 1 | not installed there | 2.0 |  |  |" in peers_table(rows)


def test_what_a_reader_has_to_know_stands_above_tables_and_charts():
    more = {"fused": 1.5, "gb_s": 10.0, "baseline_gb_s": 7.0}
    rows = [extra_row(f"rotations/{way}", {"M": 1, "K": 256}, 3.0, note="Too slow.", **more) for way in "ab"]
    assert rotations_table(rows).split("\n\n")[1] == "Too slow."
    assert survey_sections.rotations(html.Source(rows)).intro == "Too slow."
    newer = [row | {"date": "2027", "commit": "d"} for row in rows]
    for row in newer:
        del row["note"]
    assert "Too slow." not in rotations_table(rows + newer)
    assert survey_sections.rotations(html.Source(rows + newer)).intro == ""


def test_charts_keep_ops_of_one_shape_apart(monkeypatch):
    drawn = {}
    monkeypatch.setattr(survey_sections, "dots", lambda title, values, axis, most: drawn.update(values))
    shape = {"model": "FLUX.1-dev", "M": 2, "K": 256}
    more = {"ceiling": "copy", "gb_s": 1.0}
    rows = [
        extra_row("survey/rotate", shape, 1.0, of_ceiling=0.2, **more),
        extra_row("survey/rotate_quantize", shape, 1.0, of_ceiling=0.6, **more),
    ]
    survey_sections.survey(html.Source(rows))
    assert drawn == {"rotate 2 x 256": {"Triton kernels": 20.0}, "rotate_quantize 2 x 256": {"Triton kernels": 60.0}}


@pytest.mark.gpu
def test_the_butterfly_is_the_sylvester_matrix():
    from convrot_bench.ops.fwht import fwht256

    x = Source("cuda").inputs(77, 3072)
    way = next(way for way in rotation_peers.WAYS if way.name == "butterfly")
    rotation_peers.gate(way.title, fwht256, x, way.matrix(), True)


@pytest.mark.gpu
def test_extra_cases_run_on_a_gpu(few, monkeypatch):
    from convrot_bench.ops.problems import backends_of

    monkeypatch.setattr(shapes, "CEILING_PRODUCTS", ((1024, 1024, 1024),))
    bench, ceiling = Bench("cuda", backends_of("cuda"), print), Ceiling()
    with torch.no_grad():
        figures = list(ceiling.measure(bench))
        for job in survey.jobs(ceiling, [TINY]):
            figures += job.measure(bench)
        figures += breakdown.measure(bench, 512, 1024, 1024, ceiling=ceiling)
        figures += rotation_peers.compare(bench, 512, 1024, ceiling=ceiling)
        figures += layer_peers.compare(bench, 512, 1024, 1024, ceiling=ceiling)
        if attention.cudnn.why_not(torch.device("cuda")) is None:
            figures += attention.measure(bench, 1536, 24, 128)
    assert not bench.failures
    absent = [f for f in figures if f.baseline is None]
    assert all("No module named" in f.more["error"] or "fp8" in f.case for f in absent), absent
