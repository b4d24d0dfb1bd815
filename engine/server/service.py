"""The life of a request inside the server: arm, engine, outputs, and one trace whatever became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

from engine.contracts import Assignment, SamplingParams, SlipstreamError, Status, TraceRecord
from engine.model.loading import Target
from engine.runner.engine import EngineRequest, Output, PolicyNotResident, RequestResult
from engine.scheduler.errors import QueueFull, RequestTooLong
from engine.server.caller import Caller, clean
from engine.server.engine_thread import EngineFailure, EngineThread
from engine.server.errors import ApiError, internal, invalid
from engine.server.residency import PLAIN, Residency
from engine.telemetry.metrics import Metrics
from engine.telemetry.writer import TraceWriter

UNROUTED = "unrouted"
"""The arm of a request that was refused before it was given one."""
DEFAULT_MAX_TOKENS = 256
RETRY_AFTER_S = 1


@dataclass(slots=True)
class Running:
    """One request that the engine has or had. ``outputs`` is read on the event loop only."""

    caller: Caller
    trace_id: UUID
    endpoint: str
    stream: bool
    started_at: datetime
    arrived: float  # monotonic seconds
    request: EngineRequest
    assignment: Assignment
    submitted: float = 0.0
    reassigned: bool = False
    outputs: asyncio.Queue[Output | SlipstreamError] = field(default_factory=asyncio.Queue)

    @property
    def headers(self) -> dict[str, str]:
        """Which policy served this request, and under which trace it is stored."""
        return {
            "x-request-id": self.caller.request_id,
            "x-slipstream-trace-id": str(self.trace_id),
            "x-slipstream-policy-version": str(self.assignment.policy_version),
            "x-slipstream-arm": self.assignment.arm,
            "x-slipstream-generation": str(self.assignment.generation),
        }


class Service:
    """Everything the routes need, and nothing of HTTP. ``clock`` is monotonic seconds, ``now`` UTC.

    ``ended`` is told of every request that the engine had, and its slice.
    """

    def __init__(
        self,
        target: Target,
        thread: EngineThread,
        residency: Residency,
        writer: TraceWriter,
        metrics: Metrics,
        replica_id: str,
        payloads: bool,
        ended: Callable[[TraceRecord, str | None], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.target, self.residency, self.metrics = target, residency, metrics
        self._thread, self._writer = thread, writer
        self._replica_id, self._payloads, self._ended = replica_id, payloads, ended
        self.clock, self.now = clock, now
        self.telemetry = True  # `slipstream bench serving` measures what it costs by switching it off

    def max_tokens(self, wanted: int | None, prompt_tokens: int) -> int:
        """Tokens to generate at most; an ApiError when prompt and output cannot fit the context."""
        limit = self._thread.engine.max_model_len
        room = limit - prompt_tokens
        if room < 1:
            raise invalid(
                f"This model's context holds {limit} tokens; the prompt alone has {prompt_tokens}.",
                "messages",
                "context_length_exceeded",
            )
        if wanted is not None and wanted > room:
            raise invalid(
                f"max_tokens is too large: {wanted}. The context holds {limit} tokens and the prompt has "
                f"{prompt_tokens}, so at most {room} are possible.",
                "max_tokens",
                "context_length_exceeded",
            )
        return wanted if wanted is not None else min(DEFAULT_MAX_TOKENS, room)

    def start(
        self,
        caller: Caller,
        traffic_class: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        endpoint: str,
        stream: bool,
        arrived: float,
        started_at: datetime,
    ) -> Running:
        """Give a request its arm and hand it to the engine."""
        assignment = self.residency.assign(caller.key, traffic_class, caller.tenant, caller.slice_name)
        trace_id = uuid4()
        request = EngineRequest(
            trace_id.hex,
            tuple(prompt_ids),
            sampling,
            assignment.policy_version,
            traffic_class,
            client=caller.tenant or "",
        )
        running = Running(caller, trace_id, endpoint, stream, started_at, arrived, request, assignment)
        self._submit(running)
        return running

    async def next(self, running: Running) -> Output:
        """The next output, the only one unless it streams.

        An ApiError where the engine would not take the request or failed on it.
        """
        return self._checked(running, await running.outputs.get())

    def cancel(self, running: Running) -> None:
        """Nobody waits for this request any more."""
        self._thread.cancel(running.request.request_id)

    def refuse(
        self,
        request_id: str,
        endpoint: str,
        error: ApiError,
        arrived: float,
        started_at: datetime,
        caller: Caller | None,
    ) -> UUID:
        """Make the trace of a request that never got to the engine."""
        trace_id = uuid4()
        plan = self.residency.plan
        self._record(
            TraceRecord(
                trace_id=trace_id,
                request_id=request_id,
                replica_id=self._replica_id,
                started_at=started_at,
                policy_version=PLAIN,
                arm=UNROUTED,
                generation=plan.generation if plan is not None else 0,
                traffic_class=(caller.traffic_class if caller is not None else None) or "unknown",
                status=Status.ERROR if error.status >= 500 else Status.REJECTED,
                model=self.target.name,
                endpoint=endpoint,
                assignment_key=caller.key if caller is not None else request_id,
                tenant=caller.tenant if caller is not None else None,
                error=clean(f"{error.status} {error.message}"),
                e2e_s=self.clock() - arrived,
                retry=caller.retry if caller is not None else 0,
                trainable=False,
            )
        )
        return trace_id

    def _submit(self, running: Running) -> None:
        running.submitted = self.clock()
        try:
            self._thread.submit(running.request, lambda what: self._arrive(running, what), running.stream)
        except EngineFailure as error:
            self._arrive(running, error)

    def _arrive(self, running: Running, what: Output | SlipstreamError) -> None:
        """On the event loop: keep the trace here, not in the route, which may be gone with its client."""
        if isinstance(what, PolicyNotResident) and not running.reassigned:
            # Two plans came between routing and the engine; the plan of now decides.
            running.reassigned = True
            caller = running.caller
            running.assignment = self.residency.assign(
                caller.key, running.request.traffic_class, caller.tenant, caller.slice_name
            )
            version = running.assignment.policy_version
            running.request = replace(running.request, policy_version=version)
            self._submit(running)
            return
        if isinstance(what, SlipstreamError):
            status = Status.ERROR if isinstance(what, (EngineFailure, PolicyNotResident)) else Status.REJECTED
            self._record(self._trace(running, None, status, str(what)))
        elif what.result is not None:
            record = self._trace(running, what.result, what.result.status, what.result.error)
            self._record(record)
            self._ended(record, running.caller.slice_name)
        running.outputs.put_nowait(what)

    def _checked(self, running: Running, what: Output | SlipstreamError) -> Output:
        if isinstance(what, QueueFull):
            raise ApiError(429, str(what), code="queue_full", headers={"retry-after": str(RETRY_AFTER_S)})
        if isinstance(what, RequestTooLong):
            raise invalid(str(what), "max_tokens", "context_length_exceeded")
        if isinstance(what, (EngineFailure, PolicyNotResident)):
            raise internal(f"trace {running.trace_id}")
        if isinstance(what, SlipstreamError):
            raise invalid(str(what))
        if what.result is not None and what.result.status is Status.ERROR:
            raise internal(f"trace {running.trace_id}")
        if what.result is not None and what.result.status is Status.TIMEOUT:
            raise ApiError(504, f"The request took too long; its trace is {running.trace_id}.", code="timeout")
        if what.result is not None and what.result.status is Status.CANCELLED:
            raise ApiError(503, "The server is shutting down.", code="shutting_down", headers={"retry-after": "5"})
        return what

    def _trace(self, running: Running, result: RequestResult | None, status: Status, error: str | None) -> TraceRecord:
        caller, request = running.caller, running.request
        lead = running.submitted - running.arrived  # reading and tokenising, before the engine's own clock starts
        counts = result.counts if result is not None else None
        keep = self._payloads and caller.payload and result is not None
        return TraceRecord(
            trace_id=running.trace_id,
            request_id=caller.request_id,
            replica_id=self._replica_id,
            started_at=running.started_at,
            policy_version=running.assignment.policy_version,
            arm=running.assignment.arm,
            generation=running.assignment.generation,
            traffic_class=request.traffic_class,
            status=status,
            model=self.target.name,
            endpoint=running.endpoint,
            assignment_key=caller.key,
            tenant=caller.tenant,
            finish_reason=result.finish_reason.value if result is not None else None,
            error=clean(error) if error else None,
            stream=running.stream,
            temperature=request.sampling.temperature,
            max_tokens=request.sampling.max_tokens,
            queue_s=_plus(result.queue_s if result is not None else None, lead),
            ttft_s=_plus(result.ttft_s if result is not None else None, lead),
            tpot_s=result.tpot_s if result is not None else None,
            e2e_s=(result.e2e_s if result is not None else self.clock() - running.submitted) + lead,
            prompt_tokens=len(request.prompt_ids),
            output_tokens=result.output_tokens if result is not None else 0,
            steps=counts.steps if counts else 0,
            drafted=counts.drafted if counts else 0,
            accepted=counts.accepted if counts else 0,
            drafted_per_pos=tuple(counts.drafted_per_pos) if counts else (),
            accepted_per_pos=tuple(counts.accepted_per_pos) if counts else (),
            prefill_s=result.prefill_s if result is not None else 0.0,
            draft_s=result.draft_s if result is not None else 0.0,
            verify_s=result.verify_s if result is not None else 0.0,
            other_s=result.other_s if result is not None else 0.0,
            cost_s=result.cost_s if result is not None else 0.0,
            plain_s=result.plain_s if result is not None else 0.0,
            expected_accepted=result.expected_accepted if result is not None else 0.0,
            expected_plain_s=result.expected_plain_s if result is not None else 0.0,
            expected_cost_s=result.expected_cost_s if result is not None else 0.0,
            retry=caller.retry,
            preemptions=result.preemptions if result is not None else 0,
            draft_errors=result.draft_errors if result is not None else 0,
            trainable=caller.trainable and keep,
            payload=result.payload if keep and result is not None else None,
        )

    def _record(self, record: TraceRecord) -> None:
        if not self.telemetry:
            return
        self._writer.submit(record)
        self.metrics.observe(record)


def _plus(seconds: float | None, lead: float) -> float | None:
    return None if seconds is None else seconds + lead
