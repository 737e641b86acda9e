"""Leader election by a session's advisory lock, and notifications by LISTEN, on one connection.

The lock lives exactly as long as the connection, and DependencyUnavailable reports the loss of
both. A notification is only a hint: the leader also polls the table. The event loop drives the
connection, without a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from uuid import UUID

import psycopg2
from psycopg2.errors import LockNotAvailable
from psycopg2.extensions import POLL_ERROR, POLL_OK, POLL_WRITE
from psycopg2.extensions import connection as Connection

from persistence.postgres.database import (
    CONNECT_TIMEOUT_S,
    AdvisoryLock,
    connect_arguments,
    libpq_url,
    translated_errors,
)
from restoration.errors import DependencyUnavailable
from restoration.jobs import AttemptRef

WAITING_CHANNEL = "comfy_restore_job_waits"
DELIVERY_CHANNEL = "comfy_restore_webhook_waits"

# Time for the server's answer, in addition to the time limit of the statement.
_ANSWER_TIMEOUT_S = 5.0

LOOK = ""  # a hint without an attempt: some job waits


def hint_of(ref: AttemptRef) -> str:
    """Return the notification for a waiting job whose next attempt is `ref`."""
    return f"{ref.job_id} {ref.attempt}"


def attempt_of(hint: str) -> AttemptRef | None:
    """Return the attempt that a notification names, or None for LOOK."""
    job_id, _, attempt = hint.partition(" ")
    try:
        return AttemptRef(UUID(job_id), int(attempt))
    except ValueError:
        return None


class Leadership:
    """A replica's leader election, and the leader's notifications. For one task at a time."""

    def __init__(
        self,
        database_url: str,
        lock: AdvisoryLock = AdvisoryLock.DISPATCHER,
        channel: str = WAITING_CHANNEL,
    ) -> None:
        """Create it without connecting. Raises InvalidSettings if the URL is not for Postgres."""
        self._url = libpq_url(database_url)
        self._lock = lock
        self._channel = channel
        self._connection: Connection | None = None
        self._leads = False

    async def acquire(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` to become the leader, and return whether this is the leader.

        Connects on the first call and after a loss. Raises DependencyUnavailable. Cancelling it
        closes the connection.
        """
        if self._leads:
            return True
        # A connection in the middle of a statement cannot execute another one.
        with contextlib.ExitStack() as undo, translated_errors():
            undo.callback(self._close)
            if self._connection is None:
                # In a thread: libpq may block while it resolves the host name.
                self._connection = await asyncio.to_thread(
                    psycopg2.connect,
                    self._url,
                    connection_factory=Connection,
                    async_=True,
                    **connect_arguments(statement_timeout_ms=0),
                )
                await _settle(self._connection, CONNECT_TIMEOUT_S)
            # The server limits the wait, because a statement that waited for days would hold a
            # snapshot and keep vacuum from removing rows deleted in that time.
            limit = f"SET lock_timeout = {max(1, round(timeout_s * 1000))}"
            await _execute(self._connection, limit, _ANSWER_TIMEOUT_S)
            with contextlib.suppress(LockNotAvailable):
                lock = f"SELECT pg_advisory_lock({self._lock:d})"
                await _execute(self._connection, lock, timeout_s + _ANSWER_TIMEOUT_S)
                # Only the leader listens: a follower would collect notifications it never reads.
                await _execute(self._connection, f"LISTEN {self._channel}", _ANSWER_TIMEOUT_S)
                self._leads = True
            undo.pop_all()
        return self._leads

    async def wait(self, timeout_s: float) -> Sequence[str]:
        """Wait up to `timeout_s` for notifications, and return all since the last call.

        Only for the leader; safe to cancel. Raises DependencyUnavailable if the leadership is lost.
        """
        if not self._leads or self._connection is None:
            raise DependencyUnavailable("Postgres: this process does not hold the leader's lock")
        connection = self._connection
        try:
            with translated_errors(), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    _poll(connection)
                    while not connection.notifies:
                        await _ready(connection, to_write=False)
                        _poll(connection)
        except DependencyUnavailable:
            self._close()
            raise
        hints = [notification.payload for notification in connection.notifies]
        connection.notifies.clear()
        return hints

    async def aclose(self) -> None:
        """Close the connection, which releases the lock. `acquire` may be called again."""
        self._close()

    def _close(self) -> None:
        self._leads = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def _execute(connection: Connection, statement: str, timeout_s: float) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        await _settle(connection, timeout_s)


async def _settle(connection: Connection, timeout_s: float) -> None:
    """Poll the connection until its operation is complete. Raises DependencyUnavailable."""
    try:
        async with asyncio.timeout(timeout_s):
            while (state := _poll(connection)) != POLL_OK:
                await _ready(connection, to_write=state == POLL_WRITE)
    except TimeoutError:
        raise DependencyUnavailable(f"Postgres: no response within {timeout_s:g} s") from None


def _poll(connection: Connection) -> int:
    state: int = connection.poll()
    if state == POLL_ERROR or connection.closed:
        raise psycopg2.OperationalError("the connection was lost")
    return state


async def _ready(connection: Connection, *, to_write: bool) -> None:
    """Wait until the connection's socket is readable, or writable."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    descriptor = connection.fileno()
    if to_write:
        loop.add_writer(descriptor, ready.set)
    else:
        loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        if to_write:
            loop.remove_writer(descriptor)
        else:
            loop.remove_reader(descriptor)
