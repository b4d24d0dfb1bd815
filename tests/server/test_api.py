"""The API is OpenAI's: its own client works unchanged, and a trace says what became of each request."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from engine.server.caller import Repeats
from engine.store.models import TracePayloadRow, TraceRow
from tests.server.conftest import Served

HELLO: Any = [{"role": "user", "content": "Say hello"}]


def test_chat_whole_and_streamed_are_the_same(served: Served) -> None:
    whole = served.openai.chat.completions.create(model=served.model, messages=HELLO, max_tokens=12, temperature=0)
    stream = served.openai.chat.completions.create(
        model=served.model,
        messages=HELLO,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_completions_take_text_and_token_ids(served: Served) -> None:
    ids = served.server.target.tokenizer.encode("hello")
    answers = [
        served.openai.completions.create(model=served.model, prompt=prompt, max_tokens=8, temperature=0).choices[0].text
        for prompt in ("hello", ids, ["hello"])
    ]
    assert answers[0] == answers[1] == answers[2] != ""


def test_a_seed_repeats_a_sample(served: Served) -> None:
    def sample(seed: int) -> str:
        answer = served.openai.completions.create(
            model=served.model, prompt="x", max_tokens=24, temperature=1.0, top_p=0.9, seed=seed
        )
        return answer.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_the_text_before_it(served: Served) -> None:
    full = served.completion(max_tokens=24).json()["choices"][0]["text"]
    stop = full[5:8]
    answer = served.completion(max_tokens=24, stop=stop).json()["choices"][0]
    assert answer["text"] == full[: full.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_models_are_listed(served: Served) -> None:
    assert [m.id for m in served.openai.models.list()] == [served.model]
    assert served.openai.models.retrieve(served.model).id == served.model


def test_headers_say_what_served_and_the_trace_agrees(served: Served) -> None:
    headers = {
        "X-Traffic-Class": "code",
        "X-Conversation-Id": "c1",
        "X-Tenant": "acme",
        "x-stainless-retry-count": "2",
        "x-request-id": "mine",
    }
    answer = served.completion(headers=headers)
    served.traces(1)
    with served.db.read() as session:
        row = session.scalars(select(TraceRow)).one()
        payload = session.scalars(select(TracePayloadRow)).one()
    assert answer.headers["x-slipstream-trace-id"] == str(row.trace_id)
    assert answer.headers["x-slipstream-policy-version"] == str(row.policy_version)
    assert answer.headers["x-slipstream-arm"] == row.arm == "champion"
    assert (row.traffic_class, row.tenant, row.retry, row.request_id) == ("code", "acme", 2, "mine")
    assert row.assignment_key == "c1"
    assert row.status == "ok"
    assert row.output_tokens == len(payload.output_ids) == 8
    assert sum(payload.step_emitted) == 7  # all but the prefill's token
    assert row.steps == len(payload.step_emitted)
    assert row.drafted == sum(payload.step_drafted) == sum(row.drafted_per_pos)
    assert row.accepted == sum(payload.step_accepted) == sum(row.accepted_per_pos)
    assert row.queue_s is not None
    assert row.ttft_s is not None
    assert 0 <= row.queue_s <= row.ttft_s <= row.e2e_s


def test_whatever_a_client_calls_itself_its_trace_is_stored(served: Served) -> None:
    """Postgres takes neither NUL nor a lone surrogate, and nobody needs a name of a megabyte."""
    for user in ("nul \x00", "surrogate \ud800", "x" * 5_000):
        body = json.dumps({"model": served.model, "prompt": "hello", "max_tokens": 1, "user": user})
        assert served.http.post("/v1/completions", content=body).status_code == 200
    assert (
        served.completion(temperature=None, stop=None, headers={b"x-stainless-retry-count": b"\xb2"}).status_code == 200
    )
    served.traces(4)
    assert served.server.writer.stats()["set_aside"] == 0
    with served.db.read() as session:
        assert max(len(key) for key in session.scalars(select(TraceRow.assignment_key))) <= 256


def test_opting_out_of_payload_and_training(served: Served) -> None:
    served.completion(headers={"X-No-Payload": "1"})
    served.completion(headers={"X-No-Train": "1"})
    served.traces(2)
    with served.db.read() as session:
        rows = list(session.scalars(select(TraceRow).order_by(TraceRow.started_at)))
        payloads = set(session.scalars(select(TracePayloadRow.trace_id)))
    assert [row.trainable for row in rows] == [False, False]
    assert [row.trace_id in payloads for row in rows] == [False, True]


def test_metrics_have_vllms_names(served: Served) -> None:
    served.completion()
    text = served.http.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:spec_decode_num_drafts_total",
        "slipstream:plan_generation",
    ):
        assert name in text
    assert 'vllm:generation_tokens_total{model_name="tiny"} 8.0' in text


def test_a_conversation_goes_on_with_the_answer_as_the_client_has_it(served: Served) -> None:
    """OpenAI's own way to keep a history: append the message object, nulls and all."""
    messages: Any = list(HELLO)
    for turn in range(2):
        answer = served.openai.chat.completions.create(model=served.model, messages=messages, max_tokens=4)
        messages += [answer.choices[0].message, {"role": "user", "content": f"And {turn}?"}]
    assert answer.usage is not None


def test_a_repeated_idempotency_key_is_a_retry(served: Served) -> None:
    for key, tenant in (("a", "acme"), ("a", "acme"), ("b", "acme"), ("a", "other"), ("a", "acme")):
        served.completion(max_tokens=1, headers={"Idempotency-Key": key, "X-Tenant": tenant})
    long = {"x-stainless-retry-count": "9" * 5_000}
    assert served.completion(max_tokens=1, headers=long).status_code == 200
    served.traces(6)
    with served.db.read() as session:
        assert list(session.scalars(select(TraceRow.retry).order_by(TraceRow.started_at))) == [0, 1, 0, 0, 2, 100]


def test_only_the_newest_idempotency_keys_are_remembered() -> None:
    repeats = Repeats(size=2)
    assert [repeats.count(None, key) for key in ("a", "b", "a", "c", "a", "b")] == [0, 0, 1, 0, 2, 0]


def test_a_large_prompt_is_tokenised_beside_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is at it, others are answered."""
    tokenizer, begun, go_on = served.server.target.tokenizer, threading.Event(), threading.Event()
    encode = tokenizer.encode

    def slow(text: str) -> list[int]:
        if len(text) > 50_000:
            begun.set()
            assert go_on.wait(30)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(served.completion, prompt="x" * 100_000)
        assert begun.wait(30)
        assert served.completion().is_success
        go_on.set()
        assert large.result(30).json()["error"]["code"] == "context_length_exceeded"
