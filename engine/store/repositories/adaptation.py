"""What a learned version cost and what it saved, in seconds of the machine.

Cost: CPU seconds of its attempt, and of the refused attempts since the version before, which somebody has to pay for.
Saving: the tokens it served, in each class, times what its gate predicted a token to cost under the champion of that
moment less what it costs under the version, with the engine's measured costs of a target pass. Both are sums of counts;
what was served comes from the rollups, so it is live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select

from engine.store.database import ReadSession
from engine.store.models import LearningAttemptRow
from engine.store.repositories import overview
from engine.store.repositories.overview import Slice


@dataclass(frozen=True, slots=True)
class Served:
    """What one class got from a version, and milliseconds of target passes per token by its gate (None: not judged)."""

    requests: int
    output_tokens: int
    steps: int
    accepted: int
    parent_length: float | None = None
    own_length: float | None = None
    parent_ms: float | None = None
    own_ms: float | None = None

    @property
    def steps_saved(self) -> float:
        """Verify steps the champion of then would have needed more, by the paired ratio of acceptance lengths."""
        if not self.parent_length or not self.own_length:
            return 0.0
        return self.steps * (self.own_length / self.parent_length - 1.0)

    @property
    def saved_s(self) -> float:
        if self.parent_ms is None or self.own_ms is None:
            return 0.0
        return (self.steps + self.accepted) * (self.parent_ms - self.own_ms) / 1e3


@dataclass(frozen=True, slots=True)
class Adaptation:
    """``refused_cpu_s`` belongs to ``refused`` attempts between the version before and this one."""

    version: int
    learn_cpu_s: float
    gate_cpu_s: float
    export_cpu_s: float
    cpu_s: float
    refused: int
    refused_cpu_s: float
    classes: Mapping[str, Served] = field(default_factory=dict)

    @property
    def cost_s(self) -> float:
        return self.cpu_s + self.refused_cpu_s

    @property
    def requests(self) -> int:
        return sum(one.requests for one in self.classes.values())

    @property
    def saved_s(self) -> float:
        return sum(one.saved_s for one in self.classes.values())

    @property
    def steps_saved(self) -> float:
        return sum(one.steps_saved for one in self.classes.values())

    @property
    def net_s(self) -> float:
        return self.saved_s - self.cost_s

    @property
    def break_even_requests(self) -> float | None:
        """Requests like those it served after which it has paid for itself; None while it saves nothing."""
        return self.cost_s / (self.saved_s / self.requests) if self.requests and self.saved_s > 0 else None

    def derived(self, price_per_hour: float | None) -> dict[str, Any]:
        """The sums, and money where an hour of the machine has a price."""
        money = None if price_per_hour is None else self.net_s / 3600.0 * price_per_hour
        return {
            "requests": self.requests,
            "cost_s": self.cost_s,
            "steps_saved": self.steps_saved,
            "saved_s": self.saved_s,
            "net_s": self.net_s,
            "break_even_requests": self.break_even_requests,
            "net_money": money,
        }


def of_version(session: ReadSession, version: int, now: datetime) -> Adaptation | None:
    """None for a version that no attempt made: built in, or registered by hand."""
    row = session.scalar(select(LearningAttemptRow).where(LearningAttemptRow.version == version).limit(1))
    return _account(session, row, now) if row is not None else None


def all_versions(session: ReadSession, now: datetime) -> list[Adaptation]:
    """Every learned version, newest first."""
    rows = session.scalars(
        select(LearningAttemptRow).where(LearningAttemptRow.version.is_not(None)).order_by(LearningAttemptRow.id.desc())
    ).all()
    return [_account(session, row, now) for row in rows]


def wasted_cpu_s(session: ReadSession) -> float:
    """CPU seconds of refused and failed attempts after the last version: nobody has paid for them yet."""
    last = select(func.coalesce(func.max(LearningAttemptRow.id), 0)).where(LearningAttemptRow.version.is_not(None))
    query = select(func.coalesce(func.sum(LearningAttemptRow.cpu_s), 0.0))
    return float(session.scalar(query.where(LearningAttemptRow.id > last.scalar_subquery())) or 0.0)


def _account(session: ReadSession, row: LearningAttemptRow, now: datetime) -> Adaptation:
    before = (
        select(func.coalesce(func.max(LearningAttemptRow.id), 0))
        .where(LearningAttemptRow.id < row.id, LearningAttemptRow.version.is_not(None))
        .scalar_subquery()
    )
    refused, seconds = session.execute(
        select(func.count(), func.coalesce(func.sum(LearningAttemptRow.cpu_s), 0.0)).where(
            LearningAttemptRow.id > before, LearningAttemptRow.id < row.id
        )
    ).one()
    assert row.version is not None
    return Adaptation(
        version=row.version,
        learn_cpu_s=row.learn_cpu_s,
        gate_cpu_s=row.gate_cpu_s,
        export_cpu_s=row.export_cpu_s,
        cpu_s=row.cpu_s,
        refused=refused,
        refused_cpu_s=seconds,
        classes=_served(session, row.version, row.gate, row.started_at, now),
    )


def _served(
    session: ReadSession, version: int, gate: Mapping[str, Any], since: datetime, now: datetime
) -> dict[str, Served]:
    part = Slice(since - timedelta(minutes=1), now + timedelta(minutes=1), version=version)
    judged = gate.get("classes") or {}
    found = {}
    for row in overview.sums(session, part, ("traffic_class",)):
        by = judged.get(row["traffic_class"]) or {}
        keys = ("champion", "candidate", "champion_ms", "candidate_ms")
        counts = (row[name] for name in ("requests", "output_tokens", "steps", "accepted"))
        found[row["traffic_class"]] = Served(*counts, *(by.get(key) for key in keys))
    return found
