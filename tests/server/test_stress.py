"""500 requests that end in every way there is, sixteen at a time: each is answered or cleanly ended, nothing stays."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
from collections import Counter
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from engine.contracts import ProposerKind
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.speculation.artifact import build_artifact
from engine.store.models import TraceRow
from engine.store.repositories import plans
from tests.server.conftest import Served
from tests.waiting import until

REQUESTS, CLIENTS = 500, 16


class Storm:
    """Clients that each send one request after the other, of a kind chosen by chance."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served, self.rng, self.ended = served, random.Random(seed), Counter[str]()

    async def run(self, requests: int) -> None:
        waiting = iter(range(requests))
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        async with httpx.AsyncClient(base_url=self.served.server.url, timeout=120, limits=limits) as client:

            async def work() -> None:
                for _ in waiting:
                    kind = self.rng.choice(["whole", "whole", "stop", "sampled", "stream", "leave", "cancel", "long"])
                    self.ended[await getattr(self, f"_{kind}")(client)] += 1

            await asyncio.gather(*(work() for _ in range(CLIENTS)))

    def _body(self, **more: Any) -> dict[str, Any]:
        words = " ".join(self.rng.choices(["the", "one", "in", "ring", "and", "other"], k=self.rng.randint(1, 60)))
        tokens = self.rng.randint(1, 60)
        return {"model": self.served.model, "prompt": words, "max_tokens": tokens, "temperature": 0.0} | more

    async def _whole(self, client: httpx.AsyncClient) -> str:
        answer = await client.post("/v1/completions", json=self._body(ignore_eos=True))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        return "answered"

    async def _stop(self, client: httpx.AsyncClient) -> str:
        answer = await client.post("/v1/completions", json=self._body(stop=self.rng.choice(["a", "e", "th", "\n"])))
        assert answer.status_code == 200, answer.text
        return "answered"

    async def _sampled(self, client: httpx.AsyncClient) -> str:
        body = self._body(temperature=self.rng.choice([0.7, 1.0]), top_p=0.9, seed=self.rng.randint(0, 99))
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        return "answered"

    async def _stream(self, client: httpx.AsyncClient) -> str:
        async with client.stream("POST", "/v1/completions", json=self._body(stream=True)) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        return "answered"

    async def _leave(self, client: httpx.AsyncClient) -> str:
        body = self._body(stream=True, max_tokens=200, ignore_eos=True)
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            for _ in range(self.rng.randint(1, 6)):
                await anext(lines)
        return "left"

    async def _cancel(self, client: httpx.AsyncClient) -> str:
        """Gives up before anything has come, maybe while the request still waits."""
        sending = asyncio.create_task(client.post("/v1/completions", json=self._body(max_tokens=200, ignore_eos=True)))
        for _ in range(self.rng.randint(1, 40)):
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return "gave up"

    async def _long(self, client: httpx.AsyncClient) -> str:
        answer = await client.post("/v1/completions", json=self._body(max_tokens=100_000))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        return "refused"


@pytest.mark.slow
def test_five_hundred_requests_end_and_nothing_stays(served: Served) -> None:
    store = ArtifactStore(served.server.settings.dir("policies"))
    made = publish(served.db, store, build_artifact(ProposerKind.NGRAM, 4))
    with served.db.write() as session:
        plan = plans.append(session, champion=made.version, fallback=made.version, actor="test", reason="drafts")
    served.observes(plan.generation)
    engine, thread = served.server.engine, served.server.thread
    first = Storm(served, 1)
    asyncio.run(first.run(100))
    until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0, "the engine is idle")
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    storm = Storm(served, 0)
    asyncio.run(storm.run(REQUESTS))
    until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0, "the engine is idle again")

    assert storm.ended.total() == REQUESTS
    assert min(storm.ended[kind] for kind in ("answered", "left", "gave up", "refused")) > 20
    engine.check_integrity()
    assert sorted(engine.scheduler._free) == list(range(engine.scheduler.max_num_seqs))
    assert not engine._lives
    assert not thread._waiting
    assert thread.is_alive
    assert engine.stats()["step_errors"] == engine.stats()["draft_errors"] == 0
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 60_000, f"{grown_kb} kB more at the peak than after the first hundred requests"

    def statuses() -> dict[str, int]:
        with served.db.read() as session:
            found = session.execute(select(TraceRow.status, func.count()).group_by(TraceRow.status)).all()
        return {row[0]: row[1] for row in found}

    answered = storm.ended["answered"] + first.ended["answered"]
    until(lambda: statuses().get("ok", 0) >= answered, "a trace of every answer")
    assert "error" not in statuses()
    assert "timeout" not in statuses()
