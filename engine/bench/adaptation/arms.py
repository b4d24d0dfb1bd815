"""The arms: what each drafts with, and how the adaptive ones learn while the stream runs.

They learn with the learner's own parts (split, recipe, soundness, gate); only the database and the rollout are left
out, so a version that passes its gate serves from the next request on. Learning is charged by its CPU seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import numpy as np

from engine.bench.adaptation.streams import Response
from engine.contracts import SpecCounts, artifact_digest
from engine.learner import gate
from engine.learner.memory import MemoryLearner, MemoryRecipe, build_memory
from engine.learner.neural import TargetReplayer, TuneRecipe, build_hybrid, tune
from engine.learner.traces import ServedTarget, is_held_out, request_hash
from engine.model.llama import Llama
from engine.settings import LearnerSettings
from engine.speculation.artifact import load_proposer
from engine.speculation.control import KController
from engine.speculation.neural_file import draft_files, unpack
from engine.speculation.proposer import Proposer
from engine.speculation.replay import replay_controlled
from engine.speculation.step_costs import StepCosts
from engine.store.repositories.intake import TrainableTrace

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class NeuralPart:
    """``draft``: the files of the draft that hybrids start with. Tuned on ``learner.tune_requests`` requests with every
    ``tune_every``-th candidate."""

    model: Llama
    replayer: TargetReplayer
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

    def bound(self, proposer: Proposer) -> tuple[Proposer, float]:
        """What is replayed for a policy, and the seconds that one pass of its draft costs."""
        return self.neural.replayer.bound(proposer) if self.neural is not None else (proposer, 0.0)

    def load(self, files: dict[str, bytes]) -> Proposer:
        return load_proposer(files, artifact_digest(files), self.target.fingerprint, self.target.tokenizer_fingerprint)


@dataclass(frozen=True, slots=True)
class Served:
    """One request under one arm: its counts, seconds of target passes by the profile, CPU seconds learnt after it."""

    traffic_class: str
    version: int
    counts: SpecCounts
    decode_s: float
    learn_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.counts.steps + self.counts.accepted


class Arm:
    """A policy that never changes."""

    def __init__(self, name: str, world: World, proposer: Proposer) -> None:
        self.name, self.world, self.proposer, self.version = name, world, proposer, 1
        self.controller = KController(StepCosts({n: ms / 1e3 for n, ms in world.target.step_cost_ms.items()}))

    def serve(self, response: Response) -> Served:
        proposer, pass_s = self.world.bound(self.proposer)
        counts, seconds = replay_controlled(
            proposer,
            self.controller,
            self.version,
            response.traffic_class,
            response.prompt_ids,
            response.output_ids,
            self.world.max_tokens,
            pass_s,
        )
        return Served(response.traffic_class, self.version, counts, seconds, self.learn(response))

    def learn(self, response: Response) -> float:
        return 0.0


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
        trace = TrainableTrace(
            self.ordinal,
            UUID(int=self.ordinal),
            START + timedelta(seconds=self.ordinal),
            response.traffic_class,
            self.positions[place],
            response.prompt_ids,
            response.output_ids,
            max_tokens,
        )
        (self.held_out if held else self.train).append(trace)


@dataclass(frozen=True, slots=True)
class Attempt:
    """``at``: requests served before it. ``gate_s``: CPU seconds of the gate, ``learn_s`` of making the candidate."""

    at: int
    version: int | None
    reason: str
    learn_s: float
    gate_s: float


class AdaptiveArm(Arm):
    """Learns after every ``every_requests`` requests. Without its gate, whatever loads is served."""

    def __init__(self, name: str, world: World, start: Proposer, corpus: Sequence[Response], gated: bool) -> None:
        super().__init__(name, world, start)
        self.gated, self.seen = gated, 0
        self.traffic, self.memory = Traffic(world.settings.gate_share), MemoryLearner()
        self.rng = np.random.default_rng(world.seed)
        for response in corpus:
            self.traffic.take(response, world.max_tokens, teach=True)
        if self.traffic.train:
            self.memory.learn(self.traffic.train, _recipe(world))  # counted offline: not charged
        self.served: dict[int, Proposer] = {1: start}
        self.attempts: list[Attempt] = []
        self.files: dict[str, bytes] = {}
        self.draft = world.neural.draft if world.neural is not None else None
        self.on_candidate: Callable[[dict[str, bytes]], None] | None = None
        self._judged = self._looked = 0

    def learn(self, response: Response) -> float:
        world, began = self.world, self.world.cpu()
        self.traffic.take(response, world.max_tokens)
        self.seen += 1
        fresh = self.fresh
        if self.seen % world.settings.every_requests or not self.traffic.train:
            return 0.0
        if self.gated and len(fresh) < gate.MIN_HELD_OUT:
            return 0.0
        files = self._candidate()
        made = world.cpu()
        reason, passed = "not gated", True
        if self.gated:
            if self.on_candidate is not None:
                self.on_candidate(files)
                began, made = began + world.cpu() - made, world.cpu()  # not this arm's doing
            report = self.judge(files)
            reason, passed = "; ".join(report.reasons), report.passed
            self._looked = 0 if passed else self._looked + (report.overall is not None)
            if passed or self._looked == gate.MAX_LOOKS:  # these requests are spent
                self._judged, self._looked = fresh[-1].ordinal, 0
        if passed:
            self.version += 1
            self.proposer, self.files = world.load(files), files
            self.draft = draft_files(files) if self.draft is not None else None
            self.served[self.version] = self.proposer
        ended = world.cpu()
        self.attempts.append(Attempt(self.seen, self.version if passed else None, reason, made - began, ended - made))
        return ended - began

    def _candidate(self) -> dict[str, bytes]:
        world, train = self.world, self.traffic.train
        if self.draft is None or world.neural is None:
            return build_memory(train, world.target, world.settings, learner=self.memory)
        draft, neural = self.draft, world.neural
        if world.settings.tune_requests and (len(self.attempts) + 1) % neural.tune_every == 0:
            recipe = TuneRecipe(requests=world.settings.tune_requests)
            draft, _ = tune(neural.model, unpack(draft), train, recipe)
        return build_hybrid(train, world.target, world.settings, draft, {}, learner=self.memory)

    @property
    def fresh(self) -> list[TrainableTrace]:
        """Held-out requests on which no version has passed yet."""
        return [trace for trace in self.traffic.held_out if trace.ordinal > self._judged]

    def judge(self, files: dict[str, bytes]) -> gate.GateReport:
        """What the gate says of a candidate now."""
        world = self.world
        return gate.examine(
            files,
            self.proposer,
            self.fresh,
            world.target,
            world.settings.worst_class_drop,
            self.rng,
            gate.level(self._looked),
            world.replayer,
        )


def offline(
    world: World,
    corpus: Sequence[Response],
    taught: Sequence[Response] = (),
    learner: MemoryLearner | None = None,
    after: int = 0,
) -> Proposer:
    """The policy that learning from all of these at once gives.

    ``learner`` remembers what it has counted by ordinal: ``after`` gives ``taught`` ordinals that no other call gave.
    """
    traffic = Traffic(0.5)
    for response in corpus:
        traffic.take(response, world.max_tokens, teach=True)
    traffic.ordinal += after
    for response in taught:
        traffic.take(response, world.max_tokens, teach=True)
    if world.neural is None:
        return world.load(build_memory(traffic.train, world.target, world.settings, learner=learner))
    made = build_hybrid(traffic.train, world.target, world.settings, world.neural.draft, {}, learner=learner)
    return world.load(made)


def _recipe(world: World) -> MemoryRecipe:
    return MemoryRecipe.of(world.settings)
