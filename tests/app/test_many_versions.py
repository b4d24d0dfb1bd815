"""Ten thousand versions, each with traffic in the window: every page draws, and none draws ten thousand of anything."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from streamlit.testing.v1 import AppTest

from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.repositories import plans
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.app.sheets import sheets
from tests.app.test_pages import NAMES, page
from tests.telemetry.records import record

MANY = 10_000
SERVING = 400
MOST_ROWS, MOST_LINES = 200, 60


@pytest.fixture
def many(dashboard: str, db: Database, tmp_path: Path) -> Database:
    """All descend from v1; the last few hundred have served in the last hour."""
    now = datetime.now(UTC)
    with db.write() as session:
        session.execute(
            text(
                "INSERT INTO policy_versions (digest, kind, num_speculative_tokens, parent_version, manifest)"
                " SELECT lpad(to_hex(n), 64, '0'), 'trace_memory', 4, CASE WHEN n > 1 THEN greatest(1, n - n % 7 - 1)"
                ' END, \'{"kind": "trace_memory"}\' FROM generate_series(1, :many) AS n'
            ),
            {"many": MANY},
        )
        plans.append(session, champion=MANY, fallback=1, salt="s", actor="engine", reason="first start")
    served = [
        record(n, started_at=now - timedelta(seconds=3 * n + 60), policy_version=MANY - n % SERVING)
        for n in range(3 * SERVING)
    ]
    writer = TraceWriter(db, Spill(tmp_path / "spill", 10**8), TelemetrySettings())
    writer._transaction(Batch(writer._writer_id, 1, served))
    return db


def test_no_page_draws_all_of_ten_thousand_versions(many: Database) -> None:
    for name in NAMES:
        test = page(name)
        assert not test.exception, (name, test.exception)
        assert max((len(frame.value) for frame in test.dataframe), default=0) <= MOST_ROWS, name
        rows = [len(cells) for table in sheets(test).values() for cells in table.values()]
        assert max(rows, default=0) <= MOST_ROWS, name
        assert max((lines(chart) for chart in charts(test)), default=0) <= MOST_LINES, name
        assert all(len(box.options) <= MOST_ROWS for box in test.selectbox), name


def test_every_version_can_be_reached(many: Database) -> None:
    test = page("versions", about="v4711", show="all")
    assert any("Family of v4711" in str(element.value) for element in test.markdown)
    listed = next(frame.value for frame in test.dataframe if "p95_trend" in frame.value.columns)
    assert list(listed["version"].iloc[0]) == [f"v{MANY}"]
    assert len(listed) == 50


def test_a_share_is_of_all_requests_and_not_of_those_shown(many: Database) -> None:
    test = page("overview", by="version")
    found = [table["share of requests"] for table in sheets(test).values() if "share of requests" in table]
    assert len(found) == 2
    for shares in found:
        assert [float(share.removesuffix(" %")) for share in shares] == pytest.approx([100 / SERVING] * 50, abs=0.06)


def charts(test: AppTest) -> list[dict[str, object]]:
    """The specs of the Plotly charts, as they go to the browser."""
    return [json.loads(element.proto.spec) for element in test.get("plotly_chart")]


def lines(chart: dict[str, object]) -> int:
    found = chart.get("data")
    assert isinstance(found, list)
    return len(found)
