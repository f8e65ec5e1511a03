"""What this GPU reaches at all, in this run: a copy of a gigabyte, and large products in bf16 and int8.

A rate of the survey is a share of these, not of a data sheet: a card at its power limit reaches less than is printed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convrot_bench import shapes
from convrot_bench.bench import Bench, GateError
from convrot_bench.ops.clock import is_gpu, time_all, timing_of
from convrot_bench.ops.gates import gate_integers, gate_product
from convrot_bench.ops.linears import BASELINE, matmul, multiply
from convrot_bench.ops.problems import Source, prepared, under
from convrot_bench.ops.rotations import TORCH, TRITON, copies, torch_copy
from convrot_bench.results import Figure
from convrot_kernels import rotate_quantize, testing, use_backend

INT_MM = "torch._int_mm"
CPU_PRODUCTS, CPU_COPY = ((512, 512, 512),), 1 << 22


@dataclass
class Ceiling:
    """Bytes and operations a second: the best that this run has seen. Filled by `measure`, the first job."""

    copy: float = 0.0
    products: dict[str, float] = field(default_factory=dict)  # "int8", "bf16"

    def of_bytes(self, rate: float) -> float:
        """A rate in bytes a second as a share of the copy's."""
        return rate / self._known(self.copy)

    def of_operations(self, rate: float, kind: str = "int8") -> float:
        """A rate in operations a second as a share of the best product's."""
        return rate / self._known(self.products.get(kind, 0.0))

    def seconds(self, moved: int) -> float:
        """What a copy of as many bytes takes at the highest rate."""
        return moved / self._known(self.copy)

    @staticmethod
    def _known(rate: float) -> float:
        if not rate:
            raise GateError("the ceiling of this machine was not measured, of which rates are given as a share")
        return rate

    def measure(self, bench: Bench) -> Iterator[Figure]:
        """A row for the copy, and one a product for each way to make it."""
        yield self._copy(bench)
        for m, n, k in shapes.CEILING_PRODUCTS if is_gpu(bench.device) else CPU_PRODUCTS:
            yield from self._product(bench, m, n, k)

    def _copy(self, bench: Bench) -> Figure:
        moved = shapes.CEILING_COPY if is_gpu(bench.device) else CPU_COPY
        seconds = time_all(bench, _copies(bench, moved))
        best = min(seconds.values())
        self.copy = moved / best
        more: dict[str, Any] = {"backend": min(seconds, key=lambda name: seconds[name]), "timing": timing_of(bench)}
        more |= {"auto": bench.backends[0], "gb_s": self.copy / 1e9}
        shape, torchs = {"bytes": moved}, seconds[TORCH]
        return Figure("ceiling/copy", shape, best * 1e6, torchs * 1e6, "us", TORCH, more)

    def _product(self, bench: Bench, m: int, n: int, k: int) -> Iterator[Figure]:
        source, operations = Source(bench.device), testing.gemm_operations(m, n, k)
        x, weight = source.inputs(m, k), source.weight(n, k)
        contenders: dict[str, Any] = {BASELINE: (matmul, [(x, weight)])}
        codes, scale, wide, wide_scale = _eight_bits(bench, x, weight)
        if bench.passes(gate_integers, INT_MM, torch._int_mm(codes, wide.t()), codes, wide):
            contenders[INT_MM] = (torch._int_mm, [(codes, wide.t())])
        bias = source.vector(n)
        for backend in bench.backends:
            one = prepared(wide, wide_scale, backend)
            if bench.passes(gate_product, backend, codes, scale, one, bias):
                contenders[backend] = (under(backend, bench.device, multiply), [(codes, scale, one, bias)])
        seconds = time_all(bench, contenders)
        baseline = seconds.pop(BASELINE)
        self._reached("bf16", operations / baseline)
        for name, ours in seconds.items():
            self._reached("int8", operations / ours)
            more: dict[str, Any] = {"backend": name, "auto": bench.backends[0], "timing": timing_of(bench)}
            more |= {"tops": operations / ours / 1e12, "baseline_tops": operations / baseline / 1e12}
            shape = {"M": m, "N": n, "K": k}
            yield Figure("ceiling/int8", shape, ours * 1e6, baseline * 1e6, "us", "torch.matmul bf16", more)

    def _reached(self, kind: str, rate: float) -> None:
        self.products[kind] = max(rate, self.products.get(kind, 0.0))


def _copies(bench: Bench, moved: int) -> dict[str, Any]:
    """{torch or triton: contender}, by name; on a CPU torch's alone."""
    if is_gpu(bench.device):
        found = copies(bench, Source(bench.device), moved)
        return {name: found[key] for key in found for name in (TORCH, TRITON) if key.endswith(f" {name}")}
    source = Source(bench.device).normal(moved // 8)
    return {TORCH: (torch_copy, [(torch.zeros_like(source), source)])}


def _eight_bits(bench: Bench, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 codes of both operands and their scales."""
    with use_backend(bench.backends[0]):
        return *rotate_quantize(x, bits=8), *rotate_quantize(weight, bits=8)
