"""Every page draws on an empty database and on a full one, and its buttons write what they say."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text as sql
from streamlit.testing.v1 import AppTest

from app.components.context import plain
from app.components.export import command
from engine.contracts import Status
from engine.settings import TelemetrySettings
from engine.store import frames
from engine.store.database import Database
from engine.store.panels import PANELS
from engine.store.repositories import commands, drift, plans, rollouts, traces
from engine.store.repositories.overview import Slice
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.app.seed import beat
from tests.app.sheets import sheets
from tests.telemetry.records import record

PAGES = Path(__file__).parents[2] / "app" / "views"
NAMES = ("overview", "rollouts", "versions", "traces", "speculation", "drift", "explain", "system")


def page(name: str, **query: str) -> AppTest:
    test = AppTest.from_file(str(PAGES / f"{name}.py"), default_timeout=60)
    for key, value in query.items():
        test.query_params[key] = value
    return test.run()


def text(test: AppTest) -> str:
    return "\n".join(str(element.value) for element in [*test.markdown, *test.caption, *test.info, *test.success])


def confirmed(test: AppTest, verb: str, reason: str) -> None:
    """AppTest knows no partial reruns: what is typed and what is pressed in a dialog go in one."""
    test.button(key=verb).click().run()
    test.text_input(key="reason").set_value(reason)
    test.button(key="confirm").click().run()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_database_says_what_to_do(dashboard: str, name: str) -> None:
    test = page(name)
    assert not test.exception
    assert any(word in text(test) for word in ("slipstream up", "Choose a longer"))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_database_draws(seeded: Database, name: str) -> None:
    test = page(name)
    assert not test.exception, test.exception


def test_one_session_goes_from_page_to_page_and_back(seeded: Database) -> None:
    """What one page keeps in the session must not be another's widget."""
    test = AppTest.from_file(str(PAGES.parent / "main.py"), default_timeout=60).run()
    for name in (*NAMES, *reversed(NAMES)):
        test.switch_page(f"views/{name}.py").run()
        assert not test.exception, (name, test.exception)


def test_the_verdict_comes_first(seeded: Database) -> None:
    test = page("overview")
    first = test.markdown[0].value
    assert first.startswith("**v3** serves as champion: p95 ")
    assert "Canary **v5** takes 30 %: " in first
    row = next(element.proto.body for element in test.get("html") if 'class="cards"' in element.proto.body)
    assert row.count('class="value"') == 10


@pytest.mark.parametrize("by", ["class", "arm", "version", "replica"])
@pytest.mark.parametrize("metric", ["e2e", "queue"])
def test_every_percentile_is_told_by_class_arm_version_and_replica(seeded: Database, by: str, metric: str) -> None:
    test = page("overview", by=by, latency=metric)
    assert not test.exception
    shown = sheets(test)[f"Traffic by {by}"]
    assert len(shown["requests"]) > (by != "replica")
    rising = [[float(ms.replace(",", "")) for ms in shown[f"{q}, ms"]] for q in ("p50", "p90", "p95", "p99", "p99.9")]
    assert (np.diff(rising, axis=0) >= 0).all()
    assert {"goodput, %", "errors, %", "retries, %"} <= set(shown)
    assert "TTFT up to 1 s, TPOT up to 100 ms" in text(test)


def test_the_panels_of_rollouts_say_what_their_page_does(seeded: Database) -> None:
    part = Slice(datetime.now(UTC) - timedelta(days=30), datetime.now(UTC) + timedelta(minutes=1))
    names = [name for name in PANELS if name.startswith("rollouts.")]
    with seeded.read() as session:
        found = {name: PANELS[name].read(session, part) for name in names}
        known = rollouts.list_rollouts(session)
    assert [row["id"] for row in found["rollouts.tried"]] == [one.id for one in known]
    assert {row["rollout"] for row in found["rollouts.decisions"]} <= {one.id for one in known}
    assert any(row["guards"] for row in found["rollouts.decisions"])
    assert all(found.values()), names
    for name, rows in found.items():
        for form in frames.FORMATS:
            assert frames.encode(rows, form, {"panel": name})


def test_filters_come_from_the_url(seeded: Database) -> None:
    test = page("traces", **{"class": "code"})
    shown = test.dataframe[0].value
    assert set(shown["traffic_class"]) == {"code"}


def test_one_trace_shows_its_tokens(seeded: Database) -> None:
    with seeded.read() as session:
        plan = plans.latest(session)
        assert plan is not None
        now = datetime.now(UTC)
        trace_id = traces.listed(session, Slice(now - timedelta(hours=2), now), limit=1)[0]["trace_id"]
    test = page("traces", trace=str(trace_id))
    assert not test.exception
    assert "acceptance length" in text(test)
    assert test.button(key="back")


def test_a_trace_that_is_not_there(seeded: Database) -> None:
    assert "looks like" in page("traces", trace="nonsense").error[0].value
    missing = page("traces", trace="00000000-0000-4000-8000-000000000000")
    assert "no such trace" in missing.warning[0].value


def test_roll_back_writes_one_plan_and_shows_when_it_took_effect(seeded: Database) -> None:
    test = page("rollouts")
    test.button(key="roll_back").click().run()
    test.button(key="confirm").click().run()
    with seeded.read() as session:
        assert len(plans.history(session)) == 7, "a reason is asked for"
    confirmed(test, "roll_back", "p99 went up")
    with seeded.read() as session:
        history = plans.history(session)
    assert len(history) == 8
    newest = history[0]
    assert (newest.champion, newest.arms, newest.actor, newest.reason) == (3, (), "dashboard", "p99 went up")
    assert "replica-0" in test.warning[0].value
    assert "effective" not in test.warning[0].value
    beat(seeded, newest.created_at)
    test.run()
    assert "effective on 1 of 1 replicas after 0.12 s" in test.success[0].value


def test_a_replica_that_cannot_serve_the_plan_is_named_with_its_reason(seeded: Database) -> None:
    test = page("rollouts")
    confirmed(test, "roll_back", "p99 went up")
    with seeded.write() as session:
        newest = plans.latest(session)
        assert newest is not None
        plans.observe(session, "replica-0", newest.generation, newest.created_at, 0.0, error="v3: no such artifact")
    test.run()
    assert "replica-0: v3: no such artifact" in test.error[0].value
    assert not test.success


def test_roll_back_serves_the_version_it_showed_whatever_happened_meanwhile(seeded: Database) -> None:
    test = page("rollouts")
    assert test.button(key="roll_back").label == "Roll back to v3"
    test.button(key="roll_back").click().run()
    assert "**v3** will serve all traffic" in text(test)
    with seeded.write() as session:
        plans.roll_back(session, actor="rollout 3", reason="tokens_per_step: the canary is worse")
    test.text_input(key="reason").set_value("p99 went up")
    test.button(key="confirm").click().run()
    with seeded.read() as session:
        newest = plans.history(session)[0]
    assert (newest.actor, newest.champion, newest.arms) == ("dashboard", 3, ())


def test_hold_asks_the_controller_and_writes_no_plan(seeded: Database) -> None:
    test = page("rollouts")
    confirmed(test, "hold", "let us look first")
    with seeded.read() as session:
        active = rollouts.active(session)
        assert active is not None
        asked = commands.asked(session, active.id)
        assert len(plans.history(session)) == 7
    assert "asked to hold: let us look first" in text(test)
    assert [(c.verb, c.actor, c.reason) for c in asked] == [("hold", "dashboard", "let us look first")]


@pytest.mark.parametrize("what", ["one request", "one request without any time"])
def test_a_single_request_draws_on_every_page(dashboard: str, db: Database, tmp_path: Path, what: str) -> None:
    """One row has no spread, no second bin and no trend; a refused request has no latency and no verify step."""
    nothing = {"queue_s": None, "ttft_s": None, "tpot_s": None, "steps": 0, "drafted": 0, "accepted": 0,
               "drafted_per_pos": (), "accepted_per_pos": (), "status": Status.REJECTED, "output_tokens": 0,
               "payload": None}  # fmt: skip
    changes: dict[str, Any] = nothing if what.endswith("time") else {"status": Status.OK}
    writer = TraceWriter(db, Spill(tmp_path / "spill", 10**8), TelemetrySettings())
    one = record(1, started_at=datetime.now(UTC) - timedelta(minutes=2), **changes)
    writer._transaction(Batch(writer._writer_id, 1, [one]))
    for name in NAMES:
        test = page(name)
        assert not test.exception, (name, test.exception)


def test_a_tenant_named_like_an_image_fetches_none(seeded: Database) -> None:
    bad = "tenant ![x](http://evil.example/a.png) <b>"
    now = datetime.now(UTC)
    since = now - timedelta(hours=1)
    new = drift.Finding("new_traffic", bad, None, None, since, now, since, now, 0.5, 0.5, 0.02, 10, f"{bad}: 50 %")
    with seeded.write() as session:
        drift.record(session, [new], now)
    shown = text(page("drift"))
    assert "50" in shown
    assert "![x](" not in shown
    assert plain(bad) in shown


def test_a_command_to_paste_runs_nothing_that_the_address_says() -> None:
    bad = "code; rm -rf ~ $(id)"
    now = datetime.now(UTC)
    given = shlex.split(command("overview.totals", "csv", Slice(now - timedelta(hours=1), now, bad, bad, 3)))
    assert given[given.index("--class") + 1] == given[given.index("--arm") + 1] == bad
    assert given[given.index("--version") + 1] == "3"


def test_only_what_markdown_reads_is_escaped() -> None:
    """A backslash before any other sign would be seen."""
    assert plain("v2 → v3, 97 % of it") == r"v2 → v3\, 97 \% of it"


def test_explain_says_the_command_with_every_filter_quoted(seeded: Database) -> None:
    asked = {"class": "code; rm -rf ~", "arm": "canary $(id)"}
    given = shlex.split(page("explain", **asked).code[-1].value)
    assert {name: given[given.index(f"--{name}") + 1] for name in asked} == asked


@pytest.mark.parametrize("second", [0, 17, 43])
def test_the_cards_of_explain_count_the_requests_that_its_sentence_is_about(seeded: Database, second: int) -> None:
    until = datetime.now(UTC).replace(second=second, microsecond=0) - timedelta(minutes=2)
    asked = {"from": (until - timedelta(minutes=40)).isoformat(), "to": until.isoformat()}
    test = page("explain", **asked)
    row = next(element.proto.body for element in test.get("html") if 'class="cards"' in element.proto.body)
    shown = re.search(r'Requests.*?class="value">([0-9]+)', row, re.DOTALL)
    said = re.search(r"answered requests\) against .*\(([0-9]+)\)", text(test))
    assert shown is not None
    assert said is not None
    with seeded.read() as session:
        whole = until.replace(second=0)
        minutes = {"since": whole - timedelta(minutes=40), "until": whole + timedelta(minutes=bool(second))}
        where = "started_at >= :since AND started_at < :until AND status <> 'ok'"
        failed = session.execute(sql(f"SELECT count(*) FROM traces WHERE {where}"), minutes).scalar_one()
    assert int(shown[1]) == int(said[1]) + failed > 100
