"""Plain decoding: drafts nothing, is always correct, is what everything falls back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.contracts import ProposerKind
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.proposer import Drafter, no_files, read_settings


class NoDraft:
    confidence: Sequence[float] = ()

    def propose(self, k: int) -> list[int]:
        return []

    def observe(self, tokens: Sequence[int]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class NoneProposer:
    kind: ProposerKind = ProposerKind.NONE
    num_speculative_tokens: int = 0
    control: ControlSettings = DEFAULT_CONTROL

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Drafter:
        return NoDraft()


def load(num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> NoneProposer:
    read_settings(ProposerKind.NONE, settings, {})
    no_files(ProposerKind.NONE, files)
    return NoneProposer()
