"""A response token by token: where each came from, and what was drafted in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from engine.store.models import TracePayloadRow

Origin = Literal["prefill", "accepted", "recovered", "bonus", "plain", "rejected"]
TITLES: dict[Origin, str] = {
    "prefill": "first token, from the prefill",
    "accepted": "accepted: drafted and kept by the target",
    "recovered": "recovered: the target's own token after a rejection",
    "bonus": "bonus: the target's own token after a draft that was accepted whole",
    "plain": "plain: a step in which nothing was drafted",
    "rejected": "rejected: drafted and not kept",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One token, where it came from, and in which verify step (0 is the prefill)."""

    token: int
    origin: Origin
    step: int


def marks(payload: TracePayloadRow) -> list[Mark]:
    """Every emitted token in order, each step's rejected drafts behind what it emitted."""
    output, proposed = list(payload.output_ids), list(payload.proposed)
    made = [Mark(output[0], "prefill", 0)] if output else []
    at, drafted_at = 1, 0
    steps = zip(payload.step_drafted, payload.step_accepted, payload.step_emitted, strict=True)
    for number, (drafted, accepted, emitted) in enumerate(steps, start=1):
        kept = min(accepted, emitted)
        made += [Mark(token, "accepted", number) for token in output[at : at + kept]]
        own: Origin = "plain" if drafted == 0 else "bonus" if accepted == drafted else "recovered"
        made += [Mark(token, own, number) for token in output[at + kept : at + emitted]]
        draft = proposed[drafted_at : drafted_at + drafted]
        made += [Mark(token, "rejected", number) for token in draft[accepted:]]
        at += emitted
        drafted_at += drafted
    return made


def html(found: Sequence[Mark], pieces: Callable[[list[int]], list[str]], colours: dict[Origin, str]) -> str:
    """The response as text with each token's background saying where it came from."""
    spans = []
    for mark, text in zip(found, pieces([mark.token for mark in found]), strict=True):
        struck = "text-decoration:line-through;opacity:.65;" if mark.origin == "rejected" else ""
        newline = "⏎" if mark.origin == "rejected" else "⏎<br>"  # what was not kept broke no line
        shown = escape(text).replace("\n", newline) if text.strip(" ") else escape(text).replace(" ", "&nbsp;")
        spans.append(
            f'<span title="step {mark.step}: {TITLES[mark.origin]}" '
            f'style="background:{colours[mark.origin]};border-radius:3px;padding:1px 1px;{struck}">{shown}</span>'
        )
    return f'<div style="line-height:1.9;white-space:pre-wrap;font-size:0.95rem">{"".join(spans)}</div>'


def legend(colours: dict[Origin, str], counts: dict[Origin, int]) -> str:
    items = [
        f'<span style="background:{colours[origin]};border-radius:3px;padding:1px 6px;margin-right:8px">'
        f"{origin} {counts[origin]}</span>"
        for origin in TITLES
        if counts.get(origin)
    ]
    return f'<div style="font-size:0.85rem;margin-bottom:.4rem">{"".join(items)}</div>'
