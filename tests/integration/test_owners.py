"""Owners' counters in Postgres: triggers, retention and locks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, func, select, text

from persistence.postgres.database import Database, sqlalchemy_url
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.leadership import WAITING_CHANNEL
from persistence.postgres.retention import Retention
from persistence.postgres.tables import jobs, owners, turns
from restoration.jobs import Artifact, Failure, Priority
from restoration.limits.quotas import Quotas
from tests.support.polling import until
from tests.support.samples import new_job

ROWS = """
    INSERT INTO jobs (id, owner, status, workflow, workflow_version, params, output_format,
        priority, input_key, input_sha256, input_size_bytes, input_content_type, max_attempts,
        queue_deadline_at)
    SELECT gen_random_uuid(), 'owner-' || n % :owners, 'queued', 'restore', '1', '{}', 'png',
        10 + 10 * (n % 2), 'inputs/' || n || '.png', repeat('0', 64), 10, 'image/png', 3,
        now() + interval '1 day'
    FROM generate_series(0, :rows - 1) AS n"""
RUNNING = """status = 'running', attempt = 1, worker = 'w', started_at = now(),
    lease_until = now() + interval '1 hour'"""
SUCCEEDED = """status = 'succeeded', lease_until = NULL, finished_at = now(), output_key = 'o',
    output_sha256 = '', output_size_bytes = 5, output_content_type = 'image/png'"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database: Database) -> PostgresJobStore:
    return PostgresJobStore(database)


def _fill(connection: Connection, rows: int, owners: int) -> None:
    connection.execute(text(ROWS), {"rows": rows, "owners": owners})


def _counts(connection: Connection) -> dict[str, tuple[int, int]]:
    query = select(owners.c.owner, owners.c.running, owners.c.stored_bytes)
    return {row.owner: (row.running, row.stored_bytes) for row in connection.execute(query)}


@pytest.mark.quotas
def test_counts_are_right_whoever_writes(engine: Engine) -> None:
    """Triggers keep the counts right, even if many rows are edited or deleted by hand."""
    some = "WHERE id IN (SELECT id FROM jobs WHERE owner = 'owner-1' ORDER BY id LIMIT 4)"
    with engine.begin() as connection:
        _fill(connection, 30, owners=3)
        assert set(_counts(connection).values()) == {(0, 100)}
        connection.execute(text(f"UPDATE jobs SET {RUNNING} {some}"))  # noqa: S608
        assert _counts(connection)["owner-1"] == (4, 100)
        connection.execute(text(f"UPDATE jobs SET {SUCCEEDED} {some}"))  # noqa: S608
        assert _counts(connection)["owner-1"] == (0, 120)
        connection.execute(text(f"UPDATE jobs SET input_expired_at = now() {some}"))  # noqa: S608
        assert _counts(connection)["owner-1"] == (0, 80)
        connection.execute(text(f"UPDATE jobs SET output_expired_at = now() {some}"))  # noqa: S608
        assert _counts(connection)["owner-1"] == (0, 60)
        connection.execute(text("DELETE FROM jobs WHERE owner <> 'owner-0'"))
        assert _counts(connection) == {
            "owner-0": (0, 100), "owner-1": (0, 0), "owner-2": (0, 0)
        }  # fmt: skip


@pytest.mark.quotas
async def test_retention_gives_room_back(database: Database, store: PostgresJobStore) -> None:
    """Expired objects do not count as stored, and owners without anything are deleted."""
    quotas = Quotas(stored_bytes=100)
    photo = Artifact("inputs/a.png", "0" * 64, 60, "image/png")
    await store.insert(new_job(input=photo), quotas)
    claimed = await store.claim("w", 60, ["restore"])
    assert claimed is not None
    await store.succeed(claimed.ref, Artifact("outputs/a.png", "0" * 64, 30, "image/png"), {})
    retention, stored = Retention(database), []
    for expire in (retention.expire_inputs, retention.expire_outputs):
        stored.append((await database.run(_counts))["alice"])
        await expire(0, 10)
    stored.append((await database.run(_counts))["alice"])
    assert stored == [(0, 90), (0, 30), (0, 0)]
    assert await retention.delete_rows(0, 10) == 1
    await retention.forget_emptied(0)
    assert await database.run(_counts) == {}


@pytest.mark.quotas
async def test_a_photo_that_was_sent_again_counts_until_it_goes(
    database: Database, store: PostgresJobStore
) -> None:
    """The shared object counts once, and expires for both of its jobs at once."""
    first, _ = await store.insert(new_job(input=Artifact("inputs/a.png", "", 60, "image/png")))
    await store.request_cancel(first.id)
    again, _ = await store.insert(new_job(input=first.input, retry_of=first.id))
    assert await database.run(_counts) == {"alice": (0, 60)}
    await store.request_cancel(again.id)
    assert await Retention(database).expire_inputs(0, 10) == ["inputs/a.png"]
    assert await database.run(_counts) == {"alice": (0, 0)}


@pytest.mark.quotas
async def test_a_held_owner_costs_a_claim_nothing(engine: Engine, store: PostgresJobStore) -> None:
    """Turns of owners at their limit are not in the index that claims use."""
    for number in range(50):
        for _ in range(2):
            await store.insert(new_job(owner=f"o{number}"), Quotas(running_jobs=1))
    for _ in range(50):
        assert await store.claim("w", 60, ["restore"]) is not None
    await store.insert(new_job(owner="bob"))
    open_turns = turns.c.counts_as.is_not(None) & ~turns.c.held
    with engine.connect() as connection:
        assert connection.scalars(select(turns.c.owner).where(open_turns)).all() == ["bob"]
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    assert job.owner == "bob"


@pytest.mark.quotas
async def test_workers_sweepers_and_owners_do_not_lock_each_other_out(
    database: Database, store: PostgresJobStore
) -> None:
    """Concurrent claims, ends, cancels, lost workers, new jobs and retention for a few owners never
    deadlock."""
    retention = Retention(database)
    quotas = Quotas(running_jobs=2)

    async def work(worker: str) -> None:
        for number in range(25):
            changes = {"owner": f"o{number % 3}", "priority": list(Priority)[number % 2]}
            job, _ = await store.insert(new_job(**changes), quotas)
            claimed = await store.claim(worker, 60, ["restore"])
            match number % 5:
                case 0:
                    await store.reclaim(worker)
                case 1:
                    await store.request_cancel(job.id)
                case _ if claimed is not None:
                    output = Artifact(f"outputs/{claimed.id}.png", "", 1, "image/png")
                    await store.succeed(claimed.ref, output, {})

    async def sweep() -> None:
        for _ in range(25):
            await retention.expire_inputs(0, 20)
            await retention.expire_outputs(0, 20)
            await retention.delete_rows(0, 20)
            await retention.forget_emptied(0)
            await store.expire()
            await store.promote()

    async with asyncio.timeout(300), asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(work(f"w{number}"))
        for _ in range(2):
            group.create_task(sweep())
    in_hand = jobs.c.status.in_(["running", "cancelling"])
    recounted = select(jobs.c.owner, func.count().filter(in_hand))
    running = await database.run(
        lambda connection: {
            owner: count for owner, count in connection.execute(recounted.group_by(jobs.c.owner))
        }
    )
    counts = await database.run(_counts)
    assert {owner: counts[owner][0] for owner in running} == running
    assert all(count <= 2 for count in running.values())


@pytest.mark.quotas
async def test_room_is_news_for_the_dispatcher(
    database: Database, store: PostgresJobStore, database_url: str
) -> None:
    """The end of a job of an owner at its limit wakes the dispatcher, like a new job."""
    for _ in range(2):
        await store.insert(new_job(), Quotas(running_jobs=1))
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"LISTEN {WAITING_CHANNEL}"))
        await store.fail(job.ref, Failure("engine_failed", "a node raised"))
        raw = connection.connection.driver_connection
        assert raw is not None

        async def is_told() -> bool:
            raw.poll()
            return [each.channel for each in raw.notifies] == [WAITING_CHANNEL]

        await until(is_told)


@pytest.mark.quotas
@pytest.mark.parametrize("what", ["inputs", "outputs"])
async def test_sweepers_take_owners_in_one_order(
    engine: Engine, database: Database, store: PostgresJobStore, what: str
) -> None:
    """A sweep that waits for one owner has not locked a later one, whichever jobs are older. So two
    transactions over several owners cannot deadlock."""
    for owner in ("bob", "alice"):  # the reverse of the order in which they are locked
        await store.insert(new_job(owner=owner, input=Artifact(owner, "", 1, "image/png")))
        job = await store.claim("w", 60, ["restore"])
        assert job is not None
        await store.succeed(job.ref, Artifact(f"of-{owner}", "", 1, "image/png"), {})
    retention = Retention(database)
    sweep = retention.expire_inputs if what == "inputs" else retention.expire_outputs
    locked = select(owners.c.owner).with_for_update(skip_locked=True)
    with engine.begin() as other:
        other.execute(locked.where(owners.c.owner == "alice"))
        sweeping = asyncio.create_task(sweep(0, 10))
        await until(lambda: database.run(_somebody_waits))
        with engine.begin() as third:
            assert third.scalars(locked).all() == ["bob"]
    assert len(await sweeping) == 2


def _somebody_waits(connection: Connection) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return bool(connection.execute(text(query)).scalar())
