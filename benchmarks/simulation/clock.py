"""Simulated time for asyncio and Postgres: a day passes as fast as it can be computed.

On a `SimulatedLoop` the clock jumps to the next timer when nothing else is ready. Queries to a
`SimulatedDatabase` see the same clock: its `now()` precedes Postgres' own on the search path, so
that the statements are exactly those of production.
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

MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)  # the time at which a loop's clock is 0

# A schema that precedes pg_catalog on the search path. Column defaults bind to these functions when
# the tables are created, triggers and statements when they run. Only migrations run without a
# simulated time. The sequence keeps the order of turns taken at the same moment.
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
    "synchronous_commit": "off",  # the database need not survive a crash
}
# One message to Postgres instead of four, because round trips take most of a simulated day. A late
# commit is harmless, because no other connection reads the database.
_BEGIN = "BEGIN; SELECT set_config('sim.now', %s, true)"
_NEXT = f"COMMIT; {_BEGIN}"


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: its clock jumps to the next timer.

    Calls for a thread run at once and take no time, so that a run depends only on its seed.
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
    """A database on the loop's time, with one connection that is never lost and so never
    checked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        engine = create_engine(sqlalchemy_url(url), isolation_level="AUTOCOMMIT")
        self._only = engine.connect()
        self._cursor = self._only.connection.cursor()
        self._is_open = False  # a successful transaction is not committed yet

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
    """Create a database with the product's tables and a simulated clock; return its URL."""
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
