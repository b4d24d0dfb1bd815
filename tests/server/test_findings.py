"""What an outage leaves waiting is written afterwards, however much it is."""

from __future__ import annotations

import threading
from uuid import uuid4

import pytest
from sqlalchemy import func, select

from engine.server import findings as findings_module
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


def test_an_error_that_nobody_foresaw_ends_no_thread_and_loses_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a write that fails of Python once. Before, the thread ended, and no mismatch was heard of."""
    monkeypatch.setattr(findings_module, "RETRY_S", 0.0)
    right, written, failed = findings_module.shadow.write, threading.Event(), []

    def write(session: object, rows: list[ShadowRequest]) -> None:
        if not failed:
            failed.append(findings.stats())
            raise ZeroDivisionError("nobody foresaw this")
        shown.append(findings.error)
        right(session, rows)  # type: ignore[arg-type]
        written.set()

    shown: list[str | None] = []
    monkeypatch.setattr(findings_module.shadow, "write", write)
    findings = Findings(db, "r0")
    findings._shadowed.append(ShadowRequest(1, uuid4(), "canary", 2, "chat", "k", 8, 16, 4, 0.001))
    findings._news.set()
    findings.start()
    assert written.wait(60)
    findings.stop()
    assert failed == [{"waiting": 1, "error": None}]
    assert shown == ["ZeroDivisionError: nobody foresaw this"]
    assert findings.stats() == {"waiting": 0, "error": None}
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(ShadowRequestRow)) == 1
