"""Attention with e4m3 operands against cuDNN's in bf16: alone, and from the projection that holds q, k and v.

Alone, operands lie there as norm_rope_fp8 and norm_rope leave them; from the projection, those kernels run first. Both
sides are compared with attention in fp32 of the values that neither has rounded: Gaussian ones.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from convrot_bench.bench import Bench, GateError
from convrot_bench.ops.clock import is_gpu, time_all, timing_of
from convrot_bench.ops.gates import gate_close, relative_l2
from convrot_bench.ops.problems import Source, count_sets, keeping
from convrot_bench.ops.row_ops import norm_weights, rotary_tables
from convrot_bench.results import Figure
from convrot_kernels import attention_fp8, norm_rope, norm_rope_fp8, use_backend
from convrot_kernels.backends import cudnn
from convrot_kernels.reference import fp8_of, to_fp8

CASE = "attention_fp8"
WITH_NORM = f"{CASE}_with_norm"
ERROR = 0.15  # about 0.08 is what e4m3 leaves: an output is a mean of many values, far smaller than each
HEADS = [0, -1]  # that are compared
ROWS = 1024  # queries at a time: the scores of all would not fit


class Operands(NamedTuple):
    """What each side is called with, and q, k, v fp32 (B, S, 2, D) of the heads that are compared."""

    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]


class Way(NamedTuple):
    """One row: what both sides read, and how they compute (B, S, H, D) from it."""

    case: str
    baseline: str
    draw: Callable[[Source, int, int, int], Operands]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]


def measure(bench: Bench, tokens: int, heads: int, size: int) -> Iterator[Figure]:
    """A row a way, of one sample of `heads` heads of `size` columns."""
    if is_gpu(bench.device) and (reason := cudnn.why_not(torch.device(bench.device))):
        raise GateError(f"{CASE} does not run on {bench.device}: {reason}")
    source = Source(bench.device)
    for way in WAYS:
        sets = [way.draw(source, tokens, heads, size)]
        sets += [way.draw(source, tokens, heads, size) for _ in range(1, count_sets(_bytes(sets[0].ours)))]
        yield from _compare(bench, way, sets, {"tokens": tokens, "heads": heads, "D": size})


def _compare(bench: Bench, way: Way, sets: list[Operands], shape: dict[str, int]) -> Iterator[Figure]:
    first, kernel = sets[0], "cuDNN" if is_gpu(bench.device) else "torch"
    name, exact = way.baseline.format(kernel), attended(*first.exact)
    outs = {way.case: way.ours(*first.ours), name: way.theirs(*first.theirs)}
    passed = [bench.passes(gate, side, out, exact) for side, out in outs.items()]
    if not all(passed):
        return
    errors = [relative_l2(out[:, :, HEADS], exact) for out in outs.values()]
    del outs
    contenders = {
        "ours": (keeping(way.ours, sets), [s.ours for s in sets]),
        "theirs": (keeping(way.theirs, sets), [s.theirs for s in sets]),
    }
    seconds = time_all(bench, contenders)
    ours, theirs = seconds["ours"], seconds["theirs"]
    operations = 4 * shape["tokens"] ** 2 * shape["heads"] * shape["D"]
    more = bench.facts("auto", CASE) | {"timing": timing_of(bench)} | versions()
    more |= {"backend": more["auto"], "relative_l2": errors[0], "baseline_relative_l2": errors[1]}
    more |= {"tflops": operations / ours / 1e12, "baseline_tflops": operations / theirs / 1e12}
    yield Figure(way.case, shape, ours * 1e6, theirs * 1e6, "us", name, more)


def versions() -> dict[str, Any]:
    """What multiplies on a GPU: cuDNN's number (91900 is 9.19.0) and its frontend's version."""
    if cudnn.why_not(torch.device("cuda")) is not None:
        return {}
    return {"cudnn": torch.backends.cudnn.version(), "cudnn_frontend": version("nvidia-cudnn-frontend")}


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp32 (B, S, H, D) -> softmax(q k^T / sqrt(D)) v, fp32 (B, S, H, D), some rows at a time."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = [torch.softmax(rows @ k.mT * k.shape[-1] ** -0.5, dim=-1) @ v for rows in q.split(ROWS, dim=2)]
    return torch.cat(parts, dim=2).transpose(1, 2)


def gate(side: str, out: Tensor, exact: Tensor) -> None:
    """out (B, S, H, D) finite, and on the compared heads what fp32 says."""
    if not bool(torch.isfinite(out).all()):
        raise GateError(f"{side} at {tuple(out.shape)}: its output holds NaN or inf")
    gate_close(side, out[:, :, HEADS], exact, ERROR)


# what is measured


def _apart(source: Source, tokens: int, heads: int, size: int) -> Operands:
    """q, k, v as they are read by attention."""
    exact = [source.normal(1, tokens, heads, size) for _ in range(3)]
    q, k, v = exact
    theirs = tuple(x.bfloat16() for x in exact)
    return Operands((to_fp8(q), to_fp8(k), *fp8_of(v)), theirs, tuple(x[:, :, HEADS] for x in exact))


def _projection(source: Source, tokens: int, heads: int, size: int) -> Operands:
    """q, k, v side by side in bf16, the norms' weights, cos and sin."""
    x = source.normal(1, tokens, 3 * heads * size).bfloat16()
    (q_weight, k_weight), tables = norm_weights(source, size, 2), rotary_tables(source, tokens, size)
    q, k, v = (part[:, :, HEADS].float() for part in x.unflatten(-1, (3, heads, size)).unbind(2))
    with use_backend("reference"):  # of fp32 it rounds nothing
        q, k = norm_rope(torch.cat((q, k), dim=2).flatten(2), q_weight, k_weight, *tables)
    read = (x, q_weight, k_weight, *tables)
    return Operands(read, read, (q, k, v))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bf16 (B, S, H, D), on a GPU by cuDNN."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _norm_and_attend_fp8(x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention_fp8(*norm_rope_fp8(x, q_weight, k_weight, cos, sin))


def _norm_and_attend(x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = x.shape[-1] // 3
    qk, v = x.split((2 * width, width), dim=-1)
    return _attend(*norm_rope(qk, q_weight, k_weight, cos, sin), v.unflatten(-1, (-1, len(q_weight))))


WAYS = (
    Way(CASE, "{} attention bf16", _apart, attention_fp8, _attend),
    Way(WITH_NORM, "norm_rope, {} attention bf16", _projection, _norm_and_attend_fp8, _norm_and_attend),
)
