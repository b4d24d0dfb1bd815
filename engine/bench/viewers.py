"""People who leave a page of the dashboard open, without the machines they sit at.

What a browser asks of the dashboard is recorded once, in a real Chromium: the message that opens a page, and those by
which it is drawn again every few seconds. Viewers send the same bytes through connections of their own and read all
that comes back, so the dashboard and the database do for each of them what they do for a browser. Drawing the charts is
left out: it happens on the viewers' machines, and twenty browsers on the machine that serves would be measured instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.bench.browser import fresh_page
from engine.bench.pages import RESTS
from engine.bench.rig import wait_until
from engine.contracts import SlipstreamError

POLL_S = 0.05
ANSWERED = 0.5
"""A refresh brings about as many bytes as the one that was recorded; less than half of it is another answer."""
READ = 0.9
"""Share of an interval for which a viewer reads what a refresh brings; then it is counted."""
CYCLE_S = 15.0
"""Within it every part of a page is drawn again, those that hardly change but once."""
PATIENCE_S = 60.0
"""A page that is not answered for so long has ended."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What one open page sends: when it is opened, and each time it is drawn again, through a whole cycle of
    ``refreshes``; ``answer``: bytes that one of these brings on average."""

    path: str
    opening: tuple[bytes, ...]
    refreshes: tuple[tuple[bytes, ...], ...]
    answer: float


def record(browser: Any, address: str, path: str, refresh_s: float) -> Recording:
    """Watch a page in Chromium until every part of it has been drawn again.

    What is sent until it is drawn opens the page. The next that is sent begins a refresh, of which every live part has
    its own message; where drawing took long it is due soon, so it is waited for and not reckoned with. From there on
    every interval is a refresh, with whatever parts it has.
    """
    page, sent, came = fresh_page(browser), list[tuple[float, bytes]](), list[tuple[float, int]]()

    def listen(socket: Any) -> None:
        socket.on("framesent", lambda payload: sent.append((time.monotonic(), payload)))
        socket.on("framereceived", lambda payload: came.append((time.monotonic(), len(payload))))

    page.on("websocket", listen)
    page.goto(address + path)
    page.get_by_test_id("stMarkdown").first.wait_for()
    page.locator(RESTS).wait_for()
    drawn = time.monotonic()
    while not sent or (asked := sent[-1][0]) <= drawn:
        if time.monotonic() > drawn + 2 * refresh_s:
            raise SlipstreamError(
                f"{path} was not drawn again within {2 * refresh_s:.0f} s, so nothing was recorded. Where the machine "
                "is too busy for its refresh, a longer one helps: --set dashboard.refresh_s=10"
            )
        page.wait_for_timeout(50)
    page.wait_for_timeout(1e3 * (CYCLE_S + 0.5 * refresh_s))
    page.locator(RESTS).wait_for()
    page.context.close()
    opening = tuple(bytes(payload) for at, payload in sent if at <= drawn)
    again = [(at - asked, bytes(payload)) for at, payload in sent if at > drawn]
    brought = sum(size for at, size in came if at > drawn) / len(again)
    refreshes = cycle_of(again, refresh_s)
    return Recording(path, opening, refreshes, brought * sum(map(len, refreshes)) / len(refreshes))


def cycle_of(sent: Sequence[tuple[float, bytes]], refresh_s: float) -> tuple[tuple[bytes, ...], ...]:
    """The refreshes of a cycle, of what was ``sent`` (seconds since the first of them, message) through one and an
    interval more: the first cycle in it, or that which begins with the second refresh where it holds more, for a part
    that is drawn once in a cycle may be due at its very end. A refresh that did not come, as the browser was late, is
    none. Where the interval does not divide the cycle, parts come too often rather than too seldom.
    """
    count = max(1, int(CYCLE_S / refresh_s))
    found: list[list[bytes]] = [[] for _ in range(count + 1)]
    for at, payload in sent:
        if (number := round(at / refresh_s)) <= count:
            found[number].append(payload)
    cycle = max(found[:count], found[1:], key=lambda refreshes: sum(map(len, refreshes)))
    return tuple(tuple(messages) for messages in cycle if messages)


@dataclass(slots=True)
class Viewers:
    """Open pages, one for each of ``recordings``, that are drawn again every ``refresh_s`` while ``active`` is set,
    each at its own moment: people do not come in step. One that is not answered in time is late, and asks when it is.
    """

    address: str
    recordings: Sequence[Recording]
    refresh_s: float
    active: threading.Event = field(default_factory=threading.Event)
    opened: int = 0
    refreshed: int = 0
    received: int = 0
    """Bytes."""
    expected: float = 0.0
    """Bytes that as many refreshes brought when they were recorded."""
    failures: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        for number, recording in enumerate(self.recordings):
            phase = number * self.refresh_s / len(self.recordings)
            thread = threading.Thread(target=self._view, args=(recording, phase, number), daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait_open(self) -> None:
        """Until every page has been drawn once."""
        wait_until(lambda: self.opened == len(self.recordings) or bool(self.failures), "every page to open", PATIENCE_S)
        self.check()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10.0)

    def check(self) -> None:
        """SlipstreamError where a viewer was not answered, or was sent something else than a browser is."""
        if self.failures:
            raise SlipstreamError(f"{len(self.failures)} open pages ended: {self.failures[0]}")
        if self.received < ANSWERED * self.expected:
            raise SlipstreamError(
                f"{self.refreshed} refreshes of open pages brought {self.received:,} bytes; a browser's bring "
                f"{self.expected:,.0f}. The recorded messages are not what this dashboard draws again by."
            )

    def _view(self, recording: Recording, phase: float, at: int) -> None:
        """``at``: the refresh of the cycle that this viewer begins with."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect
        from websockets.typing import Origin, Subprotocol

        url = f"ws{self.address.removeprefix('http')}/_stcore/stream"
        try:
            with connect(
                url, origin=Origin(self.address), subprotocols=[Subprotocol("streamlit")], max_size=None
            ) as socket:
                self._ask(socket, recording.opening)
                with self._lock:
                    self.opened += 1
                while not self._ended.is_set():
                    if not self.active.is_set():  # a browser reads on: a late answer must not clog its connection
                        came = _read(socket, POLL_S)
                        with self._lock:
                            self.received += came
                        continue
                    self._ended.wait((phase - time.monotonic()) % self.refresh_s)
                    messages = recording.refreshes[at % len(recording.refreshes)]
                    if self.active.is_set() and (came := self._ask(socket, messages)):
                        at += 1
                        with self._lock:
                            self.refreshed += 1
                            self.received += came
                            self.expected += recording.answer
        except (OSError, WebSocketException, SlipstreamError) as error:
            self.failures.append(f"{recording.path}: {error}")

    def _ask(self, socket: Any, frames: Sequence[bytes]) -> int:
        """Send these and read what comes back for most of an interval, longer until anything does; its bytes."""
        for frame in frames:
            socket.send(frame)
        came, began = 0, time.monotonic()
        while not self._ended.is_set() and (not came or time.monotonic() - began < READ * self.refresh_s):
            if not came and time.monotonic() - began > PATIENCE_S:
                raise SlipstreamError(f"no answer within {PATIENCE_S:.0f} s")
            came += _read(socket, 0.05 * self.refresh_s)
        return came


def _read(socket: Any, timeout_s: float) -> int:
    """Bytes of the next message, 0 where none comes in time."""
    try:
        return len(socket.recv(timeout=timeout_s))
    except TimeoutError:
        return 0
