"""`convrot-bench quality` under torchrun: two CPU processes give the rows of one."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convrot_bench.cli import app
from convrot_bench.results import load

HOME = Path(__file__).parents[2] / "apps" / "mini-flux"


def figures(path):
    return {row["case"]: row["ours"] for row in load([path])}


def test_two_processes_give_the_rows_of_one(tmp_path):
    """Each draws its half of the captions; what is measured on all pictures together agrees with a single process."""
    few = ["--captions", "4", "--steps", "1", "--batch", "2", "--device", "cpu", "--method", "paper_w4a4"]
    command = ["quality", str(HOME / "weights"), "--judge", str(HOME / "judge.safetensors"), *few]
    one, two, kept = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "pictures"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launch += ["-m", "convrot_bench.cli", *command, "--out", str(two), "--pictures", str(kept)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [len(list((kept / f"{name}_1_steps").iterdir())) for name in ("bf16", "paper_w4a4")] == [4, 4]
    rows = load([two])
    assert {row["processes"] for row in rows} == {2}
    assert len({row["run_id"] for row in rows}) == 1
    # from the pictures that the two have drawn: nothing is drawn again, so that figures of pictures are equal
    result = CliRunner().invoke(app, [*command, "--out", str(one), "--pictures", str(kept)])
    assert result.exit_code == 0, result.output
    alone, together = figures(one), figures(two)
    assert alone.keys() == together.keys()
    for case in ("psnr_db", "ssim", "fid", "caption_accuracy", "object", "color", "relation", "bytes"):
        assert together[f"paper_w4a4/{case}"] == pytest.approx(alone[f"paper_w4a4/{case}"], rel=1e-3), case
    assert together["bf16/caption_accuracy"] == alone["bf16/caption_accuracy"]
    assert together["chance/relation"] == alone["chance/relation"]
    # inputs of layers are of other pictures
    assert together["paper_w4a4/layer_l2_median"] == pytest.approx(alone["paper_w4a4/layer_l2_median"], rel=0.2)
