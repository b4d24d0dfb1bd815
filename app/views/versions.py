"""Every draft policy: what it is, which traffic made it, what it did, and how two of them differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from app.charts import versions as charts
from app.charts.figure import Figure
from app.components import adaptation, context, diff
from app.components import versions as shown
from app.components.context import Context, ago, heading, plain
from app.components.diff import MEASURES
from app.components.drawing import draw_to_choose
from app.components.export import export
from app.components.shared import shared
from app.queries import ledger, versions
from app.queries.database import settings
from engine.contracts import PolicyVersion
from engine.store.repositories.overview import Slice

current = context.bar()
PAGE = 50
SERVED, ALL = "served", "all"
PARENT, CHAMPION = "its parent", "the champion"
HIDDEN: dict[str, Any] = {"label_visibility": "collapsed"}


def head() -> None:
    serving = ledger.serving()
    context.renew("versions", serving.generation, bool(versions.every()))
    if not versions.every():
        st.info(
            "No version yet. The engine makes the first two when it starts: `slipstream up`.", icon=":material/info:"
        )
        return
    kinds, outcomes = versions.counts()
    plan = serving.plan
    if plan is None:
        context.headline("**Nothing is served yet.** The engine serves one of these when it starts: `slipstream up`.")
    else:
        context.headline(f"**v{plan.champion}** is champion. Last change: {plain(plan.reason)}.")
    changed = ago(plan.created_at) if plan is not None else ""
    st.html(shown.standing(serving, kinds, outcomes, changed, current().colours))


def page() -> None:
    every = versions.every()
    if not every:
        return
    here, serving = current(), ledger.serving()
    part = replace(here.part, version=None)  # versions are compared with each other
    served = versions.served(part)
    chosen = _chosen(every, served, serving, here.part)
    _table(part, every, served, chosen, serving)
    family = versions.family(chosen.version)
    left, right = st.columns([1, 1])
    with left.container(border=True, height="stretch"):
        _against_version(here, chosen, serving)
    with right.container(border=True, height="stretch"):
        heading(f"Family of v{chosen.version}", "solid: parent, dotted: whose traffic taught it · click to choose")
        nodes = shown.nodes(family, serving)
        figure = charts.family(nodes, shown.taught(family), chosen.version, here.colours)
        draw_to_choose(figure, "family", _in_words(nodes, chosen.version), _choose)
    left, right = st.columns([1, 1])
    with left.container(border=True, height="stretch"):
        heading(f"Training traffic of v{chosen.version}", "which traces made it, which judged it")
        shown.training(chosen, family)
    with right.container(border=True, height="stretch"):
        heading(f"Gate of v{chosen.version}", "tokens per verify step on held-out requests")
        shown.gate(chosen.version)
    _diff(part, chosen, every, served, serving)
    with st.container(border=True):
        heading(f"Cost of v{chosen.version}", "what learning it took, and what it has saved since")
        adaptation.account(versions.adaptation_of(chosen.version), settings().learner.price_per_hour)
    with st.container(border=True):
        _tenant()
    with st.container(border=True):
        heading("Attempts", "of the learner, the newest 200, the refused ones too")
        shown.attempts(versions.attempts(), here.colours)
    export("versions", part)


def _chosen(every: list[int], served: dict[int, int], serving: ledger.Serving, given: Slice) -> PolicyVersion:
    """The version the page is about: the one of the link, of the bar, else what is tried, served, or newest."""
    asked = str(st.query_params.get("about", "")).removeprefix("v")
    known = set(every)
    wanted = int(asked) if asked.isdecimal() else given.version
    if wanted is not None and wanted not in known:
        st.warning(f"There is no v{wanted}; the newest is v{every[0]}.")
    if wanted not in known:
        learned = next(iter(served), None)
        wanted = learned if learned in known else serving.plan.champion if serving.plan is not None else every[0]
    return versions.some((wanted,))[0]


def _table(
    part: Slice, every: list[int], served: dict[int, int], chosen: PolicyVersion, serving: ledger.Serving
) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", key="versions-bar"):
            heading("Versions", "measured in the window; choose one to read about it")
            which = st.segmented_control(
                "Which", [SERVED, ALL], default=SERVED, key="show", bind="query-params", required=True, **HIDDEN
            )
            st.text_input("Go to version", key="go", width=130, placeholder="Go to version", on_change=_go, **HIDDEN)
        roles = {number for number in (serving.target, serving.previous) if number is not None}
        if serving.plan is not None:
            roles |= set(serving.plan.versions)
        known = set(every)
        few = sorted(({*served, *roles, chosen.version}) & known, reverse=True)
        numbers = few if which == SERVED else every
        pages = -(-len(numbers) // PAGE)
        at = min(int(st.session_state.get("page") or 1), pages)
        here = tuple(numbers[(at - 1) * PAGE : at * PAGE])
        asked = tuple(number for number in here if number in served) or (0,)
        measured, moved = versions.measured(part, asked), versions.trends(part, asked)
        frame = shown.rows(versions.some(here), measured, moved, sum(served.values()), serving.roles)
        st.session_state["listed"] = [int(number) for number in frame["policy_version"]]
        shown.listing(frame, current().colours, _key(which, at), _pick)
        if pages > 1:
            with st.container(horizontal=True, vertical_alignment="center", key="pages"):
                st.pagination(pages, key="page", bind="query-params")
                st.caption(f"{len(numbers):,} versions, {PAGE} a page", width="stretch")


def _key(which: str | None, page: int) -> str:
    """A table of its own for every page: a row chosen on one must not be chosen on the next."""
    st.session_state["listing"] = f"all-versions-{which}-{page}"
    return str(st.session_state["listing"])


def _against_version(here: Context, chosen: PolicyVersion, serving: ledger.Serving) -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="measure-bar"):
        heading("By version", "95 % intervals; the 50 with the most requests")
        label = st.selectbox("Metric", list(MEASURES), key="measure", bind="query-params", width=190, **HIDDEN)
    figure = _compared(here, str(label), chosen.version, serving.generation, serving.roles)
    draw_to_choose(figure, "by-version", f"{label} by version with 95 % intervals.", _choose)


@shared
def _compared(here: Context, label: str, chosen: int, generation: int | None, _roles: dict[int, str]) -> Figure:
    measure, frame = MEASURES[label], versions.measured(replace(here.part, version=None))
    names = [measure.column, f"{measure.column}_low", f"{measure.column}_high"]
    if len(frame):
        frame = frame.assign(**{name: frame[name] * measure.scale for name in names})
    return charts.against(frame, measure.column, chosen, _roles, measure.form, measure.unit, here.colours)


def _diff(
    part: Slice, chosen: PolicyVersion, every: list[int], served: dict[int, int], serving: ledger.Serving
) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", key="diff-bar"):
            heading(f"v{chosen.version} beside", "")
            offered = [PARENT, CHAMPION, *(f"v{number}" for number in [*served][:PAGE])]
            asked = st.query_params.get("against")
            if asked and asked not in offered:
                offered.append(asked)
            name = st.selectbox(
                "Beside", offered, key="against", bind="query-params", width=150, accept_new_options=True, **HIDDEN
            )
            note = (
                "values with 95 % intervals; of the same window but not of the same requests: a rollout compares fairly"
            )
            st.markdown(f":gray[:small[{note}]]", width="stretch")
        other = _other(str(name), chosen, serving)
        found = versions.some((other,)) if other is not None and other in set(every) else []
        if not found:
            st.caption(f"{plain(name)} is no version that there is. Choose another one.")
            return
        measured = versions.measured(part, (chosen.version, found[0].version))
        diff.side_by_side(_side(chosen, measured), _side(found[0], measured), current().colours)


def _other(name: str, chosen: PolicyVersion, serving: ledger.Serving) -> int | None:
    champion = serving.plan.champion if serving.plan is not None else None
    if name == PARENT:
        return chosen.parent_version or champion
    if name == CHAMPION:
        return champion
    number = name.removeprefix("v")
    return int(number) if number.isdecimal() else None


def _side(version: PolicyVersion, measured: Any) -> diff.Side:
    numbers = measured["policy_version"].tolist() if len(measured) else []
    row = None
    if version.version in numbers:
        row = dict(zip(measured.columns, measured.to_numpy(dtype=object)[numbers.index(version.version)], strict=True))
    lineage, gate = versions.lineage(version.version), versions.gate_of(version.version)
    return version, lineage, gate, row


def _tenant() -> None:
    """The other direction of lineage: what somebody's traffic taught."""
    with st.container(horizontal=True, vertical_alignment="center", key="tenant-bar"):
        heading("What a tenant taught", "directly, or through weights that were built upon")
        name = st.text_input("Tenant", key="tenant", bind="query-params", width=190, placeholder="Tenant", **HIDDEN)
    if not (name := str(name or "").strip()):
        st.caption("Write a tenant's name. What one request taught stands on its own page.")
        return
    traces, found = versions.taught_by_tenant(name)
    if not traces:
        st.caption(f"Nothing of {plain(name)} was ever taken in by the learner.")
        return
    said = ", ".join(f"[v{number}](/versions?about=v{number})" for number in found[-40:])
    more = f", the newest 40 of {len(found):,}" if len(found) > 40 else ""
    st.markdown(f"{traces:,} traces of **{plain(name)}** were taken in; they taught {said or 'no version'}{more}.")


def _in_words(nodes: list[charts.Node], chosen: int) -> str:
    """The graph for those who do not see it."""
    me = next((node for node in nodes if node.version == chosen), None)
    children = [f"v{node.version}" for node in nodes if node.parent == chosen]
    parent = f"v{me.parent}" if me is not None and me.parent is not None else "no version"
    return f"v{chosen} came from {parent}; from it came {', '.join(children) or 'no version'}."


def _pick() -> None:
    event: Any = st.session_state[st.session_state["listing"]]
    if event.selection.rows:
        _choose(st.session_state["listed"][event.selection.rows[0]])


def _go() -> None:
    if (wanted := str(st.session_state["go"]).strip().removeprefix("v")).isdecimal():
        _choose(int(wanted))


def _choose(version: int) -> None:
    st.query_params["about"] = f"v{version}"


context.live(head)
context.live(page, slowly=True)
