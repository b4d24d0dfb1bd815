"""The Versions page: everything in the URL, two versions side by side, a family that can be read."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import pytest

from app.charts import versions as charts
from app.charts.theme import DARK, LIGHT
from app.charts.versions import Node
from app.components import diff
from app.queries import versions as queries
from engine.contracts import PolicyVersion, ProposerKind
from engine.store.database import Database
from engine.store.members import Members
from engine.store.repositories.policies import Lineage
from tests.app.sheets import sheets
from tests.app.test_pages import page, text

AT = datetime(2026, 3, 1, tzinfo=UTC)
NAN = float("nan")


def measured(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"policy_version": [5, 3], "requests": [9, 7], "e2e_p50": [80.0, 100.0]} | columns)


@pytest.mark.parametrize("data", [pd.DataFrame(), measured(), measured().head(1), measured(e2e_p50=[NAN, NAN]),
                                  measured(e2e_p50_low=[NAN, 90.0], e2e_p50_high=[NAN, 130.0])])  # fmt: skip
def test_a_metric_against_versions_draws_whatever_there_is(data: pd.DataFrame) -> None:
    charts.against(data, "e2e_p50", 5, {}, ",.0f", "ms", DARK).to_json()


def test_versions_stand_in_order_with_their_intervals_and_their_colours() -> None:
    frame = measured(e2e_p50_low=[70.0, 90.0], e2e_p50_high=[95.0, 130.0])
    made = charts.against(frame, "e2e_p50", 5, {3: "champion"}, ",.0f", "ms", LIGHT).data[0]
    assert [one[0] for one in made.customdata] == [3, 5]
    assert (list(made.error_y.array), list(made.error_y.arrayminus)) == ([30.0, 15.0], [10.0, 10.0])
    assert list(made.marker.color) == [LIGHT.version(3), LIGHT.version(5)]
    assert made.text[0] == "v3 champion"
    assert "(90 to 130)" in made.customdata[0][1]


def test_a_version_without_an_interval_says_so() -> None:
    made = charts.against(measured(), "e2e_p50", 5, {}, ",.0f", "ms", LIGHT).data[0]
    assert "no interval" in made.customdata[0][1]


def family() -> list[Node]:
    """Two ancestors, forty descendants."""
    line = [
        Node(1, None, -2, "was champion", True),
        Node(2, 1, -1, "", None, True),
        Node(3, 2, 0, "champion", True, more=7),
    ]
    children = [Node(n, 3, 1, "rolled back", False) for n in range(4, 14)]
    return line + children + [Node(10 * n + k, n, 2, "") for n in range(4, 14) for k in range(3)]


def test_no_two_versions_of_a_family_stand_in_one_place() -> None:
    nodes = family()
    made = charts.family(nodes, {}, 3, LIGHT)
    drawn = made.data[-1]
    places = sorted(zip(drawn.x, drawn.y, strict=True))
    assert len(set(places)) == len(nodes)
    rows = [y for x, y in places if x == 2]
    assert min(b - a for a, b in itertools.pairwise(rows)) == 1
    assert made.layout.height > 30 * 50, "as tall as its rows need"
    parent, children = (
        dict(zip((n.version for n in nodes), drawn.y, strict=True)),
        [n.version for n in nodes if n.parent == 3],
    )
    assert parent[3] == sum(parent[child] for child in children) / len(children)


def test_a_family_marks_what_became_of_each_and_whose_traffic_taught_it() -> None:
    made = charts.family(family(), {(1, 3): (375, 500), (99, 3): (125, 500)}, 3, LIGHT)
    parents, arcs, middles, drawn = made.data
    assert middles.text[0] == "75 % of v3's training traffic was served by v1, by 500 traces of it"
    assert len(middles.text) == 1, "a teacher out of sight has no edge"
    assert arcs.line.dash == "dot"
    assert parents.line.dash is None
    assert (drawn.marker.symbol[1], drawn.marker.symbol[0]) == ("circle-open", "circle")
    words = {a.text: a.font.color for a in made.layout.annotations}
    assert words["rolled back"] == LIGHT.bad
    assert words["champion · +7"] == LIGHT.good
    assert charts.family([], {}, 3, LIGHT).layout.annotations


def version(number: int, **changes: Any) -> PolicyVersion:
    manifest = {"kind": "trace_memory", "orders": [2, 3], "memory": {"tokens": 100 * number, "bound": 8}}
    return PolicyVersion(number, f"{number:064x}", ProposerKind.TRACE_MEMORY, 4, manifest, AT, **changes)


def side(number: int, **row: float) -> diff.Side:
    lineage = Lineage("train", Members.of(range(number * 10)), AT, AT, {"chat": number * 10})
    gate = {"passed": True, "overall": {"candidate": 2.0, "champion": 1.5, "delta": 0.5, "low": 0.4, "high": 0.6}}
    return version(number, parent_version=number - 1), [lineage], gate, row or None


def test_two_versions_differ_in_what_is_written_about_them() -> None:
    rows = {what: (a, b) for what, a, b in diff.facts(side(5), side(3)).itertuples(index=False)}
    assert rows["parent"] == ("v4", "v2")
    assert rows["learned from"] == ("50 traces", "30 traces")
    assert rows["memory.tokens"] == ("500", "300")
    assert "memory.bound" not in rows
    assert rows["3 more of the manifest"] == ("the same", "the same")
    assert rows["… difference"][0] == "+0.50 (+0.40 to +0.60)"


def test_a_difference_is_judged_only_where_its_interval_leaves_nothing_out() -> None:
    one = {"e2e_p50": 80.0, "e2e_p50_low": 78.0, "e2e_p50_high": 82.0, "acceptance_length": 2.0, "error_rate": NAN,
           "acceptance_length_low": 1.5, "acceptance_length_high": 2.5, "e2e_p95": 300.0}  # fmt: skip
    other = {**one, "e2e_p50": 100.0, "e2e_p50_low": 97.0, "e2e_p50_high": 103.0, "acceptance_length": 2.2}
    rows = diff.measures(one, other).set_index("metric")
    assert rows.loc["p50 latency, ms", "judgement"] == "better", "faster"
    assert rows.loc["p50 latency, ms", "difference"].startswith("-20 (-24 to -16")
    assert rows.loc["acceptance length, tokens a step", "judgement"] == ""
    assert rows.loc["p95 latency, ms", "difference"] == "+0 (too few to tell)", "no interval, no judgement"
    assert "errors, %" not in rows.index
    assert diff.measures(other, one).set_index("metric").loc["p50 latency, ms", "judgement"] == "worse"
    assert diff.measures(None, None).empty


def test_an_interval_of_no_width_judges_nothing() -> None:
    one = {"error_rate": 0.0, "error_rate_low": 0.0, "error_rate_high": 0.0}
    other = {"error_rate": 0.02, "error_rate_low": 0.01, "error_rate_high": 0.03}
    for a, b in ((one, other), (other, one), (one, dict.fromkeys(other, 0.02))):
        (row,) = diff.measures(a, b).to_dict("records")
        assert row["judgement"] == ""
        assert row["difference"].endswith("(too few to tell)")


def test_the_page_is_about_what_its_link_says(seeded: Database) -> None:
    test = page("versions", about="v3", against="v4", measure="p95 latency")
    assert not test.exception
    shown = text(test)
    assert "Family of v3" in shown
    assert "**v3 beside**" in shown
    names = [list(frame.value.columns) for frame in test.dataframe]
    facts = sheets(test)["What v3 and v4 are"]
    assert any("p95_trend" in columns for columns in names)
    parent = facts["what"].index("parent")
    assert (facts["v3"][parent], facts["v4"][parent]) == ("v2", "v3")
    assert test.selectbox(key="measure").value == "p95 latency"


def test_what_there_is_not_is_said(seeded: Database) -> None:
    test = page("versions", about="v999", against="nonsense")
    assert not test.exception
    assert "no v999" in test.warning[0].value
    assert "nonsense is no version" in text(test)


def test_lineage_in_the_other_direction(seeded: Database) -> None:
    """A tenant's traffic taught all three learned versions; nobody knows of another one."""
    shown = text(page("versions", tenant="acme"))
    assert "they taught [v3](/versions?about=v3), [v4](/versions?about=v4), [v5](/versions?about=v5)" in shown
    assert "Nothing of globex was ever taken in" in text(page("versions", tenant="globex"))


def test_the_family_knows_whose_traffic_taught(seeded: Database) -> None:
    found = queries.family(5)
    assert [kin.version for kin in found.kin] == [2, 3, 4, 5]
    assert found.taught_by[5] == {2: 150}
