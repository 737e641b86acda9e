"""Connections to Postgres when the server or the network fails."""

from __future__ import annotations

import asyncio
import select
import socket
from functools import partial
from unittest.mock import Mock

import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import ProgrammingError

from persistence.postgres.database import Database
from restoration.errors import DependencyUnavailable, InvalidRequest


def _one(connection: Connection) -> int:
    return int(connection.execute(text("SELECT 1")).scalar_one())


def _kill_others(connection: Connection) -> int:
    """Terminate all other connections to the database, as a restart of the server does."""
    return len(
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        ).all()
    )


async def test_the_pool_heals_after_a_restart(database: Database, database_url: str) -> None:
    """Idle connections that have died are replaced without an error for a caller."""
    await asyncio.gather(*(database.run(_one) for _ in range(4)))
    other = Database(database_url, pool_size=1)
    assert await other.run(_kill_others) > 0
    await other.aclose()
    assert await asyncio.gather(*(database.run(_one) for _ in range(4))) == [1] * 4


async def test_news_on_every_connection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unexpected input on idle connections replaces them without an error for a caller."""
    poll = Mock(return_value=Mock(poll=Mock(return_value=[(0, select.POLLIN)])))
    monkeypatch.setattr("persistence.postgres.database.select.poll", poll)
    assert [await database.run(_one) for _ in range(6)] == [1] * 6
    assert poll.called


async def test_a_connection_that_breaks_in_use(database: Database) -> None:
    """A transaction that loses its connection raises DependencyUnavailable; the next one works."""

    def cut(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(DependencyUnavailable) as caught:
        await database.run(cut)
    assert caught.value.__cause__ is not None
    assert await database.run(_one) == 1


@pytest.mark.parametrize("atomic", [True, False])
async def test_a_server_that_became_a_standby(database_url: str, atomic: bool) -> None:
    """A server that has become read-only is unavailable, and its connections are replaced."""

    def demote(connection: Connection) -> None:
        connection.execute(text("SET default_transaction_read_only = on"))

    def write(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE written ()"))
        connection.execute(text("DROP TABLE written"))

    database = Database(database_url, pool_size=1)
    await database.run(demote)
    with pytest.raises(DependencyUnavailable, match="read-only"):
        await database.run(write, atomic=atomic)
    await database.run(write, atomic=atomic)
    await database.aclose()


async def test_a_standby_is_not_talked_to(database: Database, database_url: str) -> None:
    """A server that is read-only from the start is unavailable, even for reads."""
    name = make_url(database_url).database

    def set_default(connection: Connection, change: str) -> None:
        connection.execute(text(f'ALTER DATABASE "{name}" {change}'))

    standby = Database(database_url)
    await database.run(partial(set_default, change="SET default_transaction_read_only = on"))
    try:
        with pytest.raises(DependencyUnavailable, match="read-only"):
            await standby.run(_one)
    finally:
        await database.run(partial(set_default, change="RESET default_transaction_read_only"))
    assert await standby.run(_one) == 1
    await standby.aclose()


async def test_a_statement_that_takes_too_long(database: Database) -> None:
    """A statement cancelled by the server's timeout raises DependencyUnavailable."""

    def wait(connection: Connection) -> None:
        connection.execute(text("SET LOCAL statement_timeout = 50"))
        connection.execute(text("SELECT pg_sleep(10)"))

    with pytest.raises(DependencyUnavailable):
        await database.run(wait)


async def test_nobody_listens() -> None:
    """A refused connection raises DependencyUnavailable, with a message without the password."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        database = Database(f"postgresql://a:hidden@127.0.0.1:{unused.getsockname()[1]}/x")
        with pytest.raises(DependencyUnavailable) as caught:
            await database.run(_one)
        await database.aclose()
    assert "hidden" not in caught.value.message


async def test_a_server_that_never_answers() -> None:
    """A connection without an answer is given up after the connect timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = Database(f"postgresql://a:b@127.0.0.1:{silent.getsockname()[1]}/x")
        with pytest.raises(DependencyUnavailable):
            async with asyncio.timeout(300):
                await database.run(_one)
        await database.aclose()


async def test_what_waited_too_long_for_a_thread_is_not_begun(database_url: str) -> None:
    """Under overload a call that has waited too long is refused before its work begins."""
    database = Database(database_url, pool_size=1, queue_timeout_s=0.05)
    begun, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def occupy(connection: Connection) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

    def late_work(connection: Connection) -> None:
        pytest.fail("it was begun")

    occupier = asyncio.create_task(database.run(occupy))
    await begun.wait()
    with pytest.raises(DependencyUnavailable, match="Postgres"):
        await database.run(late_work)
    release.set()
    await occupier
    await database.aclose()


async def test_a_wrong_statement_is_a_defect(database: Database) -> None:
    """A defective statement is not reported as an outage, and does not affect the next
    transaction."""

    def broken(connection: Connection) -> None:
        connection.execute(text("SELECT * FROM no_such_table"))

    with pytest.raises(ProgrammingError):
        await database.run(broken)
    assert await database.run(_one) == 1


@pytest.mark.parametrize("value", ["a\0b", "half \ud83d"], ids=["NUL", "half a pair"])
async def test_a_text_that_postgres_cannot_hold(database: Database, value: str) -> None:
    """Text that Postgres cannot store, in any parameter, is an InvalidRequest."""

    def ask(connection: Connection) -> None:
        connection.execute(text("SELECT :value"), {"value": value})

    with pytest.raises(InvalidRequest):
        await database.run(ask)
    assert await database.run(_one) == 1


async def test_an_exception_rolls_back(database: Database) -> None:
    """A transaction that raises commits nothing."""

    def half(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE half_done ()"))
        raise LookupError

    with pytest.raises(LookupError):
        await database.run(half)

    def exists(connection: Connection) -> object:
        return connection.execute(text("SELECT to_regclass('half_done')")).scalar()

    assert await database.run(exists) is None
