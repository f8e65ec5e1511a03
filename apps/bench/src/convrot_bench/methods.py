"""What is compared: the product's presets, and the paper's layers under other rotations (emulated)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrot_kernels import transforms
from convrot_quant import Scheme, plan, quantize_
from convrot_quant.patch import model_bytes

QMAX = {4: 7, 8: 127}


class EmulatedLinear(nn.Module):
    """A linear under any block rotation R: round(x R) @ round(W R)^T, absmax scales per row, all in fp32.

    With the regular Hadamard it computes what ConvLinear4bit computes; there is no kernel for the others.
    """

    matrix: Tensor
    weight: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme, matrix: Tensor) -> None:
        super().__init__()
        self.activation_bits = scheme.activation_bits
        self.register_buffer("matrix", matrix.float().to(linear.weight.device))
        rotated = transforms.apply_blockwise(linear.weight.detach().float(), self.matrix)
        self.register_buffer("weight", quantize_dequantize(rotated, QMAX[scheme.weight_bits]))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), same dtype."""
        rotated = transforms.apply_blockwise(x.float(), self.matrix)
        if self.activation_bits < 16:
            rotated = quantize_dequantize(rotated, QMAX[self.activation_bits])
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(rotated, self.weight, bias).to(x.dtype)


def quantize_dequantize(x: Tensor, qmax: int) -> Tensor:
    """(..., K) -> (..., K): absmax over the row, symmetric, round half to even."""
    scale = (x.abs().amax(-1, keepdim=True) / qmax).clamp_min(1e-10)
    return (x / scale).round().clamp(-qmax, qmax) * scale


@dataclass(frozen=True)
class Built:
    """What a method did to a model: the layers it quantized, of how many planned, and the bytes of the saved model."""

    layers: tuple[str, ...]
    planned: int
    bytes: int


@dataclass(frozen=True)
class Method:
    """`build(model)` quantizes a fresh 16-bit model in place."""

    name: str
    title: str
    build: Callable[[nn.Module], Built]
    emulated: bool = False


def preset(name: str) -> Callable[[nn.Module], Built]:
    """The product itself under one of its presets."""

    def build(model: nn.Module) -> Built:
        decided = quantize_(model, name, progress=False)
        return Built(tuple(decided), len(decided), model_bytes(model))

    return build


def rotated(matrix_for: Callable[[int], Tensor | None]) -> Callable[[nn.Module], Built]:
    """The paper's layers, bits and scales under another rotation.

    `matrix_for(K)`: its block matrix, or None where it does not fit.
    """

    def build(model: nn.Module) -> Built:
        decided = plan(model, "paper")
        planned = len(decided)
        for name, scheme in list(decided.items()):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), "a plan names linears"
            matrix = matrix_for(linear.in_features)
            if matrix is None:
                del decided[name]  # stays in 16 bits, and its bytes count as such
            else:
                model.set_submodule(name, EmulatedLinear(linear, scheme, matrix))
        return Built(tuple(decided), planned, decided.bytes_after)

    return build


def _block(matrix: Callable[[], Tensor], size: int) -> Callable[[int], Tensor | None]:
    return lambda k: matrix() if k % size == 0 else None


METHODS = (
    Method("rtn", "no rotation", rotated(_block(lambda: transforms.identity(16), 16)), emulated=True),
    Method("sylvester256", "Sylvester-256", rotated(_block(lambda: transforms.sylvester(256), 256)), emulated=True),
    Method("paper_w4a4", "regular-256 (paper)", preset("paper")),
    Method("ours_w4a4", "ours, W4A4 (default)", preset("ours")),
    Method("ours_w4a8", "ours, W4A8", preset("w4a8")),
    Method("ours_w8a8", "ours, W8A8", preset("w8a8")),
)
BASELINE = "paper_w4a4"
