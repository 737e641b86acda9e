"""Leadership and notifications on contended and broken connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Connection, text

from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.leadership import Leadership, attempt_of
from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef
from restoration.limits.quotas import Quotas
from tests.support.samples import new_job

LONG_S = 300.0
SHORT_S = 0.05


@pytest.fixture
async def leader(database_url: str) -> AsyncIterator[Leadership]:
    signals = Leadership(database_url)
    assert await signals.acquire(LONG_S)
    yield signals
    await signals.aclose()


@pytest.fixture
async def standby(database_url: str) -> AsyncIterator[Leadership]:
    signals = Leadership(database_url)
    yield signals
    await signals.aclose()


async def test_one_leader_at_a_time(leader: Leadership, standby: Leadership) -> None:
    """A second instance waits, and takes over as soon as the first leaves."""
    assert await leader.acquire(SHORT_S)
    assert not await standby.acquire(SHORT_S)
    assert not await standby.acquire(SHORT_S)
    taking_over = asyncio.create_task(standby.acquire(LONG_S))
    await leader.aclose()
    assert await taking_over
    assert not await leader.acquire(SHORT_S)


async def test_a_standby_may_not_wait_for_hints(standby: Leadership) -> None:
    """An instance that does not lead gets an error at once."""
    with pytest.raises(DependencyUnavailable):
        await standby.wait(SHORT_S)


async def test_a_cancelled_standby_can_try_again(leader: Leadership, standby: Leadership) -> None:
    """Cancelling a wait for the lock leaves the object usable."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT_S):
            await standby.acquire(LONG_S)
    await leader.aclose()
    assert await standby.acquire(LONG_S)


async def test_every_way_to_start_waiting_is_announced(
    leader: Leadership, database: Database
) -> None:
    """An insert, a release and a reclaim wake the leader; a claim does not."""
    store = PostgresJobStore(database)
    await store.insert(new_job())
    assert await leader.wait(LONG_S)
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    assert not await leader.wait(SHORT_S)
    waiting = asyncio.create_task(leader.wait(LONG_S))
    await store.release(job.ref, None)
    assert await waiting
    assert await store.claim("w", 60, ["restore"]) is not None
    await store.reclaim("w")
    assert await leader.wait(LONG_S)


@pytest.mark.dispatch
async def test_a_new_job_is_announced_by_name(leader: Leadership, database: Database) -> None:
    """The hint names the job, unless its owner is so close to a limit that the job may have to
    wait."""
    store = PostgresJobStore(database)
    job, _ = await store.insert(new_job())
    assert [attempt_of(hint) for hint in await leader.wait(LONG_S)] == [AttemptRef(job.id, 1)]
    await store.insert(new_job(), Quotas(running_jobs=2))
    assert [attempt_of(hint) for hint in await leader.wait(LONG_S)] == [None]


async def test_announcements_are_used_up(leader: Leadership, database: Database) -> None:
    """Notifications from before a wait count, but are consumed by it."""
    store = PostgresJobStore(database)
    for _ in range(3):
        await store.insert(new_job())
    assert await leader.wait(LONG_S)
    further = 0
    while await leader.wait(SHORT_S):
        further += 1
    assert further < 3


async def test_a_cancelled_wait_keeps_the_leadership(
    leader: Leadership, standby: Leadership, database: Database
) -> None:
    """A dispatcher may cancel its wait and wait again."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT_S):
            await leader.wait(LONG_S)
    assert not await standby.acquire(SHORT_S)
    await PostgresJobStore(database).insert(new_job())
    assert await leader.wait(LONG_S)


async def test_losing_the_connection_is_losing_the_leadership(
    leader: Leadership, standby: Leadership, database: Database
) -> None:
    """A broken connection ends the wait with an error; the lock is free and can be taken again."""

    def cut(connection: Connection) -> None:
        connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        )

    waiting = asyncio.create_task(leader.wait(LONG_S))
    await database.run(cut)
    with pytest.raises(DependencyUnavailable):
        await waiting
    with pytest.raises(DependencyUnavailable):
        await leader.wait(SHORT_S)
    assert await standby.acquire(LONG_S)
    await standby.aclose()
    assert await leader.acquire(LONG_S)
    assert not await leader.wait(SHORT_S)


@pytest.mark.parametrize("listens", [False, True])
async def test_a_server_that_is_away(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`acquire` soon raises DependencyUnavailable, refused or left hanging."""
    monkeypatch.setattr("persistence.postgres.leadership.CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        signals = Leadership(f"postgresql://a:b@127.0.0.1:{server.getsockname()[1]}/x")
        with pytest.raises(DependencyUnavailable):
            async with asyncio.timeout(LONG_S):
                await signals.acquire(SHORT_S)
        await signals.aclose()
