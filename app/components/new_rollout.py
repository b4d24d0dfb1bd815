"""A rollout made on a page: what it would freeze is shown before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import streamlit as st

from app.components import rehearsal
from app.components.guard_table import name_of
from app.queries import ledger, overview
from app.queries.overview import Slice
from engine.contracts import SlipstreamError
from engine.rollout import specs
from engine.rollout.guards import RolloutSpec, SpecError

ASKING = "new-rollout"
MARGINS = {
    "tokens_per_step": ("max_drop", 100.0, "% worse at most"),
    "latency": ("margin", 100.0, "% slower at most"),
    "fuse_p95": ("ratio", 1.0, "× the control's p95 at most"),
    "fuse_cost": ("ratio", 1.0, "× the control's cost of a token at most"),
    "fuse_restarts": ("restarts", 1.0, "restarts at most"),
}
"""What of a guard may be set here: its field, what one unit of it is in, and what the number says."""
MINUTES = {"warmup_s": "warm-up", "soak_s": "soak", "watch_s": "watch", "deadline_s": "deadline"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the form says. ``margins`` of the guards by name, in the unit that is shown; lists are typed by commas.

    ``shadow``: copies of so many served requests to draft on first, 0 for none, None for what the preset has.
    """

    preset: str
    steps: str
    min_requests: int
    shadow: int | None = None
    minutes: Mapping[str, float] = field(default_factory=dict)
    traffic_classes: Sequence[str] = ()
    tenants: str = ""
    slices: str = ""
    kept: frozenset[str] | None = None
    margins: Mapping[str, float] = field(default_factory=dict)


def specification(wishes: Wishes) -> RolloutSpec:
    """The preset with what was changed; SpecError says which of it cannot be. An unchanged preset keeps its hash."""
    preset = specs.preset(wishes.preset)
    tree = specs.to_dict(preset)
    names = [guard.name for guard in preset.guards]
    guards = []
    for name, guard in zip(names, tree["guards"], strict=True):
        if name in wishes.margins:
            key, unit, _ = MARGINS[guard["kind"]]
            margin = round(wishes.margins[name] / unit, 6)
            guard[key] = int(margin) if key == "restarts" else margin
        if wishes.kept is None or name in wishes.kept:
            guards.append(guard)
    tree |= {
        "guards": guards,
        "steps": _weights(wishes.steps),
        "min_requests": wishes.min_requests,
        "traffic_classes": sorted(wishes.traffic_classes) or None,
        "tenants": _names(wishes.tenants),
        "slices": _names(wishes.slices),
        **{name: round(60.0 * minutes, 3) for name, minutes in wishes.minutes.items()},
    }
    if wishes.shadow is not None:
        tree["shadow"] = {"requests": wishes.shadow} if wishes.shadow else None
    wanted = specs.parse(tree)
    return wanted if wanted == preset else replace(wanted, preset="")


def _weights(text: str) -> list[float]:
    try:
        return [round(float(part.strip().removesuffix("%")) / 100.0, 6) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SpecError(f"rollout.steps are percentages by commas, for example 10, 25, 50; got {text!r}.") from None


def _names(text: str) -> list[str] | None:
    return sorted({part.strip() for part in text.split(",") if part.strip()}) or None


def ask() -> None:
    st.session_state[ASKING] = True


def is_asking() -> bool:
    return ASKING in st.session_state


def _close() -> None:
    st.session_state.pop(ASKING, None)
    rehearsal.forget()


@st.dialog("New rollout", width="large", on_dismiss=_close)
def form(serving: ledger.Serving, part: Slice) -> None:
    """Every change is checked at once; what the buttons write is the YAML that is shown, under its hash."""
    offered = ledger.candidates(serving.plan.champion) if serving.plan is not None else []
    if not offered:
        st.info("There is no version that could be tried: all are retired, or champion already.")
        return
    left, right = st.columns([3, 4])
    with left:
        version = int(
            st.selectbox("Version", offered, key="new-version", format_func=lambda v: f"v{v} {serving.role(v)}")
        )
        preset = str(
            st.segmented_control(
                "Preset", specs.PRESETS, default="standard", key="new-preset", required=True, help="Where to start from"
            )
        )
        wishes = _schedule(preset, part)
    with right:
        kept, margins = _guards(preset)
    made = None
    with st.container():  # one place, whatever it says: the buttons below stay where they are
        try:
            made = specification(Wishes(**wishes, kept=kept, margins=margins))
        except SpecError as error:
            st.error(str(error), icon=":material/error:")
        if made is not None:
            st.caption(
                f"This is frozen at the start under **{specs.spec_hash(made)[:12]}**; nobody can change it after."
            )
            if limits := made.limits():
                st.caption(f"Tried on {', '.join(limits)} only: it ends when proved there, and the champion stays.")
            with st.expander("YAML", expanded=False):
                st.code(specs.to_yaml(made), language="yaml")
            rehearsal.panel(made)
    _buttons(version, made, serving)


def _schedule(preset: str, part: Slice) -> dict[str, Any]:
    start = specs.preset(preset)
    key = f"new-{preset}"
    steps = st.text_input(
        "Steps, % of eligible traffic",
        ", ".join(f"{100 * step:g}" for step in start.steps),
        key=f"{key}-steps",
        help="The control takes as much as the canary",
    )
    two = st.columns(2)
    requests = two[0].number_input("Requests per arm and step", 1, value=start.min_requests, key=f"{key}-requests")
    shadow = two[1].number_input(
        "In shadow first, requests",
        0,
        value=start.shadow.requests if start.shadow is not None else 0,
        key=f"{key}-shadow",
        help="The canary drafts on copies of so many served requests and serves none; 0: it serves at once",
    )
    columns = st.columns(4)
    minutes = {
        name: columns[place].number_input(
            f"{label}, min", 0.0, value=getattr(start, name) / 60.0, format="%.3g", key=f"{key}-{name}"
        )
        for place, (name, label) in enumerate(MINUTES.items())
    }
    known = overview.known(part)["classes"]
    classes = st.multiselect(
        "Traffic classes", known, key="new-classes", placeholder="all of them", accept_new_options=True
    )
    tenants = st.text_input("Tenants", key="new-tenants", placeholder="all of them; by commas")
    slices = st.text_input("Slices", key="new-slices", placeholder="all of them; values of X-Slice by commas")
    return {
        "preset": preset,
        "steps": steps,
        "min_requests": int(requests),
        "shadow": int(shadow),
        "minutes": {k: v for k, v in minutes.items() if abs(60.0 * v - getattr(start, k)) > 1e-6},
        "traffic_classes": classes,
        "tenants": tenants,
        "slices": slices,
    }


def _guards(preset: str) -> tuple[frozenset[str], dict[str, float]]:
    """Which guards stay, and their margins."""
    start = specs.preset(preset)
    trees = specs.to_dict(start)["guards"]
    st.markdown("Guards", help="One that fails takes the canary back, at any time")
    kept, margins = set(), {}
    for guard, tree in zip(start.guards, trees, strict=True):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            label = "p95 fuse" if guard.kind == "fuse_p95" else name_of(guard.name)
            key = f"new-{preset}-{guard.name}"
            if st.checkbox(label, value=True, key=key, width=150):
                kept.add(guard.name)
            if guard.kind not in MARGINS:
                continue
            name, unit, says = MARGINS[guard.kind]
            set_to = st.number_input(
                says, 0.0, value=float(unit * tree[name]), format="%.3g", key=f"{key}-margin",
                label_visibility="collapsed", width=130, disabled=guard.name not in kept,
            )  # fmt: skip
            st.caption(says)
            if abs(set_to - unit * tree[name]) > 1e-9:
                margins[guard.name] = set_to
    return frozenset(kept), margins


def _buttons(version: int, made: RolloutSpec | None, serving: ledger.Serving) -> None:
    busy = serving.rollout
    if busy is not None:
        st.caption(f"Rollout {busy.id} of v{busy.canary} is at work, and one runs at a time: write this one down.")
    with st.container(horizontal=True):
        st.button(
            f"Start v{version}", key="new-start", type="primary", icon=":material/play_arrow:",
            disabled=made is None or busy is not None, on_click=_write, args=(version, made, False),
        )  # fmt: skip
        st.button(
            "Write down as a draft", key="new-draft", icon=":material/edit_note:", disabled=made is None,
            on_click=_write, args=(version, made, True),
        )  # fmt: skip
        st.button(
            "Dry run", key="new-dry-run", icon=":material/science:", disabled=made is None, on_click=rehearsal.ask,
            args=(specs.spec_hash(made) if made is not None else "",),
            help="What these guards would have done on past traffic: false alarms, and what each needs to decide",
        )  # fmt: skip
        st.button("Cancel", key="new-cancel", on_click=_close)
    if not is_asking():
        st.rerun()


def _write(version: int, made: RolloutSpec, draft: bool) -> None:
    """Runs before anything is drawn again. A second press finds the dialog closed and writes nothing."""
    if not is_asking():
        return
    st.session_state["problem"] = None
    try:
        rollout = ledger.launch(version, made, draft)
        st.toast(f"Rollout {rollout.id} of v{version} is {'a draft' if draft else 'ready to start'}.")
    except SlipstreamError as error:
        st.session_state["problem"] = str(error)
    _close()
