"""Every panel of the dashboard by name: the query behind it, which the dashboard, `slipstream query` and the
benchmark of the store all use, so that they cannot differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from engine.store.database import ReadSession
from engine.store.panels import rollouts, speculation, system, traffic, versions
from engine.store.panels.traffic import Rows
from engine.store.repositories import drift, learning, overview, plans, traces
from engine.store.repositories.overview import Slice

Read = Callable[[ReadSession, Slice], Rows]
REACTION = timedelta(hours=6)
VERSION, CLASS = ("policy_version",), ("traffic_class",)


@dataclass(frozen=True, slots=True)
class Panel:
    """``title`` says what its numbers are, with their unit; ``read`` gives its rows for a slice."""

    name: str
    title: str
    read: Read

    @property
    def page(self) -> str:
        return self.name.partition(".")[0]


def _known(session: ReadSession, part: Slice) -> Rows:
    known = overview.known(session, part)
    return [{"filter": name, "value": str(value)} for name, values in known.items() for value in values]


def _ledger(session: ReadSession, part: Slice) -> Rows:
    return [
        {
            "at": plan.created_at,
            "generation": plan.generation,
            "champion": plan.champion,
            "arms": [{"name": a.name, "policy_version": a.policy_version, "weight": a.weight} for a in plan.arms],
            "actor": plan.actor,
            "reason": plan.reason,
        }
        for plan in reversed(plans.history(session, part.since, part.until))
    ]


def _findings(session: ReadSession, part: Slice) -> Rows:
    """Findings of the window, each with what the learner did in the six hours after it."""
    rows = drift.findings(session, part.since, part.until)
    if not rows:
        return []
    times = [row["found_at"] for row in rows]
    attempts = learning.finished(session, min(times), max(times) + REACTION)
    for row in rows:
        after = [a for a in attempts if row["found_at"] <= a.finished_at <= row["found_at"] + REACTION]
        row["learner"] = _reaction(after)
    return rows


def _reaction(after: Sequence[learning.Attempt]) -> str:
    """What the attempts of the learner came to, the oldest first; none is an answer too."""
    made = [f"v{a.version}" for a in reversed(after) if a.version is not None]
    failed = sum(a.outcome == learning.ERROR for a in after)
    refused = len(after) - len(made) - failed
    said = [f"made {', '.join(made)}"] if made else []
    said += [f"{n} {word}" for n, word in ((refused, "refused"), (failed, "failed")) if n and not made]
    return ", ".join(said) or "no attempt"


def _failed(session: ReadSession, part: Slice) -> Rows:
    return traces.listed(session, part, traces.Filter(failed=True))


def _slowest(session: ReadSession, part: Slice) -> Rows:
    return traces.listed(session, part, order="slowest")


PANELS: dict[str, Panel] = {
    panel.name: panel
    for panel in (
        Panel("overview.totals", "The window in numbers: counts, rates, latencies in ms", traffic.totals),
        Panel("overview.before", "The window before", lambda session, part: traffic.totals(session, part.before())),
        Panel(
            "overview.over_time",
            "Latency percentiles (ms), rates and acceptance over time",
            partial(traffic.over_time, latencies=("e2e",)),
        ),
        *(
            Panel(f"overview.{metric}", f"{title} over time, ms", partial(traffic.over_time, latencies=(metric,)))
            for metric, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("queue", "Queue time"))
        ),
        Panel(
            "overview.arms",
            "End-to-end latency over time by arm and version, ms",
            partial(traffic.over_time, by=("arm", "policy_version"), latencies=("e2e",)),
        ),
        Panel("overview.heat", "Requests by time and end-to-end latency, ms", traffic.heat),
        Panel("overview.versions", "Versions in the window", partial(traffic.totals, by=VERSION)),
        Panel("overview.classes", "Traffic classes in the window", partial(traffic.totals, by=CLASS)),
        Panel("overview.arm_totals", "Arms in the window", partial(traffic.totals, by=("arm",))),
        Panel("overview.replicas", "Replicas in the window", partial(traffic.totals, by=("replica_id",))),
        Panel("overview.ledger", "What was served: the ledger's entries in the window", _ledger),
        Panel("overview.filters", "Classes, arms, versions and replicas with traffic", _known),
        Panel(
            "speculation.by_version",
            "Acceptance, draft length and tokens/s over time, by version",
            speculation.acceptance_over_time,
        ),
        Panel(
            "speculation.by_class",
            "Acceptance and draft length over time, by class",
            partial(speculation.acceptance_over_time, by=CLASS),
        ),
        Panel("speculation.positions", "Acceptance by draft position and version", speculation.positions),
        Panel(
            "speculation.positions_by_class",
            "Acceptance by draft position and class",
            partial(speculation.positions, by=CLASS),
        ),
        Panel("speculation.distribution", "Requests by acceptance length and version", speculation.distribution),
        Panel("speculation.cost", "Step time (ms) against acceptance length, by version and class", speculation.cost),
        Panel("drift.findings", "What drifted: when, where, how large, how sure", _findings),
        Panel("drift.mix", "Requests over time by class", partial(traffic.over_time, by=CLASS, latencies=())),
        Panel("rollouts.tried", "Rollouts at work in the window, as they stand", rollouts.tried),
        Panel("rollouts.decisions", "Decisions of the window, with their guards", rollouts.decisions),
        Panel("rollouts.counts", "Counts by arm and class behind the last decision of each rollout", rollouts.counts),
        Panel("rollouts.weeks", "What changing drafts cost, by week: seconds and hours", rollouts.weeks),
        Panel(
            "versions.measured",
            "What each version did: rates and percentiles (ms) with 95 % intervals",
            versions.measured,
        ),
        Panel("versions.trends", "Acceptance length, p50 and p95 (ms) over time, by version", versions.trends),
        Panel("traces.newest", "The newest requests", traces.listed),
        Panel("traces.slowest", "The slowest requests", _slowest),
        Panel("traces.failed", "The newest requests that failed", _failed),
        Panel("system.writers", "Replicas and their trace writers", system.writers),
        Panel("system.exporter", "The exporter to MLflow: lag in seconds", system.exporter),
        Panel("system.notifications", "Notifications of rollouts: sinks, tries, errors", system.sinks),
        Panel("system.partitions", "Partitions by day, bytes", system.stored),
        Panel("system.compaction", "Rollup deltas that wait, age in seconds", system.compaction),
        Panel("system.learning", "Attempts of the learner, CPU seconds", system.learning_cost),
    )
}
