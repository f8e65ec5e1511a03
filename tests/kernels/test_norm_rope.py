import pytest
import torch
from torch import Tensor, nn

from convrot_kernels import norm_rope, norm_rope_joint
from convrot_kernels.testing import assert_equal, make_inputs

OP = "norm_rope"
EPS = 1e-6


def _tables(tokens: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, d // 2, generator=torch.Generator().manual_seed(3)).mul(6.28).repeat_interleave(2, -1)
    return angles.cos().to(device), angles.sin().to(device)


def _weights(d: int, dtype: torch.dtype, device: str, count: int = 2) -> list[Tensor]:
    return [1 + 0.2 * make_inputs(d, dtype=dtype, device=device, seed=7 + i).clamp(-2, 2) for i in range(count)]


def _plain(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, S, H D) -> (B, S, H, D), pair by pair as complex numbers where cos and sin of a pair agree, in fp64."""
    heads = x.double().unflatten(-1, (x.shape[-1] // weight.shape[0], weight.shape[0]))
    normed = nn.functional.rms_norm(heads, weight.shape, weight.double(), EPS).to(x.dtype).double()
    even, odd = normed[..., 0::2], normed[..., 1::2]
    c, s = cos.double()[None, :, None], sin.double()[None, :, None]
    first, second = even * c[..., 0::2] - odd * s[..., 0::2], odd * c[..., 1::2] + even * s[..., 1::2]
    return torch.stack((first, second), dim=-1).flatten(-2).to(x.dtype)


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    """At most two roundings apart: the norm's, which the rotation carries into both of a pair, and the last one."""
    assert actual.shape == expected.shape
    step = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[actual.dtype]
    error = (actual.float() - expected.float()).abs()
    pairs = expected.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
    assert (error <= 2 * step * pairs + 1e-6).all()
    assert actual.dtype == torch.float32 or (error > 0).sum() <= 0.02 * error.numel()


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "d"), [(1, 33, 24, 128), (2, 5, 3, 64), (1, 1, 1, 16), (2, 0, 2, 32)]
)
def test_is_rms_norm_then_the_rotary_embedding(
    backend: str, device: str, dtype: torch.dtype, batch: int, tokens: int, heads: int, d: int
) -> None:
    x = make_inputs(batch, tokens, 2 * heads * d, dtype=dtype, device=device)
    cos, sin = _tables(tokens, d, device)
    weights = _weights(d, dtype, device)
    for actual, part, weight in zip(norm_rope(x, *weights, cos, sin), x.chunk(2, -1), weights, strict=True):
        _assert_close(actual, _plain(part, weight, cos, sin))
        assert actual.is_contiguous()


@pytest.mark.parametrize("batch", [1, 2])
def test_joint_puts_text_before_image_and_copies_v(backend: str, device: str, dtype: torch.dtype, batch: int) -> None:
    text = make_inputs(batch, 7, 3 * 4 * 64, dtype=dtype, device=device)
    image = make_inputs(batch, 10, 3 * 4 * 64, dtype=dtype, device=device, seed=1)
    cos, sin = _tables(17, 64, device)
    text_q, text_k, q_weight, k_weight = _weights(64, dtype, device, 4)
    q, k, v = norm_rope_joint(text, image, text_q, text_k, q_weight, k_weight, cos, sin)
    assert_equal(v.flatten(2), torch.cat((text, image), 1)[..., 2 * 256 :])
    for rows, x, weights in ((slice(7), text, (text_q, text_k)), (slice(7, 17), image, (q_weight, k_weight))):
        alone = norm_rope(x[..., : 2 * 256], *weights, cos[rows], sin[rows])
        assert_equal(q[:, rows], alone[0])
        assert_equal(k[:, rows], alone[1])


def test_reads_a_slice_of_a_wider_projection(backend: str, device: str) -> None:
    wide = make_inputs(2, 9, 3 * 512 + 2048, device=device)
    cos, sin = _tables(9, 64, device)
    weights = _weights(64, torch.bfloat16, device)
    for actual, expected in zip(
        norm_rope(wide[..., :1024], *weights, cos, sin),
        norm_rope(wide[..., :1024].contiguous(), *weights, cos, sin),
        strict=True,
    ):
        assert_equal(actual, expected)


def test_cos_and_sin_of_a_pair_may_differ(backend: str, device: str) -> None:
    x = make_inputs(1, 6, 2 * 64, dtype=torch.float32, device=device)
    cos, sin = torch.rand(2, 6, 64, device=device, generator=torch.Generator(device).manual_seed(0))
    weights = _weights(64, torch.float32, device)
    for actual, part, weight in zip(norm_rope(x, *weights, cos, sin), x.chunk(2, -1), weights, strict=True):
        _assert_close(actual, _plain(part, weight, cos, sin))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 4 * 64)}, r"x must be \(batch, tokens, columns\), got 2 dimensions"),
        ({"x": torch.zeros(1, 4, 192)}, "x must hold 2 parts of whole heads of 64 columns, got 192 columns"),
        ({"q_weight": torch.ones(32), "k_weight": torch.ones(64)}, r"k_weight must have the shape \(32,\)"),
        (
            {"q_weight": torch.ones(48), "k_weight": torch.ones(48)},
            "a head must have 16, 32, 64, 128, 256 columns, got 48",
        ),
        ({"cos": torch.zeros(5, 64)}, r"cos must have the shape \(4, 64\), got \(5, 64\)"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ],
)
def test_wrong_input_gets_one_sentence(change: dict[str, Tensor | float], sentence: str) -> None:
    arguments = {
        "x": torch.zeros(1, 4, 2 * 64),
        "q_weight": torch.ones(64),
        "k_weight": torch.ones(64),
        "cos": torch.zeros(4, 64),
        "sin": torch.zeros(4, 64),
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=sentence):
        norm_rope(**(arguments | change))  # type: ignore[arg-type]
