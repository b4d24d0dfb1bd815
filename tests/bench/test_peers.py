"""What stands against another server is plain decoding, not what an empty system begins with."""

from __future__ import annotations

import pytest

from engine.bench.peers import plain_plan
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
