"""The one thread that owns the engine. Everybody else leaves it a note and is called back on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from engine.contracts import SlipstreamError, Status
from engine.runner.engine import Engine, EngineRequest, Output
from engine.server.spare import SpareTime

log = logging.getLogger(__name__)
Deliver = Callable[[Output | SlipstreamError], None]
"""Takes what became of a request: outputs while it runs, or why it was not queued."""
GIVES_WAY_S = 0.0005
"""After so long another thread hands the interpreter to this one, which waits for it at the end of a pass. The usual 5
ms are half a step."""
T = TypeVar("T")


class EngineFailure(SlipstreamError):
    """The engine failed on a request in a way it does not know (HTTP 500)."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    deliver: Deliver
    deadline: float
    streams: bool


class EngineThread:
    """``submit`` and ``cancel`` return at once; ``call`` runs something between two steps and waits for it.

    ``clock`` is monotonic seconds; a request older than ``timeout_s`` ends with status timeout. ``spare`` is done
    while there is nothing to serve.
    """

    def __init__(
        self,
        engine: Engine,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        spare: SpareTime | None = None,
    ) -> None:
        self.engine = engine
        self._timeout_s, self._clock = timeout_s, clock
        self._spare = spare or SpareTime([])
        self._notes: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._waiting: dict[str, _Waiting] = {}  # by request id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def submit(self, request: EngineRequest, deliver: Deliver, streams: bool = True) -> None:
        """Queue a request; EngineFailure when the thread has ended, as from ``call``.

        Where nobody ``streams`` only the last output is delivered, whose result has all: waking the event loop in every
        step takes the interpreter, and on few cores a core, from the next step.
        """
        self._leave(lambda: self._add(request, deliver, streams))

    def cancel(self, request_id: str) -> None:
        """End a request because nobody waits for it any more; its last output is delivered like any other."""
        with contextlib.suppress(EngineFailure):  # then it has ended already
            self._leave(lambda: self._end(request_id, Status.CANCELLED))

    def call(self, action: Callable[[], T], timeout_s: float | None = 60.0) -> T:
        """Run ``action`` at the next step boundary and give its result; ``timeout_s`` None: however long it takes."""
        future: Future[T] = Future()

        def note() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        self._leave(note)
        return future.result(timeout_s)

    def stop(self) -> None:
        """End the thread; requests that still run end as cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def nudge(self) -> None:
        """There may be something to do in spare time."""
        with self._wake:
            self._wake.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _leave(self, note: Callable[[], None]) -> None:
        with self._wake:
            if self._ended:
                raise EngineFailure("The engine's thread has ended; restart this replica.")
            self._notes.append(note)
            self._wake.notify()

    def _run(self) -> None:
        sys.setswitchinterval(GIVES_WAY_S)
        try:
            self._work()
        except Exception:
            log.critical("the engine's thread ends: its state cannot be trusted any more", exc_info=True)
        finally:
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Nobody waits for an answer that will not come."""
        with self._wake:
            self._ended, notes = True, list(self._notes)
            self._notes.clear()
        for note in notes:
            _run_guarded(note)  # requests among them are refused or, where the engine still took them, join the rest
        failure = EngineFailure("The engine's thread has ended; restart this replica.")
        if self._waiting:
            self._post([(waiting.deliver, failure) for waiting in self._waiting.values()])
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._notes or self._stopping or self.engine.has_work):
                    if (due := self._spare.due_in()) == 0:
                        break
                    self._wake.wait(due)
                notes, stopping = list(self._notes), self._stopping
                self._notes.clear()
            for note in notes:
                _run_guarded(note)
            if stopping:
                for request_id in list(self._waiting):
                    self._end(request_id, Status.CANCELLED)
                return
            if self.engine.has_work:
                self._spare.busy()
                self._step()
                self._end_overdue()
                if not self.engine.has_work:
                    self.engine.check_integrity()  # idle: whatever was lent is back, or this thread ends
            elif not notes:
                self._spare.piece()

    def _step(self) -> None:
        """One step. The engine contains a failure of the model; should it fail itself, what runs ends with it."""
        try:
            outputs = self.engine.step()
        except Exception:
            log.exception("the engine failed; the %d requests it had end", len(self._waiting))
            for request_id in list(self._waiting):
                self._end(request_id, Status.ERROR)
            return
        self._deliver(outputs)

    def _add(self, request: EngineRequest, deliver: Deliver, streams: bool) -> None:
        try:
            self.engine.add(request)
        except SlipstreamError as error:
            self._post([(deliver, error)])
        except Exception as error:
            log.exception("request %s could not be queued", request.request_id)
            self._post([(deliver, EngineFailure(f"{type(error).__name__}: {error}"))])
        else:
            self._waiting[request.request_id] = _Waiting(deliver, self._clock() + self._timeout_s, streams)

    def _end(self, request_id: str, status: Status) -> None:
        output = self.engine.cancel(request_id, status)
        if output is not None:
            self._deliver([output])

    def _end_overdue(self) -> None:
        now = self._clock()
        for request_id in [r for r, waiting in self._waiting.items() if waiting.deadline < now]:
            self._end(request_id, Status.TIMEOUT)

    def _deliver(self, outputs: list[Output]) -> None:
        posts: list[tuple[Deliver, Output | SlipstreamError]] = []
        for output in outputs:
            entry = (
                self._waiting.pop(output.request_id, None) if output.finished else self._waiting.get(output.request_id)
            )
            if entry is None:
                log.error("the engine gave an output of %s, which nobody waits for", output.request_id)
                continue
            if entry.streams or output.finished:
                posts.append((entry.deliver, output))
        if posts:
            self._post(posts)

    def _post(self, posts: list[tuple[Deliver, Output | SlipstreamError]]) -> None:
        """One wake-up of the event loop a step, not one a token."""

        def run() -> None:
            for deliver, what in posts:
                _run_guarded(lambda deliver=deliver, what=what: deliver(what))  # type: ignore[misc]

        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop is closed: the server has shut down, but traces must still be made
            run()


def _run_guarded(note: Callable[[], object]) -> None:
    """One note that fails must not take the thread, and every other request, with it."""
    try:
        note()
    except Exception:
        log.exception("a note left for the engine failed")
