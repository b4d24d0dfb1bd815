"""Where each token came from follows from the counts of the verify steps."""

from __future__ import annotations

from collections import Counter

from app.components.tokens import TITLES, html, marks
from engine.store.models import TracePayloadRow


def payload(**columns: list[int]) -> TracePayloadRow:
    return TracePayloadRow(**columns)


EXAMPLE = payload(
    output_ids=[10, 11, 12, 13, 14, 15, 16],
    proposed=[11, 12, 90, 14, 15],
    step_drafted=[3, 2, 0],
    step_accepted=[2, 1, 0],
    step_emitted=[3, 2, 1],
)


def test_every_token_is_told_apart() -> None:
    found = [(m.token, m.origin, m.step) for m in marks(EXAMPLE)]
    assert found == [
        (10, "prefill", 0),
        (11, "accepted", 1),
        (12, "accepted", 1),
        (13, "recovered", 1),
        (90, "rejected", 1),
        (14, "accepted", 2),
        (15, "recovered", 2),
        (15, "rejected", 2),
        (16, "plain", 3),
    ]


def test_emitted_tokens_are_the_output_in_order() -> None:
    emitted = [m.token for m in marks(EXAMPLE) if m.origin != "rejected"]
    assert emitted == EXAMPLE.output_ids
    assert Counter(m.origin for m in marks(EXAMPLE))["rejected"] == sum(EXAMPLE.step_drafted) - sum(
        EXAMPLE.step_accepted
    )


def test_a_whole_draft_gives_a_bonus() -> None:
    row = payload(output_ids=[1, 2, 3], proposed=[2], step_drafted=[1], step_accepted=[1], step_emitted=[2])
    assert [m.origin for m in marks(row)] == ["prefill", "accepted", "bonus"]


def test_a_step_cut_by_a_stop_has_no_token_of_its_own() -> None:
    row = payload(output_ids=[1, 2], proposed=[2], step_drafted=[1], step_accepted=[1], step_emitted=[1])
    assert [m.origin for m in marks(row)] == ["prefill", "accepted"]


def test_text_is_escaped() -> None:
    shown = html(marks(EXAMPLE), lambda ids: ["<script>"] * len(ids), dict.fromkeys(TITLES, "red"))
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_no_token_no_marks() -> None:
    assert marks(payload(output_ids=[], proposed=[], step_drafted=[], step_accepted=[], step_emitted=[])) == []
