"""Dry runs and replays on the rollouts page: both say where something is wrong."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
from sqlalchemy import text as sql
from streamlit.testing.v1 import AppTest

from app.components.rehearsal import found_rows, incident_rows
from engine.rollout import specs
from engine.rollout.dry_run import Equal, Found, Incident
from engine.store.database import Database
from engine.store.repositories import rollouts
from tests.app.test_pages import page, text


def dry_run(test: AppTest) -> AppTest:
    test.button(key="new").click().run()
    test.segmented_control(key="new-preset").set_value("fast").run()
    return test.button(key="new-dry-run").click().run()


def frames_with(test: AppTest, column: str) -> list[object]:
    return [frame.value for frame in test.dataframe if column in frame.value.columns]


def test_a_dry_run_says_what_the_guards_would_have_done(seeded: Database) -> None:
    test = dry_run(page("rollouts"))
    assert not test.exception, test.exception
    said = next(box.value for box in test.success if "splits of" in box.value)
    assert "0 of 12 splits" in said
    assert "falsely (0.0 %, up to" in said
    assert "The steps and the soak alone take" in text(test)
    (found,) = frames_with(test, "planted")
    assert list(found["guard"]) == ["tokens / step", "p50 TPOT", "errors", "timeouts"]  # type: ignore[index]
    (over,) = frames_with(test, "ended")
    assert list(over["ended"]) == ["rolled back", "done"]  # type: ignore[index]


def test_guards_that_would_have_fired_falsely_say_so(seeded: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a guard that takes one version's own traffic for two that differ."""
    monkeypatch.setattr("engine.rollout.dry_run._split", by_class)
    test = dry_run(page("rollouts"))
    assert not test.exception, test.exception
    said = next(box.value for box in test.error if "splits of" in box.value)
    assert "12 of 12 splits" in said
    assert "rolled back falsely" in said
    assert ", by " in said
    assert not [box for box in test.success if "splits" in box.value]


def by_class(past, salt):  # type: ignore[no-untyped-def]
    """Arms that are not alike: the requests that drafted well, and the others."""
    order = sorted(past, key=lambda request: request.accepted / max(1, request.steps))
    half = len(order) // 2
    return [replace(r, arm="canary") for r in order[:half]], [replace(r, arm="control") for r in order[half:]]


def test_a_dry_run_is_of_what_the_form_says(seeded: Database) -> None:
    test = dry_run(page("rollouts"))
    test.text_input(key="new-fast-steps").set_value("20, 40").run()
    assert "The form has changed since the dry run." in text(test)
    assert not frames_with(test, "planted")
    test.button(key="new-cancel").click().run()
    test.button(key="new").click().run()
    assert "dry run" not in text(test).lower()


def test_what_a_dry_run_cannot_reckon_is_left_open() -> None:
    spec = specs.preset("standard")
    found = (Found("e2e_p50", "slow", 4, (100, 120, 90)), Found("errors", "5 % more errors", 4, (300,)))
    rows = found_rows(spec, Equal(4, (), (), 1_000, 1.0), found)
    assert rows["guard"].tolist() == ["p50 e2e", "errors"]
    assert rows["found"].tolist() == [75.0, 25.0]
    assert rows["requests"].fillna(-1).tolist() == [100.0, -1.0]
    assert rows["minutes"].fillna(-1).tolist() == [pytest.approx((60 + 1_000) / 60), -1.0]
    assert found_rows(spec, Equal(4, (), (), 1_000, 0.0), found)["minutes"].isna().all()
    at = datetime(2026, 3, 1)
    over = Incident(3, "DONE", None, "", 0, 2, looked=9)
    retold = incident_rows((Incident(4, "ROLLED_BACK", at, "errors", 40, 0, looked=3), over, replace(over, looked=0)))
    assert retold["ended"].tolist() == ["rolled back", "done", "done"]
    assert "errors would have rolled it back" in retold["by"][0]
    assert "would not have" in retold["by"][1]
    assert "2 decisions could not be read" in retold["by"][1]
    assert "left no evidence" in retold["by"][2]


def active(db: Database) -> rollouts.Rollout:
    with db.read() as session:
        found = rollouts.active(session)
    assert found is not None
    return found


def replayed(db: Database) -> AppTest:
    one = active(db)
    return page("rollouts").button(key=f"replay-{one.id}").click().run()


def test_a_record_that_was_kept_comes_out_as_recorded(seeded: Database) -> None:
    test = replayed(seeded)
    assert not test.exception, test.exception
    assert any("decisions come out as recorded." in box.value for box in test.success)
    assert not test.error


def test_a_decision_that_was_tampered_with_is_named(seeded: Database) -> None:
    one = active(seeded)
    with seeded.write() as session:
        tampered = session.scalar(
            sql(
                "UPDATE rollout_decisions SET verdict = 'FAIL' WHERE id = (SELECT max(id) FROM rollout_decisions "
                "WHERE rollout_id = :id) RETURNING id"
            ),
            {"id": one.id},
        )
    test = replayed(seeded)
    assert not test.exception, test.exception
    assert any("decisions come out as recorded, 1 do not." in box.value for box in test.error)
    (rows,) = frames_with(test, "replayed")
    assert rows["decision"].tolist() == [tampered]  # type: ignore[index]
    assert rows["stored"][0].startswith("FAIL, RAMPING")  # type: ignore[index]


def test_guards_that_were_changed_after_the_start_are_found_out(seeded: Database) -> None:
    with seeded.write() as session:
        session.execute(sql("UPDATE rollouts SET spec = spec || '{\"min_requests\": 1}' WHERE state = 'RAMPING'"))
    test = replayed(seeded)
    assert any("not those it was started with" in box.value for box in test.error)
