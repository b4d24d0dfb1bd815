"""A policy that drafts on a copy of a finished request and serves nothing: what it would have earned, in pieces.

The response is given, and a drafted token would have been accepted exactly where it equals the token that followed
(sampled responses too: a draft is accepted iff it is the token drawn, ``verify_one_hot``). So no target pass is needed,
except for a policy that reads hidden states: those are computed again, a few tokens at a time. Every draft is counted
whole, as if all of it had been verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.contracts import SpecCounts
from engine.runner.rescoring import Prefill
from engine.speculation.proposer import Drafter, HiddenReader, Proposer
from engine.speculation.replay import verify_stored


class ShadowReplay:
    """``counts`` of one policy on one response, ``draft_s`` its own time. Ends with ``end``, finished or not."""

    def __init__(
        self,
        proposer: Proposer,
        prefill: Prefill | None,
        traffic_class: str,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        max_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        """``prefill`` of the whole response for a policy that reads hidden states, None for others."""
        self._proposer, self._prefill, self._clock = proposer, prefill, clock
        self._reader = proposer if isinstance(proposer, HiddenReader) else None
        self._prompt, self._output, self._max_tokens = len(prompt_ids), output_ids, max_tokens
        self._drafter: Drafter = proposer.start(prompt_ids, traffic_class)
        self._drafter.observe(output_ids[:1])  # the first token comes from the prefill
        self._states: list[Tensor] = []  # of positions from ``_fed`` on, computed and not handed over
        self._done, self._fed = 1, 0
        self.counts, self.draft_s = SpecCounts(), 0.0

    @property
    def is_done(self) -> bool:
        return self._done >= len(self._output)

    def advance(self, most: int) -> int:
        """At most ``most`` target tokens or verify steps; how many it were."""
        for made in range(most):
            if self.is_done:
                return made
            if self._reader is not None and not self._feed(self._reader):
                assert self._prefill is not None
                before = self._prefill.done
                _, states = self._prefill.advance(most, self._reader.aux_layers)
                assert states is not None
                self._states.append(states)
                return made + self._prefill.done - before
            self._step()
        return most

    def end(self) -> None:
        if self._reader is not None:
            self._reader.end(self._drafter)

    def _step(self) -> None:
        room = min(self._proposer.num_speculative_tokens, self._max_tokens - self._done - 1)
        began = self._clock()
        draft = self._drafter.propose(room) if room > 0 else []
        self.draft_s += self._clock() - began
        step = verify_stored(draft, self._output[self._done :])
        self.counts.add(step)
        self._drafter.observe(self._output[self._done : self._done + step.emitted])
        self._done += step.emitted

    def _feed(self, reader: HiddenReader) -> bool:
        """Hand over the states of all committed tokens but the last; False where some are not computed yet."""
        wanted = self._prompt + self._done - 1
        assert self._prefill is not None
        if self._prefill.done < wanted:
            return False
        if count := wanted - self._fed:
            states = torch.cat(self._states)
            reader.feed([(self._drafter, self._fed, states[:count])])
            self._states, self._fed = [states[count:]], wanted
        return True
