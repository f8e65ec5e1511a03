"""Worker: the one thread that runs the models, and the tickets by which a visitor's Stop reaches it."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from convrot_demo.comparison import Event, Job, Outcome, compare
from convrot_demo.models import Models

PATIENCE = 0.5  # seconds of silence after which a stream yields None: gradio can end a stream only where it yields
_END = Event(-1)


@dataclass(frozen=True)
class Failed:
    """How a job ended that has no outcome: Stopped, or what went wrong."""

    error: BaseException


class Worker:
    """Runs one job at a time and lets others follow it: stream(job, stop)."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="models")

    def stream(self, job: Job, stop: threading.Event) -> Generator[Event | Outcome | Failed | None, None, None]:
        """What happens, None where nothing does for a while, and at the end the Outcome or Failed.

        Closing the iterator, which gradio does when a visitor leaves, stops the job after its current step.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        future = self._thread.submit(compare, self.models, job, events.put, stop)
        try:
            yield from _events(events, future)
            error = future.exception()
            _let_go(error)
            yield future.result() if error is None else Failed(error)
        finally:
            stop.set()

    def close(self) -> None:
        """Wait for the running job and end the thread."""
        self._thread.shutdown(cancel_futures=True)


def _let_go(error: BaseException | None) -> None:
    """Its frames hold tensors, which the next run needs the room of; so do those of the errors that it came from."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _events(events: queue.SimpleQueue[Event], future: Future[Outcome]) -> Iterator[Event | None]:
    future.add_done_callback(lambda _: events.put(_END))
    while True:
        try:
            event = events.get(timeout=PATIENCE)
        except queue.Empty:
            yield None
            continue
        if event is _END:
            return
        yield event


class Tickets:
    """{session: stop} of the visitors that wait or are served: Stop works before a job's turn as well."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}

    def open(self, session: str) -> None:
        """Generate was pressed."""
        self._stops[session] = threading.Event()

    def take(self, session: str) -> threading.Event:
        """The job's turn has come."""
        return self._stops.setdefault(session, threading.Event())

    def stop(self, session: str) -> None:
        """Stop was pressed."""
        if session in self._stops:
            self._stops[session].set()

    def close(self, session: str) -> None:
        """The job has ended."""
        self._stops.pop(session, None)
