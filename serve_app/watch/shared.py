"""The state and the wake-ups that the watchers of one job or batch share in a process."""

from __future__ import annotations

import asyncio


class Shared:
    """A feed that several watchers wait for. `users` counts them."""

    def __init__(self) -> None:
        self.users = 0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next change, or for `wake`. Raises the error given to `fail`."""
        if self._error is None:
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def wake(self) -> None:
        # A new event each time, so that a watcher that was woken waits for the next one.
        self._changed.set()
        self._changed = asyncio.Event()

    def fail(self, error: BaseException) -> None:
        """End every watch by raising `error` in it. For errors that waiting cannot resolve."""
        self._error = error
        self.wake()
