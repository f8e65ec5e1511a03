"""rotate_quantize and its prologues against a copy of as many bytes in the same run. Sustained, as CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convrot_bench.bench import Bench, GateError
from convrot_bench.ops.gates import gate_codes
from convrot_bench.ops.linears import TIMING
from convrot_bench.ops.problems import Source, count_sets, keeping, under
from convrot_bench.results import Figure
from convrot_kernels import (
    rotate_quantize,
    rotate_quantize_cat_gelu,
    rotate_quantize_gelu,
    rotate_quantize_modulate,
    rotate_quantize_silu_mul,
    testing,
)

PROLOGUES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "none": rotate_quantize,
    "gelu": rotate_quantize_gelu,
    "modulate": rotate_quantize_modulate,
    "silu_mul": rotate_quantize_silu_mul,
    "cat_gelu": rotate_quantize_cat_gelu,
}
COPY = "copy"  # backend names and this are the contenders' first half
TORCH, TRITON = "torch copy_", "triton"


@dataclass(frozen=True)
class Variant:
    """What is folded in front, and in which form the codes are written."""

    prologue: str = "none"
    bits: int = 4
    packed: bool = False

    def options(self) -> dict[str, Any]:
        """As keyword arguments, and as keys of a row's shape: those that are not the default."""
        return ({"bits": self.bits} if self.bits != 4 else {}) | ({"packed": True} if self.packed else {})

    def moved(self, m: int, k: int) -> int:
        """Bytes read and written; the vectors of a modulation are not counted."""
        inputs = 2 if self.prologue == "silu_mul" else 1
        return testing.rotate_quantize_bytes(m, k, code_bits=4 if self.packed else 8, inputs=inputs)

    def arguments(self, source: Source, m: int, k: int) -> tuple[Tensor, ...]:
        """One set of tensors for the op."""
        if self.prologue == "silu_mul":
            return source.inputs(m, k), source.inputs(m, k)
        if self.prologue == "cat_gelu":  # attention and MLP of a single block: 1 to 4
            return source.inputs(m, k // 5), source.inputs(m, k - k // 5)
        if self.prologue == "modulate":
            return source.inputs(m, k), source.vector(k), source.vector(k)
        return (source.inputs(m, k),)

    def function(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The op with its options."""
        op, options = PROLOGUES[self.prologue], self.options()

        def run(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            return op(*arguments, **options)

        return run


def rotate_quantize_all(bench: Bench, m: int, k: int, variants: Sequence[Variant]) -> Iterator[Figure]:
    """Every variant on every backend at one (M, K), timed together with the copies; the first variant is the plain."""
    source = Source(bench.device)
    contenders: dict[str, Any] = {}
    for variant in variants:
        sets = [variant.arguments(source, m, k) for _ in range(count_sets(variant.moved(m, k)))]
        for backend in bench.backends:
            exact = variant.prologue != "modulate"
            op = PROLOGUES[variant.prologue]
            if bench.passes(gate_codes, backend, op, sets[0], variant.options(), exact):
                contenders[_key(backend, variant)] = (
                    keeping(under(backend, bench.device, variant.function()), sets),
                    sets,
                )
    if not contenders:
        return
    for moved in dict.fromkeys(variant.moved(m, k) for variant in variants):
        contenders |= copies(bench, source, moved)
    seconds = testing.time_graphs(contenders)
    for variant in variants:
        for backend in bench.backends:
            if _key(backend, variant) in seconds:
                yield _figure(bench, backend, variant, m, k, seconds)


def case_of(backend: str) -> str:
    """The compiled kernel and the portable one are two cases, with a bar each."""
    return "rotate_quantize_triton" if backend == "triton" else "rotate_quantize"


def _key(first: str, second: Variant | str) -> str:
    return f"{first} | {second}"


def _figure(bench: Bench, backend: str, variant: Variant, m: int, k: int, seconds: dict[str, float]) -> Figure:
    ours, moved = seconds[_key(backend, variant)], variant.moved(m, k)
    copied = {name: seconds[_key(COPY, f"{moved} {name}")] for name in (TORCH, TRITON)}
    more = bench.facts(backend, "rotate_quantize") | {"timing": TIMING, "bits": variant.bits}
    more |= {"gb_s": moved / ours / 1e9, "copies": {name: value * 1e6 for name, value in copied.items()}}
    plain = seconds.get(_key(backend, Variant()))
    if plain is not None and variant.prologue != "none":
        more["over_plain"] = ours / plain
    shape = {"M": m, "K": k, "prologue": variant.prologue} | variant.options()
    return Figure(case_of(backend), shape, ours * 1e6, min(copied.values()) * 1e6, "us", "copy of the same bytes", more)


def copies(bench: Bench, source: Source, moved: int) -> dict[str, Any]:
    """Two contenders that read half of the bytes and write them: torch's copy_ and Triton's."""
    from convrot_bench.ops.copies import triton_copy

    size = moved // 2 // 256 * 64  # int32, whole 256 bytes
    sets = []
    for _ in range(count_sets(moved)):
        device = source.generator.device
        values = torch.randint(2**31 - 1, (size,), dtype=torch.int32, device=device, generator=source.generator)
        sets.append((torch.zeros_like(values), values))
    triton_copy(*sets[0])
    if not torch.equal(*sets[0]):
        raise GateError(f"the Triton copy of {4 * size} bytes on {bench.device} is not a copy")
    return {
        _key(COPY, f"{moved} {TORCH}"): (torch_copy, sets),
        _key(COPY, f"{moved} {TRITON}"): (triton_copy, sets),
    }


def torch_copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
