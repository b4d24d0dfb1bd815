"""Databases full of made-up traces over thirty days, for the benchmarks that look at many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from engine.bench import seeded_rollouts
from engine.bench.rig import own_home
from engine.ops import postgres, upkeep
from engine.ops.supervisor import Say
from engine.settings import TelemetrySettings
from engine.store import migrate
from engine.store.database import Database
from engine.store.repositories import audit, overview, rollouts, seeding

DAYS = 30
PATIENCE_S = 1_800
"""A statement of seeding may take so long."""
SLACK = 0.05
"""A database that lacks so little is full: days are made whole, and the last one is not over."""
FRESH = timedelta(minutes=5)
"""A database that was kept is filled up to now where its newest trace is older."""


def top_up(database: Database, telemetry: TelemetrySettings, traces: int, end: datetime, seed: int, say: Say) -> None:
    """Make it about so many traces up to ``end``, with a history of versions and rollouts: what is there stays."""
    with database.read() as session:
        there, newest, begun = audit.traces(session), overview.newest(session), rollouts.list_rollouts(session, limit=1)
    with database.write() as session:
        seeding.add_versions(session, seeding.NEWEST)
    if not begun:
        say(f"wrote {seeded_rollouts.write(database, end, seeding.NEWEST, seed):,} decisions about rollouts")
    if (missing := traces - there) > SLACK * traces:
        fill(database, telemetry, missing, end, seed + there, say)
        return
    say(f"{there:,} traces are there already")
    if newest is not None and end - newest > FRESH:  # the last hour must not be empty
        fill(database, telemetry, traces, end, seed + there, say, since=newest)


def fill(
    database: Database,
    telemetry: TelemetrySettings,
    traces: int,
    end: datetime,
    seed: int,
    say: Say,
    since: datetime | None = None,
) -> None:
    """About so many traces more, in the thirty days before ``end``, with their rollups; of those, what begins at
    ``since`` or later.

    A day is rolled up while the next one is made; ``database`` must allow statements of minutes.
    """
    began = time.monotonic()
    first = (end - timedelta(days=DAYS)).date()
    with ThreadPoolExecutor(1) as beside, ExitStack() as ending:
        ending.callback(beside.shutdown, wait=False, cancel_futures=True)  # an interrupted run makes no more of them
        rolled_up = []
        for number in range((max(since, end - timedelta(days=DAYS)).date() - first).days if since else 0, DAYS + 1):
            day = first + timedelta(days=number)
            with database.write() as session:
                drawn = (seed * 31 + number) % 1000 / 1000
                seeding.add_day(session, day, number, -(-traces // DAYS), end, drawn, since)
            rolled_up.append(beside.submit(upkeep.rebuild, database, telemetry, day, day, lambda line: None))
        seeded = time.monotonic() - began
        for made in rolled_up:
            made.result()
    with database.write() as session:
        seeding.analyze(session)
    of = f"{traces:,} traces" if since is None else f"what is missing since {since:%b %d, %H:%M}"
    say(f"seeded {of} in {seeded:.0f} s, rolled up {time.monotonic() - began - seeded:.0f} s later")


@contextmanager
def scratch(say: Say, keep: Path | None = None) -> Iterator[Database]:
    """An embedded Postgres with the newest schema and nothing in it, thrown away afterwards; or that of a folder which
    stays, with what is in it."""
    with own_home(keep) as home:
        say("starting Postgres")
        url = postgres.start(home)
        migrate.upgrade(url)
        database = Database(url, application="slipstream bench", statement_timeout_s=PATIENCE_S)
        yield database
        database.close()
