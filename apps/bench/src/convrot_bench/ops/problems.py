"""Tensors and call wrappers of the op benchmarks; random values are drawn where they are used, never zeros.

testing.make_inputs draws on the CPU, so that values are the same everywhere: minutes for these shapes.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convrot_kernels import available_backends, preferred_codes, preferred_layout, prepare_weight, use_backend
from convrot_kernels.dispatch import AUTO, pick

TOUCHED = 300e6  # bytes of one round over all sets of tensors: several times a GPU's L2
FEWEST, MOST = 3, 48  # sets


def backends_of(device: str) -> tuple[str, ...]:
    """On a GPU the fast ones, compiled first; elsewhere all that run."""
    runs = [name for name, reason in available_backends(device).items() if reason is None]
    if torch.device(device).type != "cuda":
        return tuple(runs)
    return tuple(name for name in ("cutlass", "triton") if name in runs)


class Source:
    """Random tensors on a device, seeded."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """fp32, standard normal."""
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def inputs(self, m: int, k: int) -> Tensor:
        """(M, K) bf16 with the outliers of testing.make_inputs: channels x20, tokens with a mean of 6."""
        x, device = self.normal(m, k), self.generator.device
        x[:, torch.randperm(k, generator=self.generator, device=device)[: max(1, k // 128)]] *= 20
        x[torch.randperm(m, generator=self.generator, device=device)[: m // 16]] += 6
        return x.bfloat16()

    def weight(self, n: int, k: int) -> Tensor:
        """(N, K) bf16."""
        return self.normal(n, k).mul_(k**-0.5).bfloat16()

    def vector(self, n: int) -> Tensor:
        """(N,) bf16."""
        return self.normal(n).bfloat16()


def count_sets(touched: float) -> int:
    """How many sets of tensors, if a call touches so many bytes."""
    return min(MOST, max(FEWEST, math.ceil(TOUCHED / touched)))


class Weight(NamedTuple):
    """4-bit codes in a backend's resident order, and their scale (N,)."""

    codes: Tensor
    scale: Tensor
    layout: str


def prepared(packed: Tensor, scale: Tensor, backend: str) -> Weight:
    """Row-major packed codes (N, K/2) -> the order that the backend reads fastest."""
    with use_backend(backend):
        layout = preferred_layout(packed.device)
    return Weight(prepare_weight(packed, layout), scale, layout)


def packs_codes(device: str, backend: str) -> bool:
    """Whether the backend reads 4-bit activation codes fastest when they are packed."""
    with use_backend(backend):
        return preferred_codes(device) == "packed"


def route(backend: str, device: torch.device | str) -> str:
    """What use_backend is told: auto where it takes that backend by itself, since that is the path that users take."""
    return AUTO if pick("scaled_mm", device)[0] == backend else backend


def under(backend: str, device: torch.device | str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run by the backend."""
    chosen = route(backend, device)

    def run(*arguments: Any) -> Any:
        with use_backend(chosen):
            return function(*arguments)

    return run


def keeping(function: Callable[..., Any], sets: Sequence[Any]) -> Callable[..., None]:
    """`function`, its last results kept alive, one a set: outputs go round the memory as the inputs do."""
    results: deque[Any] = deque(maxlen=len(sets))

    def run(*arguments: Any) -> None:
        results.append(function(*arguments))

    return run
