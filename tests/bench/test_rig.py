"""What a benchmark waits for before it measures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engine.bench.rig import Rig
from engine.contracts import ProposerKind, SlipstreamError
from engine.ops.supervisor import Supervisor
from engine.settings import Settings
from engine.store.database import Database
from engine.store.repositories import plans, policies

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def test_a_plan_is_followed_once_a_replica_routes_by_all_of_it(db: Database, tmp_path: Path) -> None:
    system = Rig(Settings(home=tmp_path), Supervisor(tmp_path, print), db)
    with db.write() as session:
        plain = policies.register(session, digest="a", kind=ProposerKind.NONE, num_speculative_tokens=0, manifest={})
        first, plan = (
            plans.append(session, champion=plain.version, fallback=plain.version, actor="test", reason=reason)
            for reason in ("first", "second")
        )

    def observed(replica: str, generation: int, minutes: int, error: str | None = None) -> None:
        with db.write() as session:
            plans.observe(session, replica, generation, NOON + timedelta(minutes=minutes), 0.1, error)

    observed("a", first.generation, 0)
    observed("a", plan.generation, 1, "its files are not there")
    with pytest.raises(SlipstreamError, match=f"generation {plan.generation} to be followed"):
        system.followed(plan, 0.0)
    observed("b", plan.generation, 2)
    assert system.followed(plan, 0.0) == NOON + timedelta(minutes=2)
    observed("a", plan.generation, 3)
    assert system.followed(plan, 0.0) == NOON + timedelta(minutes=3)
