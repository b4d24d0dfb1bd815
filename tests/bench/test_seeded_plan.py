"""The ledger of a seeded database: an engine can load what it names, and what has no files is not named."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from engine.bench import seeded_plan, seeded_rollouts
from engine.contracts import CANARY, CONTROL, ProposerKind, RolloutState
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version
from engine.speculation.artifact import build_artifact, load_proposer
from engine.store.database import Database
from engine.store.repositories import plans, policies, rollouts, seeding


def begun(db: Database, store: ArtifactStore) -> None:
    """What an engine leaves when it starts on an empty database."""
    none = ensure_version(db, store, build_artifact(ProposerKind.NONE, 0))
    with db.write() as session:
        plans.append(session, champion=none.version, fallback=none.version, actor="engine", reason="first start")


def test_the_plan_is_that_of_the_rollout_at_work_and_can_be_loaded(db: Database, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    begun(db, store)
    seeded_plan.add_versions(db, store, seeding.NEWEST)
    seeded_rollouts.write(db, datetime.now(UTC), seeding.NEWEST, 0)
    plan = seeded_plan.serve_as_tried(db, store)
    assert plan is not None
    assert plan == seeded_plan.serve_as_tried(db, store), "a folder that is used again"
    with db.read() as session:
        tried = rollouts.active(session)
        named = policies.some(session, tuple(plan.versions))
    assert tried is not None
    assert tried.state is RolloutState.WATCHING
    assert (plan.champion, plan.rollback_target, plan.rollout_id) == (tried.canary, tried.champion, tried.id)
    assert {arm.name: arm.policy_version for arm in plan.arms} == {CANARY: tried.canary, CONTROL: tried.champion}
    for version in named:
        assert load_proposer(store.files(version.digest), version.digest, None)


def test_versions_without_files_are_not_served(db: Database, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    begun(db, store)
    with db.write() as session:
        seeding.add_versions(session, seeding.NEWEST)
    seeded_rollouts.write(db, datetime.now(UTC), seeding.NEWEST, 0)
    assert seeded_plan.serve_as_tried(db, store) is None
