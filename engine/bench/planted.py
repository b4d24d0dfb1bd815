"""Policies that are at fault on purpose, and an engine process that can load them: for `slipstream bench faults` alone.

Such a policy says it is an ngram policy with a setting ``fault``. Every other engine refuses that setting, so nothing
of this can be served by mistake, and nothing that serves knows of faults: they are planted in this process only.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from unittest import mock

from engine.contracts import ProposerKind
from engine.runner.engine import Engine, EngineRequest
from engine.server.main import serve
from engine.settings import load_settings
from engine.speculation import artifact
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.ngram import NgramDrafter
from engine.speculation.proposer import Drafter, Loader, Proposer, loaders

SLOW_S = 0.1
"""What a slow draft takes for each proposal, seconds."""
SAYS = "planted fault"
"""In the error of every request that fails by intention."""
K = 4


class Fault(StrEnum):
    """slow: each proposal takes long. garbage: none of its tokens is likely. throws: drafting raises. fails: the engine
    raises when it is given a request of this policy."""

    SLOW = "slow"
    GARBAGE = "garbage"
    THROWS = "throws"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Planted:
    """A resident policy with a fault."""

    fault: Fault
    num_speculative_tokens: int
    control: ControlSettings = DEFAULT_CONTROL
    kind: ProposerKind = ProposerKind.NGRAM
    sleep: Callable[[float], None] = time.sleep

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Drafter:
        return _Drafter(NgramDrafter(prompt_ids, 2, 4), self)


class _Drafter:
    """Prompt lookup, but for the fault."""

    def __init__(self, sound: NgramDrafter, policy: Planted) -> None:
        self._sound, self._policy = sound, policy
        self.confidence: Sequence[float] = ()

    def propose(self, k: int) -> list[int]:
        if self._policy.fault is Fault.THROWS:
            raise RuntimeError(SAYS)
        if self._policy.fault is Fault.GARBAGE:
            last = self._sound.index.tokens[-1]
            return [(last + 97 * (place + 1)) % 256 for place in range(k)]  # every vocabulary has so many
        if self._policy.fault is Fault.SLOW:
            self._policy.sleep(SLOW_S)
        return self._sound.propose(k)

    def observe(self, tokens: Sequence[int]) -> None:
        self._sound.observe(tokens)


def files(fault: Fault) -> dict[str, bytes]:
    """The artifact of a policy with this fault. Its K control is off: it never stops by itself."""
    with planted():
        return artifact.build_artifact(
            ProposerKind.NGRAM, K, settings={"fault": fault.value}, control={"enabled": False}
        )


@contextmanager
def planted() -> Iterator[None]:
    """While it lasts, this process loads policies with faults, and its engines fail where those say so."""
    sound_load, sound_add, failing = Engine.load, Engine.add, set[int]()

    def load(engine: Engine, version: int, proposer: Proposer) -> None:
        sound_load(engine, version, proposer)
        if isinstance(proposer, Planted) and proposer.fault is Fault.FAILS:
            failing.add(version)

    def add(engine: Engine, request: EngineRequest) -> None:
        if request.policy_version in failing:
            raise RuntimeError(SAYS)
        sound_add(engine, request)

    with (
        mock.patch.object(artifact, "loaders", _loaders),
        mock.patch.object(Engine, "load", load),
        mock.patch.object(Engine, "add", add),
    ):
        yield


def _loaders() -> dict[ProposerKind, Loader]:
    known = loaders()
    sound = known[ProposerKind.NGRAM]

    def load(num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> Proposer:
        if "fault" not in settings:
            return sound(num_speculative_tokens, settings, files)
        return Planted(Fault(settings["fault"]), num_speculative_tokens)

    return {**known, ProposerKind.NGRAM: load}


def main() -> None:
    """`python -m engine.bench.planted`: one replica that can load them, with the settings of its environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    with planted():
        serve(load_settings())


if __name__ == "__main__":
    main()
