"""What is served while serving is measured: prompts by traffic class, some to learn from, others to be tested on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from engine.bench.kept import kept_lines
from engine.contracts import SamplingParams, SlipstreamError
from engine.demo import prompts
from engine.model.loading import Target
from engine.ops.supervisor import Say
from engine.runner.engine import Engine, EngineRequest
from engine.store.repositories.intake import TrainableTrace

Ids = tuple[int, ...]
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one class as token ids, chat template applied; ``texts`` are the test prompts as a user wrote them."""

    traffic_class: str
    learn: tuple[Ids, ...]
    test: tuple[Ids, ...]
    texts: tuple[str, ...]


def workloads(
    target: Target, files: Sequence[Path], classes: Sequence[str], learn: int, test: int, longest: int, seed: int
) -> list[Workload]:
    """One per class of ``files``, or of the shipped prompts: ``test`` prompts and, of the others, at most ``learn``.

    Prompts of more than ``longest`` tokens are left out. The first turn of a conversation is the prompt.
    """
    found: dict[str, list[str]] = {}
    for prompt in [p for file in files for p in prompts.read(file)] or [
        p for ps in prompts.shipped().values() for p in ps
    ]:
        found.setdefault(prompt.traffic_class, []).append(prompt.turns[0])
    if unknown := sorted(set(classes) - set(found)):
        raise SlipstreamError(
            f"There are no prompts of class {', '.join(unknown)}; there are {', '.join(sorted(found))}."
        )
    return [_workload(target, name, found[name], learn, test, longest, seed) for name in classes or sorted(found)]


def _workload(
    target: Target, name: str, texts: Sequence[str], learn: int, test: int, longest: int, seed: int
) -> Workload:
    template = target.tokenizer.apply_chat_template
    pairs = [(tuple(template([{"role": "user", "content": text}])), text) for text in dict.fromkeys(texts)]
    pairs = [(ids, text) for ids, text in pairs if len(ids) <= longest]
    random.Random(seed).shuffle(pairs)
    if len(pairs) < 2 * test:
        raise SlipstreamError(
            f"Class {name} has {len(pairs)} prompts of at most {longest} tokens; {test} to test on and at least "
            "as many to learn from are needed. Give more prompts, or lower --prompts."
        )
    tested, rest = pairs[:test], pairs[test : test + learn]
    return Workload(name, tuple(ids for ids, _ in rest), tuple(ids for ids, _ in tested), tuple(t for _, t in tested))


def trace(
    ordinal: int, traffic_class: str, position: int, prompt_ids: Ids, output_ids: Ids, max_tokens: int
) -> TrainableTrace:
    """What serving this response leaves for a learner, the ``ordinal``-th that it takes in; one comes every second."""
    started = START + timedelta(seconds=ordinal)
    return TrainableTrace(
        ordinal, UUID(int=ordinal), started, traffic_class, position, prompt_ids, output_ids, max_tokens
    )


class Responses:
    """Greedy responses of the target to prompts, kept in ``folder`` so that a second run need not make them again."""

    def __init__(self, target: Target, max_tokens: int, folder: Path) -> None:
        self._max_tokens = max_tokens
        key = f"{target.fingerprint} {target.model.dtype} {max_tokens}"
        self._path = folder / f"responses-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
        self._known: dict[Ids, Ids] = {}
        for prompt, response in kept_lines(self._path):
            self._known[tuple(prompt)] = tuple(response)

    def missing(self, wanted: Sequence[Ids]) -> list[Ids]:
        return [ids for ids in wanted if ids not in self._known]

    def of(self, wanted: Sequence[Ids]) -> list[tuple[Ids, Ids]]:
        return [(ids, self._known[ids]) for ids in wanted]

    def add(self, made: Mapping[Ids, Ids]) -> None:
        self._known |= made
        with self._path.open("a") as file:
            for prompt, response in made.items():
                file.write(json.dumps([prompt, response]) + "\n")

    def make(self, engine: Engine, wanted: Sequence[Ids], say: Say) -> None:
        """Those that are not known yet, by version 0 of an engine, many at a time; kept as they come."""
        missing = self.missing(wanted)
        if missing:
            say(f"generating {len(missing)} of {len(wanted)} responses")
        for n, ids in enumerate(missing):
            engine.add(EngineRequest(f"response-{n}", ids, SamplingParams(self._max_tokens), 0))
        done = 0
        while engine.has_work:
            for output in engine.step():
                if output.result is None:
                    continue
                if output.result.error:  # half a response must not be learned from
                    raise SlipstreamError(f"The engine failed on a prompt to learn from: {output.result.error}")
                payload = output.result.payload
                self.add({payload.prompt_ids: payload.output_ids})
                done += 1
                if done % 50 == 0:
                    say(f"{done} of {len(missing)} responses")
