"""Every trace reaches MLflow, under the same id however often it is sent, and an outage loses none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from sqlalchemy import text

from engine.contracts import SlipstreamError
from engine.ops import spans
from engine.ops.exporter import MlflowExporter, is_sampled
from engine.store.database import Database
from engine.store.models import TraceRow
from engine.store.repositories import export, partitions

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def trace(number: int, **changes: object) -> TraceRow:
    values: dict[str, object] = {
        "started_at": START + timedelta(seconds=number),
        "trace_id": UUID(int=(0x5EED << 100) + number),
        "request_id": f"r{number}",
        "replica_id": "replica-0",
        "policy_version": 1,
        "arm": "champion",
        "generation": 1,
        "traffic_class": "chat",
        "assignment_key": f"k{number}",
        "status": "ok",
        "finish_reason": "stop",
        "model": "tiny",
        "endpoint": "/v1/completions",
        "stream": False,
        "temperature": 0.0,
        "max_tokens": 8,
        "queue_s": 0.01,
        "ttft_s": 0.05,
        "tpot_s": 0.02,
        "e2e_s": 0.2,
        "prompt_tokens": 4,
        "output_tokens": 8,
        "steps": 4,
        "drafted": 6,
        "accepted": 3,
        "drafted_per_pos": [4, 2],
        "accepted_per_pos": [2, 1],
        "prefill_s": 0.04,
        "draft_s": 0.001,
        "verify_s": 0.1,
        "other_s": 0.01,
        "cost_s": 0.06,
        "plain_s": 0.08,
        "expected_accepted": 1.5,
        "expected_plain_s": 0.09,
        "expected_cost_s": 0.05,
        "retry": 0,
        "preemptions": 0,
        "trainable": True,
    }
    return TraceRow(**(values | changes))


class FakeMlflow:
    """Answers as the tracking server does; ``down`` makes it refuse."""

    def __init__(self) -> None:
        self.down = False
        self.seen: list[str] = []
        self.requests = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("refused")
        if request.url.path.endswith("get-by-name"):
            return httpx.Response(404, json={})
        if request.url.path.endswith("create"):
            return httpx.Response(200, json={"experiment_id": "42"})
        assert request.headers["x-mlflow-experiment-id"] == "42"
        message = ExportTraceServiceRequest.FromString(request.content)
        self.requests += 1
        for span in message.resource_spans[0].scope_spans[0].spans:
            if not span.parent_span_id:
                self.seen.append(span.trace_id.hex())
        return httpx.Response(200)


Make = Callable[..., MlflowExporter]


@pytest.fixture
def mlflow() -> FakeMlflow:
    return FakeMlflow()


@pytest.fixture
def exporter(db: Database, mlflow: FakeMlflow) -> MlflowExporter:
    client = httpx.Client(base_url="http://mlflow", transport=httpx.MockTransport(mlflow))
    return MlflowExporter(db, client, "slipstream", batch=10, share=1.0, now=lambda: START)


def write(db: Database, *rows: TraceRow) -> None:
    with db.write() as session:
        partitions.ensure(session, START.date())
        session.add_all(rows)


def drain(exporter: MlflowExporter) -> None:
    while exporter.run_once():
        pass


def test_every_trace_is_sent_once_in_batches(db: Database, exporter: MlflowExporter, mlflow: FakeMlflow) -> None:
    write(db, *(trace(n) for n in range(25)))
    drain(exporter)
    assert sorted(mlflow.seen) == sorted(trace(n).trace_id.hex for n in range(25))
    assert mlflow.requests == 3
    write(db, trace(30))
    drain(exporter)
    assert len(mlflow.seen) == 26


def test_an_outage_loses_nothing_and_is_on_record(db: Database, exporter: MlflowExporter, mlflow: FakeMlflow) -> None:
    write(db, *(trace(n) for n in range(5)))
    mlflow.down = True
    with pytest.raises(SlipstreamError, match="did not take 5 traces"):
        exporter.run_once()
    with db.read() as session:
        at = export.cursor(session, "mlflow")
        assert at.error is not None
        assert export.lag(session, at)["waiting"] == 5
    mlflow.down = False
    drain(exporter)
    assert len(mlflow.seen) == 5
    with db.read() as session:
        assert export.cursor(session, "mlflow").error is None


def test_a_trace_committed_late_is_not_passed_over(db: Database, exporter: MlflowExporter, mlflow: FakeMlflow) -> None:
    """A transaction is open with an early row while a later one commits: the cursor must wait for it."""
    write(db, trace(0))
    drain(exporter)
    with db.write() as slow:
        slow.add(trace(1))
        slow.flush()
        write(db, trace(2))
        drain(exporter)
    drain(exporter)
    assert sorted(mlflow.seen) == sorted(trace(n).trace_id.hex for n in range(3))


def test_the_horizon_is_no_later_than_the_look_at_who_writes(db: Database) -> None:
    """Who begins to write after the look is not seen by it: a clock read after it would pass their rows over."""
    with db.read() as session:
        assert session.scalar(text(f"SELECT ({export.HORIZON}) <= statement_timestamp()"), {"now": None})


def test_the_same_trace_gives_the_same_bytes() -> None:
    once, again = (spans.request([trace(3)]).SerializeToString(deterministic=True) for _ in range(2))
    assert once == again


def test_children_lie_inside_their_request() -> None:
    root, *children = spans.spans(trace(1))
    assert [c.name for c in children] == ["queue", "prefill", "decode"]
    assert all(root.start_time_unix_nano <= c.start_time_unix_nano for c in children)
    assert max(c.end_time_unix_nano for c in children) <= root.end_time_unix_nano + 1_000


@pytest.mark.parametrize("changes", [{"status": "error"}, {"arm": "canary"}, {"e2e_s": 60.0}])
def test_errors_canary_and_slow_traces_are_always_sampled(changes: dict[str, object]) -> None:
    assert is_sampled(trace(1, **changes), 0.0)
    assert not is_sampled(trace(1), 0.0)
    assert is_sampled(trace(1), 1.0)


class Picky(FakeMlflow):
    """Refuses requests that hold one of the traces in ``bad``, with ``status``; its experiment can be deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[str] = set()
        self.status = 400
        self.deleted = False
        self.restored = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("get-by-name"):
            stage = "deleted" if self.deleted else "active"
            return httpx.Response(200, json={"experiment": {"experiment_id": "42", "lifecycle_stage": stage}})
        if request.url.path.endswith("restore"):
            self.deleted, self.restored = False, self.restored + 1
            return httpx.Response(200, json={})
        if self.deleted:
            return httpx.Response(404, text="no such experiment")
        message = ExportTraceServiceRequest.FromString(request.content)
        ids = {span.trace_id.hex() for span in message.resource_spans[0].scope_spans[0].spans}
        if ids & self.bad:
            return httpx.Response(self.status, text="malformed")
        return super().__call__(request)


@pytest.fixture
def picky(db: Database) -> tuple[Picky, MlflowExporter]:
    server = Picky()
    client = httpx.Client(base_url="http://mlflow", transport=httpx.MockTransport(server))
    return server, MlflowExporter(db, client, "slipstream", batch=10, share=1.0, now=lambda: START)


def test_a_trace_that_is_refused_keeps_no_other(db: Database, picky: tuple[Picky, MlflowExporter]) -> None:
    server, exporter = picky
    server.bad = {trace(3).trace_id.hex, trace(14).trace_id.hex}
    write(db, *(trace(n) for n in range(25)))
    drain(exporter)
    assert len(server.seen) == len(set(server.seen)) == 23
    with db.read() as session:
        at = export.cursor(session, "mlflow")
    assert (at.exported, at.refused, at.skipped, at.error) == (23, 2, 0, None)


@pytest.mark.parametrize(("status", "everything"), [(404, False), (429, False), (503, False), (400, True)])
def test_what_speaks_of_the_server_skips_nothing(
    db: Database, picky: tuple[Picky, MlflowExporter], status: int, everything: bool
) -> None:
    server, exporter = picky
    server.status = status
    server.bad = {trace(n).trace_id.hex for n in range(5 if everything else 1)}
    write(db, *(trace(n) for n in range(5)))
    with pytest.raises(SlipstreamError):
        exporter.run_once()
    server.bad = set()
    drain(exporter)
    assert len(set(server.seen)) == 5


def test_a_deleted_experiment_is_restored(db: Database, picky: tuple[Picky, MlflowExporter]) -> None:
    server, exporter = picky
    write(db, trace(0))
    drain(exporter)
    server.deleted = True
    write(db, trace(1))
    drain(exporter)
    assert (len(server.seen), server.restored) == (2, 1)
