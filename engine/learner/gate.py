"""The gate: whether a candidate may be registered at all. Pure; every refusal has a reason.

Static checks first (``soundness``), then candidate and champion draft the same held-out responses
(``speculation.replay``), so the comparison is paired and needs no target. With whole drafts no class may lose tokens a
verify step, which the candidate must show: of few requests a class that loses is often lucky. Then both are priced by
the engine's measured costs, under its own K control, and the candidate must be faster for certain: a memory that says
what a neural draft would have said saves that draft's passes, which no count of tokens shows. Without measured costs
the tokens per verify step must be more for certain.

For certain: of all requests together, or of those of one class, for what is learned is often learned of the traffic
that is new; then all together must not have got slower either. Each of these bounds has its share of the level
(Bonferroni). It is that of resampled requests (percentile bootstrap, Efron 1979), or Student's where that is lower: of
few requests resamples know too little of what is rare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import special

from engine.contracts import SpecCounts, artifact_digest
from engine.learner import soundness
from engine.learner.gate_report import AHEAD, Comparison, GateReport
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
SURE = 0.8
"""With this probability no class may lose more than is allowed over the next ``AHEAD`` requests. More would refuse
nearly all that is worth serving (docs/log.md, 2026-11-27)."""

Replayer = Callable[[Proposer, TrainableTrace, KController | None], tuple[SpecCounts, float]]
"""What a policy earns on one held-out request, under K control or with whole drafts, and the seconds it takes. The
default replays the stored tokens, which is exact for proposers that need tokens only; one that drafts from hidden
states brings its own, and adds what its drafting costs."""


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
        a, b, c, d = table.sum(0)
        net = float(_ratio(c, d) / _ratio(a, b))
        low = min(low, net - _margin(table, net, report.alpha))
        return replace(one, champion_ms=old.ms_per_token(wanted), candidate_ms=new.ms_per_token(wanted), net_low=low)

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
    (_, overall), *_ = gains = _gains(report)
    if any(one.low > 0 for _, one in gains):
        return [] if overall.delta >= 0 else [f"all requests together lose: {_counted(overall)}"]
    shown = (f"of {name} {_counted(one)}, lower bound of the change {one.low:+.3f}" for name, one in gains)
    return [f"no certain gain: {'; '.join(shown)}"]


def _too_dear(report: GateReport, worst_class_drop: float) -> list[str]:
    reasons = []
    assert report.speedup is not None
    assert report.net is not None
    gains = _gains(report)
    if not report.speedup > 1.0:
        reasons.append(
            f"predicted speed-up over plain decoding is {report.speedup:.2f}, not above 1, with the measured costs"
        )
    if not any((one.net_low or 0.0) > 1.0 for _, one in gains):
        shown = "; ".join(f"of {name} {_net(one):.3f}, lower bound {one.net_low:.3f}" for name, one in gains)
        reasons.append(
            f"no certain gain: predicted net speed-up over the champion, with the measured costs, is {shown}"
        )
    elif report.net < 1.0:
        reasons.append(
            f"all requests together get slower: predicted net speed-up over the champion is {report.net:.3f}"
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
    """How many times as fast as the champion; as fast where no step was made or priced."""
    return one.champion_ms / one.candidate_ms if one.champion_ms and one.candidate_ms else 1.0


def _counted(one: Comparison) -> str:
    return f"{one.candidate:.3f} tokens per verify step against {one.champion:.3f}"


def _praise(report: GateReport) -> str:
    """By what is most certain, and of all together."""
    (_, overall), *_ = gains = _gains(report)
    name, one = max(gains, key=lambda gain: gain[1].low if report.net is None else gain[1].net_low or 0.0)
    on = f"on {one.n} held-out requests ({name})"
    if report.net is None:
        together = "" if one is overall else f"; of all {overall.delta:+.3f}"
        return f"{_counted(one)} {on}, lower bound of the change {one.low:+.3f}{together}"
    together = "" if one is overall else f"; of all {_net(overall):.3f}"
    return (
        f"predicted {_net(one):.3f} times as fast as the champion {on}, lower bound {one.net_low:.3f}{together}: "
        f"{_counted(one)}"
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
    margin = before * _margin(table, after / before, alpha)
    low, high = min(low, after - before - margin), max(high, after - before + margin)
    ahead = _ahead(table, after / before, len(old.full)) if len(table) >= MIN_CLASS else None
    return Comparison(len(table), before, after, after - before, float(low), float(high), ahead)


def _ahead(table: np.ndarray, kept: float, held_out: int) -> float:
    """What the change of a class exceeds with the probability ``SURE``, over its share of the next ``AHEAD`` requests.

    The means of n requests seen and of m to come differ with the standard error s √(1/n + 1/m): Student's t bounds what
    is to come (Hahn, Meeker and Escobar, Statistical Intervals, 2017). s is the class's own: where one class gains much
    and unevenly, another need not.
    """
    return kept - 1 - _margin(table, kept, 1 - SURE) * math.sqrt(1 + held_out / AHEAD)


def _margin(table: np.ndarray, kept: float, alpha: float) -> float:
    """What Student's bound on ``kept``, the ratio of both rates, leaves on one side; infinite for a single request.

    ``table`` [n, 4]: of both first what is counted, then what it is counted over. A ratio is linearized: the standard
    error is of what each request adds to it (delta method).
    """
    n = len(table)
    if n < 2:
        return math.inf
    parts = kept * (table / np.maximum(table.mean(0), np.finfo(float).tiny) @ np.array([-1.0, 1.0, 1.0, -1.0]))
    return float(special.stdtrit(n - 1, 1 - alpha) * parts.std(ddof=1) / math.sqrt(n))


def _resampled(table: np.ndarray, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Column sums [columns, resamples] over requests drawn with replacement; ``table`` [n, columns]."""
    n = len(table)
    picks = rng.multinomial(n, np.full(n, 1.0 / n), size=max(RESAMPLES, math.ceil(BEYOND / alpha)))
    return np.asarray((picks @ table).T)


def _ratio(x: Any, y: Any) -> Any:
    return np.divide(x, y, out=np.ones(np.shape(y)), where=np.asarray(y) > 0)  # no step: one token at a time
