"""The check: a subsample decoded for real, the arms one after the other for every request, in random order."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from engine.bench.adaptation import figures
from engine.bench.adaptation.arms import Arm
from engine.bench.adaptation.figures import Pair
from engine.bench.adaptation.prepare import Material
from engine.bench.adaptation.streams import Response
from engine.bench.report import Figure
from engine.contracts import SamplingParams
from engine.runner.engine import Engine, EngineRequest
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import Proposer
from engine.speculation.step_costs import StepCosts

TOKENS = 64
"""Of each answer: its beginning says as much per token, and costs half."""
WARM = 2
"""Requests of each class that every arm serves first, for K control's sake; they do not count."""


def verify(material: Material, gated: Proposer, requests: int, rng: np.random.Generator) -> list[Figure]:
    """Measured and computed ratios on the very same requests, tokens/s of each arm measured over computed, and how
    many answers were not the stored ones."""
    engine = _engine(material)
    policies = {"none": NoneProposer(), "static": material.static, "gated": gated}
    for version, proposer in enumerate(policies.values()):
        engine.load(version, proposer)
    world = replace(material.world, max_tokens=min(TOKENS, material.world.max_tokens))
    computed = {name: Arm(name, world, proposer) for name, proposer in policies.items()}
    measured: dict[tuple[str, str], list[tuple[object, Pair]]] = {}
    different = total = 0
    for name, found in material.classes.items():
        for n, whole in enumerate(found[: requests + WARM]):
            response = replace(whole, output_ids=whole.output_ids[: world.max_tokens])
            real: dict[str, tuple[float, float]] = {}
            for version, arm in rng.permutation(np.array(list(enumerate(policies)), dtype=object)).tolist():
                tokens, seconds, same = _decode(engine, response, version, world.max_tokens)
                real[arm] = (tokens, seconds)
                different, total = different + (not same), total + 1
            exact = {arm: one.serve(response) for arm, one in computed.items()}
            if n < WARM:
                continue
            for arm, one in exact.items():
                row = (*real[arm], float(one.tokens), one.decode_s)
                measured.setdefault(("measured/computed", arm), []).append((response.prompt_ids, row))
            for first, second in (("gated", "static"), ("gated", "none")):
                a, b = exact[first], exact[second]
                for kind, row in (
                    ("measured", (*real[first], *real[second])),
                    ("computed", (a.tokens, a.decode_s, b.tokens, b.decode_s)),
                ):
                    for of in (name, "all"):
                        measured.setdefault((f"{kind}:{first}/{second}", of), []).append((response.prompt_ids, row))
    made = [figures.ratio(f"{kind}:{of}", rows, rng) for (kind, of), rows in sorted(measured.items())]
    share = different / max(1, total)
    return [*made, Figure("verified_answers_differing", share, share, share, total, "share")]


def _engine(material: Material) -> Engine:
    longest = material.engine.max_model_len
    engine = Engine(material.target, max_num_seqs=1, max_model_len=longest, clock=time.perf_counter)
    engine.control.costs = StepCosts({n: ms / 1e3 for n, ms in material.world.target.step_cost_ms.items()})
    return engine


def _decode(engine: Engine, response: Response, version: int, max_tokens: int) -> tuple[float, float, bool]:
    """(tokens after the first, seconds since it, whether the answer is the stored one)."""
    name = f"{version}-{time.perf_counter_ns()}"
    engine.add(EngineRequest(name, response.prompt_ids, SamplingParams(max_tokens), version, response.traffic_class))
    result = None
    while engine.has_work:
        for output in engine.step():
            result = output.result or result
    assert result is not None
    assert result.ttft_s is not None
    same = result.payload.output_ids == response.output_ids
    return float(result.output_tokens - 1), result.e2e_s - result.ttft_s, same
