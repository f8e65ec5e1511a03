"""The conversion table: what it writes, watches and refuses. Its whole run on a toy is test_bench_model.py's."""

import shutil
import subprocess
import sys

import pytest
import torch

from convrot_bench.bench import Bench, GateError
from convrot_bench.model import conversion as table
from convrot_bench.model import watching
from convrot_bench.model.configs import REAL, TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return table.write_folder(tmp_path_factory.mktemp("source") / "bf16", TINY.flux)


def test_the_folder_is_one_that_diffusers_loads(folder):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    weight = model.transformer_blocks[0].attn.to_q.weight.detach().float()
    assert weight.std().item() == pytest.approx(table.STD, rel=0.05)
    assert torch.equal(weight, model.single_transformer_blocks[0].attn.to_k.weight.float())


def test_a_whole_model_is_written_in_shards_with_an_index(folder, tmp_path, monkeypatch):
    import huggingface_hub

    from convrot_quant.source import read_headers

    split = huggingface_hub.split_torch_state_dict_into_shards
    small = lambda state, **options: split(state, **(options | {"max_shard_size": "2MB"}))  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "split_torch_state_dict_into_shards", small)
    table.write_folder(tmp_path / "sharded", TINY.flux)
    headers = read_headers(tmp_path / "sharded")
    assert len({header.file for header in headers.values()}) > 3
    assert headers.keys() == read_headers(folder).keys()


def test_anonymous_memory_of_another_process_is_what_it_holds():
    code = "import time; held = bytearray(b'x') * (64 << 20); print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        assert 64 << 20 <= watching.anonymous(child.pid) < 128 << 20
    finally:
        child.kill()
        child.communicate()
    assert watching.anonymous(child.pid) == 0


def test_a_killed_run_shows_nothing_and_one_that_ends_before_is_refused(folder, tmp_path, monkeypatch):
    slow = "import sys, time\nfrom pathlib import Path\nout = Path(sys.argv[4])\n"
    slow += "part = out.with_name(f'.{out.name}.tmp-1'); part.mkdir()\n"
    slow += "(part / 'a').write_bytes(b'x' * 100); (part / 'a').rename(part / 'a.safetensors')\n"
    monkeypatch.setattr(table, "CHILD", slow + "time.sleep(60)")
    assert table.kill_half_way(folder, tmp_path / "out", "cpu", 50) == 100
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(table, "CHILD", slow)
    with pytest.raises(GateError, match="was to be killed at 500 bytes and ended at 100"):
        table.kill_half_way(folder, tmp_path / "out", "cpu", 500)
    shutil.rmtree(tmp_path / ".out.tmp-1")
    monkeypatch.setattr(table, "CHILD", slow.replace("part.mkdir()", "part.mkdir(); out.mkdir()") + "time.sleep(60)")
    with pytest.raises(GateError, match="left a folder under the name of its destination"):
        table.kill_half_way(folder, tmp_path / "out", "cpu", 50)


def test_a_failing_command_is_an_error_here(tmp_path):
    with pytest.raises(GateError, match=r"convrot quantize failed with 1: convrot: .*neither model_index\.json"):
        table.convert(tmp_path, tmp_path / "out", "cpu")


def test_different_files_are_named(tmp_path):
    for name, text in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "changed").write_text(text)
        (tmp_path / name / "same").write_text("x")
        (tmp_path / name / "README.md").write_text(name)
    (tmp_path / "two" / "more").write_text("")
    assert table.different_files(tmp_path / "one", tmp_path / "two") == ["changed", "more"]


def test_a_small_disk_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(table.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(50, 40, 10**9))
    with pytest.raises(GateError, match="has 1 GB free and needs 42; set TMPDIR to a larger disk"):
        next(table.conversion(Bench("cpu", ("reference",), print), REAL))
