"""What is compared: the product's presets, the paper's layers under other rotations, rivals, and levers."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from convrot_bench.quality import weight_only
from convrot_bench.quality.emulated import EmulatedLinear, Rotation
from convrot_bench.quality.levers import Cost, Layer, Levers
from convrot_bench.quality.planned import EIGHT_BIT_ACTIVATIONS, preset_bytes, svdquant_bytes, within
from convrot_bench.quality.roles import Roles
from convrot_bench.quality.svdquant import branch_rank, svdquant
from convrot_kernels import transforms
from convrot_quant import Calibration, ConvLinear4bit, Plan, Scheme, apply, fp8_attention_, plan, quantize_
from convrot_quant.patch import model_bytes

BASELINE = "paper_w4a4"
Maker = Callable[[Layer], nn.Module | None]


@dataclass(frozen=True)
class Built:
    """What a method did to a model: the layers it quantized, of how many planned, and the bytes of the saved model.

    `macs`: products of one token in all quantized layers by the bits of their operands, {"4x4": ...}.
    """

    layers: tuple[str, ...]
    planned: int
    bytes: int
    macs: Mapping[str, int] = field(default_factory=dict)

    @property
    def multiplied(self) -> str:
        return multiplied(self.macs)


@dataclass(frozen=True)
class Method:
    """`make(layer)` is the layer that takes a linear's place, or None where the method does not fit and it stays.

    `preset`: whose choice of layers and bits it takes. `emulated`: in fp32 by this package, not by the product.
    `needs_inputs`: layers are to come with inputs captured on tuning captions or seeds.
    """

    name: str
    title: str
    preset: str
    make: Maker
    emulated: bool = True
    needs_inputs: bool = False
    decide: Callable[[nn.Module], Plan] | None = None  # instead of a preset
    fp8_attention: bool = False  # of the product's fused blocks

    def build(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Built:
        """Quantize a fresh 16-bit model in place; `inputs`: {layer: (rows, K)}."""
        if self.needs_inputs and inputs is None:
            raise ValueError(f"{self.name}: the method needs inputs of the layers; capture them on tuning captions")
        if not self.emulated:
            decided = self._quantize(model, inputs if self.needs_inputs else None)
            if self.fp8_attention:
                fp8_attention_(model)
            costs = [cost_of(layer.out_features, layer.in_features, decided[layer.name]) for layer in _kept(decided)]
            return Built(tuple(decided), len(decided), model_bytes(model), _sum(costs))
        return self._emulate(model, plan(model, self.preset), inputs or {})

    def _quantize(self, model: nn.Module, inputs: Mapping[str, Tensor] | None) -> Plan:
        if self.decide is None:
            calibration = None if inputs is None else Calibration.of(inputs)
            return quantize_(model, self.preset, calibration=calibration, progress=False)
        decided = self.decide(model)
        apply(model, decided, progress=False)
        return decided

    def _emulate(self, model: nn.Module, decided: Plan, inputs: Mapping[str, Tensor]) -> Built:
        roles, costs, size = Roles(model), {}, decided.bytes_after
        for entry in _kept(decided):
            calibration = inputs.get(entry.name)
            if self.needs_inputs and calibration is None:
                raise ValueError(f"{self.name}: no inputs of {entry.name}, which did not run; take it out of the plan")
            module = self.make(roles.layer(entry.name, decided[entry.name], calibration))
            size -= entry.bytes_after
            if module is None:
                size += entry.bytes_before
                continue
            costs[entry.name] = cost(module)
            size += costs[entry.name].bytes
            model.set_submodule(entry.name, module)
        roles.attach()
        return Built(tuple(costs), len(decided), size, _sum(costs.values()))


def multiplied(macs: Mapping[str, int]) -> str:
    """{"4x4": 97, "16x16": 3} -> "4 x 4, 3 % 16 x 16": bits of activation and weight, the largest share first."""
    total = sum(macs.values())
    ordered = sorted(macs, key=lambda bits: -macs[bits])
    shares = [f"{100 * macs[bits] / total:.2g} % " for bits in ordered]
    return ", ".join(share + bits.replace("x", " x ") for share, bits in zip(["", *shares[1:]], ordered, strict=True))


def cost(module: nn.Module) -> Cost:
    """What a made layer says of itself."""
    found = getattr(module, "cost", None)
    if isinstance(module, ConvLinear4bit):
        stored = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        return Cost(stored, cost_of(module.out_features, module.in_features, module.scheme).macs)
    assert isinstance(found, Cost), "every emulated layer has its cost"
    return found


def cost_of(n: int, k: int, scheme: Scheme) -> Cost:
    """Without bytes: codes multiply codes, but weights alone are widened first, and a branch is one of 16 bits."""
    bits = "16x16" if scheme.activation_bits == 16 else f"{scheme.activation_bits}x{scheme.weight_bits}"
    macs = Counter({bits: n * k})
    if scheme.low_rank:
        macs["16x16"] += scheme.low_rank * (n + k)
    return Cost(0, macs)


def _kept(decided: Plan) -> list[Any]:
    return [layer for layer in decided.layers if layer.scheme is not None]


def _sum(costs: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in costs:
        total.update(one.macs)
    return dict(total)


# makers


def product(layer: Layer) -> nn.Module:
    """The product's own layer."""
    return ConvLinear4bit.from_linear(layer.linear, layer.scheme)


def calibrated(layer: Layer) -> nn.Module:
    """The same, rounded by rows that the layer reads."""
    scheme = layer.scheme if layer.kind == "modulation" else replace(layer.scheme, weight_rounding="gptq")
    return ConvLinear4bit.from_linear(layer.linear, scheme, inputs=layer.calibration)


def rotated(rotation: Callable[[int], Rotation | None], levers: Levers = Levers()) -> Maker:
    """Another rotation, `rotation(K)`; None where it does not fit a row."""

    def make(layer: Layer) -> nn.Module | None:
        found = rotation(layer.linear.in_features)
        return None if found is None else EmulatedLinear(layer, found, levers)

    return make


def blocks(matrix: Callable[[], Tensor]) -> Callable[[int], Rotation | None]:
    """The same matrix for every block of a row."""

    @cache
    def made() -> Tensor:
        return matrix()

    return lambda k: Rotation(made()) if k % made().shape[0] == 0 else None


def levered(base: Callable[[Scheme], Levers], **switches: Any) -> Callable[[Layer], EmulatedLinear]:
    """Regular matrices with levers on top of those that `base` takes from a layer's scheme.

    Modulation, whose activations stay in 16 bits, has the weight rule and the weight groups of the others alone.
    """

    def make(layer: Layer) -> EmulatedLinear:
        wanted = switches
        if layer.scheme.activation_bits == 16:
            wanted = {
                key: value for key, value in switches.items() if key in ("weight_rule", "balanced", "weight_group")
            }
        rotation = Rotation(transforms.regular(layer.scheme.group_size))
        return EmulatedLinear(layer, rotation, replace(base(layer.scheme), **wanted))

    return make


def _absmax(scheme: Scheme) -> Levers:
    return Levers()


def _clip(scheme: Scheme) -> Levers:
    return Levers(clip=scheme.activation_clip)


def at_svdquant_bytes(layer: Layer) -> nn.Module:
    """The bytes of SVDQuant-style spent on ours, and its granularity: scales for 64 columns on both sides.

    Half of its branch's rank takes principal directions of the inputs out of the codes, half is a branch of the weight.
    """
    if layer.kind == "modulation":
        return levered(Levers.of, weight_group=64)(layer)
    rank = branch_rank(layer.linear.in_features)
    shared = {"subspace": rank // 2, "side_rank": rank - rank // 2}
    return levered(Levers.of, weight_group=64, activation_group=64, clip=GROUP_CLIP, **shared)(layer)


def svdquant_style(layer: Layer) -> nn.Module:
    """Modulation weight-only, as SVDQuant has it."""
    return weight_only.symmetric_int4(layer) if layer.kind == "modulation" else svdquant(layer)


FREE: dict[str, Any] = {"peel": "group", "shift": True, "split": True}  # levers that pay without a format of their own

GROUP_CLIP = 0.9  # rows of 64 values have shorter tails than whole tokens

# the paper's layers, bits and scales under other rotations
_ROTATIONS = (
    Method("rtn", "no rotation", "paper", rotated(blocks(lambda: transforms.identity(16)))),
    Method("sylvester256", "Sylvester-256", "paper", rotated(blocks(lambda: transforms.sylvester(256)))),
    Method(
        "signed_sylvester256", "signed Sylvester-256 (QuaRot, in blocks)", "paper",
        rotated(blocks(lambda: transforms.sylvester(256, signs=0))),
    ),
    Method(
        "random256", "random orthogonal-256", "paper", rotated(blocks(lambda: transforms.random_orthogonal(256, 0)))
    ),
    Method("global_hadamard", "global Hadamard (QuaRot)", "paper", rotated(Rotation.across)),
    Method("regular16", "regular-16", "paper", rotated(blocks(lambda: transforms.regular(16)))),
    Method("regular64", "regular-64", "paper", rotated(blocks(lambda: transforms.regular(64)))),
    Method(BASELINE, "regular-256 (paper)", "paper", product, emulated=False),
    Method("regular1024", "regular-1024", "paper", rotated(blocks(lambda: transforms.regular(1024)))),
    Method("paper_mixed", "the paper's mixed model", "paper-mixed", product, emulated=False),
)  # fmt: skip
_RIVALS = (
    Method(
        "hadanorm_style", "HadaNorm-style: channel means out, global Hadamard", "paper",
        rotated(Rotation.across, Levers(centre=True)),
    ),
    Method("svdquant_style", "SVDQuant-style", "ours", svdquant_style, needs_inputs=True),
    Method("nf4_style", "NF4, weight-only", "ours", weight_only.nf4),
    Method("int4_weight_only", "int4 weight-only, groups of 128", "ours", weight_only.int4),
)  # fmt: skip
_OURS = (
    Method("ours_w4a4", "ours, W4A4 (default)", "ours", product, emulated=False),
    Method(
        "ours_w4a4_fp8_attention",
        "ours, W4A4, attention in 8 bits",
        "ours",
        product,
        emulated=False,
        fp8_attention=True,
    ),
    Method("ours_w4a4_r16", "ours, W4A4 + branch of rank 16", "ours-r16", product, emulated=False),
    Method("ours_w4a4_r32", "ours, W4A4 + branch of rank 32", "ours-r32", product, emulated=False),
    Method("ours_w4a4_gptq", "ours, W4A4, calibrated", "ours", calibrated, emulated=False, needs_inputs=True),
    Method(
        "ours_w4a4_r16_gptq",
        "ours, W4A4 + branch of rank 16, calibrated",
        "ours-r16",
        calibrated,
        emulated=False,
        needs_inputs=True,
    ),
    Method("ours_w4a8", "ours, W4A8", "w4a8", product, emulated=False),
    Method("ours_w4a16", "ours, W4A16", "w4a16", product, emulated=False),
    Method("ours_w8a8", "ours, W8A8", "w8a8", product, emulated=False),
)


def _planned(name: str, title: str, decide: Callable[[nn.Module], Plan]) -> Method:
    return Method(name, title, "ours", product, emulated=False, decide=decide)


# the planner's lists, by weights alone
_PLANNED = (
    _planned("plan_at_paper_bytes", "planner, bytes of the paper's W4A4", within(preset_bytes("paper"))),
    _planned("plan_at_mixed_bytes", "planner, bytes of the paper's mixed model", within(preset_bytes("paper-mixed"))),
    _planned("plan_at_svdquant_bytes", "planner, bytes of SVDQuant-style", within(svdquant_bytes)),
    _planned(
        "plan_a8_at_svdquant_bytes", "planner with 8-bit activations, bytes of SVDQuant-style",
        within(svdquant_bytes, EIGHT_BIT_ACTIVATIONS),
    ),
)  # fmt: skip


def _lever(name: str, title: str, base: Callable[[Scheme], Levers] = Levers.of, **switches: Any) -> Method:
    needs = Levers(**switches).needs_calibration
    return Method(f"lever_{name}", title, "ours", levered(base, **switches), needs_inputs=needs)


# each alone on the paper's scales, or (from the peel on) on those of ours; then what pays together
_LEVERS = (
    _lever("none", "ours' layers, the paper's scales", _absmax),
    _lever("mse", "MSE weight scales", _absmax, weight_rule="mse"),
    _lever("balanced", "balanced rounding of weights", _absmax, balanced=True),
    _lever("clip", "clipped activations", _clip),
    _lever("rms", "MSE weights, activations bounded by rms", _absmax, weight_rule="mse", rms=0.35),
    _lever("peel_group", "ours + DC peel, per group", peel="group"),
    _lever("peel_token", "ours + DC peel, per token", peel="token"),
    _lever("peel_quantized", "ours + DC peel, per group, sums of codes", peel="group", peel_sums="quantized"),
    _lever("shift", "ours + AdaLN shift taken out", shift=True),
    _lever("unsigned", "ours + 16 codes for GELU's inputs", asymmetric=True),
    _lever("split", "ours + own scales for proj_out's parts", split=True),
    _lever("side16", "ours + rank-16 branch of the weight", side_rank=16),
    _lever("side32", "ours + rank-32 branch of the weight", side_rank=32),
    _lever("residual32", "ours + rank-32 branch of the residual", side_rank=32, side_of="residual"),
    _lever("side8_inputs", "ours + rank-8 branch along the inputs", side_rank=8, side_of="inputs"),
    _lever("subspace8", "ours + 8 directions of the inputs out of the codes", subspace=8),
    _lever("permute", "ours + channels dealt by weight mass", permute="weight"),
    _lever("permute_activation", "ours + channels dealt by activation mass", permute="activation"),
    _lever("group64", "ours + weight groups of 64", weight_group=64),
    _lever("group128", "ours + weight groups of 128", weight_group=128),
    _lever("group256", "ours + weight groups of 256", weight_group=256),
    _lever("activation64", "ours + activation groups of 64", activation_group=64, clip=GROUP_CLIP),
    _lever("gptq", "ours + GPTQ in the rotated basis", gptq=True),
    _lever("together", "ours + peel, shift, split", **FREE),
    Method(
        "ours_at_svdquant_bytes", "ours, SVDQuant-style's bytes and groups", "ours", at_svdquant_bytes,
        needs_inputs=True,
    ),
)  # fmt: skip

METHODS = (*_ROTATIONS, *_RIVALS, *_OURS, *_PLANNED, *_LEVERS)
