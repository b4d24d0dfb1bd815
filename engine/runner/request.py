"""What goes into the engine and what comes out of it: plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass

from engine.contracts import FinishReason, SamplingParams, SpecCounts, Status, TracePayload


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation. ``policy_version`` must be resident; the request stays on it to its end."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    policy_version: int
    traffic_class: str = "chat"
    client: str = ""  # between whom the queue is fair


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request.

    ``text`` is what may be shown now: it lags behind ``new_token_ids`` while a character is incomplete or a stop
    string may be about to begin, and never holds a stop string. The last output of a request carries its result.
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    text: str
    finished: bool = False
    finish_reason: FinishReason | None = None
    result: RequestResult | None = None


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A finished request as the engine saw it; the server adds arm, tenant and wall-clock time to make a trace.

    ``queue_s`` is from add to the first prefill, ``ttft_s`` from add to the first token, ``e2e_s`` from add to the
    end. ``prefill_s`` and ``verify_s`` are the durations of the target passes the request took part in (a row waits
    for the whole pass, its neighbours' rows included), ``draft_s`` the time of its own proposals, ``other_s`` the rest
    of its decoding steps: neighbours' proposals, K control, text.

    ``cost_s`` is the request's own part of its decoding steps: its proposals, its share of each pass by rows, an equal
    share of the rest; over all requests these add up to the engine's time, so a slow draft is seen although it shares
    its batch. ``plain_s`` is what plain decoding of the tokens of its verify steps would have cost beside the same
    neighbours, by the measured costs (0 while none are known): plain_s / cost_s is the observed gain.

    ``expected_accepted`` is what K control expected ``counts.accepted`` to be when it chose, ``expected_plain_s`` what
    plain decoding of as many and one more a step would cost, ``expected_cost_s`` what it took drafting and passes to
    cost, all by its beliefs of that moment: expected_plain_s / expected_cost_s is the predicted gain.
    """

    request_id: str
    status: Status
    finish_reason: FinishReason
    policy_version: int
    traffic_class: str
    text: str
    prompt_tokens: int
    output_tokens: int
    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    prefill_s: float
    draft_s: float
    verify_s: float
    other_s: float
    cost_s: float
    plain_s: float
    expected_accepted: float
    expected_plain_s: float
    expected_cost_s: float
    counts: SpecCounts
    draft_errors: int
    payload: TracePayload
    error: str | None = None
    preemptions: int = 0
