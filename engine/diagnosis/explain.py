"""Why did performance change? Two windows of traces → one sentence, a waterfall, and the events between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np

from engine.contracts import ServingPlan, SlipstreamError
from engine.diagnosis.decompose import Decomposition, Part, Window, decompose
from engine.store.database import ReadSession
from engine.store.repositories import learning, plans
from engine.store.repositories.overview import Slice
from engine.store.repositories.requests import Requests, sample

PROMPT_BANDS = (64, 256, 1024)
"""Prompt lengths, tokens, at which a band ends: class × band is a cell."""
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Metric:
    """``measure`` gives value and weight of each request, the metric being Σ value / Σ weight, in ``unit`` × ``scale``.

    Quantiles do not add up; what is decomposed is the share of requests above the first window's (``quantile``).
    """

    name: str
    title: str
    unit: str
    scale: float
    better: str
    measure: Callable[[Requests], tuple[np.ndarray, np.ndarray]]
    quantile: float | None = None


def _each(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values, np.ones(len(values))


def _acceptance(found: Requests) -> tuple[np.ndarray, np.ndarray]:
    return found.steps + found.accepted, found.steps


def _speed(found: Requests) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(found.output_tokens - 1, 0), np.maximum(found.e2e_s - found.ttft_s, 0)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("p50", "median latency", "pp of requests above", 100.0, "lower", lambda r: _each(r.e2e_s), 0.5),
        Metric("p95", "p95 latency", "pp of requests above", 100.0, "lower", lambda r: _each(r.e2e_s), 0.95),
        Metric("tpot", "TPOT", "ms", 1e3, "lower", lambda r: _each(r.tpot_s)),
        Metric("tokens_s", "tokens/s of a request", "tokens/s", 1.0, "higher", _speed),
        Metric("acceptance", "acceptance length", "tokens per step", 1.0, "higher", _acceptance),
    )
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened between the begin of the first and the end of the second window."""

    at: datetime
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A traffic class and prompt length, its share of the requests in each window, and what it adds to the change."""

    traffic_class: str
    prompt_tokens: str
    share_before: float
    share_after: float
    effect: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """``before`` and ``after`` are the metric itself (ms for quantiles); ``parts`` are in ``unit``."""

    metric: str
    unit: str
    first: Slice
    second: Slice
    before: float | None
    after: float | None
    requests: tuple[int, int]
    sentence: str
    verdict: str | None
    total: Part | None
    parts: tuple[Part, ...]
    cells: tuple[Cell, ...]
    events: tuple[Event, ...]
    examples: dict[str, tuple[str, ...]]

    def to_rows(self) -> dict[str, Any]:
        """As JSON has it; windows by their ends."""
        made = asdict(self)
        for name in ("first", "second"):
            part = getattr(self, name)
            made[name] = {"since": part.since, "until": part.until}
        return made


def explain(
    session: ReadSession, first: Slice, second: Slice, metric: str, rng: np.random.Generator, limit: int = 20_000
) -> Explanation:
    """Compare two windows of the same part of the traffic. SlipstreamError for a metric that there is not."""
    if metric not in METRICS:
        raise SlipstreamError(f"There is no metric {metric!r} to explain. There are: {', '.join(METRICS)}.")
    chosen = METRICS[metric]
    before, after = (sample(session, part, limit) for part in (first, second))
    found, names = compare(before, after, chosen, rng)
    events = _events(session, first.since, second.until)
    levels = _level(chosen, before), _level(chosen, after)
    return Explanation(
        metric,
        chosen.unit,
        first,
        second,
        levels[0],
        levels[1],
        (len(before), len(after)),
        sentence(chosen, found, levels, names, before, after),
        None if isinstance(found, str) else found.verdict,
        None if isinstance(found, str) else _scaled(found.total, chosen.scale),
        () if isinstance(found, str) else tuple(_scaled(part, chosen.scale) for part in found.parts),
        () if isinstance(found, str) else _cells(found, names, before, after, chosen.scale),
        events,
        {} if isinstance(found, str) else _examples(found, names, before, after),
    )


def compare(
    before: Requests, after: Requests, metric: Metric, rng: np.random.Generator, resamples: int = 200
) -> tuple[Decomposition | str, list[tuple[str, int]]]:
    """The decomposition (or why there is none), and the cells by their code: (class, prompt band)."""
    names = sorted({*_cell_names(before), *_cell_names(after)})
    versions = sorted({*before.policy_version.tolist(), *after.policy_version.tolist()})
    reference = np.nan
    if metric.quantile is not None and len(before):
        reference = float(np.quantile(metric.measure(before)[0], metric.quantile))
    windows = []
    for part in (before, after):
        value, weight = metric.measure(part)
        if metric.quantile is not None:
            value = (value > reference).astype(float)
        known = np.isfinite(value) & np.isfinite(weight)
        code = {name: place for place, name in enumerate(names)}
        windows.append(
            Window(
                np.array([code[name] for name in _cell_names(part)], dtype=int)[known],
                np.searchsorted(versions, part.policy_version)[known],
                part.in_flight[known],
                np.unique(part.conversation.astype(str), return_inverse=True)[1][known],
                value[known],
                weight[known],
            )
        )
    return decompose(windows[0], windows[1], rng, resamples), names


def _cell_names(part: Requests) -> list[tuple[str, int]]:
    bands = np.searchsorted(PROMPT_BANDS, part.prompt_tokens, side="right").tolist()
    return list(zip(part.traffic_class.tolist(), bands, strict=True))


def band_title(band: int) -> str:
    """ "64 to 255 tokens"."""
    if band == 0:
        return f"under {PROMPT_BANDS[0]} tokens"
    if band == len(PROMPT_BANDS):
        return f"{PROMPT_BANDS[-1]:,} tokens and more"
    return f"{PROMPT_BANDS[band - 1]} to {PROMPT_BANDS[band] - 1:,} tokens"


def _level(metric: Metric, part: Requests) -> float | None:
    """The metric itself in one window, ms where it is a duration."""
    if not len(part):
        return None
    value, weight = metric.measure(part)
    known = np.isfinite(value) & np.isfinite(weight)
    if metric.quantile is not None:
        return float(np.quantile(value[known], metric.quantile)) * 1e3 if known.any() else None
    whole = weight[known].sum()
    return float(value[known].sum() / whole) * metric.scale if whole > 0 else None


def _scaled(part: Part, scale: float) -> Part:
    return Part(part.factor, part.effect * scale, part.low * scale, part.high * scale)


WORDS = {
    "mix": "the mix of traffic",
    "load": "the load",
    "policy": "the policy",
    "rest": "something that is not recorded",
}


def sentence(
    metric: Metric,
    found: Decomposition | str,
    levels: tuple[float | None, float | None],
    names: list[tuple[str, int]],
    before: Requests,
    after: Requests,
) -> str:
    """The answer: where the metric went, and by what. A change that may be chance gets no share of it named."""
    form = "{:,.2f}" if metric.name == "acceptance" else "{:,.1f}" if metric.name in ("tpot", "tokens_s") else "{:,.0f}"
    unit = "" if metric.name == "acceptance" else " tokens/s" if metric.name == "tokens_s" else " ms"
    if isinstance(found, str) or levels[0] is None or levels[1] is None:
        return f"Cannot tell: {found if isinstance(found, str) else 'there are no requests'}."
    went = f"{metric.title} went from {form.format(levels[0])} to {form.format(levels[1])}{unit}"
    went = went[0].upper() + went[1:]
    if found.verdict is None:
        return f"{went}. Cannot tell why: {found.reason}."
    part = next(part for part in found.parts if part.factor == found.verdict)
    effect = f"{signed(part.effect * metric.scale)} {metric.unit}"
    bounds = f"{signed(part.low * metric.scale)} to {signed(part.high * metric.scale)}"
    detail = ""
    if found.verdict == "mix":
        cell = int(np.argmax(np.abs(found.by_cell)))
        detail = f" ({names[cell][0]} with {band_title(names[cell][1])} most of all)"
    elif found.verdict == "load":
        detail = f" ({before.in_flight.mean():.1f} → {after.in_flight.mean():.1f} requests in flight)"
    elif found.verdict == "policy":
        detail = f" ({_main(before)} → {_main(after)})"
    close = f" {found.reason[0].upper()}{found.reason[1:]}." if found.reason else ""
    cause = f"{WORDS[found.verdict]}{detail}"
    chance = found.total.low <= 0 <= found.total.high
    if chance or not _same_sign(part, found.total):  # a share of what may be nothing says nothing
        went += ", which may be chance" if chance else ""
        return f"{went}. By itself {cause} would have moved it by {effect} ({bounds}).{close}"
    share = f", {part.effect / found.total.effect * 100:.0f} % of the change"
    return f"{went}, by {cause}: {effect} ({bounds}{share}).{close}"


def signed(value: float) -> str:
    """An effect with its sign, to two significant digits: more than an interval of its width can bear out."""
    return f"{float(f'{value:.2g}'):+,g}"


def _same_sign(part: Part, total: Part) -> bool:
    return part.effect * total.effect > 0


def _main(part: Requests) -> str:
    versions, counts = np.unique(part.policy_version, return_counts=True)
    return f"v{versions[counts.argmax()]}"


def _cells(
    found: Decomposition, names: list[tuple[str, int]], before: Requests, after: Requests, scale: float
) -> tuple[Cell, ...]:
    shares = []
    for part in (before, after):
        of = _cell_names(part)
        shares.append({name: of.count(name) / max(len(of), 1) for name in set(of)})
    order = np.argsort(-np.abs(found.by_cell))
    return tuple(
        Cell(
            names[place][0],
            band_title(names[place][1]),
            shares[0].get(names[place], 0.0),
            shares[1].get(names[place], 0.0),
            float(found.by_cell[place]) * scale,
        )
        for place in order.tolist()
    )


def _examples(
    found: Decomposition, names: list[tuple[str, int]], before: Requests, after: Requests
) -> dict[str, tuple[str, ...]]:
    """The slowest traces of the cell that moved the metric most, in each window."""
    cell = names[int(np.argmax(np.abs(found.by_cell)))]
    chosen = {}
    for name, part in (("before", before), ("after", after)):
        inside = [place for place, of in enumerate(_cell_names(part)) if of == cell]
        slowest = sorted(inside, key=lambda place: -part.e2e_s[place])[:EXAMPLES]
        chosen[name] = tuple(str(part.trace_id[place]) for place in slowest)
    return chosen


def _events(session: ReadSession, since: datetime, until: datetime) -> tuple[Event, ...]:
    ledger = [Event(plan.created_at, "ledger", _plan(plan)) for plan in plans.history(session, since, until)]
    learner = [
        Event(a.finished_at, "learner", f"{a.outcome}{f' v{a.version}' if a.version else ''}: {a.reason}")
        for a in learning.finished(session, since, until)
    ]
    return tuple(sorted([*ledger, *learner], key=lambda event: event.at))


def _plan(plan: ServingPlan) -> str:
    canary = plan.canary
    served = f"v{plan.champion} champion" + (f", v{canary.policy_version} {canary.weight * 100:g} %" if canary else "")
    return f"{served} ({plan.actor}: {plan.reason})"
