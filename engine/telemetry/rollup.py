"""Trace records → rollup deltas. Pure: what the writer adds in the transaction of the COPY."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from engine.contracts import Objectives, Status, TraceRecord
from engine.store import histogram

METRICS = ("ttft", "tpot", "e2e", "queue", "acceptance_length")


@dataclass(frozen=True, slots=True)
class Key:
    """What a rollup row is about."""

    at: datetime
    policy_version: int
    arm: str
    traffic_class: str
    replica_id: str
    generation: int


@dataclass(slots=True)
class Sums:
    """Counts and seconds over the requests of one key; fields are the columns of ``rollup_deltas``."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    retries: int = 0
    preemptions: int = 0
    good: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_pos: list[int] = field(default_factory=list)
    accepted_per_pos: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0
    other_s: float = 0.0
    cost_s: float = 0.0
    plain_s: float = 0.0
    expected_accepted: float = 0.0
    expected_plain_s: float = 0.0
    expected_cost_s: float = 0.0
    e2e_s: float = 0.0

    def add(self, record: TraceRecord, objectives: Objectives) -> None:
        self.requests += 1
        self.errors += record.status in (Status.ERROR, Status.TIMEOUT)
        self.cancelled += record.status is Status.CANCELLED
        self.retries += record.retry > 0
        self.preemptions += record.preemptions
        self.good += objectives.kept_by(record)
        self.prompt_tokens += record.prompt_tokens
        self.output_tokens += record.output_tokens
        self.steps += record.steps
        self.drafted += record.drafted
        self.accepted += record.accepted
        _add_positions(self.drafted_per_pos, record.drafted_per_pos)
        _add_positions(self.accepted_per_pos, record.accepted_per_pos)
        self.draft_s += record.draft_s
        self.verify_s += record.verify_s
        self.other_s += record.other_s
        self.cost_s += record.cost_s
        self.plain_s += record.plain_s
        self.expected_accepted += record.expected_accepted
        self.expected_plain_s += record.expected_plain_s
        self.expected_cost_s += record.expected_cost_s
        self.e2e_s += record.e2e_s
        if record.ttft_s is not None:
            self.decode_s += max(record.e2e_s - record.ttft_s, 0.0)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one batch adds to one key: sums, and per metric the values of requests that ended well, as buckets."""

    key: Key
    sums: Sums
    histograms: dict[str, tuple[list[int], list[int]]]


def deltas(records: Iterable[TraceRecord], objectives: Objectives) -> list[Delta]:
    """One delta per key, in a fixed order, so that a batch written twice is the same rows."""
    grouped: dict[Key, list[TraceRecord]] = defaultdict(list)
    for record in records:
        grouped[key(record)].append(record)
    made = []
    for at in sorted(
        grouped, key=lambda k: (k.at, k.policy_version, k.arm, k.traffic_class, k.replica_id, k.generation)
    ):
        sums = Sums()
        for record in grouped[at]:
            sums.add(record, objectives)
        made.append(Delta(at, sums, _histograms(grouped[at])))
    return made


def key(record: TraceRecord) -> Key:
    """A request belongs to the minute in which it started, so that late writing moves nothing."""
    return Key(
        record.started_at.replace(second=0, microsecond=0),
        record.policy_version,
        record.arm,
        record.traffic_class,
        record.replica_id,
        record.generation,
    )


def _histograms(records: Sequence[TraceRecord]) -> dict[str, tuple[list[int], list[int]]]:
    found: dict[str, Any] = {}
    for metric in METRICS:
        values = [
            value for record in records if record.status is Status.OK and (value := _value(record, metric)) is not None
        ]
        if values:
            found[metric] = histogram.count(values)
    return found


def _value(record: TraceRecord, metric: str) -> float | None:
    """Seconds, or the acceptance length (1 + accepted / steps) where a step was taken."""
    if metric == "acceptance_length":
        return 1 + record.accepted / record.steps if record.steps else None
    seconds: float | None = getattr(record, f"{metric}_s")
    return seconds


def _add_positions(total: list[int], part: Sequence[int]) -> None:
    total.extend([0] * (len(part) - len(total)))
    for position, n in enumerate(part):
        total[position] += n
