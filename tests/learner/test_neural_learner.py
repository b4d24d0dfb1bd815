"""The second learner: a hybrid whose draft is tuned on recent traces, through the same gate."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from safetensors import numpy as safetensors

from engine.bench.adaptation.drafts import Charged, KeptRehearsals
from engine.contracts import ProposerKind, RolloutState, SlipstreamError, artifact_digest
from engine.learner import neural, shipped, soundness
from engine.learner.features import can_teach
from engine.learner.neural import HybridMaker, TuneRecipe, choose, tune
from engine.learner.rebuild import NotRebuilt, rebuild
from engine.learner.target_replay import TargetReplayer, one_row_pass_s
from engine.learner.traces import ServedTarget
from engine.learner.trainer import choose_vocabulary, fresh_weights
from engine.model.batch import Batch
from engine.model.draft import DraftConfig
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.loading import Target
from engine.registry.publish import publish
from engine.rollout.launch import launch
from engine.settings import LearnerSettings
from engine.speculation.artifact import build_artifact, load_proposer, read_manifest
from engine.speculation.control import KController
from engine.speculation.neural_file import DraftFile, pack, unpack
from engine.speculation.replay import replay_controlled
from engine.speculation.step_costs import StepCosts
from engine.store.database import Database
from engine.store.repositories import learning, policies, rollouts
from engine.store.repositories.intake import TrainableTrace
from tests.learner.test_gate import COSTS
from tests.learner.test_learner import NOW, World
from tests.rollout import database_world as world
from tests.runner.driving import alone, request

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def draft(tiny: Target) -> DraftFile:
    config = DraftConfig.of_target(tiny.config, 128)
    return unpack(pack(config, fresh_weights(config, tiny.model, 0), choose_vocabulary([], 128, 512)))


@pytest.fixture(scope="module")
def said(tiny: Target) -> list[TrainableTrace]:
    """What the target really answered, as traces."""
    rng, found = random.Random(1), []
    for i in range(6):
        prompt = rng.choices(range(3, tiny.config.vocab_size), k=6)
        output = alone(tiny, request(str(i), prompt, max_tokens=30)).payload.output_ids
        found.append(TrainableTrace(i, UUID(int=i), NOW, "chat", i, prompt, output, 30))
    return found


def test_tuning_teaches_and_is_the_same_twice(tiny: Target, draft: DraftFile, said: list[TrainableTrace]) -> None:
    recipe = TuneRecipe(requests=6, lr=1e-2, slots_per_step=60)
    files, curve = tune(tiny.model, draft, said, recipe)
    assert files == tune(tiny.model, draft, said, recipe)[0]
    again = unpack(files)
    for _ in range(8):
        files, last = tune(tiny.model, again, said, recipe)
        again = unpack(files)
    assert last["loss"] < curve["loss"]
    assert last["seen_again"] > curve["seen_again"]


def test_the_newest_and_some_of_the_rest_are_chosen(said: list[TrainableTrace]) -> None:
    many = [replace(said[0], ordinal=i, trace_id=UUID(int=i)) for i in range(100)]
    chosen = choose(many[::-1], TuneRecipe(requests=20))
    ordinals = [t.ordinal for t in chosen]
    assert ordinals == sorted(set(ordinals))
    assert ordinals[10:] == list(range(90, 100))
    assert choose(many, TuneRecipe(requests=20)) == chosen
    assert [t.ordinal for t in choose(many[:7], TuneRecipe(requests=20))] == list(range(7))
    assert not can_teach([1], [2])


def in_seconds(costs: Mapping[int, float]) -> StepCosts:
    return StepCosts({rows: ms / 1e3 for rows, ms in costs.items()})


def test_a_draft_pass_is_charged_where_it_is_made(tiny: Target, draft: DraftFile, said: list[TrainableTrace]) -> None:
    files = build_artifact(ProposerKind.NEURAL, 3, files=pack_again(draft), target_fingerprint=FINGERPRINT,
                           settings={"min_survival": 0.0})  # fmt: skip
    policy = load_proposer(files, artifact_digest(files), FINGERPRINT)
    replayer = TargetReplayer(tiny.model, pass_s=0.5)
    counts, seconds = replayer(policy, said[0], None)
    assert (counts.drafted > 0, seconds) == (True, 0.0)
    controlled, seconds = replayer(policy, said[0], KController(in_seconds(COSTS)))
    # A pass of half a second is charged where it is made, so K control soon asks for none.
    assert 0.5 <= seconds < 0.5 * controlled.steps


@pytest.mark.parametrize("times", [0.01, 1.0, 100.0])
def test_a_draft_pass_costs_beside_the_engines_passes_what_it_costs_beside_the_learners(
    times: float, tiny: Target, draft: DraftFile, said: list[TrainableTrace]
) -> None:
    """A learner on one thread beside a replica that is ``times`` as slow: seconds of the one, added to those of the
    other, would make drafts look far too dear or free."""
    files = build_artifact(ProposerKind.NEURAL, 3, files=pack_again(draft), target_fingerprint=FINGERPRINT,
                           settings={"min_survival": 0.0})  # fmt: skip
    policy, now, step = load_proposer(files, artifact_digest(files), FINGERPRINT), [0.0], [0.5]

    def clock() -> float:
        now[0] += step[0]
        return now[0]

    assert one_row_pass_s(tiny.model, clock) == 0.5
    replayer = TargetReplayer(tiny.model, clock)
    bound, here_s = replayer.bound(policy)
    assert here_s == 0.5
    step[0] = 5.0
    another = load_proposer(files, artifact_digest(files), FINGERPRINT)
    assert replayer.bound(another)[1] == 0.5  # of the same shape, so of the same price, whatever is measured now
    # a pass of the target takes ten times as long as one of the draft
    there = {rows: ms * times for rows, ms in COSTS.items()}
    trace = said[0]
    expected = replay_controlled(
        bound, KController(in_seconds(there)), 0, trace.traffic_class, trace.prompt_ids, trace.output_ids,
        trace.max_tokens, draft_pass_s=there[1] / 1e3 / 10,
    )  # fmt: skip
    counts, seconds = replayer(policy, trace, KController(in_seconds(there)))
    assert seconds > counts.steps * there[1] / 1e3  # it was asked, if only to find out what it is worth
    assert counts == expected[0]
    assert seconds == pytest.approx(expected[1])


def test_a_held_out_request_goes_through_the_target_once_for_every_draft(
    tiny: Target, draft: DraftFile, said: list[TrainableTrace], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, _ = tune(tiny.model, draft, said, TuneRecipe(requests=6))
    made = [
        build_artifact(ProposerKind.NEURAL, 3, files=weights, target_fingerprint=FINGERPRINT)
        for weights in (pack_again(draft), pack_again(draft), tuned)
    ]
    old, same, new = (load_proposer(files, artifact_digest(files), FINGERPRINT) for files in made)
    asked, depths, forward = 0, list[int](), type(tiny.model).forward_with_aux

    def counted(model: Llama, batch: Batch, cache: KVCache, layers: Sequence[int], depth: int | None = None) -> object:
        nonlocal asked
        asked += 1
        depths.append(depth or 0)
        return forward(model, batch, cache, layers, depth)

    monkeypatch.setattr(type(tiny.model), "forward_with_aux", counted)
    replayer, costs = TargetReplayer(tiny.model, pass_s=0.01), in_seconds(COSTS)
    for policy, passes in ((old, 4), (same, 4), (old, 4), (new, 8)):
        for trace in said[:4]:
            whole, _ = replayer(policy, trace, None)
            replayer(policy, trace, KController(costs))
            assert replayer(policy, trace, None)[0] == whole
        assert asked == passes
    assert set(depths) == {1 + max(draft.config.aux_layers)}  # no layer above those that a draft reads

    charged = Charged(replayer, KeptRehearsals(Path(), lambda: 0.0), 0.001)
    for policy, times in ((old, 1), (same, 1), (new, 2)):
        for trace in said[:4]:
            charged(policy, trace, None)
        tokens = sum(len(t.prompt_ids) + len(t.output_ids) for t in said[:4])
        assert charged.owed == pytest.approx(0.001 * times * tokens)


def pack_again(draft: DraftFile) -> dict[str, bytes]:
    return pack(draft.config, draft.weights, draft.vocabulary)


class HybridWorld(World):
    """The same installation, learning hybrids for the tiny target; tokens are of its vocabulary."""

    def __init__(self, db: Database, home: Path, tiny: Target) -> None:
        super().__init__(db, home)
        wanted = LearnerSettings(kind="hybrid", every_requests=40, min_requests=60, tune_requests=8)
        self.settings = self.settings.model_copy(update={"learner": wanted})
        self.vocab = tiny.config.vocab_size
        self.learner._maker = HybridMaker(self.settings, db, self.store, tiny.model)

    def serve(self, requests: int, **columns: object) -> None:
        phrases = np.random.default_rng(3).integers(0, self.vocab, (6, 8)).tolist()
        texts = [
            (
                ("chat", "code")[n % 2],
                self.rng.integers(0, self.vocab, 5).tolist(),
                [t for phrase in self.rng.integers(0, 6, 3) for t in phrases[phrase]],
            )
            for n in range(requests)
        ]
        self.now += timedelta(seconds=10)
        world.remember(self.db, self.now, texts, self.rng, **columns)
        self.now += timedelta(seconds=10)
        self.beat()


def test_a_hybrid_goes_through_the_gate_with_its_lineage(
    db: Database, tmp_path: Path, tiny: Target, draft: DraftFile
) -> None:
    w = HybridWorld(db, tmp_path, tiny)
    w.serve(100)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome == learning.ERROR
    assert "train-static" in attempt.reason  # there is no draft to start from

    static = publish(
        w.db, w.store, build_artifact(ProposerKind.NEURAL, 4, files=pack_again(draft), target_fingerprint=FINGERPRINT)
    )
    w.now += timedelta(hours=1)
    w.serve(60)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome == learning.REGISTERED, attempt.reason
    with w.db.read() as session:
        made = policies.get(session, attempt.version or 0)
    assert made is not None
    assert (made.kind, made.parent_version) == (ProposerKind.HYBRID, w.champion)
    lineage = made.manifest["lineage"]
    assert lineage["draft"] == static.digest
    assert lineage["tuning"]["requests"] == 8
    assert attempt.gate["net"] > 1
    policy = load_proposer(w.store.files(made.digest), made.digest, FINGERPRINT, "t" * 64)
    assert policy.kind is ProposerKind.HYBRID
    again = HybridMaker(w.settings, w.db, w.store, tiny.model)
    assert artifact_digest(rebuild(db, made.version, {ProposerKind.HYBRID: again.rebuild})) == made.digest
    with pytest.raises(NotRebuilt, match="no way"):
        rebuild(db, made.version)


def test_tuning_starts_from_no_draft_that_was_taken_back(
    db: Database, tmp_path: Path, tiny: Target, draft: DraftFile
) -> None:
    w = HybridWorld(db, tmp_path, tiny)
    good, bad = (
        publish(w.db, w.store, build_artifact(ProposerKind.NEURAL, k, files=pack_again(draft),
                                              target_fingerprint=FINGERPRINT))
        for k in (4, 5)
    )  # fmt: skip
    maker, target = w.learner._maker, ServedTarget("tiny", FINGERPRINT, None, {})
    assert isinstance(maker, HybridMaker)
    assert maker.starting_draft(target, None) == bad.digest
    tried = launch(w.db, canary=bad.version, actor="t", preset="fast", now=w.now)
    with w.db.write() as session:
        rollouts.apply(
            session, tried.id, expected=tried.state, state=RolloutState.ROLLED_BACK, status=tried.status,
            decision=None, now=w.now,
        )  # fmt: skip
    assert maker.starting_draft(target, None) == good.digest


def test_without_any_draft_tuning_starts_from_the_one_that_comes_with_the_project(
    db: Database, tmp_path: Path, tiny: Target, draft: DraftFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, target = HybridWorld(db, tmp_path, tiny), ServedTarget("tiny", FINGERPRINT, None, {})
    maker = w.learner._maker
    assert isinstance(maker, HybridMaker)
    with pytest.raises(SlipstreamError, match="train-static"):  # what is shipped fits another target
        maker.starting_draft(target, None)
    ours = build_artifact(ProposerKind.NEURAL, 4, files=pack_again(draft), target_fingerprint=FINGERPRINT)
    torn = {**ours, "draft.safetensors": safetensors.save({"weight": np.array([np.nan], np.float32)})}
    shipped_files = [torn]
    monkeypatch.setattr(neural, "shipped_draft", lambda fingerprint: shipped_files[-1])
    with pytest.raises(SlipstreamError, match="damaged"):
        maker.starting_draft(target, None)
    shipped_files.append(ours)
    assert maker.starting_draft(target, None) == artifact_digest(ours)
    w.serve(100)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome == learning.REGISTERED, attempt.reason
    with db.read() as session:
        made = policies.all_versions(session)
    assert artifact_digest(ours) not in {v.digest for v in made}  # what the gate did not pass is no version
    hybrid = next(v for v in made if v.version == attempt.version)
    assert hybrid.manifest["lineage"]["draft"] == artifact_digest(ours)
    shipped_files.append({**ours, "draft.json": b"{}"})  # the project is upgraded and ships another draft
    again = HybridMaker(w.settings, w.db, w.store, tiny.model)
    assert artifact_digest(rebuild(db, hybrid.version, {ProposerKind.HYBRID: again.rebuild})) == hybrid.digest
    shipped_files.append(ours)
    static = publish(w.db, w.store, ours)
    with db.write() as session:
        policies.retire(session, [static.version, hybrid.version], "t", w.now)
    with pytest.raises(SlipstreamError, match="train-static"):  # nobody starts from what was withdrawn
        maker.starting_draft(target, None)


def test_the_shipped_draft_is_sound_and_of_the_default_model() -> None:
    folder = Path(shipped.__file__).parent / shipped.FOLDER
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = read_manifest(files)
    assert manifest.target_fingerprint is not None
    assert shipped.shipped_draft(manifest.target_fingerprint) == files
    assert shipped.shipped_draft("another") is None
    assert soundness.faults(files) == []
    policy = load_proposer(files, artifact_digest(files), manifest.target_fingerprint, manifest.tokenizer_fingerprint)
    assert policy.kind is ProposerKind.NEURAL
    assert sum(map(len, files.values())) < 25e6
    held_out = manifest.lineage["held_out"]["all"]
    assert 1 + sum(held_out["accepted_per_pos"]) / held_out["steps"] > 1.6


def test_a_draft_that_diverges_is_an_error_and_no_version(
    db: Database, tmp_path: Path, tiny: Target, draft: DraftFile
) -> None:
    w = HybridWorld(db, tmp_path, tiny)
    publish(
        w.db, w.store, build_artifact(ProposerKind.NEURAL, 4, files=pack_again(draft), target_fingerprint=FINGERPRINT)
    )
    w.learner._maker.recipe = TuneRecipe(requests=40, lr=1e12, slots_per_step=20)  # type: ignore[attr-defined]
    w.serve(100)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert (attempt.outcome, attempt.version) == (learning.ERROR, None)
    assert "TrainingDiverged" in attempt.reason or "not finite" in attempt.reason
