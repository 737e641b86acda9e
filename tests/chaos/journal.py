"""A journal of every state change of every job, written by a trigger inside Postgres.

A row is written in the transaction that makes the change. So a job that ended twice is visible,
although its own row shows only the last state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from uuid import UUID

import psycopg2
from psycopg2.extensions import cursor as Cursor

from persistence.postgres.database import libpq_url
from restoration.jobs import JobStatus, OutputFormat

_INSTALL = """
CREATE TABLE chaos_journal (
    number bigserial PRIMARY KEY,
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    source text NOT NULL,
    target text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE FUNCTION chaos_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_journal (job_id, attempt, source, target)
    VALUES (NEW.id, NEW.attempt, OLD.status, NEW.status);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_note AFTER UPDATE ON jobs FOR EACH ROW
WHEN (OLD.status <> NEW.status OR OLD.output_key IS DISTINCT FROM NEW.output_key)
EXECUTE FUNCTION chaos_note();
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A job's change of state, at `at` seconds since the epoch."""

    job_id: UUID
    attempt: int
    source: JobStatus
    target: JobStatus
    at: float


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of a job's row that the verdict needs."""

    job_id: UUID
    status: JobStatus
    output_format: OutputFormat
    owner: str
    attempt: int
    created_at: float
    finished_at: float | None
    output_key: str | None
    failure_code: str | None
    failure_message: str | None
    wants_webhook: bool


class Journal:
    def __init__(self, database_url: str) -> None:
        self._url = libpq_url(database_url)

    def install(self) -> None:
        with self._cursor() as cursor:
            cursor.execute(_INSTALL)

    def changes(self) -> list[Change]:
        """Return all changes in the order in which they were made."""
        query = """
            SELECT job_id, attempt, source, target, extract(epoch FROM at)::float8
            FROM chaos_journal ORDER BY number"""
        with self._cursor() as cursor:
            cursor.execute(query)
            return [
                Change(UUID(job_id), attempt, JobStatus(source), JobStatus(target), at)
                for job_id, attempt, source, target, at in cursor.fetchall()
            ]

    def rows(self) -> dict[UUID, Row]:
        query = """
            SELECT id, status, output_format, owner, attempt,
                   extract(epoch FROM created_at)::float8,
                   extract(epoch FROM finished_at)::float8, output_key,
                   failure_code, failure_message, webhook_url IS NOT NULL
            FROM jobs"""
        with self._cursor() as cursor:
            cursor.execute(query)
            return {
                UUID(job_id): Row(UUID(job_id), JobStatus(status), OutputFormat(form), *rest)
                for job_id, status, form, *rest in cursor.fetchall()
            }

    def unfinished(self) -> int:
        """Return how many jobs have not ended plus how many webhooks are still to send.

        Raises psycopg2.OperationalError while Postgres is down.
        """
        query = """
            SELECT (SELECT count(*) FROM jobs WHERE finished_at IS NULL)
                 + (SELECT count(*) FROM deliveries WHERE status = 'pending')"""
        with self._cursor() as cursor:
            cursor.execute(query)
            return int(cursor.fetchall()[0][0])

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        with closing(psycopg2.connect(self._url, connect_timeout=5)) as connection:
            with connection, connection.cursor() as cursor:
                yield cursor
