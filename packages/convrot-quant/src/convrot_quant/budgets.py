"""Budget: what a plan may cost, in bytes, in seconds or in both; Cost: what layers do."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What a plan may cost: bytes of the whole saved transformer, seconds of one step's linears, or both."""

    bytes: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bytes, self.seconds) if value is not None]
        if not given or not all(0 < value < math.inf for value in given):
            raise ValueError(
                f"Budget: bytes, seconds or both must be positive; got bytes={self.bytes}, seconds={self.seconds}"
            )


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of layers."""

    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.seconds + other.seconds)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.bytes - other.bytes, self.seconds - other.seconds)

    def share(self, budget: Budget) -> float:
        """The part of the budget that this is; of two limits the sum, so that neither is spent for nothing."""
        parts = ((self.bytes, budget.bytes), (self.seconds, budget.seconds))
        return sum(spent / limit for spent, limit in parts if limit is not None)

    def fits(self, budget: Budget) -> bool:
        """Whether every limit holds."""
        parts = ((self.bytes, budget.bytes), (self.seconds, budget.seconds))
        return all(spent <= limit for spent, limit in parts if limit is not None)


def decimal_size(size: int) -> str:
    """Bytes as budgets are given: 6.0598 GB, 16.5 MB; to 10 kB."""
    return f"{size / 1e9:.5f}".rstrip("0").rstrip(".") + " GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def too_small(least: Cost, budget: Budget) -> str:
    """What the smallest plan costs, rounded up so that it can be given back."""
    texts = []
    if budget.bytes is not None:
        up = math.ceil(least.bytes / 1e4) * 10**4
        texts.append(f"{decimal_size(budget.bytes)}, and the smallest plan takes {decimal_size(up)}")
    if budget.seconds is not None:
        ms = math.ceil(least.seconds * 1e6) / 1e3
        texts.append(f"{budget.seconds * 1e3:.4g} ms, and the fastest plan takes {ms:.3f} ms")
    return f"the budget is {'; '.join(texts)}: raise it, or let fewer bits be chosen"
