"""Before the streams: the target, what a pass of it costs here and now, responses to all prompts, the static policy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.adaptation.arms import offline
from engine.bench.adaptation.drafts import KeptRehearsals, beside_own_context, rehearsal_token_s
from engine.bench.adaptation.streams import Ids, Response
from engine.bench.adaptation.world import NeuralPart, World
from engine.bench.learned import teacher
from engine.bench.workload import Responses
from engine.contracts import ProposerKind, SlipstreamError, artifact_digest
from engine.demo import prompts
from engine.learner.shipped import shipped_draft
from engine.learner.target_replay import TargetReplayer
from engine.learner.traces import ServedTarget
from engine.model.loading import Target, configured_target
from engine.ops.supervisor import Say
from engine.runner.engine import Engine
from engine.runner.profile import profile_step_costs
from engine.settings import Settings
from engine.speculation.artifact import read_artifact, read_manifest
from engine.speculation.hybrid import BoundHybrid
from engine.speculation.neural import BoundNeural
from engine.speculation.neural_file import draft_files
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import Proposer

if TYPE_CHECKING:
    from engine.bench.adaptation.run import Options

CORPUS = "offline"
"""The traffic class of what static was trained on: only the pooled table of a memory knows it."""
TOGETHER = 16
PROFILED = 15
REHEARSED = 9
"""Responses on which the price of a rehearsal is measured."""
REPLAYED = (ProposerKind.NONE, ProposerKind.NGRAM, ProposerKind.TRACE_MEMORY)
"""They need tokens only."""
LEAST = 16
"""Prompts a class needs to be a phase of a stream."""


@dataclass(frozen=True, slots=True)
class Material:
    """``classes``: what the streams are made of; ``corpus``: what static's memory was made of, disjoint from it."""

    target: Target
    engine: Engine
    world: World
    classes: dict[str, tuple[Response, ...]]
    corpus: tuple[Response, ...]
    static: Proposer
    context: Proposer | None = None
    """Where static is a neural draft: the same beside the request's own context, with nothing learned."""


def prepare(settings: Settings, options: Options, say: Say) -> Material:
    target = configured_target(settings, say)
    wanted = _prompts(target, options)
    corpus = _corpus(target, options.corpus) if options.corpus is not None else []
    longest = max(len(ids) for found in wanted.values() for ids in found) + options.tokens
    engine = Engine(target, max_num_seqs=TOGETHER, max_model_len=longest, max_queue=100_000)
    engine.load(0, NoneProposer())
    costs = _costs(engine, options.busy)
    say("milliseconds of a target pass by rows: " + ", ".join(f"{n}: {ms:.0f}" for n, ms in costs.items()))
    responses = Responses(target, options.tokens, settings.dir("bench"))
    responses.make(engine, [ids for found in wanted.values() for ids in found], say)
    classes = {
        name: tuple(Response(name, ids, output) for ids, output in responses.of(found))
        for name, found in sorted(wanted.items())
    }
    files = _static_files(options, target)
    if options.corpus is None and files is None:  # a third of each class, never the same prompts as the streams
        corpus = [Response(CORPUS, r.prompt_ids, r.output_ids) for found in classes.values() for r in found[::3]]
        classes = {name: tuple(r for n, r in enumerate(found) if n % 3) for name, found in classes.items()}
    classes = {name: found for name, found in classes.items() if len(found) >= LEAST}
    if len(classes) < 2:
        raise SlipstreamError(
            f"A shift needs two traffic classes with at least {LEAST} prompts; got {sorted(classes)}."
        )
    served = ServedTarget(target.name, target.fingerprint, target.tokenizer_fingerprint, costs)
    world = World(served, settings.learner, options.tokens, options.seed)
    if files is None:
        say(f"static: a memory of {len(corpus)} responses")
        return Material(target, engine, world, classes, tuple(corpus), offline(world, corpus))
    kind = read_manifest(files).kind
    say(f"static: a {kind} policy, {artifact_digest(files)[:12]}")
    if kind in REPLAYED:
        return Material(target, engine, world, classes, tuple(corpus), world.load(files))
    sample = [r for found in classes.values() for r in found[: 1 + REHEARSED // len(classes)]]
    neural = _neural(settings, target, world, files, sample, options, say)
    world = replace(world, neural=neural)
    alone = world.load(beside_own_context(files, served, settings.learner.num_speculative_tokens))
    return Material(target, engine, world, classes, tuple(corpus), world.load(files), alone)


def _static_files(options: Options, target: Target) -> dict[str, bytes] | None:
    """The policy named, else the draft that comes with the project; None where static is a memory of a corpus."""
    if options.static is not None:
        return read_artifact(options.static)
    return shipped_draft(target.fingerprint) if options.corpus is None else None


def _neural(
    settings: Settings,
    target: Target,
    world: World,
    files: dict[str, bytes],
    sample: Sequence[Response],
    options: Options,
    say: Say,
) -> NeuralPart:
    """One price for a draft pass and a rehearsal of every arm, whoever tuned its draft: they have one shape."""
    clock = time.thread_time if options.busy else time.perf_counter
    rehearsals = KeptRehearsals(settings.dir("bench"), world.cpu)
    bound, pass_s = TargetReplayer(target.model, clock, rehearsals).bound(world.load(files))
    assert isinstance(bound, BoundNeural | BoundHybrid)  # the other kinds need tokens only
    network = bound.pool.network
    token_s = rehearsal_token_s(network, sample, bound.num_speculative_tokens, bound.pool.min_survival, world.cpu)
    say(f"milliseconds of a draft pass: {1e3 * pass_s:.1f}, of the target's states a token: {1e3 * token_s:.2f}")
    rehearsals.keep(network)
    replayer = TargetReplayer(target.model, clock, rehearsals, pass_s)
    trains = options.tune > 0 or "planted" in options.streams
    taught = teacher(settings, target, say) if trains else target.model
    return NeuralPart(taught, replayer, rehearsals, token_s, draft_files(files), options.tune_every)


def _costs(engine: Engine, busy: bool) -> dict[int, float]:
    """Rows → milliseconds; ``busy``: of CPU time, which neighbours that take turns do not lengthen."""
    if busy:
        engine.runner.clock = time.thread_time
    return profile_step_costs(engine.runner, repeats=PROFILED)


def _prompts(target: Target, options: Options) -> dict[str, list[Ids]]:
    """Class → the first turns as token ids, none of them twice."""
    found = [p for file in options.prompts for p in prompts.read(file)]
    if not found:
        found = [p for ps in prompts.shipped().values() for p in ps]
    room = target.config.max_position - options.tokens - 1
    wanted: dict[str, dict[Ids, None]] = {}
    for prompt in found:
        ids = tuple(target.tokenizer.apply_chat_template([{"role": "user", "content": prompt.turns[0]}]))
        own = wanted.setdefault(prompt.traffic_class, {})
        if len(ids) <= room and not (options.limit and len(own) >= options.limit):
            own[ids] = None
    return {name: list(ids) for name, ids in wanted.items()}


def _corpus(target: Target, path: Path) -> list[Response]:
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        ids = target.tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}])
        found.append(Response(CORPUS, tuple(ids), tuple(row["response_token_ids"])))
    return found
