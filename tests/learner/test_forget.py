"""A version can be made again from the database; a tenant can be forgotten, and what it taught retired."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from threading import Thread
from uuid import uuid4

import pytest
from sqlalchemy import func, insert, select, text
from typer.testing import CliRunner

from engine.cli.main import app
from engine.contracts import ProposerKind, artifact_digest
from engine.learner import learner
from engine.learner.forget import forget
from engine.learner.rebuild import NotRebuilt, rebuild
from engine.registry.publish import publish
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.members import Members
from engine.store.models import LearningIntakeRow, PolicyLineageRow, ShadowRequestRow, TracePayloadRow, TraceRow
from engine.store.repositories import learning, plans, policies, shadow, tenants
from engine.store.repositories.shadow import ShadowRequest
from tests.learner.test_learner import NOW, World
from tests.rollout import database_world as world
from tests.waiting import until


@pytest.fixture
def w(db: Database, tmp_path: Path) -> World:
    return World(db, tmp_path)


def learned(w: World) -> int:
    w.serve(60, tenant="acme")
    w.serve(60, tenant="other")
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.version is not None, attempt.reason
    return attempt.version


def test_a_version_is_made_again_byte_for_byte(w: World) -> None:
    version = learned(w)
    w.serve(100)  # what came later does not matter
    files = rebuild(w.db, version)
    with w.db.read() as session:
        made = policies.get(session, version)
    assert made is not None
    assert artifact_digest(files) == made.digest
    assert files == w.store.files(made.digest)


def test_the_command_line_rebuilds_and_shows_what_was_learned(w: World, database_url: str, tmp_path: Path) -> None:
    version = learned(w)
    flags = ["--set", f"database_url={database_url}", "--set", f"home={tmp_path}", "--set", "learner.price_per_hour=2"]
    run = CliRunner()
    said = run.invoke(app, [*flags, "policy", "rebuild", str(version)], catch_exceptions=False).output
    assert "the same, byte for byte" in said
    shown = run.invoke(app, [*flags, "policy", "show", str(version)], catch_exceptions=False).output
    assert '"tenants"' in shown
    assert '"break_even_requests"' in shown
    assert f"v{version}" in run.invoke(app, [*flags, "policy", "influenced-by", "--tenant", "acme"]).output
    gone = run.invoke(app, [*flags, "forget", "--tenant", "acme", "--retire"], catch_exceptions=False).output
    assert "60 traces of acme deleted" in gone
    assert f"retired v{version}" in gone
    assert "retired" in run.invoke(app, [*flags, "policy", "list"], catch_exceptions=False).output
    assert "may not teach" in run.invoke(app, [*flags, "tenant", "acme", "--no-train"], catch_exceptions=False).output


def test_a_forgotten_tenant_leaves_no_token_and_what_it_taught_is_known(w: World) -> None:
    version = learned(w)
    with w.db.write() as session:
        ids = {tenant: session.scalars(select(TraceRow.trace_id).where(TraceRow.tenant == tenant)).all()[0]
               for tenant in ("acme", "other")}  # fmt: skip
        shadow.write(
            session, [ShadowRequest(1, one, "canary", version, "chat", "k", 4, 8, 2, 0.0) for one in ids.values()]
        )
    done = forget(w.db, "acme", retire=False, actor="t", now=w.now)
    assert (done.traces, done.influenced, done.retired, done.plan) == (60, (version,), (), None)
    with w.db.read() as session:
        assert session.scalar(select(func.count()).where(TraceRow.tenant == "acme")) == 0
        assert session.scalar(select(func.count()).select_from(TracePayloadRow)) == 60
        assert policies.influenced_by_any(session, tenants.ordinals(session, "acme")) == [version]
        assert policies.influenced_by_any(session, []) == []
        assert session.scalars(select(ShadowRequestRow.trace_id)).all() == [ids["other"]]
    with pytest.raises(NotRebuilt, match="no tokens any more"):
        rebuild(w.db, version)
    assert forget(w.db, "acme", retire=False, actor="t", now=w.now).traces == 0  # again: nothing more
    w.now += timedelta(hours=1)
    assert forget(w.db, "nobody", retire=True, actor="t", now=w.now).influenced == ()


def test_retiring_takes_versions_out_of_service_and_their_heirs_too(w: World) -> None:
    version = learned(w)
    with w.db.read() as session:
        parent = policies.get(session, version)
    assert parent is not None
    heir = publish(
        w.db, w.store, build_artifact(ProposerKind.NGRAM, 2, lineage={"draft": parent.digest}), parent=version
    ).version
    with w.db.write() as session:
        now = plans.latest(session)
        assert now is not None
        plans.append(session, champion=heir, fallback=w.none, actor="t", reason="t")
    done = forget(w.db, "acme", retire=True, actor="t", now=w.now)
    assert done.influenced == done.retired == (version, heir)
    assert done.plan is not None
    assert done.plan.champion == w.champion  # the nearest ancestor that the tenant did not teach
    with w.db.read() as session:
        assert learning.awaiting_rollout(session, w.champion) is None
        kept = policies.get(session, heir)
    assert kept is not None
    assert kept.retired_at == w.now


def lineage(db: Database, version: int, ordinal: int) -> None:
    """Say that a version was taught by this one trace."""
    with db.write() as session:
        session.execute(
            insert(PolicyLineageRow).values(
                version=version, role=policies.TRAIN, chunks=list(Members.of([ordinal]).chunks),
                bits=Members.of([ordinal]).bits, window_from=NOW, window_to=NOW, classes={},
            )
        )  # fmt: skip


def family(db: Database, taught: dict[int, int], count: int = 4) -> list[int]:
    """Versions, each the parent of the next; ``taught``: place → the ordinal that taught it, of tenants t1, t2, …"""
    made: list[int] = []
    with db.write() as session:
        for n in range(count):
            version = policies.register(
                session, digest=f"d{n}", kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={},
                parent_version=made[-1] if made else None,
            ).version  # fmt: skip
            made.append(version)
    world.take_in(db, [uuid4() for _ in range(count)], NOW)
    with db.write() as session:
        for row in session.scalars(select(LearningIntakeRow)):
            row.tenant = f"t{row.ordinal}"
    for place, ordinal in taught.items():
        lineage(db, made[place], ordinal)
    return made


def serve(db: Database, champion: int, fallback: int, rollback_to: int | None = None) -> None:
    with db.write() as session:
        plans.append(session, champion=champion, fallback=fallback, rollback_to=rollback_to, actor="t", reason="t")


def test_what_was_retired_earlier_does_not_come_back(db: Database) -> None:
    none, old, parent, child = family(db, {2: 1, 3: 2})
    serve(db, child, none)
    assert forget(db, "t1", retire=True, actor="t", now=NOW).plan is None  # the parent, which serves nobody
    done = forget(db, "t2", retire=True, actor="t", now=NOW)
    assert done.retired == (child,)
    assert done.plan is not None
    assert done.plan.champion == old != parent


def test_a_fallback_that_was_taught_still_serves(db: Database) -> None:
    none, champion, *_ = family(db, {0: 1, 1: 1})
    serve(db, champion, none)
    done = forget(db, "t1", retire=True, actor="t", now=NOW)
    assert done.plan is not None
    assert (done.plan.champion, done.plan.fallback) == (none, none)


def test_a_promotion_can_be_taken_back_when_what_was_before_it_is_retired(db: Database) -> None:
    none, old, before, champion = family(db, {2: 1})
    serve(db, champion, none, rollback_to=before)
    done = forget(db, "t1", retire=True, actor="t", now=NOW)
    assert done.plan is not None
    assert (done.plan.champion, done.plan.rollback_to) == (champion, old)
    with db.write() as session:
        assert plans.roll_back(session, actor="t", reason="bad").champion == old


@pytest.mark.parametrize("how", ["forgotten", "opted out"])
def test_what_is_withdrawn_during_an_attempt_teaches_nothing(
    w: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Forgotten once the candidate is made: it becomes no version, and its files, which hold the tokens, are gone."""
    w.serve(60, tenant="acme")
    w.serve(60, tenant="other")
    publish_now, said = learner.publish, []

    def meanwhile(*args: object, **kwargs: object) -> object:
        if how == "forgotten":
            said.append(forget(w.db, "acme", retire=True, actor="t", now=w.now).influenced)
        else:
            with w.db.write() as session:
                tenants.allow_training(session, "acme", False, "t", w.now)
        return publish_now(*args, **kwargs)  # type: ignore[arg-type]

    before = {path.name for path in w.store.root.iterdir()}
    monkeypatch.setattr(learner, "publish", meanwhile)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert (attempt.outcome, attempt.version) == (learning.REFUSED, None)
    assert "its traces were forgotten meanwhile" in attempt.reason
    assert said in ([()], [])
    assert {path.name for path in w.store.root.iterdir()} == before
    with w.db.read() as session:
        assert len(policies.all_versions(session)) == 2
        assert [a.id for a in learning.attempts(session)] == [attempt.id]


def test_forgetting_waits_for_a_version_that_is_being_registered(db: Database) -> None:
    family(db, {})
    found: list[tuple[int, ...]] = []
    part = policies.Lineage(policies.TRAIN, Members.of([1]), NOW, NOW, {})
    asking = Thread(target=lambda: found.append(forget(db, "t1", retire=True, actor="t", now=NOW).influenced))

    def waits() -> bool:
        with db.read() as session:
            return bool(session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))

    with db.write() as session:
        made = policies.register(
            session, digest="new", kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={}, lineage=[part]
        )
        asking.start()
        until(lambda: waits() or not asking.is_alive(), "somebody who waits")
    asking.join()
    assert found == [(made.version,)]
