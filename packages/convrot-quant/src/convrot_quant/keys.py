"""FLUX.1's names: diffusers' (to_q, to_k, to_v) and the original layout's (fused qkv, linear1), both ways.

The mapping is diffusers' own: its single-file converter runs once on row numbers in the place of weights, and what
comes out says which rows went where. Scales and biases are per row, so moving rows is exact, quantized or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

from convrot_quant.contents import Contents, UnknownModelError
from convrot_quant.manifest import CheckpointError
from convrot_quant.tensorfile import Stored

FLUX = "FluxTransformer2DModel"
PREFIX = "model.diffusion_model."  # of whole checkpoints, and of some files with the diffusion model alone
ROWS = 7 * 3072  # of every probed tensor: diffusers' converter splits linear1 at FLUX.1's real sizes
_ORIGINAL_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_SCALE, _WEIGHT = ".weight_scale", ".weight"


@dataclass(frozen=True)
class Move:
    """Rows of one tensor that become rows of another, as shares of all rows."""

    source: str
    source_rows: tuple[Fraction, Fraction]
    target: str
    target_rows: tuple[Fraction, Fraction]

    def reversed(self) -> Move:
        """The way back."""
        return Move(self.target, self.target_rows, self.source, self.source_rows)

    def renamed(self, old: str, new: str) -> Move:
        """The same rows of `source` under another name, for what mirrors a weight."""
        source, target = (_swap_suffix(name, old, new) for name in (self.source, self.target))
        return Move(source, self.source_rows, target, self.target_rows)


class _Probe(dict[str, Any]):
    """A checkpoint of one block of each kind that has whatever is asked for: the numbers of its rows."""

    def __init__(self) -> None:
        super().__init__({f"{name}.0.": None for name in (*_ORIGINAL_BLOCKS, "guidance_in")})
        self.asked: list[str] = []

    def pop(self, key: str, *default: Any) -> Tensor:
        self.asked.append(key)
        return torch.arange(ROWS) + (len(self.asked) - 1) * ROWS


@cache
def _template() -> tuple[Move, ...]:
    """original -> diffusers, of a model with one double and one single block."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    probe = _Probe()
    found = convert_flux_transformer_checkpoint_to_diffusers(probe)
    return tuple(move for name, rows in found.items() for move in _moves(name, rows, probe.asked))


def _moves(target: str, rows: Tensor, sources: list[str]) -> Iterator[Move]:
    """One Move for each run of consecutive numbers."""
    breaks = (torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1).tolist()
    for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        source, first = divmod(int(rows[begin]), ROWS)
        taken = Fraction(first, ROWS), Fraction(first + end - begin, ROWS)
        yield Move(sources[source], taken, target, (Fraction(begin, len(rows)), Fraction(end, len(rows))))


def is_original(names: Mapping[str, object]) -> bool:
    """Whether these are FLUX.1's original names."""
    return any(name.startswith(tuple(f"{block}." for block in _ORIGINAL_BLOCKS)) for name in names)


def to_diffusers(contents: Contents) -> Contents:
    """FLUX.1 in the original layout -> the same rows under diffusers' names, with a config where it had none."""
    moves = [move for old in _ORIGINAL_BLOCKS for move in _expand(contents, old, _ORIGINAL_BLOCKS[old], old)]
    moved = _move(contents, [*moves, *_outside()])
    return moved if moved.config is not None else moved.with_config(flux_config(moved))


def to_original(contents: Contents) -> Contents:
    """FLUX.1 under diffusers' names -> the original layout; what is fused there must have one scheme."""
    name = (contents.config or {}).get("_class_name", "a model without a config")
    if name != FLUX:
        raise CheckpointError(
            f"{contents.source}: the original layout is known of FLUX.1 alone, not of {name}; keep diffusers' names "
            "(--keys diffusers)"
        )
    moves = [move for old, new in _ORIGINAL_BLOCKS.items() for move in _expand(contents, old, new, new)]
    return _move(contents, [move.reversed() for move in (*moves, *_outside())])


def _outside() -> list[Move]:
    return [move for move in _template() if not move.source.startswith(tuple(_ORIGINAL_BLOCKS))]


def _expand(contents: Contents, old: str, new: str, present: str) -> Iterator[Move]:
    """The moves of every block of a kind that the contents have under the name `present`."""
    pattern = re.compile(rf"{present}\.(\d{{1,6}})\.")
    found = {int(match[1]) for name in contents.tensors if (match := pattern.match(name))}
    if found != set(range(len(found))):
        raise CheckpointError(f"{contents.source}: blocks are missing: {present} has not 0 to {len(found) - 1}")
    for move in _template():
        if move.source.startswith(f"{old}."):
            for i in sorted(found):
                source, target = (f"{old}.{i}{move.source[len(old) + 2 :]}", f"{new}.{i}{move.target[len(new) + 2 :]}")
                yield replace(move, source=source, target=target)


def _move(contents: Contents, moves: list[Move]) -> Contents:
    """Every tensor under its new name. A tensor without a new name, or with rows that do not fit, is an error."""
    scales = [move.renamed(_WEIGHT, _SCALE) for move in moves if f"{_stem(move.source)}{_SCALE}" in contents.tensors]
    targets: dict[str, list[Move]] = {}
    for move in (*moves, *(move for move in scales if move.source.endswith(_SCALE))):
        targets.setdefault(move.target, []).append(move)
    tensors, schemes, used = {}, {}, set()
    for target, parts in targets.items():
        sources = [move.source for move in parts if move.source in contents.tensors]
        if not sources:
            continue  # of a model without it, such as the guidance of FLUX.1-schnell
        used.update(sources)
        if target.endswith(_WEIGHT) and (scheme := _one_scheme(contents, target, sources)) is not None:
            schemes[_stem(target)] = scheme
        tensors[target] = _join(contents, sorted(parts, key=lambda move: move.target_rows))
    unknown = contents.tensors.keys() - used
    if unknown:
        raise CheckpointError(f"{contents.source}: {min(unknown)!r} is no tensor of FLUX.1; this reader knows FLUX.1")
    return replace(contents, tensors=tensors, schemes=schemes, plan=None)


def _join(contents: Contents, parts: list[Move]) -> Stored:
    """Rows of one or more tensors, one below the other."""
    cut = []
    for move in parts:
        tensor = contents.tensors.get(move.source)
        if tensor is None:
            raise CheckpointError(f"{contents.source}: {move.source!r} is missing; copy the model again")
        count = tensor.shape[0] if tensor.shape else 0
        start, stop = (count * share for share in move.source_rows)
        if start.denominator != 1 or stop.denominator != 1 or not tensor.shape:
            raise CheckpointError(f"{contents.source}: {move.source!r} of {tensor.shape} cannot be split as FLUX.1's")
        cut.append(tensor.rows(int(start), int(stop)))
    first, total = cut[0], sum(tensor.shape[0] for tensor in cut)
    for move, tensor in zip(parts, cut, strict=True):
        share = move.target_rows[1] - move.target_rows[0]
        if (tensor.dtype, tensor.shape[1:]) != (first.dtype, first.shape[1:]) or tensor.shape[0] != total * share:
            raise CheckpointError(
                f"{contents.source}: {move.source!r} ({tensor.dtype}, {tensor.shape}) cannot be one tensor with "
                f"{parts[0].source!r} ({first.dtype}, {first.shape}); give such layers the same scheme, or keep "
                "diffusers' names (--keys diffusers)"
            )
    return Stored(first.dtype, (total, *first.shape[1:]), tuple(part for tensor in cut for part in tensor.parts))


def _one_scheme(contents: Contents, target: str, sources: list[str]) -> Any:
    schemes = {name: contents.schemes.get(_stem(name)) for name in sources}
    if len(set(schemes.values())) > 1:
        text = ", ".join(f"{_stem(name)} {scheme.name if scheme else '16-bit'}" for name, scheme in schemes.items())
        raise CheckpointError(
            f"{contents.source}: {_stem(target)!r} is one layer in the original layout, and here {text}; give them the "
            "same scheme, or keep diffusers' names (--keys diffusers)"
        )
    return next(iter(schemes.values()))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _swap_suffix(name: str, old: str, new: str) -> str:
    return name.removesuffix(old) + new if name.endswith(old) else name


def flux_config(contents: Contents) -> dict[str, Any]:
    """diffusers' config.json of a FLUX.1 that is known by its tensors alone."""
    sizes = {name: tensor.shape for name, tensor in contents.tensors.items()}
    try:
        heads_x_dim, in_channels = sizes["x_embedder.weight"]
        (head_dim,) = sizes["transformer_blocks.0.attn.norm_q.weight"]
        out_channels, joint = sizes["proj_out.weight"][0], sizes["context_embedder.weight"][1]
        pooled = sizes["time_text_embed.text_embedder.linear_1.weight"][1]
        heads = heads_x_dim // head_dim
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise UnknownModelError(
            f"{contents.source}: it lacks tensors of FLUX.1; give its config.json (--config)"
        ) from None
    if head_dim != 128:
        raise UnknownModelError(
            f"{contents.source}: heads of {head_dim} are not FLUX.1's 128, so that its rotary axes are not known; "
            "give its config.json (--config)"
        )
    blocks = {
        kind: {name.split(".")[1] for name in sizes if name.startswith(f"{kind}.")}
        for kind in _ORIGINAL_BLOCKS.values()
    }
    return {
        "_class_name": FLUX,
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": len(blocks["transformer_blocks"]),
        "num_single_layers": len(blocks["single_transformer_blocks"]),
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in sizes,
        "axes_dims_rope": [16, 56, 56],
    }
