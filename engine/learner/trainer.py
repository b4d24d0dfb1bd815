"""Training of a neural draft: several drafted tokens deep, as it will be used (training-time test, arXiv 2503.01840).

Deterministic by seed on one machine: the order of the examples comes from it, and nothing else is random after the
first weights. Memory is bounded by ``micro_slots``; what a step costs does not grow with the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.learner.features import Example
from engine.learner.losses import LOSSES, head_loss
from engine.model.draft import DraftConfig, DraftNetwork
from engine.model.draft_unroll import Segment, unroll
from engine.model.linear import dense
from engine.model.llama import Llama


class TrainingDiverged(SlipstreamError):
    """The loss or a gradient is not finite, or the loss ran away: these weights are good for nothing."""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """``depth`` drafted tokens are trained, the s-th with weight ``decay`` ** (s - 1).

    ``first_rejection`` multiplies a row whose chain was right up to here and is wrong now: its target distribution is
    on-path and free. ``discarded`` multiplies the rows behind it, which a verification throws away (discard sampling:
    at most .1). A step takes ``slots_per_step`` slots, ``micro_slots`` at a time. The learning rate rises to
    ``lr`` over ``warmup`` steps and falls to ``lr_end`` in a line until ``total_steps``.
    """

    lr: float = 1e-3
    lr_end: float = 5e-4
    warmup: int = 0
    total_steps: int = 1
    depth: int = 3
    decay: float = 0.8
    first_rejection: float = 2.5
    discarded: float = 1.0
    loss: str = "forward_kl"
    clip: float = 1.0
    weight_decay: float = 0.0
    slots_per_step: int = 2048
    micro_slots: int = 1024


@dataclass(slots=True)
class Progress:
    """Counts since the start: ``right``[s] of ``rows``[s] chains that were right up to and with their s-th token."""

    steps: int = 0
    slots: int = 0
    loss: float = 0.0
    rows: int = 0
    right: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """1 + Σ_s P(the first s tokens are right): what a draft of ``depth`` tokens from every position would give."""
        return 1 + sum(self.right) / self.rows if self.rows else 1.0


class Trainer:
    def __init__(
        self,
        target: Llama,
        config: DraftConfig,
        weights: Mapping[str, Tensor],
        vocabulary: Tensor,
        options: TrainOptions,
    ) -> None:
        """Starts from copies of ``weights``. ``target`` must be float32 or float64: weights are trained in that."""
        if options.loss not in LOSSES:
            raise SlipstreamError(f"There is no loss {options.loss!r}; there are {sorted(LOSSES)}.")
        if target.dtype not in (torch.float32, torch.float64):
            raise SlipstreamError(f"A draft is trained beside a float32 target, not one in {target.dtype}.")
        self.options = options
        self.weights = {
            name: weights[name].detach().to(target.device, target.dtype, copy=True).requires_grad_()
            for name in config.shapes
        }
        self.network = DraftNetwork(config, self.weights, vocabulary, target)
        self._places = torch.full((target.config.vocab_size,), -1, dtype=torch.int64, device=target.device)
        self._places[self.network.vocabulary] = torch.arange(config.vocab_size, device=target.device)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        self.steps = 0
        self._usual: float | None = None  # what the loss has been lately

    def epoch(self, examples: Sequence[Example], seed: int, skip: int = 0) -> Iterator[Progress]:
        """One pass over ``examples`` in an order made from ``seed``; what each optimiser step did, as it is done.

        A pass that was interrupted goes on after its first ``skip`` steps.
        """
        order = np.random.default_rng(seed).permutation(len(examples))
        for number, batch in enumerate(batches([examples[i] for i in order], self.options.slots_per_step)):
            if number < skip:
                continue
            yield self.step(batch)

    def step(self, examples: Sequence[Example]) -> Progress:
        """One optimiser step over all predictions of ``examples``. TrainingDiverged leaves the weights as they were."""
        options, done = self.options, Progress(steps=1, right=[0] * self.options.depth)
        scale = sum(options.decay**s for s in range(options.depth)) * sum(e.num_predictions for e in examples)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in batches(examples, options.micro_slots):
            loss = self._losses(micro, done) / scale
            loss.backward()
            done.loss += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.weights.values()), options.clip))
        self._watch(done.loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.steps)
        self.optimizer.step()
        self.steps += 1
        return done

    def state(self) -> dict[str, Any]:
        """Everything a resumed training needs beside the examples; tensors and numbers only."""
        return {
            "weights": {name: w.detach() for name, w in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "usual": self._usual,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self._usual = state["steps"], state["usual"]

    def _losses(self, examples: Sequence[Example], done: Progress) -> Tensor:
        """Weighted sum of the losses of all rows and depths; counts go into ``done``."""
        batch = pack(examples, self.network.target)
        fused = self.network.fuse(batch.aux)
        outputs = unroll(self.network, batch.token_ids, fused, batch.segments, self.options.depth)
        truth = self._places[batch.truth]
        # Row i of step s continues the chain that started s - 1 rows before: `chained` says it was right so far.
        chained = torch.ones_like(truth, dtype=torch.bool)
        total = fused.new_zeros(())
        for s, output in enumerate(outputs):
            rows = torch.nonzero(batch.offset >= s)[:, 0]
            if not rows.numel():  # responses shorter than the chain
                break
            on_path = chained[rows]
            weight = self.options.decay**s

            def weights(right: Tensor, on_path: Tensor = on_path, weight: float = weight) -> Tensor:
                behind = torch.where(on_path, 1.0, self.options.discarded)
                return weight * torch.where(on_path & ~right, self.options.first_rejection, behind).to(fused.dtype)

            part, right = head_loss(
                self.network.normed(output[rows]), batch.said[rows], batch.log_z[rows], self.network.head, truth[rows],
                weights, LOSSES[self.options.loss],
            )  # fmt: skip
            total = total + part
            matched = torch.zeros_like(chained).index_copy_(0, rows, on_path & right)
            done.right[s] += int(matched.sum())
            chained = torch.cat([matched.new_zeros(1), matched[:-1]])
        done.rows += truth.shape[0]
        done.slots += batch.token_ids.shape[0]
        return total

    def _watch(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(f"After {self.steps} steps the loss is {loss} and its gradient's norm {norm}.")
        if self._usual is not None and self.steps >= 10 and loss > 2 * self._usual + 1:
            raise TrainingDiverged(f"After {self.steps} steps the loss jumped to {loss:.2f} from {self._usual:.2f}.")
        self._usual = loss if self._usual is None else 0.9 * self._usual + 0.1 * loss


def learning_rate(options: TrainOptions, step: int) -> float:
    """At optimiser step ``step``, counted from 0."""
    share = min(1.0, step / max(1, options.total_steps - 1))
    return (options.lr + (options.lr_end - options.lr) * share) * min(1.0, (step + 1) / (options.warmup + 1))


@dataclass(frozen=True, slots=True)
class PackedExamples:
    """Examples one after the other: N slots, M of them predictions, with ``offset`` [M] from their segment's begin."""

    token_ids: Tensor  # [N]: x[i+1]
    aux: Tensor  # [N, 3 * hidden]
    segments: tuple[Segment, ...]
    said: Tensor  # [M, hidden]
    log_z: Tensor  # [M]
    truth: Tensor  # [M]: x[i+2]
    offset: Tensor  # [M]


def pack(examples: Sequence[Example], target: Llama) -> PackedExamples:
    segments, first = [], 0
    for e in examples:
        segments.append(Segment(first, first + e.begin, first + e.num_slots))
        first += e.num_slots
    device, dtype = target.device, target.dtype
    return PackedExamples(
        torch.cat([e.token_ids[1:-1] for e in examples]).to(device),
        torch.cat([e.aux for e in examples]).to(device, dtype),
        tuple(segments),
        torch.cat([e.said for e in examples]).to(device, dtype),
        torch.cat([e.log_z for e in examples]).to(device, dtype),
        torch.cat([e.token_ids[e.begin + 2 :] for e in examples]).to(device),
        torch.cat([torch.arange(e.num_predictions) for e in examples]).to(device),
    )


def batches(examples: Sequence[Example], slots: int) -> Iterator[list[Example]]:
    """Consecutive examples, together at least ``slots`` slots; the last batch may hold fewer."""
    batch, held = list[Example](), 0
    for e in examples:
        batch.append(e)
        held += e.num_slots
        if held >= slots:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def fresh_weights(config: DraftConfig, target: Llama, seed: int) -> dict[str, Tensor]:
    """Where training starts: the target's last layer over its high state, and normal weights for what is new.

    Half the loss of the first hundred steps is saved by not starting from nothing (docs/log.md).
    """
    generator, h = torch.Generator().manual_seed(seed), config.hidden_size
    weights = {}
    for name, shape in config.shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=target.dtype)
        else:
            weights[name] = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.01).to(target.dtype)
    weights["norm"] = target.norm.detach().cpu().clone()
    weights["fuse"][:, -h:] += torch.eye(h, dtype=target.dtype)
    last = target.layers[-1]
    taken = {"out": dense(last.out), "gate_up": dense(last.gate_up), "down": dense(last.down)}
    taken |= {"hidden_norm": last.attention_norm, "mlp_norm": last.mlp_norm}
    for name, tensor in taken.items():
        if tuple(tensor.shape) == config.shapes[name]:
            weights[name] = tensor.detach().cpu().clone()
    if tuple((qkv := dense(last.qkv)).shape) == (config.shapes["qkv"][0], h):
        weights["qkv"][:, h:] += qkv.detach().cpu()
    return weights


def choose_vocabulary(outputs: Sequence[Sequence[int]], size: int, vocab_size: int) -> Tensor:
    """[size] int64 ascending: the most frequent tokens of ``outputs``, then the lowest ids.

    Byte-pair ids are given in the order of merging, so the lowest ids are the tokens most frequent in general.
    """
    counts = np.zeros(vocab_size, np.int64)
    for ids in outputs:
        np.add.at(counts, np.asarray(ids, np.int64), 1)
    best = np.lexsort((np.arange(vocab_size), -counts))[: min(size, vocab_size)]
    return torch.from_numpy(np.sort(best))
