"""Steady traffic of four classes over the real HTTP API, from a few concurrent clients."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from engine.demo.prompts import Prompt

TOKENS = {"chat": 32, "code": 48, "long_form": 56, "batch": 24}
"""max_tokens by class: short, so that a laptop sees many requests."""
OTHER_TOKENS = 40


@dataclass(slots=True)
class Traffic:
    """``clients`` threads that each send one request after the other until stopped.

    Half of the clients stream. Every request is one conversation of its own, so that assignment keys are independent.
    """

    url: str
    model: str
    prompts: Mapping[str, Sequence[Prompt]]
    clients: int
    seed: int
    max_tokens: int | None = None
    failed: int = 0
    request_ids: list[str] = field(default_factory=list)
    on_failure: Callable[[str], None] = lambda _: None
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def answered(self) -> int:
        return len(self.request_ids)

    @property
    def sent(self) -> int:
        return self.answered + self.failed

    def start(self) -> None:
        for number in range(self.clients):
            thread = threading.Thread(target=self._client, args=(number,), name=f"client-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Let every client finish the request it has sent."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)

    def _client(self, number: int) -> None:
        rng = random.Random(self.seed * 1_000 + number)
        classes = sorted(self.prompts)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._stop.is_set():
                prompt = rng.choice(self.prompts[rng.choice(classes)])
                conversation = f"{self.seed}-{rng.getrandbits(64):x}"
                try:
                    request_id = ask(client, self.model, prompt, conversation, number % 2 == 0, self.max_tokens)
                except httpx.HTTPError as error:
                    with self._lock:
                        self.failed += 1
                    self.on_failure(str(error))
                    self._stop.wait(1.0)
                else:
                    with self._lock:
                        self.request_ids.append(request_id)


def served_model(url: str) -> str:
    """The name under which the engine serves its model."""
    return str(httpx.get(f"{url}/v1/models", timeout=10).raise_for_status().json()["data"][0]["id"])


def ask(
    client: httpx.Client, model: str, prompt: Prompt, conversation: str, stream: bool, max_tokens: int | None = None
) -> str:
    """Send the first turn of a prompt, greedy, and read the whole answer; gives the request id.

    httpx.HTTPError on any failure, an answer cut short among them.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt.turns[0]}],
        "max_tokens": max_tokens or TOKENS.get(prompt.traffic_class, OTHER_TOKENS),
        "temperature": 0.0,
        "stream": stream,
    }
    headers = {"X-Traffic-Class": prompt.traffic_class, "X-Conversation-Id": conversation}
    if not stream:
        whole = client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
        return whole.headers["x-request-id"]
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        last = ""
        for line in answer.iter_lines():
            last = line or last
        if last != "data: [DONE]":
            raise httpx.RemoteProtocolError(f"the stream ended with {last!r} instead of [DONE]")
        return answer.headers["x-request-id"]
