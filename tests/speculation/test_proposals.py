"""What a proposer may say: anything else costs its draft, before K control reckons with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.speculation.proposer import checked

NAN = float("nan")


def test_tokens_with_or_without_confidence_pass() -> None:
    assert checked(SimpleNamespace(confidence=[0.0, 1.0]), 3, [1, 9], 10) == [1, 9]  # type: ignore[arg-type]
    assert checked(SimpleNamespace(confidence=[]), 3, [1, 9], 10) == [1, 9]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "confidence"),
    [([1, 2, 3], []), ([10], []), ([-1], []), ([1, 2], [0.5]), ([1], [NAN]), ([1], [1.5]), ([1], [-0.1])],
)
def test_what_cannot_be_verified_or_reckoned_with_is_refused(tokens: list[int], confidence: list[float]) -> None:
    with pytest.raises(ValueError, match="proposed"):
        checked(SimpleNamespace(confidence=confidence), 2, tokens, 10)  # type: ignore[arg-type]
