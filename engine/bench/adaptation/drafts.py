"""Neural drafts in the benchmark: the one all arms start from, what it says of a response, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from engine.bench.adaptation.streams import Response
from engine.bench.kept import kept_lines
from engine.contracts import ProposerKind, SpecCounts
from engine.learner.target_replay import TargetReplayer
from engine.learner.traces import ServedTarget
from engine.model.draft import DraftNetwork
from engine.speculation.artifact import build_artifact
from engine.speculation.control import KController
from engine.speculation.hybrid import BoundHybrid
from engine.speculation.memory import MEMORY_FILE, MIN_CONFIDENCE
from engine.speculation.memory_build import MAX_ORDER, MIN_ORDER, write_memory
from engine.speculation.neural import BoundNeural
from engine.speculation.neural_file import draft_files
from engine.speculation.proposer import Proposer
from engine.speculation.rehearsal import Rehearsal, Rehearsals, rehearse
from engine.store.repositories.intake import TrainableTrace


class KeptRehearsals(Rehearsals):
    """All of them, for arms and seeds ask again and again; what arms pay for them is charged by ``Charged``.

    What ``keep`` names is kept in ``folder`` as well, as it comes, so that a run which was cut off goes on.
    """

    def __init__(self, folder: Path, cpu: Callable[[], float]) -> None:
        super().__init__(most=1_000_000)
        self.folder, self.cpu = folder, cpu
        self.seconds = 0.0  # CPU time that making them took in this run, whoever asked first
        self._kept: str | None = None

    def keep(self, network: DraftNetwork) -> None:
        self._kept = self.name(network)
        for key, tokens, chances in kept_lines(self._path(self._kept)):
            self.known[self._kept, key] = Rehearsal(tokens, chances)

    def make(
        self, key: tuple[str, str], network: DraftNetwork, prompt_ids: Sequence[int], output_ids: Sequence[int],
        k: int, min_survival: float,
    ) -> Rehearsal:  # fmt: skip
        began = self.cpu()
        made = super().make(key, network, prompt_ids, output_ids, k, min_survival)
        self.seconds += self.cpu() - began
        if key[0] == self._kept:
            with self._path(key[0]).open("a") as file:
                file.write(json.dumps([key[1], made.tokens, made.chances]) + "\n")
        return made

    def _path(self, name: str) -> Path:
        return self.folder / f"rehearsals-{name[:16]}.jsonl"


class Charged:
    """The gate's replay for one arm, and what it owes for it.

    As in the learner: a held-out request goes through the target once for every draft, whoever has computed it here
    before, and is remembered from then on. ``owed``: seconds, at ``token_s`` a token of prompt and response.
    """

    def __init__(self, replayer: TargetReplayer, rehearsals: KeptRehearsals, token_s: float) -> None:
        self._replayer, self._rehearsals, self._token_s = replayer, rehearsals, token_s
        self._paid: set[tuple[str, int]] = set()
        self.owed = 0.0

    def __call__(
        self, proposer: Proposer, trace: TrainableTrace, controller: KController | None
    ) -> tuple[SpecCounts, float]:
        bound, _ = self._replayer.bound(proposer)
        if isinstance(bound, BoundNeural | BoundHybrid):
            key = (self._rehearsals.name(bound.pool.network), trace.ordinal)
            if key not in self._paid:
                self._paid.add(key)
                self.owed += self._token_s * (len(trace.prompt_ids) + len(trace.output_ids))
        return self._replayer(proposer, trace, controller)


def rehearsal_token_s(
    network: DraftNetwork, responses: Sequence[Response], k: int, min_survival: float, cpu: Callable[[], float]
) -> float:
    """Seconds that a rehearsal takes per token of prompt and response, the median over these responses."""
    took = []
    for r in responses:
        began = cpu()
        rehearse(network, r.prompt_ids, r.output_ids, k, min_survival)
        took.append((cpu() - began) / (len(r.prompt_ids) + len(r.output_ids)))
    return median(took[1:])  # the first one warms up


def beside_own_context(
    policy: Mapping[str, bytes], target: ServedTarget, num_speculative_tokens: int
) -> dict[str, bytes]:
    """The same draft where the request's own context is silent: a hybrid whose memory is empty and stays so."""
    return build_artifact(
        ProposerKind.HYBRID,
        num_speculative_tokens,
        settings={"min_n": MIN_ORDER, "max_n": MAX_ORDER, "min_confidence": MIN_CONFIDENCE},
        files={MEMORY_FILE: write_memory({}, 0), **draft_files(policy)},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
    )
