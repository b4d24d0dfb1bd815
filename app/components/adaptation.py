"""What a learned version cost and has saved since, as a sentence and a small table."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.components.sheets import number, sheet, words
from engine.store.repositories.adaptation import Adaptation


def account(cost: Adaptation | None, price_per_hour: float | None) -> None:
    """Seconds of the machine, and money where an hour has a price."""
    if cost is None:
        st.caption("It cost nothing to learn: it was built in, or registered by hand.")
        return
    st.markdown(sentence(cost, price_per_hour))
    spent = pd.DataFrame(
        [
            ("learning", cost.learn_cpu_s),
            ("evaluation", cost.gate_cpu_s),
            ("export", cost.export_cpu_s),
            (f"{cost.refused} refused attempts before", cost.refused_cpu_s),
        ],
        columns=["spent on", "CPU, s"],
    )
    left, right = st.columns([1, 1])
    with left:
        columns = {"spent on": words("spent on"), "CPU, s": number("CPU, s", "{:,.2f}")}
        sheet(spent, columns, "What learning it took")
    if not cost.classes:
        return
    saved = pd.DataFrame(
        [
            {"class": name, "requests": one.requests, "verify steps saved": one.steps_saved, "saved, s": one.saved_s}
            for name, one in cost.classes.items()
        ]
    )
    columns = {
        "class": words("class"),
        "requests": number("requests", "{:,.0f}"),
        "verify steps saved": number(
            "verify steps saved",
            "{:,.0f}",
            note="Against the champion of its gate, by the ratio of acceptance lengths there",
        ),
        "saved, s": number("saved, s", "{:,.1f}", note="Target passes saved, by the engine's measured costs"),
    }
    with right:
        sheet(saved, columns, "What it has saved since")


def sentence(cost: Adaptation, price_per_hour: float | None) -> str:
    """The verdict first."""
    net, even = cost.net_s, cost.break_even_requests
    money = "" if price_per_hour is None else f", {net / 3600.0 * price_per_hour:+.4f} at {price_per_hour:g} an hour"
    if not cost.requests:
        return f"It cost **{cost.cost_s:.1f} s** and has not served yet."
    if even is None:
        return f"It cost **{cost.cost_s:.1f} s** and has saved nothing over {cost.requests:,} requests{money}."
    paid = "has paid for itself" if net > 0 else "has not paid for itself yet"
    return (
        f"It {paid}: **{net:+.1f} s** net over {cost.requests:,} requests{money}. "
        f"Break-even after {even:,.0f} requests like these."
    )
