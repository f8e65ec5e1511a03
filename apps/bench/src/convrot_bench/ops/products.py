"""The ops that multiply, in the survey: microseconds, TOPS, share of the best product, ratio to cuBLAS in bf16."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.ops.clock import FEW, SINGLE, is_gpu, time_all, time_singly, timing_of
from convrot_bench.ops.gates import ends, gate_product, gate_same, gate_values
from convrot_bench.ops.linears import BASELINE, Linear, matmul, multiply, multiply_values
from convrot_bench.ops.problems import Source, Weight, count_sets, keeping, packs_codes, prepared, under
from convrot_bench.results import Figure
from convrot_bench.shapes import Family
from convrot_kernels import (
    rotate_quantize,
    scaled_mm,
    scaled_mm_gate_residual,
    scaled_mm_out,
    testing,
    use_backend,
)

CUBLAS = "torch.matmul bf16"
EXTRA = 256  # columns by which the buffer is wider that scaled_mm_out writes a slice of
FIRST = 192  # rows compared with scaled_mm's, beside the last


@dataclass(frozen=True)
class Variant:
    """An op that multiplies, and of which bits."""

    op: str
    a_bits: int = 4
    b_bits: int = 4

    @property
    def scheme(self) -> str:
        return f"W{self.b_bits}A{self.a_bits}"


class Operands(NamedTuple):
    """codes (M, K), scale (M,), the weight, bias (N,), gate (N,), residual (1, M, N), out (M, N) of a wider buffer."""

    codes: Tensor
    scale: Tensor
    weight: Weight
    bias: Tensor
    gate: Tensor
    residual: Tensor
    out: Tensor


def _product(o: Operands) -> Tensor:
    return multiply(o.codes, o.scale, o.weight, o.bias)


def _into(o: Operands) -> Tensor:
    scaled_mm_out(o.out, o.codes, o.weight.codes, o.scale, o.weight.scale, o.bias, b_layout=o.weight.layout)
    return o.out


def _gated(o: Operands) -> Tensor:
    arguments = o.codes[None], o.weight.codes, o.scale[None], o.weight.scale, o.bias, o.gate, o.residual
    return scaled_mm_gate_residual(*arguments, b_layout=o.weight.layout)


OPS: dict[str, Callable[[Operands], Tensor]] = {
    "scaled_mm": _product,
    "scaled_mm_out": _into,
    "scaled_mm_gate_residual": _gated,
}


def call_of(op: str) -> Callable[..., Tensor]:
    """-> the op on the parts of Operands: tensors, by which clocks know the device."""
    return lambda *parts: OPS[op](Operands(*parts))


def variants_of(family: Family, m: int, n: int, k: int) -> list[Variant]:
    """scaled_mm everywhere; the other ops and bits once a family, where a model has them."""
    found = [Variant("scaled_mm")]
    if m == family.tokens and (n, k) == max(family.linears, key=lambda nk: nk[0] * nk[1]):
        found += [Variant("scaled_mm", 8), Variant("scaled_mm", 8, 8)]
    if m == family.tokens and (n, k) == family.linears[0]:
        found.append(Variant("scaled_mm_out"))
    if m == family.tokens and (n, k) in family.gated:
        found.append(Variant("scaled_mm_gate_residual"))
    return found


def measure(bench: Bench, ceiling: Ceiling, family: Family, m: int, n: int, k: int) -> Iterator[Figure]:
    """Every variant on every backend at one (M, N, K), timed with cuBLAS; the reference once a run."""
    group_size, source = family.group_size(k), Source(bench.device)
    count = count_sets(testing.gemm_bytes(m, n, k, a_bits=8))
    sets = [Linear.draw(source, m, n, k, bench.backends[0], group_size) for _ in range(count)]
    contenders: dict[str, Any] = {BASELINE: (keeping(matmul, sets), [(s.x, s.weight) for s in sets])}
    found: dict[str, tuple[str, Variant]] = {}
    for variant in variants_of(family, m, n, k):
        for backend in bench.backends:
            some = [_operands(bench, source, s, backend, variant, group_size) for s in sets]
            if bench.passes(gate, backend, variant.op, some[0]):
                key = f"{backend} {variant.op} {variant.scheme}"
                found[key] = (backend, variant)
                run = under(backend, bench.device, call_of(variant.op))
                contenders[key] = (keeping(run, sets), [tuple(one) for one in some])
    seconds = time_all(bench, contenders)
    for key, (backend, variant) in found.items():
        yield _figure(bench, ceiling, family, (m, n, k), backend, variant, seconds[key], seconds[BASELINE])
    if is_gpu(bench.device) and _is_first(family, m, n, k):
        variant, run = Variant("scaled_mm"), under("reference", bench.device, call_of("scaled_mm"))
        one = _operands(bench, source, sets[0], "reference", variant, group_size)
        slow = time_singly({"": (run, [tuple(one)])}, FEW)[""]
        figure = _figure(bench, ceiling, family, (m, n, k), "reference", variant, slow, seconds[BASELINE])
        figure.more["timing"] = SINGLE
        yield figure


def _is_first(family: Family, m: int, n: int, k: int) -> bool:
    """Where the reference is timed too: it is exact, and slow."""
    return family.name == "FLUX.1-dev" and (m, (n, k)) == (family.tokens, family.linears[0])


def _operands(bench: Bench, source: Source, one: Linear, backend: str, variant: Variant, group_size: int) -> Operands:
    """What the variant reads, in the forms that the backend prefers."""
    packed = variant.a_bits == 4 and packs_codes(bench.device, backend)
    with use_backend(backend):
        codes, scale = rotate_quantize(one.x, group_size, variant.a_bits, packed=packed)
    with use_backend(bench.backends[0]):
        row_major, weight_scale = (
            (one.packed, one.scale) if variant.b_bits == 4 else rotate_quantize(one.weight, group_size, 8)
        )
    m, n = len(one.x), len(one.weight)
    gated, written = variant.op == "scaled_mm_gate_residual", variant.op == "scaled_mm_out"
    residual = source.inputs(m, n)[None] if gated else one.x
    out = one.x.new_zeros(m, n + EXTRA)[:, :n] if written else one.x
    gate = source.vector(n) if gated else one.bias
    return Operands(codes, scale, prepared(row_major, weight_scale, backend), one.bias, gate, residual, out)


def gate(backend: str, op: str, o: Operands) -> None:
    """Bit for bit the reference's, on rows of both ends; the result is that of the full shape."""
    gate_product(backend, o.codes, o.scale, o.weight, o.bias)
    if op == "scaled_mm":
        return
    device = o.codes.device
    out = under(backend, device, OPS[op])(o).view(len(o.codes), -1)
    rows = ends(len(out), FIRST, device)
    with use_backend(backend):
        plain = scaled_mm(
            o.codes[rows], o.weight.codes, o.scale[rows], o.weight.scale, o.bias, torch.float32,
            b_layout=o.weight.layout,
        )  # fmt: skip
    if op == "scaled_mm_gate_residual":
        plain = o.residual[0, rows].float() + o.gate.float() * plain
    gate_same(f"{op} of {backend}", out[rows], plain.to(out.dtype))


def _figure(
    bench: Bench, ceiling: Ceiling, family: Family, mnk: tuple[int, int, int], backend: str, variant: Variant,
    ours: float, baseline: float,
) -> Figure:  # fmt: skip
    rate, wide = (testing.gemm_operations(*mnk) / seconds for seconds in (ours, baseline))
    m, n, k = mnk
    moved = testing.gemm_bytes(m, n, k, a_bits=variant.a_bits, b_bits=variant.b_bits)
    more = bench.facts(backend, variant.op) | {"timing": timing_of(bench), "scheme": variant.scheme}
    more |= {"tops": rate / 1e12, "gb_s": moved / ours / 1e9, "ceiling": "int8"}
    more |= {"of_ceiling": ceiling.of_operations(rate), "baseline_of_ceiling": ceiling.of_operations(wide, "bf16")}
    shape = {"model": family.name, "M": m, "N": n, "K": k}
    if variant.scheme != "W4A4":
        shape["scheme"] = variant.scheme
    return Figure(f"survey/{variant.op}", shape, ours * 1e6, baseline * 1e6, "us", CUBLAS, more)


def modulation(bench: Bench, ceiling: Ceiling, family: Family, n: int, k: int) -> Iterator[Figure]:
    """One row of 16-bit values times 4-bit codes, as modulation layers run: a share of the copy's bandwidth."""
    source, moved = Source(bench.device), testing.gemm_bytes(1, n, k, a_bits=16)
    sets = [Linear.draw(source, 1, n, k, bench.backends[0], family.group_size(k)) for _ in range(count_sets(moved))]
    contenders: dict[str, Any] = {BASELINE: (keeping(matmul, sets), [(s.x, s.weight) for s in sets])}
    for backend in bench.backends:
        arguments = [(s.x, prepared(s.packed, s.scale, backend), s.bias) for s in sets]
        if bench.passes(gate_values, backend, *arguments[0]):
            contenders[backend] = (keeping(under(backend, bench.device, multiply_values), sets), arguments)
    seconds = time_all(bench, contenders)
    baseline = seconds.pop(BASELINE)
    for backend, ours in seconds.items():
        more = bench.facts(backend) | {"timing": timing_of(bench), "scheme": "W4A16", "gb_s": moved / ours / 1e9}
        more |= {"ceiling": "copy", "of_ceiling": ceiling.of_bytes(moved / ours)}
        shape = {"model": family.name, "M": 1, "N": n, "K": k, "scheme": "W4A16"}
        yield Figure("survey/scaled_mm", shape, ours * 1e6, baseline * 1e6, "us", CUBLAS, more)
