"""Postgres for asyncio: a call runs as one transaction on one of a few threads.

Stores use connections only through `Database.run`. It raises DependencyUnavailable if the server
cannot be reached, closes the connection or takes too long. The transaction may have been committed
then, so all work that runs here must be repeatable.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
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
# psycopg2 raises a plain ValueError with this message.
_NUL_REFUSED = "A string literal cannot contain NUL (0x00) characters."

# Each side notices within about ten seconds that the other machine is gone. The server needs this
# too, because it keeps the locks of a lost client until it notices.
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
    """All advisory locks of this application. Postgres scopes them to a database."""

    MIGRATION = 7_206_001
    DISPATCHER = 7_206_002
    MAINTENANCE = 7_206_003


class Database:
    """A bounded pool of connections with as many threads, which owners use in turns.

    A connection is checked before each use and replaced if it is dead. This retry is always safe,
    because nothing has been sent yet.
    """

    def __init__(
        self, url: str, *, pool_size: int = 8, queue_timeout_s: float = QUEUE_TIMEOUT_S
    ) -> None:
        """Create the pool, which connects on first use.

        `queue_timeout_s` limits the wait for a thread. Raises InvalidSettings if `url` is not a
        Postgres URL.
        """
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
        """Run `work(connection)` in a transaction, and commit it if `work` returns.

        Unless `atomic`, each statement is a transaction of its own, which saves the round trips of
        BEGIN and COMMIT. Use it for one statement, or several independent ones.

        Cancelling the caller does not stop a transaction that has begun. Raises
        DependencyUnavailable, InvalidRequest for a value that Postgres cannot store, and the errors
        of `work`.
        """
        begin = self._engine.begin if atomic else self._autocommit

        def transact() -> _T:
            with translated_errors(), begin() as connection:
                return work(connection)

        return await self._threads.run(transact)

    @contextmanager
    def _autocommit(self) -> Iterator[Connection]:
        # SQLAlchemy's isolation level is not used: resetting it costs a round trip with psycopg2.
        with self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.autocommit = True
            try:
                yield connection
            finally:
                with suppress(psycopg2.InterfaceError):  # the connection is closed
                    driver.autocommit = False

    async def aclose(self) -> None:
        """Wait for the transactions that have begun, then close all connections."""
        await self._threads.aclose()
        self._engine.dispose()


def _replace_if_dead(connection: Any, record: ConnectionPoolEntry, *_: object) -> None:
    """Replace an idle connection that has something to read: the server has closed it or will.

    A `SELECT 1` would cost a round trip on each use. A new connection is not checked, because
    SQLAlchemy would replace it once and then raise an error that does not mention the server.
    """
    if not record.info.get("used"):
        record.info["used"] = True  # forgotten with the connection
        return
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise exc.InvalidatePoolError


def _give_up_if_demoted(context: ExceptionContext) -> None:
    """Treat a read-only error as a disconnect: the server has become a standby.

    This drops all connections to it.
    """
    if isinstance(context.original_exception, psycopg2.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True


@contextmanager
def translated_errors() -> Iterator[None]:
    """Convert SQLAlchemy's and psycopg2's errors to DependencyUnavailable or InvalidRequest.

    ProgrammingError and IntegrityError are bugs in a statement and pass through.
    """
    try:
        yield
    except (exc.DataError, psycopg2.DataError, UnicodeEncodeError) as error:
        raise InvalidRequest(
            "a value in the request cannot be stored", reason=_first_line(error)
        ) from error
    except ValueError as error:
        if str(error) != _NUL_REFUSED:
            raise
        raise InvalidRequest(
            "a value in the request cannot be stored", reason=_NUL_REFUSED
        ) from error
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
    """Return libpq's connection parameters."""
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
    """Return `url` for libpq, without SQLAlchemy's driver name. Raises InvalidSettings."""
    return _parse(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise InvalidSettings("DATABASE_URL is not a URL") from None
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise InvalidSettings("DATABASE_URL must start with postgresql://")
    named = parsed.query.get("host", ())
    hosts = (parsed.host or "", *([named] if isinstance(named, str) else named))
    if any("," in host for host in hosts) or len(hosts) > 2:
        # libpq tries several hosts in turn only on blocking connections.
        raise InvalidSettings(
            "DATABASE_URL must name one host only, which always leads to the server that "
            "accepts writes"
        )
    return parsed
