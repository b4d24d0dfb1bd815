"""The cards of the system page: what is lost is red, and what is unknown is no zero."""

from __future__ import annotations

import pandas as pd

from app.charts.theme import LIGHT
from app.components.health import health

NOTHING = pd.DataFrame()
STORED = pd.DataFrame(
    {"day": ["2026-03-01", "2026-03-02"], "traces_bytes": [2e6, 1e6], "rollups_minute_bytes": [1e6, None]}
)


def writers(**values: float | None) -> pd.DataFrame:
    known = {"queue": 3.0, "spill_files": 0.0, "set_aside": 0.0, "dropped": 0.0}
    return pd.DataFrame([known | values, known])


def test_replicas_are_added_up() -> None:
    html = health(writers(queue=4.0), NOTHING, NOTHING, STORED, LIGHT)
    assert '<span class="value">7</span>' in html
    assert '<span class="value">4 MB</span>' in html
    assert "of 2 days" in html
    assert LIGHT.bad not in html


def test_what_is_lost_or_waits_on_disk_is_red() -> None:
    for name in ("dropped", "set_aside", "spill_files"):
        assert LIGHT.bad in health(writers(**{name: 1.0}), NOTHING, NOTHING, STORED, LIGHT), name


def test_unknown_is_no_zero() -> None:
    unknown = pd.DataFrame([dict.fromkeys(("queue", "spill_files", "set_aside", "dropped"))])
    for found in (NOTHING, unknown):
        html = health(found, NOTHING, NOTHING, NOTHING, LIGHT)
        assert html.count('<span class="value">–</span>') == 5
        assert LIGHT.bad not in html
