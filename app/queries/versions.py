"""Versions: a page of them, what each did, its family, and whose traffic taught it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pandas as pd
import streamlit as st

from app.queries.database import database
from app.queries.ledger import TTL
from app.queries.overview import ENTRIES, kept, numbers
from engine.contracts import PolicyVersion
from engine.store.panels import versions
from engine.store.repositories import adaptation, genealogy, learning, overview, policies, tenants
from engine.store.repositories.adaptation import Adaptation
from engine.store.repositories.genealogy import Fate, Kin
from engine.store.repositories.learning import Attempt
from engine.store.repositories.overview import Slice
from engine.store.repositories.policies import Lineage

LONG = timedelta(minutes=5)
"""For what never changes: it only frees memory."""
MANY = 100_000


@dataclass(frozen=True, slots=True)
class Family:
    """The versions near one, what became of each, and which versions' traffic taught them (traces)."""

    kin: tuple[Kin, ...]
    fates: dict[int, Fate]
    taught_by: dict[int, dict[int, int]]


@st.cache_data(ttl=TTL, show_spinner=False)
def counts() -> tuple[dict[str, int], dict[str, int]]:
    """Versions by kind, and attempts of the learner by outcome."""
    with database().read() as session:
        return policies.kinds(session), learning.outcomes(session)


@st.cache_data(ttl=TTL, show_spinner=False)
def every() -> list[int]:
    """All versions' numbers, newest first."""
    with database().read() as session:
        return policies.numbers(session)


@kept
def served(part: Slice) -> dict[int, int]:
    """Version → requests in the window, newest version first."""
    with database().read() as session:
        found = dict(overview.leading(session, part, MANY))
    return dict(sorted(found.items(), reverse=True))


@st.cache_data(ttl=timedelta(seconds=10), max_entries=ENTRIES, show_spinner=False)
def some(wanted: tuple[int, ...]) -> list[PolicyVersion]:
    with database().read() as session:
        return policies.some(session, wanted)


@kept
def measured(part: Slice, among: tuple[int, ...] | None = None) -> pd.DataFrame:
    """What each version did, with intervals; of these, or of those with the most requests."""
    if among is not None and len(every := measured(part)) < versions.SHOWN:  # all that served, so these are in it
        return every[every["policy_version"].isin(among)].reset_index(drop=True) if len(every) else every
    with database().read() as session:
        return numbers(pd.DataFrame(versions.measured(session, replace(part, versions=among))), ())


@kept
def trends(part: Slice, among: tuple[int, ...]) -> pd.DataFrame:
    """Few bins over time by version: what sparklines show."""
    with database().read() as session:
        return numbers(pd.DataFrame(versions.trends(session, replace(part, versions=among))), ("at",))


@st.cache_data(ttl=timedelta(seconds=10), max_entries=ENTRIES, show_spinner=False)
def family(version: int) -> Family:
    with database().read() as session:
        kin = genealogy.family(session, version)
        near = [one.version for one in kin]
        return Family(tuple(kin), genealogy.fates(session, near), genealogy.taught_by(session, near))


@st.cache_data(ttl=LONG, show_spinner=False)
def lineage(version: int) -> list[Lineage]:
    with database().read() as session:
        return policies.lineage(session, version)


@st.cache_data(ttl=LONG, show_spinner=False)
def traces_of(part: Lineage) -> list[UUID]:
    """The traces of one part of a lineage, oldest first."""
    with database().read() as session:
        return policies.trace_ids(session, part.members)


@st.cache_data(ttl=LONG, show_spinner=False)
def tenants_of(part: Lineage) -> dict[str, int]:
    """Traces by tenant of one part of a lineage; those without one under an empty name."""
    with database().read() as session:
        return policies.tenants(session, part.members)


@st.cache_data(ttl=timedelta(seconds=10), show_spinner=False)
def adaptation_of(version: int) -> Adaptation | None:
    """What a version cost to learn and has saved since; None where nobody learned it."""
    with database().read() as session:
        return adaptation.of_version(session, version, datetime.now(UTC))


@st.cache_data(ttl=timedelta(seconds=30), show_spinner=False)
def taught_by_trace(trace_id: UUID) -> list[int]:
    """Which versions a trace taught, those that began with its weights too."""
    with database().read() as session:
        return policies.influenced_by(session, trace_id)


@st.cache_data(ttl=timedelta(seconds=30), show_spinner="Looking through the lineages")
def taught_by_tenant(tenant: str) -> tuple[int, list[int]]:
    """Traces of a tenant that were ever taken in to learn or to judge, and the versions they taught."""
    with database().read() as session:
        theirs = tenants.ordinals(session, tenant)
        return len(theirs), policies.influenced_by_any(session, theirs) if theirs else []


@st.cache_data(ttl=TTL, show_spinner=False)
def attempts() -> list[Attempt]:
    with database().read() as session:
        return learning.attempts(session)


@st.cache_data(ttl=timedelta(seconds=30), show_spinner=False)
def gate_of(version: int) -> dict[str, Any] | None:
    """The gate's report on a version, from the attempt that made it."""
    with database().read() as session:
        attempt = learning.of_version(session, version)
    return attempt.gate if attempt is not None else None


def labels(found: Sequence[int]) -> str:
    return ", ".join(f"v{version}" for version in found)
