"""Capturing a function's GPU work into a CUDA graph: memory, streams, workspaces, and what a failure leaves behind.

Nothing here knows a model: graphs.py does. Tests without a GPU put a recorder in the place of CudaCaptures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

WARM_UPS = 2  # the first compiles, tunes and fills caches, and may wait for the GPU to do so; the second finds all done
UNDO = "or switch graphs off: cuda_graphs_(model, False)"
_ONE_CAPTURE = threading.Lock()  # torch wants one at a time in a process
_FAILED: list[torch.cuda.CUDAGraph] = []  # torch keeps pointers to them


class GraphError(RuntimeError):
    """This call cannot be captured: the rule, what was found, what to do."""


class Pool(NamedTuple):
    """What the graphs of a model share: memory, the stream they are captured on, and the end of the last replay."""

    handle: Any
    device: torch.device
    stream: torch.cuda.Stream
    done: torch.cuda.Event


class CudaCaptures:
    """Graphs of one model after the other: each model has a pool of its own."""

    device_type = "cuda"

    def why_not(self) -> str | None:
        return None if torch.cuda.is_available() else "torch sees none"

    def busy(self) -> bool:
        """Whether someone else captures these calls."""
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def open(self, device: torch.device) -> Pool:
        return Pool(torch.cuda.graph_pool_handle(), device, torch.cuda.Stream(device), torch.cuda.Event())

    @contextmanager
    def turn(self, pool: Pool) -> Iterator[None]:
        """One replay after the other, from whatever streams: they share memory."""
        with torch.cuda.device(pool.device):
            torch.cuda.current_stream().wait_event(pool.done)
            yield
            pool.done.record()

    def record(self, forward: Callable[[], Any], pool: Pool) -> tuple[torch.cuda.CUDAGraph, Any]:
        """-> the graph and the results that its replays write. The warm-ups leave the caller's random numbers alone."""
        pool.stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([pool.device]), torch.cuda.stream(pool.stream):
            for _ in range(WARM_UPS):
                forward()
        graph = torch.cuda.CUDAGraph()
        with _ONE_CAPTURE, torch.cuda.stream(pool.stream), _own_workspaces():
            try:  # thread_local: what other threads do meanwhile cannot end this capture
                with torch.cuda.graph(graph, pool.handle, pool.stream, capture_error_mode="thread_local"):
                    result = forward()
            except RuntimeError as error:
                _abandon(graph, pool)
                raise GraphError(f"cuda_graphs_: this forward cannot be captured: {_cause(error)}; {UNDO}") from error
        torch.cuda.current_stream().wait_stream(pool.stream)
        return graph, result

    def settle(self, pool: Pool) -> None:
        pool.done.synchronize()

    def trim(self) -> None:
        torch.cuda.empty_cache()  # nothing else can use a pool's memory before


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS workspaces in the graph's own memory: one from outside could be freed, one left behind would pin it."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _abandon(graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
    """Where CUDA has broken off a capture, torch's allocators still wait for its end, with a pointer to the graph."""
    try:
        graph.pool()
    except RuntimeError:
        _FAILED.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(pool.device.index, pool.handle)
            torch._C._cuda_releasePool(pool.device.index, pool.handle)
    graph.reset()


def _cause(error: RuntimeError) -> str:
    """The first line of what went wrong: ending a broken capture raises again."""
    first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    return str(first).partition("\n")[0].rstrip(".")
