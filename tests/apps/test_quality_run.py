"""`convrot-bench quality`: what is drawn, what is kept, what its rows say; on mini-flux with few captions."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from convrot_bench.bench import GateError
from convrot_bench.cli import app
from convrot_bench.quality import command, run, subjects
from convrot_bench.quality.calibration import calibration_inputs
from convrot_bench.quality.errors import error_figures, layer_errors
from convrot_bench.quality.levers import Levers
from convrot_bench.quality.methods import METHODS, Method, levered
from convrot_bench.quality.pictures import Folder, Memory, picture_files, read_picture
from convrot_bench.quality.subjects import REPORT_MOST, read_prompts, scenes_of, seeds_of
from convrot_bench.quality.suite import Measured, Suite
from convrot_bench.results import Writer, load
from convrot_quant.probe import LayerProbe

HOME = Path(__file__).parents[2] / "apps" / "mini-flux"
WEIGHTS, JUDGE = HOME / "weights", HOME / "judge.safetensors"
FACTS = {"gpu": "NVIDIA H200", "driver": "1", "clocks": "x", "torch": "2", "triton": "3", "commit": "abc"}
CALIBRATED = Method(  # it learns the AdaLN shift from the modulation, and the order of channels from kept inputs
    "calibrated", "two levers", "paper", levered(lambda scheme: Levers(), shift=True, permute="activation"),
    needs_inputs=True,
)  # fmt: skip
SMALL = ["--height", "64", "--width", "64", "--device", "cpu", "--method", "paper_w4a4"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """So that a model of CLIP is not waited for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def invoke(*arguments):
    result = CliRunner().invoke(app, ["quality", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_no_caption_is_in_both_splits():
    tuning, report = scenes_of("tuning", 200), scenes_of("report", 500)
    assert not set(tuning) & set(scenes_of("report", REPORT_MOST))
    assert report[:100] == scenes_of("report", 100)
    assert set(seeds_of("tuning", 200)) == set(range(10))
    assert seeds_of("report", 500) == list(range(100, 600))
    with pytest.raises(ValueError, match="at most 2000 captions, got 2001"):
        scenes_of("report", REPORT_MOST + 1)


def test_mini_flux_is_measured_at_two_step_counts(tmp_path, monkeypatch, device):
    """The product, and levers that calibrate: every row, one error a layer, pictures in a sheet."""
    monkeypatch.setattr(command, "PROMPTS", 2)
    monkeypatch.setattr(command, "select", lambda names: run.select(names, (*METHODS, CALIBRATED)))
    out, sheet = tmp_path / "q.jsonl", tmp_path / "sheet.png"
    methods = [part for m in ("ours_w8a8", "calibrated") for part in ("--method", m)]
    few = ["--captions", 2, "--steps", 1, "--steps", 2, "--batch", 2, "--device", device, "--sheet", sheet]
    invoke(WEIGHTS, "--judge", JUDGE, "--out", out, *few, *methods)
    rows = load([out])
    names = {r["case"].split("/")[0] for r in rows}
    assert names == {"bf16", "chance", "paper_w4a4", "ours_w8a8", "calibrated"}
    steps = {json.dumps(r["shape"]) for r in rows}
    assert steps == {json.dumps({"model": "weights", "steps": s, "prompts": 2, "split": "report"}) for s in (1, 2)}
    assert {r["baseline_name"] for r in rows} == {"paper_w4a4"}
    by_case = {r["case"]: r for r in rows if r["shape"]["steps"] == 2}
    errors = by_case["paper_w4a4/layer_l2_median"]["layer_l2"]
    assert len(errors) == 38
    assert all(0.01 < e < 0.5 for e in errors.values())
    worst = by_case["paper_w4a4/layer_l2_worst"]
    assert worst["ours"] == errors[worst["worst_layer"]] == max(errors.values())
    assert by_case["ours_w8a8/psnr_db"]["ours"] > by_case["paper_w4a4/psnr_db"]["ours"] + 6
    assert "16 x 16" in by_case["bf16/bytes"]["multiplied"]
    assert by_case["paper_w4a4/bytes"]["multiplied"].startswith("4 x 4")
    assert by_case["ours_w8a8/fid"]["fid_features"] == "judge"
    shifted = by_case["calibrated/layer_l2_median"]["layer_l2"]
    paper = by_case["paper_w4a4/layer_l2_median"]["layer_l2"]
    assert shifted["single_transformer_blocks.0.proj_mlp"] < paper["single_transformer_blocks.0.proj_mlp"]
    if "lpips" in by_case["bf16/bytes"]["unmeasured"]:  # else its weights are on this machine
        assert "Error: " in by_case["bf16/bytes"]["unmeasured"]["lpips"]
    with Image.open(sheet) as image:
        assert image.width > 300


def prompts_file(folder, count=3):
    path = folder / "prompts.txt"
    path.write_text("".join(f"a small red cube left of a large blue sphere, number {i}\n" for i in range(count)))
    return path


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    prompts, out, kept = prompts_file(tmp_path), tmp_path / "q.jsonl", tmp_path / "pictures"
    arguments = [WEIGHTS, "--prompts", prompts, "--steps", 1, "--batch", 2, "--out", out, "--pictures", kept, *SMALL]
    invoke(*arguments)
    files = sorted(kept.rglob("*.png"))
    assert [f"{f.parent.name}/{f.name}" for f in files] == [
        f"{name}_1_steps/{i:05}.png" for name in ("bf16", "paper_w4a4") for i in range(3)
    ]
    assert not list(kept.rglob("*.part"))
    pixels = files[4].read_bytes()
    files[4].unlink()
    drawn = []
    draw = subjects.Subject.draw
    monkeypatch.setattr(subjects.Subject, "draw", lambda self, p, s, n: (drawn.extend(s), draw(self, p, s, n))[1])
    invoke(*arguments)
    assert drawn == [0, 1, 2, 1]  # three pictures for errors of layers, then the one that was missing
    again = files[4].read_bytes()
    assert abs(psnr(again, tmp_path) - psnr(pixels, tmp_path)) < 0.5
    first, second = ({r["case"]: r["ours"] for r in load([out]) if r["run_id"] == run} for run in run_ids(out))
    assert second["paper_w4a4/layer_l2_median"] == first["paper_w4a4/layer_l2_median"]
    assert second["paper_w4a4/psnr_db"] == pytest.approx(first["paper_w4a4/psnr_db"], abs=0.5)
    other = prompts_file(tmp_path, 2)
    with pytest.raises(ValueError, match="prompts=3, not 2; go on with the same settings, or name another --pictures"):
        invoke(WEIGHTS, "--prompts", other, "--out", out, "--pictures", kept, *SMALL)


def psnr(data, folder):
    """Against the 16-bit picture of the same prompt."""
    path = folder / "one.png"
    path.write_bytes(data)
    a, b = read_picture(path).float(), read_picture(folder / "pictures" / "bf16_1_steps" / "00001.png").float()
    return float(-10 * ((a - b) / 255).square().mean().log10())


def run_ids(path):
    return list(dict.fromkeys(r["run_id"] for r in load([path])))


def test_settings_are_refused_before_the_work(tmp_path):
    prompts = prompts_file(tmp_path)
    with pytest.raises(ValueError, match="say what to draw: --prompts FILE, or --judge FILE"):
        invoke(WEIGHTS, *SMALL)
    with pytest.raises(ValueError, match="leave out --prompts"):
        invoke(WEIGHTS, "--judge", JUDGE, "--prompts", prompts)
    with pytest.raises(ValueError, match="is measured and in --calibration"):
        invoke(WEIGHTS, "--prompts", prompts, "--calibration", prompts, *SMALL)
    with pytest.raises(ValueError, match="has 3 prompts, fewer than the 5 asked for"):
        invoke(WEIGHTS, "--prompts", prompts, "--captions", 5, *SMALL)
    with pytest.raises(ValueError, match="unknown method 'rotn'; use some of rtn, "):
        invoke(WEIGHTS, "--prompts", prompts, "--method", "rotn")


def test_generated_layers_are_measured_on_the_seeds_of_the_split(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(command.synthetic_suite, "run", lambda *args, **kw: called.append(kw))
    for split in ("report", "tuning"):
        invoke("synthetic", "--split", split, "--method", "rtn", "--device", "cpu", "--out", tmp_path / "q.jsonl")
    assert [kw["split"] for kw in called] == ["report", "tuning"]
    assert [m.name for m in called[0]["methods"]] == ["rtn", "paper_w4a4"]


def test_rows_of_other_models_are_not_put_among_the_committed_ones():
    subject = SimpleNamespace(name="FLUX.1-dev")
    assert command._rows_file(command.Options("x"), subject) == Path("outputs/quality/FLUX.1-dev.jsonl")
    assert command._rows_file(command.Options("x", judge=JUDGE), subject) == Path("docs/results/quality.jsonl")
    assert command._rows_file(command.Options("x", Path("a")), subject) == Path("a")


def test_prompts_come_from_lines_or_from_mjhq(tmp_path):
    lines, mjhq, empty = (tmp_path / name for name in ("a.txt", "meta_data.json", "empty.txt"))
    lines.write_text("one\n\n two \n")
    mjhq.write_text(json.dumps({"x": {"prompt": "a cat", "category": "animals"}, "y": {"prompt": "a dog"}}))
    empty.write_text("\n")
    assert read_prompts(lines) == ["one", "two"]
    assert read_prompts(mjhq, 1) == ["a cat"]
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(empty)


def test_reference_pictures_are_read_at_the_drawn_size(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.jpg")
    Image.new("L", (8, 8), 128).save(tmp_path / "a.png")
    assert [p.name for p in picture_files(tmp_path)] == ["a.png", "b.jpg"]
    subject = SimpleNamespace(pipe=None, options={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "call_arguments", lambda pipe, settings: {"height": 12, "width": 16})
        (batch,) = command._reference(picture_files(tmp_path), subject)
    assert batch.shape == (2, 3, 12, 16)
    assert batch.dtype == torch.uint8
    assert batch[0].unique().tolist() == [128]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.png, "):
        picture_files(tmp_path / "none")


def test_memory_keeps_the_16_bit_pictures_and_the_first_of_others():
    store, image = Memory(1), torch.zeros(3, 4, 4, dtype=torch.uint8)
    for name in ("bf16", "rtn"):
        for i in range(2):
            store.save(name, 8, i, image)
    assert list(store.load("bf16", 8, [0, 1])) == [0, 1]
    assert list(store.load("rtn", 8, [0, 1])) == [0]
    assert store.load("bf16", 20, [0]) == {}


def test_files_give_back_the_same_pixels(tmp_path):
    store = Folder(tmp_path / "kept", {"seed": 0})
    image = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    store.save("bf16", 8, 3, image)
    assert torch.equal(store.load("bf16", 8, [2, 3])[3], image)


class FakeSuite:
    """Measures what a dictionary says, or fails."""

    steps = (8,)

    def __init__(self, failing=()):
        self.failing = failing
        self.subject = SimpleNamespace(shape={"model": "weights", "prompts": 2, "split": "report"})

    def reference(self, *, calibrate):
        return {"bf16": {8: Measured({"bytes": 4.0}, {"title": "BF16"})}}

    def measure(self, method):
        if method.name in self.failing:
            raise RuntimeError("out of memory")
        figures = {"psnr_db": 20.0 + len(method.name), "bytes": 2.0, "layer_l2_median": 0.5}
        return {8: Measured(figures, {"title": method.title}, {"a": 0.5})}


def test_a_method_that_does_not_run_is_named_and_the_others_are_measured(tmp_path):
    writer, said = Writer(tmp_path / "q.jsonl", "quality", FACTS), []
    methods = run.select(["rtn", "sylvester256"])
    with pytest.raises(GateError, match="1 not measured: sylvester256: out of memory"):
        run.run(FakeSuite(("sylvester256",)), writer, methods, {"processes": 1}, said.append)
    rows = {r["case"]: r for r in load([tmp_path / "q.jsonl"])}
    assert {c.split("/")[0] for c in rows} == {"bf16", "paper_w4a4", "rtn"}
    assert (rows["rtn/psnr_db"]["ours"], rows["rtn/psnr_db"]["baseline"]) == (23.0, 30.0)
    assert rows["rtn/layer_l2_median"]["layer_l2"] == {"a": 0.5}
    assert rows["bf16/bytes"]["processes"] == 1
    assert "not measured: sylvester256: out of memory" in said


def test_without_its_baseline_a_run_ends(tmp_path):
    writer = Writer(tmp_path / "q.jsonl", "quality", FACTS)
    with pytest.raises(GateError, match="the baseline paper_w4a4: out of memory"):
        run.run(FakeSuite(("paper_w4a4",)), writer, run.select(["rtn"]), {}, str)
    assert not (tmp_path / "q.jsonl").exists()


def test_every_case_of_a_method_has_a_unit():
    assert set(error_figures({"a": 1.0, "b": 0.5})) <= set(run.CASES)
    assert len({m.name for m in METHODS}) == len(METHODS)


def test_errors_of_layers_are_of_all_kept_rows_together():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    with LayerProbe(model, ["a", "b"], 4) as probe:
        for _ in range(4):
            model["a"](torch.randn(2, 5, 4))
    x, y = torch.cat(probe.inputs["a"]), torch.cat(probe.outputs["a"]).detach()
    other = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    found = layer_errors(probe, other, ["a", "b"], torch.device("cpu"))
    assert list(found) == ["a"]  # b did not run
    assert found["a"] == pytest.approx(float((other["a"](x).detach() - y).norm() / y.norm()), rel=1e-5)
    assert error_figures({"a": 0.3, "b": 0.1, "c": 0.2}) == {
        "layer_l2_median": 0.2, "layer_l2_p95": 0.2, "layer_l2_worst": 0.3,
    }  # fmt: skip


def test_a_method_that_calibrates_needs_other_prompts():
    with pytest.raises(ValueError, match="give --calibration FILE"):
        calibration_inputs(SimpleNamespace(calibration=[]), 1, 1)


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    """The exchange is faked: another process says that it has no memory."""
    monkeypatch.setattr("convrot_bench.quality.suite.gather_object", lambda said: [*said, "RuntimeError: no memory"])
    suite = Suite(SimpleNamespace(prompts=["a"]), None, Memory(), (1,), 1, [0])
    with pytest.raises(RuntimeError, match="no memory"), suite._together():
        pass
