"""Before the streams: the target, what a pass of it costs here and now, responses to all prompts, the static policy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

from engine.bench.adaptation.arms import World, offline
from engine.bench.adaptation.streams import Ids, Response
from engine.bench.workload import Responses
from engine.contracts import ProposerKind, SamplingParams, SlipstreamError, artifact_digest
from engine.demo import prompts
from engine.learner.traces import ServedTarget
from engine.model.loading import Target, load_target
from engine.ops.supervisor import Say
from engine.runner.engine import Engine, EngineRequest
from engine.runner.profile import profile_step_costs
from engine.settings import Settings
from engine.speculation.artifact import load_proposer, read_artifact, read_manifest
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import Proposer

if TYPE_CHECKING:
    from engine.bench.adaptation.run import Options

CORPUS = "offline"
"""The traffic class of what static was trained on: only the pooled table of a memory knows it."""
TOGETHER = 16
PROFILED = 15
REPLAYED = (ProposerKind.NONE, ProposerKind.NGRAM, ProposerKind.TRACE_MEMORY)
LEAST = 16
"""Prompts a class needs to be a phase of a stream."""


@dataclass(frozen=True, slots=True)
class Material:
    """``classes``: what the streams are made of; ``corpus``: what static was trained on, disjoint from it."""

    target: Target
    engine: Engine
    world: World
    classes: dict[str, tuple[Response, ...]]
    corpus: tuple[Response, ...]
    static: Proposer


def prepare(settings: Settings, options: Options, say: Say) -> Material:
    chosen = settings.engine
    target = load_target(chosen.model, settings.dir("models"), chosen.dtype, chosen.device, chosen.threads or None, say)
    wanted = _prompts(target, options)
    corpus = _corpus(target, options.corpus) if options.corpus is not None else []
    longest = max(len(ids) for found in wanted.values() for ids in found) + options.tokens
    engine = Engine(target, max_num_seqs=TOGETHER, max_model_len=longest, max_queue=100_000)
    engine.load(0, NoneProposer())
    costs = _costs(engine, options.busy)
    say("milliseconds of a target pass by rows: " + ", ".join(f"{n}: {ms:.0f}" for n, ms in costs.items()))
    responses = Responses(target, options.tokens, settings.dir("bench"))
    _generate(engine, responses, [ids for found in wanted.values() for ids in found], options.tokens, say)
    classes = {
        name: tuple(Response(name, ids, output) for ids, output in responses.of(found))
        for name, found in sorted(wanted.items())
    }
    if options.corpus is None:  # a third of each class, never the same prompts as the streams
        corpus = [Response(CORPUS, r.prompt_ids, r.output_ids) for found in classes.values() for r in found[::3]]
        classes = {name: tuple(r for n, r in enumerate(found) if n % 3) for name, found in classes.items()}
    classes = {name: found for name, found in classes.items() if len(found) >= LEAST}
    if len(classes) < 2:
        raise SlipstreamError(
            f"A shift needs two traffic classes with at least {LEAST} prompts; got {sorted(classes)}."
        )
    served = ServedTarget(target.name, target.fingerprint, target.tokenizer_fingerprint, costs)
    world = World(served, settings.learner, options.tokens, options.seed)
    static = _load(options.static, target) if options.static is not None else offline(world, corpus)
    say(f"static: {len(corpus)} responses" if options.static is None else f"static: {options.static}")
    return Material(target, engine, world, classes, tuple(corpus), static)


def _costs(engine: Engine, busy: bool) -> dict[int, float]:
    """Rows → milliseconds; ``busy``: of CPU time, which neighbours that take turns do not lengthen.

    A pass cannot get cheaper by more rows: where neighbours' noise says so, they are averaged (isotonic regression), or
    K control would be steered by that noise.
    """
    if busy:
        engine.runner.clock = time.thread_time
    found = profile_step_costs(engine.runner, repeats=PROFILED)
    smooth = isotonic_regression(np.array([found[rows] for rows in sorted(found)])).x
    return dict(zip(sorted(found), smooth.tolist(), strict=True))


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


def _load(folder: Path, target: Target) -> Proposer:
    files = read_artifact(folder)
    if (kind := read_manifest(files).kind) not in REPLAYED:
        raise SlipstreamError(
            f"{folder} is a {kind} policy; only those that draft from tokens alone can be replayed here: "
            f"{', '.join(REPLAYED)}. `slipstream bench serving --artifact` measures it for real."
        )
    return load_proposer(files, artifact_digest(files), target.fingerprint, target.tokenizer_fingerprint)


def _generate(engine: Engine, responses: Responses, wanted: Sequence[Ids], tokens: int, say: Say) -> None:
    """Greedy responses to what is not known yet, many at a time; kept as they come."""
    missing = responses.missing(wanted)
    if missing:
        say(f"generating {len(missing)} of {len(wanted)} responses")
    for n, ids in enumerate(missing):
        engine.add(EngineRequest(f"response-{n}", ids, SamplingParams(tokens), 0))
    done = 0
    while engine.has_work:
        for output in engine.step():
            if output.result is None:
                continue
            payload = output.result.payload
            responses.add({payload.prompt_ids: payload.output_ids})
            done += 1
            if done % 50 == 0:
                say(f"{done} of {len(missing)} responses")
