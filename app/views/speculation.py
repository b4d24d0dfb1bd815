"""How well drafting does: by version, class and position, per request, and against what it costs."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.charts import latency, speculation
from app.components import context
from app.components.cards import DRAFTING, cards, first
from app.components.context import Context, few, heading
from app.components.drawing import draw, draw_to_traces
from app.components.export import export
from app.components.shared import shared
from app.components.tables import Columns, by_identity, table
from app.queries import ledger, overview
from engine.store.panels.versions import SHOWN
from engine.store.repositories.overview import Slice

PREDICTED = (
    "what K control expected when it chose: plain decoding of the tokens it expected, over what it expected drafting "
    "and passes to take"
)
OBSERVED = (
    "plain decoding of the tokens that came, by the measured cost of plain steps, over what drafting and passes took"
)

current = context.bar()


def head() -> None:
    here = current()
    context.renew("speculation", ledger.serving().generation, _drafted(here.part))
    if not _drafted(here.part):
        context.headline("**No verify step** in this window.")
        st.info("Choose a longer window or fewer filters; `slipstream demo` sends traffic.", icon=":material/info:")
        return
    context.headline(_verdict(overview.totals(here.part).iloc[0], _costs(here.part)))
    _cards(here)


def page() -> None:
    here = current()
    if not _drafted(here.part):
        return
    _charts(here.charted(), ledger.serving().generation)
    _versions(here)
    export("speculation", here.part)


@shared
def _cards(here: Context) -> None:
    total, before = first(overview.totals(here.part)), first(overview.totals(here.part.before()))
    st.html(cards(total, before, overview.over_time(here.charted().part), here.colours, DRAFTING))


@shared
def _charts(here: Context, generation: int | None) -> None:
    part, colours, window = here.part, here.colours, here.window
    lines, costs = overview.leading(part), _costs(part)
    capped = few(part, lines)
    marks = ledger.marks(part, generation)
    versions = overview.over_time(lines, ("policy_version",), ())
    classes = overview.over_time(part, ("traffic_class",), ())
    left, middle, right = st.columns(3)
    with left.container(border=True):
        heading("Acceptance length", f"1 + accepted / steps, by version{capped}")
        figure = latency.by_version(versions, "acceptance_length", marks, window, colours)
        draw_to_traces(figure, "length", "Acceptance length over time, a line a version.")
    with middle.container(border=True):
        heading("Draft acceptance rate", f"accepted / drafted, by version{capped}")
        figure = latency.by_version(versions, "acceptance_rate", marks, window, colours, ".1%")
        draw_to_traces(figure, "rate", "Share of drafted tokens accepted over time, a line a version.")
    with right.container(border=True):
        heading("Draft length", "drafted tokens per verify step: the K that was used")
        figure = latency.by_version(versions, "draft_length", marks, window, colours)
        draw_to_traces(figure, "k", "Drafted tokens per verify step over time, a line a version.")
    left, middle, right = st.columns(3)
    with left.container(border=True):
        heading("By class", "acceptance length · drag to open the traces")
        figure = speculation.by_class(classes, "acceptance_length", marks, window, colours)
        draw_to_traces(figure, "by-class", "Acceptance length over time, a line a traffic class.")
    with middle.container(border=True):
        heading("By position", "% of steps that drafted, by version")
        figure = latency.positions(overview.positions(lines), colours)
        draw(figure, "positions", "Share accepted at each draft position, by version.")
    with right.container(border=True):
        heading("By position", "% of steps that drafted, by class")
        frame = overview.numbers(overview.rows("speculation.positions_by_class", part), ("traffic_class",))
        draw(
            speculation.positions_by_class(frame, colours),
            "class-positions",
            "The same, a line a traffic class.",
        )
    left, right = st.columns(2)
    with left.container(border=True):
        band = overview.alarm_band(part)
        note = "shaded: what all but 1 % of the week before stayed out of" if band else "no week before to compare with"
        heading("Per request", f"% of requests by acceptance length; {note}")
        frame = overview.rows("speculation.distribution", lines)
        draw(
            speculation.distribution(frame, band, colours),
            "spread",
            "How requests spread over acceptance lengths.",
        )
    with right.container(border=True):
        drawn = costs if lines == part else costs[costs["policy_version"].isin(lines.versions or ())]
        heading(
            "Cost and benefit",
            "tokens a verify step brings; above the line drafting pays · shapes are classes · hover: gain",
        )
        draw(
            speculation.cost(drawn, colours),
            "cost",
            "Acceptance length against the cost of a step, with break-even.",
        )


@shared
def _versions(here: Context) -> None:
    with st.container(border=True):
        heading("Versions and classes", "times in ms per verify step; gain: time of plain decoding / time spent")
        _table(_costs(here.part), here)


def _drafted(part: Slice) -> bool:
    """Whether there is any step to tell of."""
    totals = overview.totals(part)
    return not totals.empty and bool(totals["steps"].iloc[0])


def _costs(part: Slice) -> pd.DataFrame:
    """What each version costs and brings in each class."""
    listed = overview.leading(part, SHOWN)
    return overview.numbers(overview.rows("speculation.cost", listed), ("policy_version", "traffic_class"))


def _verdict(total: pd.Series, costs: pd.DataFrame) -> str:
    text = f"Each verify step commits **{total['acceptance_length']:.2f} tokens**"
    if pd.notna(total["acceptance_rate"]):
        text += f"; {total['acceptance_rate'] * 100:.0f} % of drafted tokens are accepted"
    gains = costs.dropna(subset=["gain"])
    losing = gains[(gains["gain"] < 0.98) & (gains["drafted"] > 0)]
    if losing.empty:
        return f"{text}. " + ("Drafting pays in every class." if len(gains) else "What it costs is not known yet.")
    worst = losing.loc[losing["gain"].idxmin()]
    where = f"v{int(worst['policy_version'])} on {worst['traffic_class']}"
    return f"{text}. :red[Drafting costs more than it brings] for {where}: {worst['gain']:.2f} × plain decoding."


def _table(costs: pd.DataFrame, here: Context) -> None:
    number = st.column_config.NumberColumn
    frame = costs.assign(version=[f"v{int(version)}" for version in costs["policy_version"]])
    frame["acceptance_rate"] = frame["acceptance_rate"] * 100
    columns: Columns = {
        "version": st.column_config.TextColumn("version", width=70),
        "traffic_class": "class",
        "requests": number("requests", format="localized"),
        "acceptance_length": number("acceptance length", format="%.2f"),
        "expected_length": number("expected by K control", format="%.2f"),
        "acceptance_rate": number("acceptance rate, %", format="%.1f"),
        "draft_length": number("draft length", format="%.2f", help="drafted tokens per verify step"),
        "draft_step_ms": number("draft, ms", format="%.2f"),
        "verify_step_ms": number("verify, ms", format="%.1f"),
        "break_even": number("break-even length", format="%.2f", help="the acceptance length from which drafting pays"),
        "predicted_gain": number("predicted gain", format="%.2f ×", help=PREDICTED),
        "gain": number("observed gain", format="%.2f ×", help=OBSERVED),
    }
    frame = frame.sort_values(["policy_version", "requests"], ascending=[False, False])
    table(frame[list(columns)], columns, "costs", {"version": by_identity(here.colours)})


context.live(head)
context.live(page, slowly=True)
