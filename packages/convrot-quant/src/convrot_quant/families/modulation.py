"""Modulation: scales, shifts and gates of every block, which depend on the embedding of a step alone.

The second fused block that meets an embedding makes those of all blocks that are known from steps before, in one
product: reading FLUX.1-dev's 1.6 GB in one launch takes less than reading them in 57. The first makes its own, so that
the GPU has a block to work at while the host prepares. What cannot be made ahead (a layer with an adapter or in 16
bits, weights that are or may be elsewhere, code that trains or is compiled as a whole) each block makes for itself, to
the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from convrot_kernels import scaled_mm_cat
from convrot_quant.config import Scheme
from convrot_quant.linear import ConvLinear4bit, operand
from convrot_quant.stack import Operand, Part, Stack


class Layers(NamedTuple):
    """The modulation layers of a block; each gives `of_each` vectors."""

    stack: Stack
    linears: Sequence[Any]
    of_each: int

    def are_plain(self) -> bool:
        """Whether their products are all there is to them."""
        # not `not`, which torch.compile cannot trace on a tuple
        return all(type(linear) is ConvLinear4bit and len(linear.sides()) == 0 for linear in self.linears)

    def lie_on(self, device: torch.device) -> bool:
        """Whether they can be multiplied there as they are."""
        return all(linear.weight.device == device for linear in self.linears)

    def alone(self, embedding: Tensor, operands: dict[Scheme, Operand] | None = None) -> Tensor:
        """(B, C) -> (vectors, B, C), contiguous: of silu(embedding), for one block; operands: what is made of it."""
        if self.are_plain():
            made = {} if operands is None else operands
            rows = self.stack(self.linears, lambda scheme: _operand(embedding, scheme, made), embedding.dtype)
        else:
            rows = torch.cat([linear(F.silu(embedding)) for linear in self.linears], dim=-1)
        return _vectors(rows, self.of_each * len(self.linears))


class Block(Protocol):
    """A block that is modulated."""

    def modulated_by(self) -> Layers: ...


class _Kind(NamedTuple):
    """Parts of one kind are multiplied together."""

    scheme: Scheme
    layout: str
    bias: torch.dtype | None
    width: int  # of a vector


class _Moment(NamedTuple):
    """When something was made of an embedding: it holds for as long as nothing of this changes."""

    version: int
    captured: bool  # in a CUDA graph: it has values only once that is replayed (blocks captured apart: run them before)


@dataclass
class _Made:
    """Of one embedding, and with it gone."""

    moment: _Moment
    first: ReferenceType[Any]  # the block that met it
    operands: dict[Scheme, Operand]
    # of all other blocks, until they take theirs; None: not made yet
    vectors: WeakKeyDictionary[Any, Tensor] | None = None


class Modulations:
    """What the fused blocks of a model share. They come to be known as they run; a copy of a model starts afresh."""

    def __init__(self) -> None:
        self._blocks: WeakKeyDictionary[Any, None] = WeakKeyDictionary()  # a set in the order of the model
        self._made: Any = WeakTensorKeyDictionary()  # embedding -> _Made

    def of(self, block: Block, embedding: Tensor) -> Tensor | None:
        """(B, C) -> (vectors, B, C), contiguous: those of `block`; None where it has to make them itself."""
        if torch.is_grad_enabled():
            return None
        moment = _Moment(_version(embedding), _is_captured(embedding))
        made: _Made | None = self._made.get(embedding)
        if made is not None and moment.captured and not made.moment.captured:
            return None  # who captures a block alone may write to its embedding between replays
        # met by its first block again, it may hold something else: not every write counts as one
        if made is None or made.moment != moment or made.first() is block:
            made = self._made[embedding] = _Made(moment, ref(block), {})
        elif made.vectors is None:
            known = [reference() for reference in self._blocks.keyrefs()]  # at once: other threads may add to them
            others = [other for other in known if other is not None and other is not made.first()]
            made.vectors = WeakKeyDictionary(_of_all(others, embedding, made.operands))
        # once: a block that runs again on an embedding may have other weights by then
        vectors = None if made.vectors is None else made.vectors.pop(block, None)
        if vectors is None and (layers := block.modulated_by()).are_plain() and layers.lie_on(embedding.device):
            self._blocks[block] = None
            vectors = layers.alone(embedding, made.operands)
        return vectors

    def __deepcopy__(self, memo: dict[int, Any]) -> Modulations:
        return Modulations()

    def __reduce__(self) -> tuple[type[Modulations], tuple[()]]:
        return Modulations, ()


def _of_all(blocks: Sequence[Block], embedding: Tensor, operands: dict[Scheme, Operand]) -> dict[Block, Tensor]:
    """Of those whose layers can be multiplied together."""
    runs: dict[_Kind, list[tuple[Block, int, Part]]] = {}
    for block in blocks:
        layers = block.modulated_by()
        # whoever hangs a forward of his own on a block may be copying its weights to where they seem to lie already
        if "forward" in vars(block) or not (layers.are_plain() and layers.lie_on(embedding.device)):
            continue
        width = layers.linears[0].out_features // layers.of_each
        for i, part in enumerate(layers.stack.parts(layers.linears)):
            kind = _Kind(part.scheme, part.layout, None if part.bias is None else part.bias.dtype, width)
            runs.setdefault(kind, []).append((block, i, part))
    made: dict[Block, dict[int, Tensor]] = {}
    for kind, members in runs.items():
        parts = [part for *_, part in members]
        rows = _product(kind, parts, _operand(embedding, kind.scheme, operands), embedding.dtype)
        counts = [len(part.weight_scale) // kind.width for part in parts]
        for (block, i, _), vectors in zip(members, _vectors(rows, sum(counts)).split(counts), strict=True):
            made.setdefault(block, {})[i] = vectors
    return {block: _in_order(vectors) for block, vectors in made.items()}


def _operand(embedding: Tensor, scheme: Scheme, made: dict[Scheme, Operand]) -> Operand:
    """What layers of the scheme multiply: made once."""
    if scheme not in made:
        made[scheme] = operand(F.silu(embedding), scheme)
    return made[scheme]


def _product(kind: _Kind, parts: Sequence[Part], x: Operand, dtype: torch.dtype) -> Tensor:
    """-> (B, sum of N)."""
    a, a_scale = x
    bias = [part.bias for part in parts if part.bias is not None]
    weights, scales = [part.weight for part in parts], [part.weight_scale for part in parts]
    return scaled_mm_cat(a, weights, a_scale, scales, bias, dtype, b_layout=kind.layout)


def _version(tensor: Tensor) -> int:
    """Grows with every write; inference tensors do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _is_captured(tensor: Tensor) -> bool:
    """Whether what is done with it now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _in_order(parts: dict[int, Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(parts))])


def _vectors(rows: Tensor, count: int) -> Tensor:
    """(B, count C) -> (count, B, C), contiguous."""
    return rows.view(len(rows), count, -1).transpose(0, 1).contiguous()
