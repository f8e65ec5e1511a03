"""Methods of the quality suite: the emulation is the product, every lever is what its formula says, rivals too."""

import copy
import itertools

import pytest
import torch

from convrot_bench.quality import weight_only
from convrot_bench.quality.emulated import EmulatedLinear, Rotation
from convrot_bench.quality.levers import Layer, Levers
from convrot_bench.quality.methods import BASELINE, METHODS, Method, at_svdquant_bytes, cost, multiplied, rotated
from convrot_bench.quality.roles import Roles, kind_of
from convrot_bench.quality.rounding import gptq, mse_scale, round_activation, round_to, round_weight
from convrot_bench.quality.svdquant import GELU_SHIFT, SVDQuantLinear, branch_rank, svdquant
from convrot_kernels import transforms
from convrot_kernels.testing import make_inputs
from convrot_quant import ConvLinear4bit, QuantConfig, Scheme
from convrot_quant.families.blocks import FusedBlock

BY_NAME = {method.name: method for method in METHODS}
REGULAR = Rotation(transforms.regular(256))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_linear(n=64, k=512, *, bias=True):
    linear = torch.nn.Linear(k, n, bias=bias)
    linear.weight.data = normal(n, k, seed=1) * k**-0.5
    if bias:
        linear.bias.data = normal(n, seed=2)
    return linear.requires_grad_(False)


def a_layer(bits=4, weight_bits=4, **more):
    return Layer(a_linear(), Scheme(weight_bits=weight_bits, activation_bits=bits), **more)


def error(layer, x, linear):
    wanted = linear(x)
    return float((layer(x) - wanted).norm() / wanted.norm())


def emulated(layer, **switches):
    return EmulatedLinear(layer, REGULAR, Levers(**switches))


def dc_tokens():
    """Tokens of a mean of 6, as behind GELU in FLUX's last blocks."""
    return normal(32, 512) * 0.7 + 6


@pytest.fixture(scope="module")
def model():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


# the product


@pytest.mark.parametrize("scheme", [Scheme(), Scheme.parse("W4A4"), Scheme.parse("W4A8"), Scheme.parse("W4A16")])
def test_emulation_under_the_regular_matrix_is_the_product(scheme):
    """So that rows of other rotations and levers differ from the product's row in them alone."""
    linear = a_linear().bfloat16()
    x = make_inputs(40, 512)
    product = ConvLinear4bit.from_linear(linear, scheme)
    emulation = EmulatedLinear(Layer(linear, scheme), REGULAR, Levers.of(scheme))
    a, b = product(x).float(), emulation(x).float()
    assert (a - b).norm() / a.norm() < 5e-3  # bf16 rounding, and codes that fall on a tie
    assert cost(product) == cost(emulation)


def test_the_weight_rule_is_the_products():
    linear = a_linear()
    scheme = Scheme.parse("W4A16")
    product = ConvLinear4bit.from_linear(linear, scheme).dequantize()
    emulation = EmulatedLinear(Layer(linear, scheme), REGULAR, Levers.of(scheme))
    torch.testing.assert_close(REGULAR(emulation.weight), product.weight.data, rtol=0, atol=1e-5)


# rotations


@pytest.mark.parametrize("k", [512, 2560, 3072])
def test_a_rotation_across_a_row_is_its_whole_matrix(k):
    x = normal(3, k)
    torch.testing.assert_close(Rotation.across(k)(x), x @ transforms.global_hadamard(k), rtol=0, atol=2e-5)


@pytest.mark.parametrize("k", [512, 2048, 2560, 3072, 12288, 15360])
def test_a_rotation_across_a_row_fits_every_row_of_flux_and_keeps_its_norm(k):
    x = normal(2, k)
    assert float(Rotation.across(k)(x).norm() / x.norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["rtn", "sylvester256", "signed_sylvester256", "random256", "global_hadamard"])
def test_rotations_change_nothing_in_16_bits(name):
    """At 8 bits what is left is rounding: the rotation cancels."""
    layer = a_layer(bits=16, weight_bits=8)
    assert error(BY_NAME[name].make(layer), normal(8, 512), layer.linear) < 0.01


def test_a_rotation_that_fits_no_layer_leaves_them_and_says_so():
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(512, 512))])
    built = Method("none", "none", "paper", rotated(lambda k: None)).build(model)
    assert (built.layers, built.planned, built.macs) == ((), 1, {})
    assert built.bytes == 4 * (512 * 512 + 512)


# levers that are exact but for rounding


SHIFT = normal(512, seed=5)
EXACT = {
    "peel_token": {"peel": "token"}, "peel_group": {"peel": "group"}, "shift": {"shift": True},
    "centre": {"centre": True}, "peel_shift": {"peel": "group", "shift": True},
    "permute": {"permute": "weight"}, "permute_activation": {"permute": "activation"},
    "peel_permute_shift": {"peel": "group", "permute": "weight", "shift": True},
    "residual": {"side_rank": 64, "side_of": "residual"}, "side_inputs": {"side_rank": 8, "side_of": "inputs"},
    "subspace": {"subspace": 8}, "peel_subspace": {"peel": "group", "subspace": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_levers_change_nothing_without_rounding(name):
    """16-bit activations and 8-bit weights: only the rounding of the weight is left, 0.6 %."""
    calibration = normal(64, 512, seed=4)
    layer = a_layer(bits=16, weight_bits=8, shift=lambda: SHIFT, calibration=calibration)
    x = normal(2, 16, 512, seed=3) + SHIFT
    assert error(emulated(layer, **EXACT[name]), x, layer.linear) < 0.01


@pytest.mark.parametrize("switches", [{"peel": "group", "peel_sums": "quantized"}, {"shift": True}, {"centre": True}])
def test_what_is_set_aside_meets_the_same_weight(switches):
    """With activations in 16 bits these levers give exactly the layer without them."""
    layer = a_layer(bits=16, shift=lambda: SHIFT)
    x = normal(2, 16, 512, seed=3) + SHIFT
    torch.testing.assert_close(emulated(layer, **switches)(x), emulated(layer)(x), rtol=0, atol=1e-4)


def test_a_peel_with_exact_sums_is_exact_on_a_constant():
    layer = a_layer()
    x = torch.full((4, 512), 3.0)
    assert error(emulated(layer, peel="group"), x, layer.linear) < 1e-5
    assert error(emulated(layer, peel="token"), x, layer.linear) < 1e-5
    assert error(emulated(layer), x, layer.linear) > 0.05


def test_a_branch_of_full_rank_leaves_no_error_of_the_weight():
    layer = a_layer(bits=16)
    for of in ("weight", "residual"):
        assert error(emulated(layer, side_rank=64, side_of=of), normal(8, 512), layer.linear) < 1e-5


# levers that pay


def test_scale_rules_pay_on_gaussian_rows():
    layer, x = a_layer(), normal(64, 512, seed=3)
    paper, mse, clip, both = (
        error(emulated(layer, **s), x, layer.linear)
        for s in ({}, {"weight_rule": "mse"}, {"clip": 0.75}, {"weight_rule": "mse", "clip": 0.75})
    )
    assert both < min(mse, clip) < max(mse, clip) < paper
    bound = error(emulated(layer, weight_rule="mse", rms=0.35), x, layer.linear)
    assert bound == pytest.approx(both, rel=0.05)


def test_the_peel_beats_plain_on_token_outliers():
    layer = a_layer()
    x = dc_tokens()
    plain, quantized, exact = (
        error(emulated(layer, weight_rule="mse", **s), x, layer.linear)
        for s in ({}, {"peel": "group", "peel_sums": "quantized"}, {"peel": "group"})
    )
    assert exact < 0.3 * plain
    assert quantized < plain


def test_the_shift_out_of_the_codes_pays():
    shift = 3 * SHIFT
    layer = a_layer(shift=lambda: shift)
    x = normal(16, 512, seed=3) + shift
    assert error(emulated(layer, shift=True), x, layer.linear) < 0.95 * error(emulated(layer), x, layer.linear)


def test_the_shift_of_each_image_is_its_own():
    shifts = torch.stack((SHIFT, -SHIFT)).unsqueeze(1)
    layer = a_layer(shift=lambda: shifts)
    x = normal(2, 16, 512, seed=3) * 1e-3 + shifts
    assert error(emulated(layer, shift=True, weight_rule="mse"), x, layer.linear) < 0.2
    assert torch.equal(emulated(layer, shift=True)._common(x), shifts)
    mean = emulated(layer, shift=True)._common(x[0])  # rows without images: no shift fits
    torch.testing.assert_close(mean, x[0].mean(0, keepdim=True))


def test_directions_of_the_inputs_out_of_the_codes_pay():
    mixing = normal(4, 512, seed=7)
    seen, x = (2 * normal(n, 4, seed=s) @ mixing + normal(n, 512, seed=s + 1) for n, s in ((256, 8), (64, 10)))
    layer = a_layer(calibration=seen)
    plain, side, out = (
        error(emulated(layer, **s), x, layer.linear)
        for s in ({}, {"side_rank": 4, "side_of": "inputs"}, {"subspace": 4})
    )
    assert out < 0.5 * plain
    assert out < side < 0.95 * plain


def test_balanced_rounding_keeps_what_a_mean_becomes():
    layer, x = a_layer(bits=16), torch.full((2, 512), 3.0)
    assert error(emulated(layer, balanced=True), x, layer.linear) < 0.1 * error(emulated(layer), x, layer.linear)
    grouped = round_weight(layer.linear.weight, 4, "mse", 64, balanced=True)
    step = mse_scale(layer.linear.weight.unflatten(1, (-1, 64)), 4).squeeze(-1)
    left = (grouped - layer.linear.weight).unflatten(1, (-1, 64)).sum(-1)
    assert (left.abs() <= 0.5001 * step).all()


def test_sixteen_codes_and_own_scales_pay_behind_gelu():
    x = torch.cat((normal(32, 256), torch.nn.functional.gelu(normal(32, 256, seed=3) * 5)), dim=1)
    layer = a_layer(kind="proj_out", split=256)
    plain = error(emulated(layer), x, layer.linear)
    assert error(emulated(layer, split=True), x, layer.linear) < plain
    assert error(emulated(layer, asymmetric=True), x, layer.linear) < plain


def test_asymmetric_codes_are_for_one_sided_inputs_alone():
    x = normal(16, 512)
    modulated = a_layer(kind="modulated")
    assert torch.equal(emulated(modulated, asymmetric=True)(x), emulated(modulated)(x))


@pytest.mark.parametrize("group", [64, 128, 256])
def test_weight_groups_pay_their_bytes(group):
    layer, x = a_layer(bits=16), normal(32, 512)
    whole, parts = emulated(layer), emulated(layer, weight_group=group)
    assert error(parts, x, layer.linear) < error(whole, x, layer.linear)
    assert parts.cost.bytes - whole.cost.bytes == 2 * 64 * 512 // group - 4 * 64


def test_permuting_by_activations_spreads_loud_channels():
    x = normal(64, 512, seed=3)
    x[:, :8] *= 30  # all in the first block
    layer = a_layer(calibration=x)
    assert error(emulated(layer, permute="activation"), x, layer.linear) < 0.97 * error(
        emulated(layer), x, layer.linear
    )


def test_gptq_pays_on_inputs_like_those_it_saw():
    mixing = normal(64, 512, seed=7)
    seen, x = (normal(n, 64, seed=s) @ mixing + 0.3 * normal(n, 512, seed=s) for n, s in ((1024, 8), (64, 9)))
    layer = a_layer(bits=16, calibration=seen)
    assert error(emulated(layer, gptq=True), x, layer.linear) < 0.8 * error(emulated(layer), x, layer.linear)


def test_gptq_without_correlation_is_rounding():
    weight = normal(8, 256)
    inputs = torch.eye(256)
    assert torch.equal(gptq(weight, inputs, 4), round_weight(weight, 4))


# rounding


def test_the_mse_scale_is_the_best_of_all_scales():
    weight = normal(6, 96, seed=11)
    scale = mse_scale(weight, 4)
    least = (round_to(weight, scale, 7) - weight).square().sum(1)
    for factor in torch.linspace(0.5, 1.5, 2001):
        other = (round_to(weight, scale * factor, 7) - weight).square().sum(1)
        assert (least <= other * (1 + 1e-6)).all()


def test_asymmetric_codes_are_sixteen_and_reach_both_ends():
    x = torch.nn.functional.gelu(normal(4, 4096) * 3)
    rounded = round_activation(x, 4, asymmetric=True)
    assert all(len(row.unique()) <= 16 for row in rounded)
    torch.testing.assert_close(rounded.amax(1), x.amax(1))
    torch.testing.assert_close(rounded.amin(1), x.amin(1), rtol=0, atol=1e-5)


def test_an_all_zero_row_stays_zero():
    assert round_activation(torch.zeros(2, 64), 4).eq(0).all()
    assert round_activation(torch.zeros(2, 64), 4, asymmetric=True).abs().max() < 1e-8
    assert weight_only.round_nf4(torch.zeros(2, 64)).eq(0).all()


# rivals


def test_svdquant_is_its_formula_where_nothing_is_rounded():
    """At 8 bits and groups of 64 rounding is half a percent: smoothing, branch and shift cancel."""
    linear, x = a_linear(), torch.nn.functional.gelu(normal(64, 512, seed=3))
    for gelu in (False, True):
        layer = SVDQuantLinear(linear, x, bits=8, gelu=gelu)
        assert error(layer, x, linear) < 0.01
        weight = (layer.weight + layer.up @ layer.down) / layer.smooth
        assert float((weight - linear.weight).norm() / linear.weight.norm()) < 0.01
    assert GELU_SHIFT + float(x.min()) > 0


def test_svdquant_smooths_loud_channels_and_beats_groups_alone():
    linear, x = a_linear(), normal(256, 512, seed=3)
    x[:, :4] *= 40
    layer = SVDQuantLinear(linear, x[:128])
    assert float(layer.smooth[:4].mean() / layer.smooth[4:].mean()) > 3
    grouped = EmulatedLinear(
        Layer(linear, Scheme()), Rotation(transforms.identity(16)), Levers(weight_group=64, activation_group=64)
    )
    assert error(layer, x[128:], linear) < 0.8 * error(grouped, x[128:], linear)
    assert layer.up.shape == (64, branch_rank(512)) == (64, 5)


def test_svdquant_has_two_branches_for_proj_out():
    x = torch.cat((normal(64, 256), torch.nn.functional.gelu(normal(64, 256, seed=3))), dim=1)
    layer = a_layer(kind="proj_out", split=256, calibration=x)
    made = svdquant(layer)
    assert error(made, x, layer.linear) < 0.15
    assert (made.first.shift, made.second.shift) == (0, GELU_SHIFT)
    assert made.cost.bytes == made.first.cost.bytes + made.second.cost.bytes


def test_ours_at_svdquant_bytes_has_no_more_bytes():
    for n, k in ((512, 512), (2048, 512), (512, 2048)):
        linear = a_linear(n, k)
        layer = Layer(linear, Scheme.parse("W4A4"), "gelu", calibration=normal(16, k))
        assert at_svdquant_bytes(layer).cost.bytes <= svdquant(layer).cost.bytes


def test_nf4_is_the_nearest_of_its_values():
    weight = normal(4, 128)
    rounded = weight_only.round_nf4(weight)
    values = torch.tensor(weight_only.NF4)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = values[((blocks / scale).unsqueeze(-1) - values).abs().argmin(-1)] * scale
    torch.testing.assert_close(rounded, nearest.view_as(weight))
    assert float((rounded - weight).norm() / weight.norm()) == pytest.approx(0.09, abs=0.015)


def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(64, 512)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(weight_only.round_nf4(weight), theirs, rtol=0, atol=1e-5)


def test_affine_int4_reaches_both_ends_of_a_group():
    weight = normal(3, 256)
    rounded = weight_only.round_affine(weight)
    groups, wanted = rounded.view(3, 2, 128), weight.view(3, 2, 128)
    torch.testing.assert_close(groups.amax(-1), wanted.amax(-1))
    assert all(len(group.unique()) <= 16 for group in groups.flatten(0, 1))


# the registry


def test_names_are_unique_and_the_baseline_is_there():
    assert len(BY_NAME) == len(METHODS)
    wanted = {
        BASELINE, "rtn", "sylvester256", "signed_sylvester256", "random256", "global_hadamard", "hadanorm_style",
        "svdquant_style", "ours_w4a4", "ours_w4a8", "ours_w8a8", "regular16", "regular64", "regular1024",
    }  # fmt: skip
    assert wanted <= set(BY_NAME)


@pytest.mark.parametrize("name", [m.name for m in METHODS if m.name != "regular1024"])
def test_every_method_makes_a_layer_with_its_cost(name):
    method = BY_NAME[name]
    preset = QuantConfig.preset(method.preset).scheme
    for kind, split in (("modulated", None), ("gelu", None), ("proj_out", 256)):
        x = torch.nn.functional.gelu(normal(96, 512, seed=3)) if kind != "modulated" else normal(96, 512, seed=3)
        layer = Layer(a_linear(), preset, kind, split, lambda: SHIFT, x if method.needs_inputs else None)
        made = method.make(layer)
        assert error(made, x, layer.linear) < (0.5 if name == "rtn" else 0.3)
        found = cost(made)
        assert sum(found.macs.values()) >= 64 * 512
        assert found.bytes < 64 * 512 * 2 + 2 * preset.low_rank * (64 + 512)


@pytest.mark.parametrize("name", ["sylvester256", "svdquant_style", "lever_shift", "regular1024"])
def test_emulated_methods_replace_the_layers_of_their_preset(model, name):
    copied, method = copy.deepcopy(model), BY_NAME[name]
    before = sum(p.numel() * p.element_size() for p in copied.parameters())
    linears = {n: m for n, m in copied.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs = {n: normal(64, m.in_features) for n, m in linears.items()} if method.needs_inputs else None
    built = method.build(copied, inputs)
    replaced = {n for n, m in copied.named_modules() if n in linears and not isinstance(m, torch.nn.Linear)}
    assert replaced == set(built.layers)
    assert built.planned == 20
    assert len(replaced) == (20 if name != "regular1024" else 2)  # K = 2048
    assert name == "regular1024" or built.bytes < before / 3
    assert sum(built.macs.values()) >= sum(linears[n].weight.numel() for n in built.layers)


def test_attention_in_8_bits_is_ours_and_nothing_else_in_its_layers(model):
    built, switched = {}, {}
    for name in ("ours_w4a4", "ours_w4a4_fp8_attention"):
        copied = copy.deepcopy(model)
        built[name] = BY_NAME[name].build(copied)
        switched[name] = [block.fp8_attention for block in copied.modules() if isinstance(block, FusedBlock)]
    assert switched == {"ours_w4a4": [False] * 2, "ours_w4a4_fp8_attention": [True] * 2}
    assert built["ours_w4a4"] == built["ours_w4a4_fp8_attention"]


def test_a_method_that_calibrates_says_what_it_lacks(model):
    with pytest.raises(ValueError, match="svdquant_style: the method needs inputs of the layers; capture them"):
        BY_NAME["svdquant_style"].build(model)


def test_products_of_a_method_in_words():
    assert multiplied({"4x4": 97, "16x16": 3}) == "4 x 4, 3 % 16 x 16"
    assert multiplied({"16x16": 5}) == "16 x 16"


def test_kinds_of_flux_layers():
    kinds = {
        "transformer_blocks.0.norm1.linear": "modulation", "single_transformer_blocks.3.norm.linear": "modulation",
        "transformer_blocks.0.attn.to_q": "modulated", "transformer_blocks.0.attn.add_k_proj": "modulated",
        "transformer_blocks.0.ff_context.net.0.proj": "modulated", "transformer_blocks.0.attn.to_out.0": "attention",
        "transformer_blocks.0.attn.to_add_out": "attention", "transformer_blocks.0.ff.net.2": "gelu",
        "single_transformer_blocks.1.proj_out": "proj_out", "single_transformer_blocks.1.proj_mlp": "modulated",
        "proj_out": "other",
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


def test_shifts_are_those_that_adaln_adds(model):
    """Inputs of the layers less their shifts have channel means of zero but for the few tokens."""
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj",
             "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.0.proj",
             "single_transformer_blocks.0.proj_mlp"]  # fmt: skip
    roles, seen, hooks = Roles(model), {}, []
    taps = {name: roles.layer(name, Scheme()).shift for name in names}
    roles.attach()
    for name in names:
        keep = lambda _m, args, name=name: seen.__setitem__(name, (args[0].detach(), taps[name]()))  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    generator = torch.Generator().manual_seed(0)
    for module in (
        "transformer_blocks.0.norm1",
        "transformer_blocks.0.norm1_context",
        "single_transformer_blocks.0.norm",
    ):
        model.get_submodule(module).linear.bias.data.normal_(generator=generator)
    with torch.no_grad():
        model(
            hidden_states=normal(2, 48, 64), encoder_hidden_states=normal(2, 8, 64), pooled_projections=normal(2, 64),
            timestep=torch.tensor([0.5, 0.5]), img_ids=torch.zeros(48, 3), txt_ids=torch.zeros(8, 3),
        )  # fmt: skip
    for hook in hooks:
        hook.remove()
    for name, (x, shift) in seen.items():
        assert shift.shape == (2, 1, 512), name
        correlation = torch.corrcoef(torch.stack((x.mean(1).flatten(), shift.flatten())))[0, 1]
        assert correlation > 0.8, name
    pairs = itertools.combinations(names[:4], 2)
    assert all(not torch.equal(seen[a][1], seen[b][1]) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("name", ["sylvester256", "global_hadamard", "svdquant_style", "ours_at_svdquant_bytes"])
def test_a_method_is_the_same_on_a_gpu(name):
    method, x = BY_NAME[name], normal(96, 512, seed=3)
    scheme = QuantConfig.preset(method.preset).scheme
    errors = []
    for device in ("cpu", "cuda"):
        linear = a_linear().to(device)
        layer = Layer(linear, scheme, "proj_out", 256, calibration=x.to(device) if method.needs_inputs else None)
        made = method.make(layer)
        errors.append(error(made, x.to(device), linear))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)
