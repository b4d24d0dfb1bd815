"""Policies side by side in one engine, on the same prompts, at several concurrencies, by traffic class.

Everything is interleaved: a block of prompts is served under every policy, in random order, before the next block. What
memories and hybrids know they have learned from other requests of the class. Peers are measured the same way
(``peers.py``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from engine.bench import clients, peers, telemetry_cost
from engine.bench.blocks import NONE, Block, Run, best_figure, rate_figures, ratio_figure, speculation_figures
from engine.bench.learned import Learned
from engine.bench.report import Figure, Report
from engine.bench.workload import Ids, Responses, Workload, workloads
from engine.contracts import ProposerKind, SamplingParams, SlipstreamError, artifact_digest
from engine.model.graphs import graphs_on, no_graphs_on
from engine.model.loading import Target, configured_target
from engine.ops.supervisor import Say
from engine.runner.engine import Engine, EngineRequest
from engine.runner.profile import profile_step_costs
from engine.settings import Settings
from engine.speculation.artifact import build_artifact, load_proposer, read_artifact
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import Proposer
from engine.speculation.step_costs import StepCosts

LEARN_AT = 16
"""Requests at a time while the responses to learn from are made."""


@dataclass(frozen=True, slots=True)
class Options:
    """``artifacts``: name → folder of a policy to measure beside the built-in ones. ``test``: prompts per class.

    ``draft``: folder of a neural policy that the policy ``hybrid`` starts from; None: the one of the project.
    """

    files: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()
    policies: tuple[str, ...] = (NONE, "ngram", "memory")
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    draft: Path | None = None
    concurrency: tuple[int, ...] = (1, 4, 16)
    peers: tuple[str, ...] = ()
    learn: int = 64
    test: int = 16
    tokens: int = 128
    longest: int = 1024
    repeats: int = 1
    telemetry: bool = True
    seed: int = 0

    def quick(self) -> Options:
        """A look rather than a measurement: a minute or two."""
        return replace(self, concurrency=self.concurrency[:2], learn=16, test=4, tokens=48, longest=256)


def run(settings: Settings, options: Options, say: Say) -> Report:
    if NONE not in options.policies:
        raise SlipstreamError("Ratios are taken over plain decoding: --policies must name none.")
    rng = np.random.default_rng(options.seed)
    target = configured_target(settings, say)
    work = workloads(target, options.files, options.classes, options.learn, options.test, options.longest, options.seed)
    bench = Bench(settings, target, options, say)
    figures: list[Figure] = []
    everything: dict[int, list[Block]] = {}
    beside_peers = options.peers and options.policies == (NONE,) and not options.artifacts
    for workload in work:  # all that is learned, before anything is measured
        bench.policies(workload)
    for workload in () if beside_peers else work:  # there plain decoding is measured
        of_class = bench.measure(workload)
        for concurrency, blocks in of_class.items():
            everything.setdefault(concurrency, []).extend(blocks)
            figures += _figures(workload.traffic_class, concurrency, blocks, rng)
        for policy in [name for name in bench.policies(workload) if name != NONE]:
            runs = [block[policy] for blocks in of_class.values() for block in blocks]
            figures += speculation_figures(f"{policy}:{workload.traffic_class}", runs, rng)
    for concurrency, blocks in everything.items():
        figures += rate_figures(f"{NONE}:all:c{concurrency}", [block[NONE] for block in blocks], rng)
    for peer in options.peers:
        figures += peers.measure(peer, settings, bench, work, rng)
    if options.telemetry:
        figures += telemetry_cost.measure(settings, target, work, options, rng, say)
    return Report("serving", options.seed, figures)


def _figures(name: str, concurrency: int, blocks: Sequence[Block], rng: np.random.Generator) -> list[Figure]:
    at = f"{name}:c{concurrency}"
    figures = [best_figure(f"ratio:best/none:{at}", blocks, rng)] if len(blocks[0]) > 1 else []
    for policy in blocks[0]:
        if policy != NONE:
            pairs = [(block[policy], block[NONE]) for block in blocks]
            figures.append(ratio_figure(f"ratio:{policy}/none:{at}", pairs, rng))
    for policy in blocks[0]:
        figures += rate_figures(f"{policy}:{at}", [block[policy] for block in blocks], rng)
    return figures


class Bench:
    """One engine that holds every policy, and the ways to let it serve."""

    def __init__(self, settings: Settings, target: Target, options: Options, say: Say) -> None:
        self.settings, self.target, self.options, self.say = settings, target, options, say
        self.engine = Engine(
            target,
            max_num_seqs=max(*options.concurrency, LEARN_AT),
            max_model_len=options.longest + options.tokens,
            max_queue=100_000,
            prefill_chunk=settings.engine.prefill_chunk,
            clock=time.perf_counter,
            capture_on=graphs_on if settings.engine.cuda_graphs else no_graphs_on,
        )
        self.engine.load(0, NoneProposer())  # makes the responses that are learned from
        folder = settings.dir("bench")
        self._responses = Responses(target, options.tokens, folder)
        self._learned = Learned(settings, target, options.draft, folder, say)
        self._versions: dict[tuple[str, str], int] = {}  # (policy, class) → version
        self._order = random.Random(options.seed)
        profile = profile_step_costs(self.engine.runner)
        say("milliseconds of a target pass by rows: " + ", ".join(f"{r}: {ms:.0f}" for r, ms in profile.items()))
        self.engine.control.costs = StepCosts({rows: ms / 1e3 for rows, ms in profile.items()})
        self.engine.runner.target_pass.prepare(settings.learner.num_speculative_tokens)

    def measure(self, workload: Workload) -> dict[int, list[Block]]:
        """Concurrency → blocks, after a first one that warms every policy up and is forgotten."""
        names = self.policies(workload)
        found: dict[int, list[Block]] = {}
        for name in names:
            self.serve((workload.learn or workload.test)[:4], name, workload.traffic_class, 4)
        for concurrency in self.options.concurrency:
            size = concurrency if concurrency == 1 else min(max(8, concurrency), len(workload.test))
            parts = [workload.test[at : at + size] for at in range(0, len(workload.test), size)]
            # Few large blocks say little of the machine's noise: repeat them until there are at least four.
            rounds = self.options.repeats * max(1, -(-4 // len(parts)))
            found[concurrency] = []
            for number, part in enumerate(parts * rounds, 1):
                block = self._block(part, names, workload.traffic_class, concurrency)
                found[concurrency].append(block)
                rates = ", ".join(f"{name} {block[name].tokens / block[name].seconds:.1f}" for name in names)
                self.say(f"{workload.traffic_class} c{concurrency} {number}/{len(parts) * rounds}: tokens/s {rates}")
        return found

    def policies(self, workload: Workload) -> list[str]:
        """Names of the policies of this class, each made resident first."""
        names = [*self.options.policies, *self.options.artifacts]
        for name in names:
            if (name, workload.traffic_class) not in self._versions:
                version = len(self._versions) + 1
                self.engine.load(version, self._proposer(name, workload))
                self._versions[name, workload.traffic_class] = version
        return names

    def serve(self, prompts: Sequence[Ids], policy: str, traffic_class: str, concurrency: int) -> Run:
        """Serve ``prompts`` under a policy to so many clients (``clients.serve``)."""
        version = self._versions[policy, traffic_class]

        def ask(request_id: str, ids: Ids, most: int) -> EngineRequest:
            return EngineRequest(request_id, ids, SamplingParams(most), version, traffic_class)

        try:
            return clients.serve(self.engine, ask, prompts, concurrency, self.options.tokens)
        except SlipstreamError as error:
            raise SlipstreamError(f"Policy {policy} cannot be measured. {error}") from None

    def _block(self, prompts: Sequence[Ids], names: Sequence[str], traffic_class: str, concurrency: int) -> Block:
        order = list(names)
        self._order.shuffle(order)
        runs = {name: self.serve(prompts, name, traffic_class, concurrency) for name in order}
        return {name: runs[name] for name in names}

    def _proposer(self, name: str, workload: Workload) -> Proposer:
        target, k = self.target, self.settings.learner.num_speculative_tokens
        if (folder := self.options.artifacts.get(name)) is not None:
            files = read_artifact(folder)
        elif name == NONE:
            files = build_artifact(ProposerKind.NONE, 0)
        elif name == "ngram":
            files = build_artifact(ProposerKind.NGRAM, k)
        elif name in ("memory", "hybrid"):
            self._responses.make(self.engine, workload.learn, self.say)
            learn = self._learned.memory if name == "memory" else self._learned.hybrid
            files = learn(workload, self._responses.of(workload.learn), self.options.tokens)
        else:
            raise SlipstreamError(
                f"There is no policy {name!r}; there are none, ngram, memory, hybrid, and those named by --artifact."
            )
        return load_proposer(files, artifact_digest(files), target.fingerprint, target.tokenizer_fingerprint)
