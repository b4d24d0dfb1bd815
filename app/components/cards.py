"""Metric cards and the verdict line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
import pandas as pd

from app.charts.theme import Palette, floats
from app.components.context import plain
from app.components.sparklines import sparkline
from app.queries.ledger import Serving


@dataclass(frozen=True, slots=True)
class Card:
    """One number: which column, how it is written, and which direction is good."""

    label: str
    column: str
    form: str
    scale: float = 1.0
    better: Literal["lower", "higher", "neither"] = "lower"


CARDS = (
    Card("p50 latency", "e2e_p50", "{:,.0f} ms"),
    Card("p95 latency", "e2e_p95", "{:,.0f} ms"),
    Card("p99 latency", "e2e_p99", "{:,.0f} ms"),
    Card("TTFT p50", "ttft_p50", "{:,.0f} ms"),
    Card("TPOT p50", "tpot_p50", "{:,.1f} ms"),
    Card("Output tokens / s", "tokens_s", "{:,.1f}", better="higher"),
    Card("Accept. length", "acceptance_length", "{:.2f}", better="higher"),
    Card("Goodput", "goodput_share", "{:.1f} %", scale=100.0, better="higher"),
    Card("Errors", "error_rate", "{:.2f} %", scale=100.0),
    Card("Retries", "retry_rate", "{:.2f} %", scale=100.0),
)


DRAFTING = (
    Card("Accept. length", "acceptance_length", "{:.2f}", better="higher"),
    Card("Acceptance rate", "acceptance_rate", "{:.1f} %", scale=100.0, better="higher"),
    Card("Draft length", "draft_length", "{:.2f}", better="neither"),
    Card("Observed gain", "observed_gain", "{:.2f} ×", better="higher"),
    Card("TPOT p50", "tpot_p50", "{:,.1f} ms"),
)

EXPLAINED = (
    Card("p50 latency", "e2e_p50", "{:,.0f} ms"),
    Card("p95 latency", "e2e_p95", "{:,.0f} ms"),
    Card("TPOT p50", "tpot_p50", "{:,.1f} ms"),
    Card("Decode tokens / s", "decode_tokens_s", "{:,.1f}", better="higher"),
    Card("Accept. length", "acceptance_length", "{:.2f}", better="higher"),
    Card("Requests", "requests", "{:,.0f}", better="neither"),
)


def cards(
    now: pd.Series, before: pd.Series, trend: pd.DataFrame, colours: Palette, shown: Sequence[Card] = CARDS
) -> str:
    """A row of cards as HTML: value, change against the window before, sparkline.

    One element and no widgets: Streamlit's metric draws each sparkline with Vega, which a first page waited for.
    """
    return row([_card(one, now.get(one.column), before.get(one.column), trend, colours) for one in shown])


def row(made: Sequence[str], is_low: bool = False) -> str:
    """HTML of cards side by side; ``is_low``: none of them has a picture."""
    return f'<div class="cards{" low" if is_low else ""}">{"".join(made)}</div>'


def card(label: str, value: str, said: str, shade: str, picture: str = "") -> str:
    """HTML of one: what it is about, its value, a word on it in the colour ``shade``, and a sparkline."""
    tag = f'<span class="change" style="color:{shade};background:{shade}1f">{escape(said)}</span>' if said else ""
    text = f'<span class="label">{escape(label)}</span><span class="value">{escape(value)}</span>'
    return f'<div class="card" title="{escape(label)}">{text}{tag}{picture}</div>'


def first(frame: pd.DataFrame) -> pd.Series:
    """The one row of a total."""
    if frame.empty:
        return pd.Series(dtype=float)
    return frame.iloc[0]


def _card(one: Card, value: float | None, before: float | None, trend: pd.DataFrame, colours: Palette) -> str:
    shade, said = colours.muted, ""
    if _is_number(value) and _is_number(before):
        assert value is not None
        assert before is not None
        form, scale = _form(one, value)
        shown = form.format((value - before) * scale).partition(" ")[0]  # without its unit
        moved = float(shown.replace(",", ""))
        if moved and one.better != "neither":
            shade = colours.good if (moved < 0) == (one.better == "lower") else colours.bad
        said = f"↑ +{shown}" if moved > 0 else f"↓ {shown}" if moved < 0 else "0"
    series = floats(trend, one.column) if one.column in trend else np.empty(0)
    return card(one.label, _written(one, value), said, shade, sparkline(series, shade))


def _written(card: Card, value: float | None) -> str:
    if value is None or not _is_number(value):
        return "–"
    form, scale = _form(card, value)
    return form.format(value * scale)


def _form(card: Card, value: float) -> tuple[str, float]:
    """How value and change are written: in seconds from ten seconds on, as a card has room for."""
    if card.form.endswith(" ms") and value >= 10_000:
        return "{:,.1f} s", 1e-3
    return card.form, card.scale


def verdict(serving: Serving, now: pd.Series, before: pd.Series, window: str) -> str:
    """The first sentence of the page: what serves, how it does, what is tried. ``window``: "hour", "15 minutes"…"""
    plan = serving.plan
    if plan is None:
        return "No engine has started yet. Run `slipstream up`."
    canary = plan.canary
    who = f"**v{plan.champion}** serves {'all traffic' if canary is None else 'as champion'}"
    if now.empty:
        return f"{who}. No traffic in the last {window}."
    text = f"{who}: p95 {_duration(now.get('e2e_p95'))}"
    p95, was = now.get("e2e_p95"), before.get("e2e_p95") if not before.empty else None
    if _is_number(p95) and _is_number(was) and was:
        assert p95 is not None
        change = p95 / was - 1
        word = f":green[{-change * 100:.0f} % faster] than" if change < 0 else f":red[{change * 100:.0f} % slower] than"
        text += f", {'about as in' if abs(change) < 0.02 else word} the {window} before"
    text += "."
    if canary is not None:
        text += f" Canary **v{canary.policy_version}** takes {canary.weight * 100:g} %"
        if serving.rollout is not None and (reason := serving.rollout.status.get("reason")):
            text += f": {plain(reason)}"
        text += "."
    return text


def _duration(ms: float | None) -> str:
    if not _is_number(ms) or ms is None:
        return "unknown"
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.0f} ms"


def _is_number(value: float | None) -> bool:
    return value is not None and not pd.isna(value)
