"""Who is next: first come first served within a client, and between clients whoever was served least.

Virtual token counters (Sheng et al. 2024, arXiv 2401.00588): each client has a counter of the tokens it was served, and
the client with the lowest goes next. One that comes, or comes back after a pause, is lifted to the lowest of those that
wait, or where nobody waits to the one that waited last: nobody saves up, and nobody pays for having been served while
there was room. With one client this is a plain queue.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.scheduler.sequence import Sequence

OUTPUT_WEIGHT = 2
"""An output token costs about as much as so many prompt tokens, which are computed many at a time."""
MOST_IDLE = 1_024
"""Counters kept of clients that neither wait nor run; names come from outside."""


class FairQueue:
    """Waiting sequences. Iterating, ``in`` and ``keys`` go over request ids; order is by client, then by arrival."""

    def __init__(self) -> None:
        self._clients: dict[str, OrderedDict[str, Sequence]] = {}
        self._served: dict[str, int] = {}
        self._left_last: str | None = None

    def push(self, seq: Sequence) -> None:
        self._of(seq.client)[seq.request_id] = seq

    def push_back(self, seq: Sequence) -> None:
        """A sequence that lost its place in the cache: before all others of its client."""
        queue = self._of(seq.client)
        queue[seq.request_id] = seq
        queue.move_to_end(seq.request_id, last=False)

    def head(self) -> Sequence:
        """The sequence that is next. KeyError when nobody waits."""
        if not self._clients:
            raise KeyError("nobody waits")
        client = min(self._clients, key=lambda name: self._served[name])
        return next(iter(self._clients[client].values()))

    def remove(self, request_id: str) -> Sequence | None:
        for client, queue in self._clients.items():
            if (seq := queue.pop(request_id, None)) is not None:
                if not queue:
                    del self._clients[client]
                    self._left_last = client
                return seq
        return None

    def charge(self, client: str, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        self._served[client] = self._served.get(client, 0) + prompt_tokens + OUTPUT_WEIGHT * output_tokens

    def forget(self, running: set[str]) -> None:
        """Drop counters that decide nothing more: all once nobody waits or runs, else the lowest of too many idle."""
        if not running and not self._clients:
            self._served.clear()
            self._left_last = None
            return
        idle = self._served.keys() - running - self._clients.keys() - {self._left_last}
        if len(idle) > MOST_IDLE:  # who was served least is the first to be lifted when it comes back: it loses least
            for name in sorted(idle, key=lambda name: self._served[name])[: -MOST_IDLE // 2]:
                del self._served[name]

    def keys(self) -> set[str]:
        return {request_id for queue in self._clients.values() for request_id in queue}

    def values(self) -> list[Sequence]:
        return [seq for queue in self._clients.values() for seq in queue.values()]

    def __len__(self) -> int:
        return sum(map(len, list(self._clients.values())))  # other threads ask too

    def _of(self, client: str) -> OrderedDict[str, Sequence]:
        if client not in self._clients:
            waited_last = 0 if self._left_last is None else self._served[self._left_last]
            lowest = min((self._served[name] for name in self._clients), default=waited_last)
            self._served[client] = max(self._served.get(client, 0), lowest)
            self._clients[client] = OrderedDict()
        return self._clients[client]
