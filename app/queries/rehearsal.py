"""Guards tried on the past and decisions made again: what is worked out when somebody asks for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import streamlit as st

from app.queries.database import database
from engine.contracts import SlipstreamError
from engine.rollout import rehearsal
from engine.rollout.guards import RolloutSpec
from engine.rollout.rehearsal import Rehearsal
from engine.rollout.replay import Replayed, replay
from engine.store.repositories import rollouts

SINCE = timedelta(hours=24)
SPLITS, REQUESTS, INCIDENTS = 12, 6_000, 5
"""Seconds of work where the command line takes a minute: somebody waits in front of it."""


@st.cache_data(ttl=timedelta(minutes=10), max_entries=8, show_spinner=False)
def rehearsed(spec_hash: str, _spec: RolloutSpec) -> Rehearsal:
    """A specification, told apart by its hash, on the champion's newest requests and the newest rollouts."""
    return rehearsal.rehearse(database(), _spec, datetime.now(UTC) - SINCE, SPLITS, REQUESTS, INCIDENTS)


def replayed(rollout_id: int) -> Replayed | str:
    """Every decision about a rollout made again from its own evidence; or why none of them can be trusted."""
    with database().read() as session:
        found = rollouts.get(session, rollout_id)
        decisions = rollouts.decisions(session, rollout_id, limit=1_000_000)
    if found is None:
        return f"There is no rollout {rollout_id}."
    try:
        return replay(found, decisions)
    except SlipstreamError as error:
        return str(error)
