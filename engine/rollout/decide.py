"""One tick of a rollout: ``decide`` is pure, and everything it knows is in its arguments.

A rollout that is tried on a slice ends when it is proved there, with the champion back: a champion serves everybody,
and nothing is known of the others.

The order is the safety argument: somebody who has already taken the canary back is believed; then the guards, on every
tick in every state with traffic; then an abort; then what ends without blame (traffic that nobody can measure, the
deadline); only then holds, approvals and progress. Only PASS advances, only FAIL rolls back by itself, everything else
waits, and no wait is without an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from engine.contracts import CANARY, CONTROL, TERMINAL_STATES, RolloutState, Verdict
from engine.percent import percent
from engine.rollout import ready, shadow
from engine.rollout.evaluate import evaluate
from engine.rollout.guards import MAX_RESTARTS, RolloutSpec
from engine.rollout.records import Action, Decision, Evidence, GuardResult, Ledger, RolloutStatus, consuming
from engine.rollout.verdict import blindness, judge
from engine.store.repositories.commands import Command
from engine.store.segments import Segment

PROMOTED_STATES = frozenset({RolloutState.PROMOTING, RolloutState.PROMOTED, RolloutState.WATCHING})


def decide(
    spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, commands: Sequence[Command], now: datetime
) -> Decision:
    """What to do now. ``commands`` are those not consumed yet, oldest first; at most one is consumed per tick."""
    if status.state in TERMINAL_STATES:
        return Decision(status.verdict, Action.NONE, "it is over", status)
    command = commands[0] if commands else None
    if status.state is RolloutState.ROLLING_BACK:
        return _rolling_back(spec, status, evidence, now)
    if status.in_shadow:
        return shadow.decide(spec, status, evidence, command, now)
    if not status.serves:
        return ready.decide(spec, status, evidence, command, now)

    status, blind = _noting_restarts(status, evidence), blindness(spec, status, evidence, now)
    status = _noting_blindness(status, blind, now)
    guards = evaluate(spec, evidence.segments, status.restarts, now, watching=status.watch is not None)
    verdict, why = judge(spec, status, evidence, guards, now)
    if status.state in PROMOTED_STATES and verdict is not Verdict.FAIL:
        why = f"; {why}" if verdict is Verdict.ERROR else ""  # a broken split is said all the same
        verdict = Verdict.PASS  # nothing is left to prove: it is watched beside a control, and only FAIL takes it back
    tick = _Tick(spec, status, evidence, guards, verdict, why, now)
    if (moved := tick.moved_by_others()) is not None:
        return moved
    if verdict is Verdict.FAIL:
        return tick.roll_back(why)
    if command is not None and command.verb == "abort":
        aborted = tick.roll_back(f"aborted by {command.actor}: {command.reason}")
        return consuming(aborted, command)
    if blind is not None and (unguarded := tick.unguarded(blind)) is not None:
        return unguarded
    if status.state in PROMOTED_STATES:
        return consuming(tick.after_promotion(command), command)
    if now - status.stages[0].began > timedelta(seconds=spec.deadline_s):
        late = f"no verdict within {spec.deadline_s:g} s ({why}): back to the champion"
        return tick.roll_back(late, RolloutState.INCONCLUSIVE)
    if command is not None:
        return consuming(tick.obey(command), command)
    return tick.proceed()


def _noting_restarts(status: RolloutStatus, evidence: Evidence) -> RolloutStatus:
    """Which replicas have come back after a crash since the canary serves."""
    began = status.stages[0].began
    crashed = {r.started_at for r in evidence.replicas if r.after_crash and r.started_at is not None}
    new = {at for at in crashed if at > began}.difference(status.restarts)
    return replace(status, restarts=tuple(sorted(new.union(status.restarts))[-MAX_RESTARTS:])) if new else status


def _noting_blindness(status: RolloutStatus, blind: str | None, now: datetime) -> RolloutStatus:
    """Since when nobody has seen what the canary does, without a gap."""
    since = (status.blind_since or now) if blind is not None else None
    return status if since == status.blind_since else replace(status, blind_since=since)


def _rolling_back(spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, now: datetime) -> Decision:
    """The plan is in the ledger; it is done when no replica can route by an older one.

    One that has gone silent may still do so until its lease ends, so it is waited for as long.
    """
    behind = [
        r.replica_id if r.alive else f"{r.replica_id}, which is silent, or the end of its lease"
        for r in evidence.replicas
        if (r.observed_generation or 0) < (status.generation or 0)
    ]
    if behind:
        why = f"waiting for {', '.join(behind)} ({status.reason})"
        if now - status.since > timedelta(seconds=spec.promote_s):
            # Never claimed before it is seen: while such a replica lives, its canary traffic does not end by itself.
            why = f"{', '.join(behind)} does not follow the ledger: stop it. Waiting ({status.reason})"
        return Decision(status.verdict, Action.NONE, why, status)
    return Decision(status.verdict, Action.NONE, status.reason, status.moved(status.ends_as, now))


class _Tick:
    """The arguments of one tick with traffic, and the moves that are open to it."""

    def __init__(
        self,
        spec: RolloutSpec,
        status: RolloutStatus,
        evidence: Evidence,
        guards: tuple[GuardResult, ...],
        verdict: Verdict,
        why: str,
        now: datetime,
    ) -> None:
        self.spec, self.status, self.evidence, self.guards = spec, status, evidence, guards
        self.verdict, self.why, self.now = verdict, why, now

    def moved_by_others(self) -> Decision | None:
        """The ledger no longer serves our canary: whoever did that is believed, and it is never done again."""
        ledger = self.evidence.ledger
        if ledger is None or ledger.generation == self.status.generation:
            return None
        if self.status.state in PROMOTED_STATES:
            gone = ledger.champion != self.status.canary
        else:
            gone = ledger.canary != self.status.canary
        if not gone:
            return None
        if self._promoted_by_hand(ledger):
            return self._to(RolloutState.INCONCLUSIVE, f"made champion directly by {ledger.actor}: {ledger.reason}")
        decision = self._to(RolloutState.ROLLING_BACK, f"rolled back by {ledger.actor}: {ledger.reason}")
        return replace(decision, status=replace(decision.status, generation=ledger.generation))

    def _promoted_by_hand(self, ledger: Ledger) -> bool:
        return self.status.state not in PROMOTED_STATES and ledger.champion == self.status.canary

    def roll_back(self, why: str, ends_as: RolloutState = RolloutState.ROLLED_BACK) -> Decision:
        """Back to the champion; success is claimed when the replicas are seen to route by it."""
        decision = self._to(RolloutState.ROLLING_BACK, why, Action.ROLL_BACK)
        return replace(decision, status=replace(decision.status, ends_as=ends_as))

    def unguarded(self, blind: str) -> Decision | None:
        """Nobody has seen what the canary does for too long: it serves unguarded, so it goes back."""
        since = self.status.blind_since
        if since is None or self.now - since <= timedelta(seconds=self.spec.blind_s):
            return None
        self.verdict = Verdict.ERROR
        why = f"unguarded for more than {self.spec.blind_s:g} s ({blind}): back to the champion"
        return self.roll_back(why, RolloutState.INCONCLUSIVE)

    def after_promotion(self, command: Command | None) -> Decision:
        """PROMOTING until every replica that may serve routes by the new champion; PROMOTED, WATCHING, DONE."""
        if command is not None:
            return self._to(self.status.state, f"{command.verb} refused: v{self.status.canary} is champion already")
        if self.status.state is RolloutState.PROMOTING:
            behind = [
                r.replica_id
                for r in self.evidence.replicas
                if (r.observed_generation or 0) < (self.status.generation or 0)
            ]
            waits_for = ", ".join(behind) or "a replica"
            if behind or not self.evidence.alive:
                if self._for(self.spec.promote_s):
                    self.verdict = Verdict.INSUFFICIENT
                    why = f"waited {self.spec.promote_s:g} s for {waits_for} to route by {self.status.generation}: "
                    return self.roll_back(
                        f"{why}v{self.status.canary} cannot become champion everywhere, back to "
                        f"v{self.status.champion}",
                        RolloutState.INCONCLUSIVE,
                    )
                return self._to(RolloutState.PROMOTING, f"waiting for {waits_for}")
            return self._to(RolloutState.PROMOTED, f"v{self.status.canary} is champion on every replica")
        if self.status.state is RolloutState.PROMOTED:
            return self._to(RolloutState.WATCHING, f"watching for {self.spec.watch_s:g} s")
        return self._watching()

    def _watching(self) -> Decision:
        """Until its time has passed and its guards had something to judge, which no seconds promise; the deadline ends
        that, and what was not seen is said."""
        least = min(one.requests if (one := self._all_of(arm)) is not None else 0 for arm in (CANARY, CONTROL))
        waits = self.spec.rules > 2 and self.spec.watch_s > 0 and self.status.watch is not None
        short = waits and least < self.spec.min_requests
        longest = max(self.spec.watch_s, self.spec.deadline_s) if short else self.spec.watch_s
        if self._for(longest) and self.status.blind_since is None:
            action = Action.SETTLE if self.status.watch is not None else Action.NONE
            seen = self._all_of(CANARY)
            unwatched = "" if seen is not None and seen.requests else ", unwatched: nothing was served beside a control"
            if short and not unwatched:
                unwatched = f", hardly watched: {least} of {self.spec.min_requests} requests per arm beside a control"
            return self._to(RolloutState.DONE, f"v{self.status.canary} is champion and stays{unwatched}", action)
        until = f" and {self.spec.min_requests} requests per arm, {least} so far" if waits else ""
        return self._to(RolloutState.WATCHING, f"watching for {self.spec.watch_s:g} s{until}{self.why}")

    def obey(self, command: Command) -> Decision:
        by = f"{command.actor}: {command.reason}"
        if command.verb == "hold":
            return self._hold(f"held by {by}", "operator")
        if command.verb == "resume":
            return self._resume(f"resumed by {by}")
        if limits := self.spec.limits():
            why = f"it is tried on {', '.join(limits)} only, and a champion serves everybody"
            return self._to(self.status.state, f"promotion refused ({command.actor}): {why}")
        verdict, why = judge(self.spec, self.status, self.evidence, self.guards, self.now, needs_proof=False)
        if verdict is not Verdict.PASS:
            return self._to(self.status.state, f"promotion refused ({command.actor}): {why}")
        self.verdict = verdict
        return self._promote(f"promoted by {by}")

    def proceed(self) -> Decision:
        held = self.status.state is RolloutState.HELD
        if self.verdict in (Verdict.STALE, Verdict.ERROR):
            return self._hold(self.why, "evidence")
        if held and self.status.held_by == "operator":
            return self._to(RolloutState.HELD, self.status.reason)
        if held:
            return self._resume(f"the evidence is fit again: {self.why}")
        if self.verdict is not Verdict.PASS:
            return self._to(self.status.state, self.why)
        if self.status.state is RolloutState.SOAKING:
            if self._for(self.spec.soak_s):
                why = f"soaked for {self.spec.soak_s:g} s; {self.why}"
                return self._proved(why) if self.spec.limits() else self._promote(why)
            return self._to(RolloutState.SOAKING, f"soaking for {self.spec.soak_s:g} s; {self.why}")
        if len(self.status.stages) < len(self.spec.steps):
            weight = self.spec.steps[len(self.status.stages)]
            return self._to(RolloutState.RAMPING, f"to {percent(weight)}: {self.why}", Action.SET_WEIGHT, weight)
        return self._to(RolloutState.SOAKING, f"every step passed: {self.why}")

    def _proved(self, why: str) -> Decision:
        limits = ", ".join(self.spec.limits())
        proved = f"proved for {limits}; {why}{self._unaudited()}. Try it on all traffic next"
        return self.roll_back(proved, RolloutState.DONE)

    def _unaudited(self) -> str:
        """Said of a promotion, and no reason against it: payloads may be switched off, and then nothing is audited."""
        seen = self._all_of(CANARY)
        return "" if seen is not None and seen.audited else "; unaudited: no output was compared with the target's own"

    def _all_of(self, arm: str) -> Segment | None:
        return next((s for s in self.evidence.segments if s.arm == arm and s.traffic_class is None), None)

    def _promote(self, why: str) -> Decision:
        why += self._unaudited()
        decision = self._to(RolloutState.PROMOTING, why, Action.PROMOTE, self.spec.holdback)
        return replace(decision, status=replace(decision.status, held_by="", resumes_to=None))

    def _hold(self, why: str, by: str) -> Decision:
        status = self.status
        kept = "operator" if status.held_by == "operator" else by  # evidence never loosens what a person has held
        resumes_to = status.resumes_to if status.state is RolloutState.HELD else status.state
        reason = status.reason if kept == "operator" and by != "operator" else why
        decision = self._to(RolloutState.HELD, reason)
        return replace(decision, status=replace(decision.status, held_by=kept, resumes_to=resumes_to))

    def _resume(self, why: str) -> Decision:
        if self.status.state is not RolloutState.HELD:
            return self._to(self.status.state, f"nothing to resume; {self.why}")
        decision = self._to(self.status.resumes_to or RolloutState.RAMPING, why)
        return replace(decision, status=replace(decision.status, held_by="", resumes_to=None))

    def _for(self, seconds: float) -> bool:
        return self.now - self.status.since >= timedelta(seconds=seconds)

    def _to(self, state: RolloutState, why: str, action: Action = Action.NONE, weight: float | None = None) -> Decision:
        status = replace(self.status.moved(state, self.now), verdict=self.verdict, reason=why)
        return Decision(self.verdict, action, why, status, self.guards, weight)
