"""The API is OpenAI's: its own client works unchanged, and every mistake has its answer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from sqlalchemy import select

from engine.store.models import TracePayloadRow, TraceRow
from tests.server.conftest import Served, Start, until

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


def test_a_shutdown_keeps_the_traces_of_what_still_ran(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    served = start()
    served.server._uvicorn.config.timeout_graceful_shutdown = 1
    engine = served.server.engine
    monkeypatch.setattr(engine, "step", list)  # it runs for ever
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(served.completion)
        until(lambda: engine.has_work, "the request runs")
        served.server._uvicorn.should_exit = True
        pending.exception(30)
    served.traces(1)
    with served.db.read() as session:
        assert session.scalars(select(TraceRow.status)).one() == "cancelled"


def test_opting_out_of_payload_and_training(served: Served) -> None:
    served.completion(headers={"X-No-Payload": "1"})
    served.completion(headers={"X-No-Train": "1"})
    served.traces(2)
    with served.db.read() as session:
        rows = list(session.scalars(select(TraceRow).order_by(TraceRow.started_at)))
        payloads = set(session.scalars(select(TracePayloadRow.trace_id)))
    assert [row.trainable for row in rows] == [False, False]
    assert [row.trace_id in payloads for row in rows] == [False, True]


BAD: list[tuple[str, dict[str, Any] | bytes, int, str]] = [
    ("malformed JSON", b'{"model": ', 400, "not valid JSON"),
    ("no object", b"[1]", 400, "must be a JSON object"),
    ("wrong type", {"prompt": 5}, 400, "prompt"),
    ("wrong type of max_tokens", {"max_tokens": "many"}, 400, "max_tokens"),
    ("unknown model", {"model": "gpt-9"}, 404, "does not exist"),
    ("prompt too long", {"prompt": "hello " * 600}, 400, "context holds"),
    ("max_tokens zero", {"max_tokens": 0}, 400, "max_tokens"),
    ("max_tokens too large", {"max_tokens": 10_000}, 400, "at most"),
    ("negative temperature", {"temperature": -0.1}, 400, "temperature"),
    ("empty prompt", {"prompt": ""}, 400, "empty"),
    ("token ids outside the vocabulary", {"prompt": [10_000_000]}, 400, "vocabulary"),
    ("unknown field", {"temprature": 1}, 400, "Unrecognized request argument supplied: temprature"),
    ("unsupported n", {"n": 2}, 400, "n is not supported"),
    ("too many stops", {"stop": ["a", "b", "c", "d", "e"]}, 400, "at most 4"),
    ("bad class", {"metadata": {"traffic_class": "No Spaces!"}}, 400, "class name"),
    ("a class that means all of them", {"metadata": {"traffic_class": "all"}}, 400, "class name"),
    ("10 MB body", {"prompt": "x" * 10_000_000}, 413, "larger than"),
]


def test_every_mistake_has_its_answer_and_the_server_lives(served: Served) -> None:
    base = {"model": served.model, "prompt": "hello", "max_tokens": 4}
    for name, body, status, says in BAD:
        content = body if isinstance(body, bytes) else json.dumps(base | body).encode()
        answer = served.http.post("/v1/completions", content=content)
        assert answer.status_code == status, (name, answer.text)
        error = answer.json()["error"]
        assert says in error["message"], (name, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["x-slipstream-trace-id"]
    assert served.completion().is_success
    served.traces(len(BAD) + 1)  # each of them is a trace too
    with served.db.read() as session:
        statuses = list(session.scalars(select(TraceRow.status)))
    assert statuses.count("rejected") == len(BAD)


@pytest.mark.parametrize(
    ("messages", "says"),
    [([], "messages"), ([{"role": "robot", "content": "x"}], "role"), ([{"role": "user"}], "content")],
)
def test_bad_messages(served: Served, messages: list[Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        served.openai.chat.completions.create(model=served.model, messages=messages)


def test_unknown_routes_and_methods(served: Served) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["message"] == "Unknown request URL: GET /v1/nothing."
    assert served.http.get("/v1/completions").status_code == 405


def test_a_full_queue_is_429_with_retry_after(start: Start) -> None:
    served = start("engine.max_num_seqs=1", "engine.max_queue=1")
    streams = [
        served.http.send(
            served.http.build_request(
                "POST",
                "/v1/completions",
                json={"model": served.model, "prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True},
            ),
            stream=True,
        )
    ]
    thread_engine = served.server.engine
    waiting = served.openai.with_options(timeout=30)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(
            lambda: waiting.completions.create(model=served.model, prompt="y", max_tokens=1, temperature=0)
        )
        until(lambda: thread_engine.stats()["waiting"] == 1, "one request waits")
        answer = served.completion()
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        streams[0].close()  # its client goes away; the one that waits gets its turn
        assert second.result(30).usage is not None


def test_a_client_that_goes_away_frees_its_slot_and_leaves_a_trace(served: Served) -> None:
    body = {"model": served.model, "prompt": "x", "max_tokens": 450, "stream": True, "ignore_eos": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until(lambda: served.server.engine.stats()["running"] == 0, "the slot is free")
    served.traces(1)
    with served.db.read() as session:
        row = session.scalars(select(TraceRow)).one()
    assert row.status == "cancelled"
    assert 0 < row.output_tokens < 450
    served.server.engine.check_integrity()


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


def test_a_request_that_takes_too_long_ends(start: Start) -> None:
    served = start("engine.request_timeout_s=0.05")
    answer = served.completion(max_tokens=480, ignore_eos=True)
    assert answer.status_code == 504
    served.traces(1)
    with served.db.read() as session:
        assert session.scalars(select(TraceRow.status)).one() == "timeout"
