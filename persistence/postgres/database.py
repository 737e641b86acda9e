"""Postgres from asyncio: one call is one transaction on one of a few threads, as a rule.

`Database.run` is the only way to a connection. A server that cannot be reached, that breaks the
connection off or takes too long becomes DependencyUnavailable here; the outcome of a transaction
that was being committed then is unknown, so whatever runs here must be fit to be repeated.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

import psycopg2
import psycopg2.errors
from sqlalchemy import URL, Connection, create_engine, event, exc, make_url
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry

from persistence.fair_threads import FairThreads
from restoration.errors import DependencyUnavailable, InvalidRequest, InvalidSettings

_T = TypeVar("_T")

CONNECT_TIMEOUT_S = 3
_STATEMENT_TIMEOUT_MS = 10_000
QUEUE_TIMEOUT_S = 10.0
# psycopg2 says so without a class of its own
_NUL_REFUSED = "A string literal cannot contain NUL (0x00) characters."

# Both ends find out in about ten seconds that the other machine is gone. The server's side
# matters as much as ours: until it notices, it keeps the locks of the machine that vanished.
_CLIENT_KEEPALIVE = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
_SERVER_KEEPALIVE = {
    "tcp_keepalives_idle": "5s",
    "tcp_keepalives_interval": "2s",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10s",
}


class AdvisoryLock(IntEnum):
    """Every advisory lock of this application; they are scoped to one database."""

    MIGRATION = 7_206_001
    DISPATCHER = 7_206_002
    AFTERCARE = 7_206_003


class Database:
    """A bounded pool of connections, and as many threads, which owners have in turns.

    A connection is checked before each use and replaced if it is dead, which is the one retry
    that is always safe: nothing has been sent on it yet.
    """

    def __init__(
        self, url: str, *, pool_size: int = 8, queue_timeout_s: float = QUEUE_TIMEOUT_S
    ) -> None:
        """Connects on first use. Raises InvalidSettings when `url` is no Postgres URL."""
        self._engine = create_engine(
            sqlalchemy_url(url),
            pool_size=pool_size,
            max_overflow=0,
            connect_args=connect_arguments(statement_timeout_ms=_STATEMENT_TIMEOUT_MS),
        )
        event.listen(self._engine, "checkout", _replace_if_dead)
        event.listen(self._engine, "handle_error", _give_up_if_demoted)
        self._threads = FairThreads(pool_size, "Postgres", queue_timeout_s)

    async def run(self, work: Callable[[Connection], _T], *, atomic: bool = True) -> _T:
        """`work(connection)` in one transaction: committed when it returns, else rolled back.

        Unless `atomic`, each of its statements is a transaction of its own: for one statement,
        or several of which none relies on another. That spares the two round trips around them.

        Cancelling the caller does not stop a transaction that has begun. Raises
        DependencyUnavailable, InvalidRequest for a value that Postgres cannot hold, and whatever
        `work` raises.
        """
        begin = self._engine.begin if atomic else self._autocommit
        return await self._threads.run(partial(_transact, begin, work))

    @contextmanager
    def _autocommit(self) -> Iterator[Connection]:
        # Not SQLAlchemy's isolation level, whose way back costs a round trip with psycopg2.
        with self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.autocommit = True
            try:
                yield connection
            finally:
                with suppress(psycopg2.InterfaceError):  # it is closed
                    driver.autocommit = False

    async def aclose(self) -> None:
        """Wait for the transactions that have begun, then close every connection."""
        await self._threads.aclose()
        self._engine.dispose()


def _transact(
    begin: Callable[[], AbstractContextManager[Connection]], work: Callable[[Connection], _T]
) -> _T:
    with translated_errors(), begin() as connection:
        return work(connection)


def _replace_if_dead(connection: Any, record: ConnectionPoolEntry, *_: object) -> None:
    """An idle connection has nothing to say. If there is something to read, the server has closed
    it, or is about to: replace it. A `SELECT 1` would cost a round trip on each use.

    A connection that was made just now is not looked at: SQLAlchemy would make one more, and
    then give up with an error that says nothing of the server."""
    if not record.info.get("used"):
        record.info["used"] = True  # forgotten with the connection
        return
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise exc.InvalidatePoolError


def _give_up_if_demoted(context: ExceptionContext) -> None:
    """A server that has become a standby while it could be reached takes no writes from us any
    more: like one that is gone, it is left with all its connections."""
    if isinstance(context.original_exception, psycopg2.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn what SQLAlchemy and psycopg2 raise about the outside world into errors of ours.

    What says that a statement is wrong (ProgrammingError, IntegrityError) is a bug, and stays.
    """
    try:
        yield
    except (exc.DataError, psycopg2.DataError, UnicodeEncodeError) as error:
        raise InvalidRequest("a value cannot be stored", reason=_first_line(error)) from error
    except ValueError as error:
        if str(error) != _NUL_REFUSED:
            raise
        raise InvalidRequest("a value cannot be stored", reason=_NUL_REFUSED) from error
    except (
        exc.OperationalError,
        exc.InterfaceError,
        exc.TimeoutError,
        psycopg2.OperationalError,
        psycopg2.InterfaceError,
    ) as error:
        raise DependencyUnavailable(f"Postgres: {_first_line(error)}") from error
    except exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise DependencyUnavailable(f"Postgres: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def connect_arguments(*, statement_timeout_ms: int) -> dict[str, Any]:
    """libpq's connection parameters, the same for every connection but the time limit."""
    session = {
        **_SERVER_KEEPALIVE,
        "statement_timeout": statement_timeout_ms,
        "idle_in_transaction_session_timeout": "10s",
        "timezone": "UTC",
    }
    return {
        **_CLIENT_KEEPALIVE,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "target_session_attrs": "read-write",
        "application_name": "comfy-restore",
        "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
    }


def sqlalchemy_url(url: str) -> URL:
    return _parse(url).set(drivername="postgresql+psycopg2")


def libpq_url(url: str) -> str:
    """`url` as libpq understands it, without SQLAlchemy's name of a driver."""
    return _parse(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _texts(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise InvalidSettings("DATABASE_URL is not a URL") from None
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise InvalidSettings("DATABASE_URL must begin with postgresql://")
    hosts = (parsed.host or "", *_texts(parsed.query.get("host", ())))
    if any("," in host for host in hosts) or len(hosts) > 2:
        # libpq would go from one to the next, but not where it is used without blocking
        raise InvalidSettings(
            "DATABASE_URL names several hosts; give the one name that leads to who takes writes"
        )
    return parsed
