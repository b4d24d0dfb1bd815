"""One step: draft, choose, verify, commit. One target pass for all rows, whatever their policies.

A row is verified with its own drafts, sampled with its own generator and committed on its own, so what a request gets
does not depend on who shares its batch. How much of its draft is verified does, and changes no token (``verify.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from engine.model.graphs import TimedCapture
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.runner.captured_pass import CapturedPass
from engine.runner.drafting import Heard, draft_together, feed_together
from engine.runner.live import Draft, Live
from engine.runner.request import Output
from engine.runner.target_pass import EagerPass, Passed, TargetPass
from engine.scheduler.scheduler import ScheduledStep
from engine.scheduler.sequence import NO_SLOT
from engine.speculation.control import Choice, KController, Offer, learn_costs, learn_worth
from engine.speculation.proposer import asked_of


class Runner:
    def __init__(
        self,
        model: Llama,
        control: KController,
        max_num_seqs: int,
        max_model_len: int,
        clock: Callable[[], float],
        capture: TimedCapture | None = None,
    ) -> None:
        """``capture``: how passes of fixed shapes run; None lays every step out anew."""
        self.model, self.control, self.clock, self._capture = model, control, clock, capture
        self.cache = KVCache(model.config, max_num_seqs, max_model_len, model.dtype, model.device)
        self.target_pass: TargetPass = (
            EagerPass(model, self.cache) if capture is None else CapturedPass(model, self.cache, capture)
        )
        self._committing = 0.0  # seconds that the last step took after its pass

    @property
    def captured_s(self) -> float:
        """Seconds that captures took so far, the draft pools' included."""
        return 0.0 if self._capture is None else self._capture.seconds

    def work_clock(self) -> float:
        """``clock``, which stands still while a pass is captured: that is no part of what drafts and passes cost."""
        return self.clock() - self.captured_s

    @torch.inference_mode()
    def step(self, scheduled: ScheduledStep, lives: Mapping[str, Live]) -> list[Output]:
        """Outputs of the rows that got tokens. ``lives`` holds the requests of ``scheduled`` by their ids."""
        started, captured_s = self.clock(), self.captured_s
        decoding = [lives[seq.request_id] for seq in scheduled.decodes]
        ending = [lives[chunk.seq.request_id] for chunk in scheduled.prefills if chunk.gives_first_token]
        for live in lives.values():
            if live.seq.slot == NO_SLOT:  # waiting, perhaps once more: another may need what its drafter held
                live.leave()
        base_rows = len(decoding) + sum(chunk.count for chunk in scheduled.prefills)
        drafts, drafting, choice = self._draft(decoding, base_rows - len(decoding))
        verified = [draft.tokens[:k] for draft, k in zip(drafts, choice.ks, strict=True)]

        began, drafting_captured_s = self.clock(), self.captured_s - captured_s
        for chunk in scheduled.prefills:
            if chunk.start == 0:
                live = lives[chunk.seq.request_id]
                live.begin(began)
                self.control.begin(live.controls[-1], min(len(lives), self.cache.num_slots))
        listeners = _listeners(scheduled, lives)
        layers = _aux_layers(listeners)
        passed = self.target_pass(scheduled, verified, lives, layers)
        outcomes = passed.outcomes
        now, captured_s = self.clock(), self.captured_s - captured_s
        for chunk in scheduled.prefills:
            lives[chunk.seq.request_id].times.prefill += now - began
            chunk.seq.num_computed += chunk.count
        before_s = began - started - drafting_captured_s
        pass_s = now - began - (captured_s - drafting_captured_s)
        spoke = [draft.part for draft in drafts]
        accepted = [outcome.accepted for outcome in outcomes[: len(decoding)]]
        plain_s = self._account(decoding, drafting, choice, spoke, accepted, base_rows, before_s, pass_s)
        for live in decoding:
            live.times.other += captured_s  # it was waited for, and teaches nothing of what drafts and passes cost
        outputs = []
        for live, draft, k, outcome in zip(decoding, drafts, choice.ks, outcomes, strict=False):
            outputs.append(live.guarded(partial(live.commit, draft, k, outcome, now, plain_s), now))
            # The last token committed is the next step's first input; rejected places are overwritten then.
            live.seq.num_computed = len(live.seq.token_ids) - 1
        for live, outcome in zip(ending, outcomes[len(decoding) :], strict=True):
            outputs.append(live.guarded(partial(live.commit_first, outcome.tokens[0], now), now))
        if passed.aux is not None:
            going = [live for live, output in zip([*decoding, *ending], outputs, strict=True) if not output.finished]
            heard, feeding = _heard(scheduled, passed, listeners, going), self.clock()
            feed_together(heard, layers, passed.aux)
            fed = self.clock()
            _charge(heard, fed - feeding)
            now += fed - feeding  # whoever listens pays for it, and it teaches nothing about passes
        self._committing = self.clock() - now
        return outputs

    def _draft(self, decoding: Sequence[Live], prompt_rows: int) -> tuple[list[Draft], list[float], Choice]:
        """(drafts, seconds each took, how many tokens of each are verified)."""
        dear = [live.controls[-1] for live in decoding]
        limits = self.control.limits(dear, [live.most_drafts for live in decoding], prompt_rows)
        drafts, drafting = draft_together(decoding, limits, self.model.config.vocab_size, self.work_clock)
        asked = [asked_of(live.parts - 1, draft.said) for live, draft in zip(decoding, drafts, strict=True)]
        if self.control.costs is not None:
            for live, row, tokens in zip(decoding, dear, asked, strict=True):
                live.expected_cost_s += row.acceptance.draft_s * tokens
        learn_costs(dear, drafting, asked)
        offers = [
            Offer(live.controls[d.part], len(d.tokens), d.confidence) for live, d in zip(decoding, drafts, strict=True)
        ]
        return drafts, drafting, self.control.choose(offers, prompt_rows)

    def _account(
        self,
        decoding: Sequence[Live],
        drafting: Sequence[float],
        choice: Choice,
        spoke: Sequence[int],
        accepted: Sequence[int],
        base_rows: int,
        before_s: float,
        pass_s: float,
    ) -> float:
        """Give every decoding row what it waited for and what it cost; let K control learn what the step took.

        Returns the seconds that a token would have taken without any draft in this step, 0 where no costs are known.
        Among decoding rows alone that is the measured cost of such a pass. Beside prompts, whose rows cost less and are
        not profiled, it is the pass that ran, less the share of it that the profile gives the drafted rows.
        """
        rows = base_rows + sum(choice.ks)
        other = before_s - sum(drafting) + self._committing  # of the last step: it is known only now
        for live, took, k, expected in zip(decoding, drafting, choice.ks, choice.expected, strict=True):
            times = live.times
            times.draft += took
            times.verify += pass_s
            times.other += before_s - took + self._committing
            times.cost += took + pass_s * (1 + k) / rows + other / len(decoding)
            live.expected_accepted += expected
            live.expected_plain_s += choice.plain_s / base_rows * (1 + expected)
            live.expected_cost_s += choice.pass_s * (1 + k) / rows
        if not decoding or self.control.costs is None:
            return 0.0
        if base_rows > len(decoding):  # prompts cost otherwise
            return pass_s * choice.plain_s / choice.pass_s / base_rows + other / len(decoding)
        learn_worth([live.controls for live in decoding], spoke, choice, accepted, pass_s + other)
        self.control.costs.observe(rows, pass_s + other)
        return choice.plain_s / base_rows


def _charge(heard: Sequence[Heard], seconds: float) -> None:
    """Reading hidden states is drafting: those who read pay, by rows."""
    rows = sum(h.last - h.first for h in heard)
    for h in heard:
        share = seconds * (h.last - h.first) / rows
        h.live.times.draft += share
        h.live.times.cost += share


def _listeners(scheduled: ScheduledStep, lives: Mapping[str, Live]) -> dict[str, Live]:
    """Those of a step whose drafters read what the target says in it, by their ids."""
    starts = [(seq, seq.num_computed) for seq in scheduled.decodes]
    starts += [(chunk.seq, chunk.start) for chunk in scheduled.prefills]
    return {seq.request_id: live for seq, start in starts if (live := lives[seq.request_id]).listens(start)}


def _aux_layers(listeners: Mapping[str, Live]) -> tuple[int, ...]:
    """The layers whose outputs somebody reads, none where nobody does."""
    readers = {live.reader for live in listeners.values()}
    return tuple(sorted({layer for reader in readers if reader is not None for layer in reader.aux_layers}))


def _heard(
    scheduled: ScheduledStep, passed: Passed, listeners: Mapping[str, Live], going: Sequence[Live]
) -> list[Heard]:
    """Which rows of the pass hold tokens that stay, of the listeners that go on; after the step was committed."""
    found = []
    decodes = len(scheduled.decodes)
    for seq, outcome, first in zip(scheduled.decodes, passed.outcomes, passed.firsts, strict=False):
        live, count = listeners.get(seq.request_id), len(outcome.tokens)
        if live is not None and live in going:
            found.append(Heard(live, seq.num_computed - count, first, first + count))
    for chunk, first in zip(scheduled.prefills, passed.firsts[decodes:], strict=True):
        live = listeners.get(chunk.seq.request_id)
        if live is not None and (not chunk.gives_first_token or live in going):
            found.append(Heard(live, chunk.start, first, first + chunk.count))
    return found
