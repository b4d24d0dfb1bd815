"""What pages show, made once: a chart or a table of the same answers is not made again for each reader and refresh."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Lock
from typing import Any, TypeVar

import streamlit as st

T = TypeVar("T")
KEPT = 256
"""Things that are kept, of which a page shows ten at most; the largest, a heat map, is some 100 KB."""


@dataclass(slots=True)
class _Shelf:
    """The last that were asked for. Several threads make pages; two may make the same thing, and either is right."""

    made: OrderedDict[bytes, Any] = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)

    def take(self, key: bytes) -> Any:
        with self.lock:
            if key in self.made:
                self.made.move_to_end(key)
            return self.made.get(key)

    def put(self, key: bytes, thing: Any) -> None:
        with self.lock:
            self.made[key] = thing
            while len(self.made) > KEPT:
                self.made.popitem(last=False)


@st.cache_resource
def shelf() -> _Shelf:
    """Shared by all sessions."""
    return _Shelf()


def finished(make: Callable[..., T], *of: Any) -> T:
    """What a pure function makes of its arguments, which are told apart by all that is in them.

    The result is shared: nobody may change it. ``make`` is a function of a module: one made on the spot may hold what
    its name does not tell, and is refused. To write the arguments down takes a quarter of a millisecond a frame, a
    tenth of what a chart takes to be made.
    """
    key = blake2b(pickle.dumps((make, *of), pickle.HIGHEST_PROTOCOL)).digest()
    kept = shelf()
    found: T | None = kept.take(key)
    if found is None:
        found = make(*of)
        kept.put(key, found)
    return found
