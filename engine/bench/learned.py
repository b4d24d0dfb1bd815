"""What a learner makes of requests that are not tested: memories and hybrids to measure serving with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch

from engine.bench.kept import kept_lines
from engine.bench.workload import Ids, Workload, trace
from engine.contracts import SlipstreamError, artifact_digest
from engine.learner.memory import build_memory
from engine.learner.neural import TuneRecipe, build_hybrid, tune
from engine.learner.shipped import shipped_draft
from engine.learner.traces import ServedTarget
from engine.model.llama import Llama
from engine.model.loading import Target, configured_target
from engine.ops.supervisor import Say
from engine.registry.artifacts import ArtifactStore
from engine.settings import Settings
from engine.speculation.artifact import read_artifact
from engine.speculation.neural_file import draft_files, unpack
from engine.store.repositories.intake import TrainableTrace


class Learned:
    """``draft``: folder of the neural policy that hybrids start from; None for the one that comes with the project.

    Tuned drafts are kept in ``folder`` beside the responses: the same requests and recipe are not learned twice.
    """

    def __init__(self, settings: Settings, target: Target, draft: Path | None, folder: Path, say: Say) -> None:
        self._settings, self._target, self._draft, self._say = settings, target, draft, say
        self._served = ServedTarget(target.name, target.fingerprint, target.tokenizer_fingerprint, {})
        self._drafts, self._tuned = ArtifactStore(folder / "drafts"), folder / "tuned.jsonl"

    def memory(self, workload: Workload, responses: Sequence[tuple[Ids, Ids]], max_tokens: int) -> dict[str, bytes]:
        """The files of a trace memory of ``responses``, (prompt, output) each."""
        return build_memory(_traces(workload, responses, max_tokens), self._served, self._settings.learner)

    def hybrid(self, workload: Workload, responses: Sequence[tuple[Ids, Ids]], max_tokens: int) -> dict[str, bytes]:
        """… and of it beside the draft after a pass over the same responses (``learner.tune_requests``)."""
        learned = _traces(workload, responses, max_tokens)
        return build_hybrid(learned, self._served, self._settings.learner, self._tune(learned, workload), {})

    def _tune(self, learned: Sequence[TrainableTrace], workload: Workload) -> dict[str, bytes]:
        start, recipe = self._start(), TuneRecipe(requests=self._settings.learner.tune_requests)
        seen = [(t.prompt_ids, t.output_ids) for t in learned]
        text = json.dumps([self._target.fingerprint, artifact_digest(start), asdict(recipe), seen])
        key = hashlib.sha256(text.encode()).hexdigest()
        known = dict(kept_lines(self._tuned))
        if key in known and self._drafts.is_sound(known[key]):
            return self._drafts.files(known[key])
        self._say(f"tuning the draft of {workload.traffic_class} on {len(learned)} responses")
        files, _ = tune(self._teacher, unpack(start), learned, recipe)
        digest = self._drafts.put(files)
        with self._tuned.open("a") as file:
            file.write(json.dumps([key, digest]) + "\n")
        return files

    def _start(self) -> Mapping[str, bytes]:
        policy = read_artifact(self._draft) if self._draft is not None else shipped_draft(self._target.fingerprint)
        if policy is None:
            raise SlipstreamError(
                f"No draft comes with the project for {self._target.name}: the policy hybrid needs --draft FOLDER, a "
                "neural policy (policy train-static)."
            )
        return draft_files(policy)

    @cached_property
    def _teacher(self) -> Llama:
        return teacher(self._settings, self._target, self._say)


def teacher(settings: Settings, target: Target, say: Say) -> Llama:
    """The model that a learner trains a draft beside, whatever serving multiplies in."""
    if target.model.dtype in (torch.float32, torch.float64):
        return target.model
    return configured_target(settings, say, "float32").model


def _traces(workload: Workload, responses: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[TrainableTrace]:
    return [
        trace(number, workload.traffic_class, number, prompt, output, max_tokens)
        for number, (prompt, output) in enumerate(responses, 1)
    ]
