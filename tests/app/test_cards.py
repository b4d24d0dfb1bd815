"""Cards say what stands, in the colour of its judgement, whatever clients call their classes."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pandas as pd
import pytest

from app.charts.theme import LIGHT
from app.components.alarms import alarms
from app.components.cards import card
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


def test_what_a_client_calls_its_class_is_text() -> None:
    assert "<img" not in card("<img src=x>", "1", '"><img>', LIGHT.muted)


@pytest.mark.parametrize(
    ("value", "written"), [(-0.0537, "-0.054"), (2.749, "+2.7"), (123.4, "+120"), (45_678.0, "+46,000"), (0.0, "+0")]
)
def test_an_effect_has_two_digits_and_no_exponent(value: float, written: str) -> None:
    assert signed(value) == written
