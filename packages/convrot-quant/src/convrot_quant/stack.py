"""Stack: linears that read the same input, multiplied as one.

Quantized, a stack's codes, scales and biases lie one after the other in one storage, and the members' own tensors are
views of it: nothing is held twice, state dicts and LoRA loaders see separate layers as before. `join` does that, when a
block is fused and whenever it has moved. A member that moved on its own (offloading) is noticed by its address; the
members are then multiplied one by one, to the same bits, until they are joined again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convrot_kernels import scaled_mm
from convrot_quant.config import Scheme
from convrot_quant.linear import ConvLinear4bit

Operand = tuple[Tensor, Tensor | None]  # codes and scale, or rotated values and None
TILE = 16  # rows of the smallest block of any resident order: what lies on it can be stacked


class Part(NamedTuple):
    """Neighbours of one scheme: weight (N, K or K/2), weight_scale (N,), bias (N,) or None."""

    scheme: Scheme
    source: int  # which of a stack's operands it multiplies: schemes count in the order of their first part
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    layout: str

    def multiply(self, a: Tensor, a_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(..., K) -> (..., N)."""
        return scaled_mm(a, self.weight, a_scale, self.weight_scale, self.bias, dtype, b_layout=self.layout)


class Stack:
    """Plain ConvLinear4bit layers of one K, side by side."""

    def __init__(self) -> None:
        self._parts: tuple[Part, ...] = ()
        self._addresses: tuple[int, ...] = ()

    def __call__(
        self, members: Sequence[ConvLinear4bit], operand: Callable[[Scheme], Operand], dtype: torch.dtype
    ) -> Tensor:
        """-> (..., sum of N): `operand` makes what layers of a scheme multiply, once for each scheme."""
        made: list[Operand] = []
        results = []
        for part in self.parts(members):
            if part.source == len(made):
                made.append(operand(part.scheme))
            results.append(part.multiply(*made[part.source], dtype))
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)

    def parts(self, members: Sequence[ConvLinear4bit]) -> tuple[Part, ...]:
        """The members, neighbours of one scheme joined."""
        if torch.compiler.is_compiling():  # addresses cannot be traced; a block that is offloaded is told by its device
            # not bool(), which torch 2.11 cannot trace on a tuple
            moved = len(self._parts) > 0 and self._parts[0].weight.device != members[0].weight.device
        else:
            moved = self._addresses != _addresses(members)
            if moved:
                self.forget()  # what is joined would stay in memory beside what has moved
        return _parts_of([[member] for member in members]) if moved or not self._parts else self._parts

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def join(self, members: Sequence[ConvLinear4bit]) -> None:
        """Put the members' tensors into one storage, in place; those that have no values yet stay apart."""
        if self._parts and self._addresses == _addresses(members):
            return
        self._parts = ()  # one copy less while the next is made
        runs = [list(run) for _, run in groupby(members, key=_kind)]
        self._parts = _parts_of([part for run in runs for part in ([run] if _can_join(run) else map(_alone, run))])
        self._addresses = _addresses(members)

    def forget(self) -> None:
        """Hold no tensor any more; the members keep theirs, and are multiplied one by one."""
        self._parts, self._addresses = (), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return Stack()  # the copy's members have storages of their own

    def __reduce__(self) -> tuple[type[Stack], tuple[()]]:
        return Stack, ()


def _kind(member: ConvLinear4bit) -> tuple[Any, ...]:
    bias = None if member.bias is None else member.bias.dtype
    return member.scheme, member.weight_layout, member.weight.device, member.in_features, bias


def _can_join(run: Sequence[ConvLinear4bit]) -> bool:
    return len(run) > 1 and not run[0].weight.is_meta and all(member.out_features % TILE == 0 for member in run)


def _alone(member: ConvLinear4bit) -> list[ConvLinear4bit]:
    return [member]


def _parts_of(runs: Sequence[list[ConvLinear4bit]]) -> tuple[Part, ...]:
    schemes: list[Scheme] = []
    parts = []
    for run in runs:
        source = _position(schemes, run[0].scheme)
        if source == len(schemes):
            schemes.append(run[0].scheme)
        parts.append(_joined(run, source))
    return tuple(parts)


def _position(schemes: Sequence[Scheme], scheme: Scheme) -> int:
    """As .index, which torch.compile cannot trace on dataclasses; the end for one that is not there."""
    for i, known in enumerate(schemes):
        if known == scheme:
            return i
    return len(schemes)


def _joined(run: Sequence[ConvLinear4bit], source: int) -> Part:
    """One part, of which several members become views."""
    first, ends = run[0], [member.out_features for member in run]
    if len(run) == 1:
        return Part(first.scheme, source, first.weight, first.weight_scale, first.bias, first.weight_layout)
    weight = _in_one([member.weight for member in run])
    weight_scale = _in_one([member.weight_scale for member in run])
    bias = None if first.bias is None else _in_one([member.bias for member in run if member.bias is not None])
    for i, member in enumerate(run):
        member.weight.data = weight.split(ends)[i]
        member.weight_scale = weight_scale.split(ends)[i]
        if bias is not None and member.bias is not None:
            member.bias.data = bias.split(ends)[i]
    return Part(first.scheme, source, weight, weight_scale, bias, first.weight_layout)


def _in_one(tensors: Sequence[Tensor]) -> Tensor:
    joined = torch.cat([tensor.detach() for tensor in tensors])
    # a CUDA graph of torch.compile copies every input whose address might change, and this is no parameter
    torch._dynamo.mark_static_address(joined, guard=False)
    return joined


def _addresses(members: Sequence[ConvLinear4bit]) -> tuple[int, ...]:
    found: list[int] = []
    for member in members:  # past nn.Module's search for attributes: this is asked before every product
        parameters, scale = member._parameters, member._buffers["weight_scale"]
        for tensor in (parameters["weight"], scale, parameters["bias"]):
            if tensor is not None:
                found.append(tensor.data_ptr())
    return tuple(found)
