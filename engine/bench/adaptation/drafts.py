"""Neural drafts in the benchmark: the one all arms start from, and what a draft says of a response, computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.contracts import ProposerKind
from engine.learner.memory import MIN_CONFIDENCE
from engine.learner.traces import ServedTarget
from engine.model.draft import DraftNetwork
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.memory_build import MAX_ORDER, MIN_ORDER, write_memory
from engine.speculation.neural_file import draft_files
from engine.speculation.rehearsal import Rehearsal, rehearse


class Rehearsals:
    """``rehearse``, remembered by the draft's weights and the response: arms and seeds ask again and again.

    What ``keep`` names is kept in ``folder`` as well, as it comes, so that a run which was cut off goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str, str], Rehearsal] = {}
        self._names: dict[int, tuple[DraftNetwork, str]] = {}  # by id; the network itself keeps the id taken
        self._kept: str | None = None

    def keep(self, network: DraftNetwork) -> None:
        self._kept = self._name(network)
        if (path := self._path(self._kept)).is_file():
            for line in path.read_text().splitlines():
                key, tokens, chances = json.loads(line)
                self._known[self._kept, key] = Rehearsal(tokens, chances)

    def __call__(
        self, network: DraftNetwork, prompt_ids: Sequence[int], output_ids: Sequence[int], k: int
    ) -> Rehearsal:
        name = self._name(network)
        key = hashlib.sha256(json.dumps([list(prompt_ids), list(output_ids), k]).encode()).hexdigest()[:32]
        if (name, key) not in self._known:
            made = self._known[name, key] = rehearse(network, prompt_ids, output_ids, k)
            if name == self._kept:
                with self._path(name).open("a") as file:
                    file.write(json.dumps([key, made.tokens, made.chances]) + "\n")
        return self._known[name, key]

    def _path(self, name: str) -> Path:
        return self.folder / f"rehearsals-{name[:16]}.jsonl"

    def _name(self, network: DraftNetwork) -> str:
        if id(network) not in self._names:
            digest = hashlib.sha256(str(network.target.dtype).encode())
            for name in sorted(network.weights):
                digest.update(network.weights[name].detach().contiguous().numpy().tobytes())
            self._names = {**dict(list(self._names.items())[-15:]), id(network): (network, digest.hexdigest())}
        return self._names[id(network)][1]


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
