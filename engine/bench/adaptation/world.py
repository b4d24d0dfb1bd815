"""What all arms share: the target and its prices, the draft they start from, and how traffic is split."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.bench.adaptation.drafts import Charged, KeptRehearsals
from engine.bench.adaptation.streams import Response
from engine.bench.workload import trace
from engine.contracts import artifact_digest
from engine.learner import gate
from engine.learner.neural import TuneRecipe, tune
from engine.learner.target_replay import TargetReplayer
from engine.learner.traces import ServedTarget, is_held_out, request_hash
from engine.model.llama import Llama
from engine.settings import LearnerSettings
from engine.speculation.artifact import load_proposer
from engine.speculation.neural_file import unpack
from engine.speculation.proposer import Proposer
from engine.store.repositories.intake import TrainableTrace

OVERSHOT_REQUESTS = 16
"""Requests on which a draft is spoiled where arms tune none."""


@dataclass(frozen=True, slots=True)
class NeuralPart:
    """``model``: the target that drafts are trained beside. ``draft``: the files of the draft that hybrids start with,
    tuned on ``learner.tune_requests`` requests with every ``tune_every``-th candidate. ``token_s``: what a rehearsal
    costs per token of its request, CPU seconds."""

    model: Llama
    replayer: TargetReplayer
    rehearsals: KeptRehearsals
    token_s: float
    draft: dict[str, bytes]
    tune_every: int


@dataclass(frozen=True, slots=True)
class World:
    """What all arms share. ``cpu``: CPU seconds of this process. ``neural``: there when static is a neural draft."""

    target: ServedTarget
    settings: LearnerSettings
    max_tokens: int
    seed: int
    cpu: Callable[[], float] = time.process_time
    neural: NeuralPart | None = None

    @property
    def replayer(self) -> gate.Replayer | None:
        return self.neural.replayer if self.neural is not None else None

    def charged(self) -> Charged | None:
        """The same for one arm, which pays for what it has replayed."""
        n = self.neural
        return Charged(n.replayer, n.rehearsals, n.token_s) if n is not None else None

    def bound(self, proposer: Proposer) -> tuple[Proposer, float]:
        """What is replayed for a policy, and the seconds that one pass of its draft costs."""
        return self.neural.replayer.bound(proposer) if self.neural is not None else (proposer, 0.0)

    def tuned(self, draft: dict[str, bytes], train: Sequence[TrainableTrace]) -> dict[str, bytes]:
        """A draft after one pass over ``learner.tune_requests`` of these traces; as it is where that is 0."""
        if self.neural is None or not self.settings.tune_requests:
            return draft
        return tune(self.neural.model, unpack(draft), train, TuneRecipe(requests=self.settings.tune_requests))[0]

    def overshot(self, draft: dict[str, bytes], train: Sequence[TrainableTrace]) -> dict[str, bytes]:
        """A draft after one pass at a hundred times the learning rate; TrainingDiverged where that is too much."""
        assert self.neural is not None
        recipe = TuneRecipe(requests=self.settings.tune_requests or OVERSHOT_REQUESTS)
        return tune(self.neural.model, unpack(draft), train, replace(recipe, lr=100 * recipe.lr))[0]

    def load(self, files: dict[str, bytes]) -> Proposer:
        return load_proposer(files, artifact_digest(files), self.target.fingerprint, self.target.tokenizer_fingerprint)


@dataclass(slots=True)
class Traffic:
    """What the learner has taken in: the offline corpus first, then the stream as it comes."""

    share: float
    train: list[TrainableTrace] = field(default_factory=list)
    held_out: list[TrainableTrace] = field(default_factory=list)
    positions: dict[tuple[str, bool], int] = field(default_factory=dict)
    ordinal: int = 0

    def take(self, response: Response, max_tokens: int, teach: bool = False) -> None:
        """``teach`` puts it on the training side whatever its hash says: the corpus never judges."""
        held = not teach and is_held_out(request_hash(response.prompt_ids), self.share)
        place = (response.traffic_class, held)
        self.positions[place] = self.positions.get(place, 0) + 1
        self.ordinal += 1
        made = trace(
            self.ordinal,
            response.traffic_class,
            self.positions[place],
            response.prompt_ids,
            response.output_ids,
            max_tokens,
        )
        (self.held_out if held else self.train).append(made)
