"""The price of adaptivity, in words and beside the gain."""

from __future__ import annotations

import pandas as pd
import pytest

from app.components.operations import sentence
from engine.store.database import Database
from tests.app.sheets import sheets
from tests.app.test_pages import page, text

WEEK = {"changes": 3, "failed": 1, "detect_s": 4.0, "restore_s": 0.25, "interventions": 2}


@pytest.mark.parametrize(
    ("changed", "gain", "said"),
    [
        ({}, 1.31, "Drafting brings **1.31 ×** plain decoding. 3 changes this week, 1 rolled back, found after 4.0 s "
         "and undone 0.2 s later; people stepped in 2 times."),
        ({"changes": 1, "failed": 0, "detect_s": None, "restore_s": None, "interventions": 0}, None,
         "1 change this week, 0 rolled back; people stepped in never."),
        ({"detect_s": 240.0, "restore_s": None, "interventions": 1}, float("nan"),
         "3 changes this week, 1 rolled back, found after 4 min; people stepped in once."),
    ],
)  # fmt: skip
def test_a_week_is_a_sentence(changed: dict[str, object], gain: float | None, said: str) -> None:
    assert sentence(pd.Series(WEEK | changed), gain) == said


@pytest.mark.parametrize("name", ["overview", "rollouts"])
def test_the_price_is_where_the_gain_is(seeded: Database, name: str) -> None:
    test = page(name)
    assert not test.exception
    assert "this week" in text(test)
    weeks = sheets(test)["What changing drafts cost, by week"]
    assert {"changes", "change failures, %", "time to detect, s", "time to restore, s", "hours in canary"} <= set(weeks)
    assert all(weeks["interventions"])
