"""ConvLinear4bit: its numbers against fp64, and everything that a module must survive."""

import copy
import hashlib
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import convrot_quant.linear
from convrot_kernels import hadamard, unpack_int4
from convrot_quant import ConvLinear4bit, Scheme

SCHEMES = ["W4A4", "W4A8", "W4A16", "W8A8", "W8A16"]


def linear(k: int = 512, n: int = 48, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(k + n)
    return nn.Linear(k, n, bias=bias).to(dtype)


def activations(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian values with one outlier channel, which is what rotation is for."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 30
    return x.to(dtype)


def rotation(k: int, group_size: int) -> Tensor:
    """The block-diagonal fp64 rotation (K, K)."""
    return torch.block_diag(*[hadamard(group_size, torch.float64, "cpu")] * (k // group_size))


def stored_weight(layer: ConvLinear4bit) -> Tensor:
    """What the codes stand for, rotated, fp64 (N, K)."""
    codes = unpack_int4(layer.weight) if layer.scheme.weight_bits == 4 else layer.weight
    return codes.double() * layer.weight_scale.double()[:, None]


@pytest.mark.parametrize("group_size", [16, 64, 256])
@pytest.mark.parametrize("name", [*SCHEMES, "W8A4"])
def test_forward_is_the_dequantized_product(name: str, group_size: int) -> None:
    """Against fp64: quantize the rotated activation by the stated rule, multiply by the stored weight, add the bias."""
    scheme = Scheme(Scheme.parse(name).weight_bits, Scheme.parse(name).activation_bits, group_size)
    layer = ConvLinear4bit.from_linear(linear(dtype=torch.float32), scheme)
    x = activations(2, 5, 512, dtype=torch.float32)
    rotated = x.double() @ rotation(512, group_size)
    if scheme.activation_bits != 16:
        qmax = 2 ** (scheme.activation_bits - 1) - 1
        scale = rotated.abs().amax(-1, keepdim=True) / qmax
        rotated = torch.round(rotated / scale).clamp(-qmax, qmax) * scale
    expected = rotated @ stored_weight(layer).T + layer.bias.double()
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < 1e-5 if scheme.activation_bits == 16 else error < 2e-3  # a rare code on a tie falls one step away


@pytest.mark.parametrize(("name", "bound"), list(zip(SCHEMES, [0.25, 0.16, 0.16, 0.02, 0.012], strict=True)))
def test_error_against_the_original_is_within_the_bits(name: str, bound: float) -> None:
    original = linear()
    x = activations(64, 512)
    layer = ConvLinear4bit.from_linear(original, Scheme.parse(name))
    with torch.no_grad():
        expected = original.double()(x.double())
        error = float((layer(x).double() - expected).norm() / expected.norm())
    assert bound / 4 < error < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (0, 512), (2, 3, 512)])
def test_shape_and_dtype_follow_the_input(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme())
    out = layer(activations(*shape, dtype=dtype))
    assert out.shape == (*shape[:-1], 48)
    assert out.dtype == dtype
    rows = activations(2, 3, 512, dtype=dtype)
    assert torch.equal(layer(rows)[1, 2], layer(rows[1, 2]))


@pytest.mark.parametrize("name", ["W4A4", "W8A8", "W4A16"])
def test_dequantize_gives_back_the_weight(name: str) -> None:
    original = linear()
    layer = ConvLinear4bit.from_linear(original, Scheme.parse(name))
    back = layer.dequantize()
    assert type(back) is nn.Linear
    assert back.weight.dtype == torch.bfloat16
    assert torch.equal(back.bias, original.bias)
    expected = (stored_weight(layer) @ rotation(512, 256)).to(torch.bfloat16)
    assert (back.weight != expected).double().mean() < 0.01  # fp32 instead of fp64 before one rounding to bf16
    error = (back.weight.double() - original.weight.double()).norm() / original.weight.double().norm()
    assert error < (0.01 if layer.scheme.weight_bits == 8 else 0.16)


def test_codes_are_the_golden_bytes_of_the_file_format() -> None:
    values = torch.tensor([((i * 2654435761) % 65536) / 65536 - 0.5 for i in range(8 * 256)]).reshape(8, 256)
    original = nn.Linear(256, 8, bias=False)
    original.weight = nn.Parameter(values)
    layer = ConvLinear4bit.from_linear(original, Scheme())
    codes, scale = layer.weight.numpy().tobytes(), layer.weight_scale.numpy().tobytes()
    assert codes[:16].hex() == "0221ff0feeff13f4f31210301f2f4c1d"
    assert hashlib.sha256(codes).hexdigest() == "c87b90d509532acec7d4d1d8adb9642c34f462d6560d0f133b0c2eda94a5106c"
    assert hashlib.sha256(scale).hexdigest() == "05af679fd4a5600d3d68b64bd2c388afc04230fdcc35ae3676ee882c271b475c"


def test_storage_is_what_peft_and_savers_look_for() -> None:
    original = linear()
    layer = ConvLinear4bit.from_linear(original, Scheme())
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (512, 48)
    assert isinstance(layer.weight, nn.Parameter)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.requires_grad) == (torch.uint8, (48, 256), False)
    assert dict(layer.named_buffers()).keys() == {"weight_scale"}
    assert (layer.weight_scale.dtype, layer.weight_scale.shape) == (torch.float32, (48,))
    assert layer.bias.data_ptr() == original.bias.data_ptr()
    assert layer.compute_dtype == torch.bfloat16
    assert ConvLinear4bit.from_linear(original, Scheme.parse("W8A8")).weight.shape == (48, 512)
    assert repr(layer) == "ConvLinear4bit(in_features=512, out_features=48, bias=True, W4A4, group_size=256)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_casting_leaves_codes_and_scales_alone(dtype: torch.dtype) -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme())
    codes, scale = layer.weight.clone(), layer.weight_scale.clone()
    for cast in (lambda m: m.to(dtype), lambda m: m.type(dtype)):
        cast(layer)
        assert layer.weight.dtype == torch.uint8
        assert torch.equal(layer.weight, codes)
        assert torch.equal(layer.weight_scale, scale)
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias.dtype == dtype
    assert layer.compute_dtype == (torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype)


def test_moves_to_meta_and_back_to_memory() -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme())
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu")
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float32)
    layer.load_state_dict(state)
    assert torch.equal(layer(activations(3, 512)), ConvLinear4bit.from_linear(linear(), Scheme())(activations(3, 512)))


@pytest.mark.parametrize("name", SCHEMES)
def test_copies_compute_the_same(name: str) -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme.parse(name))
    x = activations(3, 512)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), layer(x))
        assert (again.scheme, again.compute_dtype) == (layer.scheme, layer.compute_dtype)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_loads_strictly(assign: bool) -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme())
    fresh = ConvLinear4bit(512, 48, Scheme(), device="meta" if assign else "cpu")
    fresh.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    assert torch.equal(fresh(activations(3, 512)), layer(activations(3, 512)))
    with pytest.raises(RuntimeError, match="weight_scale"):
        fresh.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(linear().state_dict() | {"weight_scale": layer.weight_scale})


@pytest.mark.parametrize("name", ["W4A4", "W4A16", "W8A8"])
def test_compiles_as_one_graph(name: str) -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme.parse(name))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 7):
            x = activations(rows, 512)
            assert torch.equal(compiled(x), layer(x))


def test_weight_order_stays_out_of_state_dict_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up resident order (rows reversed): whatever is saved, loaded or dequantized is row-major."""
    flips = {"row_major": lambda w: w, "flipped": lambda w: w.flip(0)}
    monkeypatch.setattr(convrot_quant.linear, "prepare_weight", lambda w, layout: flips[layout](w))
    monkeypatch.setattr(convrot_quant.linear, "restore_weight", lambda w, layout: flips[layout](w))
    layer = ConvLinear4bit.from_linear(linear(), Scheme())
    before, back = layer.weight.clone(), layer.dequantize().weight
    layer.relayout("flipped")
    assert layer.weight_layout == "flipped"
    assert torch.equal(layer.weight, before.flip(0))
    assert torch.equal(layer.state_dict()["weight"], before)
    assert torch.equal(layer.dequantize().weight, back)
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, before.flip(0))
    assert "weight_layout='flipped'" in repr(layer)
    layer.relayout("row_major")
    assert torch.equal(layer.weight, before)


def test_a_row_with_nan_spoils_its_own_output_alone() -> None:
    layer = ConvLinear4bit.from_linear(linear(), Scheme())
    x = activations(4, 512)
    good = layer(x)
    x[2, 5] = float("nan")
    out = layer(x)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], good[[0, 1, 3]])


def test_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="in_features must be a multiple of group_size, got in_features=320"):
        ConvLinear4bit(320, 48, Scheme())
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        ConvLinear4bit.from_linear(linear().to("meta"), Scheme())
    broken = linear(dtype=torch.float32)
    with torch.no_grad():
        broken.weight[7, 3] = float("inf")
    with pytest.raises(ValueError, match="must be finite after rotation in fp32; row 7 of 48 is not"):
        ConvLinear4bit.from_linear(broken, Scheme())
