"""A version can be made again from the database; a tenant can be forgotten, and what it taught retired."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select
from typer.testing import CliRunner

from engine.cli.main import app
from engine.contracts import ProposerKind, artifact_digest
from engine.learner.forget import forget
from engine.learner.rebuild import NotRebuilt, rebuild
from engine.registry.publish import publish
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.models import TracePayloadRow, TraceRow
from engine.store.repositories import learning, plans, policies, tenants
from tests.learner.test_learner import World


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
    done = forget(w.db, "acme", retire=False, actor="t", now=w.now)
    assert (done.traces, done.influenced, done.retired, done.plan) == (60, (version,), (), None)
    with w.db.read() as session:
        assert session.scalar(select(func.count()).where(TraceRow.tenant == "acme")) == 0
        assert session.scalar(select(func.count()).select_from(TracePayloadRow)) == 60
        assert policies.influenced_by_any(session, tenants.ordinals(session, "acme")) == [version]
        assert policies.influenced_by_any(session, []) == []
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
