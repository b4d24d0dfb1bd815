"""Thresholds that know the sample size, a CUSUM that knows the mix, and findings that are rows with one writer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from engine.contracts import Arm, ProposerKind, TracePayload, TraceRecord
from engine.diagnosis import drift
from engine.ops import drift as monitor
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.repositories import drift as found
from engine.store.repositories import plans, policies
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.telemetry.records import record

NOW = datetime.now(UTC).replace(second=0, microsecond=0)


def share_of_alarms(n: int, shifted: float = 0.0, rule: str = "ours") -> float:
    rng = np.random.default_rng(3)
    usual, other = np.full(10, 0.1), np.linspace(0.1 - shifted, 0.1 + shifted, 10)
    hits = 0
    for _ in range(400):
        shift = drift.psi(rng.multinomial(10 * n, usual), rng.multinomial(n, other))
        hits += shift.psi > 0.1 if rule == "folklore" else shift.is_drift
    return hits / 400


@pytest.mark.parametrize("n", [100, 400, 5_000])
def test_psi_without_drift_alarms_rarely_at_any_size(n: int) -> None:
    assert share_of_alarms(n) <= 0.075


def test_folklore_does_not_and_real_drift_is_found() -> None:
    assert share_of_alarms(100, rule="folklore") > 0.3
    assert share_of_alarms(1_000, shifted=0.06) > 0.95


def test_new_members_need_a_share_and_no_past() -> None:
    assert drift.new_members({"a": 5}, {"a": 90, "b": 8, "c": 1}) == {"b": pytest.approx(8 / 99)}


def stream(rng: np.random.Generator, n: int, code: float = 0.3, drop: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    classes = np.where(rng.random(n) < code, "code", "chat")
    return np.where(classes == "code", 1.6, 0.6) - drop + rng.normal(0, 0.25, n), classes


def test_a_drop_is_found_near_its_begin_and_a_change_of_mix_is_none() -> None:
    alarms = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        usual, later = stream(rng, 8_000), stream(rng, 3_000, drop=0.1)
        values, classes = (np.concatenate(pair) for pair in zip(usual, later, strict=True))
        change = drift.change_point(values, classes)
        assert isinstance(change, drift.Change)
        assert abs(change.onset - 8_000) < 250
        assert change.after - change.before == pytest.approx(-0.1, abs=0.04)
        alarms.append(change.alarm - 8_000)
        mixed = stream(rng, 3_000, code=0.8)
        values, classes = (np.concatenate(pair) for pair in zip(usual, mixed, strict=True))
        assert drift.change_point(values, classes) is None
        assert drift.change_point(values, np.full(len(values), "all")) is not None, "not centred, it would alarm"
    assert np.median(alarms) < 300


def test_a_change_that_is_over_is_none_and_a_later_one_is_found() -> None:
    rng = np.random.default_rng(1)
    parts = [stream(rng, 8_000), stream(rng, 3_000, drop=0.2), stream(rng, 6_000)]
    values, classes = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    assert isinstance(drift.change_point(values[:11_000], classes[:11_000]), drift.Change)
    assert drift.change_point(values, classes) is None
    later = stream(rng, 3_000, drop=0.1)
    change = drift.change_point(np.concatenate([values, later[0]]), np.concatenate([classes, later[1]]))
    assert isinstance(change, drift.Change)
    assert abs(change.onset - 17_000) < 250


def test_the_newest_requests_are_looked_at_however_long_the_champion_serves(db: Database, tmp_path: Path) -> None:
    made = [record(n, 3, started_at=NOW - timedelta(seconds=n), status="ok", policy_version=1, steps=9, drafted=30,
                   accepted=9)
            for n in range(100)]  # fmt: skip
    write(db, tmp_path, made)
    since, until = NOW - timedelta(hours=1), NOW + timedelta(seconds=1)
    with db.read() as session:
        times = found.acceptance(session, 1, since, until, first=10, newest=20)[2]
        whole = found.acceptance(session, 1, since, until, first=70, newest=60)[2]
    assert times == [NOW - timedelta(seconds=n) for n in (*range(99, 89, -1), *range(19, -1, -1))]
    assert whole == [NOW - timedelta(seconds=n) for n in range(99, -1, -1)]


def test_the_cusum_refuses_to_arm_on_too_little_and_is_quiet_in_control() -> None:
    rng = np.random.default_rng(0)
    assert "takes 5,000" in str(drift.change_point(*stream(rng, 4_999)))
    false = sum(drift.change_point(*stream(np.random.default_rng(seed), 20_000)) is not None for seed in range(40))
    assert false <= 3


def test_a_slide_needs_hours_and_a_slope() -> None:
    hours, rng = np.arange(24.0), np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 24)
    found = drift.slide(hours, 1.0 - 0.01 * hours + noise, np.ones(24))
    assert found is not None
    assert found.lost == pytest.approx(0.23, abs=0.04)
    assert found.t > 4
    flat = drift.slide(hours, 1.0 + noise, np.ones(24))
    assert flat is None or flat.t < 4
    assert drift.slide(hours[:5], hours[:5], np.ones(5)) is None


def write(db: Database, folder: Path, records: list[TraceRecord]) -> None:
    writer = TraceWriter(db, Spill(folder, 10**8), TelemetrySettings())
    for seq, start in enumerate(range(0, len(records), 500), start=1):
        writer._transaction(Batch(writer._writer_id, seq, records[start : start + 500]))


def served(db: Database, kind: ProposerKind = ProposerKind.NGRAM) -> int:
    with db.write() as session:
        version = policies.register(session, digest=kind.value, kind=kind, num_speculative_tokens=4, manifest={})
        arms: tuple[Arm, ...] = ()
        plans.append(session, champion=version.version, fallback=version.version, arms=arms, actor="t", reason="t")
    return version.version


def day(version: int, late_class: str, long: int) -> list[TraceRecord]:
    """Twenty-five hours of requests; in the last one another class turns up, and prompts are of another length."""
    made = []
    for number in range(2_000):
        at = NOW - timedelta(hours=25) + timedelta(seconds=number * 45)
        last = at >= NOW - timedelta(hours=1)
        name = late_class if last and number % 3 == 0 else "chat"
        made.append(
            record(number, 9, started_at=at, policy_version=version, traffic_class=name, status="ok", tenant="acme",
                   prompt_tokens=long if last else 40, output_tokens=30 + number % 7)
        )  # fmt: skip
    for extra in range(400):
        at = NOW - timedelta(minutes=40) + timedelta(seconds=extra)
        made.append(record(extra, 10, started_at=at, policy_version=version, traffic_class="chat", status="ok",
                           tenant="acme", prompt_tokens=long, output_tokens=30 + extra % 7))  # fmt: skip
    return made


def test_findings_are_rows_that_are_kept_up_to_date_and_end(db: Database, tmp_path: Path) -> None:
    version = served(db)
    write(db, tmp_path, day(version, "translation", 500))
    monitor.look(db, NOW)
    monitor.look(db, NOW + timedelta(minutes=1))
    with db.read() as session:
        rows = found.findings(session, NOW - timedelta(hours=1), NOW + timedelta(hours=1))
    kinds = {(row["kind"], row["quantity"]) for row in rows}
    assert ("input", "prompt length") in kinds
    assert ("new_traffic", "class translation") in kinds
    assert ("input", "output length") not in kinds
    assert len(rows) == len({(r["kind"], r["quantity"], r["traffic_class"]) for r in rows}), "found twice is one row"
    assert all(row["ended_at"] is None and row["statistic"] > row["threshold"] for row in rows)
    monitor.look(db, NOW + timedelta(hours=30))
    with db.read() as session:
        rows = found.findings(session, NOW, NOW + timedelta(hours=31))
    assert all(row["ended_at"] is not None for row in rows)


def test_the_same_traffic_as_yesterday_is_no_finding(db: Database, tmp_path: Path) -> None:
    write(db, tmp_path, day(served(db), "chat", 40))
    with db.read() as session:
        assert [finding.kind for finding in monitor.findings(session, NOW)] == []


@pytest.mark.parametrize(("kind", "alarms"), [(ProposerKind.NGRAM, 1), (ProposerKind.NONE, 0)])
def test_silent_death_alarms_except_where_nothing_is_drafted_on_purpose(
    db: Database, tmp_path: Path, kind: ProposerKind, alarms: int
) -> None:
    version = served(db, kind)
    dead = {"steps": 20, "drafted": 80, "accepted": 0, "status": "ok", "traffic_class": "code"}
    write(db, tmp_path, [
        record(n, 4, started_at=NOW - timedelta(minutes=5, seconds=n), policy_version=version, **dead)
        for n in range(60)
    ])  # fmt: skip
    with db.read() as session:
        deaths = [finding for finding in monitor.findings(session, NOW) if finding.kind == "silent_death"]
    assert len(deaths) == alarms
    assert all(finding.traffic_class == "code" for finding in deaths)


def deaths(db: Database, folder: Path, probes: list[tuple[timedelta, int, int]]) -> list[found.Finding]:
    """Silent deaths, where at each time before now forty requests drafted so many tokens, of which so many were
    accepted."""
    version = served(db)
    write(db, folder, [
        record(n, at, started_at=NOW - before - timedelta(seconds=n), policy_version=version, status="ok",
               traffic_class="code", steps=20, drafted=drafted, accepted=accepted)
        for at, (before, drafted, accepted) in enumerate(probes) for n in range(40)
    ])  # fmt: skip
    with db.read() as session:
        return [finding for finding in monitor.findings(session, NOW) if finding.kind == "silent_death"]


LATELY, BEFORE = timedelta(minutes=5), timedelta(hours=2)


@pytest.mark.parametrize(
    ("probes", "alarms"),
    [
        ([(LATELY, 1, 0), (BEFORE, 4, 0)], 1),  # K control only probes by now
        ([(LATELY, 1, 0)], 0),  # too little to say so
        ([(LATELY, 4, 2), (BEFORE, 400, 0)], 0),  # it is alive again
        ([(LATELY, 2, 1), (BEFORE, 400, 0)], 0),  # so it is on the little that it drafts lately
        ([(BEFORE, 4, 0)], 0),  # it serves no more
    ],
)
def test_a_dead_draft_that_is_only_probed_is_found_by_the_longer_window(
    db: Database, tmp_path: Path, probes: list[tuple[timedelta, int, int]], alarms: int
) -> None:
    dead = deaths(db, tmp_path, probes)
    assert len(dead) == alarms
    assert all(one.reference_since < one.reference_until == one.since < one.until for one in dead)


def test_a_slide_at_a_constant_version_is_found_with_what_was_before(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, began = served(db), NOW - timedelta(hours=24)
    monkeypatch.setattr(plans, "champion_since", lambda session, champion: began)
    slid = [
        record(n, 5, started_at=began + timedelta(minutes=2 * n), policy_version=version, status="ok",
               traffic_class="chat", steps=100, drafted=300, accepted=150 - n // 12 + n % 5)
        for n in range(1, 715)
    ]  # fmt: skip
    write(db, tmp_path, slid)
    with db.read() as session:
        (slide,) = [finding for finding in monitor.findings(session, NOW) if finding.kind == "slow_slide"]
    assert slide.policy_version == version
    assert slide.effect == pytest.approx(-0.58, abs=0.05)
    assert began <= slide.reference_since < slide.reference_until < slide.since < slide.until == NOW


def test_other_tenants_and_other_words_of_the_same_length_are_found(db: Database, tmp_path: Path) -> None:
    """Nothing but who asks, and with which tokens, is new in the last hour."""
    version, made = served(db), []
    for n in range(3_000):
        at = NOW - timedelta(hours=25) + timedelta(seconds=30 * n)
        late = at >= NOW - timedelta(hours=1)
        ids = tuple((n * 7 + k) % 40 + (10_000 if late else 0) for k in range(20))
        made.append(
            record(n, 6, started_at=at, policy_version=version, status="ok", traffic_class="chat", prompt_tokens=20,
                   output_tokens=30, tenant="globex" if late and n % 2 else "acme",
                   payload=TracePayload(prompt_ids=ids, output_ids=(1, 2), steps=()))
        )  # fmt: skip
    write(db, tmp_path, made)
    with db.read() as session:
        quantities = {(finding.kind, finding.quantity) for finding in monitor.findings(session, NOW)}
    assert quantities == {("input", "tenant mix"), ("new_traffic", "tenant globex"), ("input", found.TOKENS)}


def test_a_policy_that_drafts_rarely_and_well_is_alive() -> None:
    assert not drift.is_dead(drafted=400, accepted=200)
    assert not drift.is_dead(drafted=99, accepted=0)
    assert drift.is_dead(drafted=400, accepted=1)


def test_a_rare_class_has_its_own_sample_of_prompts(db: Database, tmp_path: Path) -> None:
    made = [
        record(n, 9, started_at=NOW - timedelta(seconds=n), status="ok", traffic_class="chat" if n % 10 else "code")
        for n in range(1_500)
    ]
    write(db, tmp_path, made)
    with db.read() as session:
        counts = found.binned(session, found.TOKENS, NOW - timedelta(hours=1), NOW + timedelta(seconds=1))
    assert sum(counts["code"].values()) >= monitor.FEW
    assert sum(counts["chat"].values()) > 250
