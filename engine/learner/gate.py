"""The gate: whether a candidate may be registered at all. Pure; every refusal has a reason.

Candidate and champion draft the same held-out responses (``speculation.replay``), so the comparison is paired and needs
no target. The change in tokens per verify step is resampled over requests (percentile bootstrap, Efron 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.contracts import SpecCounts, artifact_digest
from engine.learner.traces import ServedTarget
from engine.speculation.artifact import load_proposer
from engine.speculation.proposer import PolicyError, Proposer
from engine.speculation.replay import replay
from engine.store.repositories.learning import TrainableTrace

ALPHA = 0.05
RESAMPLES = 2_000
MIN_HELD_OUT = 8
"""Fewer held-out requests than this prove nothing, whatever they say."""
MIN_CLASS = 3
"""A class with fewer held-out requests is shown but does not refuse."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens per verify step of both over the same ``n`` requests; ``low`` and ``high`` are one-sided 95 % bounds."""

    n: int
    champion: float
    candidate: float
    delta: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """The difference as a share of the champion's."""
        return self.delta / self.champion if self.champion else 0.0


@dataclass(frozen=True, slots=True)
class GateReport:
    """``speedup`` is predicted over plain decoding at one request at a time, with drafts cut to ``speedup_k``."""

    passed: bool
    reasons: tuple[str, ...]
    overall: Comparison | None = None
    classes: Mapping[str, Comparison] | None = None
    speedup: float | None = None
    speedup_k: int | None = None

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        return {**tree, "reasons": list(self.reasons), "classes": tree["classes"] or {}}


def examine(
    files: Mapping[str, bytes],
    champion: Proposer,
    held_out: Sequence[TrainableTrace],
    target: ServedTarget,
    worst_class_drop: float,
    rng: np.random.Generator,
) -> GateReport:
    """Static checks first, then the replay: a candidate that does not fit the target is not even drafted with."""
    try:
        candidate = load_proposer(files, artifact_digest(files), target.fingerprint, target.tokenizer_fingerprint)
    except PolicyError as error:
        return GateReport(False, (f"it does not load: {error}",))
    return compare(candidate, champion, held_out, target.step_cost_ms, worst_class_drop, rng)


def compare(
    candidate: Proposer,
    champion: Proposer,
    held_out: Sequence[TrainableTrace],
    step_cost_ms: Mapping[int, float],
    worst_class_drop: float,
    rng: np.random.Generator,
) -> GateReport:
    """Paired replay over ``held_out``; passes when every rule holds, else names each that does not."""
    if len(held_out) < MIN_HELD_OUT:
        return GateReport(False, (f"only {len(held_out)} held-out requests, {MIN_HELD_OUT} are needed",))
    old = [_counts(champion, trace) for trace in held_out]
    new = [_counts(candidate, trace) for trace in held_out]
    if not sum(counts.drafted for counts in new):
        return GateReport(False, (f"it drafted nothing on {len(held_out)} held-out requests: it is empty",))
    names = [trace.traffic_class for trace in held_out]
    classes = {
        name: _compare(
            [c for c, n in zip(old, names, strict=True) if n == name],
            [c for c, n in zip(new, names, strict=True) if n == name],
            rng,
        )
        for name in sorted(set(names))
    }
    overall = _compare(old, new, rng)
    speedup, k = best_speedup(candidate, held_out, new, step_cost_ms) if step_cost_ms else (None, None)
    reasons = _refusals(overall, classes, speedup, worst_class_drop)
    return GateReport(not reasons, tuple(reasons) or (_praise(overall),), overall, classes, speedup, k)


def predicted_speedup(counts: Sequence[SpecCounts], step_cost_ms: Mapping[int, float]) -> float:
    """Tokens per second over plain decoding, one request at a time: tokens · c(1) / Σ_steps c(1 + drafted).

    c(rows) is the measured cost of a target pass, linear between measurements. A step that drafted d tokens verifies
    1 + d rows; ``drafted_per_pos`` says how many steps drafted at least d.
    """
    rows = np.array(sorted(step_cost_ms), float)
    cost = np.array([step_cost_ms[int(r)] for r in rows], float)
    steps, tokens, at_least = 0, 0, list[int]()
    for one in counts:
        steps, tokens = steps + one.steps, tokens + one.steps + one.accepted
        at_least.extend([0] * (len(one.drafted_per_pos) - len(at_least)))
        for position, n in enumerate(one.drafted_per_pos):
            at_least[position] += n
    if not steps:
        return 1.0
    reached = np.array([steps, *at_least, 0], float)
    drafted_exactly = reached[:-1] - reached[1:]
    spent = drafted_exactly @ np.interp(1.0 + np.arange(len(drafted_exactly)), rows, cost)
    return float(tokens * np.interp(1.0, rows, cost) / spent)


def best_speedup(
    candidate: Proposer,
    held_out: Sequence[TrainableTrace],
    full: Sequence[SpecCounts],
    step_cost_ms: Mapping[int, float],
) -> tuple[float, int]:
    """The predicted speed-up at the draft length that gives most: the engine, too, cuts drafts that do not pay."""
    options = {candidate.num_speculative_tokens: predicted_speedup(full, step_cost_ms)}
    for k in {1, candidate.num_speculative_tokens // 2} - {0, candidate.num_speculative_tokens}:
        options[k] = predicted_speedup([_counts(candidate, trace, k) for trace in held_out], step_cost_ms)
    best = max(options, key=lambda k: options[k])
    return options[best], best


def _refusals(
    overall: Comparison, classes: Mapping[str, Comparison], speedup: float | None, worst_class_drop: float
) -> list[str]:
    reasons = []
    if not overall.low > 0:
        reasons.append(
            f"no certain gain: {overall.candidate:.3f} tokens per verify step against {overall.champion:.3f}, "
            f"lower bound of the change {overall.low:+.3f}"
        )
    for name, one in classes.items():
        if one.n >= MIN_CLASS and one.change < -worst_class_drop:
            reasons.append(
                f"class {name} loses {-one.change:.1%} (allowed {worst_class_drop:.0%}): {one.candidate:.3f} tokens "
                f"per verify step against {one.champion:.3f} on {one.n} requests"
            )
    if speedup is not None and not speedup > 1.0:
        reasons.append(f"predicted speed-up over plain decoding is {speedup:.2f}, not above 1, with the measured costs")
    return reasons


def _praise(overall: Comparison) -> str:
    return (
        f"{overall.candidate:.3f} tokens per verify step against {overall.champion:.3f} on {overall.n} held-out "
        f"requests, lower bound of the change {overall.low:+.3f}"
    )


def _counts(proposer: Proposer, trace: TrainableTrace, k: int | None = None) -> SpecCounts:
    return replay(proposer, trace.traffic_class, trace.prompt_ids, trace.output_ids, k=k, max_tokens=trace.max_tokens)


def _compare(old: Sequence[SpecCounts], new: Sequence[SpecCounts], rng: np.random.Generator) -> Comparison:
    """Ratio of sums of both, and the bootstrap of their difference: the same resampled requests for both."""
    table = np.array([[a.steps + a.accepted, a.steps, b.steps + b.accepted, b.steps]
                      for a, b in zip(old, new, strict=True)], float)  # fmt: skip
    n = len(table)
    picks = rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES)  # [RESAMPLES, n]: how often each request is drawn
    x_old, y_old, x_new, y_new = (picks @ table).T
    deltas = _ratio(x_new, y_new) - _ratio(x_old, y_old)
    a, b, c, d = table.sum(0)
    before, after = float(_ratio(a, b)), float(_ratio(c, d))
    low, high = np.quantile(deltas, [ALPHA, 1 - ALPHA])
    return Comparison(n, before, after, after - before, float(low), float(high))


def _ratio(x: Any, y: Any) -> Any:
    return np.divide(x, y, out=np.ones(np.shape(y)), where=np.asarray(y) > 0)  # no step: one token at a time
