"""A dry run in the form of a new rollout: what these guards would have done on past traffic."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from app.components.context import heading
from app.components.guard_table import name_of
from app.components.tables import Columns, table
from app.queries import rehearsal
from engine.rollout import dry_run, specs
from engine.rollout.dry_run import Equal, Found, Incident
from engine.rollout.guards import RolloutSpec

ASKED = "dry-run-of"


def ask(spec_hash: str) -> None:
    st.session_state[ASKED] = spec_hash


def forget() -> None:
    st.session_state.pop(ASKED, None)


def panel(spec: RolloutSpec) -> None:
    """What the dry run that was asked for says; nothing before one was."""
    asked, spec_hash = st.session_state.get(ASKED), specs.spec_hash(spec)
    if asked is None:
        return
    if asked != spec_hash:
        st.caption("The form has changed since the dry run.")
        return
    with st.spinner(f"Trying these guards on {rehearsal.SPLITS} splits of past traffic…"):
        made = rehearsal.rehearsed(spec_hash, spec)
    heading("Dry run", f"the champion's newest {rehearsal.REQUESTS:,} requests of the last day, at most")
    if spec.slices is not None:
        st.caption("Traces do not say which slice a request asked for: tried on the requests of all slices.")
    if made.equal is None:
        st.info("The champion has served nothing in the last day that these guards could be tried on.")
    else:
        _equal(spec, made.equal)
        if made.found:
            table(found_rows(spec, made.equal, made.found), FOUND, "dry-run-found")
    if made.incidents:
        table(incident_rows(made.incidents), INCIDENTS, "dry-run-incidents")
    st.caption("`slipstream rollout dry-run FILE` tries more ways and more requests.")


def _equal(spec: RolloutSpec, equal: Equal) -> None:
    said = _sentence(dry_run.falsely(spec, equal))
    if equal.fired:
        st.error(said, icon=":material/error:")
    else:
        st.success(said, icon=":material/check_circle:")
    st.caption(" ".join(_sentence(line) for line in dry_run.until_passed(spec, equal)))


FOUND: Columns = {
    "guard": "guard",
    "planted": st.column_config.TextColumn("a canary with", width="medium"),
    "found": st.column_config.ProgressColumn("found in splits", format="%.0f %%", min_value=0, max_value=100),
    "requests": st.column_config.NumberColumn(
        "requests per arm", format="localized", help="Median; empty where past traffic mostly does not suffice"
    ),
    "minutes": st.column_config.NumberColumn("minutes", format="%.0f", help="At the traffic of the last day"),
}
INCIDENTS: Columns = {
    "rollout": st.column_config.NumberColumn("past rollout", width="small"),
    "ended": "ended as",
    "by": st.column_config.TextColumn("these guards", width="large"),
}


def found_rows(spec: RolloutSpec, equal: Equal, found: tuple[Found, ...]) -> pd.DataFrame:
    """One row a statistical guard: how many requests per arm, and minutes, until it fails a canary that is worse."""
    rows = []
    trees = specs.to_dict(spec)["guards"]
    for one in found:
        need = float(np.median(one.requests)) if 2 * len(one.requests) > one.splits else None
        timed = need is not None and equal.per_second > 0
        rows.append(
            {
                "guard": name_of(one.guard, trees),
                "planted": one.planted,
                "found": 100 * len(one.requests) / one.splits,
                "requests": need,
                "minutes": dry_run.seconds(spec, equal.per_second, need) / 60 if timed and need is not None else None,
            }
        )
    return pd.DataFrame(rows)


def incident_rows(incidents: tuple[Incident, ...]) -> pd.DataFrame:
    """One row a rollout that is over: whether these guards would have taken it back."""
    return pd.DataFrame(
        [
            {
                "rollout": one.rollout_id,
                "ended": one.ended.lower().replace("_", " "),
                "by": dry_run.retold(one),
            }
            for one in incidents
        ]
    )


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."
