"""Every mistake has its answer in OpenAI's shape, and its trace."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from sqlalchemy import select

from engine.store.models import TraceRow
from tests.server.conftest import Served

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
    ("a class with a line end", {"metadata": {"traffic_class": "chat\n"}}, 400, "class name"),
    ("half an emoji", {"prompt": "cut \ud83d"}, 400, "surrogate"),
    ("half an emoji in a stop", {"stop": ["\ud83d"]}, 400, "surrogate"),
    ("no number", b'{"temperature": NaN, "model": "tiny", "prompt": "x"}', 400, "temperature"),
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


def test_an_error_names_the_field_as_the_client_wrote_it(served: Served) -> None:
    assert served.completion(prompt=5).json()["error"]["param"] == "prompt"
    half = {"model": served.model, "messages": [{"role": "user", "content": "\ud83d"}]}
    image = {"model": served.model, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    for body, param in ((half, "messages.0.content"), (image, "messages.0.content.0.type")):
        answer = served.http.post("/v1/chat/completions", content=json.dumps(body))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


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
