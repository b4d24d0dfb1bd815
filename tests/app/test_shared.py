"""What one session drew is handed to those that look at the same, and to no others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from app.charts import latency, speculation
from app.charts.theme import DARK, LIGHT
from app.components import cards as written
from app.components import context
from app.components import shared as module
from app.components.context import Context
from app.queries import ledger
from engine.store.database import Database
from engine.store.repositories import plans
from engine.store.repositories.overview import Slice
from tests.app.test_pages import page

SEEN = datetime(2026, 3, 1, 12, tzinfo=UTC)
HERE = Context(Slice(SEEN - timedelta(hours=1), SEEN), "1h", LIGHT)


def looked_at(**query: str) -> AppTest:
    """The page over a window that does not move."""
    end = datetime.now(UTC).replace(microsecond=0)
    return page(
        "speculation", **query | {"from": f"{end - timedelta(hours=1):%FT%H:00:00}", "to": f"{end:%FT23:59:59}"}
    )


def cards(test: AppTest) -> str:
    found: list[str] = [element.proto.body for element in test.get("html")]
    return next(body for body in found if 'class="cards"' in body)


def test_what_two_sessions_look_at_is_drawn_once(seeded: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, drawn = speculation.cost, list[int]()

    def counted(*given: Any) -> Any:
        drawn.append(1)
        return plain(*given)

    monkeypatch.setattr(speculation, "cost", counted)
    first, second = looked_at(), looked_at()
    assert len(drawn) == 1
    assert cards(first) == cards(second)
    assert [chart.proto.spec for chart in first.get("plotly_chart")] == [
        chart.proto.spec for chart in second.get("plotly_chart")
    ]
    assert [element.value for element in first.markdown] == [element.value for element in second.markdown]


def test_a_session_with_other_filters_has_its_own_answer(seeded: Database) -> None:
    chat, code = cards(looked_at(**{"class": "chat"})), cards(looked_at(**{"class": "code"}))
    assert chat != code
    st.cache_resource.clear()
    assert cards(looked_at(**{"class": "code"})) == code


def test_that_test_sees_an_answer_given_to_another(seeded: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    careless = st.cache_resource(show_spinner=False, hash_funcs={Context: lambda here: here.range})
    monkeypatch.setattr(module, "shared", careless)
    with pytest.raises(AssertionError):
        test_a_session_with_other_filters_has_its_own_answer(seeded)


def test_a_promotion_changes_the_roles_in_a_window_that_stands_still(seeded: Database) -> None:
    still = {"from": f"{datetime.now(UTC) - timedelta(hours=1):%FT%H:00:00}", "to": f"{datetime.now(UTC):%FT23:59:59}"}

    def listed() -> str:
        ledger.serving.clear()  # what it said a moment ago; not what was drawn
        return next(e.proto.body for e in page("overview", **still).get("html") if ">champion<" in e.proto.body)

    before = listed()
    with seeded.write() as session:
        plans.append(session, champion=5, fallback=1, salt="seed", actor="cli", reason="promoted")
    assert listed() != before


def test_charts_move_on_by_wider_steps_and_never_end_before_the_numbers() -> None:
    ends = list[datetime]()
    for seconds in range(0, 61, 5):
        here = replace(HERE, part=replace(HERE.part, since=HERE.part.since + timedelta(seconds=seconds),
                                          until=HERE.part.until + timedelta(seconds=seconds)))  # fmt: skip
        charted = here.charted().part
        assert charted.until - charted.since == timedelta(hours=1)
        assert timedelta() <= charted.until - here.part.until < timedelta(seconds=15)
        ends.append(charted.until)
    assert len(set(ends)) == 5
    still = replace(HERE, range=context.FIXED, part=replace(HERE.part, until=SEEN + timedelta(seconds=1)))
    assert still.charted() == still


def test_a_refresh_writes_new_numbers_and_draws_charts_every_third_time(
    seeded: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting = st.cache_resource(show_spinner=False, hash_funcs=module.BY_WORDS)  # however long this takes
    monkeypatch.setattr(module, "shared", lasting)
    began = datetime.now(UTC).replace(second=0, microsecond=0)
    drawn = Counter[str]()

    def count(module: ModuleType, name: str) -> None:
        plain = getattr(module, name)

        def counted(*given: Any) -> Any:
            drawn[name] += 1
            return plain(*given)

        monkeypatch.setattr(module, name, counted)

    count(latency, "percentiles")
    count(written, "cards")
    for seconds in (5, 10, 15, 20):
        end = began + timedelta(seconds=seconds)
        monkeypatch.setattr(context, "window", lambda length, end=end: Slice(end - length, end))
        page("overview")
    assert drawn == {"percentiles": 2, "cards": 4}


OTHERS = {
    "window": replace(HERE, part=replace(HERE.part, until=SEEN + timedelta(seconds=5))),
    "class": replace(HERE, part=replace(HERE.part, traffic_class="chat")),
    "arm": replace(HERE, part=replace(HERE.part, arm="canary")),
    "version": replace(HERE, part=replace(HERE.part, version=3)),
    "versions": replace(HERE, part=replace(HERE.part, versions=(3, 4))),
    "scheme": replace(HERE, colours=DARK),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_whatever_a_page_is_about_tells_its_parts_apart(other: Context) -> None:
    asked = list[Context]()

    @module.shared
    def part(here: Context) -> int:
        asked.append(here)
        return len(asked)

    part.clear()
    assert [part(HERE), part(replace(HERE)), part(other), part(HERE)] == [1, 1, 2, 1]
