"""The static draft: trained offline from conversations that the target wrote itself, before any traffic.

It is what adaptation starts from and what it has to beat, so nothing of it may come from benchmark prompts. Work goes
into a folder (features, checkpoint) and goes on there when it is called again, so it can be cut into slices.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from engine.contracts import ProposerKind, SlipstreamError
from engine.learner import checkpoint
from engine.learner.evaluate import ClassAcceptance, acceptance
from engine.learner.feature_cache import Conversation, cached_examples
from engine.learner.features import Example, can_teach
from engine.learner.trainer import Progress, Trainer, TrainOptions, choose_vocabulary, fresh_weights
from engine.model.draft import DraftConfig
from engine.model.loading import Target
from engine.speculation.artifact import build_artifact
from engine.speculation.neural_file import pack

CHECKPOINT = "checkpoint.safetensors"
HELD_OUT_SHARE = 0.06
REPORT_EVERY = 20
FROM_SCRATCH = TrainOptions(lr=1e-3, lr_end=1e-4, slots_per_step=2048, micro_slots=2048, warmup=40)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """What is trained. ``minutes`` bounds one call; a call that was cut off leaves the rest to the next."""

    vocab_size: int = 8192
    epochs: int = 6
    seed: int = 0
    minutes: float = float("inf")
    options: TrainOptions = FROM_SCRATCH


@dataclass(frozen=True, slots=True)
class StaticDraft:
    """The files of the trained draft, what it accepts of held-out conversations, and what it cost."""

    files: dict[str, bytes]
    held_out: Mapping[str, ClassAcceptance]
    steps: int
    conversations: int
    cpu_s: float


def read_conversations(path: Path, target: Target, max_tokens: int = 2048) -> list[Conversation]:
    """JSONL with ``prompt``, ``response_token_ids`` (else ``response``) and ``traffic_class`` where there is one."""
    found = list[Conversation]()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            prompt = target.tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}])
            output = row.get("response_token_ids") or target.tokenizer.encode(row["response"])
        except (ValueError, KeyError, TypeError) as error:
            raise SlipstreamError(
                f"{path}, line {number}: not a conversation with 'prompt' and 'response_token_ids': {error!r}."
            ) from None
        if can_teach(prompt, output) and len(prompt) + len(output) <= max_tokens:
            found.append(Conversation(tuple(prompt), tuple(output), str(row.get("traffic_class", "all"))))
    if not found:
        raise SlipstreamError(f"{path} holds no conversation of at most {max_tokens} tokens with a response.")
    return found


def is_held_out(conversation: Conversation, share: float = HELD_OUT_SHARE) -> bool:
    """By hash of the prompt, so that the same conversation is never on both sides, whatever file it came in."""
    digest = hashlib.blake2b(json.dumps(conversation.prompt_ids).encode(), digest_size=8, person=b"static").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def train_static(
    target: Target,
    conversations: Sequence[Conversation],
    folder: Path,
    plan: StaticPlan,
    say: Say,
    clock: Callable[[], float] = time.monotonic,
) -> StaticDraft | None:
    """The draft, or None when ``plan.minutes`` ran out first: call again to go on."""
    until = clock() + plan.minutes * 60
    config = DraftConfig.of_target(target.config, min(plan.vocab_size, target.config.vocab_size))
    examples = _examples(target, conversations, config, folder, say, lambda: clock() > until)
    if examples is None:
        return None
    pairs = list(zip(conversations, examples, strict=True))
    train = [e for c, e in pairs if not is_held_out(c)]
    vocabulary = choose_vocabulary(
        [c.output_ids for c in conversations if not is_held_out(c)], config.vocab_size, target.config.vocab_size
    )
    steps = -(-sum(e.num_slots for e in train) // plan.options.slots_per_step)
    options = replace(plan.options, total_steps=steps * plan.epochs)
    trainer = Trainer(target.model, config, fresh_weights(config, target.model, plan.seed), vocabulary, options)
    began = clock()
    run = _Run(folder / CHECKPOINT, trainer, _digest(target, conversations, config, options, plan))
    held = [(c.traffic_class, e) for c, e in pairs if is_held_out(c)]
    for epoch in range(run.epoch, plan.epochs):
        for done in trainer.epoch(train, plan.seed * 1_000 + epoch, skip=run.batch):
            run.count(done)
            over = clock() > until
            if run.batch % REPORT_EVERY == 0 or over:
                say(run.line(clock() - began))
                run.save()
            if over:
                return None
        by_class = acceptance(trainer.network, held)
        say(f"epoch {epoch + 1}/{plan.epochs}: held out " + ", ".join(f"{n} {a}" for n, a in by_class.items()))
        run.next_epoch()
    return StaticDraft(
        pack(config, trainer.weights, vocabulary),
        acceptance(trainer.network, held),
        trainer.steps,
        len(train),
        run.cpu_s,
    )


def policy_files(draft: StaticDraft, target: Target, num_speculative_tokens: int) -> dict[str, bytes]:
    """A neural policy of the draft, for this target only."""
    return build_artifact(
        ProposerKind.NEURAL,
        num_speculative_tokens,
        files=draft.files,
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
        lineage={
            "static": {"conversations": draft.conversations, "steps": draft.steps},
            "held_out": {name: asdict(counts) for name, counts in draft.held_out.items()},
            "code": f"slipstream {version('slipstream')}",
        },
    )


def _examples(
    target: Target,
    conversations: Sequence[Conversation],
    config: DraftConfig,
    folder: Path,
    say: Say,
    over: Callable[[], bool],
) -> list[Example] | None:
    name = hashlib.sha256(f"{target.fingerprint} {config.aux_layers} {_ids(conversations)}".encode()).hexdigest()[:16]

    def due(done: int, of: int) -> bool:
        say(f"target states of {done}/{of} conversations")
        return over()

    return cached_examples(folder / f"features-{name}", target.model, conversations, config.aux_layers, due)


class _Run:
    """Where a training is, and its checkpoint."""

    def __init__(self, path: Path, trainer: Trainer, digest: str) -> None:
        self.path, self.trainer, self.digest = path, trainer, digest
        self.epoch = self.batch = 0
        self.cpu_s, self._since = 0.0, time.process_time()
        self.recent: deque[Progress] = deque(maxlen=20)
        self._slots = 0
        if not path.exists():
            return
        state, place = checkpoint.load(path, trainer.optimizer.state_dict()["param_groups"])
        if place["digest"] != digest:
            raise SlipstreamError(f"{path} belongs to another training. Remove it, or give another folder.")
        trainer.load_state(state)
        self.epoch, self.batch, self.cpu_s = place["epoch"], place["batch"], place["cpu_s"]

    def count(self, done: Progress) -> None:
        self.recent.append(done)
        self.batch += 1
        self._slots += done.slots

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.save()

    def save(self) -> None:
        self.cpu_s, self._since = self.cpu_s + time.process_time() - self._since, time.process_time()
        place = {"digest": self.digest, "epoch": self.epoch, "batch": self.batch, "cpu_s": self.cpu_s}
        checkpoint.save(self.path, self.trainer.state(), place)

    def line(self, seconds: float) -> str:
        """The last steps, and the speed of this call."""
        rows, right = sum(p.rows for p in self.recent), sum(sum(p.right) for p in self.recent)
        loss = sum(p.loss for p in self.recent) / len(self.recent)
        return (
            f"epoch {self.epoch + 1}, step {self.trainer.steps}: loss {loss:.3f}, acceptance length of chains "
            f"{1 + right / rows:.3f}, {self._slots / max(seconds, 1e-9):.0f} tokens/s"
        )


def _digest(
    target: Target, conversations: Sequence[Conversation], config: DraftConfig, options: TrainOptions, plan: StaticPlan
) -> str:
    parts = [target.fingerprint, asdict(config), asdict(options), plan.seed, plan.epochs, _ids(conversations)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _ids(conversations: Sequence[Conversation]) -> str:
    """The conversations themselves, their order included."""
    return json.dumps([[c.prompt_ids, c.output_ids] for c in conversations])
