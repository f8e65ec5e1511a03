import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels import attention_fp8, norm_rope, norm_rope_fp8, norm_rope_joint_fp8, reference
from convrot_kernels.backends import cudnn
from convrot_kernels.dispatch import BackendError, pick, use_backend
from convrot_kernels.testing import assert_equal, make_inputs

OP = "norm_rope_fp8"
FP8 = torch.float8_e4m3fn


def _norms(tokens: int, d: int, device: str, count: int = 2) -> list[Tensor]:
    """Weights of q and k (of both streams), cos, sin."""
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand(tokens, d // 2, generator=generator).mul(6.28).repeat_interleave(2, -1)
    weights = [1 + 0.2 * torch.randn(d, generator=generator).clamp(-2, 2) for _ in range(count)]
    return [tensor.to(device) for tensor in (*weights, angles.cos(), angles.sin())]


def _assert_rounded(actual: Tensor, wanted: Tensor) -> None:
    """e4m3 against e4m3: a few of them (the norm's sums have another order) one step apart."""
    assert actual.dtype == wanted.dtype == FP8
    codes, wanted_codes = (tensor.contiguous().view(torch.uint8).int() for tensor in (actual, wanted))
    steps = torch.where(actual.float() == wanted.float(), 0, (codes - wanted_codes).abs())  # 0 and -0
    assert steps.max() <= 1
    assert (steps > 0).sum() <= 0.02 * steps.numel()


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "d"), [(1, 33, 24, 128), (2, 5, 3, 64), (1, 1, 1, 16), (3, 9, 2, 256)]
)
def test_q_and_k_are_norm_rope_s_rounded_to_e4m3(
    backend: str, device: str, dtype: torch.dtype, batch: int, tokens: int, heads: int, d: int
) -> None:
    x = make_inputs(batch, tokens, 3 * heads * d + 64, dtype=dtype, device=device)[..., : 3 * heads * d]
    norms = _norms(tokens, d, device)
    q, k, v, v_scale = norm_rope_fp8(x, *norms)
    with use_backend("reference"):
        wide = norm_rope(x[..., : 2 * heads * d].float(), *norms)
        wanted = reference.norm_rope_fp8(x, *norms)
    for part, exact, rounded in zip((q, k), wide, wanted, strict=False):
        assert part.is_contiguous()
        _assert_rounded(part, rounded)
        # half a step of e4m3, beside the rounding of 16-bit norms before it
        assert ((part.float() - exact).abs() <= (0.0625 + 0.01) * exact.abs() + 2.0**-9 + 0.01).all()
    assert_equal(v_scale, wanted[3])
    assert_equal(v.float(), wanted[2].float())
    values = x[..., 2 * heads * d :].float()
    assert_equal(v_scale, values.abs().amax((1, 2)) * (1 / 448))
    torch.testing.assert_close(v.float().flatten(2) * v_scale.view(-1, 1, 1), values, rtol=0.0626, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_joint_puts_text_before_image(backend: str, device: str, dtype: torch.dtype, batch: int) -> None:
    text = make_inputs(batch, 7, 3 * 256, dtype=dtype, device=device)
    image = 4 * make_inputs(batch, 10, 3 * 256, dtype=dtype, device=device, seed=1)
    *weights, cos, sin = _norms(17, 64, device, 4)
    q, k, v, v_scale = norm_rope_joint_fp8(text, image, *weights, cos, sin)
    of_text = norm_rope_fp8(text, *weights[:2], cos[:7], sin[:7])
    of_image = norm_rope_fp8(image, *weights[2:], cos[7:], sin[7:])
    for joint, alone in ((q, 0), (k, 1)):
        assert_equal(joint.float(), torch.cat((of_text[alone], of_image[alone]), 1).float())
    both = torch.cat((text, image), 1)[..., 512:].unflatten(-1, (4, 64)).float()
    assert_equal(v_scale, both.abs().amax((1, 2, 3)) * (1 / 448))
    assert_equal(v.float(), reference.fp8_of(both)[0].float())


def test_every_sample_has_its_scale_and_a_broken_one_breaks_no_other(backend: str, device: str) -> None:
    x = make_inputs(3, 6, 3 * 128, dtype=torch.float32, device=device)
    x[1] *= 1e-3
    x[2, 5, 300] = float("nan")
    _, _, v, v_scale = norm_rope_fp8(x, *_norms(6, 64, device))
    assert v_scale[0] > 100 * v_scale[1]
    assert v[:2].float().abs().amax((1, 2, 3)).tolist() == [448, 448]
    assert v_scale[2].isnan()
    assert v[2].float().isnan().all()
    zeros = norm_rope_fp8(torch.zeros(1, 6, 3 * 128, device=device), *_norms(6, 64, device))
    assert zeros[3].item() == pytest.approx(1e-10)
    assert not any(part.float().any() for part in zeros[:3])


def test_what_leaves_e4m3_becomes_its_largest(backend: str, device: str) -> None:
    x = make_inputs(1, 4, 3 * 64, device=device).sign()
    ones, zeros = torch.ones(4, 64, device=device), torch.zeros(4, 64, device=device)
    q = norm_rope_fp8(x, *torch.full((2, 64), 1e4, device=device), ones, zeros)[0].float()
    assert set(q.abs().flatten().tolist()) == {448.0}


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H, D), in fp64."""
    wide = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    return nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)


def _drawn(batch: int, tokens: int, keys: int, heads: int, d: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(batch, rows, heads, d, generator=generator) for rows in (tokens, keys, keys))
    v_scale = torch.logspace(-3, 2, batch)
    return (*(tensor.to(FP8).to(device) for tensor in (q, k, 40 * v)), v_scale.to(device))


def _skip_without_attention(device: str) -> None:
    try:
        pick("attention_fp8", device)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "d"), [(1, 37, 37, 2, 128), (2, 64, 100, 3, 64), (1, 1, 5, 1, 32)]
)
def test_attends_within_the_steps_of_e4m3(
    backend: str, device: str, dtype: torch.dtype, batch: int, tokens: int, keys: int, heads: int, d: int
) -> None:
    _skip_without_attention(device)
    q, k, v, v_scale = _drawn(batch, tokens, keys, heads, d, device)
    out = attention_fp8(q, k, v, v_scale, dtype)
    wanted = _attention(q, k, v) * v_scale.view(-1, 1, 1, 1)
    assert (out.shape, out.dtype) == (wanted.shape, dtype)
    for sample, exact in zip(out.double(), wanted, strict=True):
        assert (sample - exact).norm() < 0.05 * exact.norm()


def test_attention_of_one_key_is_its_value(backend: str, device: str) -> None:
    _skip_without_attention(device)
    q, k, v, v_scale = _drawn(2, 9, 1, 2, 64, device)
    out = attention_fp8(q, k, v, v_scale, torch.float32)
    assert_equal(out, (v.float() * v_scale.view(-1, 1, 1, 1)).expand(-1, 9, -1, -1))


def test_no_tokens_no_attention(backend: str, device: str) -> None:
    _skip_without_attention(device)
    q, k, v, v_scale = _drawn(2, 0, 4, 2, 64, device)
    assert attention_fp8(q, k, v, v_scale).shape == (2, 0, 2, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 4173, 4608])
def test_cudnn_agrees_with_the_reference(tokens: int) -> None:
    if why_not := cudnn.why_not(torch.device("cuda")):
        pytest.skip(why_not)
    q, k, v, v_scale = _drawn(2, tokens, tokens, 3, 128, "cuda")
    ours, wanted = attention_fp8(q, k, v, v_scale), reference.attention_fp8(q, k, v, v_scale)
    # probabilities are rounded against another maximum, and what that moves, once more with the result
    assert (ours.float() - wanted.float()).norm() < 0.04 * wanted.float().norm()
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=aside):
        replayed = attention_fp8(q, k, v, v_scale)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(replayed, ours)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": torch.zeros(1, 4, 2, 64)}, "q must be float8_e4m3fn, got torch.float32; norm_rope_fp8 makes"),
        ({"q": torch.zeros(4, 2, 64).to(FP8)}, r"q must be \(batch, tokens, heads, columns\), got 3 dimensions"),
        ({"k": torch.zeros(1, 5, 3, 64).to(FP8)}, r"k must have the shape \(1, 5, 2, 64\)"),
        ({"v": torch.zeros(1, 6, 2, 64).to(FP8)}, r"v must have the shape \(1, 5, 2, 64\)"),
        ({"v_scale": torch.ones(2)}, r"v_scale must have the shape \(1,\), got \(2,\)"),
        ({"v_scale": torch.ones(1).half()}, "v_scale must be float32, got torch.float16"),
        ({"out_dtype": torch.int8}, "out_dtype must be float16, bfloat16 or float32, got torch.int8"),
        ({name: torch.zeros(1, 5, 2, 48).to(FP8) for name in "qkv"}, "a head must have 16, 32, 64, 128, 256 columns"),
        ({name: torch.zeros(1, 0, 2, 64).to(FP8) for name in "kv"}, "every token must have keys to attend to"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence(change: dict[str, Any], sentence: str) -> None:
    q, k, v, v_scale = _drawn(1, 4, 5, 2, 64, "cpu")
    arguments = {"q": q, "k": k, "v": v, "v_scale": v_scale}
    with pytest.raises(ValueError, match=sentence):
        attention_fp8(**(arguments | change))


@pytest.mark.parametrize(
    ("capability", "version", "sentence"),
    [
        ((8, 6), 91900, "needs an NVIDIA GPU of compute capability 9.0 or newer, Card has 8.6"),
        ((9, 0), None, "cuDNN's frontend is not installed, run `pip install 'nvidia-cudnn-frontend~=1.18.0'`"),
        ((9, 0), 91000, "needs cuDNN 9.1 or newer and not 9.10.0, found 91000; install a newer torch"),
        ((9, 0), 91900, None),
    ],
)
def test_says_why_cudnn_cannot(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: int | None, sentence: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(cudnn, "find_spec", lambda name: version and object())
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: version))
    found = cudnn._reason.__wrapped__(0)
    assert found == sentence or (sentence and sentence in found)


def test_a_backend_that_lacks_cudnn_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from convrot_kernels.backends import cutlass, triton

    for module in (cutlass, triton):
        monkeypatch.setattr(module, "why_not", lambda device: None)
        monkeypatch.setattr(module, "why_not_attention_fp8", lambda device: "cuDNN is away, run `pip`")
    assert pick("attention_fp8", "cpu")[0] == "reference"
    assert pick("norm_rope_fp8", "cpu")[0] == "cutlass"
    with use_backend("cutlass"), pytest.raises(BackendError, match="cutlass: for attention_fp8, cuDNN is away"):
        pick("attention_fp8", "cpu")
    with pytest.raises(BackendError, match="no backend can run on cuda:0: cutlass: for attention_fp8, cuDNN is away"):
        pick("attention_fp8", "cuda:0")  # the reference would take many times the step
    with use_backend("reference"):
        assert pick("attention_fp8", "cuda:0")[0] == "reference"


def test_scales_are_fp32_whatever_the_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made, settled = [], []
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, device, **options: made.append(full(*args, **options)) or made[-1])
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: settled.append(1)))
    torch.set_default_dtype(torch.bfloat16)
    try:
        numbers = cudnn._numbers.__wrapped__(0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {number.dtype for number in numbers.values()} == {torch.float32}
    assert numbers[cudnn._P_SCALE].item() == 448
    assert settled == [1]  # another stream may read them at once


@pytest.mark.parametrize(
    ("capturing", "sentence"),
    [
        (True, "attention_fp8: the first call with 9 tokens came while a CUDA graph is captured; run what"),
        (False, "cuDNN 91900 has no kernel for 2 heads of 256 columns, 9 x 7 tokens, on Card: no plan; keep attention"),
    ],
)
def test_what_cudnn_cannot_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capturing: bool, sentence: str) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no plan")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(cudnn, "_handle", lambda index: None)
    monkeypatch.setattr(cudnn, "_built", refuse)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91900))
    with pytest.raises(RuntimeError, match=sentence):
        cudnn._Attention(0, 1, 9, 7, 2, 256)


def test_results_are_contiguous_whatever_x_is(backend: str, device: str) -> None:
    x = make_inputs(5, 2, 3 * 128, device=device).transpose(0, 1)
    results = norm_rope_fp8(x, *_norms(5, 64, device))
    assert all(part.is_contiguous() for part in results)
    for part, wanted in zip(results, norm_rope_fp8(x.contiguous(), *_norms(5, 64, device)), strict=True):
        assert_equal(part.float(), wanted.float())


@pytest.mark.parametrize("keys", [200, 4608])
def test_what_is_2_to_the_18_less_likely_than_one_key_still_counts(keys: int) -> None:
    """Scaled by 448, probabilities down to 2^-18 of their row's largest are not rounded to nothing."""
    q, k, v = torch.zeros(1, 1, 1, 16), torch.zeros(1, keys, 1, 16), torch.full((1, keys, 1, 16), 448.0)
    q[..., 0], k[0, 0, 0, 0], v[0, 0] = 16, 3, 0  # scores 12 and 0: e^-12 is 2^-17.3
    out = attention_fp8(q.to(FP8), k.to(FP8), v.to(FP8), torch.ones(1), torch.float32)
    exact = _attention(q.to(FP8).float(), k.to(FP8).float(), v)
    torch.testing.assert_close(out.double(), exact, rtol=0.4, atol=0)  # of three quarters of e4m3's smallest step
