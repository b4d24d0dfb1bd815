"""What an outage leaves waiting is written afterwards, however much it is."""

from __future__ import annotations

from uuid import uuid4

from sqlalchemy import func, select

from engine.server.findings import Findings
from engine.store.database import Database
from engine.store.models import ShadowRequestRow
from engine.store.repositories.shadow import ShadowRequest


def test_more_rows_than_one_statement_takes_are_written_once_each(db: Database) -> None:
    findings = Findings(db, "r0")
    for key in range(7_000):  # ten values each: Postgres takes 65,535 in a statement
        findings._shadowed.append(ShadowRequest(1, uuid4(), "canary", 2, "chat", f"k{key}", 8, 16, 4, 0.001))
    findings.flush()
    findings.flush()
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(ShadowRequestRow)) == 7_000
    assert not findings._shadowed
