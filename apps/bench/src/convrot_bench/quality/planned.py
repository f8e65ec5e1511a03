"""The planner's lists at the bytes of others: what the product would choose, by weights alone, for the same money."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from convrot_bench.quality.svdquant import GROUP, stored_bytes
from convrot_quant import Plan, plan, plan_within
from convrot_quant.plans import LayerPlan

FOUR_BITS, EIGHT_BIT_ACTIVATIONS = ("W4A4", "W8A8"), ("W4A4", "W4A8", "W8A8")


def within(budget: Callable[[nn.Module], int], schemes: Sequence[str] = FOUR_BITS) -> Callable[[nn.Module], Plan]:
    """A function of a 16-bit model: the planner's choice within the bytes that `budget` finds for the model."""
    return lambda model: plan_within(model, budget(model), schemes=schemes, progress=False)


def preset_bytes(name: str) -> Callable[[nn.Module], int]:
    """The bytes of a model under a preset."""
    return partial(_preset_bytes, name)


def _preset_bytes(name: str, model: nn.Module) -> int:
    return plan(model, name).bytes_after


def svdquant_bytes(model: nn.Module) -> int:
    """What SVDQuant-style stores of this model: the layers of our default, in its format."""
    decided = plan(model, "ours")
    layers = [layer for layer in decided.layers if layer.scheme is not None]
    return decided.bytes_after + sum(_in_svdquant(layer) + layer.bias_bytes - layer.bytes_after for layer in layers)


def _in_svdquant(layer: LayerPlan) -> int:
    n, k = layer.out_features, layer.in_features
    assert layer.scheme is not None, "asked of quantized layers"
    if layer.scheme.activation_bits == 16:
        return n * k // 2 + 2 * n * k // GROUP
    if layer.name.endswith(".proj_out") and k > n:  # attention's part and the MLP's, each with a branch
        return stored_bytes(n, n) + stored_bytes(n, k - n)
    return stored_bytes(n, k)
