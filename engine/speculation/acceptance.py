"""What the drafts of a policy version were worth in one traffic class, learned while serving; K control's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.contracts import SlipstreamError
from engine.speculation.listening import Audience

LEVELS = 10
"""Steps of confidence that are told apart."""
POSITIONS = 8
"""Positions of a draft that are told apart; later ones count as the last."""
DRAFT_WEIGHT = 0.05
"""Weight of one draft in the estimate of what drafting costs."""
PROMISED_WEIGHT = 30.0
"""Promised tokens before which nothing is held against the estimates."""
JUDGED = 1.7
"""Asking one that costs next to nothing and then judging what it said takes this many times as long as asking
(docs/log.md); beside passes of a draft the judging is no matter."""
WORTH_WEIGHT = 0.01
"""Weight of one step in the estimate of what asking saves: what a pass takes varies by more than asking costs."""
WORTH_STEPS = 32
"""Steps before which nothing is held against asking."""
RAREST = 16
"""Times as far apart as ``probe_every`` says do probes come at most; so a step stands for no more than some sixth of
what is known of asking."""


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """The K controller of a policy; part of its manifest, so of its version. Off: always the policy's own K."""

    enabled: bool = True
    prior: float = 0.5  # that a drafted token is accepted, where neither drafter nor experience says anything
    prior_strength: float = 16.0  # trials that a prior, or the drafter's own confidence, is worth
    row_strength: float = 4.0  # accepted tokens that the experience of the class is worth against a request's own
    memory: float = 1_000.0  # trials after which the experience of a class forgets
    min_gain: float = 0.02  # share of tokens per second that drafting must promise
    probe_every: int = 16  # in one of so many steps drafters are asked in any case (rarer in vain), or for a token more

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ControlSettings:
        """Strict: an unknown key, a wrong type or an impossible value is an error that names it."""
        known = {f.name: type(f.default) for f in fields(cls)}
        for key, value in given.items():
            if key not in known:
                raise SlipstreamError(f"K control has no setting {key!r}; it knows {sorted(known)}.")
            allowed = (int, float) if known[key] is float else (known[key],)
            if not isinstance(value, allowed) or (isinstance(value, bool) and known[key] is not bool):
                raise SlipstreamError(f"K control: {key} must be {known[key].__name__}, got {value!r}.")
        made = cls(**given)
        if not (0 < made.prior < 1 and made.prior_strength > 0 and made.row_strength > 0 and made.memory >= 1):
            raise SlipstreamError(f"K control needs 0 < prior < 1 and positive strengths and memory, got {made}.")
        if made.min_gain < 0 or made.probe_every < 1:
            raise SlipstreamError(f"K control needs min_gain >= 0 and probe_every >= 1, got {made}.")
        return made


DEFAULT_CONTROL = ControlSettings()


class Acceptance:
    """What the drafts of one policy version were worth in one traffic class. Counts that forget beyond ``memory``."""

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings
        self._tried = [0.0] * (2 * LEVELS + POSITIONS)
        self._accepted = [0.0] * (2 * LEVELS + POSITIONS)
        self._promised = self._kept = 0.0  # tokens that were verified
        self.draft_s = self.ask_s = 0.0  # seconds that a drafted token, and asking for a draft, cost lately
        self.audience = Audience()
        self._saved: dict[int, tuple[float, float]] = {}  # by load: steps, seconds saved by asking one request in them
        self._gap = self._until_probe = settings.probe_every  # steps from one probe to the next; steps until that
        self._weighed = 0  # steps since the last probe
        self._stands_for = 1.0  # steps that what is learned in this one counts for

    def chance(self, position: int, confidence: float | None) -> float:
        """That the token at ``position`` (from 0) is accepted when all before it are."""
        at, settings = _level(position, confidence), self.settings
        prior = settings.prior if confidence is None else confidence
        weight = settings.prior_strength
        return (self._accepted[at] + weight * prior) / (self._tried[at] + weight)

    def observe(self, position: int, confidence: float | None, accepted: bool) -> None:
        at, memory, weight = _level(position, confidence), self.settings.memory, self._stands_for
        keep = min(1.0, max(0.0, memory - weight) / self._tried[at]) if self._tried[at] else 1.0
        self._tried[at] = keep * self._tried[at] + weight
        self._accepted[at] = keep * self._accepted[at] + weight * accepted

    @property
    def honesty(self) -> float:
        """What verified tokens brought of what they promised lately, at most 1.

        Who takes the likeliest of many tokens takes those whose chances are guessed too high, the more the more there
        are to take from. Beside sixteen requests that made a draft look worth its rows that was not.
        """
        return min((self._kept + PROMISED_WEIGHT) / (self._promised + PROMISED_WEIGHT), 1.0)

    def settle(self, promised: float, kept: float) -> None:
        """After a step of one request: of its verified tokens so many were ``promised``, so many accepted. Forgets at
        every step that asks, so that a class whose drafts are not verified any more is given another chance."""
        weight = self._stands_for
        keep = (1 - 1 / self.settings.memory) ** weight
        self._promised = keep * self._promised + weight * promised
        self._kept = keep * self._kept + weight * kept

    def survivals(self, k: int) -> list[float]:
        """Before a draft is there: the probability, by position, that it will reach so far and all be right."""
        alive, found = 1.0, list[float]()
        for position in range(k):
            alive *= self.chance(position, None)
            found.append(alive)
        return found

    def took(self, seconds: float, tokens: int) -> None:
        """Asking for ``tokens`` drafted tokens took so long."""
        self.draft_s += DRAFT_WEIGHT * (seconds / tokens - self.draft_s) if self.draft_s else seconds / tokens
        self.ask_s += DRAFT_WEIGHT * (seconds - self.ask_s) if self.ask_s else seconds

    def probe(self, requests: int, asked: int, judged: float = JUDGED) -> bool:
        """Whether a step of so many requests asks ``asked`` of them in any case. Called once in each step; ``judged``
        as for ``pays``.

        Where asking goes on not to pay, probes come at twice the distance each time, up to so many times the first as
        they ask requests: to ask sixteen in vain in every sixteenth step is half a per cent of what they take. All that
        such a probe teaches counts for the steps since the one before, so that few of them find out that asking pays.
        """
        every = self.settings.probe_every
        longest = every * min(asked, RAREST)
        self._weighed += 1
        self._until_probe = min(self._until_probe, longest) - 1
        self._stands_for = 1.0
        if self._until_probe > 0:
            return False
        if self.pays(requests, judged):
            self._gap = every
        else:
            self._stands_for = max(self._weighed / every, 1.0)
            self._gap = min(2 * self._gap, longest)
        self._until_probe, self._weighed = self._gap, 0
        return True

    def saved(self, requests: int, seconds: float) -> None:
        """In a step of so many requests, asking saved each that was asked so long, by what was verified."""
        steps, mean = self._saved.get(_load(requests), (0.0, 0.0))
        steps += self._stands_for
        weight = self._stands_for * max(WORTH_WEIGHT, 1 / steps)
        self._saved[_load(requests)] = steps, mean + weight * (seconds - mean)

    def pays(self, requests: int, judged: float = JUDGED) -> bool:
        """Whether asking for a draft saves more than ``judged`` times what it takes, in steps of so many requests.

        Beside sixteen requests few drafted tokens are worth their rows, and asking sixteen drafters is 2 % of a step.
        Steps with prompts teach nothing, and beside a queue all but the fullest have some: such a load goes by the next
        one above or below until it has steps of its own, as every draft of it would be made and verified otherwise.
        """
        load = _load(requests)
        for near in (load, load + 1, load - 1):
            steps, mean = self._saved.get(near, (0.0, 0.0))
            if steps >= WORTH_STEPS:
                return mean > judged * self.ask_s
        return True


def _load(requests: int) -> int:
    """Steps of about as many requests are alike."""
    return requests.bit_length()


def _level(position: int, confidence: float | None) -> int:
    """Where the experience of such a token is kept: first and later tokens of a draft differ."""
    if confidence is None:
        return 2 * LEVELS + min(position, POSITIONS - 1)
    return min(int(confidence * LEVELS), LEVELS - 1) + (LEVELS if position else 0)
