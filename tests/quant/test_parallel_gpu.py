"""Several GPUs, a process each (NCCL): Ulysses and ring over a quantized FLUX against one GPU, and replicas."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from convrot_kernels.testing import assert_equal, make_inputs
from convrot_quant import ConvLinear4bit, Scheme

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
several = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, torch sees {GPUS}")
SCENARIOS = Path(__file__).with_name("parallel_scenarios.py")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
CONVROT = [sys.executable, "-c", "from convrot_quant.cli import main; main()"]  # also where nothing is installed
# (N, K) of FLUX.1's linears over tokens, those of one input as one
PRODUCTS = [(9216, 3072), (21504, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360)]
WAYS = ("ulysses", "ring", "ring flash", "ulysses unfused", "ring unfused", "ulysses compiled", "ring compiled")
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks() -> int:
    """2, or 4 where there are as many GPUs."""
    return 4 if GPUS >= 4 else 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, ranks: int) -> Found:
    """What each rank of parallel_scenarios.py found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*LAUNCHER, str(ranks), str(SCENARIOS), "cuda", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.skipif(GPUS < 1, reason="torch sees no GPU")
@pytest.mark.parametrize("shares", [2, 4, 8])
@pytest.mark.parametrize(("n", "k"), PRODUCTS)
def test_a_layer_gives_a_share_of_the_rows_the_bits_that_it_gives_them_among_all(n: int, k: int, shares: int) -> None:
    """4096 tokens of an image, 512 of text, and both: a share may be small enough for another kernel."""
    layer = ConvLinear4bit.from_linear(nn.Linear(k, n, dtype=torch.bfloat16, device="cuda"), Scheme.parse("W4A4"))
    for tokens in (4608, 4096, 512):
        x = make_inputs(1, tokens, k).cuda()
        with torch.no_grad():
            parts = [layer(part.contiguous()) for part in x.chunk(shares, dim=1)]
            assert_equal(torch.cat(parts, dim=1), layer(x))


@several
def test_every_rank_has_the_whole_output(found: Found) -> None:
    for way in WAYS:
        for rank in found[1:]:
            assert_equal(rank[way], found[0][way])
        assert found[0][way].isfinite().all()


@several
def test_blocks_run_fused_on_their_share_of_the_tokens(found: Found, ranks: int) -> None:
    for rank in found:
        assert rank["queries"] == [(2, (32 + 64) // ranks, 8, 64)] * (3 * 2 * 3)  # blocks, inputs, ways


@several
@pytest.mark.parametrize("way", WAYS)
def test_a_shared_step_is_no_further_from_one_gpus_than_compiled_is_from_eager(found: Found, way: str) -> None:
    """Compiled layers, one by one: fused blocks hold little that a compiler could round otherwise.

    A code flips or not; a quarter more is what one seed differs from another by.
    """
    first, kind = found[0], way.rpartition(" ")[2]
    alone = first[{"unfused": "one unfused", "compiled": "compiled"}.get(kind, "one")]
    assert distance(first[way], alone) <= 1.25 * distance(first["compiled unfused"], first["one unfused"])
    assert distance(first[way], first["exact"]) < 1.05 * distance(first["one"], first["exact"])


@several
def test_replicas_on_gpus_draw_the_images_of_one(pipeline_folder: Path, tmp_path: Path) -> None:
    prompts = [part for prompt in ("a red cube", "a blue sphere", "a cone") for part in ("-p", prompt)]
    draw = [*CONVROT, "generate", str(pipeline_folder), *prompts, "--steps", "2", "--json", "-o"]
    outs: dict[str, dict[str, Any]] = {}
    for name, command in (("one", draw), ("two", [*LAUNCHER, "2", "--no-python", *draw])):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outs[name] = json.loads(done.stdout)
    assert (outs["one"]["processes"], outs["two"]["processes"]) == (1, 2)
    assert outs["one"]["pictures"] == outs["two"]["pictures"]
    for image in ("000.png", "001.png", "002.png"):
        assert numpy.array_equal(*(numpy.array(Image.open(tmp_path / name / image)) for name in outs))
