"""What every suite runs on: where, with which backends, what was refused; and the run over its jobs."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from convrot_bench.results import Figure, Writer
from convrot_kernels.dispatch import pick


def _errors() -> tuple[type[Exception], ...]:
    """What a backend or a peer raises where it cannot run: CUDA, memory, arguments; Triton has a family of its own."""
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, ImportError)
    return (*errors, import_module("triton.errors").TritonError) if find_spec("triton") else errors


ERRORS = _errors()
# what code of others raises
PEER_ERRORS: tuple[type[Exception], ...] = (*ERRORS, AssertionError, AttributeError, LookupError, OSError)


LENGTH = 300  # of an error in a row


def first_line(error: Exception) -> str:
    """Its kind and its first line, as a row keeps it."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"[:LENGTH]


class GateError(RuntimeError):
    """Something did not compute what it should: it is not timed."""


@dataclass
class Bench:
    """Where it runs, which backends are measured (the fastest first), and what was refused."""

    device: str
    backends: tuple[str, ...]
    say: Callable[[str], None] = print
    failures: list[str] = field(default_factory=list)

    def passes(self, gate: Callable[..., None], *arguments: Any) -> bool:
        """Run a gate; what it refuses, or what cannot run, is said, kept, and not timed."""
        try:
            gate(*arguments)
        except ERRORS as error:
            self.refuse(str(error) if isinstance(error, GateError) else f"{gate.__name__} {arguments[:1]}: {error}")
            return False
        return True

    def refuse(self, reason: str) -> None:
        """Say and keep why something has no row."""
        self.failures.append(reason)
        self.say(f"not timed: {reason}")

    def facts(self, backend: str, op: str = "scaled_mm") -> dict[str, Any]:
        """Fields of every row: the backend that ran, and the one that `auto` takes here."""
        return {"backend": backend, "auto": pick(op, self.device)[0]}


@dataclass(frozen=True)
class Job:
    """What is measured together; its figures become rows."""

    label: str
    measure: Callable[[Bench], Iterator[Figure]]


def run(
    writer: Writer, bench: Bench, jobs: Sequence[Job], track: Callable[[Sequence[Job]], Iterable[Job]] = iter
) -> None:
    """A row for every figure. A job that fails is said and the rest goes on; GateError at the end lists them."""
    with torch.no_grad():
        for job in track(jobs):
            try:
                for figure in job.measure(bench):
                    bench.say(_line(writer.add(figure)))
            except ERRORS as error:
                bench.refuse(f"{job.label}: {error}")
            gc.collect()
            torch.cuda.empty_cache()
    if bench.failures:
        raise GateError(f"{writer.bench}: {len(bench.failures)} not timed: " + "; ".join(bench.failures))


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    if "error" in row:
        return f"{row['case']:16} {row['backend']:9} {shape}: {row['baseline_name']} does not run: {row['error']}"
    figures = f"{row['ours']:.1f} {row['unit']}, {row['ratio']:.2f}x {row['baseline_name']}"
    return f"{row['case']:16} {row['backend']:9} {shape}: {figures}"
