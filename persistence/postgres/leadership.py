"""Who leads, and when to look: a session's advisory lock, and LISTEN, on one connection.

The lock lives exactly as long as the connection, so to lose one is to lose the other, and
DependencyUnavailable says so. A notification is a hint only: whoever waits looks at the table
now and then, hinted or not. No thread: the event loop drives the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
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

# How long an answer may take, past the time limit that the server itself keeps.
_ANSWER_TIMEOUT_S = 5.0

LOOK = ""  # the hint that says no more than that there is something


def hint_of(ref: AttemptRef) -> str:
    """What is announced of an attempt that a worker may begin with."""
    return f"{ref.job_id} {ref.attempt}"


def attempt_of(hint: str) -> AttemptRef | None:
    """The attempt that was announced; None for a hint to look at the table."""
    job_id, _, attempt = hint.partition(" ")
    try:
        return AttemptRef(UUID(job_id), int(attempt))
    except ValueError:
        return None


class Leadership:
    """One replica's way to lead, by a lock, and a leader's ear; for one task at a time."""

    def __init__(
        self,
        database_url: str,
        lock: AdvisoryLock = AdvisoryLock.DISPATCHER,
        channel: str = WAITING_CHANNEL,
    ) -> None:
        """Connects on the first `acquire`. Raises InvalidSettings for what is no Postgres URL."""
        self._url = libpq_url(database_url)
        self._lock = lock
        self._channel = channel
        self._connection: Connection | None = None
        self._leads = False

    async def acquire(self, timeout_s: float) -> bool:
        """Whether this is the leader now, after at most `timeout_s` of waiting for another to go.

        Connects again after a loss. Raises DependencyUnavailable. When it is cancelled, the
        connection is given up.
        """
        if self._leads:
            return True
        with self._closed_unless_done():
            if self._connection is None:
                self._connection = await asyncio.to_thread(_open, self._url)
                await _settle(self._connection, CONNECT_TIMEOUT_S)
            if await _take(self._lock, self._connection, timeout_s):
                # Only now: a follower would collect notifications that it never reads.
                await _execute(self._connection, f"LISTEN {self._channel}", _ANSWER_TIMEOUT_S)
                self._leads = True
        return self._leads

    async def wait(self, timeout_s: float) -> Sequence[str]:
        """What was announced since the last wait, as soon as something is; none after `timeout_s`.

        For the leader; it may be cancelled without harm. Raises DependencyUnavailable when the
        leadership is lost.
        """
        if not self._leads or self._connection is None:
            raise DependencyUnavailable("Postgres: the leader's lock is not held")
        try:
            with translated_errors():
                return await _notified(self._connection, timeout_s)
        except DependencyUnavailable:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Give up the connection and with it the lock; `acquire` may be called again."""
        self._leads = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _closed_unless_done(self) -> Iterator[None]:
        # A connection that was left in the middle of a statement is of no use to the next one.
        done = False
        try:
            with translated_errors():
                yield
            done = True
        finally:
            if not done and self._connection is not None:
                self._connection.close()
                self._connection = None


def _open(url: str) -> Connection:
    """Begin to connect. libpq may block meanwhile, to look up the host's name."""
    arguments = connect_arguments(statement_timeout_ms=0)
    return psycopg2.connect(url, connection_factory=Connection, async_=True, **arguments)


async def _take(lock: AdvisoryLock, connection: Connection, timeout_s: float) -> bool:
    # The server ends the wait, so that a standby's statement never lasts: one that waited for
    # days would hold a snapshot, and keep vacuum away from every row that died in those days.
    await _execute(
        connection, f"SET lock_timeout = {max(1, round(timeout_s * 1000))}", _ANSWER_TIMEOUT_S
    )
    statement = f"SELECT pg_advisory_lock({lock:d})"
    try:
        await _execute(connection, statement, timeout_s + _ANSWER_TIMEOUT_S)
    except LockNotAvailable:
        return False
    return True


async def _notified(connection: Connection, timeout_s: float) -> Sequence[str]:
    """The notifications that are there, or come in time; takes all of them."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            _poll(connection)
            while not connection.notifies:
                await _ready(connection, to_write=False)
                _poll(connection)
    hints = [notification.payload for notification in connection.notifies]
    connection.notifies.clear()
    return hints


async def _execute(connection: Connection, statement: str, timeout_s: float) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        await _settle(connection, timeout_s)


async def _settle(connection: Connection, timeout_s: float) -> None:
    """Drive the connection until what was begun on it has ended."""
    try:
        async with asyncio.timeout(timeout_s):
            while (state := _poll(connection)) != POLL_OK:
                await _ready(connection, to_write=state == POLL_WRITE)
    except TimeoutError:
        raise DependencyUnavailable(f"Postgres: no answer within {timeout_s:g} s") from None


def _poll(connection: Connection) -> int:
    state: int = connection.poll()
    if state == POLL_ERROR or connection.closed:
        raise psycopg2.OperationalError("the connection was lost")
    return state


async def _ready(connection: Connection, *, to_write: bool) -> None:
    """Return when the connection's socket can be read from, or written to."""
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
