"""Trace records for tests: realistic, and the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from engine.contracts import SpecCounts, Status, TracePayload, TraceRecord, VerifyStep

START = datetime(2026, 3, 1, 23, 59, 0, tzinfo=UTC)  # so that a run crosses midnight


def record(number: int, seed: int = 0, **changes: Any) -> TraceRecord:
    """One request with its steps; every count in it follows from the steps."""
    rng = random.Random(seed * 1_000_003 + number)
    steps = []
    for _ in range(rng.randrange(0, 12)):
        drafted = rng.randrange(0, 5)
        accepted = rng.randrange(0, drafted + 1)
        steps.append(VerifyStep(tuple(rng.randrange(300) for _ in range(drafted)), accepted, accepted + 1))
    counts = SpecCounts()
    for step in steps:
        counts.add(step)
    output = 1 + sum(step.emitted for step in steps)
    ttft = rng.lognormvariate(-2.5, 0.6)
    decode = rng.lognormvariate(-0.5, 0.8)
    made = TraceRecord(
        trace_id=UUID(int=rng.getrandbits(128), version=4),
        request_id=f"req-{seed}-{number}",
        replica_id="replica-0",
        started_at=START + timedelta(seconds=number * 0.7),
        policy_version=rng.choice((1, 2)),
        arm=rng.choice(("champion", "canary", "control")),
        generation=3,
        traffic_class=rng.choice(("chat", "code")),
        status=rng.choices((Status.OK, Status.ERROR, Status.CANCELLED), (9, 1, 1))[0],
        model="tiny",
        endpoint="/v1/completions",
        assignment_key=f"key-{number}",
        tenant=rng.choice((None, "acme")),
        finish_reason="stop",
        stream=rng.random() < 0.5,
        max_tokens=64,
        queue_s=rng.random() / 100,
        ttft_s=ttft,
        tpot_s=decode / max(output - 1, 1),
        e2e_s=ttft + decode,
        prompt_tokens=7,
        output_tokens=output,
        steps=counts.steps,
        drafted=counts.drafted,
        accepted=counts.accepted,
        drafted_per_pos=tuple(counts.drafted_per_pos),
        accepted_per_pos=tuple(counts.accepted_per_pos),
        draft_s=0.001,
        verify_s=decode,
        other_s=0.1 * decode,
        cost_s=0.5 * decode,
        plain_s=0.7 * decode,
        expected_accepted=1.25,
        expected_plain_s=0.75 * decode,
        expected_cost_s=0.5 * decode,
        retry=int(rng.random() < 0.1),
        payload=TracePayload(tuple(range(7)), tuple(rng.randrange(300) for _ in range(output)), tuple(steps)),
    )
    return replace(made, **changes)
