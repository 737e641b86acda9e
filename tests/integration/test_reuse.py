"""Reused results in Postgres and S3: the index, retention and the table's constraints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import IntegrityError

from actors.leader.retention import Lifetimes, RetentionSweeper
from persistence.objects.keys import copy_key, output_key
from persistence.objects.s3 import S3BlobStore
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.retention import Retention
from restoration.errors import JobNotFound
from restoration.jobs import Job, OutputFormat, Reused
from tests.support.samples import artifact, new_job

DAY_S = 24 * 3600


async def _execute(database: Database, statement: str, **values: Any) -> Any:
    def work(connection: Connection) -> Any:
        result = connection.execute(text(statement), values)
        return result.all() if result.returns_rows else None

    return await database.run(work)


async def _finish(store: PostgresJobStore, blobs: S3BlobStore) -> Job:
    await store.insert(new_job(input=artifact("inputs/earlier.png")))
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    key = output_key(job.ref, OutputFormat.PNG)
    return await store.succeed(job.ref, await blobs.put(key, b"restored", "image/png"), {})


@pytest.mark.reuse
async def test_a_copy_outlives_the_job_that_was_executed(
    database: Database, blobs: S3BlobStore
) -> None:
    """The earlier job's object and row expire; the copy stays, and is not swept as an orphan."""
    store, retention = PostgresJobStore(database), Retention(database)
    earlier = await _finish(store, blobs)
    new = new_job()
    output = await blobs.copy(earlier.result(), copy_key(new.id, OutputFormat.PNG))
    job, _ = await store.insert(replace(new, reused=Reused(earlier.id, output)))
    await _execute(
        database,
        "UPDATE jobs SET finished_at = finished_at - interval '2 days' WHERE id = :id",
        id=earlier.id,
    )
    await RetentionSweeper(retention, blobs, Lifetimes(DAY_S, DAY_S, DAY_S)).remove_expired()
    with pytest.raises(JobNotFound):
        await store.get(earlier.id)
    assert await blobs.fetch(earlier.result().key, 10) is None
    assert await blobs.get((await store.get(job.id)).result()) == b"restored"
    assert await retention.wanted_outputs([output.key]) == {output.key}
    assert await store.find_result(new_job()) == await store.get(job.id)


@pytest.mark.reuse
async def test_the_lookup_is_one_step_in_an_index(database: Database) -> None:
    """The index gives the newest result first, however many there are of the same work."""
    asked = new_job()
    statements: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        await PostgresJobStore(database).find_result(asked)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    [(lookup, parameters)] = [each for each in statements if "work_key" in each[0]]

    def plan(connection: Connection) -> list[str]:
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        rows = connection.exec_driver_sql(f"EXPLAIN (COSTS OFF) {lookup}", parameters)
        return [row[0].strip() for row in rows]

    steps = await database.run(plan)
    assert any("Index Scan Backward using jobs_results" in step for step in steps), steps
    assert not any("Sort" in step for step in steps), steps


@pytest.mark.reuse
@pytest.mark.parametrize(
    "wrong",
    [
        "reused_from = NULL",
        "attempt = 1",
        "status = 'failed', failure_code = 'c', failure_message = 'm', output_key = NULL,"
        " output_sha256 = NULL, output_size_bytes = NULL, output_content_type = NULL",
    ],
    ids=["success without attempt", "attempt", "failed"],
)
async def test_the_table_refuses_what_reuse_cannot_be(database: Database, wrong: str) -> None:
    """Only reused jobs succeed without an attempt, and reused jobs can only succeed."""
    new = new_job()
    key = copy_key(new.id, OutputFormat.PNG)
    await PostgresJobStore(database).insert(replace(new, reused=Reused(uuid4(), artifact(key))))
    with pytest.raises(IntegrityError):
        await _execute(database, f"UPDATE jobs SET {wrong} WHERE id = :id", id=new.id)  # noqa: S608
