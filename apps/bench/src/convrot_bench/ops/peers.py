"""The whole op against comfy-kitchen's, which computes the same method: weights and activations in a rotated basis."""

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.ops.clock import capturable
from convrot_bench.ops.gates import gate_peer, relative_l2
from convrot_bench.ops.linears import TIMING, Linear, agrees, draw_sets, whole_op
from convrot_bench.ops.problems import keeping
from convrot_bench.results import Figure
from convrot_kernels import testing

NAME, MODULE = "comfy-kitchen", "comfy_kitchen.tensor.convrot_w4a4"
EVENTS = "cuda events, one call at a time, on both sides: no CUDA graph takes comfy-kitchen's call"


def why_not() -> str | None:
    """None where comfy-kitchen can be measured, else the reason."""
    if find_spec("comfy_kitchen") is None:
        return "comfy-kitchen is not installed, run `pip install 'convrot-bench[peers]'`"
    try:
        import_module(MODULE)
    except (ImportError, OSError) as error:
        return f"comfy-kitchen does not import: {error}"
    return None


def linear_w4a4_vs_comfy_kitchen(bench: Bench, m: int, n: int, k: int) -> Iterator[Figure]:
    """Both sides take the same x, bias and 16-bit weight, quantized by each in its own way beforehand."""
    peer = import_module(MODULE)

    def theirs(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = peer.convrot_w4a4_linear(x, weight, scale, bias=bias)
        return out

    sets, backend = draw_sets(bench, m, n, k), bench.backends[0]
    weights = [peer.quantize_convrot_w4a4_weight(s.weight) for s in sets]
    arguments = [(s.x, *weight, s.bias) for s, weight in zip(sets, weights, strict=True)]
    ours, our_arguments = whole_op(bench, backend, sets)
    errors = _error(theirs(*arguments[0]), sets[0]), _error(ours(*our_arguments[0]), sets[0])
    if not (agrees(bench, backend, sets[0]) and bench.passes(gate_peer, f"{NAME} at M={m}, N={n}, K={k}", errors[0])):
        return
    contenders = {"ours": (keeping(ours, sets), our_arguments), "theirs": (keeping(theirs, sets), arguments)}
    seconds, timing = _time(contenders)
    more = bench.facts(backend) | {"timing": timing, "tops": testing.gemm_operations(m, n, k) / seconds["ours"] / 1e12}
    more |= {"baseline_l2": errors[0], "our_l2": errors[1], "peer_version": _version()}
    figures = seconds["ours"] * 1e6, seconds["theirs"] * 1e6
    yield Figure("linear_w4a4_vs_comfy_kitchen", {"M": m, "N": n, "K": k}, *figures, "us", NAME, more)


def _version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "unknown"


def _error(out: Tensor, one: Linear) -> float:
    """Relative L2 against the 16-bit product, summed in fp32."""
    return relative_l2(out, one.x.float() @ one.weight.float().t() + one.bias.float())


def _time(contenders: dict[str, Any]) -> tuple[dict[str, float], str]:
    if capturable(*contenders["theirs"]):
        return testing.time_graphs(contenders), TIMING
    timed = {n: testing.time_median(f, a, repeats=200, warmup=50) for n, (f, a) in contenders.items()}
    return timed, EVENTS
