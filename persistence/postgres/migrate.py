"""Migrate a database to the newest revision in one transaction.

Several processes may call it at once: an advisory lock lets one migrate, and the others then find
nothing to do.
"""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from sqlalchemy import NullPool, create_engine, func, select, text

from persistence.postgres.database import (
    AdvisoryLock,
    connect_arguments,
    sqlalchemy_url,
    translated_errors,
)

# Long enough for another process's migration. A blocked ALTER blocks all later queries, so it must
# not wait longer.
_LOCK_TIMEOUT = "60s"


def upgrade(database_url: str) -> None:
    """Migrate the database; blocks. Raises DependencyUnavailable, also if a lock times out."""
    engine = create_engine(
        sqlalchemy_url(database_url),
        poolclass=NullPool,
        connect_args=connect_arguments(statement_timeout_ms=0),
    )
    config = Config()
    config.set_main_option("script_location", "persistence:migrations")
    with translated_errors(), engine.begin() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
        connection.execute(select(func.pg_advisory_xact_lock(AdvisoryLock.MIGRATION)))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
