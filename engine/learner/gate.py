"""The gate: whether a candidate may be registered at all. Pure; every refusal has a reason.

Static checks first (``soundness``), then candidate and champion draft the same held-out responses
(``speculation.replay``), so the comparison is paired and needs no target. With whole drafts no class may lose tokens a
verify step, which the candidate must show: of few requests a class that loses is often lucky. Then both are priced by
the engine's measured costs, under its own K control, and the candidate must be faster for certain: a memory that says
what a neural draft would have said saves that draft's passes, which no count of tokens shows. Without measured costs
the tokens per verify step must be more for certain, by resampled requests (percentile bootstrap, Efron 1979).

For certain: of all requests together, or of those of one class, for what is learned is often learned of the traffic
that is new. Each of these bounds has its share of the level (Bonferroni).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy import special

from engine.contracts import SpecCounts, artifact_digest
from engine.learner import soundness
from engine.learner.looks import LEVEL, MIN_HELD_OUT
from engine.learner.traces import ServedTarget
from engine.percent import percent
from engine.speculation.artifact import load_proposer
from engine.speculation.control import KController
from engine.speculation.proposer import PolicyError, Proposer
from engine.speculation.replay import replay, replay_controlled
from engine.speculation.step_costs import StepCosts
from engine.store.repositories.intake import TrainableTrace

RESAMPLES, BEYOND = 5_000, 10
"""Resampled sums, at least; more of them where a bound would have fewer than ``BEYOND`` beyond it."""
MIN_CLASS = 3
"""Fewer held-out requests of a class prove nothing. Are they an eighth (1 of ``MIN_HELD_OUT``), more must come."""
AHEAD, SURE = 200, 0.8
"""Over so many requests to come no class may lose more than is allowed, each with this probability. More would refuse
nearly all that is worth serving (docs/log.md, 2026-11-27)."""
Replayer = Callable[[Proposer, TrainableTrace, KController | None], tuple[SpecCounts, float]]
"""What a policy earns on one held-out request, under K control or with whole drafts, and the seconds it takes. The
default replays the stored tokens, which is exact for proposers that need tokens only; one that drafts from hidden
states brings its own, and adds what its drafting costs."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens per verify step of both over the same ``n`` requests; ``low`` and ``high`` bound the change, one-sided.

    ``ahead`` bounds the share that changes over the next ``AHEAD`` requests of all classes, None of too few to say.
    ``champion_ms`` and ``candidate_ms`` are milliseconds per token, ``net_low`` is the lower bound of their ratio, the
    net speed-up; None where they were not asked.
    """

    n: int
    champion: float
    candidate: float
    delta: float
    low: float
    high: float
    ahead: float | None = None
    champion_ms: float | None = None
    candidate_ms: float | None = None
    net_low: float | None = None


@dataclass(frozen=True, slots=True)
class GateReport:
    """``speedup`` is predicted over plain decoding, ``net`` over the champion: one request at a time, both under K
    control with the measured costs; None where there are no costs or a class refuses already. ``alpha`` is the level of
    each bound.
    """

    passed: bool
    reasons: tuple[str, ...]
    overall: Comparison | None = None
    classes: Mapping[str, Comparison] | None = None
    speedup: float | None = None
    net: float | None = None
    alpha: float = LEVEL

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
    alpha: float = LEVEL,
    replayer: Replayer | None = None,
) -> GateReport:
    """Static checks first, then the replay: a candidate that does not fit the target is not even drafted with."""
    if faults := soundness.faults(files):
        return GateReport(False, tuple(faults))
    try:
        candidate = load_proposer(files, artifact_digest(files), target.fingerprint, target.tokenizer_fingerprint)
    except PolicyError as error:
        return GateReport(False, (f"it does not load: {error}",))
    return compare(candidate, champion, held_out, target.step_cost_ms, worst_class_drop, rng, alpha, replayer)


def compare(
    candidate: Proposer,
    champion: Proposer,
    held_out: Sequence[TrainableTrace],
    step_cost_ms: Mapping[int, float],
    worst_class_drop: float,
    rng: np.random.Generator,
    alpha: float = LEVEL,
    replayer: Replayer | None = None,
) -> GateReport:
    """Paired replay over ``held_out``; passes when every rule holds, else names each that does not. ``alpha``: of all
    bounds of a gain together.

    Replay under K control doubles the work, so it is asked only of a candidate that no class refuses.
    """
    if len(held_out) < MIN_HELD_OUT:
        return GateReport(False, (f"only {len(held_out)} held-out requests, {MIN_HELD_OUT} are needed",), alpha=alpha)
    names = [trace.traffic_class for trace in held_out]
    chosen = {name: [n == name for n in names] for name in sorted(set(names))}
    if few := [(name, n) for name, n in Counter(names).items() if n < MIN_CLASS and MIN_HELD_OUT * n >= len(names)]:
        reasons = [f"class {name} has {n} of {len(names)} requests, {MIN_CLASS} are needed" for name, n in sorted(few)]
        return GateReport(False, tuple(reasons), alpha=alpha)
    alpha /= 1 + (sum(sum(wanted) >= MIN_HELD_OUT for wanted in chosen.values()) if len(chosen) > 1 else 0)
    replayer = replayer or stored
    old, new = (_Earned([replayer(p, trace, None)[0] for trace in held_out]) for p in (champion, candidate))
    if not sum(counts.drafted for counts in new.full):
        reason = f"it drafted nothing on {len(held_out)} held-out requests: it is empty"
        return GateReport(False, (reason,), alpha=alpha)
    classes = {name: _compare(old, new, wanted, rng, alpha) for name, wanted in chosen.items()}
    overall = _compare(old, new, [True] * len(names), rng, alpha)
    report = GateReport(True, (), overall, classes, alpha=alpha)
    reasons = _worse(report, worst_class_drop)
    if reasons or not step_cost_ms:
        reasons = _no_gain(report) + reasons
    else:
        old, new = (_priced(e, p, held_out, step_cost_ms, replayer) for e, p in ((old, champion), (new, candidate)))
        report = _in_time(report, old, new, chosen, step_cost_ms[min(step_cost_ms)], rng)
        reasons = _too_dear(report, worst_class_drop)
    return replace(report, passed=not reasons, reasons=tuple(reasons) or (_praise(report),))


def stored(proposer: Proposer, trace: TrainableTrace, controller: KController | None) -> tuple[SpecCounts, float]:
    """Against the tokens that the target really chose."""
    name, prompt, output = trace.traffic_class, trace.prompt_ids, trace.output_ids
    if controller is None:
        return replay(proposer, name, prompt, output, max_tokens=trace.max_tokens), 0.0
    return replay_controlled(proposer, controller, 0, name, prompt, output, trace.max_tokens)


@dataclass(frozen=True, slots=True)
class _Earned:
    """Per held-out request: counts with whole drafts and, where costs are known, tokens and seconds under K control."""

    full: list[SpecCounts]
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def ms_per_token(self, chosen: Sequence[bool]) -> float:
        tokens = sum(n for n, wanted in zip(self.tokens, chosen, strict=True) if wanted)
        return 1e3 * sum(s for s, wanted in zip(self.seconds, chosen, strict=True) if wanted) / max(1, tokens)


def _priced(
    earned: _Earned,
    proposer: Proposer,
    held_out: Sequence[TrainableTrace],
    step_cost_ms: Mapping[int, float],
    replayer: Replayer,
) -> _Earned:
    controller = KController(StepCosts({rows: ms / 1e3 for rows, ms in step_cost_ms.items()}))
    found = [replayer(proposer, trace, controller) for trace in held_out]
    return replace(earned, tokens=[c.steps + c.accepted for c, _ in found], seconds=[s for _, s in found])


def _in_time(
    report: GateReport,
    old: _Earned,
    new: _Earned,
    chosen: Mapping[str, Sequence[bool]],
    plain_ms: float,
    rng: np.random.Generator,
) -> GateReport:
    """The report with milliseconds per token; ``plain_ms`` is a pass of one row."""
    assert report.overall is not None
    assert report.classes is not None

    def timed(one: Comparison, wanted: Sequence[bool]) -> Comparison:
        table = np.array([old.tokens, old.seconds, new.tokens, new.seconds], float).T[np.array(wanted)]
        t_old, s_old, t_new, s_new = _resampled(table, report.alpha, rng)
        low = float(np.quantile(_ratio(t_new, s_new) / _ratio(t_old, s_old), report.alpha))
        before, after = old.ms_per_token(wanted), new.ms_per_token(wanted)
        return replace(one, champion_ms=before, candidate_ms=after, net_low=low)

    overall = timed(report.overall, [True] * report.overall.n)
    classes = {name: timed(one, chosen[name]) for name, one in report.classes.items()}
    before, after = overall.champion_ms or plain_ms, overall.candidate_ms or plain_ms
    return replace(report, overall=overall, classes=classes, speedup=plain_ms / after, net=before / after)


def _gains(report: GateReport) -> list[tuple[str, Comparison]]:
    """What must show a gain, one of them at least: all requests together, and each class that can prove something."""
    assert report.overall is not None
    classes = [(f"class {name}", one) for name, one in (report.classes or {}).items() if one.n >= MIN_HELD_OUT]
    return [("all requests", report.overall), *(classes if len(report.classes or {}) > 1 else [])]


def _worse(report: GateReport, worst_class_drop: float) -> list[str]:
    return [
        f"class {name} may lose {percent(-one.ahead, 1)} over {AHEAD} requests (allowed {percent(worst_class_drop)}): "
        f"{one.candidate:.3f} tokens per verify step against {one.champion:.3f} on {one.n}"
        for name, one in (report.classes or {}).items()
        if one.ahead is not None and one.ahead < -worst_class_drop
    ]


def _no_gain(report: GateReport) -> list[str]:
    if any(one.low > 0 for _, one in _gains(report)):
        return []
    shown = (
        f"of {name} {one.candidate:.3f} tokens per verify step against {one.champion:.3f}, lower bound of the change "
        f"{one.low:+.3f}"
        for name, one in _gains(report)
    )
    return [f"no certain gain: {'; '.join(shown)}"]


def _too_dear(report: GateReport, worst_class_drop: float) -> list[str]:
    reasons = []
    assert report.speedup is not None
    if not report.speedup > 1.0:
        reasons.append(
            f"predicted speed-up over plain decoding is {report.speedup:.2f}, not above 1, with the measured costs"
        )
    if not any((one.net_low or 0.0) > 1.0 for _, one in _gains(report)):
        shown = (f"of {name} {_net(one):.3f}, lower bound {one.net_low:.3f}" for name, one in _gains(report))
        reasons.append(
            f"no certain gain: predicted net speed-up over the champion, with the measured costs, is {'; '.join(shown)}"
        )
    for name, one in (report.classes or {}).items():
        before, after = one.champion_ms or 0.0, one.candidate_ms or 0.0
        if one.n >= MIN_CLASS and after > before * (1 + worst_class_drop):
            reasons.append(
                f"class {name} gets slower by {percent(after / before - 1, 1)} (allowed {percent(worst_class_drop)}): "
                f"{after:.2f} ms per token against {before:.2f} on {one.n} requests"
            )
    return reasons


def _net(one: Comparison) -> float:
    """How many times as fast as the champion."""
    return (one.champion_ms or 0.0) / (one.candidate_ms or 1.0)


def _praise(report: GateReport) -> str:
    """By what is most certain."""
    if report.net is None:
        name, one = max(_gains(report), key=lambda gain: gain[1].low)
    else:
        name, one = max(_gains(report), key=lambda gain: gain[1].net_low or 0.0)
    counted = f"{one.candidate:.3f} tokens per verify step against {one.champion:.3f}"
    if report.net is None:
        return f"{counted} on {one.n} held-out requests ({name}), lower bound of the change {one.low:+.3f}"
    return (
        f"predicted {_net(one):.3f} times as fast as the champion on {one.n} held-out requests ({name}), lower bound "
        f"{one.net_low:.3f}: {counted}"
    )


def _compare(old: _Earned, new: _Earned, chosen: Sequence[bool], rng: np.random.Generator, alpha: float) -> Comparison:
    """Ratio of sums of both, and the bootstrap of their difference: the same resampled requests for both."""
    pairs = [(a, b) for a, b, wanted in zip(old.full, new.full, chosen, strict=True) if wanted]
    table = np.array([[a.steps + a.accepted, a.steps, b.steps + b.accepted, b.steps] for a, b in pairs], float)
    x_old, y_old, x_new, y_new = _resampled(table, alpha, rng)
    deltas = _ratio(x_new, y_new) - _ratio(x_old, y_old)
    a, b, c, d = table.sum(0)
    before, after = float(_ratio(a, b)), float(_ratio(c, d))
    low, high = np.quantile(deltas, [alpha, 1 - alpha])
    ahead = _ahead(table, after / before, len(old.full)) if len(table) >= MIN_CLASS else None
    return Comparison(len(table), before, after, after - before, float(low), float(high), ahead)


def _ahead(table: np.ndarray, kept: float, held_out: int) -> float:
    """What the change of a class exceeds with the probability ``SURE``, over its share of the next ``AHEAD`` requests.

    The means of n requests seen and of m to come differ with the standard error s √(1/n + 1/m): Student's t bounds what
    is to come (Hahn, Meeker and Escobar, Statistical Intervals, 2017). s is of what each request adds to the change, a
    ratio linearized (delta method). It is the class's own: where one class gains much and unevenly, another need not.
    """
    n = len(table)
    parts = kept * (table / np.maximum(table.mean(0), np.finfo(float).tiny) @ np.array([-1.0, 1.0, 1.0, -1.0]))
    return float(kept - 1 - special.stdtrit(n - 1, SURE) * parts.std(ddof=1) * math.sqrt((1 + held_out / AHEAD) / n))


def _resampled(table: np.ndarray, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Column sums [columns, resamples] over requests drawn with replacement; ``table`` [n, columns]."""
    n = len(table)
    picks = rng.multinomial(n, np.full(n, 1.0 / n), size=max(RESAMPLES, math.ceil(BEYOND / alpha)))
    return np.asarray((picks @ table).T)


def _ratio(x: Any, y: Any) -> Any:
    return np.divide(x, y, out=np.ones(np.shape(y)), where=np.asarray(y) > 0)  # no step: one token at a time
