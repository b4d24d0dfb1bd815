"""What a deterministic proposer would have earned on a stored greedy response, without decoding it again.

Greedy verification accepts a drafted token exactly when it equals the token the target chose, and the stored response
is what it chose; so the counts are those that the runner would have made (a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.contracts import SpecCounts, VerifyStep
from engine.speculation.control import KController, Offer, learn_costs, learn_worth
from engine.speculation.proposer import Drafter, HiddenReader, InTurn, Proposer, Said, asked_of, judge, parts


def replay(
    proposer: Proposer,
    traffic_class: str,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    k: int | None = None,
    max_tokens: int | None = None,
) -> SpecCounts:
    """Counts of ``proposer`` on one response; ``k`` defaults to its own K.

    ``max_tokens`` is the request's limit: drafts never reach past it. Without it the response is taken to have ended
    by itself.
    """
    limit = proposer.num_speculative_tokens if k is None else k
    counts = SpecCounts()
    drafter = _drafter(proposer, prompt_ids, output_ids, traffic_class)
    drafter.observe(output_ids[:1])  # the first token comes from the prefill
    done = 1
    while done < len(output_ids):
        room = limit if max_tokens is None else min(limit, max_tokens - done - 1)
        step = verify_stored(drafter.propose(room) if room > 0 else [], output_ids[done:])
        counts.add(step)
        drafter.observe(output_ids[done : done + step.emitted])
        done += step.emitted
    return counts


def replay_controlled(
    proposer: Proposer,
    controller: KController,
    version: int,
    traffic_class: str,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    max_tokens: int,
    draft_pass_s: float = 0.0,
) -> tuple[SpecCounts, float]:
    """The same with the engine's K control, one request at a time: (counts, seconds of its target passes).

    ``controller`` must have costs; it remembers what ``version`` was worth in the class, from one call to the next. The
    seconds are those costs, not measured here, and ``draft_pass_s`` for each pass that a neural draft makes.
    """
    assert controller.costs is not None
    counts, seconds, last = SpecCounts(), 0.0, parts(proposer) - 1
    reads = isinstance(proposer, HiddenReader)
    rows = controller.rows(version, traffic_class, proposer.control, last + 1, reads)
    controller.begin(rows[last], 1)
    drafter = _drafter(proposer, prompt_ids, output_ids, traffic_class)
    in_turn = drafter if isinstance(drafter, InTurn) else None
    drafter.observe(output_ids[:1])
    done = 1
    while done < len(output_ids):
        most, before = max(0, min(proposer.num_speculative_tokens, max_tokens - done - 1)), _passes(drafter)
        (limit,) = controller.limits([rows[last]], [most])
        draft, part = list[int](), last
        said: Sequence[Said] = ()
        if in_turn is not None and (k := most if rows[0].asked else limit):
            draft, said, part = in_turn.propose(k, limit), in_turn.said, in_turn.part
        elif limit:
            draft = drafter.propose(limit)
            said = [Said(last, limit, draft, drafter.confidence)]
        learn_costs([rows[last]], [(_passes(drafter) - before) * draft_pass_s], [asked_of(last, said)])
        confidence = drafter.confidence if draft else ()
        choice = controller.choose([Offer(rows[part], len(draft), confidence)])
        k = choice.ks[0]
        step = verify_stored(draft[:k], output_ids[done:])
        learn_worth([rows], [part], choice, [step.accepted], choice.pass_s)
        committed = output_ids[done : done + step.emitted]
        judge(rows, part, said, step, confidence, committed)
        drafter.observe(committed)
        counts.add(step)
        seconds += controller.costs(1 + k)
        done += step.emitted
    return counts, seconds + _passes(drafter) * draft_pass_s


def _passes(drafter: Drafter) -> int:
    """That a neural draft has made so far."""
    return int(getattr(drafter, "passes", 0))


def _drafter(proposer: Proposer, prompt_ids: Sequence[int], output_ids: Sequence[int], traffic_class: str) -> Drafter:
    if isinstance(proposer, HiddenReader):
        return proposer.rehearse(prompt_ids, output_ids, traffic_class)
    return proposer.start(prompt_ids, traffic_class)


def verify_stored(draft: Sequence[int], truth: Sequence[int]) -> VerifyStep:
    """One greedy verify step against the tokens that really followed; ``truth`` is not empty."""
    accepted = 0
    while accepted < min(len(draft), len(truth)) and draft[accepted] == truth[accepted]:
        accepted += 1
    if accepted == len(truth):  # the response ended inside the draft: its tail counts as nothing
        return VerifyStep(tuple(draft[:accepted]), accepted, accepted)
    return VerifyStep(tuple(draft), accepted, accepted + 1)
