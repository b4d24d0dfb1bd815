"""Where a response ends: stop strings in the text as it grows.

A stop string may begin in one token and end in another, so text that could be the beginning of one is held back until
it is decided. What was handed out therefore never holds a stop string, nor a part of the one that ended the response.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.model.tokenizer import Detokenizer


class StopText:
    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.text = ""  # everything handed out so far

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string was completed)."""
        self._held += self._detokenizer.push(token_id)
        return self._release()

    def finish(self) -> tuple[str, bool]:
        """The response ended otherwise: hand out what was held, unless its last bytes complete a stop string."""
        self._held += self._detokenizer.finish()
        certain, stopped = self._release()
        if not stopped:
            certain, self._held = certain + self._hand_out(len(self._held)), ""
        return certain, stopped

    def _release(self) -> tuple[str, bool]:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            certain = self._hand_out(min(found))
            self._held = ""
            return certain, True
        return self._hand_out(len(self._held) - self._undecided()), False

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _hand_out(self, length: int) -> str:
        certain, self._held = self._held[:length], self._held[length:]
        self.text += certain
        return certain
