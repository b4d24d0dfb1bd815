"""The engine's thread outlives whatever fails in it, and nobody waits for an answer that will not come."""

from __future__ import annotations

import sys

import pytest
from sqlalchemy import select

from engine.contracts import SlipstreamError
from engine.runner.engine import EngineRequest, Output
from engine.server.engine_thread import GIVES_WAY_S, EngineFailure
from engine.server.service import Running
from engine.store.models import TraceRow
from tests.server.conftest import Served
from tests.waiting import until


def test_a_step_that_fails_ends_its_requests_and_the_server_lives(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = served.server.engine.step

    def fail_once() -> list[Output]:
        monkeypatch.setattr(served.server.engine, "step", step)
        raise RuntimeError("planted")

    monkeypatch.setattr(served.server.engine, "step", fail_once)
    answer = served.completion()
    assert answer.status_code == 500
    assert "trace" in answer.json()["error"]["message"]
    assert served.completion().status_code == 200
    served.traces(2)
    with served.db.read() as session:
        assert sorted(session.scalars(select(TraceRow.status))) == ["error", "ok"]
    served.server.engine.check_integrity()


def test_a_request_that_cannot_be_queued_is_a_500_not_a_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: EngineRequest) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(served.server.engine, "add", refuse)
        assert served.completion().status_code == 500
    assert served.completion().status_code == 200


def test_a_note_that_fails_is_raised_where_it_was_left(served: Served) -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        served.server.thread.call(fail)
    assert served.completion().status_code == 200


def test_an_engine_that_cannot_even_end_a_request_is_given_up_and_nobody_waits_for_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Output]:
        raise RuntimeError("planted")

    monkeypatch.setattr(served.server.engine, "step", fail)
    monkeypatch.setattr(served.server.engine, "cancel", fail)
    answers = [served.completion(), served.completion()]  # the one that it had, and one that comes too late
    assert [answer.status_code for answer in answers] == [500, 500]
    until(lambda: not served.server.thread.is_alive, "the thread has ended")
    assert "restart this replica" in served.http.get("/readyz").text
    with pytest.raises(EngineFailure, match="restart this replica"):
        served.server.thread.call(list)
    served.traces(2)
    with served.db.read() as session:
        assert list(session.scalars(select(TraceRow.status))) == ["error", "error"]


def test_a_dead_thread_is_not_ready(served: Served) -> None:
    served.server.thread.stop()
    answer = served.http.get("/readyz")
    assert answer.status_code == 503
    assert "thread has ended" in answer.text


def test_other_threads_hand_over_the_interpreter_soon(served: Served) -> None:
    assert served.server.thread.call(sys.getswitchinterval) == pytest.approx(GIVES_WAY_S)


def test_who_does_not_stream_is_called_once_with_the_whole(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes the interpreter from the next step."""
    arrived: list[tuple[bool, bool]] = []
    service = served.server.service
    arrive = service._arrive

    def watch(running: Running, what: Output | SlipstreamError) -> None:
        assert isinstance(what, Output)
        arrived.append((running.stream, what.finished))
        arrive(running, what)

    monkeypatch.setattr(service, "_arrive", watch)
    whole = served.completion(ignore_eos=True).json()["choices"][0]
    stream = served.openai.completions.create(
        model=served.model, prompt="hello", max_tokens=8, temperature=0.0, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(piece.choices[0].text for piece in stream) == whole["text"]
    assert [finished for streams, finished in arrived if not streams] == [True]
    assert [finished for streams, finished in arrived if streams] == [False] * 7 + [True]
