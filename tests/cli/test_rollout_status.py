"""The exit code of `slipstream rollout status` and `watch` says how a rollout ended."""

from __future__ import annotations

import pytest
import typer

from engine.cli import rollout_record
from engine.contracts import TERMINAL_STATES, RolloutState


@pytest.mark.parametrize("state", list(RolloutState))
def test_only_a_rollout_that_ended_well_is_a_success(state: RolloutState) -> None:
    code = 0
    try:
        rollout_record._leave(state)
    except typer.Exit as left:
        code = left.exit_code
    assert code == (0 if state is RolloutState.DONE else 1 if state in TERMINAL_STATES else 2)
