"""Sampling through the whole HTTP path: the tokens that are served follow the target's law, drafts and all (χ²)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from sqlalchemy import select

from engine.contracts import ProposerKind
from engine.model.batch import Row, build_batch
from engine.model.kv_cache import KVCache
from engine.model.loading import Target
from engine.runner import target_pass
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.verify import VerifyOutcome, target_probabilities, verify_one_hot
from engine.store.models import TracePayloadRow
from tests.server.conftest import Start

REQUESTS, CLIENTS, TOP_P = 500, 8, 0.9
PROMPT = "the one in the ring"


@dataclass
class Stubborn:
    """Drafts the same token again and again."""

    token: int
    num_speculative_tokens: int = 2
    kind: ProposerKind = ProposerKind.NGRAM
    control: ControlSettings = DEFAULT_CONTROL
    confidence: Sequence[float] = ()

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Stubborn:
        return self

    def propose(self, k: int) -> list[int]:
        return [self.token] * k

    def observe(self, tokens: Sequence[int]) -> None:
        pass


def law(target: Target, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Marginal laws of the first and the second token after the prompt, from the model alone."""
    model, prompt = target.model, target.tokenizer.encode(PROMPT)

    def after(rows: list[list[int]]) -> np.ndarray:
        length = len(rows[0])
        found = []
        for ids in rows:
            cache = KVCache(model.config, 1, length, model.dtype)
            batch = build_batch([], [Row(0, 0, ids)], length, model.config.group_size, model.dtype, torch.device("cpu"))
            hidden = model.forward(batch, cache)
            found.append(target_probabilities(model.logits(hidden[-1:]), temperature, 0, TOP_P)[0].numpy())
        return np.array(found)

    first = after([prompt])[0].astype(float)
    likely = np.flatnonzero(first)
    second = first[likely] @ after([[*prompt, int(token)] for token in likely])
    return first / first.sum(), second / second.sum()


def p_value(observed: Sequence[int], expected: np.ndarray) -> float:
    """χ² of counts against a law; tokens are put together, likeliest first, until ten are expected of each group."""
    counts, n = np.bincount(observed, minlength=len(expected)), len(observed)
    groups, mass = [[]], 0.0  # type: ignore[var-annotated]
    for token in np.argsort(-expected):
        if mass * n >= 10:
            groups.append([])
            mass = 0.0
        groups[-1].append(token)
        mass += expected[token]
    if mass * n < 10 and len(groups) > 1:
        groups[-2] += groups.pop()
    seen = np.array([counts[group].sum() for group in groups])
    wanted = n * np.array([expected[group].sum() for group in groups])
    if (seen[wanted == 0] > 0).any():
        return 0.0
    return float(chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(groups) - 1))


@pytest.fixture
def sampled(start: Start, target: Target) -> Callable[[float], list[list[int]]]:
    """Serve ``REQUESTS`` sampled requests of four tokens and give their token ids, as the traces have them."""
    served = start()
    _, second = law(target, 0.7)
    assert served.server.residency.plan is not None
    served.server.engine._proposers[served.server.residency.plan.champion] = Stubborn(int(second.argmax()))
    served.server.engine.control.costs = None
    done = 0

    def serve(temperature: float) -> list[list[int]]:
        nonlocal done
        body = {"prompt": PROMPT, "max_tokens": 4, "temperature": temperature, "top_p": TOP_P, "ignore_eos": True}
        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(lambda i: served.completion(**body, seed=i), range(REQUESTS)))
        assert all(answer.status_code == 200 for answer in answers)
        served.traces(done + REQUESTS)
        with served.db.read() as session:
            query = select(TracePayloadRow.output_ids, TracePayloadRow.step_drafted, TracePayloadRow.step_accepted)
            rows = session.execute(query.order_by(TracePayloadRow.started_at)).all()[done:]
        done += REQUESTS
        assert sum(sum(row.step_drafted) for row in rows) > REQUESTS
        assert sum(sum(row.step_accepted) for row in rows) > 0
        return [list(row.output_ids) for row in rows]

    return serve


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_served_follows_the_targets_law(
    sampled: Callable[[float], list[list[int]]], target: Target, temperature: float
) -> None:
    rows = sampled(temperature)
    for position, expected in enumerate(law(target, temperature)):
        assert p_value([row[position] for row in rows], expected) > 1e-3, position


def _without_top_p(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    return target_probabilities(logits, temperature)


def _at_another_temperature(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    return target_probabilities(logits, 0.8 * temperature, top_k, top_p)


def _accept_always(p: torch.Tensor, drafts: Sequence[int], uniforms: Sequence[float]) -> VerifyOutcome:
    bonus = verify_one_hot(p[-1:], [], uniforms[-1:]).tokens
    return VerifyOutcome(len(drafts), (*drafts, *bonus))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("target_probabilities", _without_top_p),
        ("target_probabilities", _at_another_temperature),
        ("verify_one_hot", _accept_always),
    ],
)
def test_the_test_sees_planted_faults(
    sampled: Callable[[float], list[list[int]]],
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: object,
) -> None:
    monkeypatch.setattr(target_pass, name, fault)
    rows = sampled(0.7)
    worst = min(p_value([row[at] for row in rows], expected) for at, expected in enumerate(law(target, 0.7)))
    assert worst < 1e-6
