"""Migrations only add: the previous release keeps working on the tables of the next one."""

from __future__ import annotations

import io
import re

import pytest
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory

# A dropped index makes a statement slow, not wrong.
TAKES_AWAY = (
    r"\bDROP\s+(TABLE|COLUMN|DEFAULT|NOT|TRIGGER|FUNCTION|VIEW|SCHEMA)\b",
    r"\bALTER\s+(COLUMN\b|\w+\s+(SET|TYPE|DROP)\b)",
    r"\bRENAME\b",
    r"\bTRUNCATE\b",
    r"\bDELETE\s+FROM\b",
)
DROPPED_CHECK = re.compile(r"DROP\s+CONSTRAINT\s+(\w+)", re.IGNORECASE)
ADDED_COLUMN = re.compile(r"ADD\s+COLUMN\s+(.*?)(?=,\s*ADD\b|;|$)", re.IGNORECASE | re.DOTALL)


def _script() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", "persistence:migrations")
    return ScriptDirectory.from_config(config)


def _migrations() -> list[Script]:
    return list(_script().walk_revisions())


def _sql(migration: Script) -> str:
    """Return the SQL it would execute, without the bodies of functions, which remove nothing."""
    told = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": told}
    )
    with Operations.context(context):
        migration.module.upgrade()
    return re.sub(r"\$\$.*?\$\$", "$$", told.getvalue(), flags=re.DOTALL)


def _contradictions(sql: str) -> list[str]:
    """Return the statements that would break the previous code."""
    found = [
        match.group() for each in TAKES_AWAY for match in re.finditer(each, sql, re.IGNORECASE)
    ]
    # One that is added again at once is taken to be looser, which its author must ensure.
    lost = [name for name in DROPPED_CHECK.findall(sql) if f"ADD CONSTRAINT {name} " not in sql]
    return [*found, *lost, *filter(_asks, ADDED_COLUMN.findall(sql))]


def _asks(column: str) -> bool:
    return "NOT NULL" in column.upper() and "DEFAULT" not in column.upper()


@pytest.mark.upgrades
@pytest.mark.parametrize("migration", _migrations(), ids=lambda each: each.revision)
def test_a_migration_only_adds(migration: Script) -> None:
    """It removes nothing that old code reads, and requires nothing that old code does not write."""
    assert _contradictions(_sql(migration)) == []


@pytest.mark.upgrades
@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE jobs DROP COLUMN worker",
        "ALTER TABLE jobs ADD COLUMN a text, ADD COLUMN b text NOT NULL",
        "ALTER TABLE jobs ADD COLUMN a text NOT NULL; CREATE TABLE t (b int DEFAULT 1)",
        "ALTER TABLE jobs RENAME COLUMN worker TO replica",
        "ALTER TABLE jobs ALTER COLUMN params TYPE jsonb",
        "ALTER TABLE jobs ALTER worker SET NOT NULL; ALTER TABLE jobs DROP CONSTRAINT x",
        "DROP TABLE turns",
    ],
)
def test_what_takes_away_is_found(sql: str) -> None:
    """The check reports a removal and names its place."""
    assert _contradictions(sql)


@pytest.mark.upgrades
def test_there_is_one_line_of_migrations() -> None:
    """With two heads, a database's tables would depend on chance."""
    assert len(_script().get_heads()) == 1
