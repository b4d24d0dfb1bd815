"""The form of a rollout: what it says is what is frozen, and what could not be taken back does not start."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import text as sql
from streamlit.testing.v1 import AppTest

from app.components.new_rollout import Wishes, specification
from app.queries import ledger
from engine.contracts import RolloutState
from engine.rollout import specs
from engine.rollout.guards import Latency, SpecError, TokensPerStep
from engine.store.database import Database
from engine.store.repositories import commands, rollouts
from tests.app.test_pages import confirmed, page


def wishes(preset: str = "standard", **changes: object) -> Wishes:
    start = specs.preset(preset)
    steps = ", ".join(f"{100 * step:g}" for step in start.steps)
    return replace(Wishes(preset, steps, start.min_requests), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", specs.PRESETS)
def test_a_preset_that_is_left_alone_keeps_its_hash(name: str) -> None:
    made = specification(wishes(name))
    assert specs.spec_hash(made) == specs.spec_hash(specs.preset(name))
    assert specs.read(specs.to_yaml(made), "the form") == made


@pytest.mark.parametrize(("asked", "frozen"), [(None, 200), (200, 200), (25, 25), (0, None)])
def test_a_shadow_comes_first_where_it_is_asked_for(asked: int | None, frozen: int | None) -> None:
    made = specification(wishes("cautious", shadow=asked))
    assert (made.shadow.requests if made.shadow is not None else None) == frozen
    assert (specs.spec_hash(made) == specs.spec_hash(specs.preset("cautious"))) == (frozen == 200)
    with pytest.raises(SpecError, match=r"shadow\.requests"):
        specification(wishes(shadow=-1))


def test_what_was_changed_is_what_is_frozen() -> None:
    made = specification(
        wishes(
            steps="5, 20%",
            min_requests=40,
            minutes={"soak_s": 2.5},
            traffic_classes=["code", "chat"],
            tenants="acme, , beta",
            slices="beta-testers",
            kept=frozenset({"tokens_per_step", "e2e_p95", "errors", "fuse_p95"}),
            margins={"tokens_per_step": 4.0, "e2e_p95": 12.0, "fuse_p95": 2.5},
        )
    )
    assert (made.steps, made.min_requests, made.soak_s, made.preset) == ((0.05, 0.2), 40, 150.0, "")
    assert made.limits() == ("chat", "code", "acme", "beta", "beta-testers")
    tokens, latency, errors, fuse = made.guards
    assert isinstance(tokens, TokensPerStep)
    assert isinstance(latency, Latency)
    assert (tokens.max_drop, latency.margin, errors.name, getattr(fuse, "ratio", None)) == (0.04, 0.12, "errors", 2.5)
    assert specs.read(specs.to_yaml(made), "the form") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "10, lots"}, "percentages by commas"),
        ({"steps": "10, 60"}, "at most 0.5"),
        ({"steps": ""}, "ascending weights"),
        ({"kept": frozenset()}, "without rollback conditions cannot start"),
        ({"kept": frozenset({"srm"})}, "without rollback conditions cannot start"),
        ({"kept": frozenset({"errors"})}, "needs a guard of kind tokens_per_step"),
        ({"minutes": {"deadline_s": 0.5}}, "deadline_s exceeds warmup_s"),
    ],
)
def test_what_cannot_be_says_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        specification(wishes(**change))


def newest(db: Database) -> rollouts.Rollout:
    with db.read() as session:
        return rollouts.list_rollouts(session)[0]


def ended(db: Database) -> None:
    with db.write() as session:
        session.execute(sql("UPDATE rollouts SET state = 'ROLLED_BACK' WHERE state = 'RAMPING'"))
    ledger.serving.clear()


def test_the_form_writes_what_it_shows(seeded: Database) -> None:
    ended(seeded)
    test = page("rollouts")
    test.button(key="new").click().run()
    test.text_input(key="new-standard-steps").set_value("20, 40")
    test.number_input(key="new-standard-shadow").set_value(30)
    test.number_input(key="new-standard-e2e_p95-margin").set_value(20.0)
    test.run()
    shown = next(block.value for block in test.code if "guards:" in block.value)
    test.button(key="new-start").click().run()
    assert not test.exception
    made = newest(seeded)
    assert (made.state, made.actor) == (RolloutState.READY, "dashboard")
    assert specs.parse(made.spec) == specs.read(shown, "the form")
    assert specs.parse(made.spec).steps == (0.2, 0.4)
    assert made.spec["shadow"] == {"requests": 30}
    assert made.spec_hash == specs.spec_hash(specs.read(shown, "the form"))


def test_nothing_starts_that_could_not_be_taken_back(seeded: Database) -> None:
    ended(seeded)
    before = newest(seeded)
    test = page("rollouts")
    test.button(key="new").click().run()
    for guard in specs.preset("standard").guards:
        test.checkbox(key=f"new-standard-{guard.name}").set_value(False)
    test.run()
    assert any("without rollback conditions cannot start" in error.value for error in test.error)
    assert test.button(key="new-start").disabled
    assert test.button(key="new-draft").disabled
    assert newest(seeded) == before


def test_a_draft_is_written_down_beside_a_rollout_at_work_started_and_cancelled(seeded: Database) -> None:
    test = page("rollouts")
    test.button(key="new").click().run()
    assert test.button(key="new-start").disabled
    test.button(key="new-draft").click().run()
    draft = newest(seeded)
    assert draft.state is RolloutState.DRAFT
    ended(seeded)
    test = page("rollouts")
    confirm_without_reason(test, f"begin-{draft.id}")
    assert newest(seeded).state is RolloutState.READY
    test = page("rollouts")
    confirmed(test, "abort", "wrong version")
    with seeded.read() as session:
        (asked,) = commands.asked(session, draft.id)
    assert (asked.verb, asked.reason, asked.actor) == ("abort", "wrong version", "dashboard")


def confirm_without_reason(test: AppTest, key: str) -> None:
    test.button(key=key).click().run()
    test.button(key="confirm").click().run()
    assert not test.exception
