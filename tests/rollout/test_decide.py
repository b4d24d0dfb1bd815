"""Each way a rollout can go, one decision at a time."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from engine.contracts import CANARY, CONTROL, RolloutState, Verdict
from engine.rollout import specs
from engine.rollout.decide import decide
from engine.rollout.records import Action, Replica, weights
from engine.store import histogram
from tests.rollout.world import CANARY_VERSION, CHAMPION, FALLBACK, World, ramping, segment


def to_soaking(world: World) -> None:
    for _ in world.spec.steps:
        world.both(400, canary=2.3, stage_requests=400)
        world.tick(10)
    assert world.status.state is RolloutState.SOAKING


def promoted(world: World) -> None:
    to_soaking(world)
    world.both(400, canary=2.3)
    assert world.tick(world.spec.soak_s).action is Action.PROMOTE


def test_a_better_canary_climbs_its_steps_and_becomes_champion() -> None:
    world = ramping()
    promoted(world)
    assert world.ledger.champion == CANARY_VERSION
    states = [world.tick(s).to_state for s in (1, 1, world.spec.watch_s, 1)]
    assert states == [RolloutState.PROMOTED, RolloutState.WATCHING, RolloutState.DONE, RolloutState.DONE]
    assert [stage.weight for stage in world.status.stages] == list(world.spec.steps)


def test_what_is_proved_for_one_class_ends_well_and_is_not_champion_of_all() -> None:
    world = ramping(replace(specs.preset("fast"), traffic_classes=("chat",)))
    to_soaking(world)
    world.ask("promote", "I am sure")
    world.both(400, canary=2.3)
    assert "a champion serves everybody" in world.tick(1).reason
    decision = world.tick(world.spec.soak_s)
    assert (decision.verdict, decision.to_state) == (Verdict.PASS, RolloutState.ROLLING_BACK)
    assert "proved for chat" in decision.reason
    assert world.tick().to_state is RolloutState.DONE
    assert (world.ledger.champion, world.ledger.canary) == (CHAMPION, None)
    assert weights(world.status, world.evidence())["desired"] == 0.0


def test_what_was_not_audited_or_not_watched_is_said() -> None:
    world = ramping()
    to_soaking(world)
    world.both(400, canary=2.3)
    assert "unaudited" in world.tick(world.spec.soak_s).reason
    world.segments = ()
    assert [world.tick(1).to_state for _ in range(2)] == [RolloutState.PROMOTED, RolloutState.WATCHING]
    world.replicas = (replace(world.replicas[0], load_error="no such file"),)
    assert "no such file" in world.tick(1).reason
    assert "unwatched" in world.tick(world.spec.deadline_s).reason
    world = ramping()
    to_soaking(world)
    world.traffic(replace(segment(CANARY, 400, 2.3), audited=1), segment(CONTROL, 400))
    assert "unaudited" not in world.tick(world.spec.soak_s).reason
    world.both(80, canary=2.3)
    assert "unwatched" not in [world.tick(s).reason for s in (1, 1, world.spec.watch_s)][-1]


def test_a_canary_that_drafts_badly_is_rolled_back_to_the_recorded_champion() -> None:
    world = ramping()
    world.both(40, canary=1.05)
    decision = world.tick(10)
    assert (decision.verdict, decision.action) == (Verdict.FAIL, Action.ROLL_BACK)
    assert "tokens_per_step" in decision.reason
    assert world.ledger.champion == CHAMPION
    assert world.tick().to_state is RolloutState.ROLLED_BACK


def test_one_ruined_class_fails_the_whole_and_is_named() -> None:
    world = ramping()
    world.traffic(
        *(segment(arm, 400, value) for arm, value in ((CANARY, 2.3), (CONTROL, 2.0))),
        *(segment(arm, 340, value, "chat") for arm, value in ((CANARY, 2.5), (CONTROL, 2.0))),
        *(segment(arm, 60, value, "code") for arm, value in ((CANARY, 1.2), (CONTROL, 2.0))),
    )
    decision = world.tick(10)
    assert decision.verdict is Verdict.FAIL
    assert "in class code" in decision.reason


def test_a_small_class_that_looks_worse_holds_back_the_promotion_of_a_better_blend() -> None:
    world = ramping(replace(specs.preset("fast"), steps=(0.5,)))
    blend = [segment(arm, 400, value) for arm, value in ((CANARY, 2.3), (CONTROL, 2.0))]
    code = [segment(arm, 20, value, "code", noise=0.1) for arm, value in ((CANARY, 1.87), (CONTROL, 2.0))]
    world.traffic(*blend)
    assert world.tick(10).to_state is RolloutState.SOAKING
    world.traffic(*blend, *code)
    decision = world.tick(1)
    assert (decision.verdict, decision.to_state) == (Verdict.INSUFFICIENT, RolloutState.SOAKING)
    assert "leans against the canary in class code" in decision.reason


def test_errors_of_the_canary_fail_it() -> None:
    world = ramping()
    world.traffic(segment(CANARY, 100, errors=25), segment(CONTROL, 100, errors=1))
    decision = world.tick(10)
    assert decision.verdict is Verdict.FAIL
    assert "25 keys met errors in 100 requests of the canary" in decision.reason


def test_one_output_that_is_not_the_targets_own_is_enough() -> None:
    world = ramping()
    world.both(40, canary=2.3)
    assert world.tick(10).verdict is not Verdict.FAIL
    canary = replace(segment(CANARY, 40, 2.3), audited=12, mismatches=1)
    world.traffic(canary, replace(segment(CONTROL, 40), audited=12))
    decision = world.tick(1)
    assert (decision.verdict, decision.action) == (Verdict.FAIL, Action.ROLL_BACK)
    assert "1 of 12 outputs of the canary are not the target's own" in decision.reason


def test_the_latency_fuse_blows_without_statistics() -> None:
    world = ramping()
    world.traffic(segment(CANARY, 200, p95=4.0), segment(CONTROL, 200, p95=1.0))
    assert "fuse_p95" in world.tick(10).reason


@pytest.mark.parametrize(("cost", "fails"), [(0.010, False), (0.019, False), (0.021, True)])
def test_a_draft_that_slows_its_whole_batch_shows_in_what_it_costs(cost: float, fails: bool) -> None:
    """Latencies and tokens per step are equal: whoever shares a batch waits for the slowest draft in it."""
    world, levels = ramping(), {CANARY: cost, CONTROL: 0.010}
    world.traffic(
        *(replace(one, latencies=one.latencies | {"cost": ([histogram.bucket(levels[one.arm])], [60.0])})
          for one in (segment(CANARY, 60), segment(CONTROL, 60)))
    )  # fmt: skip
    decision = world.tick(10)
    assert (decision.verdict is Verdict.FAIL) is fails
    assert ("fuse_cost: median cost of a token is 0.02" in decision.reason) is fails
    assert world.spec.metrics() == ("cost", "tpot")


def test_a_broken_split_holds_and_blames_nobody() -> None:
    world = ramping()
    world.traffic(segment(CANARY, 300, 2.3), segment(CONTROL, 100))
    decision = world.tick(10)
    assert (decision.verdict, decision.to_state, decision.action) == (Verdict.ERROR, RolloutState.HELD, Action.NONE)
    assert "split is broken" in decision.reason


def test_an_equal_canary_passes_its_first_steps_but_is_not_promoted_without_proof() -> None:
    world = ramping()
    world.both(30)
    assert world.tick(10).action is Action.SET_WEIGHT
    world.both(60, stage_requests=30)
    decision = world.tick(10)
    assert (decision.verdict, decision.to_state) == (Verdict.INSUFFICIENT, RolloutState.RAMPING)
    world.both(20_000)
    assert world.tick(10).to_state is RolloutState.SOAKING


def test_no_data_for_an_hour_ends_inconclusive_with_the_champion_back() -> None:
    world = ramping()
    seen = {world.tick(60).verdict for _ in range(14)}
    assert seen <= {Verdict.INSUFFICIENT, Verdict.STALE}
    assert all(world.tick(60).verdict is not Verdict.FAIL for _ in range(46))
    (last,) = (d for d in world.decisions if d.action is Action.ROLL_BACK)
    assert (last.to_state, last.status.ends_as) == (RolloutState.ROLLING_BACK, RolloutState.INCONCLUSIVE)
    assert world.ledger.champion == CHAMPION
    assert world.status.state is RolloutState.INCONCLUSIVE


def test_silence_holds_and_traffic_resumes() -> None:
    world = ramping()
    world.both(10, canary=2.3)
    world.tick(5)
    assert world.tick(world.spec.stale_s + 1).verdict is Verdict.STALE
    assert world.status.state is RolloutState.HELD
    world.both(30, canary=2.3)
    assert world.tick().to_state is RolloutState.RAMPING
    assert world.tick().action is Action.SET_WEIGHT


def test_a_rollback_by_somebody_else_is_believed_and_not_undone() -> None:
    world = ramping()
    world.outsider(reason="customers complain")
    decision = world.tick()
    assert (decision.to_state, decision.action) == (RolloutState.ROLLING_BACK, Action.NONE)
    assert decision.reason == "rolled back by bob: customers complain"
    assert all(world.tick().action is Action.NONE for _ in range(5))
    assert (world.status.state, world.status.reason) == (RolloutState.ROLLED_BACK, decision.reason)


def test_a_rollback_by_somebody_else_is_claimed_when_it_is_seen_too() -> None:
    world = ramping()
    before = world.replicas
    world.outsider()
    world.replicas = before
    assert [world.tick().to_state for _ in range(3)] == [RolloutState.ROLLING_BACK] * 3
    world.observe()
    assert world.tick().to_state is RolloutState.ROLLED_BACK


def test_a_rollback_after_promotion_is_believed_as_well() -> None:
    world = ramping()
    promoted(world)
    world.outsider()
    world.tick()
    assert world.tick().to_state is RolloutState.ROLLED_BACK


def test_a_person_who_holds_stops_progress_but_not_the_guards() -> None:
    world = ramping()
    world.ask("hold", "lunch")
    world.both(40, canary=2.3)
    assert world.tick(10).to_state is RolloutState.HELD
    assert world.tick(10).to_state is RolloutState.HELD
    world.ask("resume")
    assert world.tick().to_state is RolloutState.RAMPING
    world.ask("hold")
    world.tick()
    world.both(60, canary=1.05)
    assert world.tick().verdict is Verdict.FAIL


def test_a_promotion_is_refused_without_data_and_obeyed_with_it() -> None:
    world = ramping()
    world.ask("promote", "I am sure")
    decision = world.tick()
    assert decision.action is Action.NONE
    assert "promotion refused" in decision.reason
    assert decision.command_id == 1
    world.both(30)
    world.ask("promote", "good enough")
    decision = world.tick(10)
    assert (decision.action, decision.verdict) == (Action.PROMOTE, Verdict.PASS)


def test_a_promotion_does_not_overrule_a_failing_guard() -> None:
    world = ramping()
    world.both(40, canary=1.05)
    world.ask("promote")
    assert world.tick(10).action is Action.ROLL_BACK


@pytest.mark.parametrize("before", [True, False])
def test_abort_cancels_before_traffic_and_rolls_back_with_it(before: bool) -> None:
    world = World() if before else ramping()
    world.ask("abort", "wrong version")
    decision = world.tick()
    wanted = (RolloutState.CANCELLED, Action.NONE) if before else (RolloutState.ROLLING_BACK, Action.ROLL_BACK)
    assert (decision.to_state, decision.action) == wanted
    assert "ann: wrong version" in decision.reason


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        ((), "no replica is alive"),
        ((Replica("r1", 10, (FALLBACK,)),), "r1 does not hold the champion"),
        ((Replica("r1", 10, (CHAMPION,)),), "r1 does not hold the fallback"),
    ],
)
def test_nothing_starts_that_could_not_be_rolled_back(replicas: tuple[Replica, ...], message: str) -> None:
    world = World(replicas=replicas)
    decision = world.tick()
    assert (decision.to_state, decision.action) == (RolloutState.READY, Action.NONE)
    assert message in decision.reason
    assert world.tick(world.spec.deadline_s + 1).to_state is RolloutState.INCONCLUSIVE


def test_a_champion_that_changed_before_the_start_cancels() -> None:
    world = World()
    world.outsider(champion=FALLBACK)
    assert world.tick().to_state is RolloutState.CANCELLED


def test_a_replica_that_cannot_load_the_canary_holds() -> None:
    world = ramping()
    world.replicas = (replace(world.replicas[0], load_error="no such file"),)
    decision = world.tick()
    assert (decision.verdict, decision.to_state) == (Verdict.ERROR, RolloutState.HELD)
    assert "no such file" in decision.reason


def test_a_rollback_is_claimed_only_when_every_replica_routes_by_it() -> None:
    world = ramping()
    world.both(40, canary=1.05)
    world.tick(10)
    world.replicas = (replace(world.replicas[0], observed_generation=world.ledger.generation - 1),)
    assert world.tick().to_state is RolloutState.ROLLING_BACK
    world.observe()
    assert world.tick().to_state is RolloutState.ROLLED_BACK


def test_a_silent_replica_is_waited_for_until_its_lease_ends() -> None:
    """It may still give requests to the canary: it has not heard that it must not."""
    world = ramping()
    world.replicas = (*world.replicas, Replica("r1", world.ledger.generation, (1, 2, 3), alive=False))
    world.ask("abort")
    world.tick()
    world.replicas = (world.replicas[0], replace(world.replicas[1], observed_generation=world.ledger.generation - 1))
    decision = world.tick()
    assert decision.to_state is RolloutState.ROLLING_BACK
    assert "waiting for r1, which is silent" in decision.reason
    world.replicas = world.replicas[:1]  # its lease has ended
    assert world.tick().to_state is RolloutState.ROLLED_BACK


def test_a_silent_replica_does_not_keep_the_others_waiting() -> None:
    world = ramping()
    world.replicas = (*world.replicas, Replica("r1", 10, (1,), "no such file", alive=False))
    world.both(30, canary=2.3)
    assert world.tick(10).action is Action.SET_WEIGHT


@pytest.mark.parametrize("after_crash", [True, False])
def test_replicas_that_crash_take_the_canary_back_and_orderly_restarts_do_not(after_crash: bool) -> None:
    world = ramping()
    verdicts = []
    for _ in range(2):
        world.now += timedelta(seconds=60)
        world.replicas = tuple(replace(r, started_at=world.now, after_crash=after_crash) for r in world.replicas)
        world.both(10)
        verdicts.append(world.tick(5).verdict)
    assert (verdicts[1] is Verdict.FAIL) == after_crash
    assert verdicts[0] is not Verdict.FAIL


def test_deciding_twice_on_the_same_facts_gives_the_same() -> None:
    world = ramping()
    world.both(40, canary=2.3)
    one, two = (decide(world.spec, world.status, world.evidence(), [], world.now) for _ in range(2))
    assert one == two


def test_the_standard_preset_needs_its_own_evidence() -> None:
    world = ramping(specs.preset("standard"))
    world.both(99, canary=3.0)
    assert world.tick(100).verdict is Verdict.INSUFFICIENT
    world.both(100, canary=3.0)
    assert world.tick().action is Action.SET_WEIGHT
