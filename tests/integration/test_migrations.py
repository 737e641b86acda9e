"""The migrations, compared with the declared tables, and run concurrently."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import IntegrityError

from persistence.postgres.database import sqlalchemy_url
from persistence.postgres.migrate import upgrade
from persistence.postgres.rows import new_row
from persistence.postgres.tables import jobs, metadata
from tests.support.samples import new_job

CATALOGUE = {
    "columns": """
        SELECT column_name, data_type, is_nullable, column_default
        FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name <> 'alembic_version'
        ORDER BY table_name, ordinal_position""",
    "constraints": """
        SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conname NOT LIKE 'alembic%'
        ORDER BY conname""",
    "indexes": """
        SELECT indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename <> 'alembic_version'
        ORDER BY indexname""",
}


@pytest.fixture
def empty_url(database_url: str) -> Iterator[str]:
    """Yield the URL of a database without migrations."""
    name = f"empty_{uuid4().hex}"
    admin = _engine(database_url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    yield make_url(database_url).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name}"))


def _engine(url: str) -> Engine:
    return create_engine(sqlalchemy_url(url), poolclass=NullPool)


def _catalogue(url: str) -> dict[str, list[tuple[object, ...]]]:
    with _engine(url).connect() as connection:
        return {
            part: [tuple(row) for row in connection.execute(text(query))]
            for part, query in CATALOGUE.items()
        }


def test_the_migrations_make_the_tables_that_the_code_declares(
    database_url: str, empty_url: str
) -> None:
    """Columns, constraints and indexes are identical in Postgres' catalogue."""
    metadata.create_all(_engine(empty_url))
    declared = _catalogue(empty_url)
    assert declared["columns"]
    assert _catalogue(database_url) == declared


def test_processes_that_migrate_at_once_do_not_disturb_each_other(empty_url: str) -> None:
    """Of several concurrent upgrades one does the work, and none fails."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(upgrade, [empty_url] * 4))
    with _engine(empty_url).connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar() == 0


@pytest.mark.parametrize(
    ("violated", "values"),
    [
        ("jobs_status_known", "status = 'lost'"),
        ("jobs_lease_until_present", "lease_until = now()"),
        ("jobs_finished_at_present", "status = 'cancelled'"),
        ("jobs_finished_at_present", "finished_at = now()"),
        ("jobs_output_key_present", "status = 'succeeded', finished_at = now(), attempt = 1, "
         "worker = 'w', started_at = now()"),
        ("jobs_failure_code_present", "status = 'failed', finished_at = now()"),
        ("jobs_output_whole", "output_sha256 = ''"),
        ("jobs_failure_whole", "failure_message = ''"),
        ("jobs_attempted", "status = 'running', lease_until = now()"),
        ("jobs_waiting_clean", "worker = 'w'"),
        ("jobs_attempts_bounded", "failed_attempts = 1"),
        ("jobs_attempts_bounded", "attempt = 9, failed_attempts = 4"),
    ],
)  # fmt: skip
def test_no_row_can_contradict_itself(database_url: str, violated: str, values: str) -> None:
    """Constraints refuse an UPDATE that leaves a job without the columns of its state."""
    with _engine(database_url).connect() as connection:
        connection.execute(jobs.insert().values(new_row(new_job())))
        with pytest.raises(IntegrityError) as caught:
            connection.execute(text(f"UPDATE jobs SET {values}"))  # noqa: S608
        assert violated in str(caught.value)
