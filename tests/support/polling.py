"""Waiting for what only a look can tell: a row in Postgres, a lock that somebody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

DEADLINE_S = 300  # much longer than anything takes on a machine with other work


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Return when `condition` holds. Raises TimeoutError after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 # Postgres tells nobody
            await asyncio.sleep(0.02)
