"""The second learner: a hybrid of a fresh trace memory and a neural draft, tuned on the traces that are newest.

The draft is tuned from the champion's where that has one, else from the newest version that does: the static draft
(``static``) in the beginning. The target's hidden states are computed again by prefill, in this process, which loads
the target for it when it first learns.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from engine.contracts import PolicyVersion, ProposerKind, SlipstreamError, artifact_digest
from engine.learner import soundness
from engine.learner.evaluate import acceptance
from engine.learner.features import KEPT, Example, can_teach, example
from engine.learner.gate import Replayer
from engine.learner.memory import MemoryLearner, MemoryRecipe, memory_lineage, memory_settings, rebuild_memory
from engine.learner.shipped import shipped_draft
from engine.learner.target_replay import TargetReplayer
from engine.learner.traces import ServedTarget
from engine.learner.trainer import Trainer, TrainOptions
from engine.model.llama import Llama
from engine.model.loading import load_target
from engine.registry.artifacts import ArtifactStore
from engine.settings import LearnerSettings, Settings
from engine.speculation.artifact import build_artifact, load_proposer
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.neural_file import DraftFile, pack, unpack
from engine.store.database import Database
from engine.store.repositories import eligibility, policies
from engine.store.repositories.intake import TrainableTrace

WITH_DRAFT = (ProposerKind.NEURAL, ProposerKind.HYBRID)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TuneRecipe:
    """All that the tuning depends on beside traces and parent; kept in the manifest.

    One pass over at most ``requests`` traces, half of them the newest, half drawn from the rest of the buffer.
    """

    requests: int = 96
    lr: float = 3e-4
    slots_per_step: int = 1024
    first_rejection: float = 2.5
    seed: int = 0

    @property
    def options(self) -> TrainOptions:
        return TrainOptions(
            lr=self.lr,
            lr_end=self.lr,
            warmup=2,
            first_rejection=self.first_rejection,
            slots_per_step=self.slots_per_step,
            micro_slots=512,
        )


class HybridMaker:
    def __init__(self, settings: Settings, db: Database, store: ArtifactStore, target: Llama | None = None) -> None:
        self.settings, self.db, self.store = settings, db, store
        self.recipe = TuneRecipe(requests=settings.learner.tune_requests)
        self._memory, self._target = MemoryLearner(), target
        self._replayer: TargetReplayer | None = None

    @property
    def replayer(self) -> Replayer | None:
        return self._replayer

    def make(
        self,
        train: Sequence[TrainableTrace],
        target: ServedTarget,
        champion: PolicyVersion | None,
        alive: Callable[[], None] = lambda: None,
    ) -> dict[str, bytes]:
        if not train:
            raise SlipstreamError(
                "There is no trace to learn from: no trainable request with its tokens in the window."
            )
        model = self._model(target, alive)
        digest = self.starting_draft(target, champion)
        tuned, curve = tune(model, self._draft(digest, target), train, self.recipe, alive)
        lineage = {"draft": digest, "tuning": asdict(self.recipe), "curve": curve}
        before = champion.digest if champion is not None else None
        return build_hybrid(train, target, self.settings.learner, tuned, lineage, before, self._memory, alive)

    def rebuild(self, train: Sequence[TrainableTrace], manifest: Mapping[str, Any]) -> dict[str, bytes]:
        """The files that a hybrid's manifest describes, from its traces and the version whose draft was tuned.

        Byte for byte on the machine that made it: one thread, the same library; elsewhere kernels may round otherwise.
        """
        target = ServedTarget("", manifest["target_fingerprint"], manifest["tokenizer_fingerprint"], {})
        lineage = manifest["lineage"]
        draft = self._draft(lineage["draft"], target)
        tuned, _ = tune(self._model(target), draft, train, TuneRecipe(**lineage["tuning"]))
        return {MEMORY_FILE: rebuild_memory(train, manifest), **tuned}

    def _draft(self, digest: str, target: ServedTarget) -> DraftFile:
        """From the project where it still ships this one, which works without the store's folder too."""
        shipped = shipped_draft(target.fingerprint)
        known = shipped is not None and artifact_digest(shipped) == digest
        return unpack(shipped if shipped is not None and known else self.store.files(digest))

    def _model(self, target: ServedTarget, alive: Callable[[], None] = lambda: None) -> Llama:
        if self._target is None:
            torch.set_num_threads(1)
            chosen = self.settings.engine

            def say(text: str) -> None:
                log.info("%s", text)
                alive()

            loaded = load_target(
                chosen.model, self.settings.dir("models"), "float32", "cpu", 1, say, weights=chosen.weights
            )
            if loaded.fingerprint != target.fingerprint:
                raise SlipstreamError(
                    f"The replicas serve target {target.fingerprint[:12]}…, engine.model here is {chosen.model}, "
                    f"{loaded.fingerprint[:12]}…. "
                    "Start the learner with the engine.model and engine.weights that are served."
                )
            self._target = loaded.model
        self._replayer = self._replayer or TargetReplayer(self._target)
        return self._target

    def starting_draft(self, target: ServedTarget, champion: PolicyVersion | None) -> str:
        """The digest of the policy whose draft is tuned: the champion, else the newest version for this target that no
        rollout has taken back, else what comes with the project. That is no version: only what passed the gate is one.
        """
        with self.db.read() as session:
            bad = eligibility.rolled_back(session)
            versions = policies.all_versions(session)
        for version in [*([champion] if champion is not None else []), *versions]:
            fits = version.manifest.get("target_fingerprint") == target.fingerprint
            withdrawn = version.retired_at is not None or (version.version in bad and version != champion)
            if version.kind in WITH_DRAFT and fits and not withdrawn:
                return version.digest
        files = shipped_draft(target.fingerprint)
        if files is not None and artifact_digest(files) not in {v.digest for v in versions}:
            if faults := soundness.faults(files):
                raise SlipstreamError(
                    f"The static draft that comes with the project is damaged: {'; '.join(faults)}. Install it again."
                )
            load_proposer(files, artifact_digest(files), target.fingerprint, target.tokenizer_fingerprint)
            return self.store.put(files)  # its heirs are rebuilt from it when the project ships another
        raise SlipstreamError(
            "There is no neural draft to start from for this target. Make one: "
            "`slipstream policy train-static --data conversations.jsonl --out DIR --register`."
        )


def build_hybrid(
    train: Sequence[TrainableTrace],
    target: ServedTarget,
    settings: LearnerSettings,
    draft: Mapping[str, bytes],
    lineage: Mapping[str, Any],
    parent: str | None = None,
    learner: MemoryLearner | None = None,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, bytes]:
    """The files of a hybrid: a memory of ``train`` beside the files of ``draft``, whose making ``lineage`` tells."""
    recipe = MemoryRecipe.of(settings)
    return build_artifact(
        ProposerKind.HYBRID,
        settings.num_speculative_tokens,
        settings=memory_settings(recipe),
        files={MEMORY_FILE: (learner or MemoryLearner()).learn(train, recipe, alive), **draft},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
        parent=parent,
        lineage={**memory_lineage(train, recipe), **lineage},
    )


def tune(
    model: Llama,
    draft: DraftFile,
    train: Sequence[TrainableTrace],
    recipe: TuneRecipe,
    alive: Callable[[], None] = lambda: None,
) -> tuple[dict[str, bytes], dict[str, float]]:
    """(the draft's files after one pass over the chosen traces, acceptance length on them before and after).

    A recipe of no requests leaves the draft as it is.
    """
    if not recipe.requests:
        return pack(draft.config, draft.weights, draft.vocabulary), {}
    chosen = [t for t in choose(train, recipe) if can_teach(t.prompt_ids, t.output_ids)]
    trainer = Trainer(model, draft.config, draft.weights, draft.vocabulary, recipe.options)
    examples = list[Example]()
    for t in chosen:
        examples.append(example(model, t.prompt_ids, t.output_ids, draft.config.aux_layers, KEPT))
        alive()
    right = rows = losses = steps = 0.0
    for done in trainer.epoch(examples, recipe.seed):
        alive()
        right, rows = right + sum(done.right), rows + done.rows
        losses, steps = losses + done.loss, steps + 1
    after = acceptance(trainer.network, [("all", e) for e in examples[:16]], k=trainer.options.depth)
    curve = {
        "steps": steps,
        "loss": losses / max(1, steps),
        "chains_while_training": 1 + right / max(1, rows),
        "seen_again": after["all"].acceptance_length if after else 1.0,
    }
    return pack(draft.config, trainer.weights, draft.vocabulary), curve


def choose(train: Sequence[TrainableTrace], recipe: TuneRecipe) -> list[TrainableTrace]:
    """The newest half of ``recipe.requests``, and as many of the others, by a draw that depends on the traces only."""
    ordered = sorted(train, key=lambda t: t.ordinal)
    newest = ordered[-(recipe.requests - recipe.requests // 2) :]
    others = ordered[: -len(newest)]
    key = hashlib.blake2b(b"".join(t.trace_id.bytes for t in ordered), digest_size=8, person=b"tune").digest()
    rng = np.random.default_rng([recipe.seed, int.from_bytes(key, "big")])
    picked = sorted(rng.permutation(len(others))[: recipe.requests // 2].tolist())
    return [*(others[i] for i in picked), *newest]
