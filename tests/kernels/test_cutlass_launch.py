"""Which kernels a call launches and with what: a stand-in library records the calls, on the CPU."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from convrot_kernels import pack_int4, prepare_weight
from convrot_kernels.backends import cudnn, cutlass
from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.products import BLOCKS
from convrot_kernels.testing import make_codes, make_inputs, make_scale

Calls = list[tuple[str, tuple[Any, ...]]]
UNPACK, GEMV, JOINED = "convrot_unpack", "convrot_gemv", "convrot_gemv_joined"
# activation bits, weight bits, packed activations
W4A4, PACKED, W4A8, W8A8, W8A4 = (4, 4, False), (4, 4, True), (8, 4, False), (8, 8, False), (4, 8, True)


class _Recorder:
    def __init__(self) -> None:
        self.calls: Calls = []

    def call(self, name: str, *arguments: Any) -> None:
        types = library._PLAIN.get(name, library._GEMM)
        assert len(arguments) == len(types), name
        for value, convert in zip(arguments, types, strict=True):
            convert.from_param(value)  # as ctypes would: raises for a wrong type
        self.calls.append((name, arguments))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    """The library of the arch in the test's parameter, or of sm_90a."""
    recorder, arch = _Recorder(), getattr(request, "param", "sm_90a")
    monkeypatch.setattr(library, "of", lambda device: (arch, recorder))
    monkeypatch.setattr(library, "index_of", lambda device: 0)
    monkeypatch.setattr(library, "sm_count", lambda index: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return recorder


def _operands(m: int, n: int, k: int, scheme: tuple[int, int, bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a_bits, b_bits, packed = scheme
    a, b = make_codes(m, k, bits=a_bits), make_codes(n, k, bits=b_bits)
    return pack_int4(a) if packed else a, pack_int4(b) if b_bits == 4 else b, make_scale(m), make_scale(n)


ROUTES = [
    ("sm_90a", W4A4, ["sm90_s4s8_128x128x128_bf16"]),
    ("sm_90a", W4A8, ["sm90_s4s8_128x128x128_bf16"]),
    ("sm_90a", PACKED, [UNPACK, "sm90_s4s8_128x128x128_bf16"]),
    ("sm_90a", W8A8, ["sm90_s8s8_128x128x128_bf16"]),
    ("sm_90a", W8A4, [UNPACK, "sm90_s8s8_128x128x128_bf16"]),
    ("sm_80", PACKED, ["sm80_s4s4_128x256x128_bf16"]),
    ("sm_80", W4A8, [UNPACK, "sm80_s8s8_128x128x64_bf16"]),
    ("sm_80", W8A8, ["sm80_s8s8_128x128x64_bf16"]),
    ("sm_120", W4A4, [UNPACK, "sm80_s8s8_128x128x64_bf16"]),
    ("sm_120", PACKED, [UNPACK, UNPACK, "sm80_s8s8_128x128x64_bf16"]),
    ("sm_120", W8A8, ["sm80_s8s8_128x128x64_bf16"]),
]


@pytest.mark.parametrize(("recorder", "scheme", "kernels"), ROUTES, indirect=["recorder"])
@pytest.mark.parametrize("layout", ["row_major", BLOCKS])
def test_route_of_a_scheme(recorder: _Recorder, scheme: tuple[int, int, bool], kernels: list[str], layout: str) -> None:
    a, b, a_scale, b_scale = _operands(300, 128, 256, scheme)
    cutlass.scaled_mm(a, prepare_weight(b, layout), a_scale, b_scale, b_layout=layout)
    assert recorder.names == kernels


@pytest.mark.parametrize("recorder", ["sm_90a", "sm_80", "sm_100"], indirect=True)
@pytest.mark.parametrize(("m", "n", "k", "out"), [(8, 128, 256, 2), (300, 31, 48, 2), (300, 24, 17, 4), (9, 64, 64, 4)])
def test_what_no_gemm_fits_goes_to_the_gemv_padded(recorder: _Recorder, m: int, n: int, k: int, out: int) -> None:
    a, b, a_scale, b_scale = _operands(m, n, k, W8A8)
    dtype = torch.float32 if out == 4 else torch.bfloat16
    cutlass.scaled_mm(a, b, a_scale, b_scale, None, dtype)
    assert recorder.names == [GEMV]
    assert recorder.calls[0][1][-4:-1] == (m, n, (k + 31) // 32 * 32)


def test_few_rows_meet_many_weights_in_one_launch_where_they_lie(recorder: _Recorder) -> None:
    widths = (64, 32, 96)
    weights = [prepare_weight(pack_int4(make_codes(n, 256, seed=n)), BLOCKS) for n in widths]
    scales, bias = [make_scale(n) for n in widths], [torch.ones(n) for n in widths]
    x = make_inputs(3, 256)
    out = cutlass.scaled_mm_cat(x, weights, None, scales, bias, b_layout=BLOCKS)
    assert recorder.names == [JOINED]
    count, *lists, format_, a, _, a_scale, bias_dtype, into, _, stride, m, k, _ = recorder.calls[0][1]
    assert (count, m, k, stride, a_scale, bias_dtype, format_) == (3, 3, 256, 192, None, 0, 0)
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (weights, scales, bias)]
    assert [list(pointers) for pointers in lists] == [*addresses, list(widths)]
    assert (a, into) == (x.data_ptr(), out.data_ptr())


def test_weights_in_two_forms_are_two_launches_side_by_side(recorder: _Recorder) -> None:
    weights = [prepare_weight(pack_int4(make_codes(n, 256)), BLOCKS) for n in (64, 24)]  # the second is none of blocks
    scales = [make_scale(64), make_scale(24)]
    out = cutlass.scaled_mm_cat(make_codes(2, 256), weights, make_scale(2), scales, b_layout=BLOCKS)
    assert recorder.names == [JOINED, JOINED]
    first, second = (arguments for _, arguments in recorder.calls)
    assert (first[5], second[5]) == (0, 1)
    assert second[10] - first[10] == 64 * out.element_size()


def test_many_rows_of_codes_are_a_gemm_for_each_weight(recorder: _Recorder) -> None:
    weights = [prepare_weight(pack_int4(make_codes(n, 256)), BLOCKS) for n in (128, 256)]
    cutlass.scaled_mm_cat(
        make_codes(300, 256), weights, make_scale(300), [make_scale(128), make_scale(256)], b_layout=BLOCKS
    )
    assert recorder.names == ["sm90_s4s8_128x128x128_bf16"] * 2
    assert {arguments[11] for _, arguments in recorder.calls} == {384}


def test_prepared_operands_are_read_where_they_lie(recorder: _Recorder) -> None:
    a, b, a_scale, b_scale = _operands(300, 128, 256, W4A4)
    b, bias = prepare_weight(b, BLOCKS), torch.randn(128, dtype=torch.bfloat16)
    out = torch.empty(300, 512, dtype=torch.bfloat16)
    cutlass.scaled_mm_out(out[:, 128:256], a, b, a_scale, b_scale, bias, b_layout=BLOCKS)
    arguments = recorder.calls[0][1]
    assert arguments[:4] == tuple(tensor.data_ptr() for tensor in (b, a, a_scale, b_scale))
    assert arguments[4:6] == (bias.data_ptr(), 2)
    assert arguments[10:12] == (out.data_ptr() + 256, 512)
    assert arguments[12:] == (300, 128, 256, 0, 132, 0)


def test_an_output_that_the_gemm_cannot_address_is_copied(recorder: _Recorder) -> None:
    a, b, a_scale, b_scale = _operands(300, 128, 256, W4A4)
    out = torch.zeros(300, 515, dtype=torch.bfloat16)
    cutlass.scaled_mm_out(out[:, 3:131], a, prepare_weight(b, BLOCKS), a_scale, b_scale, b_layout=BLOCKS)
    name, arguments = recorder.calls[0]
    assert name == "sm90_s4s8_128x128x128_bf16"
    assert arguments[11] == 128  # rows of a buffer of its own


def test_one_launch_a_sample_where_gates_differ(recorder: _Recorder) -> None:
    a, b, a_scale, b_scale = _operands(40, 32, 64, W4A4)
    gate, residual = torch.randn(2, 32), torch.randn(2, 20, 32).bfloat16()
    a, a_scale, b = a.view(2, 20, 64), a_scale.view(2, 20), prepare_weight(b, BLOCKS)
    cutlass.scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate, residual, b_layout=BLOCKS)
    assert recorder.names == ["sm90_s4s8_64x16x256_bf16"] * 2
    first, second = (arguments for _, arguments in recorder.calls)
    assert second[6] - first[6] == 4 * 32  # gate
    assert second[8] - first[8] == 2 * 20 * 32  # residual
    recorder.calls.clear()
    cutlass.scaled_mm_gate_residual(a, b, a_scale, b_scale, None, gate[0], residual, b_layout=BLOCKS)
    assert len(recorder.calls) == 1


def test_nothing_is_launched_for_no_rows(recorder: _Recorder) -> None:
    a, b, a_scale, b_scale = _operands(0, 32, 64, W4A4)
    assert cutlass.scaled_mm(a, b, a_scale, b_scale).shape == (0, 32)
    assert cutlass.rotate_quantize(torch.empty(0, 256))[0].shape == (0, 256)
    assert recorder.calls == []


def test_codes_wider_than_int32_sums_allow_are_refused_with_a_remedy(recorder: _Recorder) -> None:
    a, b, a_scale, b_scale = _operands(1, 16, 1 << 17, W4A8)
    with pytest.raises(library.KernelError, match=r"codes of at most K=65536 here; use_backend\('reference'\)"):
        cutlass.scaled_mm(a, b, a_scale, b_scale)


def test_chunks_of_a_modulation_are_read_where_they_lie(recorder: _Recorder) -> None:
    x = make_inputs(2, 5, 512)
    shift, scale = torch.randn(2, 6 * 512).bfloat16().chunk(6, dim=-1)[:2]
    cutlass.rotate_quantize_modulate(x, scale, shift)
    name, arguments = recorder.calls[0]
    assert name == "convrot_rotate_quantize_bf16"
    assert arguments[:2] == (x.data_ptr(), 512)
    assert arguments[5:11] == (scale.data_ptr(), 2, shift.data_ptr(), 2, 6 * 512, 5)


def test_norm_rope_reads_the_columns_of_a_wider_projection(recorder: _Recorder) -> None:
    wide, tables = make_inputs(2, 5, 1024), torch.ones(2, 5, 64)
    cutlass.norm_rope(wide[..., :512], *torch.ones(2, 64).bfloat16(), *tables)
    cutlass.norm_rope(wide[..., 1:513], torch.ones(64).bfloat16(), torch.ones(64), *tables)
    (name, view), (_, copied) = recorder.calls
    assert name == "convrot_norm_rope"
    assert view[:7] == (None, 0, 0, wide.data_ptr(), 5120, 1024, 2)
    assert view[11] == 2  # both weights as they are, in bf16
    assert view[17:22] == (2, 0, 5, 4, 64)
    assert copied[4:6] == (2560, 512)
    assert copied[11] == 0


def test_joint_norm_rope_is_one_launch(recorder: _Recorder) -> None:
    text, image = make_inputs(1, 3, 768), make_inputs(1, 5, 768, seed=1)
    q, k, v = cutlass.norm_rope_joint(text, image, *torch.ones(4, 64).bfloat16(), *torch.ones(2, 8, 64))
    ((_, arguments),) = recorder.calls
    assert arguments[:7] == (text.data_ptr(), 2304, 768, image.data_ptr(), 3840, 768, 2)
    assert arguments[14:22] == (q.data_ptr(), k.data_ptr(), v.data_ptr(), 1, 3, 5, 4, 64)
    assert cutlass.norm_rope(image[:, :0, :512], *torch.ones(2, 64), *torch.ones(2, 0, 64))[0].shape == (1, 0, 4, 64)
    assert len(recorder.calls) == 1


def test_quantizer_gets_the_rows_of_any_view(recorder: _Recorder) -> None:
    x = make_inputs(64, 1040)
    cutlass.rotate_quantize(x[::3, 8:1032])
    cutlass.rotate_quantize(x[:, 1:1025])
    (_, view), (_, copied) = recorder.calls
    assert view[:2] == (x.data_ptr() + 16, 3120)
    assert copied[1] == 1024
    cutlass.rotate_quantize_cat_gelu(x[:, :512], x[:, 512:768])
    assert recorder.calls[-1][1][:5] == (x.data_ptr(), 1040, x.data_ptr() + 1024, 1040, 512)


def _bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def test_a_term_reads_what_a_quantizer_does_in_one_launch(recorder: _Recorder) -> None:
    x, y = make_inputs(2, 5, 512), make_inputs(2, 5, 1024, seed=1)
    shift, scale = _bf16(2, 6 * 512).chunk(6, dim=-1)[:2]
    down = [_bf16(16, 512), _bf16(16, 512)]
    low = cutlass.low_rank_down(x, down, scale=scale, shift=shift, eps=1e-5)
    assert low.shape == (2, 5, 32)
    cutlass.low_rank_down(x[..., :256], [_bf16(7, 768)], y[..., 512:])
    (name, modulated), (_, both) = recorder.calls
    assert name == "convrot_low_rank_down"
    assert modulated[:11] == (x.data_ptr(), 512, None, 0, 512, scale.data_ptr(), 2, shift.data_ptr(), 2, 3072, 5)
    assert modulated[12:18] == (down[0].data_ptr(), down[1].data_ptr(), None, None, 2, 16)
    assert modulated[18:23] == (low.data_ptr(), 10, 512, 2, 2)
    assert both[:5] == (x.data_ptr(), 512, y.data_ptr() + 1024, 1024, 256)
    assert both[16:18] == (1, 7)
    assert both[19:22] == (10, 768, 4)


def test_terms_that_are_not_alike_are_read_as_one(recorder: _Recorder) -> None:
    x = make_inputs(5, 512)
    for down in ([_bf16(16, 512), _bf16(8, 512)], [_bf16(8, 512)] * 5, [torch.randn(24, 512)], [_bf16(512, 24).t()]):
        low = cutlass.low_rank_down(x, down)
        _, arguments = recorder.calls[-1]
        assert arguments[13:18] == (None, None, None, 1, low.shape[1])
    assert len(recorder.calls) == 4


def test_terms_beside_each_other_are_one_launch_and_those_on_one_place_two(recorder: _Recorder) -> None:
    out, low = make_inputs(2, 5, 1024)[..., 64:], _bf16(2, 5, 32)
    up, gate = [_bf16(64, 16), _bf16(128, 16)], torch.randn(2, 960)
    cutlass.low_rank_up(out, low, up, [0, 64], [1.0, -0.5], gate)
    cutlass.low_rank_up(out, low, up, [0, 0], [1.0, -0.5])
    (name, once), (_, first), (_, second) = recorder.calls
    assert name == "convrot_low_rank_up"
    assert once[:4] == (out.data_ptr(), 1024, low.data_ptr(), 32)
    assert once[4:20] == (up[0].data_ptr(), up[1].data_ptr(), None, None, 64, 128, 0, 0, 0, 64, 0, 0, 1.0, -0.5, 0, 0)
    assert once[20:28] == (2, 16, gate.data_ptr(), 0, 960, 5, 10, 2)
    assert (first[2], second[2]) == (low.data_ptr(), low.data_ptr() + 32)
    assert (first[20], second[20]) == (1, 1)


def test_what_the_term_kernels_have_no_code_for_is_done_without_them(recorder: _Recorder) -> None:
    x, low, ones = make_inputs(2, 5, 512), _bf16(2, 5, 16), torch.ones(2, 5, 24).bfloat16()
    assert cutlass.low_rank_down(x.float(), [torch.eye(8, 512)]).equal(x[..., :8].float())
    assert cutlass.low_rank_down(x[..., :500], [torch.eye(8, 500).bfloat16()]).equal(x[..., :8])
    for up in (_bf16(20, 16), _bf16(24, 6), torch.randn(24, 16)):  # columns, ranks, dtype
        out = ones.clone()
        cutlass.low_rank_up(out, low[..., : up.shape[1]], [up], [0], [1.0])
        wanted = 1 + low[..., : up.shape[1]].float() @ up.bfloat16().float().t()
        torch.testing.assert_close(out[..., : up.shape[0]].float(), wanted, rtol=2**-7, atol=2**-7)
    cutlass.low_rank_up(ones, low[..., :0], [], [], [])
    cutlass.low_rank_up(ones[..., :0].contiguous(), low, [_bf16(0, 16)], [0], [1.0])
    assert cutlass.low_rank_down(x[:0], [_bf16(8, 512)]).shape == (0, 5, 8)
    assert recorder.calls == []


def test_norm_rope_in_8_bits_reads_v_behind_q_and_k(recorder: _Recorder) -> None:
    wide, tables = make_inputs(2, 5, 1024), torch.ones(2, 5, 64)
    q, k, v, v_scale = cutlass.norm_rope_fp8(wide[..., :768], *torch.ones(2, 64).bfloat16(), *tables)
    ((name, arguments),) = recorder.calls
    assert name == "convrot_norm_rope_fp8"
    assert arguments[:7] == (None, 0, 0, wide.data_ptr(), 5120, 1024, 2)
    assert arguments[14:18] == tuple(tensor.data_ptr() for tensor in (q, k, v, v_scale))
    assert arguments[19:24] == (2, 0, 5, 4, 64)
    assert {tensor.dtype for tensor in (q, k, v)} == {torch.float8_e4m3fn}
    empty = cutlass.norm_rope_fp8(wide[:, :0, :768], *torch.ones(2, 64), *torch.ones(2, 0, 64))
    assert empty[0].shape == (2, 0, 4, 64)
    assert empty[3].tolist() == pytest.approx([1e-10] * 2)
    assert len(recorder.calls) == 1


def test_attention_in_8_bits_is_cudnn_s_product_widened(recorder: _Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = torch.zeros(2, 5, 4, 64).to(torch.float8_e4m3fn)
    monkeypatch.setattr(cudnn, "attend", lambda q, k, v: narrow)
    v_scale = torch.ones(2)
    out = cutlass.attention_fp8(narrow, narrow, narrow, v_scale, torch.float16)
    ((name, arguments),) = recorder.calls
    assert name == "convrot_widen_fp8"
    assert arguments[:6] == (narrow.data_ptr(), v_scale.data_ptr(), out.data_ptr(), 1, 2, 5 * 4 * 64)
