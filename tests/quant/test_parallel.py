"""Context parallelism of diffusers (Ulysses, ring) over a quantized FLUX: two gloo processes against one.

Tokens are shared out and quantization is by token, so that every layer computes what it does for all tokens at once,
bit for bit; attention sums in another order, which moves its last bits and now and then a code of what follows.

The ring asks attention for the logarithm of its sums, which diffusers takes from kernels for GPUs only: here torch's
kernel for CPUs stands in for them, and test_parallel_gpu.py runs the ring itself.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels.testing import assert_equal, make_inputs
from convrot_quant import ConvLinear4bit, Scheme, quantize_
from convrot_quant.families import flux

SCENARIOS = Path(__file__).with_name("parallel_scenarios.py")
WAYS = ("ulysses", "ring", "ulysses unfused", "ulysses compiled")
Found = list[dict[str, Any]]


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of two ranks of parallel_scenarios.py found."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(SCENARIOS), "cpu", str(folder)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# rows


@pytest.mark.parametrize("scheme", ["W4A4", "W4A8", "W8A8"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_gives_a_share_of_the_rows_the_bits_that_it_gives_them_among_all(
    device: str, scheme: str, ranks: int
) -> None:
    linear = nn.Linear(512, 1536, dtype=torch.bfloat16, device=device)
    layer, x = ConvLinear4bit.from_linear(linear, Scheme.parse(scheme)), make_inputs(2, 96, 512).to(device)
    with torch.no_grad():
        shares = [layer(share.contiguous()) for share in x.tensor_split(ranks, dim=1)]
        assert_equal(torch.cat(shares, dim=1), layer(x))


def test_fused_products_do_too(make_flux: Callable[..., nn.Module], device: str) -> None:
    model: Any = make_flux(single=0).to(device)
    quantize_(model, progress=False)
    block, x = model.transformer_blocks[0], make_inputs(2, 96, 512).to(device)
    attended, vectors = make_inputs(2, 96, 512, seed=1).to(device), make_inputs(6, 2, 512, seed=2).to(device).unbind()
    layers, after = flux.opened(*block.stacked()["image"]), block._after(block.attn.to_out[0], block.ff)

    def products(x: Tensor, attended: Tensor) -> Tensor:
        """What stands before and after attention in a double block."""
        before = flux._projected(block._stacks["image"], layers, x, vectors)
        return torch.cat((before, flux._after_attention(x, attended, after, vectors)), dim=-1)

    with torch.no_grad():
        expected = products(x, attended)
        for ranks in (2, 4):
            pairs = zip(x.tensor_split(ranks, dim=1), attended.tensor_split(ranks, dim=1), strict=True)
            shares = [products(*(part.contiguous() for part in pair)) for pair in pairs]
            assert_equal(torch.cat(shares, dim=1), expected)


# a whole step


def test_every_rank_has_the_whole_output(found: Found) -> None:
    for way in WAYS:
        assert_equal(found[0][way], found[1][way])
        assert found[0][way].shape == found[0]["one"].shape


def test_blocks_run_fused_on_their_share_of_the_tokens(found: Found) -> None:
    text_and_image = (32 + 64) // 2
    for rank in found:
        assert rank["queries"] == [(2, text_and_image, 8, 64)] * (3 * 2 * 2)  # blocks, inputs, ways


@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_a_shared_block_computes_what_it_does_alone(found: Found, way: str) -> None:
    for i, alone in enumerate(found[0]["one blocks"]):
        shares = torch.cat([rank[f"{way} blocks"][i] for rank in found], dim=1)
        assert distance(shares, alone) < 2e-3  # a flipped code


@pytest.mark.parametrize("way", WAYS)
def test_a_shared_step_is_as_near_to_16_bits_as_one_process_is(found: Found, way: str) -> None:
    one, exact, shared = (found[0][name] for name in ("one", "exact", way))
    assert 0.1 < distance(one, exact) < 0.5  # the blocks make most of the output
    assert distance(shared, exact) < 1.02 * distance(one, exact)
    assert distance(shared, one) < 0.2 * distance(one, exact)  # flipped codes, which later blocks carry on


def test_compiled_blocks_share_a_step_as_eager_ones_do(found: Found) -> None:
    assert distance(found[0]["ulysses compiled"], found[0]["ulysses"]) < 1e-5
    assert 2 <= found[0]["graphs"] <= 3  # whole blocks: a double, a single, one whose streams lie in one tensor


def test_an_adapter_is_shared_with_its_layers(found: Found) -> None:
    adapted, shared = found[0]["adapted"], found[0]["ulysses adapted"]
    assert distance(adapted, found[0]["one"]) > 0.3
    assert distance(shared, adapted) < 0.2 * distance(found[0]["one"], found[0]["exact"])
