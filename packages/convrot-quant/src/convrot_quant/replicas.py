"""Replicas: processes that each hold the whole model and do a share of the work, as torchrun or accelerate start them.

    here = world()                       # alone unless a launcher says otherwise
    device = own_device("auto", here)
    mine = share(prompts, here)      # in order, so that what comes back is in order too
    pictures = gather([draw(prompt) for prompt in mine], here)  # all of them, on rank 0

What is exchanged are Python objects, between CPUs: models and their values stay where they are, and no NCCL is needed.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState

Item = TypeVar("Item")
WAIT = timedelta(days=1)  # who is done early waits for the slowest; a launcher ends all where one fails
LAUNCH = "start the processes with torchrun or accelerate launch"


@dataclass(frozen=True)
class World:
    """This process, `rank` of `size`; on its machine it is number `local_rank`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.rank == 0


def world() -> World:
    """What the launcher says in WORLD_SIZE, RANK and LOCAL_RANK; without one, a process alone."""
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return World()
    here = World(_number("RANK"), size, _number("LOCAL_RANK"))
    if not (here.rank < size and here.local_rank < size):
        raise ValueError(f"RANK={here.rank} and LOCAL_RANK={here.local_rank} are not below WORLD_SIZE={size}; {LAUNCH}")
    return here


def own_device(device: str, here: World) -> str:
    """The GPU of this process, made the current one, where a run of several is to use `auto` or `cuda`.

    Any other device stays as it is; one GPU by its number is refused, since all processes would crowd on it.
    """
    if here.size == 1 or not device.startswith(("auto", "cuda")) or not torch.cuda.is_available():
        return device
    if ":" in device:
        raise ValueError(
            f"{device} is one GPU, and this run has {here.size} processes; say cuda: each takes its own, by LOCAL_RANK"
        )
    count = torch.cuda.device_count()
    if here.local_rank >= count:
        raise ValueError(
            f"process {here.rank} of {here.size} has LOCAL_RANK {here.local_rank}, and this machine shows {count} "
            f"GPU{'s' * (count > 1)}; start at most one process for each"
        )
    torch.cuda.set_device(here.local_rank)
    return f"cuda:{here.local_rank}"


def share(items: Sequence[Item], here: World) -> list[Item]:
    """This rank's neighbours of the items: all ranks' shares in order are the items, and differ by one at the most."""
    if here.size == 1:
        return list(items)
    with _joined().split_between_processes(list(items)) as mine:
        return list(mine)


def gather(items: Sequence[Item], here: World) -> list[Item]:
    """Every rank's items in the order of ranks, on rank 0; nothing on the others. All ranks have to call it."""
    if here.size == 1:
        return list(items)
    _joined()
    found: list[Any] | None = [None] * here.size if here.is_main else None
    try:
        torch.distributed.gather_object(list(items), found)
    except RuntimeError as error:
        raise ConnectionError("another process of this run ended early; its own message says why") from error
    return [item for part in found or () for item in part]


@cache
def _joined() -> PartialState:
    """The processes of this run know each other from the first call on, until they end: a group is not made twice."""
    state = PartialState(cpu=True, backend="gloo", timeout=WAIT)
    atexit.register(state.destroy_process_group)  # else gloo's threads may abort the process at its end
    return state


def _number(name: str, default: int | None = None) -> int:
    """An environment variable of a launcher."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) == 0):
        raise ValueError(f"{name}={text!r} in the environment is no number of processes or of one; {LAUNCH}")
    return int(text)
