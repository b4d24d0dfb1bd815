"""Training of the neural draft: losses by the book, the same twice, resumed as if never stopped, refused if broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.contracts import ProposerKind, SlipstreamError, artifact_digest
from engine.learner import checkpoint
from engine.learner.evaluate import accepted_from
from engine.learner.feature_cache import Conversation
from engine.learner.features import Example, example
from engine.learner.losses import LOSSES, forward_kl, head_loss, lk_alpha, reverse_kl
from engine.learner.static import StaticPlan, is_held_out, policy_files, read_conversations, train_static
from engine.learner.trainer import (
    Trainer,
    TrainingDiverged,
    TrainOptions,
    choose_vocabulary,
    fresh_weights,
    learning_rate,
)
from engine.model.draft import DraftConfig
from engine.model.loading import Target
from engine.speculation.artifact import load_proposer
from engine.speculation.proposer import PolicyError

OPTIONS = TrainOptions(lr=1e-2, lr_end=1e-2, slots_per_step=60, micro_slots=30)


@pytest.fixture(scope="module")
def conversations(tiny: Target) -> list[Conversation]:
    rng, ids = random.Random(0), range(3, tiny.config.vocab_size)
    return [
        Conversation(tuple(rng.choices(ids, k=6)), tuple(rng.choices(ids, k=rng.randint(2, 14))), name)
        for name in ("chat", "code") * 10
    ]


@pytest.fixture(scope="module")
def examples(tiny: Target, conversations: list[Conversation]) -> list[Example]:
    layers = DraftConfig.of_target(tiny.config, 64).aux_layers
    return [example(tiny.model, c.prompt_ids, c.output_ids, layers, torch.float64) for c in conversations]


def trainer_of(tiny: Target, options: TrainOptions = OPTIONS, seed: int = 0, **more: object) -> Trainer:
    config = DraftConfig.of_target(tiny.config, 64)
    weights = fresh_weights(config, tiny.model, seed)
    return Trainer(tiny.model, config, weights, torch.arange(64), options, **more)  # type: ignore[arg-type]


def test_what_the_target_says_is_kept(tiny: Target, examples: list[Example]) -> None:
    for one in examples[:4]:
        assert len(one.said) == one.num_predictions == one.num_slots - one.begin
        logits = one.said @ tiny.model.head.t()
        torch.testing.assert_close(logits.logsumexp(-1).float(), one.log_z)


def test_losses_are_what_they_are_called() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(forward_kl(q.log(), p)[0] - entropy, (p * (p / q).log()).sum())
    torch.testing.assert_close(reverse_kl(q.log(), p)[0], (q * (q / p).log()).sum())
    torch.testing.assert_close(lk_alpha(q.log(), p)[0], -torch.tensor(0.75, dtype=torch.float64).log())
    for loss in LOSSES.values():
        assert loss(q.log(), p)[0] > loss(p.log(), p)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_head_is_differentiated_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd over everything at once, with weights that depend on what was right."""
    monkeypatch.setattr("engine.learner.losses.CHUNK", 3)
    generator = torch.Generator().manual_seed(1)
    hidden, said, head = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=n == 8) for n in (8, 9, 11)
    )
    said = said[:8]
    log_z = (said @ head.t()).logsumexp(-1) + 0.1
    truth = torch.tensor([0, 1, 2, 3, 4, 5, -1, 7])
    truth[3] = (hidden[3] @ head.t()).argmax()

    def weights(right: torch.Tensor) -> torch.Tensor:
        return torch.where(right, 1.0, 2.0).double()

    total, right = head_loss(hidden, said, log_z, head, truth, weights, LOSSES[name])
    (got,) = torch.autograd.grad(3 * total, hidden)
    logits = hidden @ head.t()
    assert right.tolist() == (logits.argmax(-1) == truth).tolist()
    want = 3 * (LOSSES[name](logits, (said @ head.t() - log_z[:, None]).exp()) * weights(right)).sum()
    torch.testing.assert_close(3 * total, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, hidden)[0])


def test_training_lowers_the_loss_and_is_the_same_twice(tiny: Target, examples: list[Example]) -> None:
    first, second = trainer_of(tiny), trainer_of(tiny)
    losses = [done.loss for epoch in range(6) for done in first.epoch(examples, epoch)]
    again = [done.loss for epoch in range(6) for done in second.epoch(examples, epoch)]
    assert losses == again
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    other = [done.loss for epoch in range(6) for done in trainer_of(tiny).epoch(examples, epoch + 1)]
    assert other != losses


def test_memory_is_bounded_by_pieces_that_change_nothing(tiny: Target, examples: list[Example]) -> None:
    whole, pieces = trainer_of(tiny, replace(OPTIONS, micro_slots=10_000)), trainer_of(tiny)
    assert whole.step(examples).loss == pytest.approx(pieces.step(examples).loss)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(weight, pieces.weights[name])


def test_all_sequences_at_once_are_what_each_is_alone(
    tiny: Target, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: one product over all sequences, masked from each other, against one for each."""
    alone = trainer_of(tiny)
    done = alone.step(examples)
    monkeypatch.setattr("engine.model.draft_unroll.launches_cost", lambda device: True)
    together = trainer_of(tiny)
    again = together.step(examples)
    assert (again.right, again.rows, again.loss) == (done.right, done.rows, pytest.approx(done.loss))
    for name, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[name], weight)
        assert weight.grad is not None
        torch.testing.assert_close(together.weights[name].grad, weight.grad)


def test_the_first_rejection_weighs_more(tiny: Target, examples: list[Example]) -> None:
    """With nothing ever right, every first token is a first rejection and every later one is off the path."""
    plain = trainer_of(tiny, replace(OPTIONS, first_rejection=1.0)).step(examples)
    heavy = trainer_of(tiny, replace(OPTIONS, first_rejection=2.0)).step(examples)
    assert 1.2 * plain.loss < heavy.loss < 2 * plain.loss


def test_what_a_verification_discards_weighs_as_much_as_is_asked(tiny: Target, examples: list[Example]) -> None:
    """The rows behind a first rejection; what was right, and the rejection itself, keep their weight."""
    whole, tenth, none = (
        trainer_of(tiny, replace(OPTIONS, first_rejection=1.0, discarded=share)).step(examples).loss
        for share in (1.0, 0.1, 0.0)
    )
    assert none < tenth < whole
    assert tenth - none == pytest.approx(0.1 * (whole - none))


def test_a_chain_is_accepted_up_to_its_first_wrong_token() -> None:
    right = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    want = []
    for start in range(40):
        s = 0
        while s < 3 and start + s < 40 and right[s, start + s]:
            s += 1
        want.append(s)
    assert accepted_from(right).tolist() == want
    assert set(want) == {0, 1, 2, 3}


def test_broken_training_is_noticed_and_leaves_the_weights(tiny: Target, examples: list[Example]) -> None:
    trainer = trainer_of(tiny)
    trainer.step(examples)
    before = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
    poisoned = replace(examples[0], aux=torch.full_like(examples[0].aux, float("nan")))
    with pytest.raises(TrainingDiverged, match="nan"):
        trainer.step([poisoned])
    for name, weight in before.items():
        assert torch.equal(weight, trainer.weights[name])
    for _ in range(10):
        trainer.step(examples)
    with torch.no_grad():
        trainer.weights["norm"].mul_(1e3)
    with pytest.raises(TrainingDiverged, match="jumped"):
        trainer.step(examples)
    with pytest.raises(SlipstreamError, match="no loss"):
        trainer_of(tiny, replace(OPTIONS, loss="hope"))


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainOptions(lr=1.0, lr_end=0.5, warmup=3, total_steps=11)
    rates = [learning_rate(options, step) for step in range(12)]
    assert rates[0] == 0.25
    assert max(rates) == rates[3] < 1.0
    assert rates[10] == rates[11] == 0.5


def test_checkpoints_hold_everything(tiny: Target, examples: list[Example], tmp_path: Path) -> None:
    one, other = trainer_of(tiny), trainer_of(tiny, seed=5)
    list(one.epoch(examples, 0))
    checkpoint.save(tmp_path / "c.safetensors", one.state(), {"epoch": 1})
    state, place = checkpoint.load(tmp_path / "c.safetensors", other.optimizer.state_dict()["param_groups"])
    other.load_state(state)
    assert place == {"epoch": 1}
    assert [d.loss for d in one.epoch(examples, 1)] == [d.loss for d in other.epoch(examples, 1)]
    (tmp_path / "c.safetensors").write_bytes(b"torn")
    with pytest.raises(SlipstreamError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "c.safetensors", [])


class Slow:
    """A clock that moves at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_slices_of_a_static_training_are_one_training(
    tiny: Target, conversations: list[Conversation], tmp_path: Path
) -> None:
    plan, lines = StaticPlan(vocab_size=64, epochs=2, options=OPTIONS), list[str]()
    whole = train_static(tiny, conversations, tmp_path / "whole", plan, lines.append)
    assert whole is not None
    assert any("held out" in line for line in lines)

    def in_slices(clock: Callable[[], float]) -> dict[str, bytes]:
        for calls in range(1, 200):
            done = train_static(tiny, conversations, tmp_path / "sliced", replace(plan, minutes=0.1), print, clock)
            if done is not None:
                assert calls > 3
                return done.files
        raise AssertionError("never done")

    assert in_slices(Slow(3.0)) == whole.files
    files = policy_files(whole, tiny, 4)
    policy = load_proposer(files, artifact_digest(files), tiny.fingerprint)
    assert (policy.kind, policy.num_speculative_tokens) == (ProposerKind.NEURAL, 4)
    with pytest.raises(PolicyError, match="made for target"):
        load_proposer(files, artifact_digest(files), "another")
    others = [replace(c, output_ids=c.output_ids[::-1]) for c in conversations]  # as many of them
    with pytest.raises(SlipstreamError, match="another training"):
        train_static(tiny, others, tmp_path / "whole", plan, print)
    with pytest.raises(SlipstreamError, match="another training"):
        train_static(tiny, conversations, tmp_path / "whole", replace(plan, seed=1), print)


def test_conversations_are_read_strictly(tiny: Target, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a", "response_token_ids": [5, 6, 7], "traffic_class": "code"}\n{"prompt": "b"}\n')
    with pytest.raises(SlipstreamError, match="line 2"):
        read_conversations(path, tiny)
    path.write_text('{"prompt": "a", "response": "the thing"}\n')
    (one,) = read_conversations(path, tiny)
    assert (one.traffic_class, one.output_ids) == ("all", tuple(tiny.tokenizer.encode("the thing")))
    path.write_text('{"prompt": "a", "response_token_ids": [5]}\n')
    with pytest.raises(SlipstreamError, match="no conversation"):
        read_conversations(path, tiny)


def test_the_vocabulary_is_what_was_said_most_and_then_the_lowest_ids() -> None:
    assert choose_vocabulary([[9, 9, 7], [7, 9, 30]], 5, 40).tolist() == [0, 1, 7, 9, 30]


def test_held_out_is_a_share_by_prompt() -> None:
    made = [Conversation((i, 2 * i), (1, 2), "chat") for i in range(2_000)]
    assert 0.04 < sum(map(is_held_out, made)) / 2_000 < 0.08
