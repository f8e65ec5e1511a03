"""convrot-bench model: every table end to end on a toy, and what the tables' parts do where no GPU is needed."""

import contextlib
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import ProcessException
from typer.testing import CliRunner

from convrot_bench import cli
from convrot_bench.bench import Bench, GateError
from convrot_bench.cli import app
from convrot_bench.model import (
    TABLES,
    attention,
    build,
    families,
    kernels,
    parallel,
    peer_layers,
    peers,
    phases,
    plan,
    select,
    sides,
    sizes,
    step,
    timing,
)
from convrot_bench.model.breakdown import parts, traced
from convrot_bench.model.configs import REAL, TINY, Rounds
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.sides import BF16, COMPILED, EAGER, GRAPH_OF, OURS, UNFUSED, Contender
from convrot_bench.results import REQUIRED, load
from convrot_quant import ConvLinear4bit, apply
from convrot_quant import plan as plan_of_layers

ROOT = Path(__file__).parents[2]
STEP_CASES = {
    "flux_weights", "flux_compile_seconds", "flux_step_compiled", "flux_step_compiled_vs_eager", "flux_step_eager",
    "flux_step_compiled_unfused", "flux_step_eager_unfused",
}  # fmt: skip
FAMILY_CASES = {
    f"{model}_{case}"
    for model in ("sd35_large", "qwen_image")
    for case in ("weights", "step_compiled", "step_eager", "step_compiled_vs_eager", "step_best")
}
CASES = {
    "step": STEP_CASES,
    "sizes": {"flux_step_compiled", "flux_step_best"},
    "peers": {f"peer_{peer.name}" for peer in peers.PEERS},
    "families": FAMILY_CASES,
    "pipeline": {"flux_pipeline_2", "flux_pipeline_3"},
    "breakdown": {f"breakdown/{side}_{mode}" for side in ("bf16", "ours") for mode in ("eager", "compiled")},
    "loading": {"flux_quantize_load", "flux_load", "flux_checkpoint"},
    "lora": {"lora_rank16"},
    "branch": {"branch_rank16", "branch_rank16_compiled", "branch_rank16_vs_bf16"},
    "attention": {
        "fp8_attention",
        "fp8_attention_compiled",
        "fp8_attention_eager_vs_bf16",
        "fp8_attention_compiled_vs_bf16",
        "fp8_attention_compiled_vs_bf16_eager",
    },
    "parallel": {
        f"flux_{case}"
        for case in (
            "ulysses_eager",
            "ulysses",
            "ulysses_efficiency",
            "replicas",
            "replicas_efficiency",
        )
    },
    "vram": {"flux_vram"},
    "conversion": {
        "flux_convert",
        "flux_convert_host_peak",
        "flux_convert_cold",
        "flux_convert_2_cores",
        "flux_convert_after_kill",
    },
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_peer(monkeypatch):
    """As on a machine where none is installed."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("convrot_bench.model.peers.import_module", missing)


def bench_on_cpu():
    said = []
    return Bench("cpu", ("reference",), said.append), said


def tiny_rows(tmp_path, table):
    out = tmp_path / "m.jsonl"
    result = CliRunner().invoke(app, ["model", "--tiny", "--device", "cpu", "--table", table, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return load([out])


TRACED = ("step", "families")  # every kind of block; to trace them again in each table would take a minute


QUANTIZING = ("loading", "conversion")  # what they time is also the search for weights
LONG = ("conversion",)  # kills and repeats whole conversions
SLOW = [pytest.param(table, marks=pytest.mark.slow) if table in LONG else table for table in TABLES]


@pytest.mark.parametrize("table", SLOW)
def test_every_table_runs_end_to_end_on_a_toy(tmp_path, no_peer, monkeypatch, table):
    if table not in TRACED:
        monkeypatch.setattr(nn.Module, "compile", lambda m, **options: setattr(m, "_compiled_call_impl", m._call_impl))
    rows = tiny_rows(tmp_path, table)
    assert {r["case"] for r in rows} == CASES[table]
    assert len({r["run_id"] for r in rows}) == 1
    for r in rows:
        assert all(key in r for key in REQUIRED)
        assert r["bench"] == "model"
        assert r["tiny"] is True
        assert r["multiplied"] == "int4 codes, by the reference on a CPU"
        assert r["ours"] > 0
        assert "fused" in r
        assert r["weights"] == ("mse, balanced" if table in QUANTIZING else "absmax")
        if r["unit"] in ("ms", "s/image"):
            assert r["p10"] <= r["ours"] <= r["p90"]
            assert r["runs"] >= 1
        if "error" not in r:
            ratio = r["baseline"] / r["ours"]
            assert r["ratio"] == pytest.approx(1 / ratio if r["unit"] == "share" else ratio)
    if table == "breakdown":
        check_breakdown(rows)
    if table == "step":
        check_step(rows)
    if table == "attention":
        check_attention(rows)
    if table == "sizes":
        assert [tuple(r["shape"].values()) for r in rows] == 2 * [(32, 32, 2)] + 2 * [(64, 64, 2)]
    if table == "peers":
        assert {r["error"] for r in rows} >= {"ModuleNotFoundError: No module named 'comfy_kitchen'"}
        assert all(r["ratio"] is r["baseline"] is None for r in rows)


def check_breakdown(rows):
    for r in rows:
        kinds = {kind: r[kind] for kind in kernels.TITLES}
        assert all(ms >= 0 for ms in kinds.values())
        assert sum(kinds.values()) >= 0.99 * r["ours"]  # gaps fill up what kernels leave
        assert r["kernels"] > 0
        ours = r["case"].startswith("breakdown/ours")
        assert (kinds[kernels.LOW_BIT] > 0) == (kinds[kernels.ROTATE] > 0) == ours
        assert kinds[kernels.ATTENTION] > 0


def check_step(rows):
    by_case = {r["case"]: r for r in rows}
    assert by_case["flux_weights"]["ratio"] > 2.5
    assert by_case["flux_step_compiled_vs_eager"]["how"] == "compiled"
    assert by_case["flux_step_compiled_vs_eager"]["baseline_how"] == "eager"
    assert by_case["flux_step_compiled"]["runs"] == 4
    assert 0 < by_case["flux_step_eager"]["relative_l2"] < 0.5
    for case, row in by_case.items():
        assert row["fused"] == (not case.endswith("_unfused"))


def check_attention(rows):
    sides = {r["shape"]["height"]: [] for r in rows}
    for r in rows:
        sides[r["shape"]["height"]].append(r["case"])
        assert r["baseline_name"] == ("BF16" if "_vs_bf16" in r["case"] else "ours, attention in 16 bits")
        assert r["baseline_how"] == ("eager" if "eager" in r["case"] else r["how"])
        assert 0 < r["relative_l2"] < 0.5
        assert 0 < r["baseline_relative_l2"] < 0.5
        assert r["relative_l2"] != r["baseline_relative_l2"]  # the two sides of ours compute something else
    assert sides == {64: list(dict.fromkeys(sides[64])), 128: list(attention.LARGE)}
    assert len({r["relative_l2"] for r in rows}) == 2  # each size has its own


def test_graphs_of_attention_in_8_bits_are_compared_with_graphs(monkeypatch):
    """Of compiled steps, and at the first size alone; in every round with all that they are compared with."""

    def captured(bench, side, modes):
        return {Contender(side.name, GRAPH_OF + mode): side.bind(mode) for mode in modes}

    monkeypatch.setattr(attention, "graphs", captured)
    monkeypatch.setattr(nn.Module, "compile", lambda m, **options: setattr(m, "_compiled_call_impl", m._call_impl))
    timed = []

    def time_rounds(steps, device, rounds):
        timed.append(set(steps))
        return {contender: timing.Spread(1.0, 1.0, 1.0, 1) for contender in steps}

    monkeypatch.setattr(attention, "time_rounds", time_rounds)
    with torch.no_grad():
        figures = list(attention.attention(bench_on_cpu()[0], TINY))
    assert [f.case for f in figures] == [*attention.PAIRS, *attention.LARGE]
    graph = GRAPH_OF + COMPILED
    hows = {f.case: (f.more["how"], f.more["baseline_how"], f.baseline_name) for f in figures}
    assert hows["fp8_attention_graph"] == (graph, graph, "ours, attention in 16 bits")
    assert hows["fp8_attention_graph_vs_bf16"] == (graph, graph, "BF16")
    every = (BF16, OURS, attention.WITH)
    assert timed == [
        {Contender(side, how) for side in every for how in (EAGER, COMPILED, graph)},
        {Contender(side, COMPILED) for side in every},
    ]


# kernels as profilers name them: torch 2.11 on an H200, inductor's, ours mangled and not, and ops on a CPU
SAMPLES = {
    kernels.LOW_BIT: [
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, "
        "cutlass::gemm::collective::CollectiveMma<cutlass::integer_subbyte<4, true>>, convrot::Multiply<float>>>",
        "_ZN7cutlass13device_kernelINS_4gemm6kernel13GemmUniversalIN4cute5tupleIJiiiiEEENS_15integer_subbyteILi4ELb1EEE"
        "N7convrot8MultiplyIfEEEEEEvNT_6ParamsE",
        "_scaled_mm",
        "convrot::scaled_mm",
        "void convrot::(anonymous namespace)::unpack(uint2 const*, uint4*, long)",
        "cutlass_80_tensorop_i16832gemm_s8_256x128_128x3_tn_align16",
        "nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_TNN",
    ],
    kernels.WIDE: [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "triton_tem_fused_addmm_gelu_3",
        "aten::addmm",
    ],
    kernels.ROTATE: [
        "void convrot::(anonymous namespace)::rotate_quantize<__nv_bfloat16, 3, false, 1>(Problem, int)",
        "_ZN7convrot52_GLOBAL__N__8fd2_18_rotate_quantize_cu_1_915rotate_quantizeI13__nv_bfloat16Li1ELb0ELi0EEEvNS_",
        "_rotate_quantize",
        "_rotate",
        "convrot::rotate_quantize_cat_gelu",
    ],
    kernels.ATTENTION: [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    kernels.NORM: [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
        "_norm_rope",
        "convrot::norm_rope_joint",
        "triton_red_fused__to_copy_add_mul_native_layer_norm_2",
        "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_5",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_add_cat_mul_stack_unbind_7",
        "aten::rms_norm",
    ],
    kernels.MODULATION: [
        "void convrot::(anonymous namespace)::gemv<convrot::W4, __nv_bfloat16, 1, 8>(convrot::Product)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "std::enable_if<!T7, void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>",
    ],
    kernels.ELEMENTWISE: [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<BinaryFunctor<MulFunctor>>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 3>",
        "triton_poi_fused_add_addmm_gelu_view_3",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_clone_1",
        "Memcpy DtoD (Device -> Device)",
        "aten::mul",
    ],
    kernels.OTHER: ["some_kernel_that_nobody_knows", "void at::native::(anonymous namespace)::sort_pairs<float>"],
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in SAMPLES.items() for name in names])
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert kernels.classify(name) == kind


def test_a_trace_counts_kernels_and_copies_but_no_marks():
    events = [
        {"cat": "kernel", "name": "nvjet_tst", "dur": 3000.0},
        {"cat": "kernel", "name": "nvjet_tst", "dur": 1000.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "dur": 500.0},
        {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "dur": 9e6},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9e6},
        {"name": "process_labels"},
    ]
    durations, count = traced({"traceEvents": events}, 2)
    assert durations == {"nvjet_tst": 2.0, "Memcpy DtoD (Device -> Device)": 0.25}
    assert count == 1


def test_what_kernels_leave_of_a_step_are_gaps():
    fields = parts(10.0, {"nvjet_tst": 6.0, "sdpa": 2.5, "no idea": 0.5})
    assert fields[kernels.WIDE] == 6.0
    assert fields[kernels.ATTENTION] == 2.5
    assert fields[kernels.GAPS] == pytest.approx(1.0)
    assert fields["unknown"] == {"no idea": 0.5}
    assert parts(1.0, {"nvjet_tst": 2.0})[kernels.GAPS] == 0.0


def test_contenders_take_turns():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "ab"}
    spreads = timing.time_rounds(contenders, "cpu", Rounds(rounds=2, warmup=1, steps=2))
    assert "".join(order) == "aaabbb" * 2
    assert spreads["a"].runs == 4


def test_percentiles_are_samples():
    spread = timing.spread_of([float(i) for i in range(20, -1, -1)])
    assert spread == timing.Spread(10.0, 2.0, 18.0, 21)
    assert timing.spread_of([3.0]) == timing.Spread(3.0, 3.0, 3.0, 1)


def test_long_steps_run_less_often():
    assert sizes.rounds_for(0.5, REAL.rounds) == Rounds(rounds=2, warmup=2, steps=10)
    assert sizes.rounds_for(2.5, REAL.rounds) == Rounds(rounds=2, warmup=1, steps=3)
    quick = select("cuda", tiny=False, quick=True)
    assert (quick.rounds, quick.images) == (Rounds(3, 1, 5), Rounds(3, 0, 1))
    assert sizes.rounds_for(0.5, quick.rounds) == Rounds(rounds=2, warmup=1, steps=5)
    assert select("cpu", tiny=True, quick=True) == TINY  # which has no more than that


def test_one_model_is_timed_eager_and_compiled_in_turns(monkeypatch):
    """Compiling a model is undone for an eager step, and done again without compiling."""
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph(*args)

    monkeypatch.setattr(sides, "compile_options", lambda device: {"fullgraph": True, "backend": backend})
    bench, said = bench_on_cpu()
    side = flux_sides(bench, TINY, said.append, BF16)[BF16]
    assert said == ["building the 16-bit model"]  # and none is quantized
    eager = side.step(EAGER)
    assert not calls
    assert side.compile("cpu") > 0
    assert len(calls) == 2  # a double and a single block
    assert torch.equal(side.step(EAGER), eager)
    assert len(calls) == 2
    assert torch.equal(side.step(COMPILED), eager)
    assert len(calls) == 4


def test_a_peak_leaves_out_what_other_models_hold(monkeypatch):
    monkeypatch.setattr(step, "is_gpu", lambda device: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    held = {BF16: 40, OURS: 10, UNFUSED: 12}
    models = {name: sides.Side(name, lambda return_dict: (torch.ones(2),), {}, size) for name, size in held.items()}
    peaks = step.peaks(models, EAGER, "cuda")
    assert peaks == {BF16: 78, OURS: 48, UNFUSED: 50}
    figure = step._peak(peaks, {BF16: 80, OURS: 16, UNFUSED: 20}, shape_of(1024), {"fused": True})
    assert (figure.ours, figure.baseline, figure.more["eager"], figure.more["unfused"]) == (16, 80, 48, 20)


def test_graphs_of_both_sides_are_the_fastest_of_each():
    how = {mode: GRAPH_OF + mode for mode in (EAGER, COMPILED)}
    seconds = {
        Contender(OURS, COMPILED): 0.08, Contender(BF16, COMPILED): 0.13, Contender(BF16, EAGER): 0.17,
        Contender(OURS, EAGER): 0.12, Contender(UNFUSED, COMPILED): 0.1,
        Contender(OURS, how[EAGER]): 0.07, Contender(OURS, how[COMPILED]): 0.08,
        Contender(BF16, how[EAGER]): 0.16, Contender(BF16, how[COMPILED]): 0.12,
    }  # fmt: skip
    spreads = {c: timing.Spread(s, s, s, 1) for c, s in seconds.items()}
    figures = {f.case: f for f in step.step_figures(spreads, shape_of(1024), {"fused": True})}
    assert set(figures) == {
        "flux_step_compiled", "flux_step_compiled_vs_eager", "flux_step_eager", "flux_step_compiled_unfused",
        "flux_step_graph",
    }  # fmt: skip
    graph = figures["flux_step_graph"]
    assert (graph.ours, graph.baseline) == pytest.approx((70, 120))
    assert (graph.more["how"], graph.more["baseline_how"]) == ("cuda graph of eager", "cuda graph of compiled")
    assert figures["flux_step_compiled_unfused"].more["fused"] is False
    assert figures["flux_step_compiled"].shape == {"height": 1024, "width": 1024, "batch": 1}


def test_graphs_that_cannot_be_captured_are_said(monkeypatch):
    def capture(step):
        if len(bench.failures) < 1:
            raise RuntimeError("operation not permitted")
        return step

    monkeypatch.setattr(sides, "is_gpu", lambda device: True)
    monkeypatch.setattr(sides, "capture", capture)
    bench, said = bench_on_cpu()
    side = sides.Side("ours", lambda return_dict: (torch.ones(2),), {})
    assert list(sides.graphs(bench, side, (EAGER, EAGER))) == [Contender("ours", GRAPH_OF + EAGER)]
    assert said == ["not timed: ours, cuda graph of eager: operation not permitted"]


def test_a_family_has_the_fastest_graph_and_the_fastest_way_of_each_side():
    how = {mode: GRAPH_OF + mode for mode in (EAGER, COMPILED)}
    seconds = {
        Contender(OURS, COMPILED): 0.087, Contender(BF16, COMPILED): 0.068,
        Contender(OURS, EAGER): 0.12, Contender(BF16, EAGER): 0.09,
        Contender(OURS, how[EAGER]): 0.06, Contender(OURS, how[COMPILED]): 0.05,
        Contender(BF16, how[EAGER]): 0.08, Contender(BF16, how[COMPILED]): 0.07,
    }  # fmt: skip
    spreads = {c: timing.Spread(s, s, s, 1) for c, s in seconds.items()}
    figures = {f.case: f for f in families.family_figures("sd35_large", spreads, shape_of(1024), {})}
    found = {case.removeprefix("sd35_large_step_"): f for case, f in figures.items()}
    assert set(found) == {"compiled", "eager", "compiled_vs_eager", "graph", "best"}
    assert (found["compiled"].ours, found["compiled"].baseline) == pytest.approx((87, 68))
    assert (found["graph"].ours, found["graph"].baseline) == pytest.approx((50, 70))
    assert (found["best"].ours, found["best"].baseline) == pytest.approx((50, 68))
    assert (found["graph"].more["how"], found["graph"].more["baseline_how"]) == (how[COMPILED], how[COMPILED])
    assert (found["best"].more["how"], found["best"].more["baseline_how"]) == (how[COMPILED], COMPILED)


@pytest.mark.parametrize(("fails", "some"), [((0,), True), ((0, 1), False)], ids=["one", "both of a side"])
def test_a_family_goes_on_without_what_cannot_be_captured(monkeypatch, fails, some):
    asked = []

    def capture(step):
        asked.append(step())
        if len(asked) - 1 in fails:
            raise RuntimeError("operation not permitted")
        return step

    def graphs(*arguments):
        with monkeypatch.context() as gpu:
            gpu.setattr(sides, "is_gpu", lambda device: True)
            gpu.setattr(sides, "capture", capture)
            return sides.graphs(*arguments)

    monkeypatch.setattr(nn.Module, "compile", lambda m, **options: setattr(m, "_compiled_call_impl", m._call_impl))
    monkeypatch.setattr(families, "graphs", graphs)
    bench, said = bench_on_cpu()
    with torch.no_grad():
        figures = {f.case: f for f in families.family(bench, TINY, families.FAMILIES[0])}
    assert len(asked) == 4  # of each side, eager and compiled
    modes = (EAGER, COMPILED)
    assert said == [f"not timed: bf16, cuda graph of {modes[i]}: operation not permitted" for i in fails]
    assert ("sd35_large_step_graph" in figures) == some
    if some:
        assert figures["sd35_large_step_graph"].more["baseline_how"] == GRAPH_OF + COMPILED
    assert {"sd35_large_step_compiled", "sd35_large_step_best"} <= figures.keys()


def test_an_output_that_is_not_finite_is_not_timed():
    with pytest.raises(GateError, match="ours: its output holds NaN or inf"):
        sides.check_finite("ours", torch.tensor([1.0, float("nan")]))


def test_weights_count_a_storage_once():
    model = nn.Module()
    joined = torch.zeros(8, 4)
    model.a, model.b = nn.Parameter(joined[:4]), nn.Parameter(joined[4:])
    model.register_buffer("c", torch.zeros(2, dtype=torch.int8))
    assert build.weight_bytes(model) == 8 * 4 * 4 + 2


def storages(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@torch.no_grad()
def test_sides_come_from_one_model_that_is_built_and_quantized_once(monkeypatch):
    built, quantized = [], []
    transformer, copied = build.transformer, build.quantized_copy
    monkeypatch.setattr(build, "transformer", lambda *a: built.append(1) or transformer(*a))
    monkeypatch.setattr(build, "quantized_copy", lambda model: quantized.append(1) or copied(model))
    three = flux_sides(bench_on_cpu()[0], TINY, lambda phase: None, BF16, OURS, UNFUSED)
    assert (len(built), len(quantized)) == (1, 1)
    assert [side.name for side in three.values()] == list(three) == [BF16, OURS, UNFUSED]
    assert not any(isinstance(m, ConvLinear4bit) for m in three[BF16].model.modules())
    assert [build.is_fused(side.model) for side in three.values()] == [False, True, False]
    assert three[OURS].model.transformer_blocks[0]._stacks["image"]._parts  # joined, as in a model of its own
    first, second, third = (storages(side.model) for side in three.values())
    assert not first & second
    assert not (first | second) & third
    again = transformer("FluxTransformer2DModel", TINY.flux, "cpu")
    apply(again, build.fast_plan(again), progress=False)
    expected = again(**three[OURS].inputs, return_dict=False)[0]
    assert torch.equal(three[OURS].step(), expected)
    unfused = flux_sides(bench_on_cpu()[0], TINY, lambda phase: None, UNFUSED)
    assert torch.equal(unfused[UNFUSED].step(), three[UNFUSED].step())


def test_what_is_only_timed_has_the_schemes_and_bytes_of_ours_without_the_search():
    model = build.transformer("FluxTransformer2DModel", TINY.flux, "cpu")
    fast, ours = build.fast_plan(model), plan_of_layers(model, "ours")
    assert fast.bytes_after == ours.bytes_after
    assert {s.weight_rule for s in ours.values()} == {"mse"}
    rules = {"weight_rule": "absmax", "weight_rounding": "nearest"}
    assert dict(fast) == {name: replace(scheme, **rules) for name, scheme in ours.items()}


@torch.no_grad()
def test_shells_share_tensors_and_nothing_that_is_done_to_one():
    side = flux_sides(bench_on_cpu()[0], TINY, lambda phase: None, BF16)[BF16]
    shell = build.shell(side.model)
    assert storages(shell) == storages(side.model)
    before = side.step()
    shell.transformer_blocks[0].register_forward_hook(lambda module, args, out: tuple(2 * x for x in out))
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry.get_active_backend()[0]
    shell.set_attention_backend("_native_math")
    registry.set_active_backend(active)  # diffusers sets it for the process as well
    for block in (*shell.transformer_blocks, *shell.single_transformer_blocks):
        block._compiled_call_impl = block._call_impl
    assert torch.equal(side.step(), before)
    assert not torch.equal(shell(**side.inputs, return_dict=False)[0], before)
    assert not side.model.transformer_blocks[0]._forward_hooks
    assert side.model.transformer_blocks[0].attn.processor._attention_backend is None
    assert side.model.transformer_blocks[0]._compiled_call_impl is None


@pytest.mark.parametrize("one", families.FAMILIES, ids=lambda one: one.key)
def test_real_models_of_other_families_take_their_inputs(monkeypatch, one):
    monkeypatch.setattr(nn.Module, "to", lambda model, device: model)  # a fake tensor cannot be moved in place
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = build.transformer(one.kind, getattr(REAL, one.key), "cpu")
        inputs = one.inputs(model, REAL, "cpu", 1024, 1024, 1)
        out = model(**inputs, return_dict=False)[0]
    assert out.shape == inputs["hidden_states"].shape
    assert out.dtype == torch.bfloat16


def test_phases_are_told_on_stderr_with_the_seconds_since_the_table_began(capsys):
    phases.Phases("step", time.time() - 61)("compiling")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"step, 61\.\d s: compiling\n", err)


NOTES = [
    {"what": "alone", "side": OURS, "how": EAGER, "spread": {"median": 0.08, "p10": 0.08, "p90": 0.08, "runs": 15}},
    {"what": "alone", "side": BF16, "how": EAGER, "spread": {"median": 0.16, "p10": 0.16, "p90": 0.16, "runs": 15}},
    {"what": "ulysses", "side": OURS, "distance": 0.1},
    {"what": "ulysses", "side": BF16, "distance": 0.2},
    {"what": "ulysses", "side": OURS, "how": EAGER, "spread": {"median": 0.05, "p10": 0.05, "p90": 0.05, "runs": 15}},
    {"what": "ulysses", "side": BF16, "how": EAGER, "spread": {"median": 0.1, "p10": 0.1, "p90": 0.1, "runs": 15}},
]


class Processes:
    """Two that write a note at each look, and fail or end after the last."""

    def __init__(self, notes, fails):
        self.notes, self.left, self.fails, self.processes = notes, list(NOTES), fails, []

    def join(self, timeout):
        if not self.left and self.fails:
            raise ProcessException("Traceback\nRuntimeError: NCCL", 0, 1)
        if not self.left:
            return True
        whole, half = json.dumps(self.left.pop(0)) + "\n", '{"what": "uly'
        written = self.notes.read_text().removesuffix(half) if self.notes.exists() else ""
        self.notes.write_text(written + whole + half * bool(self.left))
        return False


@pytest.mark.parametrize("fails", [False, True])
def test_rows_of_several_gpus_are_there_as_soon_as_they_are_measured(monkeypatch, fails):
    started = []

    def spawn(work, arguments, nprocs, join):
        started.append(Processes(arguments[0].notes, fails))
        return started[0]

    monkeypatch.setattr(parallel.multiprocessing, "spawn", spawn)
    bench, said = bench_on_cpu()
    rows = parallel.parallel(bench, TINY)
    first = next(rows)
    assert (first.case, first.ours, first.baseline) == ("flux_ulysses_eager", pytest.approx(50), pytest.approx(100))
    assert (first.more["relative_l2"], first.more["weights"]) == (0.1, "absmax")
    assert not started[0].left
    rest = list(rows)
    assert [row.case for row in rest] == ["flux_ulysses", "flux_ulysses_efficiency"]
    assert rest[1].ours == pytest.approx(0.8)
    assert said == ["not timed: parallel: a process failed: RuntimeError: NCCL"] * fails


def test_help_names_every_table():
    named = cli.TABLES.replace(" or ", ", ").split(", ")
    assert sorted(named) == sorted(TABLES)


def test_models_are_drawn_from_one_seed():
    first, second = (build.transformer("FluxTransformer2DModel", TINY.flux, "cpu") for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == torch.bfloat16
    assert torch.equal(first.transformer_blocks[0].attn.norm_q.weight, torch.ones(128, dtype=torch.bfloat16))
    assert first.x_embedder.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "key", "billions"),
    [
        ("FluxTransformer2DModel", "flux", 11.90),
        ("SD3Transformer2DModel", "sd35_large", 8.06),
        ("QwenImageTransformer2DModel", "qwen_image", 20.43),
    ],
)
def test_real_configurations_are_those_of_the_released_models(kind, key, billions):
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, kind)(**getattr(REAL, key))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_real_text_encoders_and_vae_are_those_of_flux():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**REAL.t5))
        clip = CLIPTextModel(CLIPTextConfig(**REAL.clip))
        vae = AutoencoderKL(**REAL.vae)
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (t5, clip, vae)]
    assert millions == pytest.approx([4762.3, 123.1, 83.8], abs=0.1)


class Toy(nn.Module):
    """Stands for FLUX where only the peer is in question: a layer of one row, and one of many."""

    def __init__(self):
        super().__init__()
        self.modulation, self.tokens = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self._repeated_blocks, self.compiled = ["Toy"], False

    def forward(self, x, return_dict):
        return (self.tokens(x + self.modulation(x[:1])),)

    def compile_repeated_blocks(self, **options):
        self.compiled = True


class Least(nn.Module):
    """A peer's linear that cannot take few rows."""

    def __init__(self, linear, least):
        super().__init__()
        self.linear, self.least = linear, least

    def forward(self, x):
        if len(x) < self.least:
            raise RuntimeError("self.size(0) needs to be greater than 16\nand more")
        return self.linear(x)


def attempt_with(monkeypatch, replace):
    """What becomes of a peer that replaces each linear so."""
    monkeypatch.setattr(peers, "make_flux", lambda bench, scale: Toy())
    layer_sets = [["modulation", "tokens"], ["tokens"]]
    task = peers.Task(bench_on_cpu()[0], TINY, {"x": torch.ones(20, 64)}, torch.ones(20, 64), layer_sets)
    with torch.no_grad():
        peer = peers.Peer("fake", "a fake", "convrot-bench", "convrot_bench", peer_layers.swapper(replace))
        return peers._attempt(task, peer)


def test_a_peer_runs_both_ways_with_all_layers(monkeypatch):
    attempt = attempt_with(monkeypatch, lambda linear: linear)
    assert set(attempt.l2) == {EAGER, COMPILED}
    assert attempt.side.model.compiled
    assert (attempt.layers, attempt.errors) == (2, {})


def test_a_peer_that_cannot_take_the_modulations_runs_without_them(monkeypatch):
    attempt = attempt_with(monkeypatch, lambda linear: Least(linear, 17))
    assert set(attempt.l2) == {EAGER, COMPILED}
    assert (attempt.layers, attempt.errors) == (1, {})
    assert isinstance(attempt.side.model.modulation, nn.Linear)


def test_a_peer_that_does_not_run_says_why(monkeypatch):
    attempt = attempt_with(monkeypatch, lambda linear: Least(linear, 30))
    assert attempt.l2 == {}
    assert attempt.layers == 2
    reason = "RuntimeError: self.size(0) needs to be greater than 16"
    assert attempt.errors == {EAGER: reason, COMPILED: reason}


def test_a_peer_that_compiles_for_ever_runs_eager_and_says_so(monkeypatch):
    def compile_for_ever(side, device):
        with contextlib.suppress(TimeoutError):  # as an autotuner does with what fails
            time.sleep(60)
        time.sleep(60)

    monkeypatch.setattr(peers, "PATIENCE", 0.2)
    monkeypatch.setattr(peers, "AGAIN", 0.1)
    monkeypatch.setattr(peers.Side, "compile", compile_for_ever)
    handler, begun = signal.getsignal(signal.SIGALRM), time.monotonic()
    attempt = attempt_with(monkeypatch, lambda linear: linear)
    assert time.monotonic() - begun < 30
    assert set(attempt.l2) == {EAGER}
    assert attempt.errors == {COMPILED: "TimeoutError: compiling takes more than 0.2 s"}
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_peer_that_computes_something_else_is_no_baseline(monkeypatch):
    def other(linear):
        linear.weight.data.neg_()
        return linear

    attempt = attempt_with(monkeypatch, other)
    assert attempt.l2 == {}
    assert attempt.side.model is None
    assert "GateError: a fake at tokens disagrees: relative error" in attempt.errors["swap"]


def test_layers_of_a_peer_are_those_of_ours_with_and_without_modulations():
    model = build.transformer("FluxTransformer2DModel", TINY.flux, "cpu")
    everything, tokens = peers.layer_sets(model)
    assert (len(everything), len(tokens)) == (20, 17)
    assert set(everything) - set(tokens) == {
        "transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
    }  # fmt: skip


def test_what_a_peer_does_to_the_compiler_ends_with_it():
    from torch._inductor import config

    before = config.coordinate_descent_tuning
    with peer_layers.own_settings():
        config.coordinate_descent_tuning = not before
        torch.set_float32_matmul_precision("high")
    assert config.coordinate_descent_tuning == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_selection():
    scale = select("cuda", tiny=False, sizes=[2048], batches=[1], peers=["torchao_fp8"])
    assert (scale.sizes, scale.batches, scale.peers) == ((2048,), (1,), ("torchao_fp8",))
    assert select("cuda", tiny=False) == REAL
    labels = [job.label for job in plan(REAL, [])]
    assert labels[:5] == ["step", "sizes", "peers", "SD3.5-large", "Qwen-Image"]
    assert labels[5:13] == ["pipeline", "breakdown", "loading", "lora", "branch", "attention", "conversion", "vram"]
    assert labels[13:] == ["parallel"] * (torch.cuda.device_count() > 1)
    assert [job.label for job in plan(REAL, ["breakdown", "step"])] == ["step", "breakdown"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "real sizes need a GPU, got device cpu; use --tiny"),
        (["--tiny", "--table", "stap"], "unknown table 'stap'; use some of step, sizes"),
        (["--tiny", "--peer", "nobody"], "unknown peer 'nobody'; use some of comfy_kitchen_w4a4"),
        (["--tiny", "--size", "1000"], "a size must be a positive multiple of 16 pixels, got 1000"),
        (["--tiny", "--out", "docs/results/m.jsonl"], "--tiny measures no real model, and docs/results/m.jsonl is"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, options, message):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["model", "--device", "cpu", *options])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_no_tiny_row_is_among_the_results():
    rows = load(sorted((ROOT / "docs" / "results").glob("*.jsonl")))
    assert not [json.dumps(r) for r in rows if r.get("tiny")]
