"""What the fused blocks of every family share: when they may run fused, and how their stacks follow the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convrot_kernels import low_rank_down
from convrot_quant.families.modulation import Layers, Modulations
from convrot_quant.linear import ConvLinear4bit, Side, Terms, terms
from convrot_quant.lora import unwrapped
from convrot_quant.stack import Stack

STREAMS = {"hidden_states", "encoder_hidden_states", "temb"}  # diffusers' models pass them by name


class Opened(NamedTuple):
    """Linears without the LoRA around them, and the low-rank terms that each is to get."""

    bases: tuple[ConvLinear4bit, ...]
    sides: tuple[tuple[Side, ...], ...]

    def each(self) -> list[Opened]:
        """One by one, for layers that do not read the same."""
        return [Opened((base,), (sides,)) for base, sides in zip(self.bases, self.sides, strict=True)]

    def terms(self, x: Tensor, **prologue: Any) -> Terms:
        """What the sides make of x (B, ..., K) after a prologue of low_rank_down; for the layers' joint product."""
        layers = [(base.out_features, sides) for base, sides in zip(self.bases, self.sides, strict=True)]
        return terms(layers, lambda down: low_rank_down(x, down, **prologue))


def opened(*layers: nn.Module) -> Opened | None:
    """What a fused block needs of its layers; None where one is no ConvLinear4bit that quantizes its activations, or
    an adapter on one is more than a low-rank term."""
    found = [unwrapped(layer) for layer in layers]
    fit = all(type(base) is ConvLinear4bit and base.scheme.activation_bits < 16 for base, _ in found)
    if not fit or any(sides is None for _, sides in found):
        return None
    return Opened(tuple(base for base, _ in found), tuple(sides or () for _, sides in found))


class FusedBlock(nn.Module):
    """What stands before diffusers' own class in the bases of a fused block; `fuse.py` calls `prepare`."""

    _stacks: dict[str, Stack]
    _inner: tuple[nn.Module, ...]
    _modulations: Modulations
    _vectors_of_each: int  # that a modulation layer gives
    fp8_attention = False  # attention.py sets it in the block, and takes it out again: CUDA graphs see that
    _were_hooked = False  # when the block last ran

    def stacked(self) -> Mapping[str, Sequence[nn.Module]]:
        """name -> layers that are multiplied as one."""
        raise NotImplementedError(f"{type(self).__name__} must name its stacks")

    @staticmethod
    def modulators(block: Any) -> tuple[Any, ...]:
        """The layers that make scales, shifts and gates: the stack "modulation", without asking for the others."""
        raise NotImplementedError("a family must name its modulation layers")

    def prepare(self, modulations: Modulations) -> None:
        """Once: what a fused forward needs beside the layers; `modulations` is the model's."""
        self._modulations = modulations
        self._stacks = {name: Stack() for name in self.stacked()}
        self._inner = tuple(module for module in self.modules() if module is not self)
        self.join()
        self.register_load_state_dict_post_hook(_join_after_loading)

    def join(self) -> None:
        """Put the weights of each stack whose layers are all quantized into one storage."""
        for name, members in self.stacked().items():
            bases = [unwrapped(member)[0] for member in members]
            if all(type(base) is ConvLinear4bit for base in bases):
                self._stacks[name].join(bases)

    def quantizes(self) -> bool:
        """Whether the layers that are multiplied as one quantize their activations: else the block never runs fused."""
        return all(opened(*members) is not None for name, members in self.stacked().items() if name != "modulation")

    def modulated_by(self) -> Layers:
        """The modulation layers of now."""
        return Layers(self._stacks["modulation"], self.modulators(self), self._vectors_of_each)

    def vectors(self, embedding: Tensor, given: Tensor | None) -> tuple[Tensor, ...]:
        """(B, C) -> scales, shifts and gates, each (B, C) and contiguous; `given` (vectors, B, C) if they are made."""
        if given is None and not torch.compiler.is_compiling():
            given = self._modulations.of(self, embedding)
        return (self.modulated_by().alone(embedding) if given is None else given).unbind(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self._compiled_call_impl is not None and self._hands_over(kwargs):
            kwargs = self.handed(**kwargs) | kwargs
        return super().__call__(*args, **kwargs)

    def _hands_over(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a compiled forward is handed more: not where somebody may change the arguments on their way."""
        untouched = "forward" not in vars(self) and not self._forward_pre_hooks
        return untouched and arguments.keys() >= STREAMS and not torch.is_grad_enabled()

    def handed(self, **arguments: Any) -> dict[str, Tensor | None]:
        """More arguments for a compiled forward: what it would have to make once more, for it sees no other block."""
        return {"vectors": self._modulations.of(self, arguments["temb"])}

    def has_hooks(self) -> bool:
        """Whether a hook is on a module inside, which a fused forward would not call.

        accelerate and diffusers hang theirs up as a `forward` of the instance.
        """
        hooked = any(_is_hooked(module) for module in self._inner)
        if torch.compiler.is_compiling():
            return hooked
        if hooked:
            for stack in self._stacks.values():
                stack.forget()  # hooks that move weights leave them there alone
        elif self._were_hooked:
            self.join()
        self._were_hooked = hooked
        return hooked

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.join()
        return self


def _is_hooked(module: nn.Module) -> bool:
    state = module.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return True
    if "forward" not in state:
        return False
    if torch.compiler.is_compiling():
        return True
    # hooks that were taken off leave the module its own method, as an attribute of the instance
    return getattr(state["forward"], "__func__", None) is not type(module).forward


def _join_after_loading(block: nn.Module, _: Any) -> None:
    if isinstance(block, FusedBlock):  # no more after unfuse_
        block.join()
