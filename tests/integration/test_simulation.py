"""The base of the simulation: its clock in Python and in Postgres, and repeatable runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, text

from benchmarks.simulation.clock import (
    MIDNIGHT,
    SimulatedDatabase,
    SimulatedLoop,
    make_database,
)
from benchmarks.simulation.day import Outcome, simulate
from benchmarks.simulation.fleet import Machines
from benchmarks.simulation.policies import Ours, ServeDefault
from benchmarks.simulation.traffic import HOUR_S, day
from persistence.postgres.database import sqlalchemy_url
from persistence.postgres.jobs import PostgresJobStore
from restoration.jobs import Priority
from restoration.scaling import Demand, ScalingPolicy
from tests.support.samples import new_job

AT_S = 5 * HOUR_S
POLICY = ScalingPolicy(1, 0, 4, 1, 2, 300)
SEED = 3


@pytest.fixture
def make_url(database_url: str) -> Iterator[Callable[[], str]]:
    """Yield a function that creates databases with a simulated clock."""
    names: list[str] = []

    def make() -> str:
        names.append(f"simulated_{uuid4().hex}")
        return make_database(database_url, names[-1])

    yield make
    admin = create_engine(sqlalchemy_url(database_url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for name in names:
            connection.execute(text(f"DROP DATABASE {name}"))
    admin.dispose()


def test_simulated_time_leaps_to_the_next_timer() -> None:
    """A day's sleep takes no time, and timers fire in order."""
    ends: list[float] = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        ends.append(asyncio.get_running_loop().time())

    async def both() -> None:
        await asyncio.gather(sleeper(24 * HOUR_S), sleeper(HOUR_S))

    began = time.monotonic()
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(both())
    assert ends == pytest.approx([HOUR_S, 24 * HOUR_S])
    assert time.monotonic() - began < HOUR_S


def test_postgres_goes_by_simulated_time(make_url: Callable[[], str]) -> None:
    """Defaults, claims and leases use the loop's time with unchanged statements."""

    async def submit_and_claim() -> None:
        database = SimulatedDatabase(make_url())
        store = PostgresJobStore(database)
        await asyncio.sleep(AT_S)
        await store.insert(new_job(queue_limit_s=60))
        await asyncio.sleep(30)
        job = await store.claim("worker", 10, ["restore"])
        assert job is not None
        assert job.started_at is not None
        assert job.lease_until is not None
        assert (job.created_at - MIDNIGHT).total_seconds() == pytest.approx(AT_S)
        assert (job.started_at - job.created_at).total_seconds() == pytest.approx(30)
        assert not await store.reclaim()
        await asyncio.sleep(11)
        assert [lost.id for lost in await store.reclaim()] == [job.id]
        await database.aclose()

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(submit_and_claim())


def test_a_simulated_day_repeats_and_loses_no_job(make_url: Callable[[], str]) -> None:
    """The same seed gives exactly the same day, even with many lost workers."""
    photos = day(SEED, until_s=HOUR_S)
    machines = replace(Machines(), lost_every_s=600.0)
    first = simulate(make_url(), photos, Ours(POLICY), machines, SEED, HOUR_S)
    assert first.losses > 0
    assert sum(map(len, first.waits_s.values())) == len(photos)
    assert first.gpu_hours > sum(photo.execute_s for photo in photos) / HOUR_S
    again = simulate(make_url(), photos, Ours(POLICY), machines, SEED, HOUR_S)
    assert again == first


def test_serves_default_is_asked_as_serve_asks_it() -> None:
    """It wants half as many replicas as requests, but only after 30 s."""
    policy = ServeDefault(max_workers=8)
    busy = Demand(waiting=9, running=1, interactive_waiting=9, interactive_running=1)
    decided = [policy.decide(busy, 1, 1, now_s) for now_s in range(0, 40, 10)]
    assert decided == [1, 1, 1, 5]


def test_p95_is_the_wait_that_nineteen_of_twenty_keep_below() -> None:
    """The p95 of twenty waits is the nineteenth."""
    waits = {Priority.INTERACTIVE: [float(n) for n in range(20, 0, -1)], Priority.BATCH: []}
    assert Outcome(0, 0, waits, []).p95_wait_s(Priority.INTERACTIVE) == 19
