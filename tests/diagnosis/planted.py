"""Made-up requests whose latency has known causes: class and prompt length, load, policy, and none of these."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from uuid import UUID

import numpy as np

from engine.store.repositories.requests import Requests

CLASSES = ("chat", "code", "long_form")
MIX = (0.6, 0.3, 0.1)
OUTPUT = {"chat": 60, "code": 120, "long_form": 300}


@cache
def trace_id(number: int) -> UUID:
    return UUID(int=number)


def requests(
    rng: np.random.Generator,
    conversations: int = 500,
    mix: tuple[float, float, float] = MIX,
    load: float = 4.0,
    policy: int = 2,
    speed: float = 1.0,
    slower: float = 1.0,
    canary: float = 0.0,
) -> Requests:
    """About four requests a conversation. ``speed`` is the policy's, ``slower`` is nobody's; ``canary`` the share of
    conversations on version 3, which runs at ``speed`` while the others run at 1."""
    of = np.repeat(np.arange(conversations), rng.integers(1, 8, conversations))
    n = len(of)
    classes = rng.choice(CLASSES, size=conversations, p=mix)[of]
    own = rng.lognormal(0, 0.15, conversations)[of]  # requests of one conversation resemble each other
    on_canary = (rng.random(conversations) < canary)[of]
    versions = np.where(on_canary, 3, policy)
    fast = np.where(on_canary | (canary == 0), speed, 1.0)
    in_flight = load * np.exp(np.linspace(-0.6, 0.6, 60))[rng.integers(0, 60, n)]
    length = np.array([OUTPUT[name] for name in classes]) * rng.lognormal(0, 0.3, n) * own
    output = np.maximum(length.astype(int), 2)
    acceptance = np.clip(0.8 * fast + 0.2 * (classes == "code") + rng.normal(0, 0.1, n), 0, 4)
    steps = np.maximum((output / (1 + acceptance)).astype(int), 1)
    accepted = np.minimum((steps * acceptance).astype(int), 4 * steps)
    tpot = 0.02 / fast * slower * (0.6 + 0.1 * in_flight) * rng.lognormal(0, 0.1, n)
    ttft = 0.1 * rng.lognormal(0, 0.2, n)
    return Requests(
        trace_id=[trace_id(number) for number in range(n)],
        traffic_class=classes.astype(object),
        policy_version=versions,
        conversation=np.array([f"c{one}" for one in of], dtype=object),
        prompt_tokens=rng.lognormal(4.5, 0.8, n),
        output_tokens=output.astype(float),
        steps=steps.astype(float),
        accepted=accepted.astype(float),
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=ttft + tpot * (output - 1),
        in_flight=in_flight,
        share=1.0,
    )


def drawn(rng: np.random.Generator, whole: Requests, share: float) -> Requests:
    """Each request with the same chance, by itself, as a long window is sampled."""
    places = np.nonzero(rng.random(len(whole)) < share)[0]
    columns = {f.name: getattr(whole, f.name) for f in fields(whole) if f.name != "share"}
    kept = {
        name: column[places] if isinstance(column, np.ndarray) else [column[place] for place in places.tolist()]
        for name, column in columns.items()
    }
    return replace(whole, **kept, share=share)
