"""What stands against another server is plain decoding, not what an empty system begins with."""

from __future__ import annotations

import pytest

from engine.bench import peers
from engine.bench.peers import plain_plan, quiet
from engine.contracts import CANARY, CONTROL, Arm, ProposerKind, SlipstreamError
from engine.store.database import Database
from engine.store.repositories import plans, policies


def test_every_request_is_decoded_plainly_against_a_peer(db: Database) -> None:
    with pytest.raises(SlipstreamError, match="No engine"):
        plain_plan(db)
    with db.write() as session:
        plain, ngram = (
            policies.register(session, digest=kind, kind=kind, num_speculative_tokens=k, manifest={}).version
            for kind, k in ((ProposerKind.NONE, 0), (ProposerKind.NGRAM, 4))
        )
        arms = (Arm(CANARY, ngram, 0.1), Arm(CONTROL, plain, 0.1))
        plans.append(session, champion=ngram, fallback=plain, arms=arms, actor="engine", reason="an empty ledger")
    plan = plain_plan(db)
    assert plan.versions == {plain}
    with db.read() as session:
        assert plans.latest(session) == plan


def test_a_block_waits_until_the_one_before_is_over() -> None:
    """One of 64 processors is 1.6 %."""
    loads, said = [55.0, 48.0, 1.6, 0.1, 99.0], list[str]()
    quiet(said.append, lambda interval: loads.pop(0), 64)
    assert loads == [99.0]
    assert not said


def test_processors_that_do_not_come_to_rest_are_said() -> None:
    looks, said = list[float](), list[str]()

    def used(interval: float) -> float:
        looks.append(interval)
        return 62.0

    quiet(said.append, used, 2)
    assert len(looks) == peers.LOOKS
    assert "1.2 processors" in said[0]
