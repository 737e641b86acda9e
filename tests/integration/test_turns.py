"""Turns in Postgres: backlogs, locks and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, func, select, text

from persistence.postgres.database import Database, sqlalchemy_url
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.tables import jobs, turns
from persistence.postgres.transitions import claim
from restoration.jobs import JobStatus
from tests.support.samples import new_job

BACKLOG = """
    INSERT INTO jobs (id, owner, status, workflow, workflow_version, params, output_format,
        priority, input_key, input_sha256, input_size_bytes, input_content_type, max_attempts,
        queue_deadline_at)
    SELECT gen_random_uuid(), 'owner-' || n % :owners, 'queued', 'restore', '1', '{}', 'png', 10,
        'inputs/1.png', repeat('0', 64), 1, 'image/png', 3, now() + interval '1 day'
    FROM generate_series(0, :rows - 1) AS n"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database: Database) -> PostgresJobStore:
    return PostgresJobStore(database)


def _fill(connection: Connection, rows: int, owners: int) -> None:
    connection.execute(text(BACKLOG), {"rows": rows, "owners": owners})


@pytest.mark.turns
async def test_a_backlog_of_10000_delays_nobody(engine: Engine, store: PostgresJobStore) -> None:
    """While four GPUs work on one owner's backlog, the next claim takes the newcomer's job."""
    with engine.begin() as connection:
        _fill(connection, 10_000, owners=1)
    for gpu in range(4):
        assert await store.claim(f"w{gpu}", 60, ["restore"]) is not None
    single, _ = await store.insert(new_job(owner="bob"))
    best = await store.claim("w0", 60, ["restore"])
    assert best is not None
    assert best.id == single.id


@pytest.mark.turns
async def test_an_endless_stream_of_new_owners_starves_nobody(
    engine: Engine, store: PostgresJobStore
) -> None:
    """A newcomer goes first, but not before an owner whose last turn was over ten minutes ago."""
    for _ in range(3):
        await store.insert(new_job(owner="alice"))
    await store.claim("w", 60, ["restore"])
    await store.insert(new_job(owner="bob"))
    first = await store.claim("w", 60, ["restore"])
    with engine.begin() as connection:
        long_ago = turns.c.turn_at - text("interval '11 minutes'")
        connection.execute(turns.update().where(turns.c.owner == "alice").values(turn_at=long_ago))
    await store.insert(new_job(owner="carol"))
    second = await store.claim("w", 60, ["restore"])
    assert [job.owner for job in (first, second) if job] == ["bob", "alice"]


@pytest.mark.turns
@pytest.mark.parametrize("planned_for", [1, 50])
def test_a_claim_locks_one_job(engine: Engine, planned_for: int) -> None:
    """For any plan of the query, other jobs stay free for concurrent claims."""
    with engine.begin() as connection:
        _fill(connection, planned_for, owners=planned_for)
        connection.execute(text("ANALYZE jobs, turns"))
        _fill(connection, 200, owners=50)
    waiting = select(jobs.c.id).where(jobs.c.status == JobStatus.QUEUED)
    with engine.begin() as claiming, engine.begin() as other:
        claimed = claim("w", 60, ["restore"], claiming)
        assert claimed is not None
        free = other.execute(waiting.with_for_update(skip_locked=True)).scalars().all()
    assert len(free) == planned_for + 200 - 1
    assert claimed.id not in free


@pytest.mark.turns
def test_turns_are_right_whoever_writes(engine: Engine) -> None:
    """Triggers keep the counts right, even if many rows are edited or deleted by hand."""
    with engine.begin() as connection:
        _fill(connection, 60, owners=3)
        some = "WHERE owner = 'owner-1' AND id IN (SELECT id FROM jobs ORDER BY id LIMIT 30)"
        connection.execute(
            text(f"UPDATE jobs SET status = 'cancelled', finished_at = now() {some}")  # noqa: S608
        )
        connection.execute(text("DELETE FROM jobs WHERE owner = 'owner-2'"))
        counted = {
            row.owner: row.waiting
            for row in connection.execute(select(turns).where(turns.c.waiting > 0))
        }
        queued = select(jobs.c.owner).where(jobs.c.status == JobStatus.QUEUED)
        assert counted == Counter(connection.execute(queued).scalars())
        assert "owner-2" not in counted


@pytest.mark.turns
async def test_owners_that_were_away_for_long_are_forgotten(
    engine: Engine, store: PostgresJobStore
) -> None:
    """The table keeps owners who wait or had a recent turn, and does not grow without limit."""
    for owner in ("alice", "bob"):
        await store.insert(new_job(owner=owner))
        assert await store.claim("w", 60, ["restore"]) is not None
    with engine.begin() as connection:
        long_ago = func.now() - text("interval '11 minutes'")
        connection.execute(turns.update().where(turns.c.owner == "alice").values(turn_at=long_ago))
    await store.promote()
    with engine.connect() as connection:
        assert connection.execute(select(turns.c.owner)).scalars().all() == ["bob"]
