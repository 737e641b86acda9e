"""Bring a database up to the newest revision, all of it or nothing.

Safe to call from several processes at once: an advisory lock lets one through, and the others
find the work done.
"""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, NullPool, create_engine, func, select, text

from persistence.postgres.database import (
    AdvisoryLock,
    connect_arguments,
    sqlalchemy_url,
    translated_errors,
)

# Long enough for another process's migration; a blocked ALTER must not hold up every query
# behind it for longer.
_LOCK_TIMEOUT = "60s"


def upgrade(database_url: str) -> None:
    """Blocks. Raises DependencyUnavailable when Postgres cannot be reached or a lock not be had."""
    engine = create_engine(
        sqlalchemy_url(database_url),
        poolclass=NullPool,
        connect_args=connect_arguments(statement_timeout_ms=0),
    )
    with translated_errors(), engine.begin() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
        connection.execute(select(func.pg_advisory_xact_lock(AdvisoryLock.MIGRATION)))
        command.upgrade(_config(connection), "head")


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", "persistence:migrations")
    config.attributes["connection"] = connection
    return config
