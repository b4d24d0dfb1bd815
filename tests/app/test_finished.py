"""What is kept of a chart is the chart of these very answers, and no more is kept than there is room for."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import streamlit as st

from app.charts import latency
from app.charts.figure import Figure
from app.charts.theme import DARK, LIGHT
from app.components import finished as module
from app.components.finished import finished, shelf

AT = pd.date_range("2026-03-01 12:00", periods=4, freq="1min", tz="UTC")
WINDOW = (AT[0].to_pydatetime(), AT[3].to_pydatetime())
NO_PLANS = pd.DataFrame(columns=["at", "label", "canary"])


@pytest.fixture(autouse=True)
def empty_shelf() -> Iterator[None]:
    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


def answer(length: float = 2.5) -> pd.DataFrame:
    return pd.DataFrame({"at": AT, "policy_version": 3, "acceptance_length": [2.0, length, 2.1, 2.2]})


def drawn(frame: pd.DataFrame, plans: pd.DataFrame = NO_PLANS, window: Any = WINDOW, colours: Any = LIGHT) -> Figure:
    return finished(latency.by_version, frame, "acceptance_length", plans, window, colours)


def test_equal_answers_are_drawn_once() -> None:
    assert drawn(answer()) is drawn(answer())
    assert drawn(answer()).to_dict() is drawn(answer()).to_dict()


OTHERS: dict[str, Callable[[], Figure]] = {
    "one value": lambda: drawn(answer(2.6)),
    "one instant": lambda: drawn(answer().assign(at=[*AT[:3], AT[3] + timedelta(seconds=1)])),
    "one row less": lambda: drawn(answer().iloc[:3]),
    "a deploy": lambda: drawn(answer(), pd.DataFrame({"at": [AT[1]], "label": ["v3 champion"], "canary": [None]})),
    "the window": lambda: drawn(answer(), window=(WINDOW[0], WINDOW[1] + timedelta(seconds=1))),
    "the scheme": lambda: drawn(answer(), colours=DARK),
    "one colour": lambda: drawn(answer(), colours=replace(LIGHT, text="#000000")),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_whatever_differs_draws_another_chart(other: Callable[[], Figure]) -> None:
    first = drawn(answer()).to_dict()
    assert other().to_dict() is not first
    fresh = latency.by_version(answer(2.6), "acceptance_length", NO_PLANS, WINDOW, LIGHT)
    assert drawn(answer(2.6)).to_dict() == fresh.to_dict()


def test_that_test_sees_a_key_that_leaves_answers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(told: tuple[Any, ...], protocol: int) -> bytes:
        return pickle.dumps([part for part in told if not isinstance(part, pd.DataFrame)], protocol)

    monkeypatch.setattr(module, "pickle", SimpleNamespace(dumps=careless, HIGHEST_PROTOCOL=pickle.HIGHEST_PROTOCOL))
    with pytest.raises(AssertionError):
        test_whatever_differs_draws_another_chart(OTHERS["one value"])


def test_a_figure_that_is_changed_says_so_when_it_is_asked_again() -> None:
    figure = drawn(answer())
    before = figure.to_dict()
    for change in (
        lambda: figure.update_layout(height=99),
        lambda: figure.update_traces(opacity=0.5),
        lambda: figure.add_bar(x=[1], y=[2]),
        lambda: figure.add_hline(1.0, {"width": 1}),
        lambda: figure.add_annotation(text="word"),
    ):
        change()
        assert figure.to_dict() != before
        before = figure.to_dict()


def made(number: int) -> list[int]:
    return [number]


def test_the_oldest_make_room_and_what_is_asked_for_stays() -> None:
    first = finished(made, 0)
    for number in range(1, module.KEPT):
        finished(made, number)
    assert finished(made, 0) is first
    finished(made, module.KEPT)  # takes the place of 1
    assert len(shelf().made) == module.KEPT
    assert finished(made, 0) is first


def test_two_functions_with_the_same_arguments_are_two_things() -> None:
    assert (finished(str.upper, "ab"), finished(str.title, "ab")) == ("AB", "Ab")


def test_a_function_that_holds_what_its_name_does_not_tell_is_refused() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        finished(lambda: [1])
