"""Synthetic layers: deterministic, with the statistics that their table of parameters claims; Figure 3."""

import pytest
import torch

from convrot_bench.quality import outliers, synthetic_suite
from convrot_bench.quality.methods import METHODS
from convrot_bench.quality.synthetic import CASES, PARAMETERS, REPORT_SEEDS, TUNING_SEEDS, make
from convrot_bench.results import Writer, load
from convrot_kernels import transforms

BY_NAME = {case.name: case for case in CASES}

# mean |x| of seed 0, 16 tokens
FROZEN = {
    "gaussian": 0.7968601, "channel_outliers": 0.8512756, "token_outliers": 1.1823254, "adaln_shifted": 0.941987,
    "gelu_inputs": 0.5157239, "heavy_tails": 0.9902445, "proj_out": 0.52412,
}  # fmt: skip


def drawn(name, seed=0, tokens=64, outputs=32):
    return make(BY_NAME[name], seed, tokens, outputs)


def rms(x, dim=None):
    return x.square().mean(dim).sqrt()


def test_tuning_and_report_seeds_are_disjoint_and_every_parameter_has_a_source():
    assert not set(TUNING_SEEDS) & set(REPORT_SEEDS)
    assert min(REPORT_SEEDS) >= 100
    assert all(len(parameter.source) > 10 for parameter in PARAMETERS.values())
    with pytest.raises(TypeError):
        PARAMETERS["tail"] = 1


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_case_is_its_seed(case):
    one, same, other = make(case, 3, 16, 8), make(case, 3, 16, 8), make(case, 4, 16, 8)
    assert one.x.shape == (16, case.k)
    assert one.weight.shape == (8, case.k)
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.weight, same.weight)
    assert torch.equal(one.calibration, same.calibration)
    assert not torch.equal(one.x, other.x)
    assert not torch.equal(one.weight, other.weight)
    assert torch.isfinite(one.x).all()
    assert torch.isfinite(one.weight).all()


def test_the_generated_values_are_frozen():
    """A changed parameter or order of drawing fails here: then every committed figure has to be measured again."""
    sums = {case.kind: float(make(case, 0, 16, 8).x.double().abs().mean()) for case in CASES[::2]}
    assert sums == pytest.approx(FROZEN, rel=1e-5)


def test_calibration_tokens_are_others_of_the_same_layer():
    sample = drawn("channel_outliers/gaussian")
    loud = rms(sample.x, 0) > 10
    assert int(loud.sum()) == PARAMETERS["outlier_channels"].value
    assert torch.equal(loud, rms(sample.calibration, 0) > 10)
    assert not torch.equal(sample.x, sample.calibration[: len(sample.x)])


def test_row_outliers_are_tokens_with_a_mean():
    ratio = outliers.dc_ratio(drawn("token_outliers/gaussian").x)
    assert int((ratio > 0.9).sum()) == 64 // PARAMETERS["dc_token_every"].value
    assert float(ratio.sort().values[:60].max()) < 0.1


def test_the_adaln_shift_is_the_mean_of_each_channel():
    sample = drawn("adaln_shifted/gaussian", tokens=512)
    assert sample.shift is not None
    assert rms(sample.x.mean(0) - sample.shift) < 0.1 * rms(sample.shift)
    assert 0.4 < rms(sample.shift) / rms(sample.x) < 0.65


def test_gelu_inputs_are_one_sided():
    x = drawn("gelu_inputs/gaussian").x
    assert x.min() > -0.1702
    assert 0.16 < (x > 0).float().mean() < 0.35


def test_proj_out_has_attention_and_gelu_parts():
    sample = drawn("proj_out/gaussian")
    assert sample.split == 3072
    assert sample.x[:, 3072:].min() > -0.1702
    assert sample.x[:, :3072].min() < -1


def test_weights_of_both_variants_have_rows_and_columns_of_different_size():
    for case in CASES[:2]:
        weight = make(case, 0, 16, 512).weight
        assert 0.1 < rms(weight, 1).log().std() < 0.2
        assert 0.05 < rms(weight, 0).log().std() < 0.25
        assert 0.9 < rms(weight) * case.k**0.5 < 1.15


def test_the_heavy_tailed_variant_has_a_low_rank_part():
    shares = []
    for case in CASES[:2]:
        values = torch.linalg.svdvals(make(case, 0, 16, 1024).weight)
        shares.append(float(values[:32].square().sum() / values.square().sum()))
    assert shares[0] < 0.1 < shares[1] < 0.3


def test_figure_3_sylvester_amplifies_and_regular_does_not():
    """Published for FLUX.1's last proj_out: max |x| 14.48, 106.19 under Sylvester, 9.26 under the regular matrix."""
    x = make(BY_NAME["proj_out/heavy_tailed"], 0, 512, 1).x
    plain, sylvester, regular = (
        outliers.amplitude(transforms.apply_blockwise(x, matrix(256)))
        for matrix in (transforms.identity, transforms.sylvester, transforms.regular)
    )
    assert plain == pytest.approx(14.48, rel=0.05)
    assert sylvester == pytest.approx(106.19, rel=0.03)
    assert regular == pytest.approx(9.26, rel=0.05)


def test_outlier_definitions():
    x = torch.zeros(2, 512)
    x[0, 0], x[1] = -8.0, 2.0
    assert outliers.amplitude(x) == 8
    assert outliers.crest_factor(x).tolist() == pytest.approx([512**0.5, 1])
    assert outliers.dc_ratio(x).tolist() == pytest.approx([512**-0.5, 1])
    assert outliers.block_dc(x).tolist() == [[8 / 256, 0], [2, 2]]
    described = outliers.describe(x)
    assert described["amplitude"] == 8
    assert described["crest_factor_max"] == pytest.approx(512**0.5)
    assert {"dc_ratio_median", "block_dc_p99"} <= set(described)


def test_an_all_zero_token_has_no_crest():
    assert outliers.crest_factor(torch.zeros(1, 256)).tolist() == [0]


FACTS = {"gpu": "none", "driver": "none", "torch": "2", "triton": "none", "commit": "abc"}


def some(*names):
    return [next(m for m in METHODS if m.name == name) for name in names]


def run_small(tmp_path, split="tuning", **more):
    cases = [BY_NAME["gaussian/gaussian"], BY_NAME["token_outliers/gaussian"], BY_NAME["adaln_shifted/heavy_tailed"]]
    writer, said = Writer(tmp_path / "q.jsonl", "quality", FACTS), []
    methods = some("paper_w4a4", "ours_w4a4", "ours_w4a8", "lever_peel_group", "lever_shift", "sylvester256")
    methods += some("plan_at_paper_bytes", "ours_w4a4_fp8_attention")  # of whole models: neither has layers here
    synthetic_suite.run(writer, "cpu", said.append, methods=methods, split=split, cases=cases, tokens=32, outputs=64)
    return {row["case"]: row for row in load([tmp_path / "q.jsonl"])}, said


def test_the_suite_writes_errors_of_every_method_and_case(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic_suite.SEEDS, "tuning", range(2))
    rows, said = run_small(tmp_path)
    assert [line.split(":")[0] for line in said] == ["gaussian/gaussian", "token_outliers/gaussian",
                                                     "adaln_shifted/heavy_tailed"]  # fmt: skip
    paper = rows["paper_w4a4/layer_l2_median"]
    assert (paper["baseline_name"], paper["ratio"], paper["shape"]["split"]) == ("paper_w4a4", 1.0, "tuning")
    assert set(paper["figure_3"]) == set(synthetic_suite.figure_3())
    assert set(paper["layer_l2"]) == {"gaussian/gaussian", "token_outliers/gaussian", "adaln_shifted/heavy_tailed"}
    assert rows["ours_w4a4/layer_l2_median"]["ratio"] > 1.25
    assert rows["ours_w4a8/layer_l2_median"]["ratio"] > 1.8
    assert rows["ours_w4a4/bytes"]["ours"] == rows["paper_w4a4/bytes"]["ours"]
    assert rows["lever_peel_group/layer_l2_median"]["multiplied"] == "4 x 4, 0.39 % 16 x 16"
    by_case = {name: rows[f"{name}/layer_l2_median"]["layer_l2"] for name in ("ours_w4a4", "lever_shift")}
    assert by_case["lever_shift"]["adaln_shifted/heavy_tailed"] < by_case["ours_w4a4"]["adaln_shifted/heavy_tailed"]
    assert rows["sylvester256/layer_l2_worst"]["worst_layer"] in paper["layer_l2"]
    assert not [case for case in rows if case.startswith(("plan_", "ours_w4a4_fp8_attention"))]


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'final'; use one of report, tuning"):
        run_small(tmp_path, split="final")


def test_cases_are_layers_of_flux_with_the_kinds_that_they_generate():
    kinds = {case.kind: synthetic_suite.kind_of(synthetic_suite.layer_name(case)) for case in CASES}
    assert kinds == {
        "gaussian": "attention", "channel_outliers": "modulated", "token_outliers": "attention",
        "adaln_shifted": "modulated", "gelu_inputs": "gelu", "heavy_tails": "modulated", "proj_out": "proj_out",
    }  # fmt: skip


def test_figure_3_names_every_matrix_and_the_peel_leaves_a_finer_step():
    found = {name: facts["amplitude"] for name, facts in synthetic_suite.figure_3(seed=0).items()}
    assert found["Sylvester-256"] > 5 * found["original"] > 5 * found["regular-256"]
    assert found["regular-256, DC peeled"] < found["regular-256"] / 1.5
