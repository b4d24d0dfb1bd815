"""What a policy earns in shadow is what it earns when it serves, whatever it reads and however small the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from engine.contracts import SpecCounts, Status, TraceRecord
from engine.model.loading import Target
from engine.runner.engine import RequestResult
from engine.speculation.draft_pool import DraftPool, Proposal, Want
from engine.speculation.proposer import Proposer
from tests.runner.drafts import neural, trained_draft
from tests.runner.driving import MEMORY, NGRAM, NONE, Scripted, alone, engine_of, memory_of, request

NEURAL, SPECIAL = 4, 9
PROMPTS = [(5, 9, 5, 9, 5, 9, 30, 31), (40, 41, 42, 40, 41), (7,) * 12]


@pytest.fixture(scope="module")
def policies(tiny: Target) -> dict[int, Proposer]:
    plain = [alone(tiny, request(f"p{i}", prompt)) for i, prompt in enumerate(PROMPTS)]
    draft = trained_draft(tiny, plain, steps=30)
    return {MEMORY: memory_of(plain[:1]), NEURAL: neural(draft)}


def finished(result: RequestResult, max_tokens: int = 24) -> TraceRecord:
    return TraceRecord(
        uuid4(), "r", "r0", datetime.now(UTC), NONE, "champion", 1, "chat", Status.OK, "tiny", "chat", "k",
        max_tokens=max_tokens, payload=result.payload,
    )  # fmt: skip


@pytest.mark.parametrize("piece", [1, 5, 64])
@pytest.mark.parametrize("version", [NONE, NGRAM, MEMORY, NEURAL])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_shadow_counts_what_serving_counts(
    tiny: Target, policies: dict[int, Proposer], version: int, piece: int, temperature: float
) -> None:
    engine = engine_of(tiny, policies)
    for i, prompt in enumerate(PROMPTS):
        sampling = {"temperature": temperature, "seed": 3}
        plain = alone(tiny, request("plain", prompt, NONE, **sampling))
        served = alone(tiny, request("served", prompt, version, **sampling), policies)
        replay, made = engine.shadow(version, finished(plain)), 0
        while not replay.is_done:
            made += replay.advance(piece)
        replay.end()
        assert asdict(replay.counts) == asdict(served.counts), f"prompt {i}"
        assert made <= len(prompt) + 2 * 24 + piece
        engine.check_integrity()  # the places of requests are nobody else's
    if version != NONE and temperature == 0:
        assert replay.counts.drafted


def moody(tokens: Sequence[int], k: int) -> list[int]:
    if len(tokens) % 3:
        raise RuntimeError("not now")
    return list(tokens[-k:])


class FailingPool(DraftPool):
    """Drafts twice, and never again."""

    made = 0

    def propose(self, wants: Sequence[Want]) -> list[Proposal]:
        self.made += bool(wants)
        if self.made > 2:
            raise RuntimeError("broken draft")
        return super().propose(wants)


class DeafPool(DraftPool):
    def feed(self, fed: object) -> None:
        raise RuntimeError("broken draft")


@pytest.mark.parametrize(
    "think",
    [moody, lambda t, k: 1 // 0, lambda t, k: [1] * (k + 1), lambda t, k: [10**6]],
    ids=["now and then", "always", "too many tokens", "no token"],
)
def test_a_draft_that_fails_counts_in_shadow_as_in_serving(tiny: Target, think: object) -> None:
    """It drops out of no sample: its request is there, with the plain steps that serving would have made."""
    policies: dict[int, Proposer] = {SPECIAL: Scripted(think)}
    same_as_served(tiny, policies, SPECIAL)


@pytest.mark.parametrize("pool", [FailingPool, DeafPool])
def test_so_does_one_that_reads_hidden_states(
    tiny: Target, policies: dict[int, Proposer], pool: type[DraftPool]
) -> None:
    same_as_served(tiny, {NEURAL: neural(policies[NEURAL].proposer.draft, pool)}, NEURAL)  # type: ignore[attr-defined]


def same_as_served(tiny: Target, policies: dict[int, Proposer], version: int) -> None:
    for prompt in PROMPTS:
        engine = engine_of(tiny, policies)
        plain = alone(tiny, request("plain", prompt, NONE))
        served = alone(tiny, request("served", prompt, version), policies)
        replay = engine.shadow(version, finished(plain))
        while not replay.is_done:
            replay.advance(5)
        replay.end()
        assert asdict(replay.counts) == asdict(served.counts)
        assert replay.draft_errors == served.draft_errors > 0
        engine.check_integrity()


def test_a_shadow_that_is_given_up_leaves_room_for_the_next(tiny: Target, policies: dict[int, Proposer]) -> None:
    engine, counts = engine_of(tiny, policies), list[SpecCounts]()
    record = finished(alone(tiny, request("plain", PROMPTS[0])))
    for steps in (2, 1_000):
        replay = engine.shadow(NEURAL, record)
        for _ in range(steps):
            if not replay.is_done:
                replay.advance(3)
        replay.end()
        counts.append(replay.counts)
    assert counts[0].steps < counts[1].steps
