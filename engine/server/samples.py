"""Which of the finished requests are looked at again in spare time: a small pool, fair to arms and classes."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.contracts import CANARY, TraceRecord

KEPT = 32
"""Requests that wait per group; the oldest make room."""
MOST_GROUPS = 64
SHARES = {CANARY: 3.0}
"""How many of the canary's are looked at for one of any other arm's."""
Group = tuple[int, str, str]


@dataclass(slots=True)
class _Group:
    waiting: deque[TraceRecord] = field(default_factory=lambda: deque(maxlen=KEPT))
    taken: int = 0


class SamplePool:
    """Groups (version, arm, class) take turns by how much of each was looked at, the canary's first among equals.

    The event loop offers while the engine's thread looks and takes: every method holds the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups = OrderedDict[Group, _Group]()  # the last offered last

    def __len__(self) -> int:
        with self._lock:
            return sum(len(group.waiting) for group in self._groups.values())

    def offer(self, record: TraceRecord) -> None:
        """A request that ended well, with its tokens."""
        with self._lock:
            key = (record.policy_version, record.arm, record.traffic_class)
            self._groups.setdefault(key, _Group()).waiting.append(record)
            self._groups.move_to_end(key)
            if len(self._groups) > MOST_GROUPS:
                self._groups.popitem(last=False)

    def take(self, versions: Collection[int]) -> TraceRecord | None:
        """The newest of the group whose turn it is; what other policies than ``versions`` did is forgotten."""
        with self._lock:
            for key in [key for key in self._groups if key[0] not in versions]:
                del self._groups[key]
            keys = [key for key, group in self._groups.items() if group.waiting]
            if not keys:
                return None
            chosen = min(keys, key=lambda key: (self._groups[key].taken / SHARES.get(key[1], 1.0), key[1] != CANARY))
            group = self._groups[chosen]
            group.taken += 1
            return group.waiting.pop()
