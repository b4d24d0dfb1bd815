"""Tables as HTML: what a cell says, and that nothing in it is more than text."""

from __future__ import annotations

import pandas as pd
import pytest

from app.components.sheets import number, share, trend, words, written
from tests.app.sheets import of


def test_what_has_no_value_is_a_dash_and_what_has_is_written_in_its_form() -> None:
    frame = pd.DataFrame({"a": [0.5, None], "b": [12.34, float("nan")], "c": [pd.NA, 1234.6]})
    columns = {"a": number("rate, %", "{:.1f}", 100.0), "b": share("share"), "c": number("ms", "{:,.0f}")}
    found = of([written(frame, columns, "all")])["all"]
    assert found == {"rate, %": ["50.0", "–"], "share": ["12.3 %", "–"], "ms": ["–", "1,235"]}


@pytest.mark.parametrize("shade", [None, lambda word: "#123456"])
def test_words_of_a_client_are_no_markup(shade: object) -> None:
    bad = '<img src=x onerror="alert(1)"> & "v1"'
    made = written(pd.DataFrame({"tenant": [bad]}), {"tenant": words(bad, shade, note=bad)}, bad)  # type: ignore[arg-type]
    assert "<img" not in made
    assert of([made]) == {bad: {bad: [bad]}}


def test_sparklines_share_one_scale_and_a_version_without_traffic_has_none() -> None:
    moved = [[1.0, 2.0], [1.0, 3.0], []]
    column = trend("length", moved, 1.0, "#3f7fd6")
    assert column.cell([]) == ""
    assert "points='0,28.0 100,15.0'" in column.cell(moved[0])
    assert "points='0,28.0 100,2.0'" in column.cell(moved[1])
    assert trend("length", [[]], 1.0, "#3f7fd6").cell([1.0, 1.0]).count("28.0") == 2
