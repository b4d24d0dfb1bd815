"""Two versions side by side: what they are, what taught them, what their gates said, what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.components.sheets import sheet, words
from engine.contracts import PolicyVersion
from engine.percent import percent
from engine.store.intervals import Estimate, difference
from engine.store.repositories.policies import Lineage


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that versions are compared by: its column, unit and form, and which direction is good."""

    label: str
    column: str
    unit: str
    form: str
    scale: float = 1.0
    better: Literal["lower", "higher"] = "lower"


MEASURES = {
    measure.label: measure
    for measure in (
        Measure("acceptance length", "acceptance_length", "tokens a step", ".2f", better="higher"),
        Measure("acceptance rate", "acceptance_rate", "%", ".1f", 100.0, "higher"),
        Measure("p50 latency", "e2e_p50", "ms", ",.0f"),
        Measure("p95 latency", "e2e_p95", "ms", ",.0f"),
        Measure("TTFT p50", "ttft_p50", "ms", ",.0f"),
        Measure("TPOT p50", "tpot_p50", "ms", ",.1f"),
        Measure("tokens / s of a request", "decode_tokens_s", "tokens/s", ",.0f", better="higher"),
        Measure("errors", "error_rate", "%", ".2f", 100.0),
        Measure("goodput", "goodput_share", "%", ".1f", 100.0, "higher"),
    )
}
Side = tuple[PolicyVersion, Sequence[Lineage], Mapping[str, Any] | None, Mapping[str, Any] | None]
"""A version, its lineage, its gate's report, and its row of ``versions.measured`` where it served."""


def side_by_side(a: Side, b: Side, colours: Palette) -> None:
    """The measured table with its judged differences, and the table of what the versions are."""
    names = [f"v{a[0].version}", f"v{b[0].version}"]
    left, right = st.columns([7, 6])
    with left:
        frame = measures(a[3], b[3])
        if frame.empty:
            st.caption("Neither served in this window: choose a longer one.")
        else:
            shades = {"better": colours.good, "worse": colours.bad}
            columns = {
                "metric": words("metric"),
                "a": words(names[0]),
                "b": words(names[1]),
                "difference": words("difference"),
                "judgement": words(f"{names[0]} is", lambda word: shades[word]),
            }
            sheet(frame, columns, f"What {names[0]} and {names[1]} did")
    with right:
        columns = {"what": words("what"), "a": words(names[0], is_wide=True), "b": words(names[1], is_wide=True)}
        sheet(facts(a, b), columns, f"What {names[0]} and {names[1]} are")


def measures(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> pd.DataFrame:
    """One row a measure: either value with its interval, and a − b with its interval and whether that is good."""
    rows = []
    for measure in MEASURES.values():
        one, other = (None if row is None else _estimate(row, measure) for row in (a, b))
        if one is None and other is None:
            continue
        change = difference(one, other) if one is not None and other is not None else None
        rows.append(
            {
                "metric": f"{measure.label}, {measure.unit}",
                "a": _written(one, measure.form),
                "b": _written(other, measure.form),
                "difference": "" if change is None else _changed(change, f"+{measure.form}"),
                "judgement": _judgement(change, measure),
            }
        )
    return pd.DataFrame(rows)


def facts(a: Side, b: Side) -> pd.DataFrame:
    """What is written about either: manifest (where they differ), gate and training traffic, one row each."""
    rows: list[tuple[str, str, str]] = []
    first, second = (_facts(*side[:3]) for side in (a, b))
    for name in dict.fromkeys([*first, *second]):
        rows.append((name, first.get(name, "–"), second.get(name, "–")))
    flat = _flat(a[0].manifest), _flat(b[0].manifest)
    names = list(dict.fromkeys([*flat[0], *flat[1]]))
    differing = [name for name in names if flat[0].get(name) != flat[1].get(name)]
    rows += [(name, flat[0].get(name, "–"), flat[1].get(name, "–")) for name in differing]
    if same := len(names) - len(differing):
        rows.append((f"{same} more of the manifest", "the same", "the same"))
    return pd.DataFrame(rows, columns=["what", "a", "b"])


def _facts(version: PolicyVersion, lineage: Sequence[Lineage], gate: Mapping[str, Any] | None) -> dict[str, str]:
    made = {
        "kind": version.kind.value.replace("_", " "),
        "K": str(version.num_speculative_tokens),
        "parent": f"v{version.parent_version}" if version.parent_version else "none",
        "created": f"{version.created_at:%b %d, %H:%M:%S}",
        "sha256": version.digest[:12],
    }
    if version.retired_at is not None:
        made["retired"] = f"{version.retired_at:%b %d, %H:%M:%S}"
    for part in lineage:
        role = "learned from" if part.role == "train" else "judged on"
        made[role] = f"{part.traces:,} traces"
        made[f"… {role}, window"] = f"{part.window_from:%b %d, %H:%M} to {part.window_to:%b %d, %H:%M}"
        mix = sorted(part.classes.items(), key=lambda item: -item[1])
        made[f"… {role}, mix"] = ", ".join(f"{percent(count / max(part.traces, 1))} {name}" for name, count in mix)
    if overall := (gate or {}).get("overall"):
        made["gate"] = "passed" if (gate or {}).get("passed") else "refused"
        made["… tokens a step"] = f"{overall['candidate']:.2f} against {overall['champion']:.2f}"
        made["… difference"] = f"{overall['delta']:+.2f} ({overall['low']:+.2f} to {overall['high']:+.2f})"
    return made


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, one in value.items():
            found |= _flat(one, f"{name}.{key}" if name else str(key))
        return found
    text = str(value)
    return {name: text if len(text) <= 60 else f"{text[:57]}…"}


def _estimate(row: Mapping[str, Any], measure: Measure) -> Estimate | None:
    value, low, high = (row.get(f"{measure.column}{end}") for end in ("", "_low", "_high"))
    if value is None or pd.isna(value):
        return None
    bounds = [None if bound is None or pd.isna(bound) else float(bound) * measure.scale for bound in (low, high)]
    return Estimate(float(value) * measure.scale, *bounds)


def _written(found: Estimate | None, form: str) -> str:
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return format(found.value, form)
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def _changed(change: Estimate, form: str) -> str:
    """A difference without an interval is no finding, and says why."""
    return _written(change, form) if change.low is not None else f"{change.value:{form}} (too few to tell)"


def _judgement(change: Estimate | None, measure: Measure) -> str:
    """better or worse where the interval leaves nothing out on the other side, else empty."""
    if change is None or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return ""
    return "better" if (change.value > 0) == (measure.better == "higher") else "worse"
