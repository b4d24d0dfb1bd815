"""The buttons that change what is served, each behind a confirmation that asks for a reason."""

from __future__ import annotations

import uuid
from typing import Literal

import streamlit as st

from app.components import new_rollout
from app.components.context import plain
from app.queries import ledger
from app.queries.ledger import Serving
from app.queries.overview import Slice
from engine.contracts import RolloutState as State
from engine.contracts import SlipstreamError
from engine.rollout.decide import PROMOTED_STATES

ROLL_BACK = "roll_back"
ASKED = {
    ROLL_BACK: "Takes effect at the next step of every replica. It needs neither the controller nor MLflow.",
    "promote": "The controller makes the canary champion, unless a guard fails.",
    "hold": "Keeps the present weights. The guards stay on.",
    "resume": "Lets the rollout go on from where it was held.",
    "abort": "Ends the rollout for good: the controller gives its traffic back to the champion at its next tick.",
    "begin": "Starts this draft against what is champion now, under the guards that it was written down with.",
    "drop": "Cancels this draft. It can never be started.",
}
LABELS = {ROLL_BACK: "Roll back", "promote": "Promote", "hold": "Pause", "resume": "Resume", "abort": "Abort"}
LABELS |= {"begin": "Start", "drop": "Cancel draft"}
ICONS = {
    ROLL_BACK: ":material/undo:",
    "promote": ":material/trending_up:",
    "hold": ":material/pause:",
    "resume": ":material/play_arrow:",
    "abort": ":material/block:",
    "begin": ":material/play_arrow:",
    "drop": ":material/delete:",
}
SEEN, ASKING = "buttons-of", "asking"


def buttons(serving: Serving, part: Slice) -> None:
    """Drawn by the page itself, not by a part that refreshes: a refresh must not close the dialog."""
    st.session_state[SEEN] = (_offered(serving), serving.target)
    with st.container(horizontal=True, key="verbs"):
        for verb in _offered(serving):
            target = f" to v{serving.target}" if verb == ROLL_BACK else ""
            at_work = serving.plan is not None and bool(serving.plan.arms)
            kind: Literal["primary", "secondary"] = "primary" if verb == ROLL_BACK and at_work else "secondary"
            st.button(
                LABELS[verb] + target,
                key=verb,
                type=kind,
                icon=ICONS[verb],
                help=ASKED[verb],
                on_click=_ask,
                args=(verb, _subject(verb, serving)),
            )
        st.button("New rollout", key="new", icon=":material/add:", on_click=new_rollout.ask, help="Try a version")
    drafts = [one for one in ledger.all_rollouts() if one.state is State.DRAFT][:3]
    for one in drafts:
        with st.container(horizontal=True, vertical_alignment="center", key=f"draft-{one.id}"):
            st.caption(f"Draft {one.id}: v{one.canary}, guards {one.spec_hash[:12]}, by {plain(one.actor)}")
            for verb in ("begin", "drop"):
                st.button(
                    LABELS[verb], key=f"{verb}-{one.id}", icon=ICONS[verb], help=ASKED[verb], on_click=_ask,
                    args=(verb, one.id), disabled=verb == "begin" and serving.rollout is not None,
                )  # fmt: skip
    if (asking := st.session_state.get(ASKING)) is not None:
        _confirm(*asking)
    elif new_rollout.is_asking():
        new_rollout.form(serving, part)


def is_asking() -> bool:
    """Whether a confirmation is open. Panels stand still meanwhile: a press waits for whatever is being drawn."""
    return ASKING in st.session_state or new_rollout.is_asking()


def follow(serving: Serving) -> None:
    """Draw the page again where other buttons are due, for example after somebody else rolled back."""
    if st.session_state.get(SEEN) != (_offered(serving), serving.target) and not is_asking():
        st.rerun()


def effect() -> None:
    """What came of the last press: when the replicas began to route by it."""
    if (problem := st.session_state.get("problem")) is not None:
        st.error(problem)
    generation = st.session_state.get("rolled_back")
    if generation is None:
        return
    found = ledger.effect(generation)
    assert found is not None  # the ledger is append-only
    for problem in found.problems:
        st.error(f"Generation {generation} is served without all of its policies on {problem}")
    parts = []
    if found.seconds:
        after = f" after {found.slowest:.2f} s" if found.slowest is not None else ""
        everybody = len(found.seconds) + len(found.behind) + len(found.silent)
        parts.append(f"effective on {len(found.seconds)} of {everybody} replicas{after}")
    if found.behind:
        parts.append(f"not yet on {', '.join(found.behind)}")
    if found.silent:
        parts.append(f"{', '.join(found.silent)} not heard of: its canary traffic ends with its lease at the latest")
    said = "; ".join(parts) or "no replica is alive, it takes effect when one starts"
    say = st.success if found.is_complete and not found.problems else st.warning
    say(f"Rolled back: {said} (generation {generation}).")


def _offered(serving: Serving) -> tuple[str, ...]:
    verbs: list[str] = [ROLL_BACK] if serving.target is not None else []
    rollout, plan = serving.rollout, serving.plan
    if rollout is not None and plan is not None:
        undecided = rollout.state not in PROMOTED_STATES | {State.ROLLING_BACK}
        limited = plan.traffic_classes or plan.tenants or plan.slices  # a champion serves everybody
        if undecided and not limited and plan.canary is not None and plan.canary.policy_version == rollout.canary:
            verbs.append("promote")
        if undecided:
            verbs.append("resume" if rollout.state is State.HELD else "hold")
        if rollout.state is not State.ROLLING_BACK:
            verbs.append("abort")
    return tuple(verbs)


def _subject(verb: str, serving: Serving) -> int:
    """What a verb is about, fixed when its dialog opens: the version to go back to, or the rollout."""
    subject = serving.target if verb == ROLL_BACK else serving.rollout.id if serving.rollout is not None else None
    assert subject is not None  # otherwise the verb is not offered
    return subject


def _ask(verb: str, subject: int) -> None:
    st.session_state[ASKING] = (verb, subject)


def _asked() -> None:
    st.session_state.pop(ASKING, None)


@st.dialog("Are you sure?", on_dismiss=_asked)
def _confirm(verb: str, subject: int) -> None:
    """One key for this dialog: pressing twice, or a repeated request, writes once."""
    key = st.session_state.setdefault(f"intent-{verb}-{subject}", f"dashboard-{uuid.uuid4().hex}")
    st.write((f"**v{subject}** will serve all traffic. " if verb == ROLL_BACK else "") + ASKED[verb])
    if verb != "begin":
        st.text_input("Reason", key="reason", placeholder="It stays in the record", max_chars=200)
    with st.container(horizontal=True):
        sure = st.button(LABELS[verb], key="confirm", type="primary", on_click=_write, args=(verb, subject, key))
        if st.button("Cancel", key="cancel", on_click=_asked):
            st.rerun()
    if sure and not _reason() and verb != "begin":
        st.warning("Write a reason first.", icon=":material/edit:")
    elif sure:
        st.rerun()


def _reason() -> str:
    return str(st.session_state.get("reason") or "").strip()


def _write(verb: str, subject: int, key: str) -> None:
    """Runs before anything is drawn again, so the page shows what was done."""
    if not _reason() and verb != "begin":
        return
    st.session_state["problem"] = None
    try:
        if verb == ROLL_BACK:
            st.session_state["rolled_back"] = ledger.roll_back(subject, _reason(), key).generation
        elif verb == "begin":
            st.toast(f"Rollout {ledger.begin(subject).id} is ready to start.", icon=ICONS[verb])
        elif verb == "drop":
            ledger.command(subject, "abort", _reason(), key)
        else:
            ledger.command(subject, verb, _reason(), key)
            st.toast(f"Asked the controller to {LABELS[verb].lower()}.", icon=ICONS[verb])
    except SlipstreamError as error:
        st.session_state["problem"] = str(error)
    st.session_state.pop(f"intent-{verb}-{subject}", None)
    _asked()
