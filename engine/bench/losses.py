"""The ablation of losses: one draft tuned on the same responses under each loss, and what it accepts then."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.bench.report import Figure, Report
from engine.bench.workload import Responses
from engine.contracts import SlipstreamError
from engine.demo import prompts
from engine.learner.evaluate import acceptance
from engine.learner.feature_cache import Conversation, cached_examples
from engine.learner.features import Example, can_teach
from engine.learner.neural import TuneRecipe
from engine.learner.shipped import shipped_draft
from engine.learner.trainer import Trainer, TrainOptions
from engine.model.draft import DraftNetwork
from engine.model.loading import Target, configured_target
from engine.ops.supervisor import Say
from engine.runner.engine import Engine
from engine.settings import Settings
from engine.speculation.artifact import read_artifact
from engine.speculation.neural_file import DraftFile, unpack
from engine.speculation.none import NoneProposer

TUNE = TuneRecipe().options
VARIANTS: Mapping[str, TrainOptions] = {
    "forward_kl": TUNE,
    "reverse_kl": replace(TUNE, loss="reverse_kl"),
    "lk_alpha": replace(TUNE, loss="lk_alpha"),
    "lk_hybrid": replace(TUNE, loss="lk_hybrid"),
    "no_first_rejection": replace(TUNE, first_rejection=1.0),
    "discard_0.1": replace(TUNE, discarded=0.1),
}
"""forward_kl is what the learner does; the last two are it without the weight on the first rejected token, and with a
tenth of the weight on those behind it."""


@dataclass(frozen=True, slots=True)
class Options:
    """``prompts`` of the class that is learned. Each seed draws ``learn`` responses to learn and ``tested`` others."""

    prompts: tuple[Path, ...]
    static: Path | None = None
    learn: int = 32
    tested: int = 24
    tokens: int = 128
    seeds: int = 3
    seed: int = 0


def run(settings: Settings, options: Options, say: Say) -> Report:
    target = configured_target(settings, say, "float32")
    files = read_artifact(options.static) if options.static is not None else shipped_draft(target.fingerprint)
    if files is None:
        raise SlipstreamError(f"No draft comes with the project for {target.name}: name one with --static.")
    draft = unpack(files)
    examples = _examples(target, settings, options, draft, say)
    before = DraftNetwork(draft.config, draft.weights, draft.vocabulary, target.model)
    lengths: dict[str, list[float]] = {name: [] for name in ("before", *VARIANTS)}
    for seed in range(options.seed, options.seed + options.seeds):
        drawn = random.Random(seed).sample(examples, options.learn + options.tested)
        learned, tested = drawn[: options.learn], [("all", e) for e in drawn[options.learn :]]
        lengths["before"].append(_length(before, tested))
        for name, wanted in VARIANTS.items():
            trainer = Trainer(target.model, draft.config, draft.weights, draft.vocabulary, wanted)
            for _ in trainer.epoch(learned, seed):
                pass
            lengths[name].append(_length(trainer.network, tested))
            say(f"seed {seed}, {name}: {lengths[name][-1]:.3f}, before {lengths['before'][-1]:.3f}")
    return Report("losses", options.seed, _figures(lengths))


def _examples(target: Target, settings: Settings, options: Options, draft: DraftFile, say: Say) -> list[Example]:
    """The target's states of all responses; those that were never made are made."""
    texts = dict.fromkeys(p.turns[0] for file in options.prompts for p in prompts.read(file))
    wanted = [tuple(target.tokenizer.apply_chat_template([{"role": "user", "content": text}])) for text in texts]
    if len(wanted) < options.learn + options.tested:
        raise SlipstreamError(
            f"{len(wanted)} prompts, {options.learn} to learn from and {options.tested} others to test on are needed."
        )
    responses = Responses(target, options.tokens, settings.dir("bench"))
    if responses.missing(wanted):
        engine = Engine(target, max_num_seqs=16, max_model_len=max(map(len, wanted)) + options.tokens, max_queue=10_000)
        engine.load(0, NoneProposer())
        responses.make(engine, wanted, say)
    found = [Conversation(p, o, "all") for p, o in responses.of(wanted) if can_teach(p, o)]
    key = f"{target.fingerprint} {draft.config.aux_layers} {[(c.prompt_ids, c.output_ids) for c in found]}"
    folder = settings.dir("bench") / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def due(done: int, of: int) -> bool:
        say(f"target states of {done}/{of} responses")
        return False

    examples = cached_examples(folder, target.model, found, draft.config.aux_layers, due)
    assert examples is not None  # it is never due
    return examples


def _length(network: DraftNetwork, tested: Sequence[tuple[str, Example]]) -> float:
    return acceptance(network, tested)["all"].acceptance_length


def _figures(lengths: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Means over seeds between the least and the most; each variant's difference to forward KL is paired by seed."""
    found = []
    for name, values in lengths.items():
        found.append(
            Figure(f"acceptance_length:{name}", float(np.mean(values)), min(values), max(values), len(values), "tokens")
        )
    base = np.array(lengths["forward_kl"])
    for name in VARIANTS:
        if name != "forward_kl":
            differences = np.array(lengths[name]) - base
            low, high = float(differences.min()), float(differences.max())
            found.append(Figure(f"difference:{name}", float(differences.mean()), low, high, len(base), "tokens"))
    return found
