"""End an attempt's work early: when its time is up, or when its job is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from restoration.errors import EngineInterrupted, EngineTimeout
from restoration.tasks import stop


class RunLimit:
    """A time limit, in seconds, for the work on an attempt's picture.

    Decoding, executing the graph and encoding count; waiting for the engine does not.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = self._left_s = limit_s
        self._began_at: float | None = None
        self._timeout: asyncio.Timeout | None = None

    @asynccontextmanager
    async def bounding(self) -> AsyncIterator[None]:
        """Count the time from `begin` to the end of the block. Raises EngineTimeout if it is up."""
        try:
            async with asyncio.timeout(None) as timeout:
                self._timeout = timeout
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            message = f"the attempt exceeded its time limit of {self._limit_s:g} s"
            raise EngineTimeout(message) from None
        finally:
            if self._began_at is not None:
                self._left_s -= asyncio.get_running_loop().time() - self._began_at
                self._began_at = None

    def begin(self) -> None:
        """Start to count. Call it within `bounding`; further calls have no effect."""
        if self._timeout is not None and self._began_at is None:
            self._began_at = asyncio.get_running_loop().time()
            self._timeout.reschedule(self._began_at + self._left_s)


@asynccontextmanager
async def interruptible(cancelled: asyncio.Event) -> AsyncIterator[None]:
    """Stop the block and raise EngineInterrupted when `cancelled` is set."""

    async def expire() -> None:
        await cancelled.wait()
        timeout.reschedule(asyncio.get_running_loop().time())

    expiring = asyncio.create_task(expire())
    try:
        async with asyncio.timeout(None) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise EngineInterrupted("the job was cancelled") from None
    finally:
        await stop(expiring)
