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

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.contracts import VerifyStep
from engine.speculation.acceptance import JUDGED, Acceptance, ControlSettings
from engine.speculation.listening import Listening
from engine.speculation.step_costs import StepCosts

FREE_SHARE = 0.01
"""A draft that costs less than this share of a plain pass is no matter of how many tokens are asked for."""
ROW_KEEP = 0.97
"""What a request's own experience keeps with every judged token: some 30 tokens."""
MOST = 0.99
"""No token is certain."""
MOST_LATE = 1.5
"""Times the expected: a pass that was interrupted teaches no more than that."""
MOST_KEPT = 1_024
"""Versions and classes whose experience is kept, those used last; classes are named by clients."""


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


class RowControl:
    """The K controller of one request."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance, self.settings = acceptance, acceptance.settings
        self.before: RowControl | None = None  # of the part that is asked first, where the policy has two
        self.listening: Listening | None = None  # of a part that drafts from the target's hidden states
        self.asked = False  # in this step, by K control
        self.withheld = False  # in this step, as it has not listened
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

    def rows(
        self, version: int, traffic_class: str, settings: ControlSettings, parts: int, reads: bool = False
    ) -> list[RowControl]:
        """``row`` for each part of a policy, in the order in which they are asked; whether the last one ``reads`` the
        target's hidden states."""
        rows = [self.row(version, traffic_class, settings, part) for part in range(parts)]
        for row, first in zip(rows[1:], rows, strict=False):
            row.before = first
        if reads:
            rows[-1].listening = rows[-1].acceptance.audience.join()
        return rows

    def forget(self, version: int) -> None:
        for key in [key for key in self._acceptance if key[0] == version]:
            del self._acceptance[key]

    def begin(self, row: RowControl, requests: int) -> None:
        """The prompt of a request is about to be computed, beside others, ``requests`` in all: whether it listens."""
        if row.listening is not None:
            steered = self.costs is not None and row.settings.enabled
            row.listening.begin(not steered or row.acceptance.pays(requests, 1.0))

    def limits(self, rows: Sequence[RowControl], ks: Sequence[int], prompt_rows: int = 0) -> list[int]:
        """How many tokens to ask of each drafter, at most ``ks``.

        None where asking has not paid lately. Else of one that costs time as many as its past says are worth it, of one
        that costs next to none all it knows. Both are asked now and then in any case, to find out that they pay. A part
        ``before`` is left alone as well where it saves nothing; it takes no pass. And none of one that has not
        listened: whether it does from this step on is decided here.

        ``rows``: of those parts that may cost time, one for each request that decodes; beside them the pass computes
        ``prompt_rows`` tokens of prompts.
        """
        limits = list(ks)
        for row in rows:
            row.asked = False
            row.withheld = row.listening is not None and row.settings.enabled and not row.listening.is_ready
            if row.before is not None:
                row.before.asked = False
        if self.costs is None:
            return limits
        free = FREE_SHARE * self.costs(len(rows))
        steered = [i for i, row in enumerate(rows) if ks[i] and row.settings.enabled]
        firsts = [first for i in steered if (first := rows[i].before) is not None]
        listening = [rows[i] for i in steered if not rows[i].withheld]
        probed = _probed([row.acceptance for row in [*listening, *firsts]], len(rows), free)
        for row in firsts:
            row.asked = row.acceptance.pays(len(rows)) or id(row.acceptance) in probed
        dear, paying, wanted = list[int](), set[int](), set[int]()  # these by what their classes have learned
        for i in steered:
            acceptance = rows[i].acceptance
            costly = acceptance.draft_s > free
            if acceptance.pays(len(rows), 1.0 if costly else JUDGED):
                (paying if costly else wanted).add(id(acceptance))
            elif id(acceptance) not in probed:
                limits[i] = 0
                continue
            rows[i].asked = True
            if costly:
                dear.append(i)
        for i, k in zip(dear, self._worth(rows, ks, dear, prompt_rows), strict=True):
            acceptance = rows[i].acceptance
            limits[i] = min(k + (id(acceptance) in probed), ks[i])
            rows[i].asked = limits[i] > 0
            if k and id(acceptance) in paying:
                wanted.add(id(acceptance))
        for acceptance in {id(rows[i].acceptance): rows[i].acceptance for i in steered}.values():
            acceptance.audience.weigh(id(acceptance) in wanted)
        for i, row in enumerate(rows):
            if row.listening is not None and row.settings.enabled:
                if row.withheld:
                    limits[i], row.asked = 0, False
                row.listening.step()
        return limits

    def _worth(self, rows: Sequence[RowControl], ks: Sequence[int], dear: Sequence[int], prompt_rows: int) -> list[int]:
        """How many tokens to ask of the ``dear`` drafters: by what their past says are worth their time and rows."""
        if not dear:
            return []
        base_rows = len(rows) + prompt_rows
        per_token = sum(rows[i].acceptance.draft_s for i in dear) / len(dear)
        costs = self._decoding_costs(len(rows), prompt_rows)
        return allocate(
            [rows[i].acceptance.survivals(ks[i]) for i in dear],
            base_rows,
            len(rows),
            lambda count: costs(count) + per_token * (count - base_rows),
            max(rows[i].settings.min_gain for i in dear),
        )

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


def learn_worth(
    rows: Sequence[Sequence[RowControl]],
    spoke: Sequence[int],
    choice: Choice,
    accepted: Sequence[float],
    pass_s: float,
) -> None:
    """What a step without prompts saved, against plain decoding of as many tokens: to each class what its own drafts
    brought and cost, and of a policy's parts to the one that ``spoke``, nothing to another that was asked as well.

    ``rows``: all parts of each request's policy. By what was ``accepted`` of each and the ``pass_s`` that it took: the
    likeliest of many tokens promise more than they bring, and a row costs more than its products.
    """
    per_token, verified = choice.plain_s / len(rows), sum(choice.ks)
    took = min(pass_s, MOST_LATE * choice.pass_s)
    per_row = (took - choice.plain_s) / verified if verified else 0.0
    saved: dict[int, list[float]] = {}
    acceptances = {id(row.acceptance): row.acceptance for parts in rows for row in parts}
    for parts, speaker, k, kept in zip(rows, spoke, choice.ks, accepted, strict=True):
        for part, row in enumerate(parts):
            if row.asked:
                brought = per_token * kept - per_row * k if part == speaker else 0.0
                saved.setdefault(id(row.acceptance), []).append(brought)
    for key, shares in saved.items():
        acceptances[key].saved(len(rows), sum(shares) / len(shares))


def learn_costs(rows: Sequence[RowControl], seconds: Sequence[float], asked: Sequence[int]) -> None:
    """What asking for so many tokens took each request, to its class; who was asked for none in the end was not asked.

    Not where others of the class had not listened: who is asked alone takes the whole pass of the draft, of which each
    has a share when all are asked, and drafting would look too dear to begin again.
    """
    alone = {id(row.acceptance) for row in rows if row.withheld}
    for row, took, tokens in zip(rows, seconds, asked, strict=True):
        row.asked &= tokens > 0  # not where the part before it was sure
        if tokens and (id(row.acceptance) not in alone or not row.acceptance.ask_s):
            row.acceptance.took(took, tokens)


def _probed(acceptances: Sequence[Acceptance], requests: int, free: float) -> set[int]:
    """Whose drafters are asked in any case in this step of so many ``requests``: all of a class and version at once,
    for a pass over all of them takes hardly longer than over one. Counts for all, as short requests would never come to
    their probe. ``acceptances``: of each request that can be asked; drafts of ``free`` seconds cost nothing."""
    found = set[int]()
    for one, asked in Counter(acceptances).items():
        if one.probe(requests, asked, 1.0 if one.draft_s > free else JUDGED):
            found.add(id(one))
    return found
