"""The parts about themselves: writers, spill, exporter, partitions, rollups, replicas, learning, and this dashboard."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from app.charts import system
from app.components import context
from app.components.context import Context, heading
from app.components.drawing import draw
from app.components.export import export
from app.components.health import health
from app.components.shared import shared
from app.components.sheets import number, sheet, words
from app.queries import overview

current = context.bar()
LATE_S = 300.0  # deltas that wait longer say that housekeeping does not run


def head() -> None:
    here = current()
    writers, exporter, waiting, sinks = _read(here, "writers", "exporter", "compaction", "notifications")
    context.headline(_verdict(writers, exporter, waiting, sinks))
    _health(here)


def page() -> None:
    here = current()
    _panels(here)
    export("system", here.part)


def _read(here: Context, *names: str) -> list[pd.DataFrame]:
    return [overview.rows(f"system.{name}", here.part) for name in names]


@shared
def _health(here: Context) -> None:
    writers, exporter, waiting, stored = _read(here, "writers", "exporter", "compaction", "partitions")
    if writers.empty and stored.empty:
        st.info("Nothing has run on this database yet. Start the system: `slipstream up`.", icon=":material/info:")
    st.html(health(writers, exporter, waiting, stored, here.colours))
    with st.container(border=True):
        heading("Replicas", "what each routes by, and its trace writer since its start")
        _writers(writers)


@shared
def _panels(here: Context) -> None:
    exporter, waiting, stored = _read(here, "exporter", "compaction", "partitions")
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        heading("Partitions", "megabytes by UTC day")
        draw(system.partitions(stored, here.colours), "partitions", "Size of each day's partitions.")
    with right.container(border=True, height="stretch"):
        heading("Behind the scenes")
        _parts(exporter, waiting, *_read(here, "learning", "notifications"))
    with st.container(border=True):
        heading("Queries of this dashboard", "ms, the last 500 that were not in the cache")
        _queries()


def _verdict(writers: pd.DataFrame, exporter: pd.DataFrame, waiting: pd.DataFrame, sinks: pd.DataFrame) -> str:
    problems = []
    if writers.empty:
        problems.append("no replica has been heard of for ten minutes")
    else:
        if (dropped := int(pd.to_numeric(writers["dropped"]).fillna(0).sum())) > 0:
            problems.append(f"{dropped:,} traces were dropped")
        if (files := int(pd.to_numeric(writers["spill_files"]).fillna(0).sum())) > 0:
            problems.append(f"{files:,} batches wait in spill folders")
        behind = writers[writers["observed_generation"].fillna(0) < writers["newest_generation"].fillna(0)]
        problems += [f"{name} does not route by the newest plan" for name in behind["replica"]]
    if len(exporter):
        problems += [f"MLflow does not take all {what}" for what in exporter[exporter["error"].notna()]["what"]]
    if len(sinks):
        problems += [f"notifications do not arrive ({name})" for name in sinks[sinks["tries"] > 0]["sink"]]
    if len(waiting) and float(waiting["oldest_age_s"].iloc[0]) > LATE_S:
        problems.append("rollups are not compacted, so housekeeping does not run")
    if not problems:
        return "**All parts work**: nothing dropped, nothing waits, every replica routes by the newest plan."
    first = problems[0][0].upper() + problems[0][1:]
    return f":red[**{first}**]{'; ' if len(problems) > 1 else ''}{'; '.join(problems[1:])}."


def _writers(writers: pd.DataFrame) -> None:
    if writers.empty:
        st.caption("None. `slipstream up` starts an engine; `slipstream logs engine` says why one ended.")
        return
    frame = writers.assign(
        spill_mb=pd.to_numeric(writers["spill_bytes"]) / 1e6, rss_gb=pd.to_numeric(writers["rss_bytes"]) / 1e9
    )
    columns = {
        "replica": words("replica"),
        "heartbeat_age_s": number("heartbeat, s ago", "{:,.1f}"),
        "observed_generation": number("generation", "{:.0f}", note="The plan it routes by"),
        "newest_generation": number("newest", "{:.0f}", note="The ledger's newest plan"),
        "queue": number("queue", "{:,.0f}", note="Traces that wait for the writer"),
        "written": number("written", "{:,.0f}"),
        "spill_files": number("spill files", "{:,.0f}"),
        "spill_mb": number("spill, MB", "{:,.1f}"),
        "set_aside": number("set aside", "{:,.0f}", note="Traces that Postgres refused, kept in files"),
        "dropped": number("dropped", "{:,.0f}", note="Traces that were lost, and counted"),
        "rss_gb": number("peak memory, GB", "{:.2f}"),
        "error": words("error", is_wide=True),
    }
    sheet(frame, columns, "Replicas and their trace writers")


def _parts(exporter: pd.DataFrame, waiting: pd.DataFrame, learning: pd.DataFrame, sinks: pd.DataFrame) -> None:
    rows = []
    if exporter.empty:
        rows.append(("export to MLflow", "has not run on this database"))
    else:
        for one in exporter.to_dict("records"):
            counts = ((name, one[name]) for name in ("exported", "skipped", "refused", "waiting"))
            said = [f"{int(count):,} {name}" for name, count in counts if pd.notna(count)]
            said += [f"{one['lag_s']:.0f} s behind"] if pd.notna(one["lag_s"]) else []
            rows.append((f"to MLflow: {one['what']}", ", ".join(said)))
            if isinstance(one["error"], str):
                rows.append(("its last error", one["error"]))
    age = float(waiting["oldest_age_s"].iloc[0]) if len(waiting) else 0.0
    count = int(waiting["deltas_waiting"].iloc[0]) if len(waiting) else 0
    rows.append(("rollups", f"{count:,} deltas not compacted yet, the oldest {age:.0f} s old; panels count them all"))
    cpu = float(learning["cpu_s"].sum()) if len(learning) else 0.0
    made = int(learning["version"].notna().sum()) if len(learning) else 0
    rows.append(("learning", f"{len(learning):,} attempts in this window, {made} versions, {cpu:,.1f} s of CPU"))
    for sink in sinks.to_dict("records"):
        failed = f", the next failed {sink['tries']} times" if sink["tries"] else ""
        last = f"; last error: {sink['error']}" if isinstance(sink["error"], str) else ""
        rows.append((f"told by {sink['sink']}", f"decisions up to {sink['decision']}{failed}{last}"))
    frame = pd.DataFrame(rows, columns=["part", "state"])
    sheet(frame, {"part": words("part"), "state": words("state", is_wide=True)}, "Parts behind the scenes")


def _queries() -> None:
    kept = pd.DataFrame(list(overview.timings()), columns=["query", "ms"])
    if kept.empty:
        st.caption("None yet.")
        return
    frame = kept.groupby("query")["ms"].agg(
        count="count", p50=lambda v: np.quantile(v, 0.5), p95=lambda v: np.quantile(v, 0.95), most="max"
    )
    columns = {
        "query": words("query"),
        "count": number("times", "{:,.0f}"),
        "p50": number("p50, ms", "{:,.1f}"),
        "p95": number("p95, ms", "{:,.1f}"),
        "most": number("most, ms", "{:,.1f}"),
    }
    sheet(frame.sort_values("p95", ascending=False).reset_index(), columns, "Queries of this dashboard")


context.live(head)
context.live(page, slowly=True)
