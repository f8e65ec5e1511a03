"""What a scheme costs a layer in accuracy: the relative error of its output, without data or on captured inputs.

Without data: inputs are taken as Gaussian, which a rotation makes of most, so that squared errors of weights (measured)
and of activations (a number for each scheme and K) add up. With prompts: inputs that a LayerProbe kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from convrot_kernels import rotate, unpack_int4
from convrot_quant.config import Scheme
from convrot_quant.linear import ConvLinear4bit, operand
from convrot_quant.low_rank import Branch, branch_of
from convrot_quant.manifest import CheckpointError
from convrot_quant.plans import LayerPlan, Plan
from convrot_quant.probe import LayerProbe
from convrot_quant.source import read_headers

ROWS = 512  # of a weight, spread evenly: rows are quantized one by one, so that some measure all
GAUSSIAN_ROWS = 64

T = TypeVar("T")

Schemes = Mapping[str, tuple[Scheme, ...]]


@dataclass(frozen=True)
class Scores:
    """{(layer, scheme): relative L2 error of the layer's output}, and how much each layer's squared error counts.

    A layer counts by its parameters: of what single quantized layers of mini-flux do to its output, that predicts more
    than counting every layer alike.
    """

    errors: Mapping[tuple[str, Scheme], float]
    weights: Mapping[str, float]

    @property
    def weight(self) -> float:
        """Of all layers together."""
        return sum(self.weights.values())

    def squared(self, name: str, scheme: Scheme | None) -> float:
        """The layer's term in a plan's error; 16 bits have none."""
        return 0.0 if scheme is None else self.weights[name] * self.errors[name, scheme] ** 2


def schemes_of(plans: Iterable[Plan]) -> dict[str, tuple[Scheme, ...]]:
    """{layer: every scheme that it has in one of the plans}: what is to be scored."""
    found: dict[str, dict[Scheme, None]] = {}
    for plan in plans:
        for name, scheme in plan.items():
            found.setdefault(name, {})[scheme] = None
    return {name: tuple(schemes) for name, schemes in found.items()}


@torch.no_grad()
def weight_scores(weights: Iterable[tuple[str, Tensor]], schemes: Schemes, *, progress: bool = True) -> Scores:
    """(name, weight (N, K)) one by one, of every layer in `schemes` -> what can be known without data."""
    errors: dict[tuple[str, Scheme], float] = {}
    counts: dict[str, float] = {}
    for name, weight in _bar(weights, len(schemes), progress):
        columns, branches = _some(weight.shape[0]), _branches(weight, schemes[name])
        rows = weight[columns].float()
        for scheme in schemes[name]:
            branch = _of_columns(branches.get(scheme.low_rank), columns)
            try:
                of_weight = _weight_error(rows, scheme, branch)
            except ValueError as error:
                raise ValueError(f"{name!r} cannot be scored: {error}") from None
            # what the branch holds is multiplied in 16 bits, and quantized activations meet the rest alone
            share = 1.0 if branch is None else float(branch.rest_of(rows).norm() / rows.norm().clamp_min(1e-30))
            errors[name, scheme] = math.hypot(of_weight, share * _activation_error(scheme, weight.shape[1]))
        counts[name] = weight.numel()
    return Scores(errors, counts)


def folder_weights(
    folder: Path, layers: Iterable[LayerPlan], device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight (N, K)) of these layers of a 16-bit transformer folder, in the files' order, one at a time."""
    planned = {f"{layer.name}.weight": layer for layer in layers}
    headers = {name: header for name, header in read_headers(folder).items() if name in planned}
    for key, layer in planned.items():
        shape = headers[key].shape if key in headers else None
        if shape != (layer.out_features, layer.in_features):
            wanted = (layer.out_features, layer.in_features)
            raise CheckpointError(f"{folder}: {key!r} must be {wanted}, got {shape}; copy or download the folder again")
    for key, header in headers.items():
        # opened for each tensor: the pages of a mapped file count as this process's memory until the mapping ends
        with safe_open(str(header.file), framework="pt", device=str(device)) as file:
            yield planned[key].name, file.get_tensor(key).to(getattr(torch, planned[key].dtype))


def model_weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight (N, K)) of layers of a 16-bit model."""
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor), "a plan names linears"
        yield name, weight.detach()


@torch.no_grad()
def output_scores(model: nn.Module, probe: LayerProbe, schemes: Schemes, *, progress: bool = True) -> Scores:
    """Errors on the inputs that a probe kept of a 16-bit model; a layer that never ran counts nothing."""
    errors: dict[tuple[str, Scheme], float] = {}
    counts: dict[str, float] = {}
    for name in _bar(schemes, len(schemes), progress):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), "a plan names linears"
        counts[name] = linear.weight.numel() if probe.inputs[name] else 0.0
        columns = _some(linear.out_features)
        bias = None if linear.bias is None else linear.bias[columns]
        part = _linear(linear.weight[columns].contiguous(), bias)
        branches = _branches(linear.weight, schemes[name])
        for scheme in schemes[name]:
            branch = _of_columns(branches.get(scheme.low_rank), columns)
            layer = ConvLinear4bit.from_linear(part, scheme, branch=branch)
            errors[name, scheme] = probe.error(name, layer, columns) if counts[name] else 0.0
    if not any(counts.values()):
        raise ValueError(f"none of the {len(counts)} layers ran while {type(model).__name__} was probed")
    return Scores(errors, counts)


def _bar(items: Iterable[T], total: int, progress: bool) -> Iterable[T]:
    quiet = not progress or bool(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
    bar: Iterable[T] = tqdm(items, total=total, desc="score", unit="layer", disable=quiet, leave=False)
    return bar


def _some(out_features: int) -> slice:
    """About ROWS of a weight's rows, evenly, in whole tiles of 16 as every backend takes them."""
    step = math.ceil(out_features / ROWS)
    return slice(0, out_features // step // 16 * 16 * step, step)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """nn.Linear (N, K) around tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return linear


def _branches(weight: Tensor, schemes: Iterable[Scheme]) -> dict[int, Branch]:
    """{rank: the branch of the whole weight} for the schemes' ranks: some of the rows alone would have a better one."""
    ranks = {scheme.low_rank for scheme in schemes} - {0} if torch.isfinite(weight).all() else set()
    return {rank: branch_of(weight, rank) for rank in sorted(ranks)}


def _of_columns(branch: Branch | None, columns: slice) -> Branch | None:
    """The branch of some of a layer's outputs."""
    return None if branch is None else Branch(branch.down, branch.up[columns].contiguous())


def _weight_error(rows: Tensor, scheme: Scheme, branch: Branch | None) -> float:
    """Relative L2 error of rows (R, K) fp32, as they are multiplied once quantized."""
    held = ConvLinear4bit.from_linear(_linear(rows), scheme, branch=branch).dequantize().weight
    return float((held - rows).norm() / rows.norm().clamp_min(1e-30))


@cache
def _activation_error(scheme: Scheme, in_features: int) -> float:
    """Relative L2 error of Gaussian rows of this length as a layer of this scheme multiplies them."""
    if scheme.activation_bits == 16:
        return 0.0
    x = torch.randn(GAUSSIAN_ROWS, in_features, generator=torch.Generator().manual_seed(0))
    codes, scale = operand(x, scheme)
    assert scale is not None, "activations of 16 bits have been answered"
    values = (unpack_int4(codes) if codes.dtype == torch.uint8 else codes) * scale[:, None]
    rotated = rotate(x, scheme.group_size)
    return float((values - rotated).norm() / rotated.norm())
