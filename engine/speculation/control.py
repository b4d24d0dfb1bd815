"""K control: how many tokens of each row's draft are verified in this step, 0 included.

All rows share one target pass, and what the pass costs is not linear in their number, so the choice is one for the
whole step: the number of drafted tokens, and which, that give most expected tokens per second. A drafted token brings
the probability that it and all before it are accepted. These fall along a draft, so for every number of tokens the
best choice is simply the likeliest ones, and trying every number finds the optimum.

The probabilities are learned while serving, for each policy version and traffic class: by the confidence of the drafter
where it has one, else by position; and each request corrects them by its own luck so far. Drafted tokens that were not
verified teach as well: the target says sooner or later whether it would have chosen them. So a policy that has switched
itself off finds out that it pays again without costing a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.contracts import SlipstreamError, VerifyStep
from engine.speculation.step_costs import StepCosts

LEVELS = 10
"""Steps of confidence that are told apart."""
POSITIONS = 8
"""Positions of a draft that are told apart; later ones count as the last."""
FREE_SHARE = 0.01
"""A draft that costs less than this share of a plain pass is always asked for: its tokens decide, and teach."""
DRAFT_WEIGHT = 0.05
"""Weight of one draft in the estimate of what drafting costs."""
PROMISED_WEIGHT = 30.0
"""Promised tokens before which nothing is held against the estimates."""
ROW_KEEP = 0.97
"""What a request's own experience keeps with every judged token: some 30 tokens."""
MOST = 0.99
"""No token is certain."""
MOST_KEPT = 1_024
"""Versions and classes whose experience is kept, those used last; classes are named by clients."""


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """The K controller of a policy; part of its manifest, so of its version. Off: always the policy's own K."""

    enabled: bool = True
    prior: float = 0.5  # that a drafted token is accepted, where neither drafter nor experience says anything
    prior_strength: float = 16.0  # trials that a prior, or the drafter's own confidence, is worth
    row_strength: float = 4.0  # accepted tokens that the experience of the class is worth against a request's own
    memory: float = 1_000.0  # trials after which the experience of a class forgets
    min_gain: float = 0.02  # share of tokens per second that drafting must promise
    probe_every: int = 16  # a drafter that costs time is asked for one token more in one of so many steps

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


def allocate(
    survivals: Sequence[Sequence[float]],
    base_rows: int,
    base_tokens: float,
    cost: Callable[[int], float],
    min_gain: float = 0.0,
) -> list[int]:
    """Tokens to verify of each draft: the choice with most expected tokens per second over the whole step.

    ``survivals`` of each draft: the probability that its tokens up to this one are all accepted, falling. Without any
    drafted token the step has ``base_rows`` rows and emits ``base_tokens``; ``cost`` gives seconds by rows. Nothing is
    drafted unless it promises ``min_gain`` over that.
    """
    offers = sorted((-chance, at, row) for row, draft in enumerate(survivals) for at, chance in enumerate(draft))
    tokens, best, best_count = base_tokens, (1 + min_gain) * base_tokens / cost(base_rows), 0
    for count, (negative, _, _) in enumerate(offers, 1):
        tokens -= negative
        if (rate := tokens / cost(base_rows + count)) > best:
            best, best_count = rate, count
    chosen = [0] * len(survivals)
    for _, _, row in offers[:best_count]:
        chosen[row] += 1
    return chosen


class Acceptance:
    """What the drafts of one policy version were worth in one traffic class. Counts that forget beyond ``memory``."""

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings
        self._tried = [0.0] * (2 * LEVELS + POSITIONS)
        self._accepted = [0.0] * (2 * LEVELS + POSITIONS)
        self._promised = self._kept = 0.0  # tokens that were verified
        self.draft_s = 0.0  # seconds a drafted token costs, lately
        self.weighed = 0  # steps of requests in which it was weighed whether to ask for a draft

    def chance(self, position: int, confidence: float | None) -> float:
        """That the token at ``position`` (from 0) is accepted when all before it are."""
        at, settings = _level(position, confidence), self.settings
        prior = settings.prior if confidence is None else confidence
        weight = settings.prior_strength
        return (self._accepted[at] + weight * prior) / (self._tried[at] + weight)

    def observe(self, position: int, confidence: float | None, accepted: bool) -> None:
        at, memory = _level(position, confidence), self.settings.memory
        keep = min(1.0, (memory - 1) / self._tried[at]) if self._tried[at] else 1.0
        self._tried[at] = keep * self._tried[at] + 1
        self._accepted[at] = keep * self._accepted[at] + accepted

    @property
    def honesty(self) -> float:
        """What verified tokens brought of what they promised lately, at most 1.

        Who takes the likeliest of many tokens takes those whose chances are guessed too high, the more the more there
        are to take from. Beside sixteen requests that made a draft look worth its rows that was not.
        """
        return min((self._kept + PROMISED_WEIGHT) / (self._promised + PROMISED_WEIGHT), 1.0)

    def settle(self, promised: float, kept: float) -> None:
        """After a step of one request: of its verified tokens so many were ``promised``, so many accepted. Forgets at
        every step, so that a class whose drafts are not verified any more is given another chance."""
        keep = 1 - 1 / self.settings.memory
        self._promised = keep * self._promised + promised
        self._kept = keep * self._kept + kept

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


class RowControl:
    """The K controller of one request."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance, self.settings = acceptance, acceptance.settings
        self._accepted = self._expected = 0.0

    @property
    def luck(self) -> float:
        """How much better than its class this request's drafts have done lately, shrunk towards 1."""
        weight = self.settings.row_strength
        return (self._accepted + weight) / (self._expected + weight)

    def survivals(self, count: int, confidence: Sequence[float]) -> list[float]:
        """For each of ``count`` drafted tokens the probability that the draft up to it is accepted."""
        alive, luck, found = self.acceptance.honesty, self.luck, list[float]()
        for position in range(count):
            chance = self.acceptance.chance(position, confidence[position] if confidence else None)
            alive *= min(chance * luck, MOST)
            found.append(alive)
        return found

    def settle(self, step: VerifyStep, own: int, confidence: Sequence[float]) -> None:
        """What the verified beginning of the draft had promised, and what it brought: its first ``own`` tokens, where
        another drafter went on behind them. Before ``observe``: a promise is what was believed when it was made."""
        count = min(len(step.proposed), own)
        promised = sum(self.survivals(count, confidence)) / self.acceptance.honesty
        self.acceptance.settle(promised, min(step.accepted, count))

    def observe(self, asked: int, draft: Sequence[int], confidence: Sequence[float], committed: Sequence[int]) -> None:
        """Judge the whole draft, verified or not, by what the target then committed."""
        acceptance = self.acceptance
        for position, token in enumerate(draft[: len(committed)]):
            right, sure = token == committed[position], confidence[position] if confidence else None
            self._expected = ROW_KEEP * self._expected + acceptance.chance(position, sure)
            self._accepted = ROW_KEEP * self._accepted + right
            acceptance.observe(position, None, right)
            if sure is not None:
                acceptance.observe(position, sure, right)
            if not right:
                return
        if len(draft) < min(asked, len(committed)):
            acceptance.observe(len(draft), None, False)  # it fell silent: asking for more was in vain


@dataclass(frozen=True, slots=True)
class Offer:
    """The draft of one row: ``count`` tokens with the drafter's ``confidence`` in each, () where it has none."""

    row: RowControl
    count: int
    confidence: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """``ks``: tokens of each draft to verify; ``expected``: how many of them will be accepted.

    ``plain_s``: what the pass would have taken without any draft, ``pass_s`` what it is expected to take; 0 where no
    costs are known.
    """

    ks: list[int]
    expected: list[float]
    plain_s: float = 0.0
    pass_s: float = 0.0


class KController:
    """All of an engine's K control. Without ``costs`` it cannot judge, and every draft is verified whole."""

    def __init__(self, costs: StepCosts | None = None) -> None:
        self.costs = costs
        self._acceptance = OrderedDict[tuple[int, str, int], Acceptance]()  # the last used last

    def row(self, version: int, traffic_class: str, settings: ControlSettings, part: int = 0) -> RowControl:
        """The controller of a request that begins; it shares the experience of its version and class.

        ``part``: which of a policy's drafters, where it asks several in turn. What one of them is sure of says nothing
        of what another's confidence is worth.
        """
        key = (version, traffic_class, part)
        acceptance = self._acceptance.setdefault(key, Acceptance(settings))
        self._acceptance.move_to_end(key)
        if len(self._acceptance) > MOST_KEPT:
            self._acceptance.popitem(last=False)
        return RowControl(acceptance)

    def forget(self, version: int) -> None:
        for key in [key for key in self._acceptance if key[0] == version]:
            del self._acceptance[key]

    def limits(self, rows: Sequence[RowControl], ks: Sequence[int], prompt_rows: int = 0) -> list[int]:
        """How many tokens to ask of each drafter, at most ``ks``. Only a drafter that costs time is ever not asked.

        ``rows``: of those parts that may cost time, one for each request that decodes; beside them the pass computes
        ``prompt_rows`` tokens of prompts.
        """
        if self.costs is None:
            return list(ks)
        base_rows = len(rows) + prompt_rows
        free = FREE_SHARE * self.costs(len(rows))
        dear = [i for i, row in enumerate(rows) if ks[i] and row.settings.enabled and row.acceptance.draft_s > free]
        limits = list(ks)
        if not dear:
            return limits
        per_token = sum(rows[i].acceptance.draft_s for i in dear) / len(dear)
        costs = self._decoding_costs(len(rows), prompt_rows)
        chosen = allocate(
            [rows[i].acceptance.survivals(ks[i]) for i in dear],
            base_rows,
            len(rows),
            lambda count: costs(count) + per_token * (count - base_rows),
            max(rows[i].settings.min_gain for i in dear),
        )
        for i, k in zip(dear, chosen, strict=True):
            acceptance = rows[i].acceptance  # counts for all requests: short ones would never come to their probe
            acceptance.weighed += 1
            probe = acceptance.weighed % rows[i].settings.probe_every == 0
            limits[i] = min(k + probe, ks[i])
        return limits

    def choose(self, offers: Sequence[Offer], prompt_rows: int = 0) -> Choice:
        """How many tokens of each draft to verify; an offer, perhaps of none, for each request that decodes."""
        survivals = [offer.row.survivals(offer.count, offer.confidence) for offer in offers]
        costs, base_rows = self.costs, len(offers) + prompt_rows
        ks = [offer.count for offer in offers]
        steered = [i for i, offer in enumerate(offers) if offer.row.settings.enabled]
        if costs is not None and steered:
            fixed = [i for i, offer in enumerate(offers) if not offer.row.settings.enabled]
            chosen = allocate(
                [survivals[i] for i in steered],
                base_rows + sum(ks[i] for i in fixed),
                len(offers) + sum(sum(survivals[i]) for i in fixed),
                self._decoding_costs(len(offers), prompt_rows),
                max(offers[i].row.settings.min_gain for i in steered),
            )
            for i, k in zip(steered, chosen, strict=True):
                ks[i] = k
        expected = [sum(chances[:k]) for chances, k in zip(survivals, ks, strict=True)]
        if costs is None:
            return Choice(ks, expected)
        return Choice(ks, expected, costs(base_rows), costs(base_rows + sum(ks)))

    def _decoding_costs(self, decoding: int, prompt_rows: int) -> Callable[[int], float]:
        """Seconds of a pass by its rows, less what its prompts take.

        Prompts must be computed whatever is drafted. Were their time part of the choice, a drafted token would have to
        bring only what so slow a step brings in its time, and rows were spent on tokens that hardly ever come.
        """
        costs = self.costs
        assert costs is not None
        if not prompt_rows:
            return costs
        plain = costs(decoding)
        prompts = costs(decoding + prompt_rows) - plain
        return lambda rows: max(costs(rows) - prompts, plain)  # a bump in the profile makes no row cheaper than free


def _level(position: int, confidence: float | None) -> int:
    """Where the experience of such a token is kept: first and later tokens of a draft differ."""
    if confidence is None:
        return 2 * LEVELS + min(position, POSITIONS - 1)
    return min(int(confidence * LEVELS), LEVELS - 1) + (LEVELS if position else 0)
