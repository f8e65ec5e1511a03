"""The ops that multiply nothing, in the survey: rotations, quantizers, norms, packing. Measured in bytes a second.

The baseline is a copy of the bytes that the op reads and writes, at the highest rate of this run: what no kernel beats.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.ops.clock import FEW, SINGLE, is_gpu, time_all, time_singly, timing_of
from convrot_bench.ops.gates import ends, gate_close, gate_codes, gate_same
from convrot_bench.ops.problems import Source, count_sets, keeping, under
from convrot_bench.ops.rotations import PROLOGUES
from convrot_bench.ops.rotations import Variant as Rotation
from convrot_bench.results import Figure
from convrot_bench.shapes import Family
from convrot_kernels import (
    low_rank_down,
    low_rank_up,
    norm_rope,
    norm_rope_joint,
    pack_int4,
    prepare_weight,
    restore_weight,
    rotate,
    rotate_quantize,
    unpack_int4,
    use_backend,
)
from convrot_kernels.dispatch import ORDER

CASE, COPY = "survey/", "copy at the highest rate"
ROUNDED = 5e-3  # relative error of what is rounded to bf16 once or twice in another order
FIRST = 1024  # rows compared with the reference, beside the last
RANK = 16  # of low-rank terms
REFERENCED = ("rotate", "rotate_quantize")  # timed on the reference too, once a run


@dataclass(frozen=True)
class RowOp:
    """One op at one shape: what it is called with, the bytes it moves, and its gate(backend, call, arguments)."""

    op: str
    shape: dict[str, Any]
    moved: int
    draw: Callable[[Source], tuple[Any, ...]]
    call: Callable[..., Any]
    gate: Callable[[str, Callable[..., Any], tuple[Any, ...]], None]

    def backends(self, bench: Bench) -> tuple[str, ...]:
        """Those of the run that have the op; the reference for what only it has."""
        order = ORDER.get(self.op, ("reference",))
        found = tuple(name for name in bench.backends if name in order)
        return found or ("reference",)


def measure(bench: Bench, ceiling: Ceiling, ops: Sequence[RowOp]) -> Iterator[Figure]:
    """All of them on every backend, timed together."""
    source = Source(bench.device)
    contenders: dict[str, Any] = {}
    chosen: dict[str, tuple[str, RowOp]] = {}
    for op in ops:
        sets = [op.draw(source) for _ in range(count_sets(op.moved))]
        for backend in op.backends(bench):
            run = under(backend, bench.device, op.call)
            if bench.passes(op.gate, backend, run, sets[0]):
                key = f"{backend} {op.op}"
                contenders[key], chosen[key] = (keeping(run, sets), sets), (backend, op)
    seconds = time_all(bench, contenders) if contenders else {}
    for key, (backend, op) in chosen.items():
        yield _figure(bench, ceiling, op, backend, seconds[key], timing_of(bench))
    for op in ops:
        if is_gpu(bench.device) and op.op in REFERENCED and op.shape["model"] == "FLUX.1-dev":
            contender = {"reference": (under("reference", bench.device, op.call), [op.draw(source)])}
            yield _figure(bench, ceiling, op, "reference", time_singly(contender, FEW)["reference"], SINGLE)


def _figure(bench: Bench, ceiling: Ceiling, op: RowOp, backend: str, ours: float, timing: str) -> Figure:
    rate = op.moved / ours
    more = bench.facts(backend, op.op) if op.op in ORDER else {"backend": backend}
    more |= {"timing": timing, "gb_s": rate / 1e9, "ceiling": "copy", "of_ceiling": ceiling.of_bytes(rate)}
    return Figure(CASE + op.op, op.shape, ours * 1e6, ceiling.seconds(op.moved) * 1e6, "us", COPY, more)


# what is measured


def rotations(family: Family, k: int) -> list[RowOp]:
    """rotate, and rotate_quantize with the prologues that the family has at this K."""
    m, group = family.tokens, family.group_size(k)
    shape = {"model": family.name, "M": m, "K": k} | ({"group_size": group} if group != 256 else {})
    found = []
    for prologue in family.prologues[k]:
        rotation = Rotation(prologue)
        found.append(_quantizer(rotation, shape, m, k, group))
    if "none" in family.prologues[k]:
        found.append(
            RowOp(
                "rotate", shape, 4 * m * k, lambda source: (source.inputs(m, k),),
                lambda x: rotate(x, group), _gate_rotate(group),
            )
        )  # fmt: skip
    return found


def _quantizer(rotation: Rotation, shape: dict[str, Any], m: int, k: int, group: int) -> RowOp:
    op = PROLOGUES[rotation.prologue]

    def run(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return op(*arguments, group_size=group)

    def gate(backend: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        gate_codes(backend, op, arguments, {"group_size": group}, rotation.prologue != "modulate")

    name = getattr(op, "__name__", "op")
    return RowOp(name, shape, rotation.moved(m, k), lambda source: rotation.arguments(source, m, k), run, gate)


def _gate_rotate(group: int) -> Callable[[str, Callable[..., Any], tuple[Any, ...]], None]:
    def gate(backend: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        (x,) = arguments
        rows = ends(len(x), FIRST, x.device)
        with use_backend("reference"):
            wanted = rotate(x[rows], group)
        gate_close(f"rotate of {backend}", call(x)[rows], wanted, ROUNDED)

    return gate


def norms(family: Family) -> list[RowOp]:
    """norm_rope of a single stream, and of two joined, where the family has such heads."""
    if family.heads is None:
        return []
    (heads, size), s, t = family.heads, family.tokens, family.text
    columns = heads * size
    shape = {"model": family.name, "M": s, "heads": heads, "D": size}

    def single(source: Source) -> tuple[Tensor, ...]:
        return (source.inputs(s, 2 * columns)[None], *norm_weights(source, size, 2), *rotary_tables(source, s, size))

    tables = 8 * s * size
    one = RowOp("norm_rope", shape, 8 * s * columns + tables, single, norm_rope, _gate_norm(norm_rope))
    if family.streams == 1:
        return [one]

    def joint(source: Source) -> tuple[Tensor, ...]:
        text, image = source.inputs(t, 3 * columns)[None], source.inputs(s - t, 3 * columns)[None]
        return (text, image, *norm_weights(source, size, 4), *rotary_tables(source, s, size))

    moved = 12 * s * columns + tables
    return [one, RowOp("norm_rope_joint", shape, moved, joint, norm_rope_joint, _gate_norm(norm_rope_joint))]


def norm_weights(source: Source, size: int, count: int) -> list[Tensor]:
    """(D,) bf16 each, around 1."""
    return [1 + 0.1 * source.vector(size) for _ in range(count)]


def rotary_tables(source: Source, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D) fp32, the same for both of a pair."""
    angles = source.normal(tokens, size // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _gate_norm(op: Callable[..., Any]) -> Callable[[str, Callable[..., Any], tuple[Any, ...]], None]:
    def gate(backend: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        with use_backend("reference"):
            wanted = op(*arguments)
        name = f"{getattr(op, '__name__', 'op')} of {backend}"
        for out, exact in zip(call(*arguments), wanted, strict=True):
            gate_close(name, out, exact, ROUNDED)

    return gate


def low_rank(family: Family) -> list[RowOp]:
    """A term of RANK beside the family's widest linear: its input read once, its output read and written once."""
    n, k = max(family.linears, key=lambda nk: nk[0] * nk[1])
    m, more = family.tokens, {"model": family.name, "M": family.tokens, "rank": RANK}

    def down(source: Source) -> tuple[Tensor, ...]:
        return source.inputs(m, k), source.weight(RANK, k)

    def up(source: Source) -> tuple[Tensor, ...]:
        return source.inputs(m, n), source.inputs(m, RANK), source.weight(n, RANK)

    def project(x: Tensor, term: Tensor) -> Tensor:
        return low_rank_down(x, [term])

    def add(out: Tensor, low: Tensor, term: Tensor) -> Tensor:
        low_rank_up(out, low, [term])
        return out

    return [
        RowOp("low_rank_down", more | {"K": k}, 2 * m * k, down, project, _gate_low_rank(project)),
        RowOp("low_rank_up", more | {"N": n}, 4 * m * n, up, add, _gate_low_rank(add)),
    ]


def _gate_low_rank(op: Callable[..., Tensor]) -> Callable[[str, Callable[..., Any], tuple[Any, ...]], None]:
    def gate(backend: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        first, *rest = arguments
        with use_backend("reference"):
            wanted = op(first.clone(), *rest)
        gate_close(f"low-rank term of {backend}", call(first.clone(), *rest), wanted, ROUNDED)

    return gate


def packing(family: Family) -> list[RowOp]:
    """What a weight goes through when it is loaded, at the family's widest."""
    n, k = max(family.linears, key=lambda nk: nk[0] * nk[1])
    shape, moved = {"model": family.name, "N": n, "K": k}, n * k * 3 // 2

    def codes(source: Source) -> tuple[Tensor]:
        return (rotate_quantize(source.weight(n, k), family.group_size(k))[0],)

    def packed(source: Source) -> tuple[Tensor]:
        return (pack_int4(*codes(source)),)

    layout = "blocks16x32"
    return [
        RowOp("pack_int4", shape, moved, codes, pack_int4, _there_and_back(unpack_int4)),
        RowOp("unpack_int4", shape, moved, packed, unpack_int4, _there_and_back(pack_int4)),
        RowOp(
            "prepare_weight", shape, n * k, packed, lambda weight: prepare_weight(weight, layout),
            _there_and_back(lambda weight: restore_weight(weight, layout)),
        ),
        RowOp(
            "restore_weight", shape, n * k, packed, lambda weight: restore_weight(weight, layout),
            _there_and_back(lambda weight: prepare_weight(weight, layout)),
        ),
    ]  # fmt: skip


def _there_and_back(inverse: Callable[..., Any]) -> Callable[[str, Callable[..., Any], tuple[Any, ...]], None]:
    def gate(backend: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        gate_same(f"{backend}: there and back", inverse(call(*arguments)), arguments[0])

    return gate
