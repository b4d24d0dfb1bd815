"""How much of a change comes from traffic mix, load, policy and the rest. Pure.

Requests fall into cells (traffic class × prompt length). Kitagawa (1955) splits the change of a mean of means,
Δ = Σ(w1 − w0)(m0 + m1)/2 [mix] + Σ(m1 − m0)(w0 + w1)/2 [within], with w the cells' shares and m their means. The change
within a cell is what its load bands and its policies account for: (change of share) × (main effect), the main effects
fitted to both windows at once (Oaxaca 1973, Blinder 1973), so that a policy that came with another load is not mistaken
for it. What is left is the rest; where a version served in both windows, that tells time from policy. Intervals come
from resampling conversations, which keeps a conversation's requests together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTORS = ("mix", "load", "policy", "rest")
TOGETHER = 2.498
"""Standard errors to either side: 95 % for the four factors together (Bonferroni), since the largest is picked out."""
LOAD_BANDS = 8
FAINT, LAST = 1e-6, 1e-3
"""Ridge penalties relative to the weight of a cell, of bands and policies and of the window: what decides where two of
them cannot be told apart."""
MIN_REQUESTS = 200
MIN_CONVERSATIONS = 30
SHARED = 0.05
"""Below this overlap of the load bands of two windows, load and whatever else changed cannot be told apart."""


@dataclass(frozen=True, slots=True)
class Window:
    """Requests of one window, arrays [requests]. The metric is Σ ``value`` / Σ ``weight``.

    ``cell`` and ``policy`` and ``conversation`` are small codes, the first two common to both windows; ``load`` is how
    many requests were in flight on the replica.
    """

    cell: np.ndarray
    policy: np.ndarray
    load: np.ndarray
    conversation: np.ndarray
    value: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.cell)


@dataclass(frozen=True, slots=True)
class Part:
    """One factor's share of the change with its interval (95 % for the four together), in the metric's unit."""

    factor: str
    effect: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Decomposition:
    """``before`` + the effects of ``parts`` = ``after``. ``parts`` are in the order of ``FACTORS``.

    ``verdict`` is the factor that explains most, or None where it cannot be told, and ``reason`` says why not.
    ``by_cell`` is what each cell adds to the change: mix, and change within.
    """

    before: float
    after: float
    total: Part
    parts: tuple[Part, ...]
    verdict: str | None
    reason: str
    by_cell: np.ndarray

    @property
    def ranked(self) -> list[Part]:
        return sorted(self.parts, key=lambda part: -abs(part.effect))


def decompose(before: Window, after: Window, rng: np.random.Generator, resamples: int = 200) -> Decomposition | str:
    """The decomposition, or why there is none."""
    for name, window in (("first", before), ("second", after)):
        many = len(np.unique(window.conversation))
        if len(window) < MIN_REQUESTS or many < MIN_CONVERSATIONS:
            return (
                f"the {name} window has {len(window):,} requests of {many:,} conversations; "
                f"it takes {MIN_REQUESTS} of {MIN_CONVERSATIONS}"
            )
        if not window.weight.sum() > 0:
            return f"nothing was measured in the {name} window"
    shape = (
        int(max(before.cell.max(), after.cell.max())) + 1,
        LOAD_BANDS,
        int(max(before.policy.max(), after.policy.max())) + 1,
    )
    edges = np.quantile(np.concatenate([before.load, after.load]), np.arange(1, LOAD_BANDS) / LOAD_BANDS)
    pair = [_Counter(window, edges, shape) for window in (before, after)]
    plain = [counter.tables(np.ones((1, counter.conversations))) for counter in pair]
    effects, by_cell = (found[0] for found in _effects(plain[0], plain[1]))
    drawn, _ = _effects(*(counter.tables(counter.redraw(rng, resamples)) for counter in pair))
    parts = tuple(_part(name, effects[place], drawn[:, place]) for place, name in enumerate(FACTORS))
    total = _part("total", effects.sum(), drawn.sum(axis=1))
    verdict, reason = _judge(parts, total, _confounded(plain[0][1][0], plain[1][1][0]))
    means = [float(_whole(tables)[0]) for tables in plain]
    return Decomposition(means[0], means[1], total, parts, verdict, reason, by_cell)


def _part(name: str, effect: float, drawn: np.ndarray) -> Part:
    reach = TOGETHER * float(drawn.std(ddof=1))
    return Part(name, float(effect), float(effect) - reach, float(effect) + reach)


Tables = tuple[np.ndarray, np.ndarray]
"""Σ value and Σ weight, each [samples, cells, load bands, policies]."""


class _Counter:
    """A window by conversation and group, so that a sample of conversations is summed quickly."""

    def __init__(self, window: Window, edges: np.ndarray, shape: tuple[int, int, int]) -> None:
        band = np.searchsorted(edges, window.load, side="right")
        self.window, self.shape = window, shape
        self.group = np.ravel_multi_index((window.cell, band, window.policy), shape)
        names, self.codes = np.unique(window.conversation, return_inverse=True)
        self.conversations = len(names)

    def redraw(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """How often each conversation is in each sample with replacement, [samples, conversations]."""
        many = self.conversations
        return np.stack([np.bincount(rng.integers(many, size=many), minlength=many) for _ in range(samples)])

    def tables(self, times: np.ndarray) -> Tables:
        size = int(np.prod(self.shape))
        made = []
        for column in (self.window.value, self.window.weight):
            rows = [np.bincount(self.group, column * row[self.codes], size).reshape(self.shape) for row in times]
            made.append(np.stack(rows))
        return made[0], made[1]


def _effects(before: Tables, after: Tables) -> tuple[np.ndarray, np.ndarray]:
    """Effects in the order of FACTORS [samples, 4], and each cell's contribution [samples, cells].

    The rest is what the three others leave, so that the four add up to the change.
    """
    cells = [_level(tables, (2, 3)) for tables in (before, after)]
    by_cell, cell_share = _shift(cells[0], cells[1])
    of_load, of_policy = _main_effects(before, after)
    load, policy = (
        (np.nan_to_num(_shares(after[1], axis) - _shares(before[1], axis)) * effect).sum(axis=2)
        for axis, effect in ((3, of_load), (2, of_policy))
    )
    change = np.nan_to_num(cells[1][1] - cells[0][1])
    whole = _whole(after) - _whole(before)
    known = np.stack([by_cell.sum(axis=1), (cell_share * load).sum(axis=1), (cell_share * policy).sum(axis=1)], axis=1)
    rest = whole - known.sum(axis=1)
    return np.concatenate([known, rest[:, None]], axis=1), by_cell + cell_share * change


def _main_effects(before: Tables, after: Tables) -> tuple[np.ndarray, np.ndarray]:
    """What each load band and each policy adds to the metric in a cell, [samples, cells, bands] and [.., policies].

    Weighted least squares of the means on band, policy and window, both windows together: policies and loads that come
    together within a window are told apart by those that do not. The window takes only what neither of them can: where
    no policy served in both windows, the change of policy is the policy's.
    """
    value, weight = (np.stack([b, a], axis=2) for b, a in zip(before, after, strict=True))
    samples, cells, _, bands, policies = weight.shape
    places = np.indices((2, bands, policies)).reshape(3, -1)
    design = np.concatenate(
        [np.eye(bands)[places[1]], np.eye(policies)[places[2]], places[0][:, None].astype(float)], axis=1
    )
    value, weight = (table.reshape(samples, cells, -1) for table in (value, weight))
    normal = (weight[..., None] * design).swapaxes(-1, -2) @ design
    penalty = np.full(bands + policies + 1, FAINT)
    penalty[-1] = LAST
    normal += np.maximum(weight.sum(axis=-1), 1e-12)[..., None, None] * np.diag(penalty)
    solved = np.linalg.solve(normal, (value @ design)[..., None])[..., 0]
    return solved[..., :bands], solved[..., bands:-1]


def _shares(weight: np.ndarray, over: int) -> np.ndarray:
    """Shares within each cell of the members of the axis that is left when ``over`` is summed, nan in an empty cell."""
    left = weight.sum(axis=over)
    with np.errstate(invalid="ignore"):
        return left / left.sum(axis=-1, keepdims=True)


def _whole(tables: Tables) -> np.ndarray:
    return tables[0].sum(axis=(1, 2, 3)) / tables[1].sum(axis=(1, 2, 3))


def _level(tables: Tables, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Shares and means of the members of a level (the last axis), the levels below summed over; a mean is nan where a
    member is absent, and so are the shares where all are."""
    value, weight = (table.sum(axis=axes) if axes else table for table in tables)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weight / weight.sum(axis=-1, keepdims=True), np.where(weight > 0, value / weight, np.nan)


def _shift(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(effect of each member's change of share, its mean share in both windows), along the last axis.

    Nothing moves where one of the windows has no members at all: the level above accounts for that.
    """
    (w0, m0), (w1, m1) = before, after
    met = ~np.isnan(w0) & ~np.isnan(w1)
    w0, w1 = (np.where(met, shares, 0.0) for shares in (w0, w1))
    share = (w0 + w1) / 2
    both = np.where(~np.isnan(m0) & ~np.isnan(m1), share, 0.0)
    weight = both.sum(axis=-1, keepdims=True)
    change = (both * np.nan_to_num(m1 - m0)).sum(axis=-1, keepdims=True)
    moved = np.divide(change, weight, out=np.zeros_like(change), where=weight > 0)
    middle = np.nan_to_num((np.where(np.isnan(m0), m1 - moved, m0) + np.where(np.isnan(m1), m0 + moved, m1)) / 2)
    centre = (share * middle).sum(axis=-1, keepdims=True)  # shares sum to one: a constant may be taken off every mean
    return (w1 - w0) * (middle - centre), share


def _confounded(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the load moved out of its bands while the policies changed too: then neither can be named.

    Arguments: Σ weight [cells, load bands, policies].
    """

    def overlap(axes: tuple[int, int]) -> float:
        shares = [weight.sum(axis=axes) / weight.sum() for weight in (before, after)]
        return float(np.minimum(*shares).sum())

    return overlap((0, 2)) < SHARED and overlap((0, 1)) < SHARED


def _judge(parts: tuple[Part, ...], total: Part, confounded: bool) -> tuple[str | None, str]:
    if confounded:
        return None, "load and policy changed together, and no load was served by both"
    ranked = sorted(parts, key=lambda part: -abs(part.effect))
    certain = [part for part in ranked if part.is_certain]
    if not certain:
        if not total.is_certain:
            return None, "the change is no larger than chance allows"
        return None, f"{ranked[0].factor} looks largest, but its interval includes none at all"
    first = certain[0]
    if ranked[0] is not first:
        return first.factor, f"{ranked[0].factor} may be larger, but it cannot be told from nothing"
    if len(certain) > 1 and min(abs(first.low), abs(first.high)) < abs(certain[1].effect):
        return first.factor, f"{first.factor} and {certain[1].factor} are close"
    return first.factor, ""
