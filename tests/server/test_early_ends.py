"""Requests that end before their last token: clients that leave, a full queue, a timeout, a shutdown."""

from __future__ import annotations

import asyncio
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from engine.store.models import TraceRow
from tests.server.conftest import Served, Start
from tests.waiting import until


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


def test_a_client_that_stops_reading_and_goes_away_is_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the answer's generator at a yield, in a cycle of references: without the collector it must end too."""
    step, taken = served.server.engine.step, iter(range(1_000_000))
    monkeypatch.setattr(served.server.engine, "step", lambda: step() if next(taken) < 20 else [])
    body = json.dumps({"model": served.model, "prompt": "x", "max_tokens": 450, "stream": True, "ignore_eos": True})
    app: Any = served.server._uvicorn.config.app
    loop = served.server.thread._loop
    assert loop is not None

    async def call() -> None:
        gone, sent = asyncio.Event(), iter([{"type": "http.request", "body": body.encode()}])

        async def receive() -> Any:
            for message in sent:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                gone.set()
                await asyncio.Event().wait()  # the socket takes nothing more

        path = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await app({**path, "asgi": {"spec_version": "2.3"}}, receive, send)

    gc.disable()
    try:
        asyncio.run_coroutine_threadsafe(call(), loop).result(30)
        until(lambda: served.server.engine.stats()["running"] == 0, "the slot is free")
    finally:
        gc.enable()
    served.traces(1)
    with served.db.read() as session:
        assert session.scalars(select(TraceRow.status)).one() == "cancelled"


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


def test_a_request_that_takes_too_long_ends(start: Start) -> None:
    served = start("engine.request_timeout_s=0.05")
    answer = served.completion(max_tokens=480, ignore_eos=True)
    assert answer.status_code == 504
    served.traces(1)
    with served.db.read() as session:
        assert session.scalars(select(TraceRow.status)).one() == "timeout"


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
