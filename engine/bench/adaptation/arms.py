"""The arms: what each drafts with, and how the adaptive ones learn while the stream runs.

They learn with the learner's own parts (split, recipe, soundness, gate); only the database and the rollout are left
out, so a version that passes its gate serves from the next request on. Learning is charged by its CPU seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.adaptation.streams import Response
from engine.bench.adaptation.world import Traffic, World
from engine.contracts import SpecCounts
from engine.learner import gate
from engine.learner.looks import Look, due, unspent
from engine.learner.memory import MemoryLearner, MemoryRecipe, build_memory
from engine.learner.neural import build_hybrid
from engine.learner.traces import MAX_HELD_OUT
from engine.speculation.artifact import read_manifest
from engine.speculation.control import KController
from engine.speculation.neural_file import draft_files
from engine.speculation.proposer import PolicyError, Proposer
from engine.speculation.replay import replay_controlled
from engine.speculation.step_costs import StepCosts
from engine.store.repositories.intake import TrainableTrace

Saboteur = Callable[[dict[str, bytes]], Iterable[tuple[str, dict[str, bytes]]]]
"""(way, bad version) of a good candidate, in the order in which they are offered."""


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


@dataclass(frozen=True, slots=True)
class Attempt:
    """``at``: requests served before it; ``version``: what is served since, None where it was refused. ``gate_s``: CPU
    seconds of the gate, ``learn_s`` of making the candidate. ``planted``: in which way it was bad on purpose;
    ``loads``: whether an engine would have taken it, gate or no gate."""

    at: int
    version: int | None
    reason: str
    learn_s: float = 0.0
    gate_s: float = 0.0
    planted: str = ""
    loads: bool = True


class AdaptiveArm(Arm):
    """Learns ``every_requests`` requests after its last attempt or later, as soon as its gate has enough to judge on.
    Without a gate, whatever loads is served."""

    def __init__(self, name: str, world: World, start: Proposer, corpus: Sequence[Response], gated: bool) -> None:
        super().__init__(name, world, start)
        self.gated, self.seen = gated, 0
        self.traffic, self.memory = Traffic(world.settings.gate_share), MemoryLearner()
        self.rng = np.random.default_rng(world.seed)
        for response in corpus:
            self.traffic.take(response, world.max_tokens, teach=True)
        if self.traffic.train:
            self.memory.learn(self.traffic.train, MemoryRecipe.of(world.settings))  # counted offline: not charged
        self.served: dict[int, Proposer] = {1: start}
        self.attempts: list[Attempt] = []
        self.draft = world.neural.draft if world.neural is not None else None
        self.saboteur: Saboteur | None = None
        self._passed = self._attempted = self._due = 0
        self._looks: list[Look] = []
        self._charged = world.charged()

    def learn(self, response: Response) -> float:
        world, began = self.world, self._spent()
        self.traffic.take(response, world.max_tokens)
        self.seen += 1
        if self.seen - self._attempted < world.settings.every_requests or not self.traffic.train:
            return 0.0
        last_look = unspent(self._passed, self._looks)[1]
        if self.gated and not due([trace.ordinal for trace in self.fresh], last_look):
            return 0.0
        self._attempted = self.seen
        files = self._candidate()
        made = self._spent()
        if self._spoiled(files):
            return made - began
        reason, passed = "not gated", True
        if self.gated:
            report, look = self.judge(files, self._charged), Look(self.traffic.ordinal, len(self.fresh))
            reason, passed = "; ".join(report.reasons), report.passed
            if passed:
                self._passed, self._looks = look.through, []
            elif report.overall is not None:
                self._looks.append(look)
        if passed:
            self._take(files)
        ended = self._spent()
        self.attempts.append(Attempt(self.seen, self.version if passed else None, reason, made - began, ended - made))
        return ended - began

    def _take(self, files: dict[str, bytes]) -> None:
        """Serve it from the next request on."""
        self.proposer, self.version = self.world.load(files), self.version + 1
        self.draft = draft_files(files) if self.draft is not None else None
        self.served[self.version] = self.proposer

    def _spoiled(self, good: dict[str, bytes]) -> bool:
        """Whether this candidate, as every other one, was bad on purpose: all kinds of bad are offered in its place,
        and without a gate the first that loads is served. What the gate takes for them is not charged.

        The first policy of its kind is left alone: what is bad for its successors may be better than what was there.
        """
        if self.saboteur is None or self.proposer.kind != read_manifest(good).kind:
            return False
        self._due += 1
        if self._due % 2:
            return False
        for kind, files in self.saboteur(good):
            loading = self._loads(files)
            report = self.judge(files, self.world.replayer) if self.gated else loading
            if report.passed:
                self._take(files)
            version = self.version if report.passed else None
            reason = "; ".join(report.reasons)
            self.attempts.append(Attempt(self.seen, version, reason, planted=kind, loads=loading.passed))
            if report.passed and not self.gated:
                break
        return True

    def _loads(self, files: dict[str, bytes]) -> gate.GateReport:
        try:
            self.world.load(files)
        except PolicyError as error:
            return gate.GateReport(False, (f"it does not load: {error}",))
        return gate.GateReport(True, ("not gated",))

    def _candidate(self) -> dict[str, bytes]:
        world, train = self.world, self.traffic.train
        if self.draft is None or world.neural is None:
            return build_memory(train, world.target, world.settings, learner=self.memory)
        draft = self.draft
        own = sum(not a.planted for a in self.attempts)  # what was planted does not count
        if (own + 1) % world.neural.tune_every == 0:
            draft = world.tuned(draft, train)
        return build_hybrid(train, world.target, world.settings, draft, {}, learner=self.memory)

    @property
    def fresh(self) -> list[TrainableTrace]:
        """Held-out requests that may still judge."""
        since, _ = unspent(self._passed, self._looks)
        return [trace for trace in self.traffic.held_out if trace.ordinal > since][-MAX_HELD_OUT:]

    def _spent(self) -> float:
        """CPU seconds so far; rehearsals count what they cost this arm, not what they took here."""
        neural, charged = self.world.neural, self._charged
        rehearsed = charged.owed - neural.rehearsals.seconds if neural is not None and charged is not None else 0.0
        return self.world.cpu() + rehearsed

    def judge(self, files: dict[str, bytes], replayer: gate.Replayer | None) -> gate.GateReport:
        """What the gate says of a candidate now."""
        world = self.world
        return gate.examine(
            files,
            self.proposer,
            self.fresh,
            world.target,
            world.settings.worst_class_drop,
            self.rng,
            replayer=replayer,
        )


def offline(
    world: World,
    corpus: Sequence[Response],
    taught: Sequence[Response] = (),
    learner: MemoryLearner | None = None,
    after: int = 0,
) -> Proposer:
    """The policy that learning from all of these at once gives, its draft tuned on ``taught`` where arms tune theirs.

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
    draft = world.neural.draft
    if taught:
        draft = world.tuned(draft, traffic.train[len(corpus) :])
    return world.load(build_hybrid(traffic.train, world.target, world.settings, draft, {}, learner=learner))
