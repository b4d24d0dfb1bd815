"""The language all parts speak: frozen records and enums. Standard library only.

Durations are seconds (float), instants are timezone-aware UTC datetimes, counts are ints.
Counts are stored, never ratios; ratios are made where they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

TRAFFIC_CLASSES = ("chat", "code", "long_form", "batch")
"""The classes that ship; operators may use names of their own."""

CHAMPION = "champion"
CANARY = "canary"
CONTROL = "control"
SHADOW = "shadow"
"""An arm of weight 0: its policy is resident and drafts on copies of requests, and no request is ever routed to it."""


class ProposerKind(StrEnum):
    """What drafts (design.md section 4)."""

    NONE = "none"
    NGRAM = "ngram"
    TRACE_MEMORY = "trace_memory"
    NEURAL = "neural"
    HYBRID = "hybrid"


class Status(StrEnum):
    """How a request ended, as its trace says it."""

    OK = "ok"
    ERROR = "error"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    REJECTED = "rejected"


class FinishReason(StrEnum):
    """Why generation stopped; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Verdict(StrEnum):
    """Only PASS advances, only FAIL rolls back, the rest hold."""

    PASS = "PASS"
    FAIL = "FAIL"
    INSUFFICIENT = "INSUFFICIENT"
    STALE = "STALE"
    ERROR = "ERROR"


class RolloutState(StrEnum):
    DRAFT = "DRAFT"
    READY = "READY"
    SHADOW = "SHADOW"
    RAMPING = "RAMPING"
    HELD = "HELD"
    SOAKING = "SOAKING"
    PROMOTING = "PROMOTING"
    PROMOTED = "PROMOTED"
    WATCHING = "WATCHING"
    DONE = "DONE"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"
    INCONCLUSIVE = "INCONCLUSIVE"
    CANCELLED = "CANCELLED"


TERMINAL_STATES = frozenset(
    {RolloutState.DONE, RolloutState.ROLLED_BACK, RolloutState.INCONCLUSIVE, RolloutState.CANCELLED}
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One slice of a serving plan: ``policy_version`` serves the share ``weight`` in [0, 0.5] of eligible keys."""

    name: str
    policy_version: int
    weight: float


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """One row of the append-only ledger: what the replicas shall serve from ``generation`` on.

    ``champion`` serves every key that no arm takes; ``fallback`` when the champion cannot be loaded; ``rollback_to`` is
    the champion recorded when a canary started, resident while it runs. ``traffic_classes``, ``tenants`` and ``slices``
    (a gateway's header X-Slice) say which requests are eligible for the arms; None means all.
    """

    generation: int
    champion: int
    fallback: int
    arms: tuple[Arm, ...]
    salt: str
    actor: str
    reason: str
    created_at: datetime
    traffic_classes: frozenset[str] | None = None
    tenants: frozenset[str] | None = None
    slices: frozenset[str] | None = None
    rollback_to: int | None = None
    rollout_id: int | None = None

    def takes(self, traffic_class: str, tenant: str | None, slice_name: str | None) -> bool:
        """Whether a request is eligible for the arms."""
        asked = ((self.traffic_classes, traffic_class), (self.tenants, tenant), (self.slices, slice_name))
        return all(wanted is None or given in wanted for wanted, given in asked)

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def canary(self) -> Arm | None:
        """The arm on trial; None where it is the champion's own, watched beside a control."""
        return next((arm for arm in self.arms if arm.name == CANARY and arm.policy_version != self.champion), None)

    @property
    def rollback_target(self) -> int | None:
        """The champion recorded when the canary started; None where nothing is to be taken back. Never a guess."""
        return self.rollback_to or (self.champion if self.arms else None)

    @property
    def versions(self) -> frozenset[int]:
        """Every policy version that must be resident before this plan takes effect."""
        named = (self.champion, self.fallback, self.rollback_to, *(arm.policy_version for arm in self.arms))
        return frozenset(version for version in named if version is not None)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which arm and policy a request was given, and by which generation of the ledger."""

    arm: str
    policy_version: int
    generation: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 keeps the whole vocabulary."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class VerifyStep:
    """One verify step of one request.

    ``proposed`` are the drafted token ids that counted (those a stop did not cut off), ``accepted`` how many of
    them the target kept, ``emitted`` the tokens committed: the accepted ones and, unless a stop cut them, one
    more: recovered when something was rejected, bonus when nothing was.
    """

    proposed: tuple[int, ...]
    accepted: int
    emitted: int


@dataclass(slots=True)
class SpecCounts:
    """Speculation counts of one request; the only mutable record, filled as the request runs."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_pos: list[int] = field(default_factory=list)
    accepted_per_pos: list[int] = field(default_factory=list)

    def add(self, step: VerifyStep) -> None:
        self.steps += 1
        self.drafted += len(step.proposed)
        self.accepted += step.accepted
        for counts, n in ((self.drafted_per_pos, len(step.proposed)), (self.accepted_per_pos, step.accepted)):
            counts.extend([0] * (len(step.proposed) - len(counts)))
            for position in range(n):
                counts[position] += 1


@dataclass(frozen=True, slots=True)
class TracePayload:
    """The tokens of one request. Absent where a tenant or request switched payloads off."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    steps: tuple[VerifyStep, ...]


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One request, whatever became of it: one row of ``traces`` (design.md section 7).

    Of decoding it waits for ``draft_s`` (own proposals), ``verify_s`` (target passes), ``other_s``; ``cost_s`` is its
    part of these. plain_s / cost_s is the observed gain over plain decoding (plain_s 0: not known), expected_plain_s /
    expected_cost_s the one that K control predicted when it chose, ``expected_accepted`` its guess at ``accepted``.

    ``tpot_s`` = (e2e − TTFT) / (output_tokens − 1), None under two tokens. ``started_at`` is when the server had
    read the request; with ``trace_id`` it is the identity under which a trace is stored once.
    """

    trace_id: UUID
    request_id: str
    replica_id: str
    started_at: datetime
    policy_version: int
    arm: str
    generation: int
    traffic_class: str
    status: Status
    model: str
    endpoint: str
    assignment_key: str
    tenant: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    stream: bool = False
    temperature: float = 0.0
    max_tokens: int = 0
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_pos: tuple[int, ...] = ()
    accepted_per_pos: tuple[int, ...] = ()
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    cost_s: float = 0.0
    plain_s: float = 0.0
    expected_accepted: float = 0.0
    expected_plain_s: float = 0.0
    expected_cost_s: float = 0.0
    retry: int = 0
    preemptions: int = 0
    draft_errors: int = 0
    trainable: bool = True
    payload: TracePayload | None = None


@dataclass(frozen=True, slots=True)
class Objectives:
    """What the operator asks of a request, seconds. Goodput counts the requests that keep both."""

    ttft_s: float
    tpot_s: float

    def kept_by(self, record: TraceRecord) -> bool:
        """A response of one token has no TPOT and keeps that objective."""
        if record.status is not Status.OK or record.ttft_s is None or record.ttft_s > self.ttft_s:
            return False
        return record.tpot_s is None or record.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A row of ``policy_versions``: immutable, addressed by ``digest`` (sha256 over its files)."""

    version: int
    digest: str
    kind: ProposerKind
    num_speculative_tokens: int
    manifest: dict[str, Any]
    created_at: datetime
    parent_version: int | None = None
    mlflow_version: str | None = None
    mlflow_run_id: str | None = None
    retired_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica says of itself with every heartbeat.

    ``heartbeat_at`` is by the database's clock, so that it can be compared on any machine. After ``lease_s`` seconds
    without the ledger the replica sends canary traffic to the champion.
    """

    replica_id: str
    address: str
    model: str
    started_at: datetime
    heartbeat_at: datetime
    observed_generation: int | None
    resident: tuple[int, ...]
    stats: dict[str, Any]
    lease_s: float = 60.0


class SlipstreamError(Exception):
    """An error a person can act on: what was wrong, where, and what to do next."""


def artifact_digest(files: Mapping[str, bytes]) -> str:
    """The address of a policy artifact: sha256 (hex) over its file names, in order, and their contents.

    Lengths go into the hash, so that no two different sets of files run together to the same bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()
