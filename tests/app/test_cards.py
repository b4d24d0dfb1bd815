"""Cards say what stands, in the colour of its judgement, whatever clients call their classes."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pandas as pd
import pytest

from app.charts.theme import LIGHT
from app.components.alarms import alarms
from app.components.cards import card
from app.components.trace_list import summary
from engine.diagnosis.explain import signed

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NONE = pd.DataFrame(columns=["kind", "traffic_class", "found_at", "ended_at"])
TOTALS = pd.DataFrame(
    {"traffic_class": ["chat", "code"], "requests": [10, 90], "acceptance_length": [1.5, float("nan")]}
)


def read(html: str) -> list[tuple[str, str, str, str]]:
    """(label, value, word, its colour) of each card."""
    each = re.compile(
        r'label">(.*?)</span><span class="value">(.*?)</span>'
        r'(?:<span class="change" style="color:(#\w+);[^>]*>(.*?)</span>)?'
    )
    return [(label, value, said, shade) for label, value, shade, said in each.findall(html)]


def test_nothing_that_drifts_alarms_nobody() -> None:
    found = read(alarms(NONE, TOTALS, pd.DataFrame(), "", LIGHT))
    assert [one[:3] for one in found] == [
        ("Open findings", "0", "none"),
        ("Newest finding", "–", ""),
        ("code · length", "–", "no alarm"),
        ("chat · length", "1.50", "no alarm"),
    ]
    assert LIGHT.bad not in {one[3] for one in found}


def test_a_class_alarms_for_what_is_open_and_not_for_what_has_ended() -> None:
    rows = [("input", "chat", NOW, None), ("slow_slide", "chat", NOW, None), ("change_point", "code", NOW, NOW)]
    found = pd.DataFrame(rows, columns=NONE.columns).astype({"ended_at": "datetime64[us, UTC]"})
    shown = {label: rest for label, *rest in read(alarms(found, TOTALS, pd.DataFrame(), "5 min ago", LIGHT))}
    assert shown["Open findings"] == ["2", "1 ended", LIGHT.bad]
    assert shown["Newest finding"][:2] == ["5 min ago", "input drift"]
    assert shown["chat · length"] == ["1.50", "input drift +1", LIGHT.bad]
    assert shown["code · length"] == ["–", "no alarm", LIGHT.muted]


def test_rows_of_traces_are_summed_up_over_what_each_has() -> None:
    """A request that failed before its first token has no times; one without drafts has no part in the length."""
    rows = [("ok", 100.0, 10.0, 3, 2), ("ok", 300.0, 30.0, 0, 0), ("error", float("nan"), float("nan"), 0, 0)]
    frame = pd.DataFrame(rows, columns=["status", "e2e_ms", "ttft_ms", "accepted", "steps"])
    shown = {label: rest for label, *rest in read(summary(frame, LIGHT))}
    assert shown["Rows shown"][0] == "3"
    assert shown["e2e p50"][0] == "200 ms"
    assert shown["TTFT p50"][0] == "20 ms"
    assert shown["Accept. length"][0] == "2.50"
    assert shown["Not ok"] == ["1", "33 %", LIGHT.bad]


def test_what_a_client_calls_its_class_is_text() -> None:
    assert "<img" not in card("<img src=x>", "1", '"><img>', LIGHT.muted)


@pytest.mark.parametrize(
    ("value", "written"), [(-0.0537, "-0.054"), (2.749, "+2.7"), (123.4, "+120"), (45_678.0, "+46,000"), (0.0, "+0")]
)
def test_an_effect_has_two_digits_and_no_exponent(value: float, written: str) -> None:
    assert signed(value) == written
