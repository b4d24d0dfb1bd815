"""Drafting on CUDA: two captured passes, and one wait for a whole draft.

The first takes the slots that wait, as many as each request has. The second takes one drafted token of every request,
and is replayed until the longest draft is complete: token, position and hidden state go on from pass to pass on the
device. Every request is drafted for to its limit, and the host cuts off what has become too unlikely; tokens and
chances are those of ``DraftPool``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.batch import Row
from engine.model.draft import NUM_AUX, DraftNetwork
from engine.model.graphs import Body, Capture, Graphs
from engine.model.padded import WIDTHS, Bucket, PaddedRows, padded_batch
from engine.model.staged import Staged, upload
from engine.speculation.draft_pool import MOST_WAITING, DraftPool, Proposal, Want

MOST_DRAFTED = WIDTHS[-1] - 1


class CapturedPool(DraftPool):
    def __init__(
        self, network: DraftNetwork, num_seqs: int, max_len: int, min_survival: float, capture: Capture
    ) -> None:
        super().__init__(network, num_seqs, max_len, min_survival)
        config, dtype, device = network.config, network.target.dtype, network.target.device
        self._group = config.num_heads // config.num_kv_heads
        self._padded = PaddedRows(self.cache, self._group, dtype, device)
        self.graphs = Graphs(capture)
        self._waiting = torch.zeros(self._padded.most_tokens, NUM_AUX * config.hidden_size, dtype=dtype, device=device)
        self._limits = Staged(num_seqs, torch.int64, device)  # tokens wanted by the request at each place
        # What goes on from pass to pass: the last drafted token, the position of its slot's predecessor, that slot's
        # output, and how many tokens are drafted.
        self._token = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self._position = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self._output = torch.zeros(num_seqs, config.hidden_size, dtype=dtype, device=device)
        self._drafted = torch.zeros(1, dtype=torch.int64, device=device)
        self._first_place = torch.arange(num_seqs, device=device) * max_len
        self._answers = Staged(MOST_DRAFTED * 2 * num_seqs, torch.float64, device)  # [drafted, (token, chance), rows]

    def prepare(self, most_drafted: int) -> None:
        """Capture what drafts of so many tokens need after steps that verified such drafts, and after short prompts."""
        for bucket in self._padded.buckets(max(1 + most_drafted, MOST_WAITING)):
            self._prepared(bucket)

    def _prepared(self, bucket: Bucket) -> tuple[Body, Body]:
        """The pass over the slots that wait, and the one over a drafted token each."""
        chain = Bucket(bucket.rows, 1, bucket.length)
        return (
            self.graphs.get(bucket, lambda: self._begin(bucket), lambda: self._park(bucket)),
            self.graphs.get(("next", chain), lambda: self._go_on(chain), lambda: self._park(bucket)),
        )

    def _draft(self, wants: Sequence[Want], rows: Sequence[Row], aux: Tensor) -> list[Proposal]:
        longest = max(want.k for want in wants)
        bucket = self._padded.bucket(rows, beyond=longest)
        first, following = self._prepared(bucket)
        count = bucket.rows
        self._padded.fill(bucket, rows)
        self._limits.host[:count] = 0
        for want in wants:
            self._limits.host[want.state.place] = want.k
        self._limits.send(count)
        at = [row.slot * bucket.width + i for row in rows for i in range(len(row.token_ids))]
        self._waiting.index_copy_(0, upload(at, torch.int64, aux.device), aux)
        first()
        for _ in range(longest - 1):
            following()
        answers = self._answers.fetch(longest * 2 * count)
        return [self._cut(want, answers[want.state.place :: count]) for want in wants]

    def _cut(self, want: Want, answers: Sequence[float]) -> Proposal:
        """``answers``: token and chance of each drafted token in turn."""
        proposal, survival = Proposal([], []), 1.0
        for i in range(want.k):
            proposal.tokens.append(int(answers[2 * i]))
            proposal.confidence.append(answers[2 * i + 1])
            survival *= answers[2 * i + 1]
            if survival < self.min_survival:
                break
        return proposal

    def _park(self, bucket: Bucket) -> None:
        """Nobody wants anything: every place is padding, and no chain goes on."""
        self._padded.park(bucket)
        for state in (self._limits.device, self._token, self._position, self._output, self._drafted):
            state.zero_()

    @torch.inference_mode()
    def _begin(self, bucket: Bucket) -> None:
        """Captured: the slots that wait, and the first token of each draft."""
        count, width = bucket.rows, bucket.width
        batch = self._padded.batch(bucket)
        fused = self.network.fuse(self._waiting[: bucket.tokens])
        output = self.network.forward(batch, fused, self.cache).view(count, width, -1)
        last = (self._padded.counts(bucket) - 1).clamp(min=0)[:, None]
        self._position[:count].copy_(batch.positions.view(count, width).gather(1, last)[:, 0])
        self._drafted.zero_()
        self._emit(output.gather(1, last[:, :, None].expand(-1, 1, output.shape[-1]))[:, 0])

    @torch.inference_mode()
    def _go_on(self, bucket: Bucket) -> None:
        """Captured: one more token of each draft that is not as long as it may be."""
        count = bucket.rows
        position = self._position[:count].add_(1)
        ended = self._drafted >= self._limits.device[:count]
        place = (self._first_place[:count] + position).masked_fill(ended, self.cache.nowhere)
        at = position.masked_fill(ended, 0)
        batch = padded_batch(self._token[:count], at, place, bucket, self._group, self.network.target.dtype)
        self._emit(self.network.forward(batch, self._output[:count], self.cache))

    def _emit(self, output: Tensor) -> None:
        """The likeliest token and its chance, from outputs [rows, hidden], to the answers and the next pass."""
        count = output.shape[0]
        token, chance = self.network.likeliest(output)
        answer = torch.stack([token.double(), chance.double()])
        answers = self._answers.device[: MOST_DRAFTED * 2 * count].view(MOST_DRAFTED, 2, count)
        answers.index_copy_(0, self._drafted, answer[None])
        self._token[:count].copy_(token)
        self._output[:count].copy_(output)
        self._drafted.add_(1)
