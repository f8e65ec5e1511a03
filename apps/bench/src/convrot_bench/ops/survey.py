"""The survey: every op and backend at the shapes of several models, as shares of what this GPU reaches in this run."""

from collections.abc import Iterator, Sequence

from convrot_bench.bench import Bench, Job
from convrot_bench.ops import products, row_ops
from convrot_bench.ops.ceiling import Ceiling
from convrot_bench.results import Figure
from convrot_bench.shapes import FAMILIES, MINI_FLUX, Family

CASE = "survey/"  # and the op: a row's case


def families_of(names: Sequence[str], real: bool) -> tuple[Family, ...]:
    """The named ones; by default all real ones, or the toy where there is no GPU."""
    known = {family.name: family for family in (*FAMILIES, MINI_FLUX)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"ops: unknown family {unknown[0]!r}; use some of {', '.join(known)}")
    return tuple(known[name] for name in names) or (FAMILIES if real else (MINI_FLUX,))


def jobs(ceiling: Ceiling, families: Sequence[Family]) -> list[Job]:
    """A job a product, then one a (M, K) of what works on rows, then one of each family's other ops."""
    found = []
    for family in families:
        shapes = [(family.tokens, *linear) for linear in family.linears]
        shapes += [(family.text, *linear) for linear in family.linears[1:3]]
        found += [_products(ceiling, family, *mnk) for mnk in shapes]
        found += [_rows(ceiling, family, k) for k in family.prologues]
        found.append(_rest(ceiling, family))
    return found


def _products(ceiling: Ceiling, family: Family, m: int, n: int, k: int) -> Job:
    def measure(bench: Bench) -> Iterator[Figure]:
        return products.measure(bench, ceiling, family, m, n, k)

    return Job(f"survey {family.name} {m} x {n} x {k}", measure)


def _rows(ceiling: Ceiling, family: Family, k: int) -> Job:
    def measure(bench: Bench) -> Iterator[Figure]:
        return row_ops.measure(bench, ceiling, row_ops.rotations(family, k))

    return Job(f"survey {family.name} rotate {family.tokens} x {k}", measure)


def _rest(ceiling: Ceiling, family: Family) -> Job:
    def measure(bench: Bench) -> Iterator[Figure]:
        if family.modulation:
            yield from products.modulation(bench, ceiling, family, *family.modulation)
        for op in (*row_ops.norms(family), *row_ops.low_rank(family), *row_ops.packing(family)):
            yield from row_ops.measure(bench, ceiling, [op])

    return Job(f"survey {family.name} modulation, norms, low-rank terms and packing", measure)
