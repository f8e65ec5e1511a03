"""The planner: scores, hulls, budgets, and that it beats the paper's hand-written lists at their own bytes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convrot_quant import (
    LayerPlan,
    Plan,
    QuantConfig,
    Scheme,
    apply,
    plan,
    plan_within,
    quantize_,
    save_quantized,
    scores,
)
from convrot_quant.budgets import Budget, Cost
from convrot_quant.families.blocks import opened
from convrot_quant.fuse import stacked_layers, unfused_blocks
from convrot_quant.latency import MACHINES, Workload
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.pipeline import meta_transformer
from convrot_quant.planner import Ladder, Option, Problem, Unit, frontier, predicted_error, spend
from convrot_quant.probe import LayerProbe
from convrot_quant.scores import Scores, folder_weights, model_weights, output_scores, schemes_of, weight_scores

MINI_FLUX = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights" / "transformer"
LISTS = ("paper", "paper-mixed")
W4A4, W8A8 = Scheme.parse("W4A4"), Scheme.parse("W8A8")


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "ROWS", 128)
        yield


@pytest.fixture(scope="module")
def flux(make_flux: Callable[..., nn.Module]) -> nn.Module:
    return make_flux(double=1, single=1)


@pytest.fixture(scope="module")
def ladder(flux: nn.Module) -> Ladder:
    return Ladder.of(flux)


@pytest.fixture(scope="module")
def scored(flux: nn.Module, ladder: Ladder) -> Scores:
    wanted = schemes_of([*ladder.rungs, *(plan(flux, name) for name in (*LISTS, "w4a8"))])
    return weight_scores(model_weights(flux, wanted), wanted, progress=False)


@pytest.fixture(scope="module")
def problem(flux: nn.Module, ladder: Ladder, scored: Scores) -> Problem:
    return Problem.of(ladder, scored, stacked_layers(flux))


def made_up(seed: int, *, units: int = 4, options: int = 3) -> Problem:
    """A problem of single layers whose options cost 1 to 9 bytes, with random errors."""
    draw = torch.Generator().manual_seed(seed)
    schemes = (W4A4, W8A8, None)
    layers = [LayerPlan(f"layer{i}", 16, 64, "bfloat16", 0, W4A4, "") for i in range(units)]
    ladder = Ladder((Plan(layers, QuantConfig(), "Made", 0),), sixteen=True)

    def option(name: str, i: int) -> Option:
        size, error = (int(torch.randint(1, 10, (), generator=draw)) for _ in range(2))
        return Option({name: schemes[i]}, Cost(size), error / 10)

    made = tuple(Unit(layer.name, tuple(option(layer.name, i) for i in range(options))) for layer in layers)
    return Problem(ladder, made, Cost(), Scores({}, {"layer0": 1.0}))


def best_of_all(problem: Problem, size: int) -> float:
    """The least error of any choice of options within a number of bytes."""
    choices = product(*(unit.options for unit in problem.units))
    return min(sum(o.error for o in held) for held in choices if sum(o.cost.bytes for o in held) <= size)


@pytest.mark.parametrize("seed", range(25))
def test_no_plan_of_the_bytes_of_a_step_is_better(seed: int) -> None:
    problem = made_up(seed)
    for size, error in frontier(problem):
        assert error**2 == pytest.approx(best_of_all(problem, size), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_holds_its_budget_and_misses_the_best_by_less_than_a_step(seed: int) -> None:
    problem = made_up(seed)
    least, most = (sum(size(o.cost.bytes for o in unit.options) for unit in problem.units) for size in (min, max))
    corners = frontier(problem)
    for size in range(least, most + 1):
        planned = spend(problem, Budget(bytes=size))
        held = [
            next(o for o in unit.options if o.schemes[unit.name] == planned.get(unit.name)) for unit in problem.units
        ]
        assert sum(option.cost.bytes for option in held) <= size
        below = [error**2 for corner, error in corners if corner <= size]
        assert best_of_all(problem, size) - 1e-9 <= sum(option.error for option in held) <= below[-1] + 1e-9


def test_a_layer_counts_by_its_error_on_gaussian_inputs() -> None:
    linear = nn.Linear(1024, 256, bias=False)
    x = torch.randn(256, 1024)
    for name in ("W4A4", "W4A4-absmax", "W4A8", "W4A16", "W8A8", "W4A4-r64", "W4A8-r64"):
        scheme = Scheme.parse(name)
        found = weight_scores([("a", linear.weight.detach())], {"a": (scheme,)}, progress=False)
        with torch.no_grad():
            wanted = linear(x)
            error = (ConvLinear4bit.from_linear(linear, scheme)(x) - wanted).norm() / wanted.norm()
        assert found.errors["a", scheme] == pytest.approx(float(error), rel=0.05)
    assert found.weights == {"a": 1024 * 256}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_scores_as_the_cpu_does() -> None:
    schemes = tuple(Scheme.parse(name) for name in ("W4A4", "W4A16", "W8A8"))
    weight = torch.randn(528, 1024, dtype=torch.bfloat16)
    found, wanted = (weight_scores([("a", w)], {"a": schemes}, progress=False) for w in (weight.cuda(), weight))
    assert found.errors == pytest.approx(wanted.errors, rel=1e-3)


def test_weights_of_a_folder_are_those_of_the_model(flux: nn.Module, tmp_path: Path) -> None:
    flux.save_pretrained(tmp_path / "flux", max_shard_size="5MB")  # type: ignore[operator]
    layers = [layer for layer in plan(flux).planned if layer.scheme]
    read = dict(folder_weights(tmp_path / "flux", layers))
    wanted = dict(model_weights(flux, plan(flux)))
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    wrong = [replace(layers[0], in_features=64)]
    with pytest.raises(ValueError, match=rf"{layers[0].name}.weight' must be \(3072, 64\), got \(3072, 512\)"):
        list(folder_weights(tmp_path / "flux", wrong))
    with pytest.raises(ValueError, match=r"'nowhere.weight' must be \(3072, 512\), got None"):
        list(folder_weights(tmp_path / "flux", [replace(layers[0], name="nowhere")]))


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = torch.randn(64, 512)
    weight[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"'a.b' cannot be scored: .* must be finite"):
        weight_scores([("a.b", weight)], {"a.b": (W4A4,)}, progress=False)


@pytest.mark.parametrize("preset", ["paper", "ours-r16"])
def test_outputs_are_scored_as_compare_measures_them(
    preset: str,
    flux: nn.Module,
    make_flux: Callable[..., nn.Module],
    run: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decided = plan(flux, preset)
    with LayerProbe(flux, decided, expected_calls=1) as probe:
        run(flux)
    some = output_scores(flux, probe, schemes_of([decided]), progress=False)
    monkeypatch.setattr(scores, "ROWS", 10**6)
    found = output_scores(flux, probe, schemes_of([decided]), progress=False)
    quantized = make_flux(double=1, single=1)
    quantize_(quantized, decided.config, fuse=False, progress=False)
    measured = probe.errors(quantized, decided)
    assert {name: found.errors[name, scheme] for name, scheme in decided.items()} == pytest.approx(measured)
    assert some.errors == pytest.approx(found.errors, rel=0.15)  # 128 of the outputs
    assert all(0.005 < error < 0.5 for error in measured.values())


def test_layers_that_never_ran_count_nothing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(512, 64), "b": nn.Linear(512, 64)})
    with LayerProbe(model, ["a", "b"], expected_calls=1) as probe, torch.no_grad():
        model["a"](torch.randn(4, 512))
    found = output_scores(model, probe, {"a": (W4A4,), "b": (W4A4,)}, progress=False)
    assert found.squared("a", W4A4) > 0
    assert found.squared("b", W4A4) == 0
    with LayerProbe(model, ["b"], expected_calls=1) as idle:
        pass
    with pytest.raises(ValueError, match="none of the 1 layers ran"):
        output_scores(model, idle, {"b": (W4A4,)}, progress=False)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("grouped", [True, False])
def test_the_plan_beats_the_papers_list_at_its_own_bytes(
    flux: nn.Module, ladder: Ladder, scored: Scores, name: str, grouped: bool
) -> None:
    theirs = plan(flux, name)
    problem = Problem.of(ladder, scored, stacked_layers(flux) if grouped else ())
    ours = spend(problem, Budget(bytes=theirs.bytes_after))
    assert ours.bytes_after <= theirs.bytes_after
    assert predicted_error(ours, scored) < predicted_error(theirs, scored)


def test_the_plan_beats_the_papers_lists_on_mini_flux() -> None:
    empty = meta_transformer(MINI_FLUX)
    ladder, lists = Ladder.of(empty), [plan(empty, name) for name in LISTS]
    wanted = schemes_of([*ladder.rungs, *lists])
    layers = [layer for layer in ladder.rungs[0].planned if layer.name in wanted]
    found = weight_scores(folder_weights(MINI_FLUX, layers), wanted, progress=False)
    problem = Problem.of(ladder, found, stacked_layers(empty))
    for theirs in lists:
        ours = spend(problem, Budget(bytes=theirs.bytes_after))
        assert ours.bytes_after <= theirs.bytes_after
        assert predicted_error(ours, found) < 0.9 * predicted_error(theirs, found)


def test_a_plan_is_the_same_every_time_and_survives_json(flux: nn.Module, problem: Problem) -> None:
    size = plan(flux, "paper-mixed").bytes_after
    first = spend(problem, Budget(bytes=size)).to_json()
    assert plan_within(flux, size, progress=False).to_json() == first
    assert Plan.from_json(first).to_json() == first
    same = Scores(dict.fromkeys(problem.scores.errors, 0.1) | _better_in_8_bits(problem), problem.scores.weights)
    tied = Problem.of(problem.ladder, same, ())
    one_step = spend(tied, Budget(bytes=_least(tied) + 512 * 512 // 2))
    changed = [name for name, scheme in one_step.items() if scheme.weight_bits == 8]
    alike = [
        layer.name for layer in tied.ladder.rungs[0].planned if (layer.out_features, layer.in_features) == (512, 512)
    ]
    assert changed == [min(name for name in alike if name in one_step)]


def _better_in_8_bits(problem: Problem) -> dict[tuple[str, Scheme], float]:
    return {key: 0.01 for key in problem.scores.errors if key[1].weight_bits == 8}


def _least(problem: Problem) -> int:
    return frontier(problem)[0][0]


def test_layers_that_read_one_input_get_one_scheme_unless_asked_otherwise(
    flux: nn.Module, ladder: Ladder, scored: Scores, problem: Problem
) -> None:
    groups = [group for group in stacked_layers(flux) if len(group) > 1]
    qkv = tuple(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv")
    assert (*qkv, "single_transformer_blocks.0.proj_mlp") in groups
    assert len(groups) == 4
    sizes = [size for size, _ in frontier(Problem.of(ladder, scored))]
    for size in sizes:
        planned = spend(problem, Budget(bytes=size))
        assert all(len({planned.get(name) for name in group}) == 1 for group in groups)
    apart = [spend(Problem.of(ladder, scored), Budget(bytes=size)) for size in sizes]
    assert any(len({planned.get(name) for name in group}) > 1 for planned in apart for group in groups)


def test_activation_bits_are_never_chosen_silently(flux: nn.Module, problem: Problem) -> None:
    modulation = [name for name in problem.ladder.rungs[0] if ".norm" in name]
    assert len(modulation) == 3
    for size, _ in frontier(problem):
        planned = spend(problem, Budget(bytes=size))
        assert {planned[name].name for name in modulation if name in planned} <= {"W4A16", "W8A16"}
        assert {scheme.name for name, scheme in planned.items() if name not in modulation} <= {"W4A4", "W8A8"}
    asked = plan_within(flux, _least(problem), schemes=("w4a4", "w4a8", "16"), progress=False)
    assert {scheme.name for name, scheme in asked.items() if name not in modulation} == {"W4A8"}


def test_a_budget_below_the_smallest_plan_says_the_minimum(flux: nn.Module, problem: Problem) -> None:
    least = _least(problem)
    with pytest.raises(ValueError, match=r"the budget is 5.00 MB, and the smallest plan takes (\S+) MB") as error:
        plan_within(flux, 5_000_000, progress=False)
    said = float(str(error.value).split("takes ")[1].split(" MB")[0])
    assert least <= said * 1e6 < least + 1e4
    assert spend(problem, Budget(bytes=least)).bytes_after == least
    with pytest.raises(ValueError, match="must be positive; got bytes=0, seconds=None"):
        Budget(bytes=0)
    with pytest.raises(ValueError, match="seconds depend on a machine"):
        plan_within(flux, Budget(seconds=1.0), progress=False)


def test_a_budget_for_everything_keeps_everything_in_16_bits(problem: Problem) -> None:
    planned = spend(problem, Budget(bytes=10**12))
    assert planned == {}
    assert planned.bytes_after == planned.bytes_before
    assert set(planned.reasons.values()) >= {"16 bits by the budget", "image embedder"}
    assert predicted_error(planned, problem.scores) == 0


def test_what_is_left_of_a_budget_takes_no_block_apart(flux: nn.Module, problem: Problem) -> None:
    eight = plan(flux, "w8a8").bytes_after
    for size in range(_least(problem), eight, 200_000):
        planned = spend(problem, Budget(bytes=size))
        assert planned.keys() == problem.ladder.rungs[0].keys()
        assert unfused_blocks(flux, planned) == []


def test_blocks_that_a_plan_unfuses_are_those_that_do_not_run_fused(make_flux: Callable[..., nn.Module]) -> None:
    model = make_flux(double=1, single=1)
    config = QuantConfig("W4A4-absmax", {"*.norm.linear": "W8A16"}, ("transformer_blocks.0.ff.net.2",))
    decided = quantize_(model, config, progress=False)
    assert unfused_blocks(model, decided) == ["transformer_blocks.0"]
    single, double = model.single_transformer_blocks[0], model.transformer_blocks[0]
    assert opened(single.attn.to_q, single.attn.to_k, single.attn.to_v, single.proj_mlp, single.proj_out) is not None
    assert opened(double.ff.net[2]) is None


def test_kept_and_overridden_layers_are_decided_before_the_budget(flux: nn.Module) -> None:
    out, query = "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_q"
    for size in (plan(flux, "w8a8").bytes_after, 10**12):
        planned = plan_within(flux, size, keep=(out,), overrides={"*.to_q": W4A4}, progress=False)
        assert out not in planned
        assert planned.reasons[out] == f"kept by {out!r}"
        assert planned[query].name == "W4A4"
        key = planned.get("single_transformer_blocks.0.attn.to_k")
        assert key is None or key.name != "W4A4"


@pytest.mark.parametrize("schemes", [("16",), ("W4A4", "W2A2"), ("",)])
def test_a_ladder_of_unknown_schemes_is_refused(flux: nn.Module, schemes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"a ladder has one or more of W4A4, W4A4-R16, .*W8A16, 16"):
        Ladder.of(flux, schemes)


def test_a_model_without_layers_to_quantize_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to quantize in Linear"):
        Ladder.of(nn.Linear(8, 8))


def test_seconds_are_products_or_bytes() -> None:
    workload = Workload(MACHINES["h200"], tokens=4096, text_tokens=512)
    layer = LayerPlan("single_transformer_blocks.0.proj_mlp", 12288, 3072, "bfloat16", 0, W4A4, "")
    work = 2 * 4608 * 12288 * 3072
    assert workload.seconds(layer) == pytest.approx(work / 1367e12)
    assert workload.seconds(replace(layer, scheme=None)) == pytest.approx(work / 658e12)
    text = replace(layer, name="transformer_blocks.0.ff_context.net.0.proj")
    assert workload.seconds(text) == pytest.approx(work / 9 / 1367e12)
    modulation = replace(layer, name="single_transformer_blocks.0.norm.linear", scheme=Scheme.parse("W4A16"))
    assert workload.seconds(modulation) == pytest.approx((12288 * 3072 / 2 + 12288 * 4) / 3700e9)
    branched = replace(layer, scheme=Scheme.parse("W4A4-r16"))  # reads what comes in, adds to what goes out
    beside = 2 * 4608 * (3072 + 2 * 12288) / 3700e9
    assert workload.seconds(branched) == pytest.approx(workload.seconds(layer) + beside)


def test_a_latency_budget_takes_what_its_machine_gives(flux: nn.Module, ladder: Ladder, scored: Scores) -> None:
    def planned(machine: str, budget: Budget) -> tuple[Plan, float]:
        seconds = Workload(MACHINES[machine]).seconds
        found = spend(Problem.of(ladder, scored, stacked_layers(flux), seconds), budget)
        return found, _seconds(found, machine)

    linears = [name for name in ladder.rungs[0] if ".norm" not in name]
    hopper, _ = planned("h200", Budget(seconds=_seconds(ladder.rungs[1], "h200")))
    assert all(hopper[name] == W8A8 for name in linears if name in hopper)  # 8 bits take no more time there
    limit = sum(_seconds(rung, "rtx4090") for rung in ladder.rungs) / 2  # between all W4A4 and all W8A8
    ada, seconds = planned("rtx4090", Budget(seconds=limit))
    assert seconds <= limit
    assert {ada[name].name for name in linears if name in ada} == {"W4A4", "W8A8"}
    both, seconds = planned("rtx4090", Budget(bytes=plan(flux, "paper-mixed").bytes_after, seconds=limit))
    assert seconds <= limit
    assert both.bytes_after <= plan(flux, "paper-mixed").bytes_after
    with pytest.raises(ValueError, match=r"the budget is 0.001 ms, and the fastest plan takes 0.\d+ ms"):
        planned("rtx4090", Budget(seconds=1e-6))


def _seconds(planned: Plan, machine: str) -> float:
    return sum(map(Workload(MACHINES[machine]).seconds, planned.planned))


def test_bytes_are_those_of_the_saved_model(make_flux: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make_flux(double=1, single=1)
    size = plan(model, "w8a8").bytes_after - 300_000
    planned = plan_within(model, size, progress=False)
    apply(model, planned, progress=False)
    save_quantized(model, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert planned.bytes_after <= size
    assert 0 <= written - planned.bytes_after < 30_000  # headers
