"""torch.compile on a GPU over a module that uses every op, on the CUTLASS backend: one graph, the bits of eager."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convrot_kernels as ck
from convrot_kernels import dispatch
from convrot_kernels.backends import cutlass
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    reason = "torch sees no GPU" if not torch.cuda.is_available() else cutlass.why_not(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()  # graphs of reduce-overhead, and their memory


class EveryOp(nn.Module):
    """K = 1024, N = 512. No backend is named: `rotate` is Triton's, all else CUTLASS's, as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = ck.preferred_layout("cuda")
        codes = ck.pack_int4(make_codes(512, 1024, device="cuda"))
        self.register_buffer("weight", ck.prepare_weight(codes, self.layout))
        self.register_buffer("scale", make_scale(512, device="cuda"))
        self.register_buffer("bias", make_inputs(512, device="cuda"))

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        """x (B, S, K), gate (B, N)."""
        linear: dict[str, Any] = {"b_layout": self.layout}
        operands = (self.weight, self.scale)
        rotated, (codes, scale) = ck.rotate(x), ck.rotate_quantize(x)
        values = ck.scaled_mm(rotated, operands[0], None, operands[1], self.bias, **linear)
        product = ck.scaled_mm(codes, operands[0], scale, operands[1], self.bias, x.dtype, **linear)
        whole = torch.zeros(*x.shape[:-1], 1024, dtype=x.dtype, device=x.device)
        ck.scaled_mm_out(whole[..., 512:], codes, operands[0], scale, operands[1], **linear)
        gated = ck.scaled_mm_gate_residual(codes, operands[0], scale, operands[1], None, gate, product, **linear)
        quantized = (
            *ck.rotate_quantize_modulate(x, x[:, 0], x[:, 1]),
            *ck.rotate_quantize_gelu(whole, packed=True),
            *ck.rotate_quantize_silu_mul(*whole.chunk(2, dim=-1)),
            *ck.rotate_quantize_cat_gelu(gated, x, bits=8),
        )
        packed = ck.pack_int4(codes)
        return (rotated, codes, scale, values, product, whole, gated, *quantized, packed, ck.unpack_int4(packed))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("rows", [3, 300])
def test_one_graph_gives_the_bits_of_eager(rows: int, mode: str, inference: bool) -> None:
    assert dispatch.pick("scaled_mm", "cuda")[0] == dispatch.pick("rotate_quantize", "cuda")[0] == "cutlass"
    module = EveryOp()
    compiled = torch.compile(module, fullgraph=True, mode=mode, dynamic=False)
    with torch.inference_mode() if inference else torch.no_grad():
        for seed in range(5):  # reduce-overhead warms up, records, then replays
            arguments = (
                make_inputs(2, rows, 1024, device="cuda", seed=seed),
                make_inputs(2, 512, device="cuda", seed=seed),
            )
            expected = module(*arguments)
            torch.compiler.cudagraph_mark_step_begin()
            for got, wanted in zip(compiled(*arguments), expected, strict=True):
                assert_equal(got, wanted)
    if mode == "reduce-overhead":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_any_number_of_rows_is_served_by_one_graph() -> None:
    module = EveryOp()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (300, 40, 1000, 7):
            arguments = make_inputs(2, rows, 1024, device="cuda"), make_inputs(2, 512, device="cuda")
            for got, wanted in zip(compiled(*arguments), module(*arguments), strict=True):
                assert_equal(got, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
