"""A stored trace as OpenTelemetry spans. Pure: the same trace gives the same bytes, so sending it twice is harmless."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from engine import contracts
from engine.store.models import TraceRow

TAG_PREFIX = "mlflow.traceTag."
"""Attributes of the root span under this prefix become tags by which MLflow can search."""


def request(rows: Iterable[TraceRow]) -> ExportTraceServiceRequest:
    """One OTLP request for a batch of traces."""
    message = ExportTraceServiceRequest()
    resource = message.resource_spans.add()
    resource.resource.attributes.append(_attribute("service.name", "slipstream"))
    scope = resource.scope_spans.add()
    scope.scope.name = "slipstream"
    for row in rows:
        scope.spans.extend(spans(row))
    return message


def spans(row: TraceRow) -> list[Span]:
    """The root span of a request and, as its children, queue, prefill and decode, laid end to end."""
    start = _nanoseconds(row.started_at)
    root = _span(row.trace_id, "request", start, row.e2e_s, _attributes(row))
    failed = row.status in (contracts.Status.ERROR, contracts.Status.TIMEOUT)
    root.status.CopyFrom(
        Status(code=Status.STATUS_CODE_ERROR if failed else Status.STATUS_CODE_OK, message=row.error or "")
    )
    parts = [root]
    at = start
    for name, seconds, attributes in _children(row):
        child = _span(row.trace_id, name, at, seconds, attributes)
        child.parent_span_id = root.span_id
        parts.append(child)
        at += round(seconds * 1e9)
    return parts


def _children(row: TraceRow) -> Iterable[tuple[str, float, Mapping[str, Any]]]:
    if row.queue_s is not None:
        yield "queue", row.queue_s, {}
    if row.ttft_s is not None:
        yield "prefill", max(row.ttft_s - (row.queue_s or 0.0), 0.0), {"prompt_tokens": row.prompt_tokens}
        counts = {"steps": row.steps, "drafted": row.drafted, "accepted": row.accepted}
        names = (
            *("draft_s", "verify_s", "other_s", "cost_s", "plain_s"),
            *("expected_accepted", "expected_plain_s", "expected_cost_s"),
        )
        cost = {name: getattr(row, name) for name in names}
        yield "decode", max(row.e2e_s - row.ttft_s, 0.0), counts | cost


def _attributes(row: TraceRow) -> dict[str, Any]:
    usage = {"input_tokens": row.prompt_tokens, "output_tokens": row.output_tokens}
    usage["total_tokens"] = row.prompt_tokens + row.output_tokens
    tags = {
        "policy_version": str(row.policy_version),
        "arm": row.arm,
        "generation": str(row.generation),
        "traffic_class": row.traffic_class,
        "replica_id": row.replica_id,
        "status": row.status,
    }
    return {
        "mlflow.spanType": "LLM",
        "mlflow.llm.model": row.model,
        "mlflow.chat.tokenUsage": json.dumps(usage),
        "request_id": row.request_id,
        "finish_reason": row.finish_reason or "",
        "steps": row.steps,
        "drafted": row.drafted,
        "accepted": row.accepted,
        "retry": row.retry,
        **{TAG_PREFIX + key: value for key, value in tags.items()},
    }


def _span(trace_id: UUID, name: str, start_ns: int, seconds: float, attributes: Mapping[str, Any]) -> Span:
    return Span(
        trace_id=trace_id.bytes,
        span_id=hashlib.blake2b(trace_id.bytes + name.encode(), digest_size=8).digest(),
        name=name,
        kind=Span.SPAN_KIND_SERVER if name == "request" else Span.SPAN_KIND_INTERNAL,
        start_time_unix_nano=start_ns,
        end_time_unix_nano=start_ns + round(seconds * 1e9),
        attributes=[_attribute(key, value) for key, value in attributes.items()],
    )


def _attribute(key: str, value: Any) -> KeyValue:
    if isinstance(value, int):
        return KeyValue(key=key, value=AnyValue(int_value=value))
    if isinstance(value, float):
        return KeyValue(key=key, value=AnyValue(double_value=value))
    return KeyValue(key=key, value=AnyValue(string_value=str(value)))


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp()) * 1_000_000_000 + at.microsecond * 1_000
