"""Simulated time, for asyncio and for Postgres, so that a day passes as fast as it computes.

Whatever runs on a `SimulatedLoop` sees the loop's clock leap to the next timer when nothing else
is to be done. What it asks of a `SimulatedDatabase` sees the same clock: `now()` there is found
before Postgres' own, and the statements are those of production, to the letter.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, text

from persistence.postgres.database import Database, sqlalchemy_url
from persistence.postgres.migrate import upgrade

_T = TypeVar("_T")

MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)  # when the clock of a loop stands at 0

# A schema that is searched before pg_catalog. Defaults of columns are bound to these functions
# when the tables are made, triggers and statements when they run. Migrations are the only ones that
# do not say what time it is. The sequence keeps turns taken
# at the same moment in the order in which they were taken.
_CLOCK = (
    "CREATE SCHEMA sim",
    """CREATE FUNCTION sim.now() RETURNS timestamptz STABLE LANGUAGE sql
        RETURN coalesce(nullif(current_setting('sim.now', true), '')::timestamptz,
                        pg_catalog.now())""",
    "CREATE SEQUENCE sim.ticks",
    """CREATE FUNCTION sim.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql
        RETURN sim.now() + nextval('sim.ticks') * interval '1 microsecond'""",
)
_SETTINGS = {
    "search_path": "sim, public, pg_catalog",
    "synchronous_commit": "off",  # nobody needs this database after a crash
}
# One message to Postgres where there would be four: its round trips are most of a simulated day.
# Nobody but this connection looks at the database, so a transaction may be committed late.
_BEGIN = "BEGIN; SELECT set_config('sim.now', %s, true)"
_NEXT = f"COMMIT; {_BEGIN}"


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: its time is that of the next timer.

    What would go to a thread is done at once and takes no time, so that a run depends on nothing
    but its seed.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Leaping(self._leap))

    def time(self) -> float:
        return self._now_s

    def _leap(self, seconds: float) -> None:
        self._now_s += seconds

    def run_in_executor(  # type: ignore[override] # typeshed's own needs TypeVarTuple
        self, executor: Executor | None, func: Callable[..., _T], *args: Any
    ) -> asyncio.Future[_T]:
        done: asyncio.Future[_T] = self.create_future()
        done.set_result(func(*args))
        return done


class _Leaping(selectors.DefaultSelector):
    def __init__(self, leap: Callable[[float], None]) -> None:
        super().__init__()
        self._leap = leap

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("the simulation waits for what will never happen")
        self._leap(max(0.0, timeout))
        return super().select(0)


class SimulatedDatabase(Database):
    """A database whose time is the loop's. One connection, never lost: it is not checked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        engine = create_engine(sqlalchemy_url(url), isolation_level="AUTOCOMMIT")
        self._only = engine.connect()
        self._cursor = self._only.connection.cursor()
        self._is_open = False  # a transaction that did well, and is yet to be committed

    async def run(self, work: Callable[[Connection], _T], *, atomic: bool = True) -> _T:
        now = MIDNIGHT + timedelta(seconds=asyncio.get_running_loop().time())
        self._cursor.execute(_NEXT if self._is_open else _BEGIN, [now.isoformat()])
        self._is_open = False
        try:
            result = work(self._only)
        except BaseException:
            self._cursor.execute("ROLLBACK")
            raise
        self._is_open = True
        return result

    async def aclose(self) -> None:
        if self._is_open:
            self._cursor.execute("COMMIT")
        self._only.close()
        self._only.engine.dispose()
        await super().aclose()


def make_database(server_url: str, name: str) -> str:
    """The URL of a new database with our tables and a simulated clock."""
    server = create_engine(sqlalchemy_url(server_url), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        for setting, value in _SETTINGS.items():
            connection.execute(text(f"ALTER DATABASE {name} SET {setting} = {value}"))
    url = server.url.set(drivername="postgresql", database=name)
    server.dispose()
    made = url.render_as_string(hide_password=False)
    database = create_engine(sqlalchemy_url(made), isolation_level="AUTOCOMMIT")
    with database.connect() as connection:
        for statement in _CLOCK:
            connection.execute(text(statement))
    database.dispose()
    upgrade(made)
    return made
