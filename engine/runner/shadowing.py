"""A policy that drafts on a copy of a finished request and serves nothing: what it would have earned, in pieces.

The response is given, and a drafted token would have been accepted exactly where it equals the token that followed
(sampled responses too: a draft is accepted iff it is the token drawn, ``verify_one_hot``). So no target pass is needed,
except for a policy that reads hidden states: those are computed again, a few tokens at a time. Every draft is counted
whole, as if all of it had been verified. A draft that fails is counted and done without, as in serving: were such a
request left out, a draft would be judged by what it can do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.contracts import SpecCounts
from engine.runner.rescoring import Prefill
from engine.speculation.proposer import Drafter, HiddenReader, Proposer, checked
from engine.speculation.replay import verify_stored

log = logging.getLogger(__name__)


class ShadowReplay:
    """``counts`` of one policy on one response, ``draft_s`` its own time, ``draft_errors`` how often it failed.

    Ends with ``end``, finished or not.
    """

    def __init__(
        self,
        proposer: Proposer,
        prefill: Prefill | None,
        traffic_class: str,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        max_tokens: int,
        vocab_size: int,
        clock: Callable[[], float],
    ) -> None:
        """``prefill`` of the whole response for a policy that reads hidden states, None for others."""
        self._proposer, self._prefill, self._clock = proposer, prefill, clock
        self._reader = proposer if isinstance(proposer, HiddenReader) else None
        self._prompt, self._output, self._traffic_class = prompt_ids, output_ids, traffic_class
        self._max_tokens, self._vocab_size = max_tokens, vocab_size
        self._drafter: Drafter | None = None
        self._states: list[Tensor] = []  # of positions from ``_fed`` on, computed and not handed over
        self._done, self._fed = 1, 0  # the first token comes from the prefill
        self.counts, self.draft_s, self.draft_errors = SpecCounts(), 0.0, 0
        if self._reader is not None:  # it must hear the states from the first on; others start with their first draft
            try:
                self._begin()
            except Exception:
                self._failed()

    @property
    def is_done(self) -> bool:
        return self._done >= len(self._output)

    def advance(self, most: int) -> int:
        """At most ``most`` target tokens or verify steps; how many it were."""
        for made in range(most):
            if self.is_done:
                return made
            if self._reader is not None and self._drafter is not None and not self._feed(self._reader, self._drafter):
                assert self._prefill is not None
                before = self._prefill.done
                _, states = self._prefill.advance(most, self._reader.aux_layers)
                assert states is not None
                self._states.append(states)
                return made + self._prefill.done - before
            self._step()
        return most

    def end(self) -> None:
        drafter, self._drafter = self._drafter, None
        if self._reader is not None and drafter is not None:
            self._reader.end(drafter)

    def _step(self) -> None:
        room = min(self._proposer.num_speculative_tokens, self._max_tokens - self._done - 1)
        step = verify_stored(self._draft(room) if room > 0 else [], self._output[self._done :])
        self.counts.add(step)
        self._done += step.emitted
        if self._drafter is not None and not self.is_done:
            try:
                self._drafter.observe(self._output[self._done - step.emitted : self._done])
            except Exception:
                self._failed()

    def _draft(self, k: int) -> list[int]:
        began = self._clock()
        try:
            if self._drafter is None and self._reader is None:
                self._begin()
            if self._drafter is None:  # it has missed hidden states, and nobody has them any more
                return []
            return checked(self._drafter, k, self._drafter.propose(k), self._vocab_size)
        except Exception:
            self._failed()
            return []
        finally:
            self.draft_s += self._clock() - began

    def _begin(self) -> None:
        self._drafter = self._proposer.start(self._prompt, self._traffic_class)
        self._drafter.observe(self._output[: self._done])

    def _failed(self) -> None:
        """Count it. The next step begins with a fresh drafter, unless it reads hidden states: those are gone by."""
        self.end()
        self.draft_errors += 1
        if self.draft_errors == 1:
            log.exception("a %s policy cannot draft in shadow", self._proposer.kind)

    def _feed(self, reader: HiddenReader, drafter: Drafter) -> bool:
        """Hand over the states of all committed tokens but the last; False where some are not computed yet."""
        wanted = len(self._prompt) + self._done - 1
        assert self._prefill is not None
        if self._prefill.done < wanted:
            return False
        if count := wanted - self._fed:
            states = torch.cat(self._states)
            try:
                reader.feed([(drafter, self._fed, states[:count])])
            except Exception:
                self._failed()
            self._states, self._fed = [states[count:]], wanted
        return True
